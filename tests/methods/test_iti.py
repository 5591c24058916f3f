"""Inference-time intervention: a move of the heads equals a bias behind the output product, in every kind of attention;
heads by hand; a fit that finds the heads which know."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.controls.bank import bank
from ctg_jax.decode import loop
from ctg_jax.mesh.plan import Plan
from ctg_jax.mesh.rules import DECODER
from ctg_jax.methods import iti
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError, Sampling
from tests.methods.conftest import BAD, GOOD

ROWS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


def grouped():
    """Three heads for each of two of keys and values, and heads that are wider than width / heads, as Gemma has."""
    more = dict(mlp_width=24, context=32, head_dim=8, bias_out=True, norms=("attn_norm", "attn_post_norm", "mlp_norm"))
    return Transformer.llama(vocab=11, width=12, depth=2, heads=6, kv_heads=2, **more)


@pytest.mark.parametrize("lm", [worlds.tiny(), grouped()], ids=["gpt2", "grouped"])
def test_it_is_a_bias_behind_the_output_product(lm):
    """b + W_O α σ θ in the weights gives the same text and probabilities, padded and with a cache."""
    params = worlds.lively(lm)
    control = iti.example(lm, jax.random.key(1)).replace(scale=jnp.float32(0.7))
    push = (0.7 * control.deviation[..., None] * control.direction).reshape(lm.depth, -1)
    out = params["layers"]["attn"]["out"]
    moved = out["bias"] + jnp.einsum("lde,le->ld", out["kernel"], push, precision="highest")
    attention = {**params["layers"]["attn"], "out": {**out, "bias": moved}}
    biased = {**params, "layers": {**params["layers"], "attn": attention}}
    prompts = worlds.prompts(ROWS)
    found = loop.generate(lm, params, prompts, control, Sampling(max_new=4))
    wanted = loop.generate(lm, biased, prompts, sampling=Sampling(max_new=4))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.logp, wanted.logp, atol=1e-4)
    a, b = loop.forward(lm, params, prompts, found.tokens, control), loop.forward(lm, biased, prompts, found.tokens)
    np.testing.assert_allclose(a, b, atol=2e-4)
    assert float(jnp.max(jnp.abs(b - loop.forward(lm, params, prompts, found.tokens)))) > 0.1


def test_it_acts_alike_where_heads_are_divided_among_devices():
    """Two devices hold a head each, four have rows of their own."""
    lm, plan = worlds.tiny(), Plan(axes={"data": 4, "tensor": 2}, rules=DECODER)
    params, control = worlds.lively(lm), iti.example(lm, jax.random.key(1))
    prompts, sampling = worlds.prompts([*ROWS, [10, 1]]), Sampling(max_new=4)
    wanted = loop.generate(lm, params, prompts, control, sampling)
    found = loop.generate(lm, jax.device_put(params, plan.shardings(params)), prompts, control, sampling)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.logp, wanted.logp, atol=1e-5)


def test_a_bank_gives_every_row_its_own():
    lm = worlds.tiny()
    params, controls = worlds.lively(lm), [iti.example(lm, jax.random.key(i)) for i in range(3)]
    prompts, text = worlds.prompts(ROWS, cond={"entry": jnp.array([2, 0, 1])}), jnp.array([[1, 2], [3, 4], [5, 6]])
    found = loop.forward(lm, params, prompts, text, bank(controls))
    for row, control in zip((1, 2, 0), controls):
        alone = loop.forward(lm, params, prompts.replace(cond=None), text, control)
        np.testing.assert_allclose(found[row], alone[row], atol=1e-4)


def test_heads_by_hand():
    """α = 2, σ = 3 and θ = (.6, .8) move the second head of the second block by (3.6, 4.8) and nothing else, from the
    last token of the prompt on."""
    lm = worlds.tiny()
    control = iti.init(dataclasses.replace(lm, head_dim=2), jax.random.key(0))
    control = control.replace(
        direction=control.direction.at[1, 1].set(jnp.array([0.6, 0.8])),
        deviation=control.deviation.at[1, 1].set(3.0),
        scale=jnp.float32(2.0),
    )
    y, pos = jnp.zeros((1, 3, 2, 2)), jnp.array([[0, 1, 2]])
    state = control.began(control.init(worlds.prompts([[1, 2]]), 4), jnp.array([2]), jnp.array([0]))
    np.testing.assert_array_equal(control.heads(y, 1, pos, state), y)
    for layer in (2, jnp.int32(2)):
        found = np.asarray(control.heads(y, layer, pos, state))
        np.testing.assert_allclose(found[0, :, 1], [[0, 0], [3.6, 4.8], [3.6, 4.8]], rtol=1e-6)
        assert not found[0, :, 0].any()
    with pytest.raises(InputError, match="2 heads of 2 features, but the model has 2 of 8"):
        control.heads(jnp.zeros((1, 3, 2, 8)), 1, pos, state)


def test_what_is_read_is_what_the_output_product_reads():
    """Its product with W_O is what attention adds to the stream: read off a model without MLP, [L, heads, H] a text."""
    lm = worlds.tiny(depth=1)
    params = worlds.lively(lm)
    layer = params["layers"]
    silent = jax.tree.map(jnp.zeros_like, layer["mlp"])
    params = {**params, "layers": {**layer, "mlp": silent}}
    tokens, mask = jnp.array([[1, 2, 3]]), jnp.ones((1, 3), bool)
    y = iti.head_outputs(lm, params, tokens, mask, mask, how="last")
    assert y.shape == (1, 1, 2, 8)
    taps = lm.apply(params, lm.embed(params, tokens), mask, tap=lambda h: h[:, -1]).taps
    out = layer["attn"]["out"]
    added = jnp.einsum("de,be->bd", out["kernel"][0], y.reshape(1, 16), precision="highest") + out["bias"]
    np.testing.assert_allclose(taps[1] - taps[0], added, atol=1e-4)
    apart = lm.apply(lm.unstack(params), lm.embed(params, tokens), mask, tap_heads=lambda y: y[:, -1]).heads
    np.testing.assert_allclose(apart[:, 0], y[0], atol=1e-5)


def test_fit(small):
    """Directions have length 1 and point to the target; the heads with the best held-out accuracy act, and no other."""
    root, lm, data = small
    for kind in iti.KINDS:
        fitted = iti.fit(root, lm=lm, data=data, kind=kind, top=1, tokens=16, heldout=0.5, scale=5.0)
        rows = fitted.metrics()
        chosen = [row["heldout_accuracy"] for row in rows if row["chosen"]]
        assert len(chosen) == 1 and min(chosen) >= max(r["heldout_accuracy"] for r in rows if not r["chosen"])
        model, params, tokenizer = open_lm(lm)
        control = methods.load(fitted, model)
        np.testing.assert_allclose(jnp.linalg.norm(control.direction, axis=-1), 1.0, rtol=1e-5)
        acts = np.asarray(control.deviation) > 0
        assert [bool(row["chosen"]) for row in rows] == acts.reshape(-1).tolist() and float(control.scale) == 5.0
        sides = []
        for texts in (GOOD, BAD):
            batch = worlds.prompts([tokenizer.begun(ids) for ids in tokenizer.encode(texts)])
            sides.append(iti.head_outputs(model, params, batch.tokens, batch.mask, batch.mask, how="last"))
        apart = np.einsum("lhd,lhd->lh", np.asarray(sides[0].mean(0) - sides[1].mean(0)), control.direction)
        assert (apart[acts] > 0).all()


def test_the_deviation_is_that_of_all_texts(small):
    root, lm, data = small
    fitted = iti.fit(root, lm=lm, data=data, top=1, tokens=16, heldout=0.5)
    control = methods.load(fitted, open_lm(lm)[0])
    layer, head = np.argwhere(np.asarray(control.deviation) > 0)[0]
    model, params, tokenizer = open_lm(lm)
    batch = worlds.prompts([tokenizer.begun(ids) for ids in tokenizer.encode([*GOOD, *BAD])])
    y = np.asarray(iti.head_outputs(model, params, batch.tokens, batch.mask, batch.mask, how="last"))
    along = y[:, layer, head] @ np.asarray(control.direction)[layer, head]
    np.testing.assert_allclose(control.deviation[layer, head], along.std(), rtol=1e-3)


def test_bad_input(small):
    root, lm, data = small
    with pytest.raises(InputError, match="kind is 'pca', expected one of mean, probe"):
        iti.fit(root, lm=lm, data=data, kind="pca")
    with pytest.raises(InputError, match="top is 0, expected at least 1"):
        iti.fit(root, lm=lm, data=data, top=0, tokens=16, heldout=0.5)
    with pytest.raises(InputError, match="Bigram has no attention heads"):
        iti.init(worlds.Bigram(), jax.random.key(0))


def test_the_widths_of_the_paper_on_paper():
    """`:paper`, with two of its layers: shapes alone, no array is made."""
    lm = Transformer.llama(vocab=32000, width=4096, depth=2, heads=32, kv_heads=32, mlp_width=11008, context=2048)
    out = worlds.written_on_paper(lm, lambda key: iti.init(lm, key))
    assert out.tokens.shape == (1, 2)
