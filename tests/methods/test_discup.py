"""DisCup: the loss by hand, one candidate, both ways of normalising, a fit that moves the liked share, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.controls.vectors import SoftPrompt
from ctg_jax.methods import discup
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError

WORLD = worlds.Bigram()
P = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]])
ODDS = np.array([-1.0, 2.0, 0.5])  # after token 0, for each next token


def value():
    return {"kernel": jnp.zeros((3, 3)).at[:, 0].set(jnp.asarray(ODDS)), "bias": jnp.zeros(3)}


def nats(**settings):
    """The loss of the second token of the text 0 0, behind a soft prompt that changes nothing in this world."""
    batch = {"tokens": jnp.zeros((1, 2), jnp.int32), "mask": jnp.ones((1, 2), bool), "ids": jnp.zeros(1, jnp.int32)}
    frozen = {"params": worlds.table(P), "value": value()}
    found = discup.loss(WORLD, **settings)(
        SoftPrompt(jnp.zeros((1, 3))), frozen, batch, jax.random.split(jax.random.key(0), 1)
    )
    return float(found.total / found.weight), {name: float(a / b) for name, (a, b) in found.metrics.items()}


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def test_the_loss_by_hand():
    d, p = 1 / (1 + np.exp(-ODDS)), P[0]
    good, bad = softmax(d / 0.5), softmax((1 - d) / 0.5)
    found, parts = nats(top=3, tau=0.5)
    assert found == pytest.approx(-(good @ np.log(p)) - bad @ np.log(1 - p), abs=1e-5)
    assert parts["liked"] == pytest.approx(p @ d, abs=1e-5)
    assert nats(top=3, tau=0.5, unlikely=0.0)[0] == pytest.approx(-(good @ np.log(p)), abs=1e-5)
    assert nats(top=3, tau=0.5, unlikely=0.0, target=0)[0] == pytest.approx(-(bad @ np.log(p)), abs=1e-5)


def test_candidates_are_the_likeliest_tokens_and_one_of_them_is_cross_entropy():
    d, p = 1 / (1 + np.exp(-ODDS)), P[0]
    assert nats(top=1, unlikely=0.0)[0] == pytest.approx(-np.log(0.5), abs=1e-5)
    two = softmax(d[:2] / 0.5)
    assert nats(top=2, tau=0.5, unlikely=0.0)[0] == pytest.approx(-(two @ np.log(p[:2])), abs=1e-5)
    whole = softmax(np.array([d[0], d[1], 0.0]) / 0.5)
    assert nats(top=2, tau=0.5, unlikely=0.0, over="whole")[0] == pytest.approx(-(whole @ np.log(p)), abs=1e-5)


def test_the_prompt_learns_what_the_discriminator_likes():
    lm = worlds.tiny()
    head = {"kernel": jax.random.normal(jax.random.key(2), (lm.vocab, lm.width)), "bias": jnp.zeros(lm.vocab)}
    frozen = {"params": worlds.lively(lm), "value": head}
    tokens = jax.random.randint(jax.random.key(3), (8, 5), 0, lm.vocab)
    batch = {"tokens": tokens, "mask": jnp.ones(tokens.shape, bool), "ids": jnp.arange(8)}
    start, steps = discup.example(lm, jax.random.key(1)), discup.loss(lm, top=4, tau=0.1)
    found = steps(start, frozen, batch, jax.random.split(jax.random.key(0), 8))
    _, after = worlds.trained(steps, start, frozen, [batch] * 150, rate=0.3)
    before = {name: float(a / b) for name, (a, b) in found.metrics.items()}
    assert float(after["liked"]) > before["liked"] + 0.03 and float(after["towards"]) < before["towards"] - 0.3


def test_a_fit_leaves_a_soft_prompt(small):
    root, lm, data = small
    training = dict(steps=2, batch=4, tokens=8)
    fitted = discup.fit(root, lm=lm, data=data, vectors=3, discriminator=dict(training=training), training=training)
    control = methods.load(fitted, open_lm(lm)[0])
    assert isinstance(control, SoftPrompt) and control.vectors.shape == (3, 16)
    assert {"towards", "away", "liked"} <= fitted.rows("metrics.jsonl")[-1].keys()


def test_bad_input_raises_one_sentence():
    for settings, words in [
        (dict(top=0), "top is 0, expected from 1 to 3 candidates"),
        (dict(tau=0.0), "tau is 0.0 and unlikely 1.0"),
        (dict(over="all"), "over is 'all', expected 'candidates' or 'whole'"),
        (dict(target=2), "target is 2, expected 0 or 1"),
    ]:
        with pytest.raises(InputError, match=words):
            discup.loss(WORLD, **{"top": 2, **settings})
    with pytest.raises(InputError, match="length is 0, expected at least 1 vector"):
        discup.init(WORLD, jax.random.key(0), vectors=0)
