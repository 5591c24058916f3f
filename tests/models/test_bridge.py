"""Brownian bridges: their moments, the contrastive loss and its optimum, and latents that an encoder finds again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax.learn import sentence_bridge
from ctg_jax.models import bridge
from ctg_jax.types import InputError


def test_moments_and_the_contrast_by_hand():
    mean, variance = bridge.moments(jnp.zeros((1, 2)), jnp.array([[4.0, -4.0]]), *jnp.array([[2], [3], [6]]))
    np.testing.assert_allclose(mean, [[1, -1]])
    np.testing.assert_allclose(variance, [[0.75]])
    # The squared distances are .75 and 2.25, over 2 · .75.
    zt, others = mean + jnp.array([[0.75**0.5, 0.0]]), mean[:, None] + jnp.array([[[0.0, 1.5]]])
    loss = bridge.contrast(mean, variance, zt, others)
    np.testing.assert_allclose(loss, np.log(1 + np.exp(0.5 - 1.5)), rtol=1e-6)


@pytest.mark.parametrize("steps", [3, 5, 20])
def test_drawn_bridges_have_the_moments_of_a_bridge_at_every_step(steps):
    keys = jax.random.split(jax.random.key(0), 20_000)
    first, last = jnp.tile(jnp.array([1.0, 0.0]), (20_000, 1)), jnp.tile(jnp.array([0.0, 2.0]), (20_000, 1))
    z = np.asarray(bridge.sample(keys, first, last, steps, jnp.array([1.0, 4.0])))
    share = np.arange(steps) / (steps - 1)
    assert z.shape == (20_000, steps, 2)
    np.testing.assert_allclose(z[:, 0], first, atol=1e-5)
    np.testing.assert_allclose(z[:, -1], last, atol=1e-5)
    np.testing.assert_allclose(z.mean(0), np.stack([1 - share, 2 * share], 1), atol=0.05)
    bridged = np.minimum.outer(share, share) - np.outer(share, share)
    for dimension, variance in enumerate((1.0, 4.0)):
        np.testing.assert_allclose(np.cov(z[..., dimension].T), variance * bridged, atol=0.04 * variance)


def test_the_optimum_of_the_contrastive_loss():
    """Latents a x of true bridges x whose ends are normal with deviation τ: with many others the loss is, in closed
    form, a²/2 − ½ log(1 + a² V/σ²) − a² (τ²/2) / (2 (σ² + a² V)) + log n, with σ² = ½ and V = τ²/2 + ½ for the middle
    of two steps. Its minimum is near a = 1, the scale at which the latents have the variance of the bridge."""
    tau, n = 5.0, 2000
    ends, step, others = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, n), (n,), (n,)]))
    far = jax.random.normal(jax.random.key(3), (2, n))
    variance, spread = 0.5, tau**2 / 2 + 0.5
    first, last = tau * ends[:, :, None]
    middle = (first + last) / 2 + variance**0.5 * step[:, None]
    drawn = tau * (far[0] + far[1])[None, :, None] / 2 + variance**0.5 * others[None, :, None]

    @jax.jit
    def measured(a):
        mean, var = bridge.moments(a * first, a * last, *(jnp.full(n, t) for t in (0, 1, 2)))
        return jnp.mean(bridge.contrast(mean, var, a * middle, jnp.broadcast_to(a * drawn, (n, n, 1)))) - np.log(n)

    def exact(a):
        return a**2 / 2 - np.log(1 + a**2 * spread / variance) / 2 - a**2 * tau**2 / 4 / (variance + a**2 * spread)

    scales = np.linspace(0.6, 1.5, 19)
    found, wanted = np.array([measured(a) for a in scales]), exact(scales)
    np.testing.assert_allclose(found, wanted, atol=0.05)
    assert abs(scales[found.argmin()] - scales[wanted.argmin()]) < 0.11 and abs(scales[wanted.argmin()] - 1) < 0.06


def test_an_encoder_finds_the_latents_of_bridges_that_it_sees_through_a_linear_map():
    """The synthetic test of the authors: a linear reading of the latents it learns gives the true ones back."""
    documents, length = 200, 8
    draw = np.random.default_rng(0)
    ends = jnp.asarray(3 * draw.normal(size=(2, documents, 2)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), documents)
    true = np.asarray(bridge.sample(keys, *ends, length, length - 1.0)).reshape(-1, 2)
    seen = true @ np.array([[1.0, 0.5], [-0.3, 0.8]])
    seen = jnp.asarray((seen - seen.mean(0)) / seen.std(0), jnp.float32)
    starts = jnp.arange(documents) * length
    frozen = {"sentences": seen, "start": starts, "count": jnp.full(documents, length)}
    batches = [
        {"document": jnp.asarray(rows), "ids": jnp.asarray(rows, jnp.uint32)}
        for rows in draw.integers(0, documents, (300, 32))
    ]
    loss = sentence_bridge.loss(15, ends=0.0)
    params, _ = worlds.trained(loss, bridge.encoder(jax.random.key(1), 2, 2, 32), frozen, batches)
    z = np.concatenate([np.asarray(bridge.encode(params, seen)), np.ones((len(seen), 1))], axis=1)
    rest = true - z @ np.linalg.lstsq(z, true, rcond=None)[0]
    assert 1 - rest.var(0).sum() / true.var(0).sum() > 0.9


def test_three_places_of_a_document_are_all_equally_likely():
    draws = jax.vmap(sentence_bridge.three, (0, None))(jax.random.split(jax.random.key(0), 20_000), 5)
    found, counts = np.unique(np.asarray(draws), axis=0, return_counts=True)
    assert len(found) == 10 and (np.diff(found, axis=1) > 0).all() and found.min() == 0 and found.max() == 4
    np.testing.assert_allclose(counts / 20_000, 0.1, atol=0.01)


def test_the_variance_of_the_latents_of_documents():
    """True bridges of variance 3 a sentence."""
    keys = jax.random.split(jax.random.key(0), 2000)
    z = np.asarray(bridge.sample(keys, jnp.zeros((2000, 1)), jnp.ones((2000, 1)), 6, 3.0 * 5)).reshape(-1, 1)
    documents = [dict(start=6 * i, sentences=[""] * 6) for i in range(2000)]
    np.testing.assert_allclose(sentence_bridge.diffusion(documents, z), [3.0], rtol=0.05)


def test_bad_input():
    with pytest.raises(InputError, match="steps is 1, expected at least 2"):
        bridge.sample(jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 2)), jnp.zeros((1, 2)), 1, 1.0)
    with pytest.raises(InputError, match="latent is 0, expected at least 1"):
        bridge.encoder(jax.random.key(0), 4, 0)
    with pytest.raises(InputError, match="others is 0, expected at least 1"):
        sentence_bridge.loss(0)
    with pytest.raises(InputError, match=r"ends is -1\.0, expected a weight of at least 0"):
        sentence_bridge.loss(ends=-1.0)
