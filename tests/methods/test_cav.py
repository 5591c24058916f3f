"""Concept activation vectors: steps worked out by hand, targets that are met, and the least change for several."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain
from ctg_jax.controls.selection import Positions
from ctg_jax.decode import loop
from ctg_jax.learn import probes
from ctg_jax.methods import cav
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError, Sampling

LM = worlds.tiny()
PARAMS = worlds.lively(LM)
POS = jnp.arange(4, dtype=jnp.int32)[None, :] * jnp.ones((3, 1), jnp.int32)
ROWS = worlds.prompts([[1, 2, 3], [4, 5], [6]])


def at_site(width, w, b, **options):
    """A control with the probes w [K, D], b [K] at site 1 alone, of a model of one block."""
    w, b = jnp.asarray(w, jnp.float32), jnp.asarray(b, jnp.float32)
    control = cav.init(worlds.Bigram(vocab=width), jax.random.key(0), **options)
    put = [jnp.zeros((3, *x.shape)).at[1].set(x) for x in (w, b, jnp.ones(len(b)))]
    return control.replace(vector=put[0], bias=put[1], gate=put[2])


@partial(jax.jit, static_argnames="site")
def edit(control, h, prompts=ROWS, pos=POS, site=1):
    return control.hidden(h, site, pos, control.init(prompts, 8))


def states(width=8, seed=0):
    return 3 * jax.random.normal(jax.random.key(seed), (3, 4, width))


def probability(h, w, b):
    return jax.nn.sigmoid(h @ jnp.asarray(w, jnp.float32) + b)


@pytest.mark.parametrize(
    ("direction", "p0", "scale", "expected"),
    [
        ("add", 0.5, 1.0, [[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]),
        ("remove", 0.5, 1.0, [[0.0, 0.0], [0.0, 0.0], [-0.6, -0.8]]),
        ("both", 0.5, 1.0, [[0.0, 0.0], [3.0, 4.0], [-0.6, -0.8]]),
        ("add", 0.5, 0.5, [[0.0, 0.0], [1.5, 2.0], [0.0, 0.0]]),
        ("add", 0.5, -1.0, [[0.0, 0.0], [0.0, 0.0], [-0.6, -0.8]]),
        ("add", 0.75, 1.0, [[0.131833, 0.175778], [3.131833, 4.175778], [0.0, 0.0]]),  # log 3 / 5 = 0.219722
        ("remove", 0.25, -1.0, [[0.131833, 0.175778], [3.131833, 4.175778], [0.0, 0.0]]),
    ],
)
def test_the_step_by_hand(direction, p0, scale, expected):
    """w = (3, 4), ‖w‖ = 5, b = −5: the states have logits 0, −25 and 5, and so lie 0, 5 and −1 from P = 1/2."""
    control = at_site(2, [[3.0, 4.0]], [-5.0], direction=direction, p0=p0)
    control = methods.with_strength(control, scale)
    h = jnp.array([[[1.0, 0.5], [-4.0, -2.0], [2.0, 1.0]]])
    found = edit(control, h, worlds.prompts([[1]]), POS[:1, :3])
    np.testing.assert_allclose(found - h, [expected], atol=1e-5)
    traced = jax.jit(lambda site: control.hidden(h, site, POS[:1, :3], control.init(worlds.prompts([[1]]), 3)))
    for site, expect in ((1, found), (0, h), (3, h)):  # site 3 is inside the block
        np.testing.assert_allclose(traced(jnp.int32(site)), expect, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_each_row_meets_its_own_target_and_what_meets_it_is_untouched(scale):
    h, w, b = states(), np.linspace(-1, 1, 8), 0.3
    control = at_site(8, w[None], [b], goal="p0", positions=Positions()).replace(scale=jnp.float32(scale))
    p0 = jnp.array([0.6, 0.9, 0.99])
    after = edit(control, h, ROWS.replace(cond={"p0": p0}))
    before, now = probability(h, w, b), probability(after, w, b)
    goal = (p0 if scale > 0 else 1 - p0)[:, None]
    met = scale * (before - goal) >= 0
    assert bool(jnp.any(met)) and not bool(jnp.all(met))
    np.testing.assert_allclose(now, jnp.where(met, before, goal), atol=1e-3)
    np.testing.assert_array_equal(after[met], h[met])
    same = control.replace(goal=None, p0=p0[:, None])  # the leaf may hold a row each as well
    np.testing.assert_array_equal(edit(same, h), after)


def test_a_tap_sees_the_targets_met_in_a_model():
    """At the last token of the prompt and after it, in the layers that were chosen, and nowhere else."""
    control = cav.example(LM, jax.random.key(1)).replace(goal="p0", scale=jnp.array([1.0, -1.0, 1.0]))
    prompts = ROWS.replace(cond={"p0": jnp.array([0.8, 0.7, 0.95])})
    tokens = jnp.concatenate([prompts.tokens, jnp.array([[1, 2], [3, 4], [5, 6]])], axis=1)
    mask = jnp.concatenate([prompts.mask, jnp.ones((3, 2), bool)], axis=1)

    @jax.jit
    def read(control):
        x = LM.embed(PARAMS, tokens)
        return LM.apply(PARAMS, x, mask, control=control, state=control.init(prompts, 5), tap=lambda h: h).taps

    base, taps = read(cav.neutral(control)), read(control)
    for site in (1, LM.depth):
        p = probability(taps[site], control.vector[site, 0], control.bias[site, 0])[:, 2:]
        assert float(jnp.min(p[0])) > 0.78 and float(jnp.max(p[1])) < 0.32 and float(jnp.min(p[2])) > 0.93
        p = probability(base[site], control.vector[site, 0], control.bias[site, 0])[:, 2:]
        assert float(jnp.min(p[0])) < 0.78 or float(jnp.max(p[1])) > 0.32 or float(jnp.min(p[2])) < 0.93
    np.testing.assert_array_equal(taps[:, :, :2][:, mask[:, :2]], base[:, :, :2][:, mask[:, :2]])
    assert float(jnp.max(jnp.abs(read(control.replace(positions=Positions()))[1] - base[1])[:, :2])) > 0.1


def test_two_concepts_in_a_chain():
    """The second control has the last word about its concept; where the probes are orthogonal, so does the first."""
    h = states(4)
    first = at_site(4, [[2.0, 0, 0, 0]], [0.5], p0=0.8, positions=Positions())
    second = at_site(4, [[0, 1.0, 1, 0]], [0.0], p0=0.1, direction="remove", positions=Positions())
    after = edit(Chain((first, second)), h)
    assert float(jnp.min(probability(after, [2.0, 0, 0, 0], 0.5))) > 0.799
    assert float(jnp.max(probability(after, [0, 1.0, 1, 0], 0.0))) < 0.101
    together = edit(cav.join(first, second), h)
    np.testing.assert_allclose(together, after, atol=1e-4)


def test_joined_concepts_move_the_least():
    """Against a general solver, for correlated probes, one of them closed at the site."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 6)) + 0.8 * rng.normal(size=(1, 6))
    directions = ("add", "remove", "both", "add")
    control = at_site(6, w, np.zeros(4), direction=directions, p0=(0.8, 0.3, 0.6, 0.9), positions=Positions())
    control = control.replace(gate=control.gate.at[1, 3].set(0.0))
    h = np.asarray(states(6))
    found = np.asarray(edit(control, jnp.asarray(h))) - h
    goal = np.log([0.8 / 0.2, 0.3 / 0.7, 0.6 / 0.4])
    constraints = [
        {
            "type": kind,
            "fun": lambda d, x, k=k, s=s: s * (w[k] @ (x + d) - goal[k]),
            "jac": lambda d, x, k=k, s=s: s * w[k],
        }
        for k, (kind, s) in enumerate([("ineq", 1), ("ineq", -1), ("eq", 1)])
    ]
    active = set()
    for x, step in zip(h.reshape(-1, 6), found.reshape(-1, 6)):
        given = [{**c, "args": (x,)} for c in constraints]
        best = minimize(lambda d: d @ d, np.zeros(6), jac=lambda d: 2 * d, constraints=given, method="SLSQP")
        np.testing.assert_allclose(step, best.x, atol=2e-3)
        active.add(tuple(abs(w[k] @ (x + step) - goal[k]) < 1e-3 for k in range(3)))
    assert len(active) > 2  # states with other active constraints were among them


