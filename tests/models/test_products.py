"""Products of a few rows, which a CPU computes one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.models import layers

KERNEL = jax.random.normal(jax.random.key(0), (512, 512))


def loops(rows, kernel):
    """Whether a product is computed row by row."""
    return "scan" in str(jax.make_jaxpr(lambda x, w: layers.matmul(x, w, "float32"))(rows, kernel))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (4, 2), (3, 3)])
def test_a_few_rows_are_the_product_and_a_row_alone_is_the_row_among_others(shape):
    x = jax.random.normal(jax.random.key(1), (*shape, 512))
    found = np.asarray(layers.matmul(x, KERNEL, "float32"))
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ np.asarray(KERNEL, np.float64).T, atol=2e-4)
    if np.prod(shape) <= layers.FEW:
        alone = layers.matmul(x[:1, :1], KERNEL, "float32")
        np.testing.assert_array_equal(found[:1, :1], alone)


def test_which_products_are_computed_row_by_row(monkeypatch):
    few, many, small = jnp.ones((layers.FEW, 512)), jnp.ones((layers.FEW + 1, 512)), jnp.ones((16, 512))
    assert loops(few, KERNEL) and not loops(few[:1], KERNEL) and not loops(many, KERNEL) and not loops(few, small)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not loops(few, KERNEL)


def test_gradients_and_sweeps_pass_through():
    x, w = jax.random.normal(jax.random.key(2), (3, 512)), KERNEL

    def total(product):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), argnums=(0, 1))(x, w)

    found = total(lambda x, w: layers.matmul(x, w, "float32"))
    for a, b in zip(found, total(lambda x, w: x @ w.T)):
        np.testing.assert_allclose(a, b, atol=1e-3)
    swept = jax.vmap(lambda s: layers.matmul(s * x, w, "float32"))(jnp.arange(3.0))
    np.testing.assert_allclose(swept[2], 2 * layers.matmul(x, w, "float32"), atol=1e-3)
