"""Proxy-tuning: three tokens by hand, another size of model, extra tokens, a template, vocabularies, bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods, tree
from ctg_jax.control import IDENTITY
from ctg_jax.controls.experts import experts
from ctg_jax.controls.streams import Stream
from ctg_jax.data.tokenizer import to_prompts, train_bpe
from ctg_jax.decode import loop
from ctg_jax.learn.pretrain import sibling, small_lm
from ctg_jax.methods import proxy
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.pattern import Layer
from ctg_jax.models.record import of_record, record
from ctg_jax.run.stage import open_artifact, open_lm, stage
from ctg_jax.stages.controls import made
from ctg_jax.stages.sources import load_data
from ctg_jax.types import InputError

WORLD, WIDER = worlds.Bigram(), worlds.Bigram(vocab=4)
BASE = worlds.table([[0.5, 0.3, 0.2]] * 3)
PLUS, MINUS = worlds.table([[0.6, 0.3, 0.1]] * 3), worlds.table([[0.2, 0.4, 0.4]] * 3)
HP = dict(adapter=dict(rank=2), training=dict(steps=3, batch=4, tokens=16, warmup=1))
SMALL = dict(width=8, depth=1, heads=2, training=dict(steps=2, batch=4, tokens=16, warmup=1))


def next_token(expert, anti, alpha=1.0):
    control = experts(expert, anti, alpha, trim=True)
    z = loop.forward(WORLD, BASE, worlds.prompts([[0]]), jnp.zeros((1, 1), jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[0, 0]))


def test_three_tokens_by_hand():
    plus, minus = Stream(PLUS, lm=WORLD), Stream(MINUS, lm=WORLD)
    np.testing.assert_allclose(next_token(plus, minus), (0.84507, 0.12676, 0.02817), atol=1e-5)
    np.testing.assert_allclose(next_token(plus, minus, 0.0), (0.5, 0.3, 0.2), rtol=1e-6)
    # A proxy that is the base itself gives the expert.
    np.testing.assert_allclose(next_token(plus, Stream(BASE, lm=WORLD)), (0.6, 0.3, 0.1), rtol=1e-5)


def test_tokens_that_the_base_lacks_are_left_out():
    wide = worlds.table([[0.3, 0.15, 0.05, 0.5]] * 4)  # .6, .3, .1 on the base's tokens
    minus = Stream(MINUS, lm=WORLD)
    np.testing.assert_allclose(next_token(Stream(wide, lm=WIDER), minus), (0.84507, 0.12676, 0.02817), atol=1e-5)
    with pytest.raises(InputError, match="expert has a vocabulary of 4 tokens and the base model one of 3"):
        control = experts(Stream(wide, lm=WIDER), minus)
        loop.forward(WORLD, BASE, worlds.prompts([[0]]), jnp.zeros((1, 1), jnp.int32), control)


def test_fit_with_a_small_model_of_another_size(small):
    root, lm, data = small
    fitted = proxy.fit(root, lm=lm, data=data, small=SMALL, before="so ", after="!", alpha=0.7, **HP)
    model, params, tokenizer = open_lm(lm)
    control = methods.load(fitted, model)
    assert (control.expert.lm.width, control.expert.lm.depth, model.width) == (8, 1, 16)
    assert tree.size_bytes(control) < 4 * tree.size_bytes(params)
    trained = stage(root, sibling, SMALL, lm=lm, data=data)
    other, theirs, tokens = open_lm(trained)
    assert tokens.to_json() == tokenizer.to_json()
    jax.tree.map(np.testing.assert_array_equal, control.anti.params, theirs)
    texts, completion = ["good", "a day"], jnp.array([[1, 2], [3, 4]])
    prompts = to_prompts(tokenizer, texts, seed=0, cond=proxy.conditions(fitted, lm, texts))
    told = to_prompts(tokenizer, [f"so {t}!" for t in texts], seed=0)
    z = loop.forward(model, params, prompts, completion)
    plus = loop.forward(other, theirs, told, completion, control.expert.control)
    minus = loop.forward(other, theirs, prompts, completion)
    found = loop.forward(model, params, prompts, completion, control)
    np.testing.assert_allclose(found, z + 0.7 * (plus - minus), rtol=1e-4, atol=1e-4)


def test_both_sides_may_be_tuned(small):
    """DExperts with experts of another size: the sides are changes of low rank of one small model."""
    root, lm, data = small
    model = open_lm(lm)[0]
    short = dict(adapter=dict(rank=2), training=dict(steps=2, batch=4, tokens=12))
    other = dict(width=8, depth=1, heads=2, training=dict(steps=2, batch=4, tokens=12, warmup=1))
    artifact = proxy.fit(root, lm=lm, data=data, small=other, anti={"label": 0}, **short)
    control = methods.load(artifact, model)
    changes = [side.control.changes for side in (control.expert, control.anti)]
    assert all(set(c) == {"a", "b"} for side in changes for c in side.values())
    assert any(np.abs(np.asarray(x - y)).max() > 0 for x, y in zip(*map(jax.tree.leaves, changes)))
    jax.tree.map(np.testing.assert_array_equal, control.expert.params, control.anti.params)
    assert control.expert.lm.width == 8 != model.width


def test_a_small_model_may_have_texts_of_its_own(small):
    root, lm, data = small
    texts = dict(source="bundled:reviews", split="validation", limit=4)
    own = small_lm(root, SMALL | dict(texts=texts), lm=lm, data=data)
    assert own.spec["inputs"]["data"] == stage(root, load_data, texts).id != data.id
    assert small_lm(root, SMALL, lm=lm, data=data).spec["inputs"]["data"] == data.id


def test_models_from_folders(small, tmp_path):
    root, lm, data = small
    model, params, tokenizer = open_lm(lm)
    other, theirs, _ = open_lm(stage(root, sibling, SMALL, lm=lm, data=data))
    for name, factor in (("plus", 1.0), ("minus", 0.8)):
        hf.save(tmp_path / name, other, jax.tree.map(lambda x, f=factor: f * x, theirs))
        tokenizer.save(tmp_path / name)
    settings = dict(expert=str(tmp_path / "plus"), anti=str(tmp_path / "minus"))
    artifact = stage(root, made, {"method": "proxy", "init": settings}, lm=lm)
    control = methods.load(artifact, model)
    prompts, completion = worlds.prompts([[1, 2]]), jnp.array([[3, 4]])
    z, found = (loop.forward(model, params, prompts, completion, c) for c in (IDENTITY, control))
    plus, minus = (loop.forward(other, hf.load(settings[n])[1], prompts, completion) for n in ("expert", "anti"))
    np.testing.assert_allclose(found, z + plus - minus, rtol=1e-4, atol=1e-4)
    # The same number of tokens, but other tokens.
    train_bpe(["zz zz zzz zzzz zz z zzz"] * 4, model.vocab).save(tmp_path / "minus")
    with pytest.raises(InputError, match=r"minus does not have the vocabulary of the base model: token 2\d\d is"):
        stage(root, made, {"method": "proxy", "init": settings}, lm=lm)
    with pytest.raises(InputError, match=r"load_lm-[0-9a-f]+ does not have the vocabulary"):
        proxy.fit(root, lm=lm, data=data, small={"source": str(tmp_path / "minus")}, **HP)


def test_a_decoder_as_plain_values():
    lm = Transformer.llama(vocab=8, width=8, depth=1, heads=2, kv_heads=1, mlp_width=8, context=9, remat=True)
    values = record(lm)
    assert of_record(values) == Transformer(**{**vars(lm), "remat": False}) and "remat" not in values
    windows = dataclasses.replace(of_record(values), depth=2, pattern=(Layer(window=4), Layer()))
    assert of_record(json.loads(json.dumps(record(windows)))) == windows
    scaled = Transformer(**{**vars(of_record(values)), "rope_scaling": ("linear", 2.0)})
    assert of_record({**record(scaled), "rope_scaling": ["linear", 2.0]}) == scaled


def test_the_sizes_of_the_paper_fit_on_paper():
    from configs.proxy import PAPER

    sizes = dict(vocab=32000, depth=2, context=4096, dtype="bfloat16", param_dtype="bfloat16")
    small = Transformer.llama(width=4096, heads=32, kv_heads=32, mlp_width=11008, **sizes)
    large = Transformer.llama(width=8192, heads=64, kv_heads=8, mlp_width=28672, **sizes)
    settings = PAPER | dict(expert=record(small), anti=record(small))
    cond = {proxy.own_entry(PAPER["before"], PAPER["after"]): jax.ShapeDtypeStruct((1, 12), jnp.int32)}
    out = worlds.written_on_paper(large, lambda key: proxy.init(large, key, **settings), cond=cond)
    assert out.tokens.shape == (1, 2)


def test_bad_input_raises_one_sentence(small):
    shape = record(worlds.tiny(vocab=9))
    key = jax.random.key(0)
    with pytest.raises(InputError, match="expert has a vocabulary of 9 tokens and the base model one of 11"):
        proxy.init(worlds.tiny(), key, expert=shape, anti=shape)
    shape = record(worlds.tiny())
    with pytest.raises(InputError, match="alpha is nan"):
        proxy.init(worlds.tiny(), key, expert=shape, anti=shape, alpha=float("nan"))
    with pytest.raises(InputError, match="expected the folder or hub id of a model"):
        proxy.make(worlds.tiny(), key, tokenizer=None, expert=shape, anti=shape)
    root, lm, data = small
    with pytest.raises(InputError, match="width is 9, which heads=2 does not divide"):
        proxy.fit(root, lm=lm, data=data, small=dict(width=9, heads=2))
    assert open_artifact(lm.path).id == lm.id
