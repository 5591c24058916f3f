"""The layers that the decoder, the encoder and the denoiser share: products, norms and MLPs.

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

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


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
