"""Perplexity, with its convention named."""

from __future__ import annotations

import dataclasses

import numpy as np

from ctg_jax.evaluation.bootstrap import Bootstrap, Figure
from ctg_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How the perplexity of many samples is computed.

    Attributes:
      average: "mean", the mean perplexity of the samples, or "pooled", exp(all nats / all tokens).
      cap: the largest perplexity of a sample that is counted as it is; None: no limit.
      over: what happens to a sample above the cap: "drop" (with "mean" and a cap of 1e4 this is the convention of
        DExperts and Quark) or "clip" (it counts as the cap). "pooled" can only drop.
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
        """The perplexity of samples with its interval.

        Args:
          nats: [samples], minus the log-probability of each continuation.
          tokens: [samples], the number of its tokens; samples without a token do not count.
        """
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
