"""Pairs of a text and a better one of the same prompt (Self-Correct, Welleck et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ctg_jax.learn import calibrate
from ctg_jax.types import InputError


def law(values: Sequence[float], similarity: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """float64 [n, n]: for each text y of one prompt the probability of each y' as its correction, which is proportional
    to exp(alpha (v' - v) + beta s(y, y')) over the texts with v' > v; a row of zeros where there is none.

    Each text is normalised on its own, so that every text that can be improved counts the same.
    """
    v = np.asarray(values, np.float64)
    gain = v[None, :] - v[:, None]
    score = np.where(gain > 0, alpha * gain + beta * np.asarray(similarity, np.float64), -np.inf)
    top = np.max(score, axis=1, keepdims=True, initial=-np.inf)
    weights = np.where(gain > 0, np.exp(score - np.where(np.isfinite(top), top, 0.0)), 0.0)
    return weights / np.maximum(weights.sum(1, keepdims=True), np.finfo(float).tiny)


def improving(
    values: Sequence[float],
    prompts: Sequence[int],
    similarity: Callable[[int, int], float],
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    draws: int = 1,
    keep: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(from, to) int [m] each: places of texts and of their corrections.

    Args:
      values, prompts: of each text, [n].
      similarity: s of two places, such as `preferences.likeness` of their texts; asked for where the second text is
        better.
      alpha, beta: see `law`. draws: corrections of each text that can be improved.
      keep: as many texts that nothing improves, over the number of pairs, are paired with themselves, so that the
        corrector learns to leave good texts alone.
      seed: of the draws.

    Raises:
      InputError: no text has a better one, a value that is not finite, draws below 1, or keep below 0.
    """
    if draws < 1 or keep < 0:
        raise InputError(f"draws is {draws} and keep is {keep}, expected at least 1 and 0.")
    values, prompts = calibrate.finite(values), np.asarray(prompts)
    generator, first, second, best = np.random.default_rng(seed), [], [], []
    for prompt in np.unique(prompts):
        places = np.flatnonzero(prompts == prompt)
        close = np.zeros((len(places), len(places)))
        for i, a in enumerate(places):
            for j in np.flatnonzero(values[places] > values[a]):
                close[i, j] = similarity(int(a), int(places[j]))
        table = law(values[places], close, alpha, beta)
        for i, row in enumerate(table):
            if row.sum() == 0:
                best.append(places[i])
                continue
            first += [places[i]] * draws
            second += places[generator.choice(len(places), draws, p=row / row.sum())].tolist()
    if not first:
        raise InputError(
            f"none of the {len(values)} texts has a better one of its prompt: raise n, or take another reward"
        )
    kept = generator.choice(best, round(keep * len(first))) if keep else np.zeros(0, int)
    return np.concatenate([first, kept]).astype(int), np.concatenate([second, kept]).astype(int)
