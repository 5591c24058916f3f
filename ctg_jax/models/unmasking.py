"""Sampling from masked diffusion: in which order the tokens of a row are written, and the writing itself.

`ctg_jax.models.masked` defines denoisers and the distribution that is sampled here.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ctg_jax import rng
from ctg_jax.models.masked import Denoiser, check, share, subs
from ctg_jax.types import InputError

NEVER = -1  # the step of a token that is given
FINALS = ("draw", "argmax")
CHOICES = ("time", "left", "right", "certain", "uncertain", "confidence")


@dataclasses.dataclass(frozen=True)
class Order:
    """In which order the tokens of a row are written.

    Attributes:
      reveal, block, schedule: `steps`, `block` and `schedule` of `order`.
      final: how tokens are chosen in the last of every `reveal` steps: "draw" or "argmax".
      by: what decides which tokens of its block a step writes; how many they are is the same whatever decides.
        "time": their moments in the forward process, which samples the model's distribution as steps become many.
        "left", "right": their places. "certain", "uncertain": the least or the greatest entropy of what the model
        predicts for them (FiLM, Shen et al. 2023). With one token a step these sample the distribution too, if the
        model's conditionals are consistent.
        "confidence": the greatest probability of the token that was drawn (Chang et al. 2022; Nie et al. 2025, LLaDA),
        which needs few steps and samples a sharper distribution.
    """

    reveal: int = 0
    block: int = 0
    schedule: str = "loglinear"
    final: str = "draw"
    by: str = "time"

    def __post_init__(self):
        check(self.schedule)
        if self.by not in CHOICES:
            raise InputError(f"by is {self.by!r}, expected one of {', '.join(CHOICES)}.")
        if self.final not in FINALS:
            raise InputError(f"final is {self.final!r}, expected one of {', '.join(FINALS)}.")
        if min(self.reveal, self.block) < 0:
            raise InputError(f"reveal={self.reveal}, block={self.block}: expected 0 or more.")


def order(
    keys: jax.Array,
    hidden: jax.Array,
    part: jax.Array | None = None,
    *,
    steps: int = 0,
    schedule: str = "loglinear",
) -> jax.Array:
    """The step at which each token is written, int32 [B, S]; `NEVER` for given tokens.

    In ancestral sampling, a masked token is written in the step from time t to s with probability (alpha(s) -
    alpha(t)) / (1 - alpha(t)), which depends on no token; so the steps can be drawn before the tokens.

    Args:
      keys: of the rows, [B]. hidden: bool [B, S], False for given tokens.
      part: int32 [B, S], the block of each token, which are written one after another, see `blocks`; None: all tokens
        are in one.
      steps: equal steps of time from 1 to 0, in each block; 0: one token at a time in a random order, which is the
        limit of infinitely many steps (Zheng et al. 2024).
      schedule: see `masked.share`.
    """
    u = jax.vmap(lambda k: jax.random.uniform(k, (hidden.shape[1],)))(keys)
    part = jnp.zeros_like(hidden, jnp.int32) if part is None else part
    if steps:
        after = 1 - jnp.arange(1, steps + 1) / steps
        still = u[:, :, None] < share(after, schedule)[None, None]
        when = part * steps + jnp.sum(still, axis=-1, dtype=jnp.int32)
    else:
        late = jnp.where(hidden, part + u, jnp.inf)
        when = jnp.argsort(jnp.argsort(late, axis=1), axis=1).astype(jnp.int32)
    return jnp.where(hidden, when, NEVER)


def blocks(hidden: jax.Array, block: int, *, whole: bool = False) -> jax.Array:
    """The block of each token int32 [B, S]; only those of hidden tokens mean anything.

    Args:
      hidden: bool [B, S], False for given tokens.
      block: the tokens of a block, from left to right; 0: all are in one.
      whole: whether given tokens count too, so that the blocks of all rows begin at the same places.
    """
    nth = jnp.cumsum(jnp.ones_like(hidden) if whole else hidden, axis=1, dtype=jnp.int32) - 1
    return nth // block if block else jnp.zeros_like(nth)


def step_count(tokens: int, *, steps: int = 0, block: int = 0) -> int:
    """The number of steps in an `order` of at most this number of hidden tokens."""
    return steps * (-(-tokens // block) if block else 1) if steps else tokens


def unmask(
    denoise: Denoiser,
    x: jax.Array,
    when: jax.Array,
    keys: jax.Array,
    *,
    steps: int,
    final: int = 0,
    greedy: bool = False,
    cache: bool = True,
    by: str = "time",
    part: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes every token of the rows.

    Args:
      x: tokens int32 [B, S], the mask where `when` is not `NEVER`. Any tokens may be given.
      when: from `order`. steps: the number of steps in it, see `step_count`.
      keys: [B]; step i of row b draws with `fold_in(keys[b], i)`.
      final: n: the last of every n steps takes the most likely token instead of drawing one; 0: no step does.
      greedy: every step takes the most likely token.
      cache: whether to call the denoiser only at steps in which some token of the batch is written; at the others its
        input does not change. This affects the speed only.
      by: see `Order`. Where it is not "time", a step writes as many tokens as `when` has in it.
      part: that of `order`.

    Returns:
      The rows, int32 [B, S], and the number of calls of the denoiser, int32 []. A token whose logits are not finite
      numbers stays the mask.
    """

    hidden = when != NEVER
    part = jnp.zeros_like(when) if part is None else part

    def write(carry, i):
        x, calls = carry
        z = subs(denoise(x), x)
        best = jnp.argmax(z, axis=-1)
        if not greedy:
            flat = jax.vmap(rng.per_example, (0, None))(rng.at_step(keys, i), jnp.arange(x.shape[1])).reshape(-1)
            drawn = rng.draw(flat, z.reshape(-1, z.shape[-1])).reshape(x.shape)
            best = jnp.where(i % final == final - 1, best, drawn) if final else drawn
        here = when == i
        if by != "time":
            here = _first(_scores(by, z, best), here, (x == z.shape[-1] - 1) & hidden, part)
        here &= ~jnp.any(jnp.isnan(z), axis=-1)
        return jnp.where(here, best.astype(x.dtype), x), calls + 1

    def step(carry, i):
        if not cache:
            return write(carry, i), None
        return lax.cond(jnp.any(when == i), write, lambda carry, i: carry, carry, i), None

    return lax.scan(step, (x, jnp.zeros((), jnp.int32)), jnp.arange(steps))[0]


