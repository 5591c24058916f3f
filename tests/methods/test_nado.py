"""NADO: three tokens by hand, p(y) 1[c] / Z with the exact R, the loss by hand, what it finds, fits, bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from laws import worlds

from ctg_jax import methods, tree
from ctg_jax.decode import loop
from ctg_jax.methods import nado
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import judges
from ctg_jax.types import InputError

WORLD = worlds.Bigram()
P = np.array([0.5, 0.3, 0.2])
BASE = worlds.table([P] * 3)
LOOSE = dict(explore=dict(n=4, max_new=5, batch=16), threshold="median")


def logit(p):
    p = np.clip(np.asarray(p, np.float64), 1e-13, 1 - 1e-13)
    return jnp.asarray(np.log(p) - np.log1p(-p), jnp.float32)


def head(r, alpha=1.0, cond=None):
    """R of the next token, whatever came before."""
    control = nado.init(WORLD, jax.random.key(0), cond=cond)
    return control.replace(value={**control.value, "bias": logit(r)}, alpha=jnp.asarray(alpha, jnp.float32))


@struct.dataclass
class Prefixes:
    """A stream whose state tells which of the prefixes of at most one token the completion has: none, 0, 1 or 2."""

    def check(self, prompts):
        pass

    def readers(self, name):
        return ()

    def init(self, prompts, length):
        return jnp.zeros((len(prompts.keys), 0))  # nothing read yet

    def read(self, tokens, mask, new, reading, extra=None):
        later = tokens[:, tokens.shape[1] - (new - 1) :] if reading.ndim == 2 else tokens
        number = later + 1
        if reading.ndim == 2:
            number = jnp.concatenate([jnp.zeros_like(tokens[:, :1]), number], axis=1)
        return None, jax.nn.one_hot(number, 4), jnp.zeros((len(tokens), 0, 0))


def table(r, alpha=1.0):
    """r float [4, 3]: R after each prefix and next token."""
    value = {"kernel": logit(r).T, "bias": jnp.zeros(3)}
    return nado.Nado(value, jnp.float32(alpha), Prefixes())


def exact(c):
    """R [4, 3] of an oracle about two independent tokens."""
    first = [sum(P[b] * c(a, b) for b in range(3)) for a in range(3)]
    return np.array([first, *([float(c(a, b)) for b in range(3)] for a in range(3))])


def next_token(control, cond=None, rows=1):
    prompts = worlds.prompts([[0]] * rows, cond=cond)
    z = loop.forward(WORLD, BASE, prompts, jnp.zeros((rows, 1), jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[:, 0]))


def test_three_tokens_by_hand():
    found = next_token(head((0.9, 0.5, 0.1), cond="much"), {"much": jnp.array([1.0, 0.0])}, rows=2)
    np.testing.assert_allclose(found, [(0.72581, 0.24194, 0.03226), P], atol=1e-5)
    np.testing.assert_allclose(next_token(head((0.5,) * 3, alpha=3.0)), [P], atol=1e-6)  # R = ½ changes nothing
    squared = P * np.array([0.9, 0.5, 0.1]) ** 2
    np.testing.assert_allclose(next_token(head((0.9, 0.5, 0.1), 2.0)), [squared / squared.sum()], atol=1e-6)


@pytest.mark.parametrize(
    "oracle, mass, first",
    [
        (lambda a, b: a == 0 or b == 0, 0.75, (0.66667, 0.2, 0.13333)),
        (lambda a, b: a != 2 and b != 2, 0.64, (0.625, 0.375, 0.0)),
    ],
)
def test_the_exact_oracle_gives_the_base_under_the_condition(oracle, mass, first):
    control = table(exact(oracle))
    np.testing.assert_allclose(next_token(control), [first], atol=1e-5)
    p, q = (worlds.probabilities(WORLD, BASE, [0], 2, *c) for c in ((), (control,)))
    some = np.array([oracle(a, b) for a, b in itertools.product(range(3), repeat=2)])
    np.testing.assert_allclose(q, p * some / mass, atol=1e-6)
    assert worlds.divergence(np.where(q > 1e-9, q, 0), p) == pytest.approx(-np.log(mass), abs=1e-5)


def rows(texts, label, importance=None, **fields):
    batch = worlds.written([0], np.asarray(texts), label=jnp.asarray(label, jnp.float32), **fields)
    return batch | {"importance": jnp.ones(len(texts)) if importance is None else jnp.asarray(importance, jnp.float32)}


def test_the_loss_by_hand():
    """R is (.9, .5, .1), so o = .62 after every token."""
    keys = jax.random.split(jax.random.key(0), 2)
    batch = rows([[1, 0], [0, 1]], [1.0, 0.0], [1.0, 3.0])
    batch["written"] = jnp.array([[True, True], [True, False]])
    entropy = -np.log(0.5) - np.log(0.9) - 3 * np.log(0.1)
    for divergence, far in [
        ("forward", 0.02908),
        ("backward", 0.5 * np.log(0.5 / 0.62) + 0.5 * np.log(0.5 / 0.38)),
        ("squared", 0.12**2),
    ]:
        out = nado.loss(WORLD, weight=2.0, divergence=divergence)(head((0.9, 0.5, 0.1)), {"params": BASE}, batch, keys)
        assert float(out.total) == pytest.approx(entropy + 2 * far, abs=2e-5) and float(out.weight) == 3
    (r,) = [jnp.full((3,), 2.0)]
    control = head(jax.nn.sigmoid(r))
    out = nado.loss(WORLD, weight=0.0)(control, {"params": BASE}, rows([[0]], [1.0]), keys[:1])
    assert float(out.total) == pytest.approx(0.12693, abs=1e-5)


def test_the_loss_finds_the_exact_oracle():
    oracle = lambda a, b: a == 0 or b == 0  # noqa: E731
    texts = worlds.sequences(WORLD, 2)
    label = [oracle(a, b) for a, b in texts]
    batch = rows(texts, label, 9 * worlds.probabilities(WORLD, BASE, [0], 2))
    objective = nado.loss(WORLD, weight=0.0)
    control, metrics = worlds.trained(
        objective, table(np.full((4, 3), 0.5)), {"params": BASE}, [batch] * 400, rate=0.2, trained="value/kernel"
    )
    found = jax.nn.sigmoid(control.value["kernel"].T)
    np.testing.assert_allclose(found, exact(oracle), atol=5e-3)
    assert float(metrics["inconsistency"]) < 1e-3  # it holds, though it was not trained
    some = np.array(label)
    q = worlds.probabilities(WORLD, BASE, [0], 2, control)
    assert q[some].sum() > 0.99


@pytest.fixture(scope="module")
def judge(small):
    options = {"kind": "function", "name": "dice", "function": "configs.reward:dice", "version": "1"}
    return stage(small[0], judges.fit_judge, options)


def test_fit_explores_with_what_it_has_learned(small, judge):
    root, lm, data = small
    training = dict(steps=3, batch=4, warmup=1)
    shape = dict(width=8, depth=1, heads=2)
    given = dict(lm=lm, data=data, rewards=[judge], training=training, **LOOSE)
    mixed = nado.fit(root, rounds=2, kind="mixed", shape=shape, divergence="backward", **given)
    assert len(mixed.spec["inputs"]["pool"]) == 2 and 0 < mixed.spec["oracle"]["positives"] < 96
    model, params, _ = open_lm(lm)
    control = methods.load(mixed, model)
    assert float(jnp.abs(control.value["kernel"]).max()) > 0 and float(control.alpha) == 1
    start = nado.init(model, jax.random.key(0), kind="mixed", shape=shape)
    assert tree.size_bytes(control) == tree.size_bytes(start)
    # The scorer reads the states of the base: with other weights of the base it says something else.
    prompts, completion = worlds.prompts([[1, 2]]), jnp.array([[3, 4]])
    control = control.replace(project=50 * control.project)
    other = control.replace(project=0 * control.project)
    a, b = (loop.forward(model, params, prompts, completion, c) for c in (control, other))
    assert float(jnp.abs(a - b).max()) > 1e-4


def test_the_sizes_of_the_paper_fit_on_paper():
    from configs.nado import PAPER

    lm = Transformer.gpt2(width=1280, depth=2, heads=20)
    out = worlds.written_on_paper(lm, lambda key: nado.init(lm, key, **PAPER))
    assert out.tokens.shape == (1, 2)


def test_bad_input_raises_one_sentence(small, judge):
    root, lm, data = small
    key = jax.random.key(0)
    for settings, words in [
        (dict(kind="tail"), "kind is 'tail', expected one of head, stream, mixed"),
        (dict(alpha=float("nan")), "alpha is nan"),
        (dict(shape=dict(width=8)), "a head has no model of its own"),
        (dict(kind="stream", shape=dict(width=9, heads=2)), "has the width 9, which heads=2 does not divide"),
        (dict(kind="stream", shape=dict(layers=9)), "shape has 'layers'"),
    ]:
        with pytest.raises(InputError, match=words):
            nado.init(WORLD, key, **settings)
    with pytest.raises(InputError, match="divergence is 'sideways', expected one of forward, backward, squared"):
        nado.loss(WORLD, divergence="sideways")
    given = dict(lm=lm, data=data, rewards=[judge], explore=LOOSE["explore"])
    with pytest.raises(InputError, match="no reward was given"):
        nado.fit(root, lm=lm, data=data, rewards=[])
    with pytest.raises(InputError, match="explore has a filter with top_p"):
        nado.fit(root, **given | dict(explore=dict(filter=dict(top_p=0.9))))
    with pytest.raises(InputError, match="samples are on one side of the threshold 2"):
        nado.fit(root, **given, threshold=2.0)
    with pytest.raises(InputError, match="threshold is 'mean', expected a number"):
        nado.fit(root, **given, threshold="mean")
