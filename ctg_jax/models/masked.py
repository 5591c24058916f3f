"""Masked diffusion over tokens (MDLM, Sahoo et al. 2024; also Ou et al. 2024, Shi et al. 2024).

As time t goes from 0 to 1, every token is replaced by the mask at a random moment of its own; the share `share(t)` is
masked at t. A denoiser reads a row in which some tokens are masked, and predicts the distribution of each of them. The
row itself reveals the time, which it is not given (Ou et al. 2024). Here a denoiser is any function from tokens
int [N, S] to logits [N, S, V + 1], where token V is the mask; rows must not depend on each other.

In block diffusion (BD3LM, Arriola et al. 2025) a row is written in blocks from left to right, and each of them is
masked diffusion given those before it. Blocks of one token are an autoregressive model, a single one is MDLM.

`ctg_jax.models.unmasking` samples from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from ctg_jax import rng
from ctg_jax.models import positions
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.heads import class_log_probabilities
from ctg_jax.models.lengths import check_reads
from ctg_jax.types import InputError, Params

SCHEDULES = ("loglinear", "linear", "cosine")

Denoiser = Callable[[jax.Array], jax.Array]
Recovery = Callable[[jax.Array, jax.Array], jax.Array]  # (x, truth) -> `nats`; the logits need not be held at once


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
    """-alpha'(t) / (1 - alpha(t)) for t > 0: the weight of the loss of the masked tokens at time t."""
    check(schedule)
    if schedule == "loglinear":
        return 1 / t
    return 20 / jnp.expm1(20 * t) if schedule == "linear" else math.pi / jnp.tan(math.pi / 2 * t)


def subs(logits: jax.Array, x: jax.Array) -> jax.Array:
    """Logits float32 [N, S, V + 1] of the clean tokens, from those of the network and the row x int [N, S].

    These are the two rules of the SUBS parameterisation (Sahoo et al. 2024): the mask is never a clean token, and a
    token that is not masked keeps its value with probability 1.
    """
    token = jnp.arange(logits.shape[-1])[None, None]
    mask = logits.shape[-1] - 1
    seen = jnp.where(token == x[:, :, None], 0.0, -jnp.inf)
    hidden = jnp.where(token == mask, -jnp.inf, logits.astype(jnp.float32))
    return jnp.where(x[:, :, None] == mask, hidden, seen)


def nats(logits: jax.Array, x: jax.Array, truth: jax.Array) -> jax.Array:
    """-log p(token) float32 [N, S] of the tokens `truth` of rows x, both int [N, S], with logits [N, S, V + 1] of a
    network; 0 where a token is not masked."""
    z = subs(logits, x)
    return jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, truth[:, :, None], axis=-1)[:, :, 0]


