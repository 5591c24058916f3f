"""Gaussian diffusion where everything is known: normal latents and mixtures of them, whose score has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax import rng
from ctg_jax.models import diffusion, samplers
from ctg_jax.models.diffusion import LogSnrSampler, Schedule
from ctg_jax.types import InputError

MEAN, DEVIATION = np.array([1.0, -0.5, 0.0], np.float32), np.array([0.5, 1.5, 1.0], np.float32)
ROWS = 4000
STEPS = {"ddpm": 200, "ddim": 100, "dpm++": 20}  # the error of the second order falls faster


def keys(n=ROWS, seed=0):
    return rng.per_example(jax.random.key(seed), jnp.arange(n))


def posterior(z, gamma, mean, deviation):
    """E[x | z] of x ~ N(mean, deviation²)."""
    alpha, sigma = (diffusion.rows(a, z) for a in diffusion.alpha_sigma(gamma))
    mean, variance = mean[None], deviation[None] ** 2
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (z - alpha * mean)


def normal(z, gamma):
    return posterior(z, gamma, jnp.asarray(MEAN), jnp.asarray(DEVIATION))


CENTRES = np.array([[2.0, 2.0, 0.0], [-2.0, 0.0, 1.0]], np.float32)
SHARE = np.array([0.3, 0.7], np.float32)


def mixture(z, gamma):
    """E[x | z] of two normals of deviation ½."""
    alpha, sigma = (diffusion.rows(a, z) for a in diffusion.alpha_sigma(gamma))
    half = jnp.full(3, 0.5)
    log = [
        jnp.log(s) - 0.5 * jnp.sum((z - alpha * c[None]) ** 2, axis=1) / (0.25 * alpha**2 + sigma**2)[:, 0]
        for s, c in zip(SHARE, jnp.asarray(CENTRES))
    ]
    p = jax.nn.softmax(jnp.stack(log), axis=0)
    return sum(p[i][:, None] * posterior(z, gamma, jnp.asarray(CENTRES[i]), half) for i in range(2))


def draw(estimate, sampler, n=ROWS, seed=0, **more):
    run = jax.jit(lambda k: samplers.sample(estimate, k, (3,), steps=STEPS[sampler], sampler=sampler, **more))
    return np.asarray(run(keys(n, seed)))


@pytest.mark.parametrize("kind", diffusion.PREDICTIONS)
def test_predictions_round_trip(kind):
    k = jax.random.split(jax.random.key(0), 3)
    x, eps = jax.random.normal(k[0], (64, 5)), jax.random.normal(k[1], (64, 5))
    gamma = jax.random.uniform(k[2], (64,), minval=-4.0, maxval=4.0)
    z = diffusion.noised(x, gamma, eps)
    back = diffusion.clean(kind, diffusion.target(kind, x, gamma, eps), z, gamma)
    alpha = np.asarray(diffusion.alpha_sigma(gamma)[0])[:, None]
    # From ε the estimate is divided by α, and so is the rounding of z.
    np.testing.assert_allclose(back * alpha, x * alpha, atol=1e-6)


def test_signal_and_noise_have_unit_power():
    alpha, sigma = diffusion.alpha_sigma(jnp.linspace(-15, 15, 31))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)


@pytest.mark.parametrize("kind", diffusion.SCHEDULES)
def test_schedules_fall_from_signal_to_noise(kind):
    gamma = np.asarray(Schedule(kind).log_snr(jnp.linspace(0, 1, 101)))
    assert np.all(np.diff(gamma) <= 0) and np.abs(gamma).max() <= diffusion.GAMMA
    assert gamma[0] > 4 and gamma[-1] < -9


def test_schedules_by_hand():
    t = jnp.asarray([0.25, 0.5])
    np.testing.assert_allclose(
        jax.nn.sigmoid(Schedule("cosine").log_snr(t)), np.cos([np.pi / 8, np.pi / 4]) ** 2, rtol=1e-5
    )
    np.testing.assert_allclose(jax.nn.sigmoid(Schedule("sqrt").log_snr(t)), 1 - np.sqrt([0.2501, 0.5001]), rtol=1e-5)
    np.testing.assert_allclose(Schedule("cosine", 3.0).log_snr(0.5), 2 * np.log(3), rtol=1e-5)
    np.testing.assert_allclose(
        jax.nn.sigmoid(Schedule("linear").log_snr(t)), np.exp([-0.025 - 9.95 / 16, -0.05 - 9.95 / 4]), rtol=1e-5
    )


def test_weights_are_of_the_error_they_name():
    gamma = jnp.asarray([-3.0, 0.0, 3.0])
    alpha, sigma = (np.asarray(a) for a in diffusion.alpha_sigma(gamma))
    np.testing.assert_allclose(diffusion.weight("snr", gamma), alpha**2, rtol=1e-6)
    np.testing.assert_allclose(diffusion.weight("x0", gamma), sigma**2, rtol=1e-6)
    grid = jnp.linspace(-15, 15, 400)
    on_noise = np.asarray(diffusion.weight("asymmetric", grid) / diffusion.alpha_sigma(grid)[0] ** 2)
    assert np.all(np.diff(on_noise) < 0)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_every_sampler_reaches_a_normal(sampler):
    x = draw(normal, sampler)
    np.testing.assert_allclose(x.mean(0), MEAN, atol=4 * DEVIATION.max() / np.sqrt(ROWS))
    np.testing.assert_allclose(np.cov(x.T), np.diag(DEVIATION**2), atol=0.15)
    np.testing.assert_allclose(x.std(0), DEVIATION, rtol=0.05)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_every_sampler_reaches_a_mixture(sampler):
    x = draw(mixture, sampler, variance=1.0) if sampler == "ddpm" else draw(mixture, sampler)
    near = np.argmin([((x - c) ** 2).sum(1) for c in CENTRES], axis=0)
    assert abs(near.mean() - SHARE[1]) < 0.03
    for i, centre in enumerate(CENTRES):
        np.testing.assert_allclose(x[near == i].mean(0), centre, atol=0.06)
        np.testing.assert_allclose(x[near == i].std(0), 0.5, atol=0.05)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_linear_guide_tilts_a_normal_exactly(sampler):
    w = jnp.asarray([0.8, -0.4, 0.5])
    estimate = samplers.guided(normal, lambda x, gamma: -x @ w, 2.0)
    x = draw(estimate, sampler)
    np.testing.assert_allclose(x.mean(0), MEAN + 2 * DEVIATION**2 * np.asarray(w), atol=0.1)
    np.testing.assert_allclose(x.std(0), DEVIATION, rtol=0.06)


def test_without_the_jacobian_a_standard_normal_is_tilted_exactly():
    w = jnp.asarray([0.8, -0.4, 0.5])
    standard = lambda z, gamma: posterior(z, gamma, jnp.zeros(3), jnp.ones(3))  # noqa: E731
    x = draw(samplers.guided(standard, lambda x, gamma: -x @ w, 2.0, through=False), "dpm++")
    np.testing.assert_allclose(x.mean(0), 2 * np.asarray(w), atol=0.08)
    np.testing.assert_allclose(x.std(0), 1.0, rtol=0.06)


def test_a_linear_classifier_averaged_over_the_noise_gives_its_posterior():
    """p(x) = N(0, I), p(y | x) = sigmoid(w x + b): along w the posterior is one integral."""
    w, b = np.array([1.5, 0.0, -2.0], np.float32), -1.0
    k = keys()
    energy = samplers.averaged(
        lambda x, gamma: -jax.nn.log_sigmoid(x @ w + b), k, 64, lambda gamma: diffusion.alpha_sigma(gamma)[1]
    )
    standard = lambda z, gamma: posterior(z, gamma, jnp.zeros(3), jnp.ones(3))  # noqa: E731
    x = np.asarray(
        jax.jit(lambda k: samplers.sample(samplers.guided(standard, energy, 1.0), k, (3,), steps=100, variance=1.0))(k)
    )
    size = np.linalg.norm(w)
    u = np.linspace(-6, 6, 2001)
    density = np.exp(-(u**2) / 2) / (1 + np.exp(-(size * u + b)))
    mean = (u * density).sum() / density.sum()
    deviation = np.sqrt((u**2 * density).sum() / density.sum() - mean**2)
    along = x @ w / size
    assert abs(along.mean() - mean) < 0.06 and abs(along.std() - deviation) < 0.06
    assert abs((x @ np.array([0.0, 1.0, 0.0])).mean()) < 0.06


def test_the_mean_over_the_noise_is_of_likelihoods_or_of_losses():
    """By hand: with two samples of noise, whichever they are, the one bounds the other from below."""
    keys = rng.per_example(jax.random.key(0), jnp.arange(3))
    seen = []

    def energy(x, gamma):
        seen.append(x)
        return jnp.sum(x**2, axis=1)

    x, gamma = jnp.ones((3, 2)), jnp.zeros(3)
    wide = lambda gamma: jnp.full_like(gamma, 0.5)  # noqa: E731
    with jax.disable_jit():
        likelihood = samplers.averaged(energy, keys, 2, wide)(x, gamma)
        loss = samplers.averaged(energy, keys, 2, wide, "loss")(x, gamma)
    drawn = jnp.stack([x + 0.5 * samplers.noise(rng.at_step(keys, i), (2,)) for i in range(2)])
    e = np.asarray(jnp.sum(drawn**2, axis=2), np.float64)
    np.testing.assert_allclose(likelihood, -np.log(np.mean(np.exp(-e), axis=0)), rtol=1e-5)
    np.testing.assert_allclose(loss, np.log(np.mean(np.exp(e), axis=0)), rtol=1e-5)
    with pytest.raises(InputError, match="mean is 'median', expected one of likelihood, loss"):
        samplers.averaged(energy, keys, 2, wide, "median")


@pytest.mark.parametrize("variance", [0.0, 0.2, 1.0])
def test_the_variance_of_one_ancestral_step_by_hand(variance):
    """Two steps of a model that says the clean latent is 0: what is left is the noise, α_s/α_t (σ_s²/σ_t²) of the first
    and what the step draws, whose variance lies between the smallest and the largest."""
    n, seen = 20000, []

    def zero(z, gamma):
        seen.append(z)
        return jnp.zeros_like(z)

    keys = rng.per_example(jax.random.key(0), jnp.arange(n))
    schedule = diffusion.Schedule()
    with jax.disable_jit():
        samplers.sample(zero, keys, (1,), schedule=schedule, steps=2, variance=variance)
    first, second = (np.asarray(z, np.float64)[:, 0] for z in seen)
    a_t, a_s = (float(diffusion.alpha_sigma(schedule.log_snr(t))[0]) ** 2 for t in (1.0, 0.5))
    ratio = a_t / a_s
    smallest, largest = (1 - a_s) / (1 - a_t) * (1 - ratio), 1 - ratio
    drawn = second - np.sqrt(ratio) * (1 - a_s) / (1 - a_t) * first
    expected = smallest ** (1 - variance) * largest**variance
    assert np.var(drawn) == pytest.approx(expected, rel=0.05)


def test_no_guidance_is_no_guide_to_the_bit():
    guided = samplers.guided(normal, lambda x, gamma: jnp.sum(x**2, axis=1), 0.0)
    np.testing.assert_array_equal(draw(guided, "ddim", n=16), draw(normal, "ddim", n=16))
    free = samplers.classifier_free(normal, mixture, 1.0)
    np.testing.assert_array_equal(draw(free, "dpm++", n=16), draw(normal, "dpm++", n=16))


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_row_alone_is_the_row_in_its_batch(sampler):
    both = draw(mixture, sampler, n=8)
    np.testing.assert_allclose(draw(mixture, sampler, n=1), both[:1], atol=1e-6)


def test_each_row_has_its_own_scale():
    energy = lambda x, gamma: -x[:, 0]  # noqa: E731
    run = lambda scale: samplers.sample(samplers.guided(normal, energy, scale), keys(2), (3,), steps=20)  # noqa: E731
    both = run(jnp.asarray([0.0, 3.0]))
    np.testing.assert_allclose(both[0], run(0.0)[0], atol=1e-6)
    np.testing.assert_allclose(both[1], run(3.0)[1], atol=1e-6)


def test_importance_weights_leave_every_mean_as_it_is():
    loss = lambda gamma: jnp.exp(-((gamma - 3) ** 2) / 8)  # noqa: E731
    bins = jnp.log(loss(jnp.linspace(-15, 15, 100)) + 1e-4)
    flat, sharp = (LogSnrSampler(b).draw(keys(20000)) for b in (jnp.zeros(100), bins))
    exact = float(jnp.mean(loss(jnp.linspace(-15, 15, 10001))))
    estimates = [loss(gamma) * w for gamma, w in (flat, sharp)]
    np.testing.assert_allclose([np.mean(e) for e in estimates], exact, rtol=0.05)
    np.testing.assert_allclose(flat[1], 1.0, rtol=1e-5)
    assert np.var(estimates[1]) < 0.2 * np.var(estimates[0])


def test_the_bins_learn_the_loss_by_gradient():
    loss = lambda gamma: jnp.where(gamma > 0, 4.0, 0.5)  # noqa: E731
    bins = jnp.zeros(10)

    def step(bins, key):
        sampler = LogSnrSampler(bins)
        gamma, _ = sampler.draw(rng.per_example(key, jnp.arange(256)))
        grad = jax.grad(lambda b: jnp.mean(LogSnrSampler(b).fit(gamma, loss(gamma))))(bins)
        return bins - 3.0 * grad, None

    bins, _ = jax.lax.scan(step, bins, jax.random.split(jax.random.key(0), 200))
    np.testing.assert_allclose(bins[:5], np.log(0.5), atol=1e-3)
    np.testing.assert_allclose(bins[5:], np.log(4.0), atol=1e-3)


def test_bad_input_is_one_sentence():
    for make in (
        lambda: Schedule("cubic"),
        lambda: Schedule("cosine", 0.0),
        lambda: diffusion.target("y", jnp.ones((1, 1)), jnp.ones(1), jnp.ones((1, 1))),
        lambda: diffusion.weight("none", 0.0),
        lambda: samplers.sample(normal, keys(1), (3,), sampler="euler"),
        lambda: samplers.sample(normal, keys(1), (3,), steps=0),
        lambda: samplers.averaged(lambda x, g: x[:, 0], keys(1), -1, lambda g: g),
    ):
        with pytest.raises(InputError, match="expected"):
            make()
