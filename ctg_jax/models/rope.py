"""Rotary position embeddings (Su et al. 2021): frequencies, their scalings for longer contexts, and the rotation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax.types import InputError


def frequencies(dim: int, theta: float, scaling: tuple | None, context: int) -> tuple[jax.Array, float]:
    """The angles per position, float32 [dim / 2], and the factor of their cosines and sines.

    Args:
      dim: features of a head that rotate.
      theta: base of the frequencies.
      scaling: None, or one of
        ("linear", factor): positions are divided by the factor (Chen et al. 2023).
        ("llama3", factor, low_freq_factor, high_freq_factor, original_context): only long wavelengths are divided.
        ("yarn", factor, original_context, magnitude, beta_fast, beta_slow, truncate): Peng et al. 2023.
        ("longrope", original_context, longest_context, magnitude, short, long): one factor for each frequency, from
          `short` where `context` is at most the original one, else from `long` (Ding et al. 2024).
        ("dynamic", factor): the base grows with rows longer than the context. No row is, so nothing changes.
      context: the number of positions of the model.

    Raises:
      InputError: another kind of scaling.
    """
    freq = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    kind, *values = scaling or ("default",)
    if kind in ("default", "dynamic"):
        return freq, 1.0
    if kind == "linear":
        return freq / values[0], 1.0
    if kind == "llama3":
        factor, low, high, original = values
        wavelength = 2 * math.pi / freq
        smooth = jnp.clip((original / wavelength - low) / (high - low), 0, 1)
        return (1 - smooth) * freq / factor + smooth * freq, 1.0
    if kind == "yarn":
        factor, original, magnitude, *betas, truncate = values
        low, high = (
            dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in betas
        )  # the features that turn beta_fast and beta_slow times within the original context
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        span = (high - low) or 0.001
        divided = jnp.clip((jnp.arange(len(freq), dtype=jnp.float32) - low) / span, 0, 1)
        return freq / factor * divided + freq * (1 - divided), magnitude
    if kind == "longrope":
        original, _, magnitude, short, long = values
        return freq / jnp.asarray(long if context > original else short, jnp.float32), magnitude
    raise InputError(f"rope_scaling is {kind!r}, expected 'linear', 'llama3', 'yarn', 'longrope' or 'dynamic'.")


def own_frequencies(dim: int, theta: float) -> tuple[jax.Array, float]:
    """`frequencies` of an unscaled base as `transformers` rounds them, in two steps: 1 / theta^x.

    Layers with a base of their own use them. The single rounding of `frequencies` is closer to the real numbers, but
    500 tokens apart the difference is one of angles, and at one token in thousands moves a logit of Gemma 3 by 2e-4.
    """
    power = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return jnp.asarray(np.float32(1) / (theta ** power.astype(np.float64)).astype(np.float32)), 1.0


def angles(pos: jax.Array, freq: jax.Array, magnitude: float) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of positions int32 [B, T], each float32 [B, T, dim / 2]."""
    angle = pos[:, :, None].astype(jnp.float32) * freq[None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if magnitude == 1.0 else (magnitude * cos, magnitude * sin)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [B, T, heads, H] with its first features rotated; halves are paired, as in GPT-NeoX."""
    cos, sin = (a[:, :, None, :] for a in rope)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    a32, b32 = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = [(a32 * cos - b32 * sin).astype(x.dtype), (b32 * cos + a32 * sin).astype(x.dtype)]
    return jnp.concatenate([*turned, rest], axis=-1)
