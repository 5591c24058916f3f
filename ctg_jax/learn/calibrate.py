"""The rank of a reward among the rewards of a base: ranks, quantile bins, the best of n.

Quark's quantile tokens (Lu et al. 2022) and the calibrated reward of InfAlign (Balashankar et al. 2024) are the same
number, the rank of a reward under samples of the base, once cut into bins and once transformed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ctg_jax.types import InputError


def bins(rewards: Sequence[float], count: int, seed: int = 0) -> np.ndarray:
    """Quantile bin int32 [n] of each reward, 0 the lowest; bins differ in size by one at most.

    Equal rewards are sorted at random: in the order of the pool those of its last prompts would be the better ones.

    Args:
      rewards: [n]. count: of bins. seed: of the order of equal rewards.

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
    order = np.lexsort((np.random.default_rng(seed).permutation(len(rewards)), rewards))
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


def transformed(calibrated: np.ndarray, t: float | str) -> np.ndarray:
    """The reward to optimise in place of the calibrated reward u, float64 [n] (Balashankar et al. 2024, section 5).

    Args:
      t: above 0, exp(t (u - 1)), which is flat where the best of several cannot lie; below 0, -exp(t u), which is flat
        where the worst of several cannot lie; 0, u itself; "log", log u, with u at least 1e-6.

    Raises:
      InputError: another string, or a number that is not finite.
    """
    u = np.asarray(calibrated, np.float64)
    if t == "log":
        return np.log(np.maximum(u, 1e-6))
    if isinstance(t, str) or not np.isfinite(t):
        raise InputError(f"t is {t!r}, expected a finite number or 'log'")
    return u if t == 0 else np.exp(t * (u - 1.0)) if t > 0 else -np.exp(t * u)


def win_rate(calibrated: np.ndarray, n: int = 1, worst: bool = False) -> float:
    """How often the best of n samples (with `worst`, the worst) has a higher reward than that of n samples of the base,
    ties counted half, for rewards of the base without ties.

    The best of n samples is below u in F(u)^n of all cases, F being the distribution of the policy's calibrated rewards
    and u itself that of the base's, so the rate is the integral of n u^(n-1) (1 - F(u)^n) over u from 0 to 1.

    Args:
      calibrated: float [m], the ranks of the policy's samples by `rank`.

    Raises:
      InputError: n below 1.
    """
    if n < 1:
        raise InputError(f"n is {n}, expected at least 1")
    u = np.sort(finite(calibrated))
    u = 1 - u[::-1] if worst else u
    share = (np.arange(len(u) + 1) / len(u)) ** n  # F^n left of each rank, and 1 beyond the last
    rate = 1 - float(share @ np.diff(np.r_[0.0, u, 1.0] ** n))
    return 1 - rate if worst else rate


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
