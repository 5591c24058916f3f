"""CombLM: three tokens by hand, the gate's inputs, the best single number, the fit, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.controls.streams import Stream
from ctg_jax.decode import loop
from ctg_jax.methods import blend
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.record import record
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError

WORLD = worlds.Bigram()
P, A = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]], [[0.6, 0.3, 0.1], [0.3, 0.4, 0.3], [0.2, 0.2, 0.6]]
SHAPE = record(Transformer.gpt2(vocab=3, width=4, depth=1, heads=1, context=32))


def mixture(odds=0.0, cond=None, **settings):
    control = blend.init(WORLD, jax.random.key(0), small=SHAPE, cond=cond, **settings)
    last = str(len(control.gate) - 1)
    offset = jnp.full_like(control.gate[last]["offset"], odds)
    gate = {**control.gate, last: {**control.gate[last], "offset": offset}}
    return control.replace(small=Stream(worlds.table(A), lm=WORLD), gate=gate)


def next_token(control, first=0, cond=None):
    prompts = worlds.prompts([[first]], cond=cond)
    z = loop.forward(WORLD, worlds.table(P), prompts, jnp.zeros((1, 1), jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[0, 0]))


def test_three_tokens_by_hand():
    quarter = float(np.log(1 / 3))  # g = ¼
    np.testing.assert_allclose(next_token(mixture(quarter, reads="none")), (0.525, 0.3, 0.175), atol=1e-6)
    np.testing.assert_allclose(next_token(mixture(quarter, width=4, vector=True)), (0.525, 0.3, 0.175), atol=1e-6)
    np.testing.assert_allclose(next_token(mixture(0.0, reads="none", scale=0.5)), (0.525, 0.3, 0.175), atol=1e-6)
    for strength, wanted in ((0.0, P[0]), (0.5, (0.525, 0.3, 0.175))):
        control = mixture(0.0, cond="share", reads="none")
        found = next_token(control, cond={"share": jnp.array([strength])})
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_gate_for_each_token_is_normalised():
    control = mixture(reads="none", vector=True)
    control = control.replace(gate={"0": {**control.gate["0"], "offset": jnp.array([0.0, -99.0, 99.0])}})
    wanted = np.array([0.55, 0.3, 0.1])
    np.testing.assert_allclose(next_token(control), wanted / wanted.sum(), atol=1e-5)


def test_the_gate_reads_entropies_and_probabilities():
    p, q = (jnp.log(jnp.asarray(x[:1])) for x in (P, A))
    found = np.asarray(blend.inputs(p, q, "both"))[0]
    np.testing.assert_allclose(found[:2], (0.89795, 1.02965), atol=1e-5)  # of the small model, and of the base
    np.testing.assert_allclose(found[2:], (*A[0], *P[0]), rtol=1e-5)
    assert blend.inputs(p, q, "none").shape == (1, 0)
    cut = p.at[0, 1].set(-1e30)
    assert float(blend.inputs(cut, q, "entropies")[0, 1]) == pytest.approx(-0.5 * np.log(0.5) - 0.2 * np.log(0.2))


def test_the_fitted_number_is_the_best_one():
    """Tokens of a mixture of .3: expectation maximisation and the fit find the same share, better than either model."""
    texts = np.random.default_rng(0).choice(3, size=(400, 2), p=0.3 * np.array(A[0]) + 0.7 * np.array(P[0]))
    texts[:, 0] = 0
    probabilities = np.array(P[0])[texts[:, 1]], np.array(A[0])[texts[:, 1]]
    share = 0.5
    for _ in range(3000):
        share = np.mean(share * probabilities[1] / (share * probabilities[1] + (1 - share) * probabilities[0]))
    batch = {"tokens": jnp.asarray(texts, jnp.int32), "mask": jnp.ones(texts.shape, bool), "ids": jnp.arange(400)}
    frozen = {"params": worlds.table(P)}
    control, _ = worlds.trained(
        blend.loss(WORLD), mixture(reads="none"), frozen, [batch] * 300, rate=0.1, trained="gate/.*"
    )
    assert float(jax.nn.sigmoid(control.gate["0"]["offset"][0])) == pytest.approx(share, abs=0.01)

    def nats(control):
        found = blend.loss(WORLD)(control, frozen, batch, jax.random.split(jax.random.key(0), 400))
        return float(found.total / found.weight)

    assert nats(control) <= min(nats(mixture(-20.0, reads="none")), nats(mixture(20.0, reads="none")))


def test_a_fit_standardises_what_the_gate_reads_and_lowers_the_loss(small):
    root, lm, data = small
    tiny = dict(width=8, depth=1, heads=2, training=dict(steps=60, batch=6, tokens=8, warmup=1))
    training = dict(steps=30, batch=6, tokens=8, rate=3e-2, log_every=1)
    fitted = blend.fit(root, lm=lm, data=data, small=tiny, gate=dict(width=8, depth=1), observe=2, training=training)
    control = methods.load(fitted, open_lm(lm)[0])
    losses = [row["loss"] for row in fitted.rows("metrics.jsonl") if "loss" in row]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
    assert (
        control.mean.shape == (2,) and 0 < float(control.mean[0]) < np.log(270) and bool(jnp.all(control.deviation > 0))
    )


def test_bad_input_raises_one_sentence():
    for settings, words in [
        (dict(reads="entropy"), "reads is 'entropy', expected one of"),
        (dict(width=0), "width is 0 and depth 3"),
        (dict(scale=1.5), "scale is 1.5, expected a number from 0 to 1"),
        (dict(small={**SHAPE, "vocab": 2}), "The small model has a vocabulary of 2 tokens and the base model one of 3"),
    ]:
        with pytest.raises(InputError, match=words):
            blend.init(WORLD, jax.random.key(0), **{"small": SHAPE, **settings})
