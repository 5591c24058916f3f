"""The networks of diffusion: a transformer that reads how noisy its input is, over the tokens of a text or over
pseudo-tokens that one latent vector is spread on.

Source: the score network of Lovelace et al. 2024 (DGLM): pre-norm with RMSNorm, normalised queries and keys, SwiGLU, a
scale and a shift by time around attention and MLP, zero at first (Peebles and Xie 2023), and skips from the first
half of the blocks to the second.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctg_jax.models.diffusion import alpha_sigma
from ctg_jax.models.layers import Dense, Mlp, Norm, attend
from ctg_jax.types import InputError, Params


@dataclasses.dataclass(frozen=True)
class Trunk:
    """Sizes of the transformer; the names are those that the shared layers read.

    Attributes:
      width, depth, heads: D, L, heads.
      mlp_width: of the gated MLP; 0 is 8/3 of the width, to a multiple of 8.
      positions: rows of the learned position table, the longest input.
      dtype, param_dtype: of the computation and of the parameters that `init` makes.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 0
    positions: int = 64
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
        if not self.mlp_width:
            object.__setattr__(self, "mlp_width", -(-self.width * 8 // 24) * 8)


class Denoiser(nn.Module):
    """[B, T, D] and γ [B] -> [B, T, D]; `allowed` bool [B, T, T] says who may attend to whom (None: all)."""

    trunk: Trunk

    @nn.compact
    def __call__(self, x, gamma, allowed=None):
        c = self.trunk
        if x.shape[1] > c.positions:
            raise InputError(f"the input has {x.shape[1]} positions, expected at most {c.positions} (`positions`).")
        time = _dense(c.width, c, c.width, "time")(waves(1000 * alpha_sigma(gamma)[0] ** 2, c.width))
        time = _dense(c.width, c, c.width, "time_out")(jax.nn.silu(time))
        table = self.param("positions", nn.initializers.normal(0.02), (c.positions, c.width), jnp.dtype(c.param_dtype))
        x = x.astype(c.dtype) + table[None, : x.shape[1]].astype(c.dtype)
        if allowed is None:
            allowed = jnp.ones((x.shape[0], x.shape[1], x.shape[1]), bool)
        below = []
        for i in range(c.depth):
            if i >= (c.depth + 1) // 2:
                x = _dense(c.width, c, 2 * c.width, f"skip_{i}")(jnp.concatenate([x, below.pop()], axis=-1))
            x = _Block(c, name=f"block_{i}")(x, time, allowed)
            if i < c.depth // 2:
                below.append(x)
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
        q, k, v = jnp.split(_dense(3 * width, c, width, "qkv")(y), 3, axis=-1)
        q, k, v = (a.reshape(batch, t, c.heads, -1) for a in (q, k, v))
        q, k = Norm(c, name="q_norm")(q), Norm(c, name="k_norm")(k)
        y = attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), allowed).reshape(batch, t, width)
        x = x + Dense(width, c, False, name="out")(y)
        y = Norm(c, name="mlp_norm")(x) * (1 + scale_m) + shift_m
        return x + Mlp(c, name="mlp")(y)


def _dense(features: int, config, inputs: int, name: str) -> Dense:
    """A dense layer that keeps the variance of its inputs at first: a deviation of 0.02 is meant for wide models, and
    these may be narrow."""
    return Dense(features, config, True, 1 / (0.02 * math.sqrt(inputs)), name=name)


@dataclasses.dataclass(frozen=True)
class LatentNet:
    """A `Denoiser` between vectors: latent [B, Z], γ [B] and, where `context` is not 0, another vector [B, C] -> one
    vector [B, out], or `prompt` of them, [B, prompt, out].

    Every vector is widened `spread` times and cut into `tokens` pseudo-tokens of its own (32 and 8 in DGLM).
    It predicts what the latent was (DGLM's score network), or writes the soft prompt that makes a language model say it
    (DGLM's prompt generator, which reads the latent alone).

    Attributes:
      latent, out: Z, and the width of the output.
      context: C, or 0. `null` [C] is learned and stands for no context (classifier-free guidance).
      prompt: 0, or the number of soft tokens to write.
    """

    trunk: Trunk
    latent: int
    out: int
    context: int = 0
    prompt: int = 0
    tokens: int = 32
    spread: int = 8

    def __post_init__(self):
        for name in ("latent", "context"):
            if getattr(self, name) * self.spread % self.tokens:
                raise InputError(
                    f"{name} is {getattr(self, name)}, which spread {self.spread} times cannot be cut into "
                    f"{self.tokens} tokens: choose tokens that divide {getattr(self, name) * self.spread}."
                )

    def init(self, key: jax.Array) -> Params:
        """Random parameters."""
        z, context = jnp.zeros((1, self.latent)), jnp.zeros((1, max(self.context, 1)))
        return _LatentNet(self).init(key, z, jnp.zeros((1,)), context, jnp.ones((1,), bool))["params"]

    def apply(
        self,
        params: Params,
        z: jax.Array,
        gamma: jax.Array,
        context: jax.Array | None = None,
        given: jax.Array | None = None,
    ) -> jax.Array:
        """float32 [B, out], or [B, prompt, out].

        Args:
          z, gamma: float [B, Z], [B].
          context: float [B, C], or None for no context.
          given: bool [B], the rows whose context is to be read; None: all.
        """
        batch = z.shape[0]
        if context is None:
            context, given = jnp.zeros((batch, max(self.context, 1))), jnp.zeros((batch,), bool)
        given = jnp.ones((batch,), bool) if given is None else given
        return _LatentNet(self).apply({"params": params}, z, gamma, context, given)


class _LatentNet(nn.Module):
    net: LatentNet

    @nn.compact
    def __call__(self, z, gamma, context, given):
        net, c = self.net, self.net.trunk
        x = self._spread("latent", z)
        if net.context:
            null = self.param("null", nn.initializers.normal(0.02), (net.context,), jnp.dtype(c.param_dtype))
            read = jnp.where(given[:, None], context.astype(jnp.float32), null[None].astype(jnp.float32))
            x = jnp.concatenate([x, self._spread("context", read)], axis=1)
        if net.prompt:
            slots = self.param("prompt", nn.initializers.normal(0.02), (net.prompt, c.width), jnp.dtype(c.param_dtype))
            x = jnp.concatenate([x, jnp.broadcast_to(slots[None], (x.shape[0], *slots.shape)).astype(x.dtype)], axis=1)
        y = Denoiser(c, name="denoiser")(x, gamma)
        if net.prompt:
            return Dense(net.out, c, True, name="out")(y[:, -net.prompt :]).astype(jnp.float32)
        each = -(-net.out * net.spread // net.tokens)
        flat = _dense(each, c, c.width, "gather")(y[:, : net.tokens]).reshape(x.shape[0], -1)
        return Dense(net.out, c, True, name="out")(flat).astype(jnp.float32)

    def _spread(self, name, vector):
        """[B, n] -> [B, tokens, width]."""
        net, c = self.net, self.net.trunk
        size = vector.shape[1] * net.spread
        wide = _dense(size, c, vector.shape[1], f"{name}_spread")(vector).reshape(-1, net.tokens, size // net.tokens)
        return _dense(c.width, c, size // net.tokens, f"{name}_in")(wide)


def waves(t: jax.Array, width: int) -> jax.Array:
    """Sinusoids float32 [B, width] of numbers [B], of periods from 2π to 20,000π (Vaswani et al. 2017)."""
    half = width // 2
    freq = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t[:, None] * freq[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle), jnp.zeros((t.shape[0], width - 2 * half))], axis=-1)
