"""Controls that several methods are made of: `Delta`, a change of weights, `SoftPrompt`, learned input vectors, and
`Coded`, a change of weights that reads a control code."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import rng, tree
from ctg_jax.control import Control
from ctg_jax.types import InputError, Params, Prompts

# The matrices of every block: what LoRA changes by default.
KERNELS = r"layers/.*/kernel"
EVERYTHING = r".*"


@struct.dataclass
class Delta(Control):
    """A change of selected parameters: W + scale · ΔW, with ΔW dense or of low rank.

    Attributes:
      changes: path of a parameter in the stacked layout -> {"full": its shape} or {"a": [..., r, in],
        "b": [..., out, r]}, of which ΔW = b a (LoRA, Hu et al. 2021, eq. 3, with alpha / r left to `scale`).
      scale: float32 []; 0 is the frozen model, 1 the fitted one. Weights are shared by all rows, so it is not per row.
    """

    changes: dict[str, dict[str, jax.Array]]
    scale: jax.Array

    def weights(self, params: Params) -> Params:
        stacked = isinstance(params["layers"], dict)
        named = dict(self.changes)
        if not stacked:  # the layout for decoding: layers/attn/… [L, …] becomes layers/i/attn/…
            for path in [p for p in named if p.startswith("layers/")]:
                rest = path.removeprefix("layers/")
                for i, change in enumerate(tree.unstack(named.pop(path))):
                    named[f"layers/{i}/{rest}"] = change

        def moved(path, p):
            change = named.pop(path, None)
            if change is None:
                return p
            delta = change["full"] if "full" in change else change["b"] @ change["a"]
            if delta.shape != p.shape:
                raise InputError(
                    f"The control changes {path} by an array of shape {delta.shape}, but this model's has {p.shape}: "
                    "it was fitted on another model."
                )
            return (p.astype(jnp.float32) + self.scale * delta).astype(p.dtype)

        out = tree.map_with_path(moved, params)
        if named:
            raise InputError(
                f"The control changes {sorted(named)[0]}, which this model lacks: it was fitted on another model."
            )
        return out


def chosen(params: Any, pattern: str, least: int) -> dict[str, Any]:
    """The parameters whose path matches, with at least `least` axes in one layer; InputError if there is none."""
    try:
        found = tree.select(params, pattern)
    except re.error as e:
        raise InputError(f"targets is {pattern!r}, which is no regular expression ({e}).") from None
    found = {p: x for p, x in found.items() if len(x.shape) - p.startswith("layers/") >= least}
    if not found:
        paths = ", ".join(tree.flatten(params))
        raise InputError(f"targets is {pattern!r}, which matches no matrix of the model; its parameters are {paths}.")
    return found


def lora(key: jax.Array, params: Any, rank: int, targets: str = KERNELS) -> Delta:
    """A neutral low-rank `Delta` on the matrices whose whole path matches `targets`.

    Args:
      key: for `a`, normal with variance 1 / in; `b` is zero.
      params: arrays or `ShapeDtypeStruct`s in the stacked layout.
      rank: r, at least 1.
      targets: a regular expression over paths such as `layers/attn/qkv/kernel`.

    Raises:
      InputError: a rank below 1, or a pattern that matches nothing.
    """
    if rank < 1:
        raise InputError(f"rank is {rank}, expected at least 1.")
    changes = {}
    for path, w in chosen(params, targets, least=2).items():
        *lead, out, into = w.shape
        a = jax.random.normal(rng.stream(key, path), (*lead, rank, into), jnp.float32) / into**0.5
        changes[path] = {"a": a, "b": jnp.zeros((*lead, out, rank), jnp.float32)}
    return Delta(changes, jnp.ones((), jnp.float32))


def full(params: Any, targets: str = EVERYTHING) -> Delta:
    """A neutral dense `Delta` (zeros) on every parameter whose whole path matches `targets`."""
    found = chosen(params, targets, least=0)
    return Delta({p: {"full": jnp.zeros(w.shape, jnp.float32)} for p, w in found.items()}, jnp.ones((), jnp.float32))


@struct.dataclass
class SoftPrompt(Control):
    """P learned vectors before the prompt, or between prompt and continuation (Lester et al. 2021).

    Attributes:
      vectors: float32 [P, D]; or [C, P, D], of which each row takes the one that `prompts.cond[choice]` names.
      choice: None, or the name of an int [B] entry of `prompts.cond`.
      after: whether they stand after the prompt.
    """

    vectors: jax.Array
    choice: str | None = struct.field(pytree_node=False, default=None)
    after: bool = struct.field(pytree_node=False, default=False)

    def init(self, prompts, length):
        if self.choice is None:
            if self.vectors.ndim != 2:
                raise InputError(f"vectors has shape {self.vectors.shape}, expected [P, D] where choice is not named.")
            return jnp.broadcast_to(self.vectors[None], (prompts.tokens.shape[0], *self.vectors.shape))
        return gathered(self.vectors, prompts, self.choice)

    def check(self, prompts):
        if self.choice is not None:
            check_choice(prompts, self.choice, self.vectors.shape[0], "class")

    def added(self):
        return self.vectors.shape[-2]

    def prompt(self, x, mask, state):
        return joined(x, mask, state, self.after)


def joined(x: jax.Array, mask: jax.Array, soft: jax.Array, after: bool = False) -> tuple[jax.Array, jax.Array]:
    """(x, mask) of an embedded prompt with soft tokens float [B, P, D] before it, or after it."""
    parts = [(soft.astype(x.dtype), jnp.ones(soft.shape[:2], bool)), (x, mask)]
    vectors, masks = zip(*(parts[::-1] if after else parts))
    return jnp.concatenate(vectors, axis=1), jnp.concatenate(masks, axis=1)


def soft_prompt(key: jax.Array, length: int, width: int, choices: int | None = None, deviation: float = 0.02):
    """Random vectors float32 [P, D], or [C, P, D] for `choices` C: what a `SoftPrompt` starts from."""
    if length < 1:
        raise InputError(f"length is {length}, expected at least 1 vector.")
    shape = (length, width) if choices is None else (choices, length, width)
    return deviation * jax.random.normal(key, shape, jnp.float32)


@struct.dataclass
class Coded(Control):
    """A control code before the prompt, and a change of weights that reads it: the codes of CTRL (Keskar et al. 2019)
    and the reward tokens of Quark (Lu et al. 2022).

    Attributes:
      delta: the change of weights.
      codes: float32 [C, D], a learned input vector for each code.
      scale: float32 [] or [B], 0 … 1: the code to decode on, from the first (0) to the last (1), rounded to one.
      cond: None, or the name of an int [B] entry of `prompts.cond` that names each row's code instead.
    """

    delta: Delta
    codes: jax.Array
    scale: jax.Array
    cond: str | None = struct.field(pytree_node=False, default=None)

    def weights(self, params):
        return self.delta.weights(params)

    def init(self, prompts, length):
        batch = prompts.tokens.shape[0]
        if self.cond is not None:
            return gathered(self.codes, prompts, self.cond)
        last = self.codes.shape[0] - 1
        code = jnp.clip(jnp.round(jnp.asarray(self.scale, jnp.float32) * last), 0, last).astype(jnp.int32)
        return self.codes[jnp.broadcast_to(code, (batch,))]

    def check(self, prompts):
        self.delta.check(prompts)
        if self.cond is not None:
            check_choice(prompts, self.cond, self.codes.shape[0], "code")

    def added(self):
        return 1

    def prompt(self, x, mask, state):
        return joined(x, mask, state[:, None])


def coded(key: jax.Array, delta: Delta, width: int, codes: int, deviation: float = 0.02) -> Coded:
    """A `Coded` with random codes, normal with the given deviation, that decodes on the last of them.

    Raises:
      InputError: fewer than two codes.
    """
    if codes < 2:
        raise InputError(f"{codes} control codes were asked for, expected at least 2.")
    vectors = deviation * jax.random.normal(key, (codes, width), jnp.float32)
    return Coded(delta, vectors, jnp.ones((), jnp.float32))


def condition(prompts: Prompts, name: str) -> jax.Array:
    """The entry of `prompts.cond` [B, …] that a control reads; InputError where it is missing."""
    if not isinstance(prompts.cond, dict) or name not in prompts.cond:
        held = sorted(prompts.cond) if isinstance(prompts.cond, dict) else prompts.cond
        raise InputError(f"The control reads prompts.cond[{name!r}] for each row, but prompts.cond holds {held}.")
    return prompts.cond[name]


def gathered(table: jax.Array, prompts: Prompts, name: str) -> jax.Array:
    """The row of a table [C, …] that the entry int [B] of `prompts.cond` names, [B, …]; NaN where it names none, so
    that inside a compiled program, where `check_choice` sees no values, a wrong index is never read as another row."""
    index = condition(prompts, name)
    index = jnp.where(index < 0, table.shape[0], index)  # a negative index would count from the end
    return jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan)


def check_choice(prompts: Prompts, name: str, count: int, what: str) -> None:
    """InputError where the entry of `prompts.cond` that `gathered` will read names no row of a table of `count`; for
    `Control.check`.

    what: a row is called so in the message, such as "class".
    """
    values = tree.concrete(condition(prompts, name))
    if values is None:
        return
    if values.dtype.kind not in "iu":
        raise InputError(
            f"prompts.cond[{name!r}] holds {values.dtype} numbers, expected whole ones: the {what} of each row."
        )
    bad = np.flatnonzero((values < 0) | (values >= count))
    if bad.size:
        raise InputError(
            f"prompts.cond[{name!r}] is {values.flat[bad[0]]} in row {bad[0]}, but the control has {count}: expected a "
            f"{what} from 0 to {count - 1}."
        )


def per_row(leaf: jax.Array, prompts: Prompts, cond: str | None) -> jax.Array:
    """A strength for each row, float32 [B, 1, 1], or [1, 1, 1] where all rows share it.

    leaf: float [] or [B]; cond: the name of an entry [B] of `prompts.cond` that multiplies it, or None.
    """
    strength = jnp.asarray(leaf, jnp.float32)
    if cond is not None:
        rows = condition(prompts, cond).astype(jnp.float32)
        strength = rows * (strength if strength.ndim else jnp.full(rows.shape, strength))
    return strength.reshape(-1, 1, 1)
