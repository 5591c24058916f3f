"""PPO: advantages and the objective by hand, and p · exp(r / β) / Z in a world small enough to enumerate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds
from scipy.optimize import brentq

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


KEYS = jax.random.split(jax.random.key(0), 1)
START = {"policy": ppo.init(LM, jax.random.key(0), kind="full"), "value": value_head(LM.width)}


def learned(objective, rounds, updates=6, new=NEW, reward=REWARD, rate=1e-2):
    """The policy that learned from samples of every round's own policy."""
    every = worlds.sequences(LM, new)
    tx = optimizer(schedule(rate, "linear", steps=rounds * updates), trained=r"policy/changes/.*|value/.*")
    learner = train.init_state(START, tx, jax.random.key(1))
    step = jax.jit(train.make_step(ppo.loss(LM, objective), tx))
    draw, frozen = np.random.default_rng(3), {"params": PARAMS, "beta": jnp.float32(BETA)}
    rows = worlds.written(PROMPT, every)
    keys = jax.random.split(jax.random.key(0), len(every))
    for _ in range(rounds):
        pi = worlds.probabilities(LM, PARAMS, PROMPT, new, learner.params["policy"])
        fields = jax.tree.map(np.asarray, ppo.at_start(LM, (frozen, learner.params), (rows, keys)))
        at = draw.choice(len(pi), 512 * updates, p=pi / pi.sum())
        fields = {name: x[at] for name, x in fields.items()}
        given = ppo.credited(reward[at], np.zeros(len(at)), **fields, objective=objective, beta=BETA)
        for part in np.split(np.arange(len(at)), updates):
            more = {name: x[part] for name, x in given.items()}
            learner, _ = step(learner, frozen, worlds.written(PROMPT, every[at[part]], **more))
    return worlds.probabilities(LM, PARAMS, PROMPT, new, learner.params["policy"])


@pytest.mark.parametrize("advantage", ["values", pytest.param("leave_one_out", marks=pytest.mark.slow)])
def test_it_reaches_the_tilted_base(advantage):
    """The policy that maximises E[r] - β KL(π ‖ p) is p · exp(r / β) / Z (Ziegler et al. 2019, eq. 3)."""
    base = worlds.probabilities(LM, PARAMS, PROMPT, NEW)
    wanted = base * np.exp(REWARD / BETA)
    wanted /= wanted.sum()
    reached = learned(ppo.Objective(advantage=advantage), rounds=60)
    assert worlds.divergence(reached, wanted) < 0.02
    assert worlds.divergence(base, wanted) > 0.5  # where it came from


def test_grpo_reaches_its_own_optimum():
    """After one token: π = β p / (λ - r / σ), with λ such that it sums to 1 and σ the deviation of r under π, which is
    not p · exp(r / β) / Z: the gradient of the estimator of the KL is that of KL(p ‖ π)."""
    base, reward = worlds.probabilities(LM, PARAMS, PROMPT, 1), REWARD[: LM.vocab].astype(float)

    def optimum(sigma):
        lam = brentq(lambda x: np.sum(BETA * base / (x - reward / sigma)) - 1, reward.max() / sigma + 1e-7, 99)
        return BETA * base / (lam - reward / sigma)

    def deviation(p):
        return np.sqrt(p @ reward**2 - (p @ reward) ** 2)

    wanted = optimum(brentq(lambda s: deviation(optimum(s)) - s, 0.05, 3))
    reached = learned(ppo.Objective(advantage="group"), rounds=40, new=1, reward=reward)
    tilted = base * np.exp(reward / deviation(wanted) / BETA)
    assert worlds.divergence(reached, wanted) < 0.003
    assert min(worlds.divergence(base, wanted), worlds.divergence(tilted / tilted.sum(), wanted)) > 0.05


def test_relative_advantages_by_hand():
    """Rewards 1, 2, 6 of one prompt and 4, 4 of another."""
    rewards, prompts = np.array([1.0, 4, 2, 6, 4]), np.array([3, 8, 3, 3, 8])
    np.testing.assert_allclose(ppo.relative(rewards, prompts, False), [1 - 4, 0, 2 - 3.5, 6 - 1.5, 0])
    sigma = np.sqrt((4 + 1 + 9) / 3)
    np.testing.assert_allclose(ppo.relative(rewards, prompts, True), np.array([-2, 0, -1, 3, 0]) / sigma)
    with pytest.raises(InputError, match="a prompt has one sample, which has no other to be compared with"):
        ppo.relative(rewards, np.array([3, 8, 3, 3, 9]), True)


def test_what_a_text_is_credited_with_by_hand():
    """Two texts of one prompt, of two tokens and of one, with rewards 3 and 1, β = 0.5 and a penalty of 0.5 in all for
    the first: RLOO compares 3 - 0.25 with 1; whitening subtracts the mean of the three tokens."""
    mask = np.array([[True, True], [True, False]])
    old, base = np.array([[-1.0, -1.0], [-2.0, 0.0]]), np.array([[-1.5, -1.0], [-2.0, 9.0]])
    given = dict(old=old, base=base, before=np.zeros((2, 2)), mask=mask, beta=0.5)
    reward, prompts = np.array([3.0, 1.0]), np.zeros(2)

    def found(**settings):
        return ppo.credited(reward, prompts, **given, objective=ppo.Objective(**settings))

    one = found(advantage="leave_one_out")["advantage"]
    np.testing.assert_allclose(one, [[1.75, 1.75], [-1.75, 0]])
    np.testing.assert_allclose(found(advantage="group")["advantage"], [[1, 1], [-1, 0]])
    white = found(advantage="leave_one_out", whiten=True)
    third = 1.75 / 3
    spread = np.sqrt((2 * (1.75 - third) ** 2 + (1.75 + third) ** 2) / 3)
    np.testing.assert_allclose(
        white["advantage"], np.array([[1.75 - third] * 2, [-1.75 - third, 0]]) / spread * mask, rtol=1e-6
    )
    np.testing.assert_allclose(white["goal"], one)
    values = found(gamma=1.0, lam=1.0)["advantage"]
    np.testing.assert_allclose(values, [[2.75, 3.0], [1.0, 0]])


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


