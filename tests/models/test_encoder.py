"""The encoder by itself: padding, pooling, position buckets, shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.models.encoder import Encoder, position_buckets
from ctg_jax.types import InputError

SIZES = dict(vocab=23, width=8, depth=2, heads=2, head_dim=4, mlp_width=12, context=12)
BERT = Encoder(**SIZES, position_rows=12, types=2, head="tanh", labels=("no", "yes"))
T5 = Encoder(
    **SIZES, family="t5", norm="rms", pre_norm=True, bias=False, scaled=False, gated=True, activation="gelu_new"
)
ROBERTA = dataclasses.replace(BERT, family="roberta", position_rows=14, position_start=2, pad=1, types=1)


def _params(encoder):
    """Random everywhere, also where `init` gives zeros and ones; drawn by numpy, which compiles nothing."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


@pytest.mark.parametrize("encoder", [BERT, ROBERTA, T5], ids=lambda e: e.family)
def test_a_row_does_not_depend_on_its_padding(encoder):
    encoder = dataclasses.replace(encoder, pooling="mean" if encoder is BERT else "cls", project=5, unit=True)
    params = _params(encoder)
    row, alone = jnp.array([[5, 9, 2, 7]]), jnp.ones((1, 4), bool)
    lefts = (0, 3, 6)
    tokens = jnp.concatenate([jnp.pad(row, ((0, 0), (n, 6 - n)), constant_values=11) for n in lefts])
    mask = jnp.concatenate([jnp.pad(alone, ((0, 0), (n, 6 - n))) for n in lefts])
    together, expected = encoder.apply(params, tokens, mask), encoder.apply(params, row, alone)
    for n, hidden in zip(lefts, together):
        np.testing.assert_allclose(hidden[n : n + 4], expected[0], atol=1e-5)
    for read in (encoder.embed, encoder.classify) if encoder.labels else (encoder.embed,):
        expected = np.broadcast_to(read(params, row, alone), (3, 2 if read == encoder.classify else 5))
        np.testing.assert_allclose(read(params, tokens, mask), expected, atol=1e-5)


def test_pooling_projection_and_length():
    plain = dataclasses.replace(BERT, labels=(), head="")
    full = dataclasses.replace(plain, project=3, unit=True)
    assert (plain.embed_width, full.embed_width) == (8, 3)
    params = _params(full)
    tokens = jnp.array([[3, 4, 5], [6, 7, 0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    hidden = np.asarray(plain.apply(params, tokens, mask))
    mean = np.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    np.testing.assert_allclose(plain.embed(params, tokens, mask), mean, atol=1e-6)
    cls = dataclasses.replace(plain, pooling="cls")
    np.testing.assert_allclose(cls.embed(params, tokens, mask), hidden[:, 0], atol=1e-6)
    projected = mean @ np.asarray(params["project"]["kernel"]).T
    expected = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(full.embed(params, tokens, mask), expected, atol=1e-6)


def test_an_empty_row_is_finite():
    params = _params(BERT)
    mask = jnp.zeros((1, 3), bool)
    tokens = jnp.zeros((1, 3), int)
    assert np.isfinite(BERT.embed(params, tokens, mask)).all()
    assert np.isfinite(BERT.classify(params, tokens, mask)).all()


def test_position_buckets_by_hand():
    """8 buckets up to distance 8: four a sign; 0 and 1 exact, then [2, 4) and [4, …) in powers of two."""
    row = position_buckets(20, 8, 8)[10]
    expected = {0: 0, -1: 1, -2: 2, -3: 2, -4: 3, -7: 3, -9: 3, 1: 5, 2: 6, 3: 6, 4: 7, 9: 7}
    assert {d: row[10 + d] for d in expected} == expected


@pytest.mark.parametrize("encoder", [BERT, T5], ids=lambda e: e.family)
def test_gradients_reach_every_parameter(encoder):
    tokens, mask = jnp.array([[3, 4, 5]]), jnp.ones((1, 3), bool)

    def loss(p):
        out = (encoder.embed(p, tokens, mask) ** 3).sum()
        return out + (encoder.classify(p, tokens, mask) ** 2).sum() if encoder.labels else out

    moved = jax.tree.map(lambda g: bool(np.abs(g).max() > 0), jax.jit(jax.grad(loss))(_params(encoder)))
    assert all(jax.tree.leaves(moved)), moved


def test_init_draws_and_repeats():
    params = BERT.init(jax.random.key(3))
    layers = params["layers"]["attn"]["qkv"]["kernel"]
    assert 0.01 < np.std(layers) < 0.5 and not np.allclose(layers[0], layers[1])
    jax.tree.map(np.testing.assert_array_equal, params, BERT.init(jax.random.key(3)))
    np.testing.assert_array_equal(params["layers"]["attn_norm"]["scale"], np.ones((2, 8)))


def test_shapes_are_known_without_arrays():
    """A large classifier is configured, initialised and run in the abstract."""
    big = Encoder(
        vocab=50265, width=1024, depth=24, heads=16, head_dim=64, mlp_width=4096, context=512, position_rows=514,
        position_start=2, types=1, pad=1, family="roberta", head="tanh", labels=("a", "b", "c"),
        dtype="bfloat16", param_dtype="bfloat16",
    )  # fmt: skip
    params = jax.eval_shape(big.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == 355_362_819  # RoBERTa large with three classes
    tokens, mask = jax.ShapeDtypeStruct((4, 128), "int32"), jax.ShapeDtypeStruct((4, 128), "bool")
    assert jax.eval_shape(big.apply, params, tokens, mask).dtype == "bfloat16"
    assert jax.eval_shape(big.classify, params, tokens, mask).shape == (4, 3)
    assert jax.eval_shape(big.classify, params, tokens, mask).dtype == "float32"


def test_bad_input():
    params = _params(T5)
    with pytest.raises(InputError, match="no classification head"):
        T5.classify(params, jnp.zeros((1, 3), int), jnp.ones((1, 3), bool))
    with pytest.raises(InputError, match="15 tokens a row, the encoder has 12 positions"):
        BERT.apply(_params(BERT), jnp.zeros((1, 15), int), jnp.ones((1, 15), bool))
    with pytest.raises(InputError, match="15 tokens a row, the encoder has 12 positions"):
        ROBERTA.apply(_params(ROBERTA), jnp.zeros((1, 15), int), jnp.ones((1, 15), bool))
