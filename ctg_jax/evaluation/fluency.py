"""Figures of next-token distributions: exact KL to the base, and repetition under teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax.control import IDENTITY, Control
from ctg_jax.decode.reading import read
from ctg_jax.evaluation.bootstrap import Bootstrap, Figure
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.support import removed
from ctg_jax.types import InputError, Params, Prompts


@partial(jax.jit, static_argnames="lm")
def kl_to_base(
    lm: LM, params: Params, prompts: Prompts, completion: jax.Array, control: Control, base: Control = IDENTITY
) -> jax.Array:
    """Exact KL(controlled || base) of the next-token distribution at every position, float32 [B, N], in nats.

    sum_v p_c(v) (log p_c(v) - log p_0(v)) over the whole vocabulary, with both teacher-forced on completion int [B, N].
    On samples of the controlled model its mean per token estimates the KL of the sequences. Infinite where the control
    gives probability to a token that the base forbids.
    """

    def divergence(z_c, z_0, _):
        log_c, log_0 = jax.nn.log_softmax(z_c, axis=-1), jax.nn.log_softmax(z_0, axis=-1)
        p = jnp.exp(log_c)  # 0 log 0 = 0
        gap = jnp.where(removed(z_0), jnp.inf, log_c - log_0)
        return jnp.sum(jnp.where(p > 0, p * gap, 0.0), axis=-1)

    both = [read(lm, params, prompts, completion, c) for c in (control, base)]
    return reduced(both, divergence, completion)


def kl_figure(kl: np.ndarray, mask: np.ndarray, prompt_ids: Sequence, **bootstrap) -> Figure:
    """Mean KL per token with its interval, from kl [B, N] and mask bool [B, N]."""
    kl, mask = np.asarray(kl, np.float64), np.asarray(mask, bool)
    return Bootstrap(prompt_ids, **bootstrap).ratio(np.where(mask, kl, 0.0).sum(1), mask.sum(1))


def token_repetition(
    predicted: np.ndarray,
    tokens: np.ndarray,
    mask: np.ndarray,
    prompt_ids: Sequence,
    *,
    window: int = 128,
    **bootstrap,
) -> dict[str, Figure]:
    """rep, wrep and uniq of next-token predictions under teacher forcing (Welleck et al. 2020, section 4).

    Args:
      predicted: int [B, T], the most likely token at each place given tokens[:, :t].
      tokens: int [B, T], the true text; mask: bool [B, T], the places that count, as history and as predictions.
      window: length of the history that is searched, l in the paper.

    Returns:
      rep: share of predictions that occur among the last `window` true tokens; wrep: those that are wrong as well;
      uniq: number of distinct predictions.
    """
    predicted, tokens, mask = np.asarray(predicted), np.asarray(tokens), np.asarray(mask, bool)
    if not predicted.shape == tokens.shape == mask.shape:
        raise InputError(
            f"predicted, tokens and mask have shapes {predicted.shape}, {tokens.shape} and {mask.shape}; "
            "they must be equal, [B, T]"
        )
    seen = np.zeros(tokens.shape, bool)
    for t in range(1, tokens.shape[1]):
        past = slice(max(0, t - window), t)
        seen[:, t] = ((tokens[:, past] == predicted[:, t, None]) & mask[:, past]).any(axis=1)
    seen &= mask
    boot = Bootstrap(prompt_ids, **bootstrap)
    return {
        "rep": boot.ratio(seen.sum(1), mask.sum(1)),
        "wrep": boot.ratio((seen & (predicted != tokens)).sum(1), mask.sum(1)),
        "uniq": boot.statistic(lambda rows: len(np.unique(predicted[rows][mask[rows]]))),
    }
