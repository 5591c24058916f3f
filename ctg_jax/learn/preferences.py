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


def improving(
    rewards: Sequence[float],
    prompts: Sequence[int],
    texts: Sequence[Sequence[int]],
    *,
    alpha: float = 1.0,
    similarity: float = 1.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(worse, better), indices int64 [P]: each sample with one of its prompt that has a higher reward, drawn with
    probability ∝ exp(alpha (r' - r) + similarity s), s being their `likeness`: an improvement that keeps what it can
    (Welleck et al. 2023).

    Args:
      rewards, prompts: [n]. texts: n lists of token ids. seed: of the draws.

    Raises:
      InputError: no prompt has two samples of different reward, or a reward that is not finite.
    """
    rewards, prompts = calibrate.finite(rewards), np.asarray(prompts)
    draw, chosen = np.random.default_rng(seed), []
    for p in np.unique(prompts):
        own = np.flatnonzero(prompts == p)
        for i in own:
            higher = own[rewards[own] > rewards[i]]
            if len(higher):
                like = [likeness(texts[i], texts[j]) for j in higher]
                chosen.append(
                    (i, draw.choice(higher, p=weights(rewards[higher] - rewards[i], like, alpha, similarity)))
                )
    if not chosen:
        raise InputError("No prompt has two samples of different reward: raise n or take another reward.")
    return tuple(np.asarray(chosen).T)


def weights(gains: Sequence[float], like: Sequence[float], alpha: float, similarity: float) -> np.ndarray:
    """The probabilities of `improving`, float64 [m], for m better samples with these gains and likenesses."""
    log_p = alpha * np.asarray(gains, np.float64) + similarity * np.asarray(like, np.float64)
    p = np.exp(log_p - log_p.max())
    return p / p.sum()


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


def likeness(a: Sequence[int], b: Sequence[int]) -> float:
    """1 - the number of edits between two lists over the length of the longer; 1 for two empty ones."""
    return 1.0 - float(_distances(a, b)[-1, -1]) / max(len(a), len(b), 1)


def _distances(a: Sequence[int], b: Sequence[int]) -> np.ndarray:
    """Levenshtein distances int [n + 1, m + 1] of all beginnings of two lists."""
    cost = np.zeros((len(a) + 1, len(b) + 1), int)
    cost[:, 0], cost[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            cost[i, j] = min(cost[i - 1, j - 1] + (x != y), cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    return cost


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
