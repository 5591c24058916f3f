"""The layers of the decoder and, where they agree, of the encoder: products, norms, rotary positions, attention.

Every module reads its sizes from the frozen configuration it belongs to, `lm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ctg_jax.mesh.plan import split
from ctg_jax.types import InputError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def scale_frequencies(freq: jax.Array, scaling: tuple) -> jax.Array:
    """Rotary frequencies for a longer context; see `Transformer.rope_scaling`."""
    kind, factor, *rest = scaling
    if kind == "linear":
        return freq / factor
    if kind != "llama3":
        raise InputError(f"rope_scaling is {kind!r}, expected 'llama3' or 'linear'.")
    low, high, original = rest
    wavelength = 2 * math.pi / freq
    smooth = jnp.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 - smooth) * freq / factor + smooth * freq


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding on x [B, T, heads, H], halves paired (Su et al. 2021, in GPT-NeoX's order)."""
    cos, sin = (a[:, :, None, :] for a in rope)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    a32, b32 = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = [(a32 * cos - b32 * sin).astype(x.dtype), (b32 * cos + a32 * sin).astype(x.dtype)]
    return jnp.concatenate([*turned, rest], axis=-1)


def matmul(x: jax.Array, kernel: jax.Array, dtype, out=None) -> jax.Array:
    """x [..., in] times kernel [out, in] transposed, on (rows, in), summed in float32. On an accelerator float32 inputs
    are rounded as `jax_default_matmul_precision` says; see `ctg_jax.mesh.layout.Layout.precision`."""
    dtype = jnp.dtype(dtype)
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    y = lax.dot_general(rows, kernel.astype(dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return y.astype(out or dtype).reshape(*x.shape[:-1], kernel.shape[0])


class Dense(nn.Module):
    """y = x Wᵀ + b with kernel (out, in)."""

    features: int
    lm: Any
    bias: bool
    scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        dtype = jnp.dtype(self.lm.param_dtype)
        init = jax.nn.initializers.normal(0.02 * self.scale)
        y = matmul(x, self.param("kernel", init, (self.features, x.shape[-1]), dtype), self.lm.dtype)
        if self.bias:
            b = self.param("bias", jax.nn.initializers.zeros, (self.features,), dtype)
            y = y + b.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, in float32."""

    lm: Any

    @nn.compact
    def __call__(self, x):
        dtype = jnp.dtype(self.lm.param_dtype)
        last = (1,) * (x.ndim - 1) + (-1,)
        y = x.astype(jnp.float32)
        if self.lm.norm == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.lm.norm_eps)
        y = y * self.param("scale", jax.nn.initializers.ones, x.shape[-1:], dtype).astype(jnp.float32).reshape(last)
        if self.lm.norm == "layer":
            bias = self.param("bias", jax.nn.initializers.zeros, x.shape[-1:], dtype)
            y = y + bias.astype(jnp.float32).reshape(last)
        return y.astype(x.dtype)


class Block(nn.Module):
    """Attention and MLP around the residual stream."""

    lm: Any

    @nn.compact
    def __call__(self, x, allowed, rope, past, length, between):
        """x [B, T, D], allowed bool [B, T, S], rope or None -> (x, (k, v)); `past` and `length` as in `Attention`.

        between: edits the stream [B, T, D] between attention and MLP, or None.
        """
        lm = self.lm
        with jax.named_scope("attention"):
            y = Norm(lm, name="attn_norm")(x)
            attended, kv = Attention(lm, name="attn")(y, allowed, rope, past, length)
        mid = x + attended
        if between is not None:
            mid = between(mid)
        with jax.named_scope("mlp"):
            y = Norm(lm, name="mlp_norm")(x if lm.parallel else mid)
            return mid + Mlp(lm, name="mlp")(y), kv


class Attention(nn.Module):
    """Causal grouped-query self-attention with one fused query-key-value kernel."""

    lm: Any

    @nn.compact
    def __call__(self, x, allowed, rope, past, length):
        """x [B, T, D] -> ([B, T, D], (k, v)).

        past: None; a prefix (k, v) [B, K, P, H] that every query may attend to, when length is None; or cached
        (k, v) [B, K, S, H], into which this call's keys and values are written at slot `length`.
        """
        lm, (batch, t, _) = self.lm, x.shape
        heads, kv, h = lm.heads, lm.kv_heads, lm.head_dim
        qkv = Dense((heads + 2 * kv) * h, lm, lm.bias_attn, name="qkv")(x)
        parts = jnp.split(qkv, [heads * h, (heads + kv) * h], axis=-1)
        q, k, v = (a.reshape(batch, t, -1, h) for a in parts)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (split(a, "data", None, "tensor", None) for a in (q, k, v))
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        if length is not None:
            k = lax.dynamic_update_slice(past[0], k.astype(past[0].dtype), (0, 0, length, 0))
            v = lax.dynamic_update_slice(past[1], v.astype(past[1].dtype), (0, 0, length, 0))
        elif past is not None:
            k, v = (jnp.concatenate([p.astype(a.dtype), a], axis=2) for p, a in zip(past, (k, v)))
            visible = jnp.ones((batch, t, past[0].shape[2]), bool)
            allowed = jnp.concatenate([visible, allowed], axis=2)
        y = attend(q, k, v, allowed).reshape(batch, t, heads * h)
        y = split(y, "data", None, "tensor")
        return Dense(lm.width, lm, lm.bias_out, 1 / math.sqrt(2 * lm.depth), name="out")(y), (k, v)


class Mlp(nn.Module):
    """The feed-forward layer, gated or not."""

    lm: Any

    @nn.compact
    def __call__(self, x):
        lm, act = self.lm, ACTIVATIONS[self.lm.activation]
        y = Dense(lm.mlp_width, lm, lm.bias_mlp, name="up")(x)
        if lm.gated:
            y = act(Dense(lm.mlp_width, lm, lm.bias_mlp, name="gate")(x)) * y
        else:
            y = act(y)
        y = split(y, "data", None, "tensor")
        return Dense(lm.width, lm, lm.bias_mlp, 1 / math.sqrt(2 * lm.depth), name="down")(y)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array) -> jax.Array:
    """Grouped-query attention: q [B, T, heads, H], k and v [B, K, S, H], allowed bool [B, T, S] -> [B, T, heads, H].

    Scores and softmax are float32. A query that may attend to nothing (padding) gets a uniform average.
    """
    batch, t, heads, h = q.shape
    kv, s = k.shape[1:3]
    group = heads // kv
    q = q.reshape(batch, t, kv, group, h).transpose(0, 2, 3, 1, 4).reshape(batch, kv, group * t, h)
    dims = (((3,), (3,)), ((0, 1), (0, 1)))
    scores = lax.dot_general(q, k, dims, preferred_element_type=jnp.float32) / math.sqrt(h)
    scores = scores.reshape(batch, kv, group, t, s)
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    p = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, kv, group * t, s)
    y = lax.dot_general(p, v, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    y = y.astype(v.dtype).reshape(batch, kv, group, t, h)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, t, heads, h)
