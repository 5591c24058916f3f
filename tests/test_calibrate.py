"""Ranks, bins, best of n: by hand, and against the distributions they stand for."""

import numpy as np
import pytest

from ctg_jax.learn import calibrate
from ctg_jax.types import InputError


def test_bins_by_hand():
    assert calibrate.bins([5, 1, 3, 2, 4, 6], 3).tolist() == [2, 0, 1, 0, 1, 2]
    assert calibrate.bins([7, 7, 7, 9], 2).tolist() == [0, 0, 1, 1]  # ties keep their order


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
    with pytest.raises(InputError, match="n is -1"):
        calibrate.transformed(np.array([0.5]), -1)


def test_best_of_n():
    assert calibrate.best_of([1, 5, 5, 0, 2], [0, 0, 0, 1, 1]).tolist() == [1, 4]
    assert calibrate.best_of_n_kl(1) == 0
    # KL of the best of n from the base, for continuous rewards: density n u^(n-1) on [0, 1].
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (2, 4, 16):
        density = n * u ** (n - 1)
        assert calibrate.best_of_n_kl(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-3)
