"""GDC: multipliers and weights by hand and against the exact solution; the targets reached in an enumerable world."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds
from scipy.optimize import brentq

from ctg_jax.decode import loop
from ctg_jax.learn import train
from ctg_jax.learn.optimizer import optimizer, schedule
from ctg_jax.learn.pool import Pool
from ctg_jax.learn.rounds import history
from ctg_jax.methods import gdc
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import judges, sources
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


def test_multipliers_where_every_prompt_has_its_own_normaliser():
    """Two prompts after which the feature has shares .9 and .1, and .8 is asked for: λ is 2.636, since the first
    prompt can hardly have it more often. One normaliser for both gives log 4 = 1.386, with which the mean share of the
    two is .69."""
    phi, groups = np.array([[1], [0], [1], [0]]), np.array([4, 4, 9, 9])
    weights = np.array([0.9, 0.1, 0.1, 0.9])
    (lam,) = gdc.multipliers(phi, [0.8], weights, groups)
    assert lam == pytest.approx(2.636, abs=1e-3)
    shares = [w * np.exp(lam) / (w * np.exp(lam) + 1 - w) for w in (0.9, 0.1)]
    assert np.mean(shares) == pytest.approx(0.8, abs=1e-5)
    assert gdc.multipliers(phi, [0.8], weights)[0] == pytest.approx(np.log(4), abs=1e-3)
    assert gdc.multipliers(phi, [0.8], weights * [1, 1, 7, 7], groups)[0] == pytest.approx(lam, abs=1e-3)
    with pytest.raises(InputError, match=r"moment 0 is 0\.8 and the feature is between 0 and 0\.5 in 4"):
        gdc.multipliers(np.array([[1], [0], [0], [0]]), [0.8], weights, groups)


def test_samples_held_out_are_whole_prompts():
    prompts = np.repeat(np.arange(8), 3)
    found = gdc.held_out(prompts, 0.25, seed=1)
    assert found.sum() == 6 and len(set(prompts[found])) == 2 and not set(prompts[found]) & set(prompts[~found])
    assert (gdc.held_out(prompts, 0.25, seed=2) != found).any() and (gdc.held_out(prompts, 0.25, seed=1) == found).all()
    assert gdc.held_out(np.zeros(9), 0.25, seed=1).sum() == 2  # one prompt: every fourth sample
    assert gdc.held_out(np.zeros(2), 0.25, seed=1).tolist() == [False, True]
    with pytest.raises(InputError, match="held is 0, expected a share between 0 and 1"):
        gdc.held_out(prompts, 0, seed=1)
    with pytest.raises(InputError, match="the pool has 1 sample, expected at least 2"):
        gdc.held_out(np.zeros(1), 0.25, seed=1)


@pytest.mark.parametrize(
    ("moment", "baseline"), [pytest.param(1.0, None, marks=pytest.mark.slow), (0.8, None), (0.8, 10.0)]
)
def test_it_reaches_the_target(moment, baseline):
    """KL-adaptive distributional policy gradient: proposals improve as the policy does."""
    lam, wanted = exact(moment)
    assert worlds.divergence(wanted, BASE) > 0.2  # where it starts
    rounds, updates, n = 30, 10, 1024
    tx = optimizer(schedule(1e-2, "linear", steps=rounds * updates), trained="changes/.*")
    learner = train.init_state(gdc.init(LM, jax.random.key(0), kind="full"), tx, jax.random.key(1))
    step = jax.jit(train.make_step(gdc.loss(LM, baseline), tx))
    proposal, draw, moved = BASE, np.random.default_rng(3), 0
    log_p = np.log(BASE) + (np.where(FEATURE, 0, -np.inf) if moment == 1 else lam * FEATURE)
    for _ in range(rounds):
        for _ in range(updates):
            at = draw.choice(len(BASE), n, p=proposal / proposal.sum())
            weight = gdc.importance(log_p[at], np.log(proposal[at]))
            fields = dict(weight=jnp.float32(weight), logp=jnp.float32(np.log(proposal[at])))
            learner, _ = step(learner, {"params": PARAMS}, worlds.written(PROMPT, EVERY[at], **fields))
        policy = worlds.probabilities(LM, PARAMS, PROMPT, NEW, learner.params)
        share = weight / weight.sum()
        if share @ (np.log(proposal[at]) - np.log(policy[at])) < 0:
            proposal, moved = policy, moved + 1
    assert worlds.divergence(wanted, policy) < 0.02
    assert moved > 2


def slope(baseline, control, rows, weight, log_q):
    """The gradient of the loss on some texts, one vector."""
    batch = worlds.written(PROMPT, EVERY[rows], weight=jnp.float32(weight), logp=jnp.float32(log_q))
    keys = jax.random.split(jax.random.key(0), len(rows))
    given = ({"params": PARAMS}, batch, keys)
    grads = jax.grad(lambda c: gdc.loss(LM, baseline)(c, *given).total, allow_int=True)(control)
    leaves = [x for x in jax.tree.leaves(grads) if jnp.issubdtype(x.dtype, jnp.floating)]
    return np.concatenate([np.ravel(x) for x in leaves])


def test_the_baseline_changes_the_gradient_of_single_texts_and_not_its_mean():
    """Over all texts, drawn uniformly, the gradients are the same, for a policy that is not the base. Where the policy
    has each text as often as the target, the gradient with a baseline is 0 for any few texts."""
    control, every = gdc.init(LM, jax.random.key(0), kind="full"), np.arange(len(EVERY))
    moved = jax.tree.map(lambda x: x + 0.1 if jnp.issubdtype(x.dtype, jnp.floating) else x, control)
    _, wanted = exact(0.8)
    uniform = np.full(len(EVERY), -np.log(len(EVERY)))
    with_, without = (slope(b, moved, every, wanted / np.exp(uniform), uniform) for b in (1e6, None))
    np.testing.assert_allclose(with_, without, atol=1e-3 * np.abs(without).max())
    few = np.array([0, 7, 7, 19])
    with_, without = (slope(b, control, few, np.ones(4), np.log(BASE[few])) for b in (10.0, None))
    assert np.abs(with_).max() < 1e-4 * np.abs(without).max()
    at_limit, twice = (slope(b, control, few, np.ones(4), np.log(BASE[few] / 4)) for b in (2.0, 4.0))
    np.testing.assert_allclose(at_limit, twice / 3, rtol=1e-4, atol=1e-5)  # (2 - 1) and (4 - 1) times the same slope


def test_weights_by_hand():
    log_p, log_q = np.log([0.2, 0.4, 0.4, 0.1]), np.log([0.4, 0.4, 0.2, 0.1])
    np.testing.assert_allclose(gdc.importance(log_p, log_q), np.array([0.5, 1, 2, 1]) / 1.125)
    groups = np.array([7, 7, 9, 9])
    np.testing.assert_allclose(gdc.importance(log_p, log_q, groups), [2 / 3, 4 / 3, 4 / 3, 2 / 3])
    none = gdc.importance(np.array([-np.inf, 0.0]), np.zeros(2), np.array([0, 1]))
    assert none.tolist() == [0, 1]
    far = gdc.importance(np.array([1000.0, 0.0]), np.array([0.0, 500.0]))  # exp(1000) is no float
    np.testing.assert_allclose(far, [2.0, 0.0])


def test_one_empty_prompt_is_the_unconditional_case(small):
    """The model reads its beginning token, in sampling, in scoring and in learning."""
    root, lm, data = small
    settings = dict(source=f"jsonl:{data.path / 'data.jsonl'}", split="all", words=0, limit=1)
    empty = stage(root, sources.load_data, settings)
    judge = dict(kind="function", name="dice", function="configs.reward:dice", version="1")
    rewards = [stage(root, judges.fit_judge, judge)]
    short = dict(adapter=dict(rank=2), training=dict(steps=2, batch=4), explore=dict(n=12, max_new=4, batch=12))
    artifact = gdc.fit(root, lm=lm, data=empty, rewards=rewards, moments={"dice": 0.5}, rounds=1, **short)
    pool = Pool.open(history(artifact))
    assert set(pool.column("prompt")) == {""} and len(set(map(tuple, pool.column("tokens")))) > 4
    model, params, tokenizer = open_lm(lm)
    start, tail = [[tokenizer.start]], list(pool.column("tokens")[0])
    prompts = worlds.prompts(start)
    found = float(loop.score(model, params, prompts, jnp.asarray([tail])).sum())
    assert pool.column("base")[0] == pytest.approx(found, abs=1e-4)


def test_bad_input():
    with pytest.raises(InputError, match="baseline is 0, expected a number above 0"):
        gdc.loss(LM, 0)
    with pytest.raises(InputError, match=r"moment 0 is 0\.5 and the feature is between 1 and 1 in 3 samples"):
        gdc.multipliers(np.ones((3, 1)), [0.5])
    with pytest.raises(InputError, match="contradict each other"):
        gdc.multipliers(np.array([[0, 1], [1, 0], [0, 1]]), [0.7, 0.7])
