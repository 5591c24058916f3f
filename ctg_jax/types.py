"""The values that travel between the parts of the library.

Letters used in shapes everywhere: B batch, T prompt, N new tokens, S cache slots, L layers, D width,
K key/value heads, H head dimension, V vocabulary, P soft-prompt or prefix length.
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Params = dict[str, Any]  # a plain nested dict of arrays
PyTree = Any


class InputError(ValueError):
    """Bad input, described in one sentence: which argument, what was found, what was expected, what to do.

    Experiment scripts print the sentence and exit with code 2; nothing else is caught.
    """


def optional(module: str, extra: str) -> ModuleType:
    """Imports a module of a library that only one of the package's extras installs.

    Args:
      module: dotted name, such as "sacrebleu.metrics".
      extra: the name of the extra in setup.py.

    Raises:
      InputError: the module, or something that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise InputError(f"{module} cannot be imported ({e}): install it with pip install 'ctg_jax[{extra}]'") from e


@struct.dataclass
class Prompts:
    """A batch of prompts, right-aligned: padding is on the left, so one scalar gives the next slot to write.

    Attributes:
      tokens: int32 [B, T].
      mask: bool [B, T], True where a token is real; each row is False…False True…True.
      keys: typed PRNG keys [B]; those of an example are a function of its id (`rng.per_example`), so its text does not
        depend on batch size, padding, or layout.
      cond: any pytree with leading axis B that controls read per row (class index, reward bin, target).
    """

    tokens: jax.Array
    mask: jax.Array
    keys: jax.Array
    cond: PyTree = None


@struct.dataclass
class Samples:
    """Completions: tokens int32 [B, N], mask bool [B, N] (the EOS token is inside, padding is not), and
    logp float32 [B, N], the log-probability of each token under the controlled distribution (0 where
    masked). `generated` is the number of loop steps that ran, int32 []."""

    tokens: jax.Array
    mask: jax.Array
    logp: jax.Array
    generated: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Static description of a decode loop. Everything that shapes the distribution (temperature, top-p, …)
    is a control; see `ctg_jax.controls.truncate`.

    Attributes:
      max_new: number of new tokens N.
      eos: token ids that end a row (empty: rows always run to N).
      pad: token written after the end of a row.
      greedy: take the most likely token instead of sampling.
      stop: token sequences that end a row as soon as its last tokens equal one of them.
    """

    max_new: int = 20
    eos: tuple[int, ...] = ()
    pad: int = 0
    greedy: bool = False
    stop: tuple[tuple[int, ...], ...] = ()


@struct.dataclass
class Sum:
    """What a loss returns: totals and weights, never means, so that any split of a batch adds up exactly.

    Attributes:
      total: float32 [], the summed loss.
      weight: float32 [], what to divide it by (tokens, sequences).
      metrics: name -> (total, weight), float32 [] each.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]] = struct.field(default_factory=dict)

    def __add__(self, other: Sum) -> Sum:
        return jax.tree.map(jnp.add, self, other)