def one_token(objective, advantage, value=0.25, before=0.0, goal=0.0, base=0.5, beta=1.0, **more):
    """The loss of one token with p = 1/2 when it was drawn and 3/4 now."""
    lm = worlds.Bigram(vocab=2)
    params = worlds.table([[0.5, 0.5], [0.5, 0.5]])
    policy = ppo.init(lm, jax.random.key(0), kind="full")
    kernel = worlds.table([[0.75, 0.25], [0.5, 0.5]])["head"]["kernel"] - params["head"]["kernel"]
    policy = policy.replace(changes={"head/kernel": {"full": kernel}})
    now = {"policy": policy, "value": {"kernel": jnp.zeros(2), "bias": jnp.float32(value)}}
    given = dict(old=np.log(0.5), base=np.log(base), before=before, goal=goal, advantage=advantage)
    fields = {name: jnp.full((1, 1), x, jnp.float32) for name, x in given.items()}
    batch = worlds.written([0], np.array([[0]]), **fields) | more
    return ppo.loss(lm, objective)(now, {"params": params, "beta": jnp.float32(beta)}, batch, KEYS)


def test_the_objective_by_hand():
    """The ratio 1.5 is clipped to 1.2 for a gain and not for a loss; the values' error is that to the goal."""
    for advantage, gain in ((2.0, 1.2 * 2.0), (-2.0, 1.5 * -2.0)):
        out = one_token(ppo.Objective(value=0.5), advantage, goal=advantage)
        assert float(out.total) == pytest.approx(-gain + 0.5 * 0.5 * (0.25 - advantage) ** 2, rel=1e-6)
        assert float(out.metrics["clipped"][0]) == 1
    spread = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    free = one_token(ppo.Objective(value=0.0, entropy=0.3), -2.0)
    assert float(free.total) == pytest.approx(3.0 - 0.3 * spread, rel=1e-6)


def test_options_of_the_objective_by_hand():
    """A value of .25 that began at 0 and may move by .1 counts as .1 where that is worse; GRPO's KL of log 2 - log 3
    nats at p = 1/2; the human text is token 1, with probability 1/4 now."""
    for goal, error in ((1.0, (0.1 - 1.0) ** 2), (-1.0, (0.25 + 1.0) ** 2)):
        out = one_token(ppo.Objective(value=1.0, value_clip=0.1), 0.0, goal=goal)
        assert float(out.total) == pytest.approx(0.5 * error, rel=1e-6)
    group = one_token(ppo.Objective(advantage="group"), -2.0, beta=0.7)
    apart = np.log(0.5 / 0.75)
    assert float(group.total) == pytest.approx(3.0 + 0.7 * (np.exp(apart) - apart - 1), rel=1e-6)
    human = dict(human=jnp.array([[1, 0]]), human_written=jnp.array([[True, False]]))
    mixed = one_token(ppo.Objective(value=0.0, pretraining=0.4), -2.0, **human)
    assert float(mixed.total) == pytest.approx(3.0 - 0.4 * np.log(0.25), rel=1e-6)


def test_a_text_counts_by_its_tokens_or_as_one():
    """Rows of two tokens and of one, with advantages 1 and 3, under the policy that drew them: PPO has the mean over
    tokens, RLOO the mean over texts of sums, GRPO that of means."""
    batch = worlds.written(PROMPT, EVERY[:2], **{name: jnp.zeros((2, 2)) for name in ppo.FIELDS})
    batch["written"] = jnp.array([[True, True], [True, False]])
    keys = jax.random.split(jax.random.key(0), 2)
    frozen = {"params": PARAMS, "beta": jnp.float32(0.0)}
    start = ppo.at_start(LM, (frozen, START), (batch, keys))
    batch |= {"old": start["old"], "base": start["base"], "advantage": jnp.array([[1.0, 1.0], [3.0, 0.0]])}
    for advantage, mean in (("values", 5 / 3), ("leave_one_out", 5 / 2), ("group", 4 / 2)):
        out = ppo.loss(LM, ppo.Objective(advantage=advantage, value=0.0))(START, frozen, batch, keys)
        assert float(out.total / out.weight) == pytest.approx(-mean, rel=1e-5)


def test_bad_input():
    with pytest.raises(InputError, match="kind is 'prompt'"):
        ppo.init(LM, jax.random.key(0), kind="prompt")
    with pytest.raises(InputError, match="advantage is 'gae', expected one of values, group, leave_one_out"):
        ppo.Objective(advantage="gae")
    with pytest.raises(InputError, match="rounds is 0"):
        ppo.fit("unused", lm=None, data=None, rewards=[], rounds=0)
