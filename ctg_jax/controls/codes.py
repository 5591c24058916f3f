"""`Coded`, a control code before the prompt with a change of weights that was trained to read it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax.control import Control
from ctg_jax.controls.conditions import check_choice, gathered
from ctg_jax.controls.delta import Delta
from ctg_jax.controls.vectors import joined
from ctg_jax.types import InputError


@struct.dataclass
class Coded(Control):
    """A control code before the prompt, and a change of weights that reads it: the codes of CTRL (Keskar et al. 2019)
    and the reward tokens of Quark (Lu et al. 2022).

    Attributes:
      delta: the change of weights.
      codes: float32 [C, D], a learned input vector for each code.
      scale: float32 [] or [B], 0 … 1: the code to decode on, from the first (0) to the last (1), rounded to one.
      cond: None, or the name of an int [B] entry of `prompts.cond` that names each row's code instead.
      start: None, or the token that stands for an empty prompt: in a row with no other token, and in one without any,
        the text begins behind the code itself.
    """

    delta: Delta
    codes: jax.Array
    scale: jax.Array
    cond: str | None = struct.field(pytree_node=False, default=None)
    start: int | None = struct.field(pytree_node=False, default=None)

    cond_multiplies = False

    def weights(self, params):
        return self.delta.weights(params)

    def init(self, prompts, length):
        size = jnp.sum(prompts.mask, axis=1)
        alone = size == 0
        if self.start is not None:
            alone |= (size == 1) & (prompts.tokens[:, -1] == self.start)
        if self.cond is not None:
            return gathered(self.codes, prompts, self.cond), alone
        last = self.codes.shape[0] - 1
        code = jnp.clip(jnp.round(jnp.asarray(self.scale, jnp.float32) * last), 0, last).astype(jnp.int32)
        return self.codes[jnp.broadcast_to(code, alone.shape)], alone

    def check(self, prompts):
        self.delta.check(prompts)
        if self.cond is not None:
            check_choice(prompts, self.cond, self.codes.shape[0], "code")

    def added(self):
        return 1

    def prompt(self, x, mask, state):
        code, alone = state
        before, after = (joined(x, mask & ~alone[:, None], code[:, None], last) for last in (False, True))
        return jax.tree.map(
            lambda a, b: jnp.where(jnp.expand_dims(alone, tuple(range(1, a.ndim))), b, a), before, after
        )


def coded(key: jax.Array, delta: Delta, width: int, codes: int, deviation: float = 0.02) -> Coded:
    """A `Coded` with random codes, normal with the given deviation, that decodes on the last of them.

    Raises:
      InputError: fewer than two codes.
    """
    if codes < 2:
        raise InputError(f"{codes} control codes were asked for, expected at least 2.")
    vectors = deviation * jax.random.normal(key, (codes, width), jnp.float32)
    return Coded(delta, vectors, jnp.ones((), jnp.float32))
