"""The product that every layer makes: by hand, rounded in both directions, on a GPU, and row by row on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.models import layers
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError

KERNEL = jax.random.normal(jax.random.key(0), (5, 7))
WIDE = jax.random.normal(jax.random.key(0), (1024, 512))  # for it a CPU takes a few rows one by one, in two pieces
ODD = jax.random.normal(jax.random.key(0), (1543, 512))  # four pieces of 384 and seven further rows


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_reads_the_same_product(monkeypatch, rows, dtype):
    """One row is a sum on a GPU, several are a product of matrices; gradients as well."""
    x = jax.random.normal(jax.random.key(1), (rows, 1, 7))

    def loss(x, kernel):
        y = layers.matmul(x, kernel, dtype, out=jnp.float32)
        return jnp.sum(jnp.sin(y)), y

    both = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (_, y), grads = both(x, KERNEL)
    np.testing.assert_allclose(y[:, 0], x[:, 0] @ KERNEL.T, atol=1e-5 if dtype == "float32" else 0.1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (_, other), again = both(x, KERNEL)
    np.testing.assert_allclose(other, y, atol=1e-5)
    for a, b in zip(grads, again):
        np.testing.assert_allclose(a, b, atol=1e-5 if dtype == "float32" else 0.05)


def test_gradients_of_rounded_products_are_sums_in_float32_of_rounded_numbers():
    """By hand; and no product of the backward pass has an operand of 32 bits, for which a GPU takes twice as long."""
    x = jax.random.normal(jax.random.key(1), (3, 7), jnp.bfloat16)
    w, g = KERNEL.astype(jnp.bfloat16), jax.random.normal(jax.random.key(2), (3, 5))
    pulled = jax.vjp(lambda x, w: layers.matmul(x, w, "bfloat16", out=jnp.float32), x, w)[1]
    dx, dw = pulled(g)
    exact = [np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (g, w, x)]
    for found, wanted in ((dx, exact[0] @ exact[1]), (dw, exact[0].T @ exact[2])):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-8, atol=1e-6)
    products = re.findall(r"dot_general.*: \((.*)\) ->", jax.jit(pulled).lower(g).as_text())
    assert len(products) == 2 and not any("f32" in operands.replace("bf16", "") for operands in products)


def loops(rows, kernel):
    """Whether a product is computed row by row."""
    return "scan" in str(jax.make_jaxpr(lambda x, w: layers.matmul(x, w, "float32"))(rows, kernel))


@pytest.mark.parametrize("kernel", [WIDE, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 2), (3, 3)])
def test_a_few_rows_are_the_product_and_a_row_alone_is_the_row_among_others(shape, kernel):
    x = jax.random.normal(jax.random.key(1), (*shape, 512))
    found = np.asarray(layers.matmul(x, kernel, "float32"))
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T, atol=2e-4)
    if np.prod(shape) <= layers.FEW:
        alone = layers.matmul(x[:1, :1], kernel, "float32")
        np.testing.assert_array_equal(found[:1, :1], alone)


def test_which_products_are_computed_row_by_row(monkeypatch):
    few, many, small = jnp.ones((layers.FEW, 512)), jnp.ones((layers.FEW + 1, 512)), jnp.ones((16, 512))
    assert loops(few, ODD) and loops(few, WIDE[:512])
    assert loops(few, WIDE) and not loops(few[:1], WIDE) and not loops(many, WIDE) and not loops(few, small)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not loops(few, WIDE)


@pytest.mark.parametrize("w", [WIDE, ODD], ids=["even", "odd"])
def test_gradients_and_sweeps_pass_through(w):
    x = jax.random.normal(jax.random.key(2), (3, 512))

    def total(product):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), argnums=(0, 1))(x, w)

    found = total(lambda x, w: layers.matmul(x, w, "float32"))
    for a, b in zip(found, total(lambda x, w: x @ w.T)):
        np.testing.assert_allclose(a, b, atol=1e-3)
    swept = jax.vmap(lambda s: layers.matmul(s * x, w, "float32"))(jnp.arange(3.0))
    np.testing.assert_allclose(swept[2], 2 * layers.matmul(x, w, "float32"), atol=1e-3)


def test_parameters_of_another_size_are_refused_in_a_sentence():
    sizes = dict(vocab=8, width=4, depth=1, heads=2, kv_heads=2, context=8)
    small, large = (Transformer.llama(mlp_width=n, **sizes) for n in (4, 6))
    with pytest.raises(InputError, match=r"kernel has shape .*4.* but the model's sizes give .*6.* another model's"):
        large.apply(small.init(jax.random.key(0)), jnp.zeros((1, 2, 4)), jnp.ones((1, 2), bool))
