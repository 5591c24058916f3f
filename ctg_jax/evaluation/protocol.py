"""`evaluate`: every figure of a set of samples; the field's protocol; how smoothly a strength controls a score."""

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
      embed: encoder for similarity and, with `references` (human texts), mauve.

    Returns:
      name -> Figure; also dist-n, rep-n, diversity, self_bleu, uniq, length (words), tokens, coverage, kl,
      tokens_per_second.

    Raises:
      InputError: no samples, a record without prompt or text, scores that are not finite or of a wrong length.
    """
    rows = [_record(i, s) for i, s in enumerate(samples)]
    boot = Bootstrap([r["prompt_id"] for r in rows], seed=seed, resamples=resamples, level=level)
    prompts, texts = [r["prompt"] for r in rows], [r["text"] for r in rows]
    figures: dict[str, Figure] = {}
    for reward in rewards:
        if f"{reward.name}/mean" in figures:
            raise InputError(f"two rewards are named {reward.name!r}; give each its own name")
        figures |= attribute(boot, reward.name, reward(prompts, texts), getattr(reward, "threshold", 0.5))
    if fluency is not None:
        nats, tokens = fluency(prompts, texts)
        figures["perplexity"] = protocol.perplexity.figure(boot, nats, tokens)
        figures["perplexity_pooled"] = Perplexity("pooled").figure(boot, nats, tokens)
    figures |= _surface(boot, texts, protocol)
    figures |= _known(boot, rows)
    if embed is not None:
        figures |= _embedded(boot, rows, texts, embed, list(references), seed, level)
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


def smooth_control(
    strengths: Sequence[float],
    scores: np.ndarray,
    *,
    targets: Sequence[float] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, Figure]:
    """How a score follows a strength, from scores [K strengths, P prompts] (means over the samples of a prompt).

    Returns:
      range: score at the largest strength minus that at the smallest; monotonicity: Spearman's correlation of strength
      and score, 0 where the score never moves; consistency: share of neighbouring strengths whose scores are in order
      (ties count half); calibration (with `targets` [K], the scores that were asked for): mean |score - target|.
      Each is a mean over prompts with its interval.
    """
    strengths, scores = np.asarray(strengths, np.float64), np.asarray(scores, np.float64)
    if scores.ndim != 2 or len(strengths) != len(scores) or len(strengths) < 2 or not np.isfinite(scores).all():
        raise InputError(
            f"scores has shape {list(scores.shape)} for {len(strengths)} strengths; expected finite numbers "
            "[strengths, prompts] with at least two strengths"
        )
    if len(np.unique(strengths)) < len(strengths):
        raise InputError(f"strengths {strengths.tolist()} repeat a value; give each strength once")
    order = np.argsort(strengths)
    rising = scores[order]
    boot = Bootstrap(range(scores.shape[1]), seed=seed, resamples=resamples, level=level)
    steps = np.sign(np.diff(rising, axis=0))
    figures = {
        "range": boot.mean(rising[-1] - rising[0]),
        "monotonicity": boot.mean(_spearman(rising)),
        "consistency": boot.mean(((steps + 1) / 2).mean(axis=0)),
    }
    if targets is not None:
        wanted = np.asarray(targets, np.float64)
        if wanted.shape != strengths.shape:
            raise InputError(f"targets has shape {list(wanted.shape)}; give one target for each strength")
        figures["calibration"] = boot.mean(np.abs(scores - wanted[:, None]).mean(axis=0))
    return figures


def _spearman(rising: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    ranks = rankdata(rising, axis=0) - (len(rising) + 1) / 2
    x = np.arange(len(rising)) - (len(rising) - 1) / 2
    norm = np.sqrt((ranks**2).sum(0) * (x**2).sum())
    return np.where(norm > 0, (ranks * x[:, None]).sum(0) / np.maximum(norm, 1e-12), 0.0)


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


def _embedded(boot, rows, texts, embed, references, seed, level) -> dict[str, Figure]:
    figures = {}
    paired = [i for i, r in enumerate(rows) if r.get("source")]
    if paired:
        values = np.full(len(rows), math.nan)
        values[paired] = similarity(embed, [texts[i] for i in paired], [rows[i]["source"] for i in paired])
        figures["similarity"] = boot.mean(values)
    if references:
        found = mauve(embed(texts), embed(references), [r["prompt_id"] for r in rows], seed=seed, level=level)
        if found is not None:
            figures["mauve"] = found
    return figures


def _record(i: int, sample: Mapping[str, Any]) -> dict[str, Any]:
    for field in ("prompt", "text"):
        if not isinstance(sample.get(field), str):
            raise InputError(f"sample {i} has no string {field!r}; expected records with 'prompt' and 'text'")
    tokens = sample.get("tokens")
    count = math.nan if tokens is None else float(tokens) if np.ndim(tokens) == 0 else float(len(tokens))
    return {**sample, "prompt_id": sample.get("prompt_id", sample["prompt"]), "tokens": count}
