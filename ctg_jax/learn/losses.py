"""Losses: values per token or per example in float32, then a `Sum` of totals and weights, never a mean.

A `LossFn` is `(params, frozen, batch, keys [B]) -> Sum`. Batches are dicts with tokens int32 [B, T], mask bool [B, T]
(True where a token is real; padding on the right) and ids uint32 [B].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax.control import IDENTITY, Control
from ctg_jax.decode.reading import read
from ctg_jax.models.lengths import check_reads
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import Read, reduced
from ctg_jax.support import removed
from ctg_jax.types import Params, Prompts, PyTree, Sum

LossFn = Callable[[PyTree, PyTree, dict[str, Any], jax.Array], Sum]


@jax.custom_jvp
def logsumexp(z: jax.Array) -> jax.Array:
    """log Σ exp z float32 [...] of z [..., V]. Its derivative recomputes the softmax in one pass with what is done
    to it, where `jax.nn.logsumexp` reads back an array of the size of z."""
    z = z.astype(jnp.float32)
    top = jnp.max(z, axis=-1)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.log(jnp.sum(jnp.exp(z - top[..., None]), axis=-1)) + top


@logsumexp.defjvp
def _logsumexp_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    out = logsumexp(z)
    return out, jnp.sum(jnp.exp(z.astype(jnp.float32) - out[..., None]) * dz, axis=-1)


def next_token(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy float32 [...], in nats, of logits [..., V] against targets int [...]."""
    z = logits.astype(jnp.float32)
    return logsumexp(z) - jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]


