"""Brownian bridges between latents of sentences, and the network that makes the latents (Time Control, Wang et al.
2022, "Language modeling via stochastic processes").

Between z₀ at time t₀ and z_T at time T a bridge is, at time t, normal with mean (1 − α) z₀ + α z_T, where
α = (t − t₀)/(T − t₀), and has in every dimension the variance (t − t₀)(T − t)/(T − t₀). Times are numbers of sentences.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import rng
from ctg_jax.types import InputError, Params

LAYERS = ("in", "middle", "out")


def encoder(key: jax.Array, inputs: int, latent: int, width: int = 128) -> Params:
    """A network [..., inputs] -> [..., latent] of three layers with random kernels (out, in); `encode` applies it.

    Raises:
      InputError: a size below 1.
    """
    for name, size in (("latent", latent), ("width", width)):
        if size < 1:
            raise InputError(f"{name} is {size}, expected at least 1.")
    sizes = (inputs, width, width, latent)
    return {
        name: {
            "kernel": jax.random.normal(rng.stream(key, name), (out, into)) * np.sqrt(2 / into),
            "bias": jnp.zeros(out),
        }
        for name, into, out in zip(LAYERS, sizes, sizes[1:])
    }


def encode(params: Params, x: jax.Array) -> jax.Array:
    """Latents float32 [..., Z] of standardised embeddings of sentences [..., E]."""
    for name in LAYERS:
        x = x @ params[name]["kernel"].T + jnp.expand_dims(params[name]["bias"], tuple(range(x.ndim - 1)))
        x = x if name == "out" else jax.nn.relu(x)
    return x


def moments(z0: jax.Array, zT: jax.Array, t0: jax.Array, t: jax.Array, T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean float32 [..., Z], variance float32 [..., 1]) at t of the bridge from z0 [..., Z] at t0 to zT at T; times
    have the shape [...] and t is strictly between the others."""
    t0, t, T = (jnp.asarray(x, jnp.float32)[..., None] for x in (t0, t, T))
    share = (t - t0) / (T - t0)
    return (1 - share) * z0 + share * zT, (t - t0) * (T - t) / (T - t0)


def contrast(mean: jax.Array, variance: jax.Array, zt: jax.Array, others: jax.Array) -> jax.Array:
    """−log of the probability, float32 [...], that the latent of the sentence in the middle is told from others:

        −ℓ(z_t) + log(exp ℓ(z_t) + Σ_j exp ℓ(z_j)),  ℓ(z) = −‖z − mean‖² / (2 variance)

    Args:
      mean, variance: of the bridge, see `moments`. zt: the middle, [..., Z]. others: [..., n, Z].
    """
    candidates = jnp.concatenate([zt[..., None, :], others], axis=-2)
    near = -jnp.sum((candidates - mean[..., None, :]) ** 2, axis=-1) / (2 * variance)
    return jax.nn.logsumexp(near, axis=-1) - near[..., 0]


def sample(keys: jax.Array, first: jax.Array, last: jax.Array, steps: int, variance: jax.Array | float) -> jax.Array:
    """Bridges float32 [B, steps, Z] from first to last, [B, Z] each, drawn exactly whatever the number of steps.

    At share s of the way, from 0 to 1 in equal steps, the mean is (1 − s) first + s last and the variance
    s (1 − s) · variance.

    Args:
      keys: one for each row [B]. variance: float32 [] or [Z], of the Brownian motion over the whole way.

    Raises:
      InputError: fewer than two steps.
    """
    if steps < 2:
        raise InputError(f"steps is {steps}, expected at least 2: a bridge has a first and a last sentence.")
    shape = (steps - 1, first.shape[-1])
    moves = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
    path = jnp.concatenate([jnp.zeros_like(first)[:, None], jnp.cumsum(moves, axis=1)], axis=1)
    path = path * jnp.sqrt(jnp.reshape(jnp.asarray(variance, jnp.float32), (1, 1, -1)) / (steps - 1))
    share = jnp.linspace(0.0, 1.0, steps)[None, :, None]
    return first[:, None] + path + share * (last - first - path[:, -1])[:, None]
