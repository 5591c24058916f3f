"""Fluency under a language model: perplexity with its convention named, exact KL to the base, repetition per token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import rng
from ctg_jax.control import IDENTITY, Control
from ctg_jax.controls import constraints
from ctg_jax.data.ids import check_sizes
from ctg_jax.decode import loop
from ctg_jax.evaluation.bootstrap import Bootstrap, Figure
from ctg_jax.models.lengths import room
from ctg_jax.models.lm import LM
from ctg_jax.support import removed
from ctg_jax.types import InputError, Params, Prompts

_WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How samples become one perplexity.

    Attributes:
      average: "mean" of the perplexities of the samples, or "pooled" = exp(all nats / all tokens).
      cap: largest perplexity of a sample that counts; None for no limit.
      over: what becomes of a sample above the cap: "drop" (with "mean" and cap 1e4 the convention of DExperts and
        Quark) or "clip" to it. "pooled" can only drop.
    """

    average: str = "mean"
    cap: float | None = None
    over: str = "drop"

    def __post_init__(self):
        if self.average not in ("mean", "pooled") or self.over not in ("drop", "clip"):
            raise InputError(
                f"perplexity convention ({self.average!r}, over={self.over!r}) is unknown; "
                "average is 'mean' or 'pooled', over is 'drop' or 'clip'"
            )
        if self.average == "pooled" and self.cap is not None and self.over == "clip":
            raise InputError("a pooled perplexity cannot be clipped per sample; use over='drop' or average='mean'")

    def __str__(self):
        how = "mean of per-sample perplexities" if self.average == "mean" else "pooled over all tokens"
        if self.cap is None:
            return f"{how}, no cap"
        return f"{how}, samples above {self.cap:g} {'dropped' if self.over == 'drop' else 'clipped to it'}"

    def figure(self, boot: Bootstrap, nats: np.ndarray, tokens: np.ndarray) -> Figure:
        """From nats [samples] (minus log-probability of the continuation) and tokens [samples]; samples with no token
        do not count."""
        nats, tokens = np.asarray(nats, np.float64), np.asarray(tokens, np.float64)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            each = np.where(tokens > 0, np.exp(nats / np.maximum(tokens, 1)), np.nan)
        if self.cap is not None:
            above = each > self.cap
            each = np.where(above, np.nan if self.over == "drop" else self.cap, each)
        if self.average == "mean":
            return boot.mean(each)
        known = ~np.isnan(each)
        return boot.transform(lambda t, w: np.exp(t / w), np.where(known, nats, 0.0), np.where(known, tokens, 0.0))


