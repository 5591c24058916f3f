"""GDC: multipliers and weights by hand and against the exact solution; the targets reached in an enumerable world."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds
from scipy.optimize import brentq

from ctg_jax.learn import train
from ctg_jax.learn.optimizer import optimizer, schedule
from ctg_jax.methods import gdc
from ctg_jax.types import InputError

LM = worlds.tiny(vocab=5, depth=1)
PARAMS = worlds.lively(LM, factor=4)
PROMPT, NEW = [1, 2], 2
EVERY = worlds.sequences(LM, NEW)
FEATURE = (EVERY == 3).any(1)  # the text says token 3
BASE = worlds.probabilities(LM, PARAMS, PROMPT, NEW)


def exact(moment):
    """(λ, target) with which the feature has that mean."""
    if moment == 1:
        return np.inf, BASE * FEATURE / (BASE * FEATURE).sum()

    def tilted(lam):
        q = BASE * np.exp(lam * FEATURE)
        return q / q.sum()

    lam = brentq(lambda x: tilted(x) @ FEATURE - moment, -20, 20)
    return lam, tilted(lam)


def test_multipliers_are_within_a_percent():
    at = np.random.default_rng(0).choice(len(BASE), 20_480, p=BASE / BASE.sum())
    lam, _ = exact(0.8)
    assert gdc.multipliers(FEATURE[at][:, None], [0.8])[0] == pytest.approx(lam, rel=0.01)


def test_multipliers_of_two_features_by_hand():
    """Two independent coins: λ is the difference of log-odds, whatever the other coin."""
    phi = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    found = gdc.multipliers(phi, [0.9, 0.2])
    np.testing.assert_allclose(found, [np.log(9), np.log(0.25)], rtol=1e-4)
    assert gdc.multipliers(phi[:, :1], [0.9], weights=[3, 3, 1, 1])[0] == pytest.approx(np.log(27), rel=1e-4)


@pytest.mark.parametrize("moment", [1.0, 0.8])
def test_it_reaches_the_target(moment):
    """KL-adaptive distributional policy gradient: proposals improve as the policy does."""
    lam, wanted = exact(moment)
    assert worlds.divergence(wanted, BASE) > 0.2  # where it starts
    rounds, updates, n = 30, 10, 2048
    tx = optimizer(schedule(1e-2, "linear", steps=rounds * updates), trained="changes/.*")
    learner = train.init_state(gdc.init(LM, jax.random.key(0), kind="full"), tx, jax.random.key(1))
    step = jax.jit(train.make_step(gdc.loss(LM), tx))
    proposal, draw, moved = BASE, np.random.default_rng(3), 0
    log_p = np.log(BASE) + (np.where(FEATURE, 0, -np.inf) if moment == 1 else lam * FEATURE)
    for _ in range(rounds):
        for _ in range(updates):
            at = draw.choice(len(BASE), n, p=proposal / proposal.sum())
            weight = gdc.importance(log_p[at], np.log(proposal[at]))
            learner, _ = step(
                learner, {"params": PARAMS}, worlds.written(PROMPT, EVERY[at], weight=jnp.float32(weight))
            )
        policy = worlds.probabilities(LM, PARAMS, PROMPT, NEW, learner.params)
        share = weight / weight.sum()
        if share @ (np.log(proposal[at]) - np.log(policy[at])) < 0:
            proposal, moved = policy, moved + 1
    assert worlds.divergence(wanted, policy) < 0.02
    assert moved > 2


def test_weights_by_hand():
    log_p, log_q = np.log([0.2, 0.4, 0.4, 0.1]), np.log([0.4, 0.4, 0.2, 0.1])
    np.testing.assert_allclose(gdc.importance(log_p, log_q), np.array([0.5, 1, 2, 1]) / 1.125)
    groups = np.array([7, 7, 9, 9])
    np.testing.assert_allclose(gdc.importance(log_p, log_q, groups), [2 / 3, 4 / 3, 4 / 3, 2 / 3])
    none = gdc.importance(np.array([-np.inf, 0.0]), np.zeros(2), np.array([0, 1]))
    assert none.tolist() == [0, 1]


def test_bad_input():
    with pytest.raises(InputError, match=r"moment 0 is 0\.5 and the feature is between 1 and 1 in 3 samples"):
        gdc.multipliers(np.ones((3, 1)), [0.5])
    with pytest.raises(InputError, match="contradict each other"):
        gdc.multipliers(np.array([[0, 1], [1, 0], [0, 1]]), [0.7, 0.7])
