"""Closeness to other texts through embeddings: content similarity and MAUVE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ctg_jax.evaluation.bootstrap import Bootstrap, Figure
from ctg_jax.types import InputError, optional

ENOUGH_FOR_MAUVE = 50  # texts on either side; with fewer, a histogram of n / 10 bins is meaningless


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a with that row of b, both [n, D]: float64 [n]; NaN where a vector is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2:
        raise InputError(f"embeddings have shapes {list(a.shape)} and {list(b.shape)}; both must be [n, D]")
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def mauve(
    features: np.ndarray,
    reference: np.ndarray,
    prompt_ids: Sequence[Any],
    *,
    scaling: float = 5.0,
    seed: int = 0,
    resamples: int = 20,
    level: float = 0.95,
) -> Figure | None:
    """MAUVE (Pillutla et al. 2021) between generated and human texts, by the mauve-text library on given features.

    The library quantises again for every draw, which is slow, so there are few draws and the interval is value ± z
    standard deviations. The value depends on the features: compare it only under one encoder.

    Args:
      features: [n, D] of the generated texts, `prompt_ids` [n] their prompts; reference: [m, D] of human texts.

    Returns:
      The figure, or None where either side has fewer than 50 texts.
    """
    features, reference = np.asarray(features, np.float32), np.asarray(reference, np.float32)
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise InputError(
            f"features and reference have shapes {list(features.shape)} and {list(reference.shape)}; "
            "both must be [texts, D] with the same D"
        )
    if min(len(features), len(reference)) < ENOUGH_FOR_MAUVE:
        return None
    from scipy.stats import norm

    compute_mauve = optional("mauve", "metrics").compute_mauve

    def value(rows: np.ndarray) -> float:
        return float(
            compute_mauve(features[rows], reference, mauve_scaling_factor=scaling, seed=seed, kmeans_num_redo=1).mauve
        )

    boot = Bootstrap(prompt_ids, seed=seed, resamples=max(2, resamples), level=level)
    point = value(np.arange(len(features)))
    if boot.n < 2:
        return Figure(point, math.nan, math.nan, boot.n)
    members = [np.flatnonzero(boot.group == p) for p in range(boot.n)]
    draws = [np.concatenate([np.tile(members[p], int(k)) for p, k in enumerate(c) if k]) for c in boot.counts]
    half = float(norm.ppf((1 + level) / 2) * np.std([value(d) for d in draws], ddof=1))
    return Figure(point, max(0.0, point - half), min(1.0, point + half), boot.n)


def similarity(embed: Callable[[list[str]], np.ndarray], texts: list[str], sources: list[str]) -> np.ndarray:
    """Content similarity float64 [n]: cosine of the embeddings of each text and its source."""
    if len(texts) != len(sources):
        raise InputError(f"{len(sources)} sources were given for {len(texts)} texts; give one for each text")
    both = np.asarray(embed(texts + sources))
    return cosine(both[: len(texts)], both[len(texts) :])