def kl(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(p ‖ q) float32 [...], in nats, over the full vocabulary, of logits p and q [..., V].

    Exchange the arguments for the other direction. A token of probability 0 under p counts 0.
    """
    p, q = p.astype(jnp.float32), q.astype(jnp.float32)
    total_p, total_q = logsumexp(p), logsumexp(q)
    gap = jnp.where(removed(p), 0.0, p - q)
    return jnp.sum(jnp.exp(p - total_p[..., None]) * gap, axis=-1) - total_p + total_q


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy float32 [...], in nats, of logits [..., V]."""
    z = logits.astype(jnp.float32)
    total = logsumexp(z)
    return total - jnp.sum(jnp.exp(z - total[..., None]) * jnp.where(removed(z), 0.0, z), axis=-1)


def unlikelihood(logits: jax.Array, negative: jax.Array, allowed: jax.Array) -> jax.Array:
    """-Σ log(1 - p(c)) float32 [B, N] over the negative candidates c of each position (Welleck et al. 2020, eq. 4).

    Args:
      logits: [B, N, V].
      negative: int [B, S], tokens that may be candidates.
      allowed: bool [B, N, S], at which positions each of them is one.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(log_p, negative[:, None, :], axis=-1)
    # 1 - p is kept from 0, where the gradient would be infinite.
    rest = -jnp.log1p(-jnp.exp(jnp.minimum(chosen, jnp.log1p(-1e-6))))
    return jnp.sum(jnp.where(allowed, rest, 0.0), axis=-1)


def earlier_tokens(tokens: jax.Array, mask: jax.Array, new: int) -> jax.Array:
    """bool [B, N, S]: the candidates of token-level unlikelihood, for the last N = `new` of the tokens [B, S].

    Candidate s of position n is an earlier token of the row that is not the target itself, counted once however often
    it occurred (Welleck et al. 2020, eq. 5).
    """
    at = jnp.arange(tokens.shape[1])
    same = (tokens[:, :, None] == tokens[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    first = mask & ~jnp.any(same & (at[:, None] < at[None, :])[None], axis=1)
    start = tokens.shape[1] - new
    target = tokens[:, start:, None]
    return first[:, None] & (at[None, None] < at[start:][None, :, None]) & (tokens[:, None] != target)


def repeated(tokens: jax.Array, written: jax.Array, ngram: int) -> jax.Array:
    """bool [B, N]: which of tokens [B, N] are part of an n-gram that began earlier in the row as well.

    These are the candidates of sequence-level unlikelihood (Welleck et al. 2020, eq. 8).
    """
    length = tokens.shape[1]
    same = (tokens[:, :, None] == tokens[:, None, :]) & written[:, :, None] & written[:, None, :]
    starts = length - ngram + 1
    out = jnp.zeros(tokens.shape, bool)
    if starts < 2:
        return out
    run = jnp.tril(jnp.ones((starts, starts), bool), -1)[None]
    for k in range(ngram):
        run = run & same[:, k : k + starts, k : k + starts]
    again = jnp.any(run, axis=2)
    for k in range(ngram):
        out = out.at[:, k : k + starts].set(out[:, k : k + starts] | again)
    return out


def reweighted(logits: jax.Array, targets: jax.Array, gamma: float = 1.0) -> jax.Array:
    """(1 + cos π p)^gamma · (-log p) float32 [...], p the probability of the target: tokens that are learned already
    count less (TLDR, Jiang et al. 2020). The weight is differentiated too. Its minimum is flatter than the data: for a
    token that follows in 7 of 10 cases it is p = .60 with gamma 1."""
    nll = next_token(logits, targets)
    return (1.0 + jnp.cos(jnp.pi * jnp.exp(-nll))) ** gamma * nll


def earth_mover(logits: jax.Array, targets: jax.Array, table: jax.Array) -> jax.Array:
    """Σ_v p_v (1 - cos(e_v, e_target)) float32 [...]: a bound of the earth mover's distance between the next-token
    distribution and the target (EMO, Ren et al. 2024, eq. 10). `table` float32 [V, D] holds a row e_v for each token,
    of length one (`unit_rows`)."""
    p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    return 1.0 - jnp.sum((p @ table) * table[targets], axis=-1)


def unit_rows(table: jax.Array) -> jax.Array:
    """float32 [V, D] with rows of length one; rows of zeros stay."""
    table = jnp.asarray(table, jnp.float32)
    return table / jnp.maximum(jnp.linalg.norm(table, axis=1, keepdims=True), 1e-12)


def z_loss(logits: jax.Array) -> jax.Array:
    """Squared log-normaliser float32 [...] of logits [..., V] (Chowdhery et al. 2022, PaLM, section 5)."""
    return jnp.square(logsumexp(logits))


def masked_sum(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(total, weight), float32 [] each, of values where mask; a NaN outside the mask does not count."""
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    return jnp.sum(values), jnp.sum(mask, dtype=jnp.float32)


def row_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 [B], the mean of values [B, N] over the tokens of each row where mask; 0 for a row without any."""
    total = jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0), axis=-1)
    return total / jnp.maximum(jnp.sum(mask, axis=-1, dtype=jnp.float32), 1.0)


def predicted(batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """(targets, mask), [B, T-1] each: the tokens after the first, counted where they and the one before are real.

    A field `loss_mask` bool [B, T] narrows it further, for instance to the completion of a prompt.
    """
    mask = batch["mask"][:, 1:] & batch["mask"][:, :-1]
    if "loss_mask" in batch:
        mask = mask & batch["loss_mask"][:, 1:]
    return batch["tokens"][:, 1:], mask


def check_rows(lm: LM, tokens: int, control: Control = IDENTITY) -> None:
    """InputError where rows of training, whose last token is only a target, have more tokens than a model can read in
    addition to what `control` adds."""
    check_reads(lm, tokens - 1, f"The rows of training have {tokens} tokens", control)


def lm_loss(lm: LM, *, z: float = 0.0) -> LossFn:
    """Next-token loss whose params are those of the LM (`pretrain`); `frozen` is not read.

    Args:
      lm: the language model.
      z: weight of `z_loss`; the metric `cross_entropy` is without it.
    """

    def loss(params: Params, frozen: PyTree, batch: dict[str, Any], keys: jax.Array) -> Sum:
        check_rows(lm, batch["tokens"].shape[1])
        targets, mask = predicted(batch)
        tokens, seen = batch["tokens"][:, :-1], batch["mask"][:, :-1]
        hidden = lm.apply(params, lm.embed(params, tokens), seen, last=0).hidden
        return _token_sum(reduced(Read(params, hidden, lm=lm), partial(_terms, z), targets), mask, z)

    return loss


def control_loss(
    lm: LM, *, kl_weight: float = 0.0, z: float = 0.0, token: Callable[..., jax.Array] | None = None
) -> LossFn:
    """Next-token loss of the controlled model: params is a Control, frozen = {"params": LM parameters}.

    The first token of a row is its prompt and the rest its completion, through `reading.read`, so every hook of
    the control runs as it will in `generate`. A batch field `cond` (any pytree, leaves [B, …]) becomes `Prompts.cond`.

    Args:
      lm: the frozen language model.
      kl_weight: weight of KL(controlled ‖ base) per token; the metric `kl` is then logged.
      z: weight of `z_loss`.
      token: (logits [..., V], targets [...], frozen) -> float32 [...] in place of the cross-entropy, which is then a
        metric.
    """

    def loss(params: PyTree, frozen: dict[str, Params], batch: dict[str, Any], keys: jax.Array) -> Sum:
        check_rows(lm, batch["tokens"].shape[1], params)
        targets, mask = predicted(batch)
        tokens, real = batch["tokens"][:, :1], batch["mask"][:, :1]
        prompts = Prompts(tokens=tokens, mask=real, keys=keys, cond=batch.get("cond"))
        text = read(lm, frozen["params"], prompts, targets, params)

        def own(logits, targets):
            values = _terms(z, logits, targets)
            return values if token is None else values | {"token": token(logits, targets, frozen)}

        if not kl_weight:
            return _token_sum(reduced(text, own, targets), mask, z)

        def terms(logits, base, targets):
            return own(logits, targets) | {"kl": kl(logits, jax.lax.stop_gradient(base))}

        values = reduced((text, read(lm, frozen["params"], prompts, targets)), terms, targets)
        out = _token_sum(values, mask, z)
        far, weight = masked_sum(values["kl"], mask)
        metrics = {"cross_entropy": (out.total, out.weight)} | out.metrics | {"kl": (far, weight)}
        return out.replace(total=out.total + kl_weight * far, metrics=metrics)

    return loss


def _terms(z: float, logits: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
    values = {"cross_entropy": next_token(logits, targets)}
    return values | {"z_loss": z_loss(logits)} if z else values


def _token_sum(values: dict[str, jax.Array], mask: jax.Array, z: float) -> Sum:
    nats, weight = masked_sum(values["cross_entropy"], mask)
    if not z and "token" not in values:
        return Sum(total=nats, weight=weight)
    total, _ = masked_sum(values.get("token", values["cross_entropy"]), mask)
    if z:
        total = total + z * masked_sum(values["z_loss"], mask)[0]
    return Sum(total=total, weight=weight, metrics={"cross_entropy": (nats, weight)})
