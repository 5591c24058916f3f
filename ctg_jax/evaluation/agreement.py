"""Agreement with references: corpus BLEU with true texts, rank correlation with human scores, and how well scores tell
two classes apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ctg_jax.evaluation.bootstrap import Figure
from ctg_jax.types import optional


def bleu(texts: Sequence[str], references: Sequence[str], resamples: int = 1000, seed: int = 0) -> Figure:
    """Corpus BLEU-4 of sacrebleu with its default tokenizer, from 0 to 100, with a bootstrap interval over sentences.

    Args:
      texts, references: n texts and the reference of each.

    Raises:
      InputError: sacrebleu is not installed.
    """
    metric = optional("sacrebleu.metrics", "metrics").BLEU(effective_order=False)
    stats = np.asarray([_counts(metric, t, r) for t, r in zip(texts, references, strict=True)], np.float64)
    draws = np.random.default_rng(seed).integers(0, len(stats), (resamples, len(stats)))

    def score(total):
        correct, possible = total[2:6], total[6:10]
        return metric.compute_bleu(correct.tolist(), possible.tolist(), int(total[0]), int(total[1])).score

    low, high = np.percentile([score(stats[d].sum(0)) for d in draws], [2.5, 97.5])
    return Figure(score(stats.sum(0)), float(low), float(high), len(stats))


def _counts(metric: Any, text: str, reference: str) -> list[int]:
    found = metric.corpus_score([text], [[reference]])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def spearman(a: np.ndarray, b: np.ndarray, resamples: int = 1000, seed: int = 0) -> Figure:
    """Spearman's rank correlation of a and b, both [n], as 100 ρ, with a bootstrap interval over the n pairs."""
    from scipy.stats import spearmanr

    draws = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    low, high = np.percentile([spearmanr(a[d], b[d]).statistic for d in draws], [2.5, 97.5])
    return Figure(100 * float(spearmanr(a, b).statistic), 100 * float(low), 100 * float(high), len(a))


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The area under the ROC curve of scores [n] against which of them are positive, bool [n]: the probability that a
    positive one scores higher than a negative one, where equal scores count a half (Hanley and McNeil 1982). NaN where
    all are of one class."""
    from scipy.stats import rankdata

    positive = np.asarray(positive, bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return math.nan
    return float((rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))
