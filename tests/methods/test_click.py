"""Click: the gradient by hand, the pairs by hand, what the hinge does to likelihoods, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.learn import experience, preferences
from ctg_jax.learn.pool import Pool, batches
from ctg_jax.methods import click
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import judges
from ctg_jax.types import InputError

BIGRAM = worlds.Bigram(vocab=3)
TABLE = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])  # [after, token]


def batch(positive, negative, positive_written=None, negative_written=None):
    """Two pairs after the prompt 0."""
    out = worlds.written([0], np.array(positive), negative=jnp.array(negative))
    out["written"] = jnp.array(positive_written) if positive_written else out["written"]
    ones = jnp.ones_like(out["written"])
    return out | {"negative_written": jnp.array(negative_written) if negative_written else ones}


def by_hand(tokens, real):
    """(NLL, its gradient [V, V]) of one completion after 0, where column u of the kernel holds the logits after u."""
    nats, gradient, before = 0.0, np.zeros((3, 3)), 0
    for token, counted in zip(tokens, real):
        if counted:
            nats -= np.log(TABLE[before, token])
            gradient[:, before] += TABLE[before] - np.eye(3)[token]
        before = token
    return nats, gradient


@pytest.mark.parametrize("margin", [0.7, 3.0])
def test_the_gradient_by_hand(margin):
    """The gaps are 1.28 and -0.22 nats: with margin 0.7 the second hinge alone is active, with 3 both are."""
    gamma = 0.4
    positive, negative = [[1, 1], [2, 0]], [[2, 1], [0, 0]]
    real, unreal = [[True, True], [True, False]], [[True, True], [True, True]]
    control = click.init(BIGRAM, jax.random.key(0), kind="full")
    keys = jax.random.split(jax.random.key(0), 2)
    rows = batch(positive, negative, real, unreal)

    def mean(control):
        out = click.loss(BIGRAM, margin=margin, gamma=gamma)(control, {"params": worlds.table(TABLE)}, rows, keys)
        return out.total / out.weight

    value, gradient = jax.value_and_grad(mean)(control)
    wanted, slope, active = 0.0, np.zeros((3, 3)), []
    for p, n, p_real, n_real in zip(positive, negative, real, unreal):
        (up, d_up), (down, d_down) = by_hand(p, p_real), by_hand(n, n_real)
        hinge = margin + up - down
        active.append(hinge > 0)
        wanted += (up / sum(p_real) + gamma * max(0.0, hinge)) / 2
        slope += (d_up / sum(p_real) + gamma * (d_up - d_down) * (hinge > 0)) / 2
    assert active == ([False, True] if margin < 1 else [True, True])
    assert float(value) == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(gradient.changes["head/kernel"]["full"], slope, rtol=1e-5, atol=1e-6)


def test_negatives_become_less_likely_by_the_margin():
    lm = worlds.tiny(vocab=5, depth=1)
    params = worlds.lively(lm, factor=4)
    every = worlds.sequences(lm, 2)
    start = np.log(worlds.probabilities(lm, params, [1, 2], 2))
    negative, positive = np.argsort(start)[::-1][:4], np.argsort(start)[:4]  # the likeliest are the bad ones
    rows = worlds.written([1, 2], every[positive], negative=jnp.asarray(every[negative]))
    rows |= {"negative_written": jnp.ones_like(rows["written"])}
    control = click.init(lm, jax.random.key(0), kind="full")
    objective = click.loss(lm, margin=2.0, gamma=1.0)
    control, metrics = worlds.trained(objective, control, {"params": params}, [rows] * 200, trained="changes/.*")
    found = np.log(worlds.probabilities(lm, params, [1, 2], 2, control))
    assert np.all(start[positive] < start[negative])
    assert np.all(found[positive] - found[negative] > 1.9) and float(metrics["active"]) < 0.5


def test_pairs_by_hand():
    """Prompt 0 has positives at -1, -5 and -9 and negatives at -3 and -10; prompt 1 has no negative, prompt 2 no
    positive. Below -3 comes -5; below -10 nothing, and -9 is nearest. Above -3 comes -1, above -10 comes -9."""
    rewards = [1, 0, 1, 1, 0, 1, 0]
    likelihood = [-1.0, -3.0, -5.0, -9.0, -10.0, -2.0, -2.0]
    prompts = [0, 0, 0, 0, 0, 1, 2]
    good, bad = preferences.next_below(rewards, likelihood, prompts, threshold=0.5)
    assert (good.tolist(), bad.tolist()) == ([2, 3], [1, 4])
    good, bad = preferences.next_below(rewards, likelihood, prompts, threshold=0.5, pair="above")
    assert (good.tolist(), bad.tolist()) == ([0, 3], [1, 4])


@pytest.fixture(scope="module")
def judge(small):
    """A reward that differs from text to text, whatever an untrained LM writes."""
    options = {"kind": "function", "name": "dice", "function": "configs.reward:dice", "version": "1"}
    return stage(small[0], judges.fit_judge, options)


def test_fit_explores_pairs_and_learns(small, judge):
    root, lm, data = small
    explore = dict(n=4, max_new=5, batch=16)
    artifact = click.fit(
        root,
        lm=lm,
        data=data,
        rewards=[judge],
        rounds=2,
        explore=explore,
        threshold="median",
        training=dict(steps=2, batch=4),
        adapter=dict(rank=2),
    )
    spec = artifact.spec
    assert spec["pairs"]["pairs"] > 0 and len(spec["inputs"]["pool"]) == 2
    model, _, tokenizer = open_lm(lm)
    assert any(float(jnp.max(jnp.abs(c["b"]))) > 0 for c in methods.load(artifact, model).changes.values())
    root_pool = [experience.explore(root, lm=lm, data=data, rewards=[judge], **explore)]  # the first round, reused
    samples = Pool.open(root_pool)
    rows = samples.take(np.array([0, 1])).with_(negative=samples.column("tokens")[[2, 3]])
    one = next(batches(rows, tokenizer, batch=2, seed=0, also="negative"))
    for i, r in enumerate(one["ids"]):
        assert one["completion"][i][one["written"][i]].tolist() == samples[int(r)]["tokens"]
        assert one["negative"][i][one["negative_written"][i]].tolist() == samples[int(r) + 2]["tokens"]


def test_bad_input(small, judge):
    root, lm, data = small
    with pytest.raises(InputError, match=r"no prompt has samples on both sides of the threshold 0\.5, and 3 of 3"):
        preferences.next_below([1, 1, 1], [-1, -2, -3], [0, 0, 0], threshold=0.5)
    with pytest.raises(InputError, match="and 1 of 2 samples are at or above it"):
        preferences.next_below([1, 0], [-1, -2], [0, 1], threshold=0.5)
    with pytest.raises(InputError, match="reward 1 is nan"):
        preferences.next_below([1, np.nan], [-1, -2], [0, 0], threshold=0.5)
    with pytest.raises(InputError, match="pair is 'next', expected one of below, above"):
        preferences.next_below([1, 0], [-1, -2], [0, 0], threshold=0.5, pair="next")
    with pytest.raises(InputError, match="kind is 'prompt'"):
        click.init(BIGRAM, jax.random.key(0), kind="prompt")
    with pytest.raises(InputError, match="no reward was given"):
        click.fit(root, lm=lm, data=data, rewards=[])
    with pytest.raises(InputError, match="threshold is 'mean', expected a number"):
        click.fit(root, lm=lm, data=data, rewards=[judge], threshold="mean", explore=dict(n=4, max_new=5, batch=16))
