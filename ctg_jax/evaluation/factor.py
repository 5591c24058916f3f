"""The protocol of AxBench (Wu et al. 2025): a strength is chosen on one half of the prompts and scored on the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax.evaluation.bootstrap import Bootstrap, Figure
from ctg_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Factor:
    """The strength that was chosen, and its figures on the held-out prompts: `overall`, the mean of `harmonic`, and the
    mean of each score alone. `curve`: strength -> the mean on the prompts that it was chosen on."""

    strength: float
    figures: dict[str, Figure]
    curve: dict[float, float]


def harmonic(scores: Any) -> np.ndarray:
    """float64 [n], the harmonic mean of scores [J, n] of at least 0; 0 where one of them is 0, so that no score makes
    up for another."""
    x = np.asarray(scores, np.float64)
    with np.errstate(divide="ignore"):
        return len(x) / np.sum(1 / x, axis=0)


def held_out(
    strengths: Sequence[float],
    prompt_ids: Sequence[Any],
    scores: Mapping[str, Sequence[float]],
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Factor:
    """The strength whose samples have the highest mean of `harmonic` on half of the prompts, which the seed draws, and
    its figures on the others. The authors' scores are 0, 1 or 2, whether a text shows the concept, does what the prompt
    asks for and is fluent, by a large language model; here they are of any judges, in one unit, such as from 0 to 1.

    Args:
      strengths, prompt_ids: one of each for every sample; all prompts at all strengths.
      scores: name of a score -> one for every sample. At equal means the strength nearer to 0 is chosen.

    Raises:
      InputError: no scores, one called "overall", unequal lengths, fewer than two strengths or prompts, a score that is
        negative or not finite, a prompt that is missing at a strength.
    """
    x, table = np.asarray(strengths, np.float64), {k: np.asarray(v, np.float64) for k, v in scores.items()}
    if not table or any(v.shape != x.shape for v in table.values()) or x.shape != (len(prompt_ids),):
        sizes = {name: len(v) for name, v in table.items()}
        raise InputError(
            f"there are {x.size} strengths, {len(prompt_ids)} prompt_ids and scores {sizes}: give one of each for "
            "every sample"
        )
    if "overall" in table:
        raise InputError("a score is called 'overall', which is the name of the harmonic mean: give it another name")
    for name, values in table.items():
        if not (np.isfinite(values) & (values >= 0)).all():
            raise InputError(f"the score {name!r} is negative or not finite, and a harmonic mean has numbers from 0 on")
    first: dict[Any, int] = {}
    prompt = np.asarray([first.setdefault(i, len(first)) for i in prompt_ids])
    levels = sorted(np.unique(x), key=lambda level: (abs(level), level))
    if len(levels) < 2 or len(first) < 2:
        raise InputError(f"there are {len(levels)} strengths and {len(first)} prompts, expected at least 2 of each")
    for value in levels:
        if missing := set(range(len(first))) - set(prompt[x == value].tolist()):
            name = list(first)[min(missing)]
            raise InputError(
                f"prompt {name!r} has no sample at strength {value:g}: give every prompt at every strength"
            )
    chosen_on = np.isin(prompt, np.random.default_rng(seed).permutation(len(first))[: len(first) // 2])
    overall = harmonic(list(table.values()))
    curve = {float(value): float(overall[chosen_on & (x == value)].mean()) for value in levels}
    best = max(curve, key=curve.get)
    kept = ~chosen_on & (x == best)
    boot = Bootstrap(prompt[kept].tolist(), seed=seed, resamples=resamples, level=level)
    figures = {name: boot.mean(values[kept]) for name, values in (("overall", overall), *table.items())}
    return Factor(best, figures, curve)
