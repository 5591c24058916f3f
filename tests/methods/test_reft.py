"""LoReFT: the edit by hand, an orthonormal basis, a fit that learns, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.decode import loop
from ctg_jax.learn.losses import control_loss
from ctg_jax.methods import reft
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError

LM = worlds.tiny()


def test_the_edit_by_hand():
    """R = (.6, .8, 0), W = (1, 0, 0), b = .5 on three tokens: h + Rᵀ (W h + b − R h)."""
    control = reft.Reft(
        jnp.array([[[0.6, 0.8, 0]]]), jnp.array([[[1.0, 0, 0]]]), jnp.array([[0.5]]), jnp.ones(()), sites=(1,)
    )
    h = jnp.eye(3)[None]
    state = control.init(worlds.prompts([[0, 1, 2]]), 4)
    move = np.array([1 + 0.5 - 0.6, 0.5 - 0.8, 0.5])[:, None] * np.array([[0.6, 0.8, 0]])
    for site in (1, jnp.int32(1)):
        np.testing.assert_allclose(control.hidden(h, site, None, state)[0], np.eye(3) + move, atol=1e-6)
    for site in (0, jnp.int32(2), jnp.int32(5)):
        np.testing.assert_array_equal(control.hidden(h, site, None, state), h)


def test_rows_are_orthonormal_and_stay_where_they_are():
    basis = jax.random.normal(jax.random.key(0), (2, 3, 8))
    rows = reft.orthonormal(basis)
    np.testing.assert_allclose(jnp.einsum("srd,sqd->srq", rows, rows), np.tile(np.eye(3), (2, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(reft.orthonormal(rows), rows, atol=1e-5)


def test_it_changes_nothing_at_first_and_learns():
    params, control = worlds.lively(LM), reft.init(LM, jax.random.key(0), rank=2)
    prompts, text = worlds.prompts([[1, 2]]), jnp.array([[3, 4, 5]])
    base, same = (loop.forward(LM, params, prompts, text, c) for c in (reft.neutral(control), control))
    np.testing.assert_allclose(base, same, atol=1e-3)
    batch = {"tokens": jnp.array([[1, 2, 3, 4]] * 2), "mask": jnp.ones((2, 4), bool), "ids": jnp.arange(2)}
    frozen, key = {"params": params}, jax.random.split(jax.random.key(0), 2)
    loss = control_loss(LM)
    learned, _ = worlds.trained(loss, control, frozen, [batch] * 40, rate=5e-2, trained="basis|map|bias")
    before, after = (float(loss(c, frozen, batch, key).total) for c in (control, learned))
    assert after < 0.8 * before and float(learned.scale) == 1


def test_fit(small):
    root, lm, data = small
    tiny = dict(rank=2, sites=[1], training=dict(steps=2, batch=4, tokens=16))
    fitted = reft.fit(root, lm=lm, data=data, where=dict(label=1), positions="answer", **tiny)
    control = methods.load(fitted, open_lm(lm)[0])
    assert control.sites == (1,) and control.basis.shape == (1, 2, 16) and control.positions.part == "answer"
    with pytest.raises(InputError, match="rank is 99, expected from 1 to 16"):
        reft.init(LM, jax.random.key(0), rank=99)
    with pytest.raises(InputError, match="texts have no roles"):
        reft.fit(root, lm=lm, data=data, positions=dict(roles=("user",)), **tiny)


def test_the_widths_of_the_paper_on_paper():
    """`:paper`, with two of its layers: shapes alone, no array is made."""
    lm = Transformer.llama(vocab=32000, width=4096, depth=2, heads=32, kv_heads=32, mlp_width=11008, context=4096)
    out = worlds.written_on_paper(lm, lambda key: reft.init(lm, key, rank=4, sites="all"))
    assert out.tokens.shape == (1, 2)
