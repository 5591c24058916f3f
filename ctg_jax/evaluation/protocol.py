"""`evaluate`: every figure of a set of samples, from `score`, which scores each of them, and `figures.summary`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax.data.messages import has_messages, prompt_of
from ctg_jax.evaluation.bootstrap import Figure
from ctg_jax.evaluation.figures import FIELD, Protocol, summary
from ctg_jax.evaluation.likelihood import LMScorer
from ctg_jax.evaluation.similarity import similarity
from ctg_jax.rewards.check import checked
from ctg_jax.types import InputError


def evaluate(
    samples: Sequence[Mapping[str, Any]],
    rewards: Sequence[Any] = (),
    *,
    fluency: LMScorer | None = None,
    embed: Callable[[list[str]], np.ndarray] | None = None,
    references: Sequence[str] = (),
    protocol: Protocol = FIELD,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, Figure]:
    """All figures that the arguments allow, each with its interval over prompts.

    Args:
      samples: records with "prompt" and "text" (str), "prompt_id" (any hashable; the prompt itself by default), and
        if known "tokens" (ids, or their number), "seconds" (the sample's share of the wall clock), "keywords"
        (list of str), "source" (str, for content similarity), "kl" (nats per token, summed or a list).
      rewards: scorers; each gives <name>/mean, <name>/share (of samples at or above its threshold), <name>/max
        (average maximum) and <name>/any (P(any sample of a prompt at or above the threshold)).
      fluency: LM for perplexity and perplexity_pooled.
      embed: encoder for relevance, similarity and, with `references` (human texts), mauve.

    Returns:
      name -> Figure; also dist-n, rep-n, diversity, self_bleu, uniq, length (words), tokens, relevance, coverage, kl,
      tokens_per_second.

    Raises:
      InputError: no samples, a record without prompt or text, scores that are not finite or of a wrong length.
    """
    rows = score(samples, rewards, fluency=fluency, embed=embed)
    features = None
    if embed is not None and len(references):
        features = embed([r["text"] for r in rows]), embed(list(references))
    thresholds = {r.name: getattr(r, "threshold", 0.5) for r in rewards}
    return summary(rows, thresholds, features, protocol=protocol, seed=seed, resamples=resamples, level=level)


def score(
    samples: Sequence[Mapping[str, Any]],
    rewards: Sequence[Any] = (),
    *,
    fluency: LMScorer | None = None,
    embed: Callable[[list[str]], np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """The samples with the results of the scorers: "scores" (name of a reward -> float); "nats" (minus the
    log-probability) and "read" (number of tokens) under `fluency`; "similarity" to the "source", where there is one;
    and "relevance" to the prompt, NaN where it is not defined.

    Relevance is the cosine of the embeddings of prompt and continuation; without `embed`, the nats per token of
    `fluency` by which the continuation is likelier after its prompt than after no text. Arguments and errors as for
    `evaluate`.
    """
    rows = [_record(i, s) for i, s in enumerate(samples)]
    prompts, texts = [r["prompt"] for r in rows], [r["text"] for r in rows]
    if not rows:
        return rows
    scores: dict[str, np.ndarray] = {}
    for reward in rewards:
        if reward.name in scores:
            raise InputError(f"two rewards are named {reward.name!r}; give each its own name")
        scores[reward.name] = checked(reward.name, reward(prompts, texts), len(texts))
    for i, row in enumerate(rows):
        row["scores"] = {name: float(values[i]) for name, values in scores.items()}
    if fluency is not None:
        # A model without a chat template reads a conversation as people do.
        chat = any(map(has_messages, rows)) and fluency.tokenizer.template is not None
        told = [prompt_of(r) for r in rows] if chat else prompts
        nats, tokens = fluency(told, texts)
        _set(rows, "nats", nats)
        _set(rows, "read", tokens)
        if embed is None and fluency.start is not None:
            alone, _ = fluency.ids([[]] * len(texts), fluency.tokenizer.encode_after(told, texts))
            with np.errstate(invalid="ignore"):
                _set(rows, "relevance", (alone - nats) / tokens)
    if embed is not None:
        _set(rows, "relevance", similarity(embed, texts, prompts))
        paired = [row for row in rows if row.get("source")]
        if paired:
            _set(paired, "similarity", similarity(embed, [r["text"] for r in paired], [r["source"] for r in paired]))
    return rows


def _set(rows: Sequence[dict[str, Any]], name: str, values: np.ndarray) -> None:
    for row, value in zip(rows, np.asarray(values).tolist(), strict=True):
        row[name] = value


def _record(i: int, sample: Mapping[str, Any]) -> dict[str, Any]:
    for field in ("prompt", "text"):
        if not isinstance(sample.get(field), str):
            raise InputError(f"sample {i} has no string {field!r}; expected records with 'prompt' and 'text'")
    tokens = sample.get("tokens")
    count = math.nan if tokens is None else float(tokens) if np.ndim(tokens) == 0 else float(len(tokens))
    return {**sample, "prompt_id": sample.get("prompt_id", sample["prompt"]), "tokens": count}
