"""The block of the decoder: causal self-attention and an MLP around the residual stream.

Every module reads its sizes and choices from the frozen configuration it belongs to, `lm`.
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
from ctg_jax.models.rope import rotate


class Block(nn.Module):
    """Attention and MLP around the residual stream, with the norms that `lm.norms` names."""

    lm: Any

    @nn.compact
    def __call__(self, x, allowed, rope, past, length, between, beside=False, heads=None):
        """x [B, T, D], allowed bool [B, T, S], rope or None -> (x, (k, v)); `past`, `length` and `beside` as in
        `Attention`, `heads` its `edit`.

        between: edits the stream [B, T, D] between attention and MLP, or None.
        """
        lm = self.lm

        def norm(name, x):
            return Norm(lm, name=name)(x) if name in lm.norms else x

        with jax.named_scope("attention"):
            y = norm("attn_norm", x)
            attended, kv = Attention(lm, name="attn")(y, allowed, rope, past, length, beside, heads)
            mid = x + norm("attn_post_norm", attended)
        if between is not None:
            mid = between(mid)
        with jax.named_scope("mlp"):
            start = x if "mlp_norm" in lm.norms else y  # without a norm of its own it shares that of attention
            y = norm("mlp_norm", start if lm.parallel else mid)
            return mid + norm("mlp_post_norm", Mlp(lm, name="mlp")(y)), kv


class Attention(nn.Module):
    """Causal grouped-query self-attention with one fused query-key-value kernel."""

    lm: Any

    @nn.compact
    def __call__(self, x, allowed, rope, past, length, beside=False, edit=None):
        """x [B, T, D] -> ([B, T, D], (k, v)).

        past: None; a prefix (k, v) [B, K, P, H] that every query may attend to, whatever the window of the layer, when
        length is None; or cached (k, v) [B, K, S, H], into which this call's keys and values are written at slot
        `length`.
        beside: each token attends to `past` [B, K, S, H] and to itself alone, so allowed is [B, T, S + 1]; nothing is
        written.
        edit: edits the outputs of the heads [B, T, heads, H], before the output product, or None.
        """
        lm, (batch, t, _) = self.lm, x.shape
        heads, kv, h = lm.heads, lm.kv_heads, lm.head_dim
        qkv = Dense((heads + 2 * kv) * h, lm, lm.bias_attn, name="qkv")(x)
        parts = jnp.split(qkv, [heads * h, (heads + kv) * h], axis=-1)
        if lm.qk_norm == "width":
            parts[:2] = (Norm(lm, name=name)(a) for name, a in zip(("q_norm", "k_norm"), parts))
        q, k, v = (a.reshape(batch, t, -1, h) for a in parts)
        if lm.qk_norm in ("head", "heads"):
            each = lm.qk_norm == "heads"
            q, k = (Norm(lm, bias=False, each=each, name=name)(a) for name, a in (("q_norm", q), ("k_norm", k)))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (split(a, "data", None, "tensor", None) for a in (q, k, v))
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        own = None
        if beside:
            own, (k, v) = (k, v), past
        elif length is not None:
            k = lax.dynamic_update_slice(past[0], k.astype(past[0].dtype), (0, 0, length, 0))
            v = lax.dynamic_update_slice(past[1], v.astype(past[1].dtype), (0, 0, length, 0))
        elif past is not None:
            k, v = (jnp.concatenate([p.astype(a.dtype), a], axis=2) for p, a in zip(past, (k, v)))
            visible = jnp.ones((batch, t, past[0].shape[2]), bool)
            allowed = jnp.concatenate([visible, allowed], axis=2)
        divisor = lm.query_dim and math.sqrt(lm.query_dim)
        y = attend(q, k, v, allowed, divisor=divisor, cap=lm.attn_cap, own=own)
        if edit is not None:
            y = edit(y)
        y = split(y.reshape(batch, t, heads * h), "data", None, "tensor")
        return Dense(lm.width, lm, lm.bias_out, 1 / math.sqrt(2 * lm.depth), name="out")(y), (k, v)
