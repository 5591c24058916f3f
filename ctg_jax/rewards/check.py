"""The protocol of a reward, the check of its output, and the digest that makes its version."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ctg_jax.data.labels import labelled
from ctg_jax.types import InputError

READS = ("text", "both")


class Reward(Protocol):
    """A scorer of texts. `threshold` is the score from which a text counts as having the attribute. It may also have
    `explain(prompts, texts)`, which says of each text in a few words what is wrong with it, or nothing ("")."""

    name: str
    version: str
    threshold: float

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Scores float32 [n], finite, higher is better."""


def checked(name: str, scores: Any, n: int) -> np.ndarray:
    """Scores as float32 [n].

    Raises:
      InputError: another shape than [n], or a value that is not finite.
    """
    try:
        out = np.asarray(scores, np.float32)
    except (TypeError, ValueError) as e:  # text, None, rows of different lengths
        raise InputError(
            f"reward {name!r} returned no list of {n} numbers ({e}): one for each text is expected"
        ) from None
    if out.shape != (n,):
        raise InputError(
            f"reward {name!r} returned an array of shape {list(out.shape)} for {n} texts; "
            f"it must return one score for each text, shape [{n}]"
        )
    if not np.isfinite(out).all():
        at = int(np.flatnonzero(~np.isfinite(out))[0])
        raise InputError(f"reward {name!r} returned {out[at]} for text {at}; every score must be finite")
    return out


def readable(name: str, prompts: Sequence[str], texts: Sequence[str], reads: str) -> list[str]:
    """The strings that a reward reads: the continuations (`reads="text"`) or prompts and continuations joined
    (`reads="both"`).

    Raises:
      InputError: unequal lengths, or an entry that is not a string.
    """
    if isinstance(prompts, str) or isinstance(texts, str):
        raise InputError(f"reward {name!r} was given one string where it needs a list of strings; wrap it in a list")
    if len(prompts) != len(texts):
        raise InputError(
            f"reward {name!r} was given {len(prompts)} prompts and {len(texts)} texts; give one prompt for each text"
        )
    for what, values in (("prompt", prompts), ("text", texts)):
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise InputError(f"{what} {i} given to reward {name!r} is {type(value).__name__}; expected a string")
    return list(texts) if reads == "text" else [p + t for p, t in zip(prompts, texts)]


def check_reads(reads: str) -> str:
    if reads not in READS:
        raise InputError(
            f"reads is {reads!r}; it must be 'text' (the continuation) or 'both' (prompt and continuation)"
        )
    return reads


class TextReward:
    """A reward from any function of texts, e.g. the oracle of a corpus whose sentiment is known.

    Args:
      name: what it measures.
      version: changes whenever its answers change (a digest, a revision).
      fn: list of n strings -> n numbers.
      reads: "text" for the continuation, "both" for prompt and continuation.
      threshold: the score from which a text counts as having the attribute.
      own: for an oracle, whether a text is in the words of the corpus on which its answers are exact.
    """

    def __init__(
        self,
        name: str,
        version: str,
        fn: Callable[[list[str]], Any],
        *,
        reads: str = "text",
        threshold: float = 0.5,
        own: Callable[[str], bool] | None = None,
    ):
        self.name, self.version, self.fn, self.own = name, version, fn, own
        self.reads, self.threshold = check_reads(reads), threshold

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        return checked(self.name, self.fn(readable(self.name, prompts, texts, self.reads)), len(texts))


def texts_and_labels(records: Sequence[Mapping[str, Any]], where: str) -> tuple[list[str], list[int]]:
    """The texts and labels of records; those without a label are left out and counted in a warning.

    where: what the records are called in messages.

    Raises:
      InputError: no record has a label.
    """
    rows = labelled(records, where)
    return [r["text"] for r in rows], [r["label"] for r in rows]
