"""Networks between latents of texts (Lovelace et al. 2024), which spread each vector over pseudo-tokens."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctg_jax.models.denoiser import Denoiser, Trunk, dense
from ctg_jax.models.layers import Dense
from ctg_jax.types import InputError, Params


@dataclasses.dataclass(frozen=True)
class LatentNet:
    """A `Denoiser` between vectors: latent [B, Z], γ [B] and, where `context` is not 0, another vector [B, C] -> one
    vector [B, out], or `prompt` of them, [B, prompt, out].

    Every vector is widened `spread` times and cut into `pseudo_tokens` of its own (32 and 8 in DGLM).
    It predicts what the latent was (DGLM's score network), or writes the soft prompt that makes a language model write
    its text (DGLM's prompt generator, which reads the latent alone).

    Attributes:
      latent, out: Z, and the width of the output.
      context: C, or 0. `null` [C] is learned and represents a missing context (classifier-free guidance).
      prompt: 0, or the number of soft tokens to write.
    """

    trunk: Trunk
    latent: int
    out: int
    context: int = 0
    prompt: int = 0
    pseudo_tokens: int = 32
    spread: int = 8

    def __post_init__(self):
        for name in ("latent", "context"):
            if getattr(self, name) * self.spread % self.pseudo_tokens:
                raise InputError(
                    f"{name} is {getattr(self, name)}, which spread {self.spread} times cannot be cut into "
                    f"{self.pseudo_tokens} pseudo_tokens: choose a divisor of {getattr(self, name) * self.spread}."
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
        each = -(-net.out * net.spread // net.pseudo_tokens)
        flat = dense(each, c, c.width, "gather")(y[:, : net.pseudo_tokens]).reshape(x.shape[0], -1)
        return Dense(net.out, c, True, name="out")(flat).astype(jnp.float32)

    def _spread(self, name, vector):
        """[B, n] -> [B, pseudo_tokens, width]."""
        net, c = self.net, self.net.trunk
        size = vector.shape[1] * net.spread
        part = size // net.pseudo_tokens
        wide = dense(size, c, vector.shape[1], f"{name}_spread")(vector).reshape(-1, net.pseudo_tokens, part)
        return dense(c.width, c, part, f"{name}_in")(wide)