def _scores(by, z, best):
    """float32 [B, S]: tokens with high scores are written first."""
    place = jnp.broadcast_to(jnp.arange(z.shape[1], dtype=jnp.float32)[None], z.shape[:2])
    if by in ("left", "right"):
        return place if by == "right" else -place
    logp = jax.nn.log_softmax(z, axis=-1)
    if by == "confidence":
        return jnp.take_along_axis(logp, best[:, :, None], axis=-1)[:, :, 0]
    entropy = -jnp.sum(jnp.where(jnp.isfinite(logp), jnp.exp(logp) * logp, 0.0), axis=-1)
    return entropy if by == "uncertain" else -entropy


def _first(score, here, open_, part):
    """bool [B, S]: as many tokens as `here` names, of the same block and still open, those with the highest scores."""
    block = jnp.max(jnp.where(here, part, -1), axis=1, keepdims=True)
    among = jnp.where(open_ & (part == block), score, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-among, axis=1), axis=1)
    return (rank < jnp.sum(here, axis=1, keepdims=True)) & open_ & (part == block)


def first_order(gradient: jax.Array, table: jax.Array, mask: int) -> jax.Array:
    """log f(x with v in place of the mask) - log f(x), float32 [B, S, V + 1], for every position and token v, to first
    order in the embeddings.

    With f the probability of a class, adding it to the logits of the denoiser guides samples towards that class
    (Nisonoff et al. 2024; Schiff et al. 2024). It guides which token is written, not when; with strength 1 and an exact
    ratio this gives the posterior.

    Args:
      gradient: of log f(x) with respect to the embeddings of the row, [B, S, D].
      table: the embeddings, [V + 1, D]. mask: the id of the mask.
    """
    return jnp.einsum("bsd,vd->bsv", gradient, table - table[mask][None])
