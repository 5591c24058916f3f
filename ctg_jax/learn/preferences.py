"""Pairs of a better and a worse text after the same prompt: from samples that a reward ranks, or from people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ctg_jax.data.messages import prompt_of
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.learn import calibrate
from ctg_jax.run.stage import Artifact
from ctg_jax.types import InputError

PAIRS = ("below", "above")


def ranked(
    rewards: Sequence[float], prompts: Sequence[int], *, least: float = 0.0, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(better, worse), indices int64 [P]: of each prompt the best sample with the worst, the second best with the
    second worst, and so on, without pairs of equal reward.

    Args:
      rewards, prompts: [n], the reward and the prompt of each sample.
      least: a pair differs by more than this. most: pairs of a prompt, the furthest first; None: all.

    Raises:
      InputError: no prompt has two samples of different reward, or a reward that is not finite.
    """
    rewards, prompts = calibrate.finite(rewards), np.asarray(prompts)
    chosen = []
    for p in np.unique(prompts):
        order = np.flatnonzero(prompts == p)
        order = order[np.argsort(-rewards[order], kind="stable")]
        half = min(len(order) // 2, len(order) if most is None else most)
        chosen += [(a, b) for a, b in zip(order[:half], order[::-1][:half]) if rewards[a] - rewards[b] > least]
    if not chosen:
        apart = "of different reward" if not least else f"whose rewards differ by more than {least:g}"
        raise InputError(f"No prompt has two samples {apart}: raise n or take another reward.")
    return tuple(np.asarray(chosen).T)


def next_below(
    rewards: Sequence[float],
    likelihood: Sequence[float],
    prompts: Sequence[int],
    *,
    threshold: float,
    pair: str = "below",
) -> tuple[np.ndarray, np.ndarray]:
    """(positives, negatives), indices int64 [P]: each sample whose reward is below the threshold, with the sample of
    its prompt that is at or above it and comes next below it in likelihood; where none is below, the nearest one. These
    are the pairs of Click (Zheng et al. 2023).

    Args:
      rewards, likelihood, prompts: [n]; likelihood is the log-probability of the whole sample.
      pair: "below" or "above": on which side of the negative to look first. The authors' code does not hold this step,
        so it is an option.

    Raises:
      InputError: no prompt has samples on both sides, or a reward that is not finite.
    """
    if pair not in PAIRS:
        raise InputError(f"pair is {pair!r}, expected one of {', '.join(PAIRS)}.")
    rewards, likelihood, prompts = calibrate.finite(rewards), np.asarray(likelihood, float), np.asarray(prompts)
    good = rewards >= threshold
    chosen = []
    for p in np.unique(prompts):
        positives, negatives = np.flatnonzero((prompts == p) & good), np.flatnonzero((prompts == p) & ~good)
        if not len(positives):
            continue
        for n in negatives:
            away = likelihood[n] - likelihood[positives] if pair == "below" else likelihood[positives] - likelihood[n]
            away = np.where(away > 0, away, np.inf) if np.any(away > 0) else np.abs(away)
            chosen.append((positives[np.argmin(away)], n))
    if not chosen:
        raise InputError(
            f"no prompt has samples on both sides of the threshold {threshold:g}, and {int(good.sum())} of {len(good)} "
            "samples are at or above it: set threshold, raise n or take another reward"
        )
    return tuple(np.asarray(chosen).T)


def edits(before: Sequence[int], after: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(removed bool [n], new bool [m]): which tokens of `before` the fewest edits remove or replace, and which of
    `after` they put there. Of edits that are equally few, read from the end, a replacement comes before a removal and
    that before an insertion."""
    cost = _distances(before, after)
    removed, new = np.zeros(len(before), bool), np.zeros(len(after), bool)
    i, j = len(before), len(after)
    while i or j:
        if i and j and before[i - 1] == after[j - 1] and cost[i, j] == cost[i - 1, j - 1]:
            i, j = i - 1, j - 1
        elif i and j and cost[i, j] == cost[i - 1, j - 1] + 1:
            i, j = i - 1, j - 1
            removed[i] = new[j] = True
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
            removed[i] = True
        else:
            j -= 1
            new[j] = True
    return removed, new


def likeness(a: Sequence[Any], b: Sequence[Any]) -> float:
    """1 minus the number of tokens or words to insert, delete or replace between two lists, over the length of the
    longer; 1 for two empty ones."""
    return 1.0 - float(_distances(a, b)[-1, -1]) / max(len(a), len(b), 1)


def _distances(a: Sequence[Any], b: Sequence[Any]) -> np.ndarray:
    """Levenshtein distances int [n + 1, m + 1] of all beginnings of two lists."""
    cost = [list(range(len(b) + 1))]  # lists, whose entries are read several times as fast as those of an array
    for i, x in enumerate(a, 1):
        above, row = cost[-1], [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j - 1] + (x != y), above[j] + 1, row[-1] + 1))
        cost.append(row)
    return np.array(cost, int)


def given(data: Artifact, tokenizer: Tokenizer, length: int) -> list[dict[str, Any]]:
    """The pairs of a data artifact whose records have a prompt, `chosen` and `rejected`, texts that follow it: records
    with `tokens` and `rejected`, lists of at most `length` ids.

    Raises:
      InputError: a record without one of the two texts.
    """
    rows = list(data.rows("data.jsonl"))
    for i, row in enumerate(rows):
        if missing := [name for name in ("chosen", "rejected") if not isinstance(row.get(name), str)]:
            raise InputError(
                f"Record {i} of {data.path.name} has no text {missing[0]!r}: give pairs, or give rewards, which rank "
                "samples of the model."
            )
    prompts = [prompt_of(row) for row in rows]
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    sides = [tokenizer.encode_after(prompts, [row[name] for row in rows]) for name in ("chosen", "rejected")]
    cut = [[(ids + end)[:length] for ids in side] for side in sides]
    return [{**row, "tokens": a, "rejected": b} for row, a, b in zip(rows, *cut)]
