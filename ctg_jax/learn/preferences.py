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


def ranked(rewards: Sequence[float], prompts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(better, worse), indices int64 [P]: of each prompt the best sample with the worst, the second best with the
    second worst, and so on, without pairs of equal reward.

    Args:
      rewards, prompts: [n], the reward and the prompt of each sample.

    Raises:
      InputError: no prompt has two samples of different reward, or a reward that is not finite.
    """
    rewards, prompts = calibrate.finite(rewards), np.asarray(prompts)
    chosen = []
    for p in np.unique(prompts):
        order = np.flatnonzero(prompts == p)
        order = order[np.argsort(-rewards[order], kind="stable")]
        half = len(order) // 2
        chosen += [(a, b) for a, b in zip(order[:half], order[::-1][:half]) if rewards[a] > rewards[b]]
    if not chosen:
        raise InputError("No prompt has two samples of different reward: raise n or take another reward.")
    return tuple(np.asarray(chosen).T)


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
