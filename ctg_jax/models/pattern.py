"""What a token attends to: what it may in all layers, and what differs from layer to layer, the window of attention and
the rotation, as a pattern that repeats.

All layers run through one body, which reads its mask and its rotation by the number of the layer. So layers of several
kinds are scanned as layers of one kind are, and compile time grows with neither the depth nor the pattern.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer.

    Attributes:
      window: a token attends to itself and the `window` - 1 tokens before it, counted by positions; None: to all. The
        prefix of a control is always visible.
      rotary: whether queries and keys are rotated, in a model with rotary positions.
      theta: a base of its own for the rotary frequencies, unscaled; None: the model's base and scaling.
    """

    window: int | None = None
    rotary: bool = True
    theta: float | None = None


def visible(lm: Any, n: int) -> jax.Array:
    """bool [n, n]: which of the n tokens of a row (second axis) each of them (first axis) may attend to, as `causal`,
    `block` and `paired` of a `ctg_jax.models.decoder.Transformer` say.

    A paired row is two versions of a text, one after the other. Tokens of the first attend to their own block in it and
    to the blocks before that in the second version; those of the second to its blocks up to their own. So one reading
    predicts every block of the first version given the blocks of the second before it (BD3LM, Arriola et al. 2025).
    """
    at = jnp.arange(n)
    if lm.causal:
        return at[:, None] >= at[None]
    if not lm.block:
        return jnp.ones((n, n), bool)
    if not lm.paired:
        part = at // lm.block
        return part[:, None] >= part[None]
    part, second = at % (n // 2) // lm.block, at >= n // 2
    first = jnp.where(second[None], part[:, None] > part[None], part[:, None] == part[None])
    return jnp.where(second[:, None], second[None] & (part[:, None] >= part[None]), first)


def shortest(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The shortest pattern that gives these layers when it is repeated."""
    n = len(layers)
    return next(layers[:p] for p in range(1, n + 1) if all(layers[i] == layers[i % p] for i in range(n)))


def views(
    pattern: tuple[Layer, ...],
    allowed: jax.Array,
    pos: jax.Array,
    slots: jax.Array,
    rope: Callable[[Layer, jax.Array], Any],
) -> Callable[[Any], tuple[jax.Array, Any]]:
    """The function from the number 1 … L of a layer, which may be traced, to what it may attend to and how it rotates:
    (bool [B, T, S], rope).

    Args:
      pattern: the kinds of layers.
      allowed: bool [B, T, S], without windows.
      pos: int32 [B, T], positions of queries.
      slots: int32 [B, S], positions of keys. Those of a prefix are negative, and in every window.
      rope: (kind, positions) -> how it rotates, a tree of one structure for all kinds.
    """
    kinds = tuple(dict.fromkeys(pattern))
    order = [kinds.index(kind) for kind in pattern]
    found = []
    for kind in kinds:
        seen = allowed
        if kind.window is not None:
            near = pos[:, :, None] - slots[:, None, :] < kind.window
            seen = allowed & (near | (slots < 0)[:, None, :])
        found.append((seen, rope(kind, pos)))
    if len(kinds) == 1:
        return lambda site: found[0]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *found)

    def view(site):
        if isinstance(site, int):
            return found[order[(site - 1) % len(order)]]
        kind = jnp.asarray(order)[(site - 1) % len(order)]
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, kind, keepdims=False), stacked)

    return view
