"""`SoftPrompt`, learned input vectors before or after the prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax.control import Control
from ctg_jax.controls.conditions import check_choice, gathered
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
