"""Diffusion-LM in a world of 27 texts, where the best denoiser and the probability of any class are known; rounding,
clamping, energies and updates by hand."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import rng
from ctg_jax.learn import losses
from ctg_jax.learn.diffusion_losses import word_loss
from ctg_jax.methods import diffusion_lm
from ctg_jax.models import samplers, word_diffusion
from ctg_jax.models.diffusion import Schedule, alpha_sigma
from ctg_jax.models.word_control import How, energy, steered
from ctg_jax.models.word_diffusion import vectors
from ctg_jax.types import InputError

V, S = 3, 3
LM = worlds.tiny(vocab=V)
EVERY = np.array(list(itertools.product(range(V), repeat=S)), np.int32)
P = np.random.default_rng(0).dirichlet(np.full(len(EVERY), 0.7))
CLASS = (EVERY == 1).sum(1) >= 2  # a class of texts: token 1 at least twice
TABLE = vectors(jnp.asarray([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.9]]))


@dataclasses.dataclass(frozen=True)
class Exact:
    """Logits of the true p(token | z) at every place, or of the classes, by enumeration; params are log P [27]."""

    classes: bool = False

    def apply(self, params, z, gamma, given=None):
        each = word_diffusion.words(TABLE, z, gamma)
        if given is not None:
            far = jnp.sum((z[:, :, None] - TABLE[None, None]) ** 2, axis=-1)
            each = jnp.where(given[:, :, None], -1e4 * far, each)
        joint = params[None] + sum(each[:, i, EVERY[:, i]] for i in range(S))
        if self.classes:
            sides = [jax.nn.logsumexp(jnp.where(jnp.asarray(k == CLASS)[None], joint, -1e9), axis=1) for k in (0, 1)]
            return jnp.broadcast_to(jnp.stack(sides, axis=1)[:, None], (len(z), S, 2))
        is_ = jnp.asarray(EVERY[:, :, None] == np.arange(V))[None]
        return jax.nn.logsumexp(jnp.where(is_, joint[:, :, None, None], -1e9), axis=1)


def exact(**how):
    """The model of P, and the classifier of `CLASS`."""
    control = diffusion_lm.init(LM, jax.random.key(0), dim=2, width=8, heads=1, depth=1, length=S, fields={"label": 2})
    logp = jnp.log(jnp.asarray(P, jnp.float32))
    return control.replace(
        params={"raw": TABLE, "net": logp}, guide=logp, net=Exact(), reader=Exact(True),
        tags=jnp.arange(V, dtype=jnp.int32), how=How(**how),
    )  # fmt: skip


def keys(n, seed=0):
    return rng.per_example(jax.random.key(seed), jnp.arange(n))


def drawn(control, aims=None, n=4000, tokens=None, given=None):
    """Share of each of `EVERY` among n rows."""
    row = jnp.zeros((n, S), jnp.int32)
    tokens = row if tokens is None else jnp.broadcast_to(jnp.asarray(tokens, jnp.int32)[None], row.shape)
    given = row > 0 if given is None else jnp.broadcast_to(jnp.asarray(given)[None], row.shape)
    if aims:  # all of them, so that one program is compiled
        aims = {"label": -1, "length": -1, "tags": [-1] * S} | aims
    aims = {name: jnp.broadcast_to(jnp.asarray(v)[None], (n, *np.shape(v))) for name, v in (aims or {}).items()}
    rows = np.asarray(diffusion_lm.infill(control, tokens, given, aims, keys(n)))
    return np.bincount(rows @ [V * V, V, 1], minlength=len(EVERY)) / n


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_best_denoiser_reaches_the_distribution_of_texts(sampler):
    found = drawn(exact(calls=100, sampler=sampler))
    assert worlds.divergence(found, P) < 0.01  # of 4,000 samples 0.003 is expected
    assert worlds.divergence(found, np.full(len(P), 1 / len(P))) > 0.1


def test_infilling_keeps_what_is_given_and_draws_the_rest_given_it():
    given = np.array([True, False, True])
    found = drawn(exact(calls=100), tokens=[2, 0, 1], given=given)
    fits = (EVERY[:, 0] == 2) & (EVERY[:, 2] == 1)
    assert found[~fits].sum() == 0
    assert worlds.divergence(found, np.where(fits, P, 1e-30) / P[fits].sum()) < 0.01


def test_control_with_the_exact_energy_raises_its_target_the_more_the_stronger():
    gentle, shares = exact(calls=50, rate=0.02, floor=1.0), []
    for scale in (0.0, 0.3, 1.0):
        found = drawn(gentle.replace(scale=jnp.float32(scale)), {"label": 1}, n=1000)
        shares.append(found[CLASS].sum())
    assert abs(shares[0] - P[CLASS].sum()) < 0.04
    assert shares[0] + 0.1 < shares[1] < shares[2] - 0.1
    usual = exact(calls=50)
    assert drawn(usual, {"label": 1}, n=1000)[CLASS].sum() > 0.95
    assert drawn(usual, {"label": 0}, n=1000)[CLASS].sum() < 0.02


def test_controls_of_places_hold_alone_and_with_a_class():
    control = exact(calls=50)
    ends = (EVERY[:, 2] == 0) & (EVERY[:, :2] != 0).all(1)
    assert P[ends].sum() < 0.3 and drawn(control, {"length": 2}, n=1000)[ends].sum() > 0.95
    tagged = EVERY[:, 0] == 2
    assert P[tagged].sum() < 0.6 and drawn(control, {"tags": [2, -1, -1]}, n=1000)[tagged].sum() > 0.95
    both = drawn(control, {"length": 2, "label": 1}, n=1000)[ends & CLASS].sum()
    assert P[ends & CLASS].sum() < 0.2 and both > 0.9
    assert drawn(control, {"tags": [2, -1, -1], "label": 1}, n=1000)[tagged & CLASS].sum() > 0.9


def test_rounding_and_clamping_by_hand():
    table = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    z = jnp.asarray([[[0.6, 0.2], [-0.1, 0.3]]])
    np.testing.assert_array_equal(word_diffusion.nearest(table, z), [[0, 1]])
    inner = np.asarray(z[0]) @ np.asarray(table).T
    for gamma in (None, jnp.asarray([1.5])):
        a, s = (1.0, 1.0) if gamma is None else (float(x[0]) for x in alpha_sigma(gamma))
        density = np.exp(-np.sum((np.asarray(z[0])[:, None] - a * np.asarray(table)[None]) ** 2, -1) / (2 * s * s))
        wanted = np.log(density / density.sum(1, keepdims=True))
        np.testing.assert_allclose(word_diffusion.words(table, z, gamma)[0], wanted, atol=1e-5)
    softmax = np.exp(inner) / np.exp(inner).sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(word_diffusion.words(table, z)[0]), softmax, atol=1e-6)
    unequal = vectors(jnp.asarray([[3.0, 4.0], [0.0, -0.1]]))
    np.testing.assert_allclose(unequal, np.sqrt(2) * np.array([[0.6, 0.8], [0, -1]]), atol=1e-5)

    control, row, free = exact(), jnp.zeros((1, S), jnp.int32), jnp.zeros((1, S), bool)
    net, logp = control.net, control.params["net"]
    z = jax.random.normal(jax.random.key(1), (1, S, 2))
    middle = Schedule("sqrt").log_snr(jnp.asarray([0.3]))
    plain = word_diffusion.estimate(net, logp, TABLE, row, free)(z, middle)
    late = word_diffusion.estimate(net, logp, TABLE, row, free, 0.5)(z, middle)
    np.testing.assert_allclose(late, TABLE[word_diffusion.nearest(TABLE, plain)])
    assert np.abs(late - plain).max() > 0.1
    np.testing.assert_array_equal(word_diffusion.estimate(net, logp, TABLE, row, free, 0.2)(z, middle), plain)


def test_energies_by_hand():
    z, gamma = jax.random.normal(jax.random.key(0), (2, S, 2)), jnp.asarray([0.3, -0.4])
    p = np.exp(np.asarray(word_diffusion.words(TABLE, z, gamma)))
    free, tags = jnp.asarray([[True, True, True], [False, True, True]]), jnp.asarray([5, 6, 6])

    def of(aims):
        given = {name: jnp.asarray(v) for name, v in aims.items()}
        logits = lambda z, gamma: jnp.asarray([[0.0, 1.0], [2.0, 0.0]])  # noqa: E731
        return energy(TABLE, given, free, (0,), tags, logits, {"label": 2})(z, gamma)

    length = -np.log([(1 - p[0, 0, 0]) * p[0, 1, 0] * p[0, 2, 0], (1 - p[1, 1, 0]) * (1 - p[1, 2, 0])])
    tagged = -np.log([(p[0, 0, 1] + p[0, 0, 2]) * p[0, 2, 0], p[1, 1, 0]])
    label = [np.log(1 + np.exp(-1)), 0.0]
    np.testing.assert_allclose(of({"length": [1, 3]}), length, rtol=1e-4)
    np.testing.assert_allclose(of({"tags": [[6, -1, 5], [5, 5, -1]]}), tagged, rtol=1e-4)
    np.testing.assert_allclose(of({"label": [1, -1]}), label, rtol=1e-5, atol=1e-7)
    all_ = {"length": [1, 3], "tags": [[6, -1, 5], [5, 5, -1]], "label": [1, -1]}
    np.testing.assert_allclose(of(all_), length + tagged + label, rtol=1e-4)


@pytest.mark.parametrize("pull", ["drawn", "mean"])
def test_updates_by_hand(pull):
    """Energy Σ c z; a gradient also pulls back to where the sampler was, or to the mean of its step."""
    c, z, gamma = np.array([2.0, -1.0, 0.0]), np.zeros((2, 1, 3), np.float32), np.array([0.5, 0.5], np.float32)
    how = How(updates=2, rate=0.1, coef=0.3, floor=0.04, pull=pull)
    scale = jnp.asarray([0.5, 0.0])
    edit = steered(lambda z, g: jnp.sum(z * jnp.asarray(c, jnp.float32)[None, None], axis=(1, 2)), scale, how)
    step = samplers.Step(jnp.asarray(z), None, jnp.asarray(z) - 0.5, jnp.float32(0.7), jnp.asarray(gamma), None)
    found = np.asarray(edit(step))
    centre, width = (0.0, 1 / (1 + np.exp(0.5))) if pull == "drawn" else (-0.5, 0.7)
    y, squares = np.zeros(3), np.full(3, 0.04)
    for _ in range(2):
        g = 0.5 * c + 2 * 0.3 * (y - centre) / width
        squares += g * g
        y = y - 0.1 * g / np.sqrt(squares)
    np.testing.assert_allclose(found[0, 0], y, rtol=1e-5)
    np.testing.assert_array_equal(found[1], z[1])


def test_the_updates_of_every_step_begin_from_nothing():
    """Adagrad is a fresh one after each step: the same step twice moves the same way, however it was called before."""
    edit = steered(lambda z, g: 3 * jnp.sum(z, axis=(1, 2)), jnp.ones(()), How(updates=3, floor=0.0))
    step = samplers.Step(jnp.zeros((1, 1, 2)), None, jnp.zeros((1, 1, 2)), jnp.float32(1), jnp.zeros(1), None)
    first = edit(step)
    np.testing.assert_array_equal(edit(step), first)
    # With nothing in its sums, the first update moves every entry by the rate, whatever its gradient is.
    alone = steered(lambda z, g: 3 * jnp.sum(z, axis=(1, 2)), jnp.ones(()), How(updates=1, floor=0.0))(step)
    np.testing.assert_allclose(alone, -0.1, rtol=1e-5)


def test_the_mean_and_deviation_of_a_step_are_those_it_was_drawn_from():
    seen = []

    def look(step):
        seen.append((np.asarray(step.z), np.asarray(step.mean), float(step.deviation)))
        return step.z

    keys = rng.per_example(jax.random.key(0), jnp.arange(4000))
    with jax.disable_jit():
        samplers.sample(lambda z, g: 0.5 * z, keys, (1,), steps=3, edit=look)
        assert all(np.std((z - mean) / deviation) == pytest.approx(1, abs=0.04) for z, mean, deviation in seen)
        del seen[:]
        samplers.sample(lambda z, g: 0.5 * z, keys[:4], (1,), steps=3, sampler="ddim", edit=look)
        assert all(np.array_equal(z, mean) and deviation == 0 for z, mean, deviation in seen)
    with pytest.raises(InputError, match="a step of the sampler 'ddim' draws nothing"):
        How(sampler="ddim", pull="mean")
    with pytest.raises(InputError, match="pull is 'both', expected one of drawn, mean"):
        How(pull="both")


@pytest.mark.slow
def test_training_learns_the_distribution_of_texts():
    control = diffusion_lm.init(LM, jax.random.key(1), dim=2, width=32, heads=2, depth=2, length=S, calls=50)
    random = np.random.default_rng(3)
    batches = [
        {"tokens": jnp.asarray(EVERY[random.choice(len(P), 128, p=P)]), "mask": jnp.ones((128, S), bool),
         "ids": jnp.arange(128) + 128 * i}
        for i in range(800)
    ]  # fmt: skip
    params, metrics = worlds.trained(word_loss(control.net, 0), control.params, {}, batches)
    assert {"error", "rounding", "reading"} <= metrics.keys() and float(metrics["error"]) < 0.6
    control = control.replace(params=params)
    found = drawn(control, n=2000)
    assert worlds.divergence(found, P) < 0.1 < worlds.divergence(P, np.full(len(P), 1 / len(P)))
    fits = EVERY[:, 2] == 1
    given = drawn(control, n=2000, tokens=[0, 0, 1], given=[False, False, True])
    assert given[~fits].sum() == 0 and worlds.divergence(given, np.where(fits, P, 1e-30) / P[fits].sum()) < 0.1


def test_the_loss_is_the_sum_of_its_three_parts():
    control = diffusion_lm.init(LM, jax.random.key(1), dim=2, width=8, heads=1, depth=1, length=S)
    batch = {"tokens": jnp.asarray(EVERY[:8]), "mask": jnp.ones((8, S), bool).at[7].set(False)}
    out = word_loss(control.net, 0, read=0.5)(control.params, {}, batch, keys(8))
    parts = {name: float(total) for name, (total, _) in out.metrics.items()}
    assert float(out.total) == pytest.approx(parts["error"] + parts["rounding"] + 0.5 * parts["reading"], rel=1e-6)
    tokens = jnp.where(batch["mask"], batch["tokens"], 0)
    free, error, rounding, _ = word_diffusion.errors(control.net, control.params, tokens, keys(8))
    assert float(out.weight) == float(free[:7].sum()) and bool(free.any(1).all())
    total, _ = losses.masked_sum(error[:7], free[:7])
    assert parts["error"] == pytest.approx(float(total), rel=1e-6)
    assert 0 < float(rounding.mean()) < 1
