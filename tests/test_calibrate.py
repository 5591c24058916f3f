"""Ranks, bins, best of n: by hand, and against the distributions they stand for."""

import numpy as np
import pytest

from ctg_jax.learn import calibrate
from ctg_jax.types import InputError


def test_bins_by_hand():
    assert calibrate.bins([5, 1, 3, 2, 4, 6], 3).tolist() == [2, 0, 1, 0, 1, 2]


def test_ties_are_broken_at_random_and_again_alike():
    """Three equal rewards share one place of the upper bin: each has it in a third of the seeds."""
    upper = np.array([calibrate.bins([7, 7, 7, 9], 2, seed=s) for s in range(300)])
    assert upper.sum(axis=1).tolist() == [2] * 300 and upper[:, 3].all()
    assert np.all(np.abs(upper[:, :3].mean(axis=0) - 1 / 3) < 0.1)
    assert (calibrate.bins([7, 7, 7, 9], 2, seed=5) == upper[5]).all()


def test_ranks_by_hand():
    assert calibrate.rank([0, 2, 5], [1, 2, 2, 3]).tolist() == [0.0, 0.5, 1.0]
    within = calibrate.rank_within([2, 2], [0, 1], [1, 3, 2, 5], [0, 0, 1, 1])
    assert within.tolist() == [0.5, 0.25]
    with pytest.raises(InputError, match="the base has no samples of prompt 1"):
        calibrate.rank_within([1.0], [1], [1.0], [0])
    with pytest.raises(InputError, match="the base has no rewards"):
        calibrate.rank([1.0], [])


def test_the_rank_of_the_base_is_uniform_whatever_the_scale():
    x = np.random.default_rng(0).normal(size=2000)
    u = calibrate.rank(x, x)
    assert np.allclose(np.sort(u), (np.arange(2000) + 0.5) / 2000)
    assert np.array_equal(u, calibrate.rank(np.exp(3 * x), np.exp(3 * x)))


def test_transformed():
    assert calibrate.transformed(np.array([0.0, 0.5, 1.0]), 0).tolist() == [0, 0.5, 1]
    assert calibrate.transformed(np.array([0.5, 1.0]), 4) == pytest.approx([np.exp(-2), 1])
    assert calibrate.transformed(np.array([0.5, 1.0]), -4) == pytest.approx([-np.exp(-2), -np.exp(-4)])
    assert calibrate.transformed(np.array([0.0, 0.5]), "log") == pytest.approx([np.log(1e-6), np.log(0.5)])
    for t in ("exp", np.inf):
        with pytest.raises(InputError, match=f"t is {t!r}, expected a finite number or 'log'"):
            calibrate.transformed(np.array([0.5]), t)


@pytest.mark.parametrize(
    "t, beta, plain, best, worst",
    [
        (0, 0.136, 0.865, 0.877, 0.974),
        ("log", 0.189, 0.863, 0.863, 0.986),
        (4, 0.220, 0.847, 0.913, 0.883),
        (10, 0.241, 0.801, 0.935, 0.771),
        (-10, 0.0010, 0.848, 0.810, 0.993),
    ],
)
def test_win_rates_of_the_policy_that_each_transform_asks_for(t, beta, plain, best, worst):
    """Its density in u is exp(Φ(u) / β) / Z; at a KL of 1 nat every transform is best at what it was made for."""
    u = (np.arange(200_000) + 0.5) / 200_000
    phi = calibrate.transformed(u, t)
    density = np.exp((phi - phi.max()) / beta)
    density /= density.mean()
    assert np.mean(density * np.log(np.maximum(density, 1e-300))) == pytest.approx(1.0, abs=0.02)
    ranks = np.interp((np.arange(4000) + 0.5) / 4000, np.cumsum(density) / len(u), u)
    found = [calibrate.win_rate(ranks), calibrate.win_rate(ranks, 4), calibrate.win_rate(ranks, 4, worst=True)]
    np.testing.assert_allclose(found, [plain, best, worst], atol=0.004)


def test_win_rates_by_hand():
    """The base wins half of all; one sample above all of the base wins always, and between its halves: the best of two
    of the base is below 1/2 in a quarter."""
    u = (np.arange(1000) + 0.5) / 1000
    assert [calibrate.win_rate(u, n, worst) for n in (1, 4) for worst in (False, True)] == pytest.approx(
        [0.5] * 4, abs=2e-3
    )
    assert calibrate.win_rate([0.5], 2) == pytest.approx(0.25) and calibrate.win_rate([0.5], 2, True) == pytest.approx(
        0.75
    )
    assert calibrate.win_rate([1.0, 1.0], 3) == 1 and calibrate.win_rate([0.0], 3, worst=True) == 0
    with pytest.raises(InputError, match="n is 0, expected at least 1"):
        calibrate.win_rate([0.5], 0)


def test_best_of_n():
    assert calibrate.best_of([1, 5, 5, 0, 2], [0, 0, 0, 1, 1]).tolist() == [1, 4]
    assert calibrate.best_of_n_kl(1) == 0
    # KL of the best of n from the base, for continuous rewards: density n u^(n-1) on [0, 1].
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (2, 4, 16):
        density = n * u ** (n - 1)
        assert calibrate.best_of_n_kl(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-3)
