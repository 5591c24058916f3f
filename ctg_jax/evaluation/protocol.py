"""`evaluate`: every figure of a set of samples, by way of `score` and `summary`; the field's protocol."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax.evaluation import text
from ctg_jax.evaluation.bootstrap import Bootstrap, Figure
from ctg_jax.evaluation.fluency import LMScorer, Perplexity
from ctg_jax.evaluation.similarity import mauve, similarity
from ctg_jax.rewards.check import checked
from ctg_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How samples are drawn and summed up. The defaults are the field's (Gehman et al. 2020, Liu et al. 2021, Lu et
    al. 2022): 25 samples of 20 tokens a prompt with top-p 0.9; the maximum over the samples of a prompt, averaged over
    prompts; the share of prompts with a sample at or above the threshold; perplexity as the mean of the per-sample
    ones without those above 1e4."""

    samples: int = 25
    max_new: int = 20
    top_p: float = 0.9
    perplexity: Perplexity = Perplexity("mean", cap=1e4, over="drop")  # noqa: RUF009 (frozen)
    distinct: tuple[int, ...] = (1, 2, 3)
    repetition: tuple[int, ...] = (2, 3, 4)


FIELD = Protocol()


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
    """The samples with what the scorers say of each: "scores" (name of a reward -> float); "nats" (minus the
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
        nats, tokens = fluency(prompts, texts)
        _set(rows, "nats", nats)
        _set(rows, "read", tokens)
        if embed is None and fluency.start is not None:
            alone, _ = fluency.ids([[]] * len(texts), fluency.tokenizer.encode_after(prompts, texts))
            with np.errstate(invalid="ignore"):
                _set(rows, "relevance", (alone - nats) / tokens)
    if embed is not None:
        _set(rows, "relevance", similarity(embed, texts, prompts))
        paired = [row for row in rows if row.get("source")]
        if paired:
            _set(paired, "similarity", similarity(embed, [r["text"] for r in paired], [r["source"] for r in paired]))
    return rows


def summary(
    rows: Sequence[Mapping[str, Any]],
    thresholds: Mapping[str, float],
    features: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    protocol: Protocol = FIELD,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, Figure]:
    """The figures of rows that `score` made.

    Args:
      thresholds: name of a reward -> the score from which a text counts as having the attribute.
      features: embeddings [n, D] of the texts and [m, D] of human texts, for mauve.
    """
    boot = Bootstrap([r["prompt_id"] for r in rows], seed=seed, resamples=resamples, level=level)
    figures: dict[str, Figure] = {}
    for name, threshold in thresholds.items():
        figures |= attribute(boot, name, np.asarray([r["scores"][name] for r in rows]), threshold)
    if "nats" in rows[0]:
        nats, tokens = (np.asarray([r[k] for r in rows], np.float64) for k in ("nats", "read"))
        figures["perplexity"] = protocol.perplexity.figure(boot, nats, tokens)
        figures["perplexity_pooled"] = Perplexity("pooled").figure(boot, nats, tokens)
    figures |= _surface(boot, [r["text"] for r in rows], protocol)
    figures |= _known(boot, rows)
    for name in ("relevance", "similarity"):
        if any(name in r for r in rows):
            figures[name] = boot.mean([r.get(name, math.nan) for r in rows])
    if features is not None:
        found = mauve(*features, [r["prompt_id"] for r in rows], seed=seed, level=level)
        if found is not None:
            figures["mauve"] = found
    return figures


def attribute(boot: Bootstrap, name: str, scores: np.ndarray, threshold: float = 0.5) -> dict[str, Figure]:
    """The four figures of one attribute from scores [samples]; see `evaluate`."""
    scores = np.asarray(scores, np.float64)
    return {
        f"{name}/mean": boot.mean(scores),
        f"{name}/share": boot.mean((scores >= threshold).astype(float)),
        f"{name}/max": boot.mean_of_prompts(lambda rows: float(scores[rows].max())),
        f"{name}/any": boot.mean_of_prompts(lambda rows: float((scores[rows] >= threshold).any())),
    }


def _surface(boot: Bootstrap, texts: list[str], protocol: Protocol) -> dict[str, Figure]:
    def chosen(rows):
        return [texts[i] for i in rows]

    figures = {
        f"dist-{n}": boot.mean_of_prompts(lambda rows, n=n: text.distinct(chosen(rows), n)) for n in protocol.distinct
    }
    figures |= {f"rep-{n}": boot.mean([text.repetition(t, n) for t in texts]) for n in protocol.repetition}
    figures["diversity"] = boot.mean([text.diversity(t) for t in texts])
    figures["self_bleu"] = boot.mean_of_prompts(lambda rows: text.self_bleu(chosen(rows)))
    figures["uniq"] = boot.statistic(lambda rows: text.unique_words(chosen(rows)))
    figures["length"] = boot.mean([len(t.split()) for t in texts])
    # self-BLEU needs two samples of a prompt, rep-n needs n words: a metric that is nowhere defined is left out.
    return {name: f for name, f in figures.items() if f.n}


def _known(boot: Bootstrap, rows: list[dict]) -> dict[str, Figure]:
    figures = {}
    tokens = np.asarray([r["tokens"] for r in rows])
    if not np.isnan(tokens).any():
        figures["tokens"] = boot.mean(tokens)
        seconds = np.asarray([float(r.get("seconds", math.nan)) for r in rows])
        if (seconds > 0).all():
            figures["tokens_per_second"] = boot.ratio(tokens, seconds)
        if all("kl" in r for r in rows):
            figures["kl"] = boot.ratio([float(np.sum(r["kl"])) for r in rows], tokens)
    if any(r.get("keywords") for r in rows):
        figures["coverage"] = boot.mean([text.coverage(r["text"], r.get("keywords") or []) for r in rows])
    return figures


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
