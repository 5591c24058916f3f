"""What a row chooses for itself: how controls read, gather by and check the entries of `prompts.cond`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import tree
from ctg_jax.types import InputError, Prompts


def condition(prompts: Prompts, name: str) -> jax.Array:
    """The entry of `prompts.cond` [B, …] that a control reads; InputError where it is missing."""
    if not isinstance(prompts.cond, dict) or name not in prompts.cond:
        held = sorted(prompts.cond) if isinstance(prompts.cond, dict) else prompts.cond
        raise InputError(f"The control reads prompts.cond[{name!r}] for each row, but prompts.cond holds {held}.")
    return prompts.cond[name]


def gathered(table: jax.Array, prompts: Prompts, name: str) -> jax.Array:
    """The row of a table [C, …] that the entry int [B] of `prompts.cond` names, [B, …]; NaN where it names none, so
    that inside a compiled program, where `check_choice` sees no values, a wrong index is never read as another row. A
    table without NaN, such as one of whole numbers, has the fill value of `jnp.take` there."""
    index = condition(prompts, name)
    index = jnp.where(index < 0, table.shape[0], index)  # a negative index would count from the end
    return jnp.take(table, index, axis=0, mode="fill")


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
