"""Lexicon rewards: word weights summed over a text, and readers of the usual word lists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctg_jax.io import digest
from ctg_jax.rewards.check import check_reads, checked, readable
from ctg_jax.types import InputError

NORMALISE = ("sum", "mean", "compound", "any")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def read_weights(path: str | Path, *, column: int = 1) -> dict[str, float]:
    """Word -> weight from a tab-separated file, one word a line, the weight in `column` (VADER's layout:
    word, mean, standard deviation, ratings).

    Raises:
      InputError: the file cannot be read, or a line has no number there (names the line).
    """
    weights: dict[str, float] = {}
    for number, line in _lines(path):
        fields = line.split("\t")
        try:
            weights[fields[0].strip().lower()] = float(fields[column])
        except (IndexError, ValueError):
            raise InputError(
                f"{path}, line {number}: {line[:60]!r} has no number in column {column}; expected word<TAB>weight"
            ) from None
    return weights


def read_words(path: str | Path, *, weight: float = 1.0) -> dict[str, float]:
    """Word -> the same weight, from a plain list with one word a line; lines that start with ';' or '#' are
    comments (the layout of the opinion lexicon of Hu and Liu)."""
    return {line.strip().lower(): weight for _, line in _lines(path) if line[0] not in ";#"}


class Lexicon:
    """A reward that adds the weights of the words of a text.

    Args:
      weights: lower-case word -> weight.
      name: what it measures.
      normalise: "sum" of weights; "mean" over the words of the text; "compound" = s / sqrt(s^2 + 15) in (-1, 1), the
        scaling of VADER (Hutto and Gilbert 2014) without its rules for negation and emphasis; "any" = 1 where a listed
        word occurs, else 0.
      reads: "text" for the continuation, "both" for prompt and continuation.
      threshold: the score from which a text counts as having the attribute; by default above 0 ("any": 0.5).
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        name: str = "lexicon",
        normalise: str = "compound",
        reads: str = "text",
        threshold: float | None = None,
    ):
        if not weights:
            raise InputError("weights of the lexicon are empty; give at least one word")
        if normalise not in NORMALISE:
            raise InputError(f"normalise is {normalise!r}; expected one of {', '.join(NORMALISE)}")
        self.weights = {str(w).lower(): float(x) for w, x in weights.items()}
        self.name, self.normalise, self.reads = name, normalise, check_reads(reads)
        # The smallest positive number: a text with no listed word is neutral, not positive.
        self.threshold = threshold if threshold is not None else 0.5 if normalise == "any" else 1e-6
        self.version = f"lexicon:{len(self.weights)}:{normalise}:{reads}@{digest(self.weights)}"

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        rows = readable(self.name, prompts, texts, self.reads)
        return checked(self.name, [self._one(r) for r in rows], len(texts))

    def _one(self, text: str) -> float:
        words = _WORD.findall(text.lower())
        found = [self.weights[w] for w in words if w in self.weights]
        if self.normalise == "any":
            return float(bool(found))
        total = sum(found)
        if self.normalise == "mean":
            return total / max(1, len(words))
        return total if self.normalise == "sum" else total / (total * total + 15.0) ** 0.5


SETTINGS = ("target", "reads")


def load(folder: Path, settings: Mapping[str, Any]) -> Lexicon:
    """The judge of kind "lexicon"; see `ctg_jax.rewards`. A text has the attribute where it mentions one of the words
    in `target`, which spaces separate.

    Raises:
      InputError: `target` holds no words, or something that is no single word.
    """
    target = settings["target"]
    words = target.split() if isinstance(target, str) else []
    wrong = next((word for word in words if not _WORD.fullmatch(word)), None)
    if not words or wrong is not None:
        raise InputError(
            f"target is {target if wrong is None else wrong!r}: expected words to search for, such as 'rocket orbit'"
        )
    weights = dict.fromkeys(words, 1.0)
    return Lexicon(weights, name=settings["name"], normalise="any", reads=settings["reads"])


def _lines(path):
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read the word list {path}: {e}; give a UTF-8 text file") from None
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
