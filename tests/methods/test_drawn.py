"""Samples drawn under a filter: what a method learns from them agrees with the distribution that drew them, or they are
refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax.control import Chain
from ctg_jax.controls import truncate
from ctg_jax.decode import loop
from ctg_jax.learn import experience, fitting
from ctg_jax.learn.pool import Pool, drawing_filter
from ctg_jax.learn.rounds import history
from ctg_jax.methods import gdc, ppo, quark, unlikelihood
from ctg_jax.models.heads import value_head
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import judges, sources
from ctg_jax.types import InputError

LM = worlds.tiny(vocab=5, depth=1)
PARAMS = worlds.lively(LM, factor=4)
PROMPT, NEW = [1, 2], 2
EVERY = worlds.sequences(LM, NEW)
BASE = worlds.probabilities(LM, PARAMS, PROMPT, NEW)
FILTERS = {"temperature": dict(temperature=0.5), "top-p": dict(top_p=0.6), "none": {}}
SOFT = dict(temperature=0.5)


def frozen(options, **more):
    """What a loss is given; the filter is left out where it is None."""
    filter = {} if options is None else {"filter": truncate.rules(LM, **options)}
    return {"params": PARAMS, **filter, **more}


def expected_gradient(objective, params, given, q, **fields):
    """The norm of Σ_x q(x) ∇ loss(x), over the leaves of the policy."""

    def total(params):
        rows = worlds.written(PROMPT, EVERY, **{name: jnp.asarray(x) for name, x in fields.items()})
        keys = jax.random.split(jax.random.key(0), len(EVERY))
        one = lambda row, key: objective(params, given, jax.tree.map(lambda x: x[None], row), key[None]).total  # noqa: E731
        return jnp.sum(jnp.asarray(q, jnp.float32) * jax.vmap(one)(rows, keys))

    slope = jax.grad(total)(params)
    slope = slope["policy"] if isinstance(slope, dict) else slope
    return float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(slope.changes))))


@pytest.mark.parametrize("name", FILTERS)
def test_a_constant_reward_moves_ppo_nowhere(name):
    policy = ppo.init(LM, jax.random.key(0), kind="full")
    state = {"policy": policy, "value": value_head(LM.width)}
    q = worlds.probabilities(LM, PARAMS, PROMPT, NEW, truncate.rules(LM, **FILTERS[name]))
    ones = np.ones(len(EVERY), np.float32)

    rows, keys = worlds.written(PROMPT, EVERY), jax.random.split(jax.random.key(0), len(EVERY))

    def norm(options, beta):
        given = frozen(options, beta=jnp.float32(beta))
        start = jax.tree.map(np.asarray, ppo.at_start(LM, (given, state), (rows, keys)))
        fields = ppo.credited(ones, np.zeros(len(EVERY)), **start, beta=beta)
        fields = {name: np.where(np.isfinite(x), x, 0) for name, x in fields.items()}  # texts that are never drawn
        return expected_gradient(ppo.loss(LM), state, given, q, **fields)

    assert norm(FILTERS[name], 0.0) < 1e-5
    if name != "top-p":  # the KL to the base is 0 as well, where no token is removed
        assert norm(FILTERS[name], 0.5) < 1e-5
    if name != "none":
        assert norm(None, 0.0) > 0.1  # what the policy without its filter would learn from nothing


@pytest.mark.parametrize("name", FILTERS)
def test_a_constant_advantage_moves_the_policy_gradient_nowhere(name):
    """What unlikelihood weighs by advantages: the likelihood of the own continuation per token."""
    control = unlikelihood.init(LM, jax.random.key(0), kind="full")
    objective = unlikelihood.loss(LM, unlikelihood.Objective(likelihood=0.0, token=0.0, policy=1.0))
    q = worlds.probabilities(LM, PARAMS, PROMPT, NEW, truncate.rules(LM, **FILTERS[name]))
    ones = np.ones(len(EVERY), np.float32)

    def norm(options, p):
        drawn = jnp.where(p > 0, jnp.log(jnp.maximum(p, 1e-37)), -30.0)
        return expected_gradient(objective, control, frozen(options), q, advantage=ones, drawn=drawn)

    assert norm(FILTERS[name], q) < 1e-5
    if name != "none":
        assert norm(None, BASE) > 0.05


def test_gdc_without_a_wish_stays_where_it_is():
    """The target is the base: weights p / q make samples of a temperature samples of the base."""
    control = gdc.init(LM, jax.random.key(0), kind="full")
    q = worlds.probabilities(LM, PARAMS, PROMPT, NEW, truncate.rules(LM, **SOFT))

    def norm(weight):
        return expected_gradient(gdc.loss(LM), control, {"params": PARAMS}, q, weight=jnp.float32(weight))

    assert norm(BASE / q) < 1e-5
    assert norm(np.ones(len(q))) > 0.1


@pytest.fixture(scope="module")
def dice(small):
    options = {"kind": "function", "name": "dice", "function": "configs.reward:dice", "version": "1"}
    return stage(small[0], judges.fit_judge, options)


EXPLORE = dict(n=4, max_new=4, batch=16)
SHORT = dict(adapter=dict(rank=2), training=dict(steps=1, batch=4))
LOUD = dict(adapter=dict(rank=2), training=dict(steps=3, batch=8, rate=0.05))


def test_multipliers_of_gdc_are_those_of_the_base_whatever_drew_its_samples(small, dice):
    root, lm, data = small
    explore = dict(**EXPLORE, filter=SOFT)
    common = dict(lm=lm, data=data, rewards=[dice], explore=explore)
    control = gdc.fit(root, **common, rounds=1, moments={"dice": 0.6}, per_prompt=False, **SHORT)
    pool = Pool.open(history(control))
    phi = pool.column("reward_dice") >= 0.5
    weights = np.exp(pool.column("base") - pool.column("logp"))
    share = weights @ phi / weights.sum()
    assert abs(share - phi.mean()) > 0.01  # without the weights λ would be that of another model
    wanted = np.log(0.6 / 0.4) - np.log(share / (1 - share))  # of one feature of 0 or 1: the difference of log-odds
    assert control.spec["lam"]["dice"] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    "method, hp", [(ppo, {}), (unlikelihood, {"objective": {"policy": 1.0, "token": 0.0}})], ids=["ppo", "policy"]
)
def test_the_probability_before_learning_is_that_of_what_drew(small, dice, method, hp, monkeypatch):
    """The second round: under the first policy and the temperature, `old` or `drawn` is the `logp` of the sampler."""
    root, lm, data = small
    seen = {}
    train = fitting.train

    def spied(run, control, objective, given, batches, *more, **options):
        seen.update(control=control, filter=given["filter"], batch=next(batches))
        return train(run, control, objective, given, batches, *more, **options)

    monkeypatch.setattr(fitting, "train", spied)
    common = dict(lm=lm, data=data, rewards=[dice], explore=dict(**EXPLORE, filter=SOFT))
    # The texts of the fixture have no prompts, which the human term of unlikelihood needs.
    if method is unlikelihood:
        words = dict(source=f"jsonl:{data.path / 'data.jsonl'}", split="all", words=1)
        common["data"] = stage(root, sources.load_data, words)
    control = method.fit(root, **common, rounds=2, **LOUD, **hp)
    pool = Pool.open(history(control)[-1:])
    assert np.abs(pool.column("logp") - pool.column("base")).max() > 0.1
    batch, policy = seen["batch"], seen["control"]
    wanted = pool.column("logp")[batch["ids"]]
    if method is ppo:
        np.testing.assert_allclose(batch["old"].sum(axis=1), wanted, atol=1e-3)
        assert np.abs(batch["old"] - batch["base"]).max() > 0.01
    policy = policy["policy"] if isinstance(policy, dict) else policy
    if method is unlikelihood:
        np.testing.assert_allclose(batch["drawn"], wanted, atol=1e-3)
    model, params, _ = open_lm(lm)
    keys = jax.random.split(jax.random.key(0), len(wanted))
    prompts = loop.Prompts(batch["tokens"], batch["mask"], keys)
    found = loop.score(model, params, prompts, jnp.asarray(batch["completion"]), Chain((policy, seen["filter"])))
    np.testing.assert_allclose(np.sum(np.where(batch["written"], found, 0), axis=1), wanted, atol=1e-3)


@pytest.mark.parametrize(
    "method, hp, explore, message",
    [
        (ppo, {}, dict(greedy=True), "ppo needs samples with a probability, but explore has greedy=True"),
        (ppo, {}, dict(filter=dict(top_p=0.6)), "ppo .* a filter with top_p: only temperature, .* may be there"),
        (ppo, {}, dict(filter=dict(min_p=0.1, top_k=3)), "ppo .* a filter with min_p, top_k"),
        (ppo, dict(target_kl=0.1), dict(filter=SOFT), "target_kl .* a filter with temperature: no filter may"),
        (quark, dict(target_kl=0.1), dict(filter=dict(top_p=0.9)), "target_kl .* a filter with top_p"),
        (gdc, {"moments": {}}, dict(filter=dict(banned=[3])), "gdc .* with banned: only temperature, rep"),
        (gdc, {"moments": {}}, dict(greedy=True), "gdc needs samples with a probability"),
        (unlikelihood, {"objective": {"policy": 1.0}}, dict(greedy=True), "policy needs samples with a probability"),
    ],
)  # fmt: skip
def test_what_cannot_be_weighed_is_refused_before_anything_runs(tmp_path, method, hp, explore, message):
    with pytest.raises(InputError, match=message):
        method.fit(tmp_path, lm=None, data=None, rewards=[], explore=explore, **hp)
    assert not list(tmp_path.iterdir())


def test_pools_are_refused_by_the_stages_that_learn_from_them(small, dice):
    root, lm, data = small
    explored = dict(lm=lm, data=data, rewards=[dice], **EXPLORE)
    nucleus = experience.explore(root, **explored, filter=dict(top_p=0.6))
    assert nucleus.spec["drawn"] == {"greedy": False, "filter": {"top_p": 0.6}}
    with pytest.raises(InputError, match="ppo needs the probability of every text"):
        stage(root, ppo.ppo, {}, lm=lm, pool=nucleus)
    given = dict(pool=nucleus, base=nucleus, rewards=[dice])
    with pytest.raises(InputError, match="gdc needs the probability of every text"):
        stage(root, gdc.gdc, {"moments": {"dice": 1}}, lm=lm, **given)
    soft = experience.explore(root, **explored, filter=SOFT)
    with pytest.raises(InputError, match="the pools were drawn under the filters"):
        drawing_filter([nucleus, soft], open_lm(lm)[0])


def test_the_best_of_n_have_no_probability(small, dice):
    root, lm, data = small
    scored = experience.explore(root, lm=lm, data=data, rewards=[dice], **EXPLORE)
    best = stage(root, experience.best, {"n": 2}, scored=scored)
    assert all("logp" not in row for row in best.rows("samples.jsonl"))
    with pytest.raises(InputError, match=r"best_of-.* has no log-probabilities"):
        stage(root, experience.score, {}, samples=best, rewards=[dice], lm=lm)
