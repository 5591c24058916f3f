"""A figure and its bootstrap interval over prompts.

All samples of one prompt are drawn or left out together (a cluster bootstrap; Davison and Hinkley 1997, section 3.8),
since they are not independent. The same seed and the same prompts give the same resamples, so two methods that are
measured on the same prompts are compared on the same draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Figure:
    """A value with an interval [low, high] and the number n of prompts behind it. The interval is NaN where there is
    only one prompt, which gives no information about other prompts."""

    value: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, Any]:
        """{"value", "low", "high", "n"}; NaN and infinity become None, which JSON can hold."""
        return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Figure:
        value, low, high = (math.nan if record.get(k) is None else float(record[k]) for k in ("value", "low", "high"))
        return cls(value, low, high, int(record.get("n", 0)))


class Bootstrap:
    """Resamples of prompts.

    Args:
      prompt_ids: one id (any hashable) for each sample; equal ids belong to one prompt.
      seed: of the resampling.
      resamples: their number R.
      level: coverage of the interval.
    """

    def __init__(self, prompt_ids: Sequence[Any], *, seed: int = 0, resamples: int = 1000, level: float = 0.95):
        if len(prompt_ids) == 0:
            raise InputError("samples are empty; give at least one sample to evaluate")
        if not 0 < level < 1:
            raise InputError(f"level is {level}; give the coverage of the interval as a share between 0 and 1")
        first: dict[Any, int] = {}
        self.group = np.asarray([first.setdefault(i, len(first)) for i in prompt_ids])
        self.n, self.level, self.seed = len(first), level, seed
        draws = np.random.default_rng(seed).integers(0, self.n, (resamples, self.n))
        self.counts = np.stack([np.bincount(d, minlength=self.n) for d in draws]).astype(np.float64)  # [R, P]

    def ratio(self, totals: Any, weights: Any) -> Figure:
        """Sum of totals over sum of weights, both [samples]; prompts whose weights are all 0 do not count."""
        t, w = self._by_prompt(totals), self._by_prompt(weights)
        if not (w != 0).any():
            return Figure(math.nan, math.nan, math.nan, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = self._drawn(t) / self._drawn(w)
        return self._figure(float(t.sum() / w.sum()), drawn, int((w != 0).sum()))

    def mean(self, values: Any) -> Figure:
        """Mean over samples of values [samples]; NaN marks a sample for which the metric is not defined."""
        values = np.asarray(values, np.float64)
        known = ~np.isnan(values)
        return self.ratio(np.where(known, values, 0.0), known)

    def mean_of_prompts(self, fn: Callable[[np.ndarray], float]) -> Figure:
        """Mean over prompts of fn(indices of its samples); NaN marks a prompt for which it is not defined."""
        values = np.asarray([fn(np.flatnonzero(self.group == p)) for p in range(self.n)], np.float64)
        known = ~np.isnan(values)
        if not known.any():
            return Figure(math.nan, math.nan, math.nan, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = self._drawn(np.where(known, values, 0.0)) / self._drawn(known.astype(np.float64))
        return self._figure(float(values[known].mean()), drawn, int(known.sum()))

    def transform(self, figure_of: Callable[[np.ndarray, np.ndarray], np.ndarray], totals: Any, weights: Any) -> Figure:
        """Any function of the two sums, e.g. exp(total / weight), taken inside the bootstrap."""
        t, w = self._by_prompt(totals), self._by_prompt(weights)
        if not (w != 0).any():
            return Figure(math.nan, math.nan, math.nan, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = figure_of(self._drawn(t), self._drawn(w))
        return self._figure(float(figure_of(t.sum(), w.sum())), drawn, int((w != 0).sum()))

    def of_means(self, fn: Callable[[np.ndarray], np.ndarray], values: Any) -> Figure:
        """Any function of several means over prompts, taken inside the bootstrap: fn maps [..., M] to [...] and is
        given the means of values [prompts, M], prompts in the order of their first sample."""
        values = np.asarray(values, np.float64)
        if values.ndim != 2 or len(values) != self.n:
            raise InputError(
                f"values has shape {list(values.shape)} for {self.n} prompts; give one row for each prompt"
            )
        return self._figure(float(fn(values.mean(axis=0))), fn(self.counts @ values / self.n), self.n)

    def statistic(self, fn: Callable[[np.ndarray], float], *, resamples: int = 200) -> Figure:
        """A statistic of a whole collection that repeats of a prompt distort (number of distinct words, MAUVE):
        fn(indices of samples). The bootstrap distribution is moved so that its mean is the value."""
        members = [np.flatnonzero(self.group == p) for p in range(self.n)]
        value = float(fn(np.arange(len(self.group))))
        if self.n < 2:
            return Figure(value, math.nan, math.nan, self.n)
        chosen = [np.repeat(np.arange(self.n), c.astype(int)) for c in self.counts[:resamples]]
        drawn = np.asarray([fn(np.concatenate([members[p] for p in c])) for c in chosen], np.float64)
        return self._figure(value, drawn + (value - drawn.mean()), self.n)

    def _by_prompt(self, values: Any) -> np.ndarray:
        values = np.asarray(values, np.float64)
        if values.shape != self.group.shape:
            raise InputError(
                f"values has shape {list(values.shape)} for {len(self.group)} samples; give one number for each sample"
            )
        return np.bincount(self.group, weights=values, minlength=self.n)

    def _drawn(self, sums: np.ndarray) -> np.ndarray:
        """Sums [P] over prompts as sums [R] over resamples; a prompt not drawn adds 0 even where it is infinite."""
        infinite = np.isinf(sums)
        out = self.counts @ np.where(infinite, 0.0, sums)
        if infinite.any():
            out[(self.counts @ infinite.astype(np.float64)) > 0] = np.inf
        return out

    def _figure(self, value: float, drawn: np.ndarray, n: int) -> Figure:
        drawn = drawn[~np.isnan(drawn)]
        if n < 2 or not drawn.size:
            return Figure(value, math.nan, math.nan, n)
        tail = (1 - self.level) / 2
        # "inverted_cdf" never interpolates, so an infinite perplexity among the draws does not make a NaN.
        low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
        return Figure(value, float(low), float(high), n)
