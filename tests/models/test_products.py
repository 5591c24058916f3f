"""The product that every layer makes: by hand, rounded in both directions, and the same on a GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.models import layers

KERNEL = jax.random.normal(jax.random.key(0), (5, 7))


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
