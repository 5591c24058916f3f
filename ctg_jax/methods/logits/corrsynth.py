"""CorrSynth: texts that are written together, each contrasted with what the others would say (Kowshik et al. 2024).

    q_a ∝ p_a ^ gamma / Π_{b ≠ a} p_b ^ (w_ab alpha),   Σ_b w_ab = 1

K rows that are neighbours form a group, such as prompts for different labels, or several samples of one prompt. Every
row reads its own text, and its distribution p_a is divided by the geometric mean of those of the others at their own
texts, so that one pass over the model gives all K. gamma is the power of the own distribution (1: as it is), alpha the
strength of the contrast, at 0 of which rows are independent. In the paper's letters alpha is γ - δ; the exact exponents
are recalled, not read.

    control = corrsynth.make(lm, key, group=4, alpha=0.5)
    samples = strategies.run(lm, params, prompts, control, sampling)

Since rows read each other, this is no control, which must treat a row alone as in its batch, but a decoding strategy of
its own: the text of a row depends on its group, nothing else acts on it, and it has no likelihood as a function of the
text. Rows that have ended leave the contrast of the others.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ctg_jax.control import IDENTITY, Control
from ctg_jax.controls import constraints
from ctg_jax.controls.streams import log_probabilities
from ctg_jax.decode import loop
from ctg_jax.decode.checks import check_rows
from ctg_jax.decode.strategies import Strategy
from ctg_jax.models.lm import LM
from ctg_jax.support import remove, removed
from ctg_jax.types import InputError, Params, Prompts, Samples, Sampling


@dataclasses.dataclass(frozen=True)
class Together(Strategy):
    """Groups of neighbouring rows, token by token."""

    likelihood: ClassVar[bool] = False
    apart: ClassVar[bool] = False

    def check(self, lm, prompts, control, sampling):
        control = constraints.apart(control)[1]
        check_rows(lm, prompts, IDENTITY, sampling.max_new)
        keys = np.asarray(jax.random.key_data(prompts.keys))
        if len(keys) % control.group:
            raise InputError(
                f"A batch has {len(keys)} rows, but groups have {control.group}: give a number that it divides, "
                "as a batch too."
            )
        filled = np.all(keys == keys[:1], axis=-1)  # copies of the first row that fill the last batch
        filled[0] = False
        groups = filled.reshape(-1, control.group)
        if np.any(groups.any(1) & ~groups.all(1)):
            raise InputError(f"The last group has fewer than {control.group} rows: give a number that it divides.")

    def __call__(self, lm, params, prompts, control, sampling):
        banned, control = constraints.apart(control)
        rule = IDENTITY if banned is None else constraints.Ban(banned)
        return written(lm, params, prompts, rule, control, sampling)


@struct.dataclass
class Correlated:
    """How the rows of a group are contrasted.

    Attributes:
      weights: float32 [K, K], at least 0, how much row b counts in the contrast of row a; 0 on the diagonal.
      gamma: float32 [], the power of the own distribution.
      alpha: float32 [], the strength of the contrast.
      plausible: float32 [], the least share of the likeliest token's probability that a token must have; 0: none.
    """

    strategy: ClassVar = Together()

    weights: jax.Array
    gamma: jax.Array
    alpha: jax.Array
    plausible: jax.Array

    @property
    def group(self) -> int:
        """K, the number of rows in a group."""
        return self.weights.shape[0]

    def contrasted(self, z: jax.Array, done: jax.Array) -> jax.Array:
        """The logits float32 [B, V] of q, of the logits of p and which rows have ended, bool [B]."""
        rows, vocab = z.shape
        logp = log_probabilities(z).reshape(-1, self.group, vocab)
        weights = self.weights[None] * ~done.reshape(-1, 1, self.group)
        total = jnp.sum(weights, axis=2, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1.0)
        heard = jnp.where(removed(logp), 0.0, logp)  # what another row excludes says nothing about this one
        others = jnp.einsum("gab,gbv->gav", weights, heard)
        least = jnp.max(logp, axis=-1, keepdims=True) + jnp.log(jnp.maximum(self.plausible, 1e-30))
        out = remove(self.gamma * logp - self.alpha * others, removed(logp) | ((logp < least) & (self.alpha != 0)))
        return out.reshape(rows, vocab)


@partial(jax.jit, static_argnames=("lm", "sampling"))
def written(
    lm: LM, params: Params, prompts: Prompts, rule: Control, control: Correlated, sampling: Sampling
) -> Samples:
    """Completions of prompts [B, T], of which every K neighbouring rows are a group. `rule` acts on the logits of p
    before they are contrasted. `Samples.logp` is the log-probability of each token given what the group had written
    before it."""
    params = lm.unstack(params)

    def going(d):
        return (d.t < sampling.max_new) & ~jnp.all(d.done)

    def on(d):
        d = loop.sample(d.replace(z=control.contrasted(d.z, d.done)), prompts.keys, sampling)
        return lax.cond(going(d), lambda d: loop.read(lm, params, d, rule), lambda d: d, d)

    d = lax.while_loop(going, on, loop.prefill(lm, params, prompts, rule, sampling))
    return Samples(tokens=d.tokens, mask=d.mask, logp=d.logp, generated=d.t)


def init(
    lm: LM,
    key: jax.Array,
    *,
    group: int,
    gamma: float = 1.0,
    alpha: float = 0.5,
    plausible: float = 0.0,
    labels: int | None = None,
) -> Correlated:
    """What makes groups of rows differ.

    Args:
      group: K, the number of neighbouring rows that are written together.
      gamma, alpha, plausible: see `Correlated`.
      labels: where given, the rows of a group have this many labels, in blocks of equal size, and a row is contrasted
        with the rows of other labels alone; None: with all others.

    Raises:
      InputError: a group below 1, labels that do not divide it, numbers that are not finite, plausible outside 0 … 1.
    """
    if group < 1:
        raise InputError(f"group is {group}, expected at least 1 row.")
    if labels is not None and (labels < 1 or group % labels):
        raise InputError(f"labels is {labels}, expected a number that divides group, {group}.")
    for name, value in (("gamma", gamma), ("alpha", alpha)):
        if not isinstance(value, jax.Array) and not np.all(np.isfinite(value)):
            raise InputError(f"{name} is {value}, expected a finite number.")
    if not 0 <= plausible <= 1:
        raise InputError(f"plausible is {plausible}, expected a share from 0 to 1.")
    block = np.arange(group) // (1 if labels is None else group // labels)
    weights = (block[:, None] != block[None]).astype(np.float32)
    return Correlated(jnp.asarray(weights), *(jnp.float32(x) for x in (gamma, alpha, plausible)))


make = init