class LMScorer:
    """Negative log-probability of continuations under a chosen LM, which may have another tokenizer than the one that
    wrote them: texts are encoded again, each where it follows its prompt (`Tokenizer.encode_after`).

    Args:
      lm, params, tokenizer: as `ctg_jax.run.stage.open_lm` gives them.
      name: how reports call the LM.
      batch: rows of a compiled batch.
      control: that the LM is under. Ids that are no token of the tokenizer have no probability, as in sampling.

    Raises:
      InputError: the tokenizer has more ids than the LM has tokens.

    Attributes:
      version: name and digest of the weights. start: that of the tokenizer, for an empty prompt.
    """

    def __init__(
        self, lm: LM, params: Params, tokenizer, *, name: str = "lm", batch: int = 32, control: Control = IDENTITY
    ):
        from ctg_jax.rewards.embed import params_digest

        self.lm, self.tokenizer, self.name, self.batch = lm, tokenizer, name, batch
        self.control = constraints.only(tokenizer.known(lm.vocab), control)
        self.version = f"{name}@{params_digest(params)}"
        self._params = params
        self.start = tokenizer.start
        check_sizes(tokenizer, lm, name)

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(nats float64 [n], tokens int64 [n]) of each text given its prompt. An empty prompt becomes the BOS (or EOS)
        token; a prompt that does not fit beside its text loses its beginning.

        Raises:
          InputError: unequal lengths, a text longer than the context less what the control adds, an empty prompt and no
        BOS or EOS token.
        """
        if len(prompts) != len(texts):
            raise InputError(f"{len(prompts)} prompts were given for {len(texts)} texts; give one prompt for each text")
        return self.ids(self.tokenizer.encode_prompts(prompts), self.tokenizer.encode_after(prompts, texts))

    def ids(self, heads: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The same for token ids of this LM: those that were drawn, where their text would be encoded to others. The
        heads are what `Tokenizer.encode_prompts` gives."""
        rows = [self._row(i, list(h), list(t)) for i, (h, t) in enumerate(zip(heads, tails, strict=True))]
        nats, tokens = np.zeros(len(rows)), np.asarray([len(t) for _, t in rows], np.int64)
        order = sorted((i for i in range(len(rows)) if tokens[i]), key=lambda i: (tokens[i], len(rows[i][0])))
        for at in range(0, len(order), self.batch):
            indices = order[at : at + self.batch]
            nats[indices] = self._score([rows[i] for i in indices], indices)
        return nats, tokens

    def _row(self, i, head, tail):
        if not head:
            if self.start is None:
                raise InputError(
                    f"prompt {i} is empty and the tokenizer of {self.name} has no BOS or EOS token; give a prompt"
                )
            head = [self.start]
        most = room(self.lm, self.control)[0]
        if len(tail) + 1 > most:
            raise InputError(f"text {i} has {len(tail)} tokens; {self.name} reads at most {most - 1} after a prompt")
        over = len(head) + len(tail) - most
        if over > 0:  # the beginning of the prompt goes, but a model that expects BOS still reads it first
            kept = self.tokenizer.begun([])
            head = kept + head[over + len(kept) :] if len(tail) + len(kept) < most else head[over:]
        return head, tail

    def _score(self, rows, ids):
        # T + N may exceed the context: each row fits, and positions count its own tokens, so only padding lies beyond.
        t, n = _width(max(len(h) for h, _ in rows)), _width(max(len(c) for _, c in rows))
        full = rows + [rows[0]] * (self.batch - len(rows))
        head, head_mask = np.zeros((self.batch, t), np.int32), np.zeros((self.batch, t), bool)
        tail, tail_mask = np.zeros((self.batch, n), np.int32), np.zeros((self.batch, n), bool)
        for r, (h, c) in enumerate(full):
            head[r, t - len(h) :], head_mask[r, t - len(h) :] = h, True
            tail[r, : len(c)], tail_mask[r, : len(c)] = c, True
        # A control that draws, such as a latent, draws for the number of the text, whatever batch it is in.
        keys = rng.per_example(jax.random.key(0), ids + ids[:1] * (self.batch - len(ids)))
        prompts = Prompts(jnp.asarray(head), jnp.asarray(head_mask), keys)
        logp = loop.score(self.lm, self._params, prompts, jnp.asarray(tail), self.control, jnp.asarray(tail_mask))
        return -np.asarray(logp, np.float64).sum(axis=1)[: len(rows)]


@partial(jax.jit, static_argnames="lm")
def kl_to_base(
    lm: LM, params: Params, prompts: Prompts, completion: jax.Array, control: Control, base: Control = IDENTITY
) -> jax.Array:
    """Exact KL(controlled || base) of the next-token distribution at every position, float32 [B, N], in nats.

    sum_v p_c(v) (log p_c(v) - log p_0(v)) over the whole vocabulary, with both teacher-forced on completion int [B, N].
    On samples of the controlled model its mean per token estimates the KL of the sequences. Infinite where the control
    gives probability to a token that the base forbids.
    """
    z_c = loop.forward(lm, params, prompts, completion, control).astype(jnp.float32)
    z_0 = loop.forward(lm, params, prompts, completion, base).astype(jnp.float32)
    log_c, log_0 = jax.nn.log_softmax(z_c, axis=-1), jax.nn.log_softmax(z_0, axis=-1)
    p = jnp.exp(log_c)  # 0 log 0 = 0
    gap = jnp.where(removed(z_0), jnp.inf, log_c - log_0)
    return jnp.sum(jnp.where(p > 0, p * gap, 0.0), axis=-1)


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


def _width(n: int) -> int:
    return next((w for w in _WIDTHS if w >= n), 2 ** math.ceil(math.log2(n)))
