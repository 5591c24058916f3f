"""Attention: the one product of queries, keys and values that the decoder, the encoder and the denoiser share."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array,
    bias: jax.Array | None = None,
    divisor: float | None = None,
    cap: float | None = None,
    own: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Grouped-query attention, [B, T, heads, H].

    On accelerators it is `jax.nn.dot_product_attention`, which chooses the kernel; on the CPU it is two batched
    products over keys and values as they are cached, heads before positions, which are faster there.

    Args:
      q: [B, T, heads, H]. k, v: [B, K, S, H], where K divides heads.
      allowed: bool, broadcastable to [B, T, S]; which keys each query may attend to. A query without any, such as
        padding, gets a uniform average.
      bias: float32 [heads, T, S], added to the scores, or None.
      divisor: the scores are divided by it; None: by sqrt(H).
      cap: None, or the bound c of the soft cap c tanh(score / c) (Gemma 2).
      own: None, or (k, v) [B, K, T, H] of each query alone, which it attends to beside those that all share; `allowed`
        has one column more for them, the last.

    The kernels of accelerators have neither a cap nor keys for each query, so those products are two batched products
    there too.

    Scores and softmax are float32; the output has the dtype of v.
    """
    if jax.default_backend() == "cpu" or cap is not None or own is not None:
        return products(q, k, v, allowed, bias, divisor, cap, own)
    mask = jnp.broadcast_to(allowed, (q.shape[0], *allowed.shape[1:]))[:, None]
    bias = None if bias is None else bias[None]
    k, v = (a.astype(q.dtype).transpose(0, 2, 1, 3) for a in (k, v))
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=divisor and 1 / divisor)


def products(q, k, v, allowed, bias=None, divisor=None, cap=None, own=None):
    """`attend` as two batched matrix products."""
    batch, t, heads, h = q.shape
    kv, s = k.shape[1:3]
    group = heads // kv
    q = q.reshape(batch, t, kv, group, h).transpose(0, 2, 3, 1, 4).reshape(batch, kv, group * t, h)
    dims = (((3,), (3,)), ((0, 1), (0, 1)))
    scores = lax.dot_general(q, k, dims, preferred_element_type=jnp.float32)
    if own is not None:  # broadcast over the queries of a group
        each = q.reshape(batch, kv, group, t, h).astype(jnp.float32)
        itself = jnp.sum(each * own[0][:, :, None].astype(jnp.float32), axis=-1)
        scores = jnp.concatenate([scores, itself.reshape(batch, kv, group * t, 1)], axis=-1)
    scores = (scores / (divisor or math.sqrt(h))).reshape(batch, kv, group, t, -1)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias.reshape(1, kv, group, t, s)
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    p = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    shared = p[..., :s].reshape(batch, kv, group * t, s)
    y = lax.dot_general(shared, v, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    y = y.reshape(batch, kv, group, t, h)
    if own is not None:
        y = y + p[..., s:].astype(jnp.float32) * own[1][:, :, None].astype(jnp.float32)
    y = y.astype(v.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, t, heads, h)
