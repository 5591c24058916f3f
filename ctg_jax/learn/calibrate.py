"""The rank of a reward among the rewards of a base: ranks, quantile bins, the best of n.

Quark's quantile tokens (Lu et al. 2022) and the calibrated reward of InfAlign (Balashankar et al. 2024) are the same
number, the rank of a reward under samples of the base, once cut into bins and once transformed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ctg_jax.types import InputError


def bins(rewards: Sequence[float], count: int) -> np.ndarray:
    """Quantile bin int32 [n] of each reward, 0 the lowest; bins differ in size by one at most, ties keep their order.

    Raises:
      InputError: fewer than two bins, fewer rewards than bins, a reward that is not finite, or all rewards equal.
    """
    rewards = finite(rewards)
    if count < 2:
        raise InputError(f"{count} quantile bins were asked for, expected at least 2")
    if len(rewards) < count:
        raise InputError(f"{count} quantile bins were asked for and the pool has {len(rewards)} samples: take fewer")
    if np.all(rewards == rewards[0]):
        raise InputError(f"all {len(rewards)} rewards are {rewards[0]:g}: there is nothing to sort; try another reward")
    order = np.argsort(rewards, kind="stable")
    out = np.empty(len(rewards), np.int32)
    out[order] = np.arange(len(rewards)) * count // len(rewards)
    return out


def rank(rewards: Sequence[float], base: Sequence[float]) -> np.ndarray:
    """Calibrated reward float64 [n] in [0, 1]: the share of base rewards below each, ties counted half.

    For samples of the base itself it is uniform, whatever the scale of the reward (Balashankar et al. 2024).
    """
    base = np.sort(finite(base))
    if not len(base):
        raise InputError("the base has no rewards: calibration needs at least one sample of it")
    rewards = finite(rewards)
    return (np.searchsorted(base, rewards, "left") + np.searchsorted(base, rewards, "right")) / (2 * len(base))


def rank_within(
    rewards: Sequence[float], prompts: Sequence[int], base: Sequence[float], base_prompts: Sequence[int]
) -> np.ndarray:
    """`rank` of each reward among the base rewards of the same prompt.

    Raises:
      InputError: a prompt that the base has no samples of.
    """
    rewards, prompts = finite(rewards), np.asarray(prompts)
    base, base_prompts = finite(base), np.asarray(base_prompts)
    out = np.empty(len(rewards))
    for p in np.unique(prompts):
        mine = base[base_prompts == p]
        if not len(mine):
            raise InputError(f"the base has no samples of prompt {p}: sample all prompts before calibrating")
        out[prompts == p] = rank(rewards[prompts == p], mine)
    return out


def transformed(calibrated: np.ndarray, n: int) -> np.ndarray:
    """The reward to optimise for decoding by the best of n: exp(n u) / exp(n) of the calibrated reward u, which is flat
    where the best of n cannot lie (Balashankar et al. 2024). n = 0 leaves u alone.

    Raises:
      InputError: a negative n.
    """
    if n < 0:
        raise InputError(f"n is {n}, expected 0 or more")
    u = np.asarray(calibrated, np.float64)
    return u if n == 0 else np.exp(n * (u - 1.0))


def best_of(rewards: Sequence[float], groups: Sequence[int]) -> np.ndarray:
    """Index int64 of the highest reward in each group, in the order of the groups; the first of equals."""
    rewards, groups = finite(rewards), np.asarray(groups)
    order = np.lexsort((np.arange(len(rewards)), -rewards, groups))
    first = np.r_[True, groups[order][1:] != groups[order][:-1]] if len(order) else np.zeros(0, bool)
    return order[first]


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, nats of KL(best of n ‖ base) for a reward without ties, an upper bound with them (Stiennon
    et al. 2020; Beirami et al. 2024)."""
    if n < 1:
        raise InputError(f"n is {n}, expected at least 1")
    return float(np.log(n) - (n - 1) / n)


def finite(rewards: Sequence[float]) -> np.ndarray:
    """Rewards float64 [n]; InputError naming the first that is not finite."""
    out = np.asarray(rewards, np.float64)
    bad = np.flatnonzero(~np.isfinite(out))
    if len(bad):
        raise InputError(f"reward {bad[0]} is {out[bad[0]]}, expected finite numbers")
    return out
