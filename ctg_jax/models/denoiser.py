"""The network of continuous diffusion: a transformer that is conditioned on the noise level of its input.

Source: the score network of Lovelace et al. 2024 (DGLM): pre-norm with RMSNorm, normalised queries and keys, SwiGLU, a
scale and a shift by time around attention and MLP, zero at first (Peebles and Xie 2023), and skips from the inputs of
the first half of the blocks to the second half, so that the last block reads the input of the network.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctg_jax.models.attention import attend
from ctg_jax.models.diffusion import alpha_sigma
from ctg_jax.models.layers import Dense, Mlp, Norm, param
from ctg_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Trunk:
    """Sizes of the transformer; the names are those that the shared layers read.

    Attributes:
      width, depth, heads: D, L, heads.
      mlp_width: of the gated MLP; 0 is 8/3 of the width, to a multiple of 8.
      positions: rows of the learned position table, the longest input.
      time_width: of the embedding of the noise level; 0 is the width. DGLM's networks have half of theirs.
      skips: whether the second half of the blocks reads the inputs of the first half.
      dtype, param_dtype: of the computation and of the parameters that `init` makes.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 0
    positions: int = 64
    time_width: int = 0
    skips: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    norm: str = "rms"
    norm_eps: float = 1e-6
    activation: str = "silu"
    gated: bool = True
    bias_mlp: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise InputError(f"heads is {self.heads}, expected a divisor of the width {self.width}.")
        if not self.time_width:
            object.__setattr__(self, "time_width", self.width)
        if not self.mlp_width:
            object.__setattr__(self, "mlp_width", -(-self.width * 8 // 24) * 8)


class Denoiser(nn.Module):
    """[B, T, D] and γ [B] -> [B, T, D]; `allowed` bool [B, T, T] is the attention mask (None: all positions)."""

    trunk: Trunk

    @nn.compact
    def __call__(self, x, gamma, allowed=None):
        c = self.trunk
        if x.shape[1] > c.positions:
            raise InputError(f"the input has {x.shape[1]} positions, expected at most {c.positions} (`positions`).")
        time = dense(c.time_width, c, c.width, "time")(waves(1000 * alpha_sigma(gamma)[0] ** 2, c.width))
        time = dense(c.time_width, c, c.time_width, "time_out")(jax.nn.silu(time))
        table = param(self, "positions", nn.initializers.normal(0.02), (c.positions, c.width), c.param_dtype)
        x = x.astype(c.dtype) + table[None, : x.shape[1]].astype(c.dtype)
        if allowed is None:
            allowed = jnp.ones((x.shape[0], x.shape[1], x.shape[1]), bool)
        below = []
        for i in range(c.depth):
            if c.skips and i >= (c.depth + 1) // 2:
                x = dense(c.width, c, 2 * c.width, f"skip_{i}")(jnp.concatenate([x, below.pop()], axis=-1))
            if i < c.depth // 2:
                below.append(x)
            x = _Block(c, name=f"block_{i}")(x, time, allowed)
        return Norm(c, name="norm")(x)


class _Block(nn.Module):
    """Attention and MLP, each around a norm that time scales and shifts."""

    trunk: Trunk

    @nn.compact
    def __call__(self, x, time, allowed):
        c, (batch, t, width) = self.trunk, x.shape
        # Normal of deviation 0.02 · 0: at first the block does not know the time.
        moves = Dense(4 * width, c, True, 0.0, name="modulation")(jax.nn.silu(time))
        scale_a, shift_a, scale_m, shift_m = jnp.split(moves[:, None], 4, axis=-1)

        y = Norm(c, name="attn_norm")(x) * (1 + scale_a) + shift_a
        q, k, v = jnp.split(dense(3 * width, c, width, "qkv")(y), 3, axis=-1)
        q, k, v = (a.reshape(batch, t, c.heads, -1) for a in (q, k, v))
        q, k = Norm(c, name="q_norm")(q), Norm(c, name="k_norm")(k)
        y = attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), allowed).reshape(batch, t, width)
        x = x + Dense(width, c, False, name="out")(y)
        y = Norm(c, name="mlp_norm")(x) * (1 + scale_m) + shift_m
        return x + Mlp(c, name="mlp")(y)


def dense(features: int, config, inputs: int, name: str) -> Dense:
    """A dense layer that keeps the variance of its inputs at first: a deviation of 0.02 is meant for wide models, and
    these may be narrow."""
    return Dense(features, config, True, 1 / (0.02 * math.sqrt(inputs)), name=name)


def waves(t: jax.Array, width: int) -> jax.Array:
    """Sinusoids float32 [B, width] of numbers [B], of periods from 2π to 20,000π (Vaswani et al. 2017)."""
    half = width // 2
    freq = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t[:, None] * freq[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle), jnp.zeros((t.shape[0], width - 2 * half))], axis=-1)
