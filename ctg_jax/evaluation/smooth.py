"""How smoothly a strength controls a score: range, calibration, consistency and monotonicity over a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ctg_jax.evaluation.bootstrap import Bootstrap, Figure
from ctg_jax.types import InputError

# What each figure means, in the words of a report.
MEANING = {
    "range": "mean score at the largest strength minus that at the smallest",
    "calibration": "mean distance of the mean score to its least-squares line over the strengths, as a share of the "
    "difference between the highest and the lowest mean score, so that 0 is in proportion to the strength",
    "consistency": "standard deviation between prompts of their mean scores, averaged over strengths",
    "consistency_samples": "standard deviation between the samples of a prompt, averaged over strengths and prompts",
    "monotonicity": "mean over prompts of Spearman's correlation of strength and mean score of the prompt",
    "monotone": "share of prompts whose mean score moves and never moves against the sign of the range",
}


def smooth_control(
    strengths: Sequence[float],
    prompt_ids: Sequence[Any],
    scores: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, Figure]:
    """The figures of `MEANING` for one attribute, each with its interval over prompts.

    The figures follow Zhou et al. 2024 ("Evaluating the Smooth Control of Attribute Intensity in Text Generation with
    LLMs"), with the scores of a local judge in place of Elo ratings by GPT-4. Their control values are integers in the
    prompt, with which an intensity can be compared directly. A strength and a score have no common unit, so
    calibration here is the distance to the best line, over the strengths themselves and not their ranks. A method whose
    score falls with the strength has a negative range and monotonicity; its calibration is unaffected.

    Args:
      strengths, prompt_ids, scores: one of each for every sample; all prompts at all strengths. A figure that is not
        defined (calibration below three strengths, consistency for one prompt or one sample of each) is left out.

    Raises:
      InputError: unequal lengths, fewer than two strengths, a score or strength that is not finite, a prompt that is
        missing at a strength.
    """
    x, y = np.asarray(strengths, np.float64), np.asarray(scores, np.float64)
    if not x.ndim == 1 or not x.shape == y.shape == (len(prompt_ids),):
        raise InputError(
            f"strengths, prompt_ids and scores have {x.size}, {len(prompt_ids)} and {y.size} entries; "
            "give one of each for every sample"
        )
    levels, at = np.unique(x, return_inverse=True)
    if len(levels) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError(
            f"scores were given at the strengths {levels.tolist()}; expected finite scores at two strengths or more"
        )
    first: dict[Any, int] = {}
    prompt = np.asarray([first.setdefault(i, len(first)) for i in prompt_ids])
    means, spread, fewest = _cells(at, prompt, y, levels, list(first))
    boot = Bootstrap(list(first), seed=seed, resamples=resamples, level=level)
    span = means[-1] - means[0]
    figures = {"range": boot.mean(span)}
    if len(levels) > 2:
        figures["calibration"] = boot.of_means(lambda curve: _distance_to_line(levels, curve), means.T)
    if boot.n > 1:
        centred = (means - means.mean(axis=1, keepdims=True)).T
        figures["consistency"] = boot.of_means(_deviation, np.concatenate([centred, centred**2], axis=1))
    if fewest > 1:
        figures["consistency_samples"] = boot.mean(spread.mean(axis=0))
    figures["monotonicity"] = boot.mean(_spearman(means))
    steps = np.diff(means, axis=0) * np.sign(span.mean())
    figures["monotone"] = boot.mean(((steps >= 0).all(axis=0) & (steps > 0).any(axis=0)).astype(float))
    return figures


def _cells(at, prompt, y, levels, names):
    """(means [K, P], standard deviations between samples [K, P], fewest samples of a cell)."""
    shape = (len(levels), len(names))
    cell = np.ravel_multi_index((at, prompt), shape)
    count = np.bincount(cell, minlength=shape[0] * shape[1])
    if not count.all():
        k, p = np.unravel_index(int(np.argmin(count)), shape)
        raise InputError(
            f"prompt {names[p]!r} has no sample at strength {levels[k]:g}; give every prompt at every strength"
        )
    means = np.bincount(cell, y) / count
    squares = np.bincount(cell, (y - means[cell]) ** 2)
    spread = np.sqrt(squares / np.maximum(count - 1, 1))
    # Equal means are ties, regardless of the order in which their samples were added.
    return np.round(means, 9).reshape(shape), spread.reshape(shape), int(count.min())


def _distance_to_line(levels: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Mean over strengths of |curve - least-squares line|, over the height of the curve [..., K]; NaN if flat."""
    design = np.stack([np.ones_like(levels), (levels - levels.mean()) / np.ptp(levels)], axis=1)
    onto = design @ np.linalg.pinv(design)
    height = np.ptp(curve, axis=-1)
    distance = np.abs(curve - curve @ onto).mean(axis=-1)
    return np.where(height > 1e-9, distance / np.maximum(height, 1e-9), np.nan)


def _deviation(moments: np.ndarray) -> np.ndarray:
    """Standard deviation, averaged over strengths, from first and second moments [..., 2 K]."""
    one, two = np.split(moments, 2, axis=-1)
    return np.sqrt(np.maximum(two - one**2, 0.0)).mean(axis=-1)


def _spearman(rising: np.ndarray) -> np.ndarray:
    """Spearman's correlation [P] of the row number and the values [K, P]; 0 where they never move."""
    from scipy.stats import rankdata

    ranks = rankdata(rising, axis=0) - (len(rising) + 1) / 2
    x = np.arange(len(rising)) - (len(rising) - 1) / 2
    norm = np.sqrt((ranks**2).sum(0) * (x**2).sum())
    return np.where(norm > 0, (ranks * x[:, None]).sum(0) / np.maximum(norm, 1e-12), 0.0)
