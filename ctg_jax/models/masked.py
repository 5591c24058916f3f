"""Masked diffusion over tokens (MDLM, Sahoo et al. 2024; also Ou et al. 2024, Shi et al. 2024).

Going forward in time t from 0 to 1 every token is replaced by the mask, each at a moment of its own; `share(t)` of them
are masked. A denoiser reads a row with some tokens masked and gives the distribution of each of them;
the time is not told, since the row says it (Ou et al. 2024). Here a denoiser is any function of tokens int [N, S] that
gives logits [N, S, V + 1], the mask being token V; rows must not depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ctg_jax import rng
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.lengths import check_reads
from ctg_jax.types import InputError, Params

SCHEDULES = ("loglinear", "linear", "cosine")
FINALS = ("draw", "argmax")
NEVER = -1  # in an order: a token that is given

Denoiser = Callable[[jax.Array], jax.Array]


def share(t: jax.Array, schedule: str = "cosine") -> jax.Array:
    """1 - alpha(t): the probability that a token is masked at time t, both float32 of one shape; 0 at 0 and 1 at 1.

    "loglinear" is t, "linear" 1 - exp(-20 t) (linear in the total noise; 1 - 2e-9 at t = 1), "cosine" sin²(pi t / 2)
    (Sahoo et al. 2024, who call that cosine squared).
    """
    check(schedule)
    if schedule == "loglinear":
        return t
    return -jnp.expm1(-20 * t) if schedule == "linear" else jnp.sin(math.pi / 2 * t) ** 2


def weight(t: jax.Array, schedule: str = "cosine") -> jax.Array:
    """-alpha'(t) / (1 - alpha(t)) for t > 0: what the loss of the masked tokens at time t counts."""
    check(schedule)
    if schedule == "loglinear":
        return 1 / t
    return 20 / jnp.expm1(20 * t) if schedule == "linear" else math.pi / jnp.tan(math.pi / 2 * t)


def subs(logits: jax.Array, x: jax.Array) -> jax.Array:
    """Logits float32 [N, S, V + 1] of the clean tokens, given those of the network and the row x int [N, S].

    The two rules of the SUBS parameterisation: the mask is never a clean token, and a token that is seen stays what it
    is, with probability 1 (Sahoo et al. 2024).
    """
    token = jnp.arange(logits.shape[-1])[None, None]
    mask = logits.shape[-1] - 1
    seen = jnp.where(token == x[:, :, None], 0.0, -jnp.inf)
    hidden = jnp.where(token == mask, -jnp.inf, logits.astype(jnp.float32))
    return jnp.where(x[:, :, None] == mask, hidden, seen)


def nelbo(
    denoise: Denoiser, tokens: jax.Array, keys: jax.Array, mask: int, *, schedule: str = "cosine", draws: int = 1
) -> jax.Array:
    """An unbiased estimate float32 [B], in nats, of an upper bound of -log p(row), rows int [B, S], keys [B].

    Rao-Blackwellised and in continuous time (Sahoo et al. 2024): the integral over t of `weight(t)` times the
    cross-entropy of what is masked. The bound is tight for the denoiser that gives the true conditional distributions,
    and its value depends on no schedule. The variance does: few tokens are masked near t = 0 and count much, so that it
    is not finite under "loglinear" and "linear"; under "cosine" it is.

    Args:
      draws: times for each row, one in each of as many equal parts of (0, 1], which is what keeps the variance low.
        A row has times of its own, so that it does not depend on its batch.
    """
    if draws < 1:
        raise InputError(f"draws is {draws}, expected at least 1.")
    batch, length = tokens.shape
    u = 1 - jax.vmap(lambda k: jax.random.uniform(k, (1 + length * draws,)))(keys)  # in (0, 1]
    t = (jnp.arange(draws)[None, :] + u[:, :1]) / draws
    gone = u[:, 1:].reshape(batch, draws, length) <= share(t, schedule)[:, :, None]
    x = jnp.where(gone, mask, tokens[:, None, :]).reshape(batch * draws, length)
    z = subs(denoise(x), x)
    truth = jnp.repeat(tokens, draws, axis=0)
    nats = jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, truth[:, :, None], axis=-1)[:, :, 0]
    return jnp.mean(weight(t, schedule) * jnp.sum(nats, axis=-1).reshape(batch, draws), axis=-1)


