"""Layers of several kinds: windows and rotations by layer, scanned, unrolled, cached, and above a site."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.models.decoder import Transformer
from ctg_jax.models.pattern import Layer, views
from ctg_jax.types import InputError

PATTERN = (Layer(window=3, theta=50.0), Layer(rotary=False), Layer())
LM = Transformer.llama(
    **dict(vocab=24, width=16, depth=5, heads=4, kv_heads=2, mlp_width=24, context=32),
    **dict(rope_theta=500.0, pattern=PATTERN, qk_norm="head", norms=("attn_norm", "mlp_norm", "mlp_post_norm")),
)
PARAMS = jax.jit(lambda key: jax.tree.map(lambda x: 5 * x, LM.init(key)))(jax.random.key(0))
TOKENS = jnp.arange(20).reshape(2, 10)
MASK = jnp.arange(10)[None, :] >= jnp.array([0, 3])[:, None]


def _logits(lm, params, tokens=TOKENS, mask=MASK):
    return jax.jit(lambda p: lm.apply(p, lm.embed(p, tokens), mask).logits)(params)


def close(a, b):
    np.testing.assert_allclose(np.where(MASK[:, :, None], a, 0), np.where(MASK[:, :, None], b, 0), atol=2e-5)


def test_scanned_and_unrolled_layers_agree():
    """The depth is no multiple of the pattern."""
    whole = _logits(LM, PARAMS)
    close(_logits(LM, LM.unstack(PARAMS)), whole)
    turned = dataclasses.replace(LM, pattern=PATTERN[1:] + PATTERN[:1])
    assert np.abs(_logits(turned, PARAMS) - whole).max() > 0.01
    kept = dataclasses.replace(LM, remat=True)
    one, other = (jax.jit(jax.grad(lambda p, m=m: jnp.sum(_logits(m, p) ** 2)))(PARAMS) for m in (LM, kept))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), one, other)


def test_the_blocks_above_a_site_keep_their_kinds():
    params = LM.unstack(PARAMS)
    whole = LM.apply(params, LM.embed(params, TOKENS), MASK, tap=lambda h: h)
    for site in (1, 2, 4):
        upper, weights = LM.above(params, site)
        assert [upper.pattern[i % 3] for i in range(upper.depth)] == [PATTERN[i % 3] for i in range(site, LM.depth)]
        close(upper.apply(weights, whole.taps[site], MASK).logits, whole.logits)


def test_windows_count_positions_and_never_hide_a_prefix():
    """A hole in a row takes slots and no positions. Slots of a prefix have negative positions."""
    pos = jnp.array([[0, 0, 1, 1, 2, 3]])
    mask = jnp.array([[True, False, True, False, True, True]])
    causal = jnp.tril(jnp.ones((6, 6), bool))[None] & mask[:, None, :]
    (seen, _), (full, _) = (
        views((kind,), causal, pos, pos, lambda kind, pos: None)(1) for kind in (Layer(window=2), Layer())
    )
    assert seen[0, 5].tolist() == [False, False, False, False, True, True]
    assert seen[0, 4].tolist() == [False, False, True, False, True, False]
    assert full[0, 5].tolist() == mask[0].tolist()
    slots = jnp.array([[-2, -1, 0, 1, 2, 3]])
    behind = views((Layer(window=1),), jnp.ones((1, 1, 6), bool), pos[:, -1:], slots, lambda kind, pos: None)(1)[0]
    assert behind[0, 0].tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(pattern=()), "expected at least one layer"),
        (dict(pattern=(Layer(window=0),)), "windows of at least 1"),
        (dict(causal=False), "causal=False"),
        (dict(norms=("attn_norm", "final")), "norms holds 'final', expected some of attn_norm"),
        (dict(qk_norm="row"), "qk_norm is 'row', expected None, 'head'"),
        (dict(rotary_dim=5), "rotary_dim is 5, expected 1 to 4, the features of a head"),
        (dict(bias_head=True, tied=True), "bias_head is True where tied is"),
    ],
)
def test_choices_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(LM, **changes)
