"""Selective generation: three tokens by hand, the gradients of its objectives, the optimum in a small world, a fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods, tree
from ctg_jax.control import Chain
from ctg_jax.controls import constraints
from ctg_jax.decode import loop
from ctg_jax.learn import train
from ctg_jax.learn.optimizer import optimizer, schedule
from ctg_jax.methods import selective
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.heads import value_head
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import judges
from ctg_jax.types import InputError

Objective = selective.Objective
WORLD = worlds.Bigram()
P, A = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.3, 0.1])
BASE = worlds.table([P] * 3)
LM = worlds.tiny(depth=1)
PARAMS = worlds.lively(LM)
QUARTER = float(np.log(1 / 3))  # the log-odds of ¼


def mixture(odds=QUARTER, adapted=A, **settings):
    """A policy in the world of three tokens whose g and p_A are the same after every token."""
    control = selective.init(WORLD, jax.random.key(0), width=4, **settings)
    head = {"head": worlds.table([adapted] * 3)["head"]}
    return control.replace(head=head, select={**control.select, "bias": jnp.float32(odds)})


def next_token(control, rows=1, cond=None):
    prompts = worlds.prompts([[0]] * rows, cond=cond)
    z = loop.forward(WORLD, BASE, prompts, jnp.zeros((rows, 1), jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[:, 0]))


def test_three_tokens_by_hand():
    np.testing.assert_allclose(next_token(mixture()), [(0.525, 0.3, 0.175)], atol=1e-6)
    np.testing.assert_allclose(next_token(mixture(0.0, scale=0.5)), [(0.525, 0.3, 0.175)], atol=1e-6)
    rows = next_token(mixture(0.0, cond="much"), rows=3, cond={"much": jnp.array([0.0, 0.5, 1.0])})
    np.testing.assert_allclose(rows, [P, (0.525, 0.3, 0.175), (P + A) / 2], atol=1e-6)
    # What a filter in front leaves of both distributions is normalised before they are mixed.
    banned = next_token(Chain((constraints.Ban(jnp.array([False, False, True])), mixture())))
    np.testing.assert_allclose(banned, [(0.75 * 5 / 8 + 0.25 * 2 / 3, 0.75 * 3 / 8 + 0.25 / 3, 0)], atol=1e-6)
    # h + W c: with c = (1, …) and W = 1 every entry of the state is 5, so p_A = softmax of the head's rows times it.
    moved = mixture(40.0)
    offset = {"weight": jnp.zeros((4, 4)), "offset": jnp.full(4, 20.0)}
    moved = moved.replace(layers={**moved.layers, "1": offset}, move=jnp.ones((3, 4)))
    power = A**13  # the state is (1, 0, 0) + 4, and all rows of the head are log A
    np.testing.assert_allclose(next_token(moved), [power / power.sum()], atol=2e-6)


def derivatives(kind, reward=2.0, v=0.5, token=2, copies=1, odds=QUARTER, adapted=A, clip=None, old=None):
    """The gradient of the loss of one token of a text with a reward: (of the selector's bias, of p_A's logits)."""
    state = {"policy": mixture(odds, adapted), "value": {**value_head(4), "bias": jnp.float32(v)}}
    batch = worlds.written([0], np.full((copies, 1), token), reward=jnp.full(copies, reward))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(3), jnp.arange(copies))
    objective = selective.loss(WORLD, Objective(kind, clip, value=0.0))
    frozen = {"params": BASE, "old": old or state}

    @jax.jit
    def slopes(state):
        return jax.grad(lambda s: objective(s, frozen, batch, keys).total / copies)(state)

    found = slopes(state)["policy"]
    return float(found.select["bias"]), np.asarray(found.head["head"]["kernel"][:, 0])


def test_the_gradient_of_the_marginal_objective():
    """(reward - baseline) ∇ log q of one token, by hand: ∂ log q / ∂ odds = g (1 - g) (a - p) / q, and for the logits
    of p_A the posterior of the adapter times the gradient of a softmax."""
    q, posterior = 0.75 * 0.2 + 0.25 * 0.1, 0.25 * 0.1 / (0.75 * 0.2 + 0.25 * 0.1)
    by_odds, by_logits = derivatives("marginal")
    assert by_odds == pytest.approx(-1.5 * 0.75 * 0.25 * (0.1 - 0.2) / q, rel=1e-5)
    np.testing.assert_allclose(by_logits, -1.5 * posterior * (np.eye(3)[2] - A), rtol=1e-5)


def test_the_joint_objective_has_that_gradient_on_average_and_the_base_teaches_the_selector_alone():
    wanted, found = derivatives("marginal"), derivatives("joint", copies=4000)
    assert found[0] == pytest.approx(wanted[0], abs=0.02)
    np.testing.assert_allclose(found[1], wanted[1], atol=0.02)
    base = derivatives("joint", adapted=(0.7, 0.3 - 1e-12, 1e-12))  # only the base gives token 2
    np.testing.assert_allclose(base[1], 0, atol=1e-6)
    assert base[0] == pytest.approx(1.5 * 0.25, rel=1e-5)  # the gradient of log (1 - g) is -g


def test_a_clipped_ratio_by_hand():
    """The chance of token 2 is q = .175 now and .15 before, under g = ½: a ratio of 7/6, above 1.1."""
    state = {"policy": mixture(0.0), "value": value_head(4)}
    now = {"policy": mixture(), "value": {**value_head(4), "bias": jnp.float32(0.5)}}
    batch = worlds.written([0], np.array([[2]]), reward=jnp.array([2.0]))
    keys = jax.random.split(jax.random.key(0), 1)
    for clip, ratio in ((0.1, 1.1), (0.5, 7 / 6)):
        objective = selective.loss(WORLD, Objective(clip=clip, value=0.5))
        out = objective(now, {"params": BASE, "old": state}, batch, keys)
        assert float(out.total) == pytest.approx(-1.5 * ratio + 0.5 * 0.5 * 1.5**2, rel=1e-5)


@pytest.mark.parametrize("objective", [Objective(), pytest.param(Objective("joint", 0.2), marks=pytest.mark.slow)])
def test_the_policy_gradient_finds_the_rewarded_text(objective):
    """Texts of two tokens; a reward for the second one being another than the first."""
    texts = worlds.sequences(WORLD, 2)
    reward = (texts[:, 0] != texts[:, 1]).astype(np.float32)
    control = selective.init(WORLD, jax.random.key(0), width=8)
    state = {"policy": control.replace(head={"head": BASE["head"]}), "value": value_head(8)}
    draw, rounds, updates = np.random.default_rng(0), 18, 4
    tx = optimizer(schedule(0.03, "linear", steps=rounds * updates), trained=selective.LEARNED)
    learner, step = (
        train.init_state(state, tx, jax.random.key(1)),
        train.make_step(selective.loss(WORLD, objective), tx),
    )
    step = jax.jit(step)
    for _ in range(rounds):
        share = worlds.probabilities(WORLD, BASE, [0], 2, learner.params["policy"])
        frozen = {"params": BASE, "old": learner.params}
        for _ in range(updates):
            at = draw.choice(9, 512, p=share / share.sum())
            rows = worlds.written([0], texts[at], reward=jnp.asarray(reward[at]))
            learner, metrics = step(learner, frozen, rows)
    share = worlds.probabilities(WORLD, BASE, [0], 2, learner.params["policy"])
    assert share @ reward > 0.97 > 0.7 > worlds.probabilities(WORLD, BASE, [0], 2) @ reward
    assert float(metrics["adapter"]) > 0.7


def test_it_equals_reading_every_text_again():
    """Without caches, with the recurrent context, for rows of different lengths."""
    given, completions = [[1, 2, 3], [4]], [[5, 6, 7], [1, 2, 10]]
    control = selective.example(LM, jax.random.key(7))
    found = loop.forward(LM, PARAMS, worlds.prompts(given), jnp.asarray(completions), control)
    small, weights = control.stream.lm, control.stream.params

    @jax.jit
    def by_hand(text):
        out = LM.apply(PARAMS, LM.embed(PARAMS, text), jnp.ones(text.shape, bool), last=3)
        x = small.embed(weights, text) + out.hidden @ control.project.T
        c = small.apply(weights, x, jnp.ones(text.shape, bool)).hidden[:, -3:]
        own = (out.hidden[:, -3:] + c @ control.move.T) @ control.head["embed"]["tokens"].T
        g = jax.nn.sigmoid(c @ control.select["kernel"])[..., None]
        return jnp.log((1 - g) * jax.nn.softmax(out.logits) + g * jax.nn.softmax(own))

    for i, row in enumerate(given):
        wanted = by_hand(jnp.asarray([[*row, *completions[i][:2]]]))[0]
        np.testing.assert_allclose(jax.nn.log_softmax(found[i]), wanted, rtol=1e-5, atol=5e-5)


@pytest.fixture(scope="module")
def given(small):
    root, lm, data = small
    options = {"kind": "function", "name": "dice", "function": "configs.reward:dice", "version": "1"}
    given = dict(lm=lm, data=data, rewards=[stage(root, judges.fit_judge, options)], width=8)
    return given | dict(explore=dict(n=2, max_new=3, batch=24), training=dict(steps=2, batch=8), rounds=1)


def test_a_fit_goes_on_from_texts_to_rewards(small, given):
    root, lm, _ = small
    fitted = selective.fit(root, warm=dict(steps=2, batch=4, tokens=8, warmup=1), **given)
    control = methods.load(fitted, open_lm(lm)[0])
    assert float(jnp.abs(control.move).max()) > 0 and float(control.scale) == 1
    samples = fitted.path.with_name(f"score-{fitted.spec['inputs']['pool']}")
    drawn = json.loads((samples / "spec.json").read_text())["inputs"]["samples"]
    drawn = json.loads((root / f"sample-{drawn}" / "spec.json").read_text())["inputs"]["controls"]
    assert drawn == [fitted.spec["inputs"]["start_from"]]  # the policy of the first stage drew the samples
    with pytest.raises(InputError, match="selective needs the probability of every text, but explore has a filter"):
        selective.fit(root, **given | dict(explore=dict(filter=dict(top_p=0.9))))
    with pytest.raises(InputError, match="has no setting 'rat'"):
        selective.fit(root, **given, rat=1)


@pytest.mark.slow
def test_a_fit_begins_with_the_base(small, given):
    root, lm, _ = small
    model, params, _ = open_lm(lm)
    plain = selective.fit(root, **given | dict(training=dict(steps=1, batch=8, rate=0.0)))
    prompts, completion = worlds.prompts([[1, 2]]), jnp.array([[3, 4]])
    a, b = (loop.forward(model, params, prompts, completion, *c) for c in ((), (methods.load(plain, model),)))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_sizes_of_the_paper_fit_on_paper():
    from configs.selective import PAPER

    lm = Transformer.gpt2(width=1024, depth=2, heads=16)
    out = worlds.written_on_paper(lm, lambda key: selective.init(lm, key, **PAPER))
    assert out.tokens.shape == (1, 2)
    shapes = jax.eval_shape(lambda: selective.init(lm, jax.random.key(0), **PAPER))
    kept = {name: x for name, x in dataclasses.asdict(shapes).items() if name in ("head", "move", "project")}
    assert tree.size_bytes(kept) == 4 * (50257 * 1024 + 2 * 1024 * 512)


def test_bad_input_raises_one_sentence():
    for settings, words in [
        (dict(context="lstm"), "context is 'lstm', expected one of mlp, stream"),
        (dict(width=0), "width is 0, expected at least 1"),
        (dict(scale=1.5), "scale is 1.5, expected a number from 0 to 1"),
    ]:
        with pytest.raises(InputError, match=words):
            selective.init(WORLD, jax.random.key(0), **settings)
    for settings, words in [(dict(kind="max"), "kind is 'max', expected"), (dict(clip=0.0), "clip is 0.0, expected")]:
        with pytest.raises(InputError, match=words):
            Objective(**settings)
