"""The block of the decoder: causal self-attention with rotary positions, and an MLP, around the residual stream.

Every module reads its sizes from the frozen configuration it belongs to, `lm`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ctg_jax.mesh.plan import split
from ctg_jax.models.attention import attend
from ctg_jax.models.layers import Dense, Mlp, Norm
from ctg_jax.types import InputError


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
