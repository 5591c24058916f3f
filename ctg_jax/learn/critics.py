"""What critics learn, the value of a text so far, from rewards of whole texts or from labels; and the values of rows
while they are written."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ctg_jax.control import Control
from ctg_jax.controls.streams import Reading, Stream, check_vocabulary
from ctg_jax.data.labels import labelled
from ctg_jax.data.sources import Source
from ctg_jax.decode.checks import check_rows
from ctg_jax.learn.pool import positive
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact
from ctg_jax.types import InputError, Params, Prompts

KINDS = ("bce", "mse", "weighted", "last", "gae", "soft")
GOALS = ("label", "reward", "logit")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What V, the value of a text so far, learns: the section `objective`.

    Attributes:
      kind: "bce", binary cross-entropy at every prefix, so that V = logit P(c | prefix); "mse", the squared error at
        every prefix; "weighted", the same with weights 2 t / (n (n + 1)) after t of n tokens; "last", the same after
        the whole text alone; "gae", the squared error from returns by generalised advantages, of the head as it is;
        "soft", e^x - x - 1 with x = (r - V) / β, whose minimum is V = β log E[exp(r / β) | prefix].
      goal: what is learned of a pool: "label", 1 where the reward is at least the threshold and 0 elsewhere; "reward",
        as it is; "logit", the log-odds of a reward between 0 and 1, which CriticControl takes for sentiment. None:
        "label" for "bce", "reward" for the others.
      gamma, lam: of "gae". beta: β of "soft".
      limit: the largest p / q of a sample.

    Raises:
      InputError: another kind or goal, beta or limit that is not positive.
    """

    kind: str = "bce"
    goal: str | None = None
    gamma: float = 1.0
    lam: float = 0.95
    beta: float = 1.0
    limit: float = 10.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"kind is {self.kind!r}, expected one of {', '.join(KINDS)}.")
        if self.goal is not None and self.goal not in GOALS:
            raise InputError(f"goal is {self.goal!r}, expected one of {', '.join(GOALS)}.")
        for name in ("beta", "limit"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number.")

    def errors(
        self, v: jax.Array, real: jax.Array, goal: jax.Array, importance: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(errors, weights), float32 [B, N + 1] each.

        Args:
          v: float32 [B, N + 1], V before the first token of a text and after each. real: bool, which of them are.
          goal: float32 [B], the reward or label of each text. importance: float32 [B].
        """
        goal = jnp.broadcast_to(goal[:, None], v.shape)
        place = jnp.cumsum(real, axis=1) - 1.0
        n = jnp.sum(real, axis=1, keepdims=True) - 1.0
        last = real & (place == n)
        weight = importance[:, None] * real
        if self.kind == "weighted":
            weight = weight * 2 * place / jnp.maximum(n * (n + 1), 1.0)
        if self.kind == "last":
            weight = weight * last
        if self.kind == "gae":
            old = lax.stop_gradient(v)
            goal = old + advantages(jnp.where(last, goal, 0.0), old, real, gamma=self.gamma, lam=self.lam)
        if self.kind == "bce":
            return -goal * jax.nn.log_sigmoid(v) - (1 - goal) * jax.nn.log_sigmoid(-v), weight
        if self.kind == "soft":
            x = (goal - v) / self.beta
            near = jnp.minimum(x, 8.0)  # beyond it a line, so that the gradient of a bad first guess stays finite
            return jnp.exp(near) * (1 + x - near) - x - 1, weight
        return jnp.square(v - goal), weight


def advantages(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float = 1.0, lam: float = 0.95
) -> jax.Array:
    """Generalised advantage estimates float32 [B, N] (Schulman et al. 2016, eq. 16) of rewards and values [B, N];
    beyond the end of a row (mask False) values are 0."""
    values = jnp.where(mask, values, 0.0)
    after = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    delta = jnp.where(mask, rewards + gamma * after - values, 0.0)

    def back(carry, d):
        carry = d + gamma * lam * carry
        return carry, carry

    _, out = lax.scan(back, jnp.zeros(rewards.shape[0]), delta.T, reverse=True)
    return jnp.where(mask, out.T, 0.0)


def goals(rewards: np.ndarray, objective: Objective, threshold: float) -> np.ndarray:
    """What V learns of each sample, float32 [n]; see `Objective.goal`.

    Args:
      rewards: float [n]. threshold: the reward from which the label is 1.

    Raises:
      InputError: all samples on one side of the threshold; a reward that is no probability where one is needed.
    """
    goal = objective.goal or ("label" if objective.kind == "bce" else "reward")
    if goal == "label":
        return positive(rewards, threshold).astype(np.float32)
    outside = rewards[(rewards < 0) | (rewards > 1)]
    if (goal == "logit" or objective.kind == "bce") and len(outside):
        what = "goal 'logit'" if goal == "logit" else "kind 'bce'"
        raise InputError(f"a reward is {outside[0]:g}, but {what} needs probabilities: take another goal or kind.")
    if goal == "logit":
        kept = np.clip(rewards, 1e-4, 1 - 1e-4)
        return (np.log(kept) - np.log1p(-kept)).astype(np.float32)
    return rewards.astype(np.float32)


def of_label(data: Artifact, label: int) -> Source:
    """Labelled texts with the fields `goal`, 1 for the wanted label and 0 for the others, and `importance`, 1.

    Raises:
      InputError: no text has the label, or all have it.
    """
    records = labelled(data.rows("data.jsonl"), str(data.path))
    seen = sorted({r["label"] for r in records})
    if label not in seen or len(seen) < 2:
        raise InputError(
            f"label is {label}, but the texts of {data.path.name} have the labels {seen}: choose one of at least two."
        )
    return Source(str(data.path), "", [{**r, "goal": float(r["label"] == label), "importance": 1.0} for r in records])


@struct.dataclass
class Valued:
    """What a critic has read of rows that are being written.

    reading: of its language model. v: float32 [B], the value of the prompt and the tokens read so far."""

    reading: Reading
    v: jax.Array


@dataclasses.dataclass(frozen=True)
class Watch:
    """A critic beside a decode loop that pauses: it reads what was written since the last pause in one pass, from a
    cache of its own.

    Attributes:
      critic: a control with a `judge`, the `Stream` that reads, and `values` of its states, such as `critic.Critic`.
        Its strength, and how it would look ahead, have no effect.
      lm, params: the model that writes.

    Raises:
      InputError: a control without values of unfinished texts, a critic with fewer tokens than the model.
    """

    critic: Control
    lm: LM
    params: Params

    def __post_init__(self):
        if not (isinstance(getattr(self.critic, "judge", None), Stream) and hasattr(self.critic, "values")):
            raise InputError(
                f"{type(self.critic).__name__} gives no value to unfinished texts: expected a control of `critic`."
            )
        check_vocabulary("The critic", self.critic.judge.lm.vocab, self.lm.vocab, larger=True)

    def begin(self, prompts: Prompts, new: int, steps: int) -> Valued:
        """What the critic knows when it has read the prompts; `new` tokens may follow, `steps` of them at a time.

        Raises:
          InputError: what `checks.check_rows` raises for the critic.
        """
        check_rows(self.lm, prompts, self.critic, new)
        return _begun(self.lm, self.params, self.critic, prompts, prompts.tokens.shape[1] + new + steps)

    def read(self, valued: Valued, tokens: np.ndarray, mask: np.ndarray, look: int, steps: int) -> Valued:
        """After reading what was written before pause number `look`, at most `steps` tokens since the last pause. The
        value of a row that had ended stays.

        Args:
          tokens, mask: int32 and bool [B, N], all that is written.

        Raises:
          InputError: a value that is not finite.
        """
        block = [np.pad(x, ((0, 0), (0, steps)))[:, look * steps :][:, :steps] for x in (tokens, mask)]
        valued = _went_on(self.lm, self.params, self.critic, valued, *block)
        if bad := np.sum(~np.isfinite(valued.v)):
            raise InputError(
                f"the critic's value of {bad} of {len(mask)} candidates is not finite: it holds NaN or infinity."
            )
        return valued


@partial(jax.jit, static_argnames=("lm", "length"))
def _begun(lm: LM, params: Params, critic: Any, prompts: Prompts, length: int) -> Valued:
    judge = critic.judge.bind(params, lm.unstack(params))
    _, h, reading = judge.read(prompts.tokens, prompts.mask, 1, judge.init(prompts, length + 1))
    return Valued(reading, critic.values(h[:, -1:])[:, 0])


@partial(jax.jit, static_argnames=("lm",))
def _went_on(lm: LM, params: Params, critic: Any, valued: Valued, tokens: jax.Array, mask: jax.Array) -> Valued:
    judge = critic.judge.bind(params, lm.unstack(params))
    _, h, reading = judge.read(tokens, mask, 1, valued.reading)
    found = critic.values(h[:, h.shape[1] - tokens.shape[1] :])
    last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
    v = jnp.take_along_axis(found, last[:, None], axis=1)[:, 0]
    return Valued(reading, jnp.where(jnp.any(mask, axis=1), v, valued.v))
