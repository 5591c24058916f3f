"""Minimum Bayes risk: of several samples the one that is most like the others (Kumar & Byrne 2004; the decoding of
Diffusion-LM, Li et al. 2022). It needs samples alone, so any method may draw them, also one whose texts have no
likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ctg_jax.evaluation.text import bleu_pair, ngrams
from ctg_jax.run.stage import Artifact, Run, stage_function, write_jsonl
from ctg_jax.types import InputError


def overlap(text: str, other: str) -> float:
    """F1 of the words of two texts, each counted once; 0 where one has none."""
    a, b = set(ngrams(text.split(), 1)), set(ngrams(other.split(), 1))
    return 2 * len(a & b) / (len(a) + len(b)) if a and b else 0.0


def same(text: str, other: str) -> float:
    """1 for equal texts: the choice is the most frequent one, a vote."""
    return float(text.strip() == other.strip())


SIMILARITIES: dict[str, Callable[[str, str], float]] = {"bleu": bleu_pair, "overlap": overlap, "same": same}


def consensus(texts: Sequence[str], similarity: str = "bleu") -> tuple[int, float]:
    """(the place of the text whose mean similarity to the others is greatest, the first of those that tie; that mean).
    Of one text the mean is NaN.

    Args:
      similarity: "bleu", of the text with the other as its reference; "overlap", see `overlap`; "same", see `same`.

    Raises:
      InputError: no text, or an unknown similarity.
    """
    if similarity not in SIMILARITIES:
        raise InputError(f"similarity is {similarity!r}, expected one of {', '.join(SIMILARITIES)}.")
    if not texts:
        raise InputError("there are no texts to choose from: give at least one.")
    if len(texts) == 1:
        return 0, float("nan")
    like = SIMILARITIES[similarity]
    means = [np.mean([like(a, b) for j, b in enumerate(texts) if j != i]) for i, a in enumerate(texts)]
    best = int(np.argmax(means))
    return best, float(means[best])


@stage_function("consensus", revision=1)
def chosen(run: Run, *, samples: Artifact, n: int = 10, similarity: str = "bleu") -> None:
    """Stage: writes samples.jsonl, of every n samples of each prompt the one that `consensus` chooses, with the
    mean similarity to the others as `agreement`. They have no `logp`: that of a sample is not that of the one chosen
    among n.

    Raises:
      InputError: n below 1, or one that does not divide the number of samples of each prompt, and what `consensus`
        raises.
    """
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    rows = samples.rows("samples.jsonl")
    count = 1 + max(row["sample"] for row in rows)
    if n < 1 or count % n:
        raise InputError(f"n is {n}, expected a divisor of {count}, the samples of each prompt")
    for row in rows:
        groups.setdefault((row["prompt_id"], row["sample"] // n), []).append(row)
    found = []
    for (_, number), group in groups.items():
        best, mean = consensus([row["text"] for row in group], similarity)
        kept = {key: value for key, value in group[best].items() if key not in ("logp", "logps")}
        found.append(kept | {"sample": number, "agreement": mean})
    write_jsonl(run.path / "samples.jsonl", found)
    run.record(likelihood=False)
