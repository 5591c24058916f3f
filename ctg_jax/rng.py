"""Random numbers as a function of (seed, stream name, example id, step), never of layout or order."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp


def stream(key: jax.Array, name: str) -> jax.Array:
    """A key of its own for a named use, e.g. ``stream(key, "dropout")``; names never collide in practice."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return jax.random.fold_in(key, word)


def per_example(key: jax.Array, ids: jax.Array) -> jax.Array:
    """Keys [B] for example ids int [B]: ``fold_in(key, id)`` for each row."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(ids))


def at_step(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """Keys [B] of every row at one step (one token, one diffusion step)."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
