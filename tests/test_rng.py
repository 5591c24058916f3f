"""`rng.draw`: the distance of what it draws to the softmax, by the derivation below, and what it draws in extremes.

A draw is two races of independent exponential times E[k] / r[k]: between blocks, then inside the winner. With exact
arithmetic token v is drawn with probability (block's share) · (share in the block). There are three sources of error.

1. The rates are float32. The distribution that they stand for is computed here in float64 from the rates themselves.
2. The times are float32, each off by a factor of at most 1 ± eps. The winner can differ from the exact one only where
   the second time is within a factor 1 + 2 eps of the first. With shares s[k] and winner k, the gap between them is
   exponential at rate R (1 - s[k]) (times are memoryless) and the first time exponential at rate R, so this has
   probability at most 2 eps (1 - s[k]); in all, 2 eps Σ s[k] (1 - s[k]) for one race.
3. A uniform number is one of 2^64 midpoints. Taking it for its cell moves E by a factor of at most 1 ± 2^-65 / u, which
   eps covers for u > 2^-40; that any of n numbers is smaller has probability n 2^-40.

The total variation distance is at most the sum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax import rng

V = 50_257
draw = jax.jit(rng.draw)


def softmax(z):
    q = np.exp(np.asarray(z, np.float64) - np.max(z))
    return q / q.sum()


def relative_error():
    """eps: of `exponential`, measured over all of its range; of the quotient, 2^-24; and of the midpoints, 2^-25."""
    random = np.random.default_rng(0)
    high = random.integers(0, 1 << 32, 1 << 18, dtype=np.uint64) >> random.integers(0, 32, 1 << 18, dtype=np.uint64)
    high = np.concatenate([high, (1 << 32) - 1 - high, [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]]).astype(np.uint64)
    low = random.integers(0, 1 << 32, len(high), dtype=np.uint64)
    found = np.asarray(rng.exponential(jnp.asarray(np.stack([high, low], axis=-1).astype(np.uint32))), np.float64)
    assert np.isfinite(found).all() and (found > 0).all()
    place = (np.longdouble(1) * high * 2**32 + low + np.longdouble(0.5)) / np.longdouble(2) ** 64
    rest = (np.longdouble(1) * ((1 << 32) - 1 - high) * 2**32 + ((1 << 32) - 1 - low) + np.longdouble(0.5)) / 2**64
    exact = np.where(high < 1 << 31, -np.log1p(-place), -np.log(rest)).astype(np.float64)
    return np.abs(found / exact - 1).max() + 2.0**-24 + 2.0**-25


def distance(z):
    """An upper bound of the total variation distance between a draw and softmax(z), z [V]."""
    rates = np.asarray(rng.race_rates(jnp.asarray(z)[None])[0], np.float64)
    mass = np.asarray(jnp.sum(rng.race_rates(jnp.asarray(z)[None]), axis=-1)[0], np.float64)  # as `draw` has them
    block = mass / mass.sum()
    inside = rates / np.maximum(rates.sum(axis=1, keepdims=True), 1e-300)
    implied = (block[:, None] * inside).reshape(-1)[: len(z)]
    close = np.sum(block * (1 - block)) + np.sum(block * np.sum(inside * (1 - inside), axis=1))
    rounded = 0.5 * np.abs(implied - softmax(z)).sum()
    return rounded + 2 * relative_error() * close + sum(rates.shape) * 2.0**-40, implied


def peaked(top=0.999, v=V):
    return jnp.full((v,), np.log((1 - top) / (v - 1)), jnp.float32).at[17].set(np.log(top))


def test_one_token_at_999_and_the_rest_flat():
    """In float32 the inverted distribution function could never draw 41,863 of these tokens, and the entropy of what it
    drew was .01695 where that of the softmax is .01873."""
    far, implied = distance(peaked())
    assert far < 3e-7 and (implied > 1.9e-8).all()
    entropy = -np.sum(implied * np.log(implied))
    assert entropy == pytest.approx(0.01873, abs=5e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_the_distance_for_flat_and_for_sharp_distributions(scale):
    assert distance(scale * jax.random.normal(jax.random.key(0), (V,)))[0] < 1.5e-6


def test_frequencies_follow_the_softmax_and_removed_tokens_are_never_drawn():
    q = np.array([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    n = 20_000
    for size in (6, 300):  # blocks of 3 tokens, and blocks that hold padding, or no mass at all
        z = np.full(size, -1e30, np.float32)
        z[:6][q > 0] = np.log(q[q > 0])
        tokens = draw(jax.random.split(jax.random.key(size), n), jnp.broadcast_to(jnp.asarray(z), (n, size)))
        counts = np.bincount(tokens, minlength=size) / n
        assert (counts[z == -1e30] == 0).all()
        assert np.abs(counts[:6] - q).max() < 4 * np.sqrt(0.25 / n)


def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    """Tokens of probability 2^-26 and less, in a race that a token of mass 2^-20 wins: conditioned on what came out, so
    that rare events can be counted. The grid of a float32 uniform number, 2^-23, has no place for them."""
    n, v = 40_000, 64
    words = jax.vmap(lambda k: jax.random.bits(k, (v, 2), jnp.uint32))(jax.random.split(jax.random.key(3), n))
    small = words.at[:, 1:, 0].set(0).at[:, 1:, 0].add(words[:, 1:, 0] >> 26)  # u < 2^-26 for all tokens but the first
    times = rng.exponential(small)[:, 1:] / jnp.arange(1, v)[None]
    counts = np.bincount(np.argmin(times, axis=1), minlength=v - 1) / n
    want = np.arange(1, v) / np.arange(1, v).sum()
    assert np.abs(counts - want).max() < 5 * np.sqrt(want.max() / n)


@pytest.mark.parametrize("size", [1, 50, V])
def test_the_result_is_a_token_whatever_the_logits(size):
    keys = jax.random.split(jax.random.key(0), 6)
    bad = jnp.array([[jnp.nan], [jnp.inf], [-jnp.inf]])
    z = jnp.concatenate([jnp.broadcast_to(bad, (3, size)), jnp.zeros((3, size)).at[:, -1:].set(bad)])
    tokens = np.asarray(draw(keys, z))
    assert ((tokens >= 0) & (tokens < size)).all()


def test_a_draw_depends_on_the_row_alone():
    keys, z = jax.random.split(jax.random.key(0), 5), jax.random.normal(jax.random.key(1), (5, 1000))
    together = draw(keys, z).tolist()
    assert [int(draw(keys[i : i + 1], z[i : i + 1])[0]) for i in range(5)] == together
    assert draw(keys[::-1], z[::-1]).tolist() == together[::-1]
