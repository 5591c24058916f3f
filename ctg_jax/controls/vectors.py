"""`SoftPrompt`, learned input vectors before or after the prompt; `Shift`, vectors for the states of its tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax.control import Control
from ctg_jax.controls.conditions import check_choice, gathered, per_row
from ctg_jax.controls.selection import AtPositions, Positions
from ctg_jax.types import InputError


@struct.dataclass
class SoftPrompt(Control):
    """P learned vectors before the prompt, or between prompt and continuation (Lester et al. 2021).

    Attributes:
      vectors: float32 [P, D]; or [C, P, D], of which each row takes the one that `prompts.cond[choice]` names.
      choice: None, or the name of an int [B] entry of `prompts.cond`.
      after: whether they follow the prompt.
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
class Shift(AtPositions):
    """h + scale · shift after every block, for the tokens of the prompt: a vector of each row, block and token.

    Attributes:
      shift: float32 [B, L, T, D]; its token t is token t of the prompt, also where padding or
        vectors come before or after the prompt.
      scale: float32 [] or, per row, [B].
      positions: the tokens that are edited, of those of the prompt; see `ctg_jax.controls.selection`.
    """

    shift: jax.Array
    scale: jax.Array
    positions: Positions = struct.field(pytree_node=False, default=Positions("prompt"))

    def init(self, prompts, length):
        return per_row(self.scale, prompts, None), self.shift, self.positions.begin(prompts)

    def hidden(self, h, site, pos, state):
        return shifted(self.positions, h, site, pos, state)


def shifted(positions: Positions, h: jax.Array, site: jax.Array | int, pos: jax.Array, state) -> jax.Array:
    """The hook `hidden` of a control whose state is that of a `Shift`."""
    scale, shift, placed = state
    depth, size = shift.shape[1:3]
    if isinstance(site, int):
        if not 1 <= site <= depth:
            return h
        mine = shift[:, site - 1]
    else:
        here = (site >= 1) & (site <= depth)
        mine = jnp.where(here, jnp.take(shift, jnp.clip(site - 1, 0, depth - 1), axis=1), 0.0)
    at = pos - placed.first[:, None]
    mine = jnp.take_along_axis(mine, jnp.clip(at, 0, size - 1)[:, :, None], axis=1)
    own = at < placed.size[:, None]  # what a control puts after the prompt is no token of it
    mine = jnp.where(own[:, :, None], mine, 0.0)
    return h + positions.within(scale * mine, pos, placed).astype(h.dtype)