def order(
    keys: jax.Array, hidden: jax.Array, *, steps: int = 0, block: int = 0, schedule: str = "loglinear"
) -> jax.Array:
    """The step at which each token will be written, int32 [B, S]; `NEVER` where it is given (hidden bool [B, S] False).

    In ancestral sampling a masked token appears in the step from t to s with probability (alpha(s) - alpha(t)) /
    (1 - alpha(t)), whatever it and the others are; so the moments can be drawn before the tokens.

    Args:
      keys: of the rows, [B].
      steps: equal steps of time from 1 to 0, for each block. 0: one token at a time, in a random order, which is the
        limit of infinitely many steps (Zheng et al. 2024).
      block: hidden tokens are written in blocks of this size from left to right; 0: all in one.
    """
    u = jax.vmap(lambda k: jax.random.uniform(k, (hidden.shape[1],)))(keys)
    nth = jnp.cumsum(hidden, axis=1, dtype=jnp.int32) - 1
    part = nth // block if block else jnp.zeros_like(nth)
    if steps:
        after = 1 - jnp.arange(1, steps + 1) / steps
        still = u[:, :, None] < share(after, schedule)[None, None]
        when = part * steps + jnp.sum(still, axis=-1, dtype=jnp.int32)
    else:
        late = jnp.where(hidden, part + u, jnp.inf)
        when = jnp.argsort(jnp.argsort(late, axis=1), axis=1).astype(jnp.int32)
    return jnp.where(hidden, when, NEVER)


def length(tokens: int, *, steps: int = 0, block: int = 0) -> int:
    """Steps that an `order` of at most so many hidden tokens takes."""
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
) -> tuple[jax.Array, jax.Array]:
    """Rows with every token written, int32 [B, S], and how often the denoiser was called, int32 []. A token for which
    the denoiser's logits are not numbers stays the mask.

    Args:
      x: tokens int32 [B, S], the mask where `when` is not `NEVER`; given tokens may stand anywhere.
      when: from `order`. steps: as many as it takes, see `length`.
      keys: [B]; step i of row b draws with `fold_in(keys[b], i)`.
      final: n: the last of every n steps takes the most likely token in place of drawing one; 0: none does.
      greedy: all steps do.
      cache: call the denoiser only at steps in which a token of the batch appears; at others the rows, and with them
        its answer, stay as they are. It changes nothing but the time.
    """

    def write(carry, i):
        x, calls = carry
        z = subs(denoise(x), x)
        best = jnp.argmax(z, axis=-1)
        if not greedy:
            flat = jax.vmap(rng.per_example, (0, None))(rng.at_step(keys, i), jnp.arange(x.shape[1])).reshape(-1)
            drawn = rng.draw(flat, z.reshape(-1, z.shape[-1])).reshape(x.shape)
            best = jnp.where(i % final == final - 1, best, drawn) if final else drawn
        here = (when == i) & ~jnp.any(jnp.isnan(z), axis=-1)
        return jnp.where(here, best.astype(x.dtype), x), calls + 1

    def step(carry, i):
        if not cache:
            return write(carry, i), None
        return lax.cond(jnp.any(when == i), write, lambda carry, i: carry, carry, i), None

    return lax.scan(step, (x, jnp.zeros((), jnp.int32)), jnp.arange(steps))[0]


def first_order(gradient: jax.Array, table: jax.Array, mask: int) -> jax.Array:
    """log f(x with v for the mask) - log f(x) float32 [B, S, V + 1] for every place and token v, to first order.

    Args:
      gradient: of log f(x) by the embeddings of the row, [B, S, D]. table: the embeddings, [V + 1, D].

    With f the probability of a class, adding it to the logits of the denoiser guides the samples to that class
    (Nisonoff et al. 2024; Schiff et al. 2024). Only which token appears is guided, not when, which for strength 1 and
    an exact ratio is the posterior.
    """
    return jnp.einsum("bsd,vd->bsv", gradient, table - table[mask][None])


def denoise(net: Transformer, params: Params, x: jax.Array) -> jax.Array:
    """Logits float32 [B, S, V + 1] that a network with `causal=False` gives for rows x int [B, S]."""
    check_reads(net, x.shape[1], f"The rows have {x.shape[1]} tokens")
    return net.apply(params, net.embed(params, x), jnp.ones(x.shape, bool)).logits


def classify(net: Transformer, params: Params, head: Params, e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log p(class | row) float32 [B, C], logits [B, S, V + 1]) of rows that are embedded already, e [B, S, D].

    The classifier, {"kernel": [C, (L + 2) D], "bias": [C]}, is linear in the means over a row of the network's states
    at every site; the lowest of them is the embeddings themselves, in which first order is exact.
    """
    check_reads(net, e.shape[1], f"The rows have {e.shape[1]} tokens")
    out = net.apply(params, e, jnp.ones(e.shape[:2], bool), tap=lambda h: jnp.mean(h.astype(jnp.float32), axis=1))
    means = jnp.concatenate([*out.taps], axis=-1)
    return jax.nn.log_softmax(means @ head["kernel"].T + head["bias"][None], axis=-1), out.logits


def check(schedule: str) -> None:
    """InputError for a schedule that there is not."""
    if schedule not in SCHEDULES:
        raise InputError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}.")
