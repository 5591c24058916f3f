"""Attention: by hand, and the same on the CPU as in the function that accelerators use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.models.attention import attend


def inputs(dtype="float32", heads=4, kv=2):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 3, heads, 8), dtype)
    k, v = (jax.random.normal(key, (2, kv, 5, 8), dtype) for key in keys[1:3])
    allowed = jnp.arange(5)[None, None] <= jnp.arange(3)[None, :, None] + 1
    allowed = allowed & jnp.asarray([[True] * 5, [False, False, True, True, True]])[:, None]  # row 1 is padded
    return q, k, v, allowed, jax.random.normal(keys[3], (heads, 3, 5))


def by_hand(q, k, v, allowed, bias, divisor, cap):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        mine = h * k.shape[1] // q.shape[2]
        z = k[b, mine] @ q[b, t, h] / (divisor or np.sqrt(8))
        z = (cap * np.tanh(z / cap) if cap else z) + (0 if bias is None else np.asarray(bias)[h, t])
        seen = np.broadcast_to(np.asarray(allowed), (2, 3, 5))[b, t]
        p = np.exp(z - z.max()) * seen if seen.any() else np.ones(5)
        out[b, t, h] = p / p.sum() @ v[b, mine]
    return out


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("biased, more", [(False, (None, None)), (True, (1.0, None)), (True, (2.0, 0.5))])
def test_attention_by_hand(backend, biased, more, monkeypatch):
    q, k, v, allowed, bias = inputs()
    bias = bias if biased else None
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert not allowed[1, 0].any(), "a query that may attend to nothing gets a uniform average"
    found = attend(q, k, v, allowed, bias, *more)
    np.testing.assert_allclose(found, by_hand(q, k, v, allowed, bias, *more), atol=2e-6)
    rows = jnp.asarray([[True] * 5, [False, False, True, True, True]])[:, None]  # one mask for all queries
    np.testing.assert_allclose(attend(q, k, v, rows, bias, *more), by_hand(q, k, v, rows, bias, *more), atol=2e-6)


def test_gradients_and_bfloat16_agree(monkeypatch):
    q, k, v, allowed, _ = inputs()
    grad = jax.grad(lambda x: jnp.sum(attend(*x, allowed) ** 2))
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    one, low = grad((q, k, v)), attend(*half, allowed)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, grad((q, k, v)))
    other = attend(*half, allowed)
    assert low.dtype == other.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), other.astype(jnp.float32), atol=0.03)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_keys_of_a_query_alone_are_keys_that_the_others_do_not_see(backend, monkeypatch):
    q, k, v, allowed, _ = inputs()
    own = tuple(jax.random.normal(jax.random.key(n), (2, 2, 3, 8)) for n in (7, 8))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    more = jnp.pad(allowed, ((0, 0), (0, 0), (0, 1)), constant_values=True)
    found = attend(q, k, v, more, cap=2.0, own=own)
    both = [jnp.concatenate(pair, axis=2) for pair in zip((k, v), own)]
    each = jnp.concatenate([allowed, jnp.broadcast_to(jnp.eye(3, dtype=bool), (2, 3, 3))], axis=2)
    np.testing.assert_allclose(found, attend(q, *both, each, cap=2.0), atol=2e-6)