def test_joined_concepts_decode_as_they_score():
    lm, rows = worlds.Bigram(), worlds.prompts([[1, 2, 0], [0], [2, 2]])
    params = worlds.table([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    a, b = (cav.example(lm, jax.random.key(i)) for i in (1, 2))
    both = cav.join(a, b.replace(direction=("remove",))).replace(positions=Positions())  # this world has no positions
    samples = loop.generate(lm, params, rows, both, Sampling(max_new=3))
    logp = loop.score(lm, params, rows, samples.tokens, both)
    np.testing.assert_allclose(logp, samples.logp, atol=1e-5)
    assert float(jnp.max(jnp.abs(logp - loop.score(lm, params, rows, samples.tokens)))) > 0.1


def test_probes_and_layers_by_accuracy():
    """Site 1 tells the sides apart, site 2 half as well, the others not at all; features of other sizes fold back."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2 == 0
    x = rng.normal(size=(400, 4, 5)).astype(np.float32) * [1, 100, 0.01, 1, 0] + 7
    x[:, 1, 1] += np.where(y, 400, -400)
    x[:, 2, 1] += np.where(y, 100, -100)
    z = [x[:, s] @ w + b for s, (w, b) in enumerate(probes.fit_probe(x[:, s], y, 1.0) for s in range(4))]
    accuracy = np.mean((np.array(z) > 0) == y[None], axis=1)
    assert accuracy[1] == 1 and 0.75 < accuracy[2] < 0.95 and accuracy[0] < 0.65
    gate = np.array([0, 1, 1, 0], np.float32)
    assert probes.choose_sites(accuracy, gate, 1, 0.0).tolist() == [0, 1, 0, 0]
    assert probes.choose_sites(accuracy, gate, None, 0.7).tolist() == [0, 1, 1, 0]
    assert probes.choose_sites(accuracy, np.ones(4, np.float32), None, 0.7).tolist() == [0, 1, 1, 0]
    with pytest.raises(InputError, match=r"of a probe is 1\.000"):
        probes.choose_sites(accuracy, gate, None, 1.1)
    with pytest.raises(InputError, match="top is 0"):
        probes.choose_sites(accuracy, gate, 0, 0.0)


def test_what_is_held_out():
    sides = np.zeros((10, 3, 2)), np.ones((3, 3, 2))
    x, y, held = probes.split(*sides, 0.2)
    assert x.shape == (13, 3, 2) and y.sum() == 10
    assert np.flatnonzero(held).tolist() == [4, 9, 12]


def test_fit(small):
    root, lm, data = small
    options = dict(direction="remove", p0=0.2, goal="p0", batch=4, tokens=16, limit=10, scale=0.5, inverse_l2=1.0)
    before = len(list(root.glob("cav.states-*")))
    fitted = cav.fit(root, lm=lm, data=data, top=1, **options)
    control = methods.load(fitted, open_lm(lm)[0])
    assert control.gate[:, 0].tolist() == [0, 1, 0] and float(control.scale) == 0.5
    assert control.direction == ("remove",) and control.goal == "p0" and control.p0.tolist() == [pytest.approx(0.2)]
    rows = fitted.metrics()
    assert [r["site"] for r in rows] == [0, 1, 2] and [r["chosen"] for r in rows] == [False, True, False]
    assert all(0 <= r["heldout_accuracy"] <= 1 and r["train_accuracy"] > 0.9 for r in rows)
    again = cav.fit(root, lm=lm, data=data, sites=[0, 1], **options | dict(p0=0.4))
    assert len(list(root.glob("cav.states-*"))) == before + 1 and again.id != fitted.id


def test_bad_input(small):
    root, lm, data = small
    for p0 in (0.0, 1.0, -0.5, float("nan"), (0.5, 0.5)):
        with pytest.raises(InputError, match=r"p0 is .* expected a probability between 0 and 1"):
            cav.init(LM, jax.random.key(0), p0=p0)
    with pytest.raises(InputError, match=r"p0 is 1\.5"):
        cav.fit(root, lm=lm, data=data, p0=1.5)
    with pytest.raises(InputError, match="direction is 'up'"):
        cav.init(LM, jax.random.key(0), direction="up")
    with pytest.raises(InputError, match="there are 7 concepts"):
        cav.init(LM, jax.random.key(0), direction=["add"] * 7)
    with pytest.raises(InputError, match=r"target is 7, but the labels .* are \[0, 1\]"):
        cav.fit(root, lm=lm, data=data, target=7)
    with pytest.raises(InputError, match=r"heldout is 0\.9"):
        probes.split(np.zeros((4, 3, 2)), np.ones((4, 3, 2)), 0.9)
    with pytest.raises(InputError, match="there are 1 texts without the concept"):
        probes.split(np.zeros((4, 3, 2)), np.ones((1, 3, 2)), 0.2)
    with pytest.raises(InputError, match="texts without the concept is not finite"):
        probes.split(np.zeros((4, 3, 2)), np.full((4, 3, 2), np.nan), 0.2)
    narrow = cav.example(worlds.Bigram(), jax.random.key(0))
    with pytest.raises(InputError, match="width 3, but the model's is 16"):
        flat = worlds.tiny(depth=1)
        loop.forward(flat, worlds.lively(flat), worlds.prompts([[1]]), jnp.array([[1]]), narrow)
    with pytest.raises(InputError, match="expected those of one model"):
        cav.join(cav.example(LM, jax.random.key(0)), narrow)
    with pytest.raises(InputError, match="differ in positions"):
        cav.join(narrow, narrow.replace(positions=Positions()))
    with pytest.raises(InputError, match="at least one"):
        cav.join()
    with pytest.raises(InputError, match=r"prompts.cond\['p0'\]"):
        narrow.replace(goal="p0").init(ROWS, 4)
