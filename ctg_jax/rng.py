"""Random numbers as a function of (seed, stream name, example id, step), never of layout or order."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp


def stream(key: jax.Array, name: str) -> jax.Array:
    """A key of its own for a named use, e.g. ``stream(key, "dropout")``; names never collide in practice."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return jax.random.fold_in(key, word)


def named(keys: jax.Array, name: str) -> jax.Array:
    """`stream` of each of the keys [B]."""
    return jax.vmap(lambda key: stream(key, name))(keys)


def per_example(key: jax.Array, ids: jax.Array) -> jax.Array:
    """Keys [B] for example ids int [B]: ``fold_in(key, id)`` for each row."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(ids))


def at_step(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """Keys [B] of every row at one step (one token, one diffusion step)."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)


def draw(keys: jax.Array, z: jax.Array, blocks: int = 256) -> jax.Array:
    """One token int32 [B] from softmax(z), z float32 [B, V], by inverting the distribution function.

    It costs one uniform number per row where the Gumbel trick costs V of them, which is more than a tenth of a step of
    GPT-2 on a CPU. Sums run over blocks and then inside one block; a token of probability 0 is never returned.
    """
    batch, v = z.shape
    p = jnp.exp(z - jnp.max(z, axis=-1, keepdims=True))
    p = jnp.pad(p, ((0, 0), (0, -v % blocks))).reshape(batch, blocks, -1)
    mass = jnp.sum(p, axis=-1)
    upto = jnp.cumsum(mass, axis=-1)
    rest = jax.vmap(jax.random.uniform)(keys) * upto[:, -1]
    block = _crossing(upto, mass, rest)
    pick = block[:, None]
    rest = rest - (jnp.take_along_axis(upto, pick, 1) - jnp.take_along_axis(mass, pick, 1))[:, 0]
    inside = jnp.take_along_axis(p, pick[:, :, None], 1)[:, 0]
    return (block * p.shape[-1] + _crossing(jnp.cumsum(inside, axis=-1), inside, rest)).astype(jnp.int32)


def _crossing(upto, mass, rest):
    """int [B]: the first entry with mass where the sums [B, n] pass `rest` [B]; the last such if rounding hides it."""
    some = mass > 0
    last = some.shape[1] - 1 - jnp.argmax(some[:, ::-1], axis=1)
    passed = some & (upto > rest[:, None])
    return jnp.where(jnp.any(passed, axis=1), jnp.argmax(passed, axis=1), last)
