"""Networks between latents of texts (Lovelace et al. 2024), which spread each vector over pseudo-tokens."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctg_jax.models.denoiser import Denoiser, Trunk, dense
from ctg_jax.models.layers import Dense, param
from ctg_jax.types import InputError, Params

JOINS = ("sequence", "features")


@dataclasses.dataclass(frozen=True)
class LatentNet:
    """A `Denoiser` between vectors: latent [B, Z], γ [B] and, where `context` is not 0, another vector [B, C] -> one
    vector [B, out], or `prompt` of them, [B, prompt, out].

    Every vector is widened `spread` times and cut into `pseudo_tokens` of its own.
    It predicts what the latent was (DGLM's score network), or writes the soft prompt that makes a language model write
    its text (DGLM's prompt generator, which reads the latent alone).

    Attributes:
      latent, out: Z, and the width of the output.
      context: C, or 0. `null` [C] is learned and represents a missing context (classifier-free guidance).
      prompt: 0, or the number of soft tokens to write.
      spread, context_spread: how many times latent and context are widened; a `context_spread` of 0 is `spread`.
      join: how latent and context meet: one behind the other ("sequence"), or pseudo-token by pseudo-token, each in
        half of the width ("features", as in the authors' score network).
      slots: whether the soft tokens are read at positions of their own; if not, the pseudo-tokens of the latent
        themselves become the soft tokens, as in the authors' prompt generator, and `prompt` is `pseudo_tokens`.
    """

    trunk: Trunk
    latent: int
    out: int
    context: int = 0
    prompt: int = 0
    pseudo_tokens: int = 32
    spread: int = 8
    context_spread: int = 0
    join: str = "sequence"
    slots: bool = True

    def __post_init__(self):
        if not self.context_spread:
            object.__setattr__(self, "context_spread", self.spread)
        for name, spread in (("latent", self.spread), ("context", self.context_spread)):
            if getattr(self, name) * spread % self.pseudo_tokens:
                raise InputError(
                    f"{name} is {getattr(self, name)}, which spread {spread} times cannot be cut into "
                    f"{self.pseudo_tokens} pseudo_tokens: choose a divisor of {getattr(self, name) * spread}."
                )
        if self.join not in JOINS:
            raise InputError(f"join is {self.join!r}, expected one of {', '.join(JOINS)}.")
        if self.join == "features" and self.trunk.width % 2:
            raise InputError(f"width is {self.trunk.width}, which cannot be halved: join by sequence or make it even.")
        if self.prompt and not self.slots and self.prompt != self.pseudo_tokens:
            raise InputError(
                f"length is {self.prompt} without slots, expected that of pseudo_tokens, {self.pseudo_tokens}."
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
        features = net.context and net.join == "features"
        part = c.width // 2 if features else c.width
        x = self._spread("latent", z, net.spread, part)
        if net.context:
            null = param(self, "null", nn.initializers.normal(0.02), (net.context,), c.param_dtype)
            read = jnp.where(given[:, None], context.astype(jnp.float32), null[None].astype(jnp.float32))
            x = jnp.concatenate([x, self._spread("context", read, net.context_spread, part)], axis=2 if features else 1)
            x = dense(c.width, c, c.width, "join")(x) if features else x
        if net.prompt and net.slots:
            slots = param(self, "prompt", nn.initializers.normal(0.02), (net.prompt, c.width), c.param_dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(slots[None], (x.shape[0], *slots.shape)).astype(x.dtype)], axis=1)
        y = Denoiser(c, name="denoiser")(x, gamma)
        if net.prompt:
            return Dense(net.out, c, True, name="out")(y[:, -net.prompt :]).astype(jnp.float32)
        each = -(-net.out * net.spread // net.pseudo_tokens)
        flat = dense(each, c, c.width, "gather")(y[:, : net.pseudo_tokens]).reshape(x.shape[0], -1)
        return Dense(net.out, c, True, name="out")(flat).astype(jnp.float32)

    def _spread(self, name, vector, times, width):
        """[B, n] -> [B, pseudo_tokens, width]."""
        net, c = self.net, self.net.trunk
        size = vector.shape[1] * times
        part = size // net.pseudo_tokens
        wide = dense(size, c, vector.shape[1], f"{name}_spread")(vector).reshape(-1, net.pseudo_tokens, part)
        return dense(width, c, part, f"{name}_in")(wide)
