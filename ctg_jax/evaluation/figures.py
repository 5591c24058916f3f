"""The figures of scored samples: the protocol that is usual in the field, and `summary`, which applies it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax.evaluation import text
from ctg_jax.evaluation.bootstrap import Bootstrap, Figure
from ctg_jax.evaluation.perplexity import Perplexity
from ctg_jax.evaluation.similarity import mauve


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How samples are drawn and summarised.

    The defaults are those usual in the field (Gehman et al. 2020, Liu et al. 2021, Lu et al. 2022): 25 samples of 20
    tokens for each prompt with top-p 0.9; the maximum over the samples of a prompt, averaged over prompts; the share of
    prompts with a sample at or above the threshold; and the mean perplexity of the samples, without those above 1e4.
    """

    samples: int = 25
    max_new: int = 20
    top_p: float = 0.9
    perplexity: Perplexity = Perplexity("mean", cap=1e4, over="drop")  # noqa: RUF009 (frozen)
    distinct: tuple[int, ...] = (1, 2, 3)
    repetition: tuple[int, ...] = (2, 3, 4)


FIELD = Protocol()


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
    """The figures of rows that `score` returned.

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
    # Self-BLEU needs two samples of a prompt and rep-n needs n words; a metric without any defined value is left out.
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
