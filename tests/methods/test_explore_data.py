"""Contrastive exploration: three tokens by hand, what is plausible, novel tokens, rounds of a fit, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods, tree
from ctg_jax.control import IDENTITY
from ctg_jax.controls.streams import Stream
from ctg_jax.decode import loop
from ctg_jax.methods import explore_data
from ctg_jax.models import hf
from ctg_jax.run.stage import open_artifact, open_lm, stage
from ctg_jax.stages.controls import made
from ctg_jax.types import InputError

WORLD = worlds.Bigram()
PRE, TUNED = (worlds.table([row] * 3) for row in ((0.5, 0.3, 0.2), (0.6, 0.3, 0.1)))


def next_token(alpha=1.0, plausible=0.0, pre=PRE, tuned=TUNED, cond=None):
    numbers = jnp.float32(alpha), jnp.float32(plausible)
    control = explore_data.Explore(IDENTITY, Stream(pre, lm=WORLD), *numbers, "strength" if cond else None)
    prompts = worlds.prompts([[0]], cond=cond)
    z = loop.forward(WORLD, tuned, prompts, jnp.zeros((1, 1), jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[0, 0]))


def test_three_tokens_by_hand():
    """The ratios are 1.2, 1 and .5."""
    np.testing.assert_allclose(next_token(), (0.44444, 0.37037, 0.18519), atol=1e-5)
    np.testing.assert_allclose(next_token(plausible=0.2), (0.54545, 0.45455, 0), atol=1e-5)
    for strength in (0.0, 1.0):
        found = next_token(plausible=0.2, cond={"strength": jnp.array([strength])})
        np.testing.assert_allclose(found, next_token(alpha=strength, plausible=0.2), atol=1e-6)
    np.testing.assert_allclose(next_token(alpha=0.0, plausible=0.2), (0.6, 0.3, 0.1), rtol=1e-5)  # nothing is removed


def test_limits():
    uniform = worlds.table([[1 / 3] * 3] * 3)
    np.testing.assert_allclose(next_token(pre=uniform, plausible=0.2), (2 / 3, 1 / 3, 0), atol=1e-5)
    np.testing.assert_allclose(next_token(pre=TUNED, plausible=0.2), (0.5, 0.5, 0), atol=1e-5)


def test_a_novel_token_rises_without_bound():
    """Of tuned = .9 pre + .1 novel, old tokens keep the ratio .9, and the novel one has .9 + .1 / pre."""
    for rare in (0.1, 0.01):
        pre = np.array([0.7, 0.3 - rare, rare])
        tuned = 0.9 * pre + 0.1 * np.array([0, 0, 1])
        ratio = np.array([0.9, 0.9, 0.9 + 0.1 / rare])
        found = next_token(pre=worlds.table([pre] * 3), tuned=worlds.table([tuned] * 3))
        np.testing.assert_allclose(found, ratio / ratio.sum(), rtol=1e-4)


def test_the_contrast_is_the_frozen_model(small, tmp_path):
    root, lm, data = small
    hp = dict(adapter=dict(rank=2), training=dict(steps=3, batch=4, tokens=16, warmup=1))
    fitted = explore_data.fit(root, lm=lm, data=data, plausible=0.0, alpha=0.5, **hp)
    model, params, tokenizer = open_lm(lm)
    control = methods.load(fitted, model)
    assert tree.size_bytes(control) < 0.2 * tree.size_bytes(params)
    prompts, completion = worlds.prompts([[1, 2, 3], [4]]), jnp.array([[1, 2], [3, 4]])
    pre, tuned, found = (
        loop.forward(model, params, prompts, completion, c) for c in (IDENTITY, control.tuned, control)
    )
    np.testing.assert_allclose(found, tuned - 0.5 * jax.nn.log_softmax(pre), rtol=1e-4, atol=1e-4)
    hf.save(tmp_path / "pre", model, jax.tree.map(lambda x: 0.9 * x, params))
    tokenizer.save(tmp_path / "pre")
    settings = dict(pretrained=str(tmp_path / "pre"), plausible=0.0)
    other = methods.load(stage(root, made, {"method": "explore_data", "init": settings}, lm=lm), model)
    before = loop.forward(model, hf.load(tmp_path / "pre")[1], prompts, completion)
    found = loop.forward(model, params, prompts, completion, other)
    np.testing.assert_allclose(found, pre - jax.nn.log_softmax(before), rtol=1e-4, atol=1e-4)


def test_rounds_train_the_contrast_on_what_was_written(small):
    root, lm, data = small
    hp = dict(adapter=dict(rank=2), training=dict(steps=3, batch=4, tokens=16, warmup=1))
    again = dict(explore=dict(n=4, max_new=3, batch=4), contrast=dict(adapter=dict(rank=2), training=hp["training"]))
    fitted = explore_data.fit(root, lm=lm, data=data, rounds=2, opening="so", **again, **hp)
    control = methods.load(fitted, open_lm(lm)[0])
    moved = [float(jnp.abs(x).max()) for p, x in tree.flatten(control.contrast.control).items() if p.endswith("/b")]
    assert max(moved) > 0 and control.tuned.changes.keys() == control.contrast.control.changes.keys()
    seen = open_artifact(root / f"contrasted-{fitted.spec['inputs']['seen']}")
    inputs = [root / f"sample-{i}" / "samples.jsonl" for i in seen.spec["inputs"]["samples"]]
    assert len(inputs) == 2 and all(len(path.read_text().splitlines()) == 4 for path in inputs)
    assert inputs[0].read_text() != inputs[1].read_text()


def test_bad_input_raises_one_sentence(small):
    key, lm = jax.random.key(0), worlds.tiny()
    for settings, words in [
        (dict(alpha=float("nan")), "alpha is nan"),
        (dict(plausible=2.0), "plausible is 2.0, expected a share from 0 to 1"),
        (dict(adapter=dict(kind="prompt")), "kind is 'prompt', expected 'lora' or 'full'"),
    ]:
        with pytest.raises(InputError, match=words):
            explore_data.init(lm, key, **settings)
    root, model, data = small
    with pytest.raises(InputError, match="needs pretrained, the model before it was tuned, or a fit"):
        stage(root, made, {"method": "explore_data", "init": {"alpha": 1.0}}, lm=model)
    with pytest.raises(InputError, match="rounds is -1"):
        explore_data.fit(root, lm=model, data=data, rounds=-1)
    other = worlds.Bigram(vocab=4)
    control = explore_data.Explore(IDENTITY, Stream(other.init(key), lm=other), jnp.float32(1), jnp.float32(0.1))
    with pytest.raises(InputError, match="has a vocabulary of 4 tokens and the tuned one of 3"):
        loop.forward(WORLD, PRE, worlds.prompts([[0]]), jnp.zeros((1, 1), jnp.int32), control)
