"""Self-debiasing: three tokens by hand, its limits, descriptions as `forward` reads them, diagnosis, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain
from ctg_jax.controls import truncate
from ctg_jax.controls.streams import Stream
from ctg_jax.data.tokenizer import to_prompts
from ctg_jax.decode import loop
from ctg_jax.methods import self_debias
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages.controls import made
from ctg_jax.types import InputError

# After token 0 the model says p; after a description that ends with token 1 or 2 it says a or b.
WORLD = worlds.Bigram()
PARAMS = worlds.table([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.4, 0.4]])
BOTH, ONE = jnp.array([[[1], [2]]]), jnp.array([[[1]]])


def next_token(described, alpha=10.0, floor=0.01, cond=None, filters=()):
    stream = Stream(lm=WORLD, of="current", own="described", copies=described.shape[1])
    control = self_debias.SelfDebias(stream, jnp.float32(alpha), jnp.float32(floor), "strength" if cond else None)
    prompts = worlds.prompts([[0]], cond={"described": described, **(cond or {})})
    z = loop.forward(WORLD, PARAMS, prompts, jnp.zeros((1, 1), jnp.int32), Chain((*filters, control)))
    return np.asarray(jax.nn.softmax(z[0, 0]))


def test_three_tokens_by_hand():
    """The largest of a and b is .6, .4, .4, so Δ is -.1, -.1, -.2."""
    np.testing.assert_allclose(next_token(BOTH), (0.57236, 0.34342, 0.08422), atol=1e-5)
    # At strength 50 all three factors are the floor, so nothing changes.
    np.testing.assert_allclose(next_token(BOTH, alpha=50.0), (0.5, 0.3, 0.2), atol=1e-5)
    np.testing.assert_allclose(next_token(ONE, alpha=50.0), (0.0099, 0.59406, 0.39604), atol=1e-5)


def test_limits():
    for settings in (dict(alpha=0.0), dict(floor=1.0)):
        np.testing.assert_allclose(next_token(BOTH, **settings), (0.5, 0.3, 0.2), rtol=1e-6)
    np.testing.assert_allclose(next_token(jnp.array([[[0]]]), alpha=1e3), (0.5, 0.3, 0.2), rtol=1e-5)  # it says nothing
    # Without a floor, the token that the description prefers goes.
    np.testing.assert_allclose(next_token(ONE, alpha=1e4, floor=0.0), (0.0, 0.6, 0.4), atol=1e-6)
    # Below 0 it is raised by exp(.1 · 10).
    raised = np.array([0.5 * np.e, 0.3, 0.2])
    np.testing.assert_allclose(next_token(ONE, alpha=-10.0), raised / raised.sum(), rtol=1e-5)


def test_strength_per_row_and_a_filter_before():
    cond = {"strength": jnp.array([0.2])}
    np.testing.assert_allclose(next_token(BOTH, alpha=50.0, cond=cond), next_token(BOTH, alpha=10.0), rtol=1e-5)
    # Top-p .7 leaves .625 and .375, of which only the second is below what the descriptions say, by .025.
    kept = np.array([0.625, 0.375 * np.exp(-0.25), 0.0])
    found = next_token(BOTH, filters=(truncate.TopP(jnp.float32(0.7)),))
    np.testing.assert_allclose(found, kept / kept.sum(), rtol=1e-5)


def test_each_description_is_read_as_forward_reads_it(small):
    root, lm, _ = small
    model, params, tokenizer = open_lm(lm)
    told = ("so bad: ", "it is sad\n")
    artifact = stage(root, made, {"method": "self_debias", "init": dict(descriptions=told, alpha=300.0)}, lm=lm)
    control = methods.load(artifact, model)
    texts, completion = ["the soup", "it"], jnp.array([[1, 2], [3, 4]])
    cond = self_debias.conditions(artifact, lm, texts)
    prompts = to_prompts(tokenizer, texts, seed=0, cond=cond)
    z = loop.forward(model, params, prompts, completion)
    after = [to_prompts(tokenizer, [d + t for t in texts], seed=0) for d in told]
    q = jnp.max(jnp.stack([jax.nn.softmax(loop.forward(model, params, p, completion)) for p in after]), axis=0)
    expected = z + jnp.maximum(300.0 * jnp.minimum(jax.nn.softmax(z) - q, 0.0), jnp.log(0.01))
    found = loop.forward(model, params, prompts, completion, control)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert float(jnp.abs(found - z).max()) > 1e-3
    score = loop.score(model, params, prompts, completion, control)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(expected), completion[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(score, chosen, atol=1e-4)


def test_diagnosis_compares_the_first_tokens_of_two_answers(small):
    model, params, tokenizer = open_lm(small[1])
    asked = "{text}? {description}"
    given = dict(question=asked, answers=("good", "bad"), batch=2)
    found = self_debias.diagnosis(model, params, tokenizer, ["so", "nice"], ["fun", "sad", "day"], **given)
    assert found.shape == (2, 3)
    yes, no = (ids[0] for ids in tokenizer.encode_after(["a", "a"], ["good", "bad"]))
    z = loop.forward(model, params, to_prompts(tokenizer, ["nice? sad"], seed=0), jnp.zeros((1, 1), jnp.int32))[0, 0]
    p = jax.nn.softmax(z)
    np.testing.assert_allclose(found[1, 1], p[yes] / (p[yes] + p[no]), atol=1e-6)
    for change, words in [
        (dict(answers=("good", "good")), "first tokens are the same"),
        (dict(question="{text}?"), "expected a text with {text} and {description}"),
    ]:
        with pytest.raises(InputError, match=words):
            self_debias.diagnosis(model, params, tokenizer, ["a"], ["b"], **{**given, **change})
    with pytest.raises(InputError, match="0 texts and 1 descriptions"):
        self_debias.diagnosis(model, params, tokenizer, [], ["b"])


def test_the_sizes_of_the_paper_fit_on_paper():
    from configs.self_debias import PAPER

    lm = Transformer.gpt2(width=1600, depth=2, heads=25)
    for settings in (PAPER, {}):
        copies = len(settings.get("descriptions", self_debias.DESCRIPTIONS))
        own = self_debias.own_entry(settings.get("descriptions", self_debias.DESCRIPTIONS))
        cond = {own: jax.ShapeDtypeStruct((1, copies, 20), jnp.int32)}
        out = worlds.written_on_paper(lm, lambda key, s=settings: self_debias.init(lm, key, **s), cond=cond)
        assert out.tokens.shape == (1, 2)


def test_bad_input_raises_one_sentence():
    key = jax.random.key(0)
    for settings, words in [
        (dict(descriptions=()), "expected a list of at least one text"),
        (dict(descriptions="bad"), "descriptions is 'bad', expected a list"),
        (dict(descriptions=("",)), "that is not empty"),
        (dict(alpha=float("nan")), "alpha is nan"),
        (dict(floor=1.5), "floor is 1.5, expected a factor from 0 to 1"),
    ]:
        with pytest.raises(InputError, match=words):
            self_debias.init(WORLD, key, **settings)
    control = self_debias.init(WORLD, key, descriptions=("x",))
    with pytest.raises(InputError, match=r"prompts.cond\['self_debias [0-9a-f]{8}'\]"):
        loop.forward(WORLD, PARAMS, worlds.prompts([[0]]), jnp.zeros((1, 1), jnp.int32), control)
    long = jnp.zeros((1, 1, 40), jnp.int32)
    with pytest.raises(InputError, match="the stream's context is 32: shorten it"):
        next_token(long)