def nelbo(
    recover: Recovery, tokens: jax.Array, keys: jax.Array, mask: int, *, schedule: str = "cosine", draws: int = 1,
    block: int = 0, interval: tuple[float, float] = (0.0, 1.0),
) -> jax.Array:  # fmt: skip
    """An unbiased estimate float32 [B], in nats, of an upper bound of -log p(row), rows int [B, S], keys [B].

    Rao-Blackwellised and in continuous time (Sahoo et al. 2024): the integral over t of `weight(t)` times the
    cross-entropy of what is masked. The bound is tight for the denoiser that gives the true conditional distributions,
    and its value depends on no schedule. The variance does: few tokens are masked near t = 0 and count much, so that it
    is not finite under "loglinear" and "linear"; under "cosine" it is.

    Args:
      recover: the nats of a denoiser, such as `recovery` of a network.
      draws: times for each block of a row, one in each of as many equal parts of (0, 1], which is what keeps the
        variance low. A row has times of its own, so that it does not depend on its batch.
      block: the tokens of a block; `recover` then reads in every block what was written in those before it. 0: the row
        is one block. The times of the blocks of a row are spread evenly too.
      interval: times are drawn from this part of (0, 1] alone, and the value is then no bound: the clipped schedules of
        BD3LM, whose gradients vary less.
    """
    low, high = interval
    if draws < 1 or block < 0 or not 0 <= low < high <= 1:
        raise InputError(
            f"draws is {draws}, block is {block} and interval is {interval}: expected draws from 1, block from 0, and "
            "two ascending numbers from 0 to 1."
        )
    batch, length = tokens.shape
    size = block or length
    part = jnp.arange(length) // size
    u = jax.vmap(lambda k: jax.random.uniform(k, (1 + length * draws,)))(keys)
    of_blocks = jnp.arange(-(-length // size)) * size / length
    passed = ((jnp.arange(draws)[::-1][None, :, None] + u[:, :1, None]) / draws + of_blocks[None, None]) % 1
    t = low + (high - low) * (1 - passed)  # [B, draws, blocks], in (0, 1]
    gone = 1 - u[:, 1:].reshape(batch, draws, length) <= share(t, schedule)[:, :, part]
    x = jnp.where(gone, mask, tokens[:, None, :]).reshape(batch * draws, length)
    found = recover(x, jnp.repeat(tokens, draws, axis=0)).reshape(batch, draws, length)
    return jnp.mean(jnp.sum(weight(t, schedule)[:, :, part] * found, axis=-1), axis=-1)


def film(
    recover: Recovery, tokens: jax.Array, keys: jax.Array, mask: int, rate: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:
    """(nats float32 [B], number of tokens float32 [B]) of what is masked in rows int [B, S], one draw for each of the
    keys [B]: every token with a probability that is Beta(`rate`) of the row; where none is, all are (FiLM, Shen et al.
    2023).

    With a uniform probability the number of masked tokens is uniform too, and the mean over them is the bound of
    `nelbo` divided by S, but for rows without a masked token, which count as rows of nothing but masks here.
    """
    named = {name: jax.vmap(partial(rng.stream, name=name))(keys) for name in ("rate", "mask")}
    p = jax.vmap(lambda key: jax.random.beta(key, *rate))(named["rate"])
    gone = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(named["mask"]) < p[:, None]
    gone |= ~jnp.any(gone, axis=1, keepdims=True)
    found = recover(jnp.where(gone, mask, tokens), tokens)
    return jnp.sum(found, axis=1), jnp.sum(gone, axis=1, dtype=jnp.float32)


def denoise(net: Transformer, params: Params, x: jax.Array) -> jax.Array:
    """Logits float32 [B, S, V + 1] of a network with `causal=False` for rows x int [B, S]."""
    check_reads(net, x.shape[1], f"The rows have {x.shape[1]} tokens")
    return net.apply(params, net.embed(params, x), jnp.ones(x.shape, bool)).logits


def recovery(net: Transformer, params: Params, x: jax.Array, truth: jax.Array) -> jax.Array:
    """`nats` float32 [N, S] of the logits of `denoise`, a chunk of positions at a time. A network of blocks reads in
    every block of x the blocks of `truth` before it."""
    length = x.shape[1]
    check_reads(net, length, f"The rows have {length} tokens")
    read = dataclasses.replace(net, paired=True) if net.block else net
    rows = jnp.concatenate([x, truth], axis=1) if net.block else x
    hidden = read.apply(params, net.embed(params, rows), jnp.ones(rows.shape, bool), last=0).hidden[:, :length]
    return positions.reduced(positions.Read(params, hidden, lm=net), nats, x, truth)


def classify(net: Transformer, params: Params, head: Params, e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log p(class | row) float32 [B, C], logits [B, S, V + 1]) of rows given as embeddings e [B, S, D].

    The classifier, a `linear_head` of width (L + 2) D, is linear in the network's states at all sites, averaged
    over the row. The lowest site is the embeddings themselves, in which the first-order expansion is exact.
    """
    means, logits = features(net, params, e)
    return class_log_probabilities(head, means), logits


def features(net: Transformer, params: Params, e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what a classifier reads of rows given as embeddings e [B, S, D]: the network's states at all sites, averaged
    over the row, float32 [B, (L + 2) D]; logits [B, S, V + 1])."""
    check_reads(net, e.shape[1], f"The rows have {e.shape[1]} tokens")
    out = net.apply(params, e, jnp.ones(e.shape[:2], bool), tap=lambda h: jnp.mean(h.astype(jnp.float32), axis=1))
    return jnp.concatenate([*out.taps], axis=-1), out.logits


def check(schedule: str) -> None:
    """InputError for an unknown schedule."""
    if schedule not in SCHEDULES:
        raise InputError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}.")
