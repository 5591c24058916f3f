"""A reward for text that does not repeat itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctg_jax.evaluation.text import repetition
from ctg_jax.rewards.check import TextReward
from ctg_jax.types import InputError


def diversity(order: int = 3, *, name: str = "diversity", reads: str = "text", threshold: float = 0.95) -> TextReward:
    """1 - seq-rep-n: the distinct n-grams of words of a text over all of them (Welleck et al. 2020, eq. 9), 0 to 1.

    A text of fewer than n words has no n-gram and scores 0, so that stopping at once is not rewarded.

    Args:
      order: n.
      name, reads, threshold: see `TextReward`; human text of a hundred words is seldom below the threshold.

    Raises:
      InputError: order below 1.
    """
    if order < 1:
        raise InputError(f"order is {order}, expected n-grams of at least 1 word")

    def score(texts):
        return [1 - repetition(t, order) if len(t.split()) >= order else 0.0 for t in texts]

    return TextReward(name, f"diversity[{order}]:{reads}@1", score, reads=reads, threshold=threshold)


SETTINGS = ("reads",)


def load(folder: Path, settings: Mapping[str, Any]) -> TextReward:
    """The judge of kind "diversity"; see `ctg_jax.rewards`."""
    return diversity(name=settings["name"], reads=settings["reads"])
