"""PPO: advantages and the objective by hand, and p · exp(r / β) / Z in a world small enough to enumerate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax.learn import train
from ctg_jax.learn.optimizer import optimizer, schedule
from ctg_jax.methods import ppo
from ctg_jax.models.heads import value_head
from ctg_jax.types import InputError

LM = worlds.tiny(vocab=5, depth=1)
PARAMS = worlds.lively(LM, factor=4)
PROMPT, NEW, BETA = [1, 2], 2, 0.5
EVERY = worlds.sequences(LM, NEW)
REWARD = np.random.default_rng(0).normal(size=len(EVERY)).astype(np.float32)


def test_it_reaches_the_tilted_base():
    """The policy that maximises E[r] - β KL(π ‖ p) is p · exp(r / β) / Z (Ziegler et al. 2019, eq. 3)."""
    base = worlds.probabilities(LM, PARAMS, PROMPT, NEW)
    wanted = base * np.exp(REWARD / BETA)
    wanted /= wanted.sum()
    state = {"policy": ppo.init(LM, jax.random.key(0), kind="full"), "value": value_head(LM.width)}
    rounds, updates = 60, 6
    tx = optimizer(schedule(1e-2, "linear", steps=rounds * updates), trained=r"policy/changes/.*|value/.*")
    learner = train.init_state(state, tx, jax.random.key(1))
    step = jax.jit(train.make_step(ppo.loss(LM), tx))
    draw = np.random.default_rng(3)
    for _ in range(rounds):
        pi = worlds.probabilities(LM, PARAMS, PROMPT, NEW, learner.params["policy"])
        frozen = {"params": PARAMS, "old": learner.params, "beta": jnp.float32(BETA)}
        for _ in range(updates):
            at = draw.choice(len(pi), 1024, p=pi / pi.sum())
            learner, _ = step(learner, frozen, worlds.written(PROMPT, EVERY[at], reward=REWARD[at]))
    reached = worlds.probabilities(LM, PARAMS, PROMPT, NEW, learner.params["policy"])
    assert worlds.divergence(reached, wanted) < 0.02
    assert worlds.divergence(base, wanted) > 0.5  # where it came from


def test_advantages_by_hand():
    """Rewards 0, 0, 1 and values 0.5, 0.2, 0.1, γ = 0.9, λ = 0.5; the second row ends after one token."""
    rewards, values = jnp.array([[0.0, 0, 1], [2, 9, 9]]), jnp.array([[0.5, 0.2, 0.1], [0.5, 7, 7]])
    mask = jnp.array([[True, True, True], [True, False, False]])
    third = 1 - 0.1
    second = (0.9 * 0.1 - 0.2) + 0.45 * third
    first = (0.9 * 0.2 - 0.5) + 0.45 * second
    found = ppo.advantages(rewards, values, mask, gamma=0.9, lam=0.5)
    np.testing.assert_allclose(found, [[first, second, third], [1.5, 0, 0]], rtol=1e-6)


def test_token_rewards_by_hand():
    mask = jnp.array([[True, True, False]])
    old, base = jnp.array([[-1.0, -2.0, 5.0]]), jnp.array([[-1.5, -1.0, 0.0]])
    found = ppo.token_rewards(jnp.array([3.0]), old, base, mask, jnp.float32(0.1))
    np.testing.assert_allclose(found, [[-0.05, 3.1, 0.0]], rtol=1e-6)


def test_the_objective_by_hand():
    """One token, p = 1/2 before and 3/4 now: the ratio 1.5 is clipped to 1.2 for a gain and not for a loss."""
    lm = worlds.Bigram(vocab=2)
    params = worlds.table([[0.5, 0.5], [0.5, 0.5]])
    old = {"policy": ppo.init(lm, jax.random.key(0), kind="full"), "value": value_head(2)}
    kernel = worlds.table([[0.75, 0.25], [0.5, 0.5]])["head"]["kernel"] - params["head"]["kernel"]
    moved = old["policy"].replace(changes={"head/kernel": {"full": kernel}})
    now = {"policy": moved, "value": {"kernel": jnp.zeros(2), "bias": jnp.float32(0.25)}}
    keys = jax.random.split(jax.random.key(0), 1)
    frozen = {"params": params, "old": old, "beta": jnp.float32(1.0)}
    for reward, gain in ((2.0, 1.2 * 2.0), (-2.0, 1.5 * -2.0)):
        batch = worlds.written([0], np.array([[0]]), reward=jnp.array([reward]))
        out = ppo.loss(lm, ppo.Objective(value=0.5))(now, frozen, batch, keys)
        assert float(out.total) == pytest.approx(-gain + 0.5 * 0.5 * (0.25 - reward) ** 2, rel=1e-6)
        assert float(out.metrics["clipped"][0]) == 1


def test_bad_input():
    with pytest.raises(InputError, match="kind is 'prompt'"):
        ppo.init(LM, jax.random.key(0), kind="prompt")
    with pytest.raises(InputError, match="rounds is 0"):
        ppo.fit("unused", lm=None, data=None, rewards=[], rounds=0)
