"""The oracle of the bundled reviews, whose grammar knows the sentiment of every text that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctg_jax.rewards.check import TextReward
from ctg_jax.types import InputError

SETTINGS = ("target", "reads")


def reviews_oracle(
    attribute: str = "sentiment", *, name: str | None = None, target: int = 1, reads: str = "text"
) -> TextReward:
    """The oracle of the bundled reviews: "sentiment" (0 to 1, above 0.5 is positive) or "toxic" (1 where a text holds
    an insult of the corpus). Exact on the corpus, a lexicon with negation elsewhere. `name` is the attribute by
    default; with `target` 0 the score is one minus that: how negative, how clean.

    Raises:
      InputError: another attribute, or a target that is neither 0 nor 1.
    """
    from ctg_jax.data import reviews

    known = {"sentiment": reviews.sentiment_score, "toxic": lambda t: float(reviews.oracle(t)["toxic"])}
    if attribute not in known:
        raise InputError(f"attribute is {attribute!r}; the oracle of the reviews gives 'sentiment' or 'toxic'")
    if target not in (0, 1):
        raise InputError(f"target is {target!r}; the oracle of the reviews knows the labels 0 and 1")
    fn = known[attribute]
    version = f"reviews-oracle[{attribute}={target}]:{reads}@{reviews.digest()[:12]}"
    # A text without any cue scores 0.5: it is neutral and counts neither as positive nor as negative.
    threshold = 0.5 + 1e-6 if attribute == "sentiment" else 0.5

    def score(texts):
        return [fn(t) if target else 1 - fn(t) for t in texts]

    return TextReward(name or attribute, version, score, reads=reads, threshold=threshold, own=reviews.in_vocabulary)


def load(folder: Path, settings: Mapping[str, Any]) -> TextReward:
    """The judge of kind "oracle"; see `ctg_jax.rewards`."""
    return reviews_oracle("sentiment", **{key: settings[key] for key in ("name", "target", "reads")})
