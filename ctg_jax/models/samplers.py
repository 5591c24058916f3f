"""Samplers of Gaussian diffusion, each one `lax.scan`, and their guides.

A model is its estimate of the clean latent, `estimate(z [B, …], gamma [B]) -> x [B, …]`; a guide is an energy of that
estimate, whose gradient moves it. Every row has a key of its own, so a row does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ctg_jax import rng
from ctg_jax.models.diffusion import Schedule, alpha_sigma, rows
from ctg_jax.types import InputError

Estimate = Callable[[jax.Array, jax.Array], jax.Array]  # (z [B, …], gamma [B]) -> x [B, …]
Energy = Callable[[jax.Array, jax.Array], jax.Array]  # (x [B, …], gamma [B]) -> [B]


class Step(NamedTuple):
    """What a sampler tells of a step that it took.

    Attributes:
      z: the new latent float32 [B, …]. x: the estimate of the clean latent before the step [B, …].
      mean, deviation: of the normal distribution [B, …] and [] that z was drawn from; a deterministic step has z and 0.
      gamma: the log-SNR of z [B]. keys: of the step [B].
    """

    z: jax.Array
    x: jax.Array
    mean: jax.Array
    deviation: jax.Array
    gamma: jax.Array
    keys: jax.Array


Edit = Callable[[Step], jax.Array]  # what a sampler may do to each new latent: a step -> z [B, …]

SAMPLERS = ("ddpm", "ddim", "dpm++")
MEANS = ("likelihood", "loss")


def guided(estimate: Estimate, energy: Energy, scale: jax.Array | float, *, through: bool = True) -> Estimate:
    """The estimate of a model whose density is multiplied by exp(-scale · energy).

    The score at z gains -scale · ∇_z energy(x̂(z)), which is x̂ - scale · (σ² / α) ∇_z energy (Dhariwal and Nichol 2021,
    with the classifier read at the clean estimate). It is exact where log E[exp(-energy(x)) | z] is that of the
    estimate up to a constant: for a Gaussian x and a linear energy. Where all scales are 0 the result is
    bitwise the estimate, and no gradient is computed.

    Args:
      scale: float [] or [B].
      through: whether the gradient runs through the model. If not, the Jacobian of the model is approximated by α, that
        of a standard normal latent: the estimate moves by -scale · σ² ∇_x̂ energy(x̂), which is exact for such latents,
        needs no backward pass, and does not amplify the errors of the model where α is small.
    """
    scale = jnp.asarray(scale, jnp.float32)

    def moved(z, gamma):
        alpha, sigma = alpha_sigma(gamma)

        def total(y):
            x = estimate(y, gamma) if through else y
            return jnp.sum(energy(x, gamma)), x

        gradient, x = jax.grad(total, has_aux=True)(z if through else estimate(z, gamma))
        return x - rows(scale * (sigma**2 / alpha if through else sigma**2), x) * gradient

    def either(z, gamma):
        return jax.lax.cond(jnp.any(scale != 0), moved, estimate, z, gamma)

    return either


def classifier_free(conditioned: Estimate, unconditioned: Estimate, weight: jax.Array | float) -> Estimate:
    """weight · conditioned + (1 - weight) · unconditioned (Ho and Salimans 2022); where all weights are 1
    only the first is computed, and returned bitwise."""
    weight = jnp.asarray(weight, jnp.float32)

    def mixed(z, gamma):
        w = rows(weight, z)
        return w * conditioned(z, gamma) + (1 - w) * unconditioned(z, gamma)

    def either(z, gamma):
        return jax.lax.cond(jnp.any(weight != 1), mixed, conditioned, z, gamma)

    return either


def averaged(
    energy: Energy, keys: jax.Array, samples: int, deviation: Callable[[jax.Array], jax.Array], mean: str = "likelihood"
) -> Energy:
    """-log of the mean of exp(-energy) over Gaussian noise around the estimate: the classifier's likelihood averaged
    over what the clean latent may be (Monte Carlo, Song et al. 2023, "Loss-guided diffusion").

    Exact where the clean latent given z is normal with that deviation: for a standard normal latent it is σ.

    Args:
      keys: [B], of the rows.
      samples: of the noise; 0 is the energy itself.
      deviation: γ [B] -> the noise's deviation [B].
      mean: "likelihood"; or "loss": the log of the mean of exp(energy) instead, as the authors of DGLM have it, which
        the samples with the largest loss decide.
    """
    if mean not in MEANS:
        raise InputError(f"mean is {mean!r}, expected one of {', '.join(MEANS)}.")
    if samples < 0:
        raise InputError(f"samples is {samples}, expected 0 or more.")
    if samples == 0:
        return energy

    sign = -1.0 if mean == "likelihood" else 1.0

    def total(x, gamma):
        width = rows(deviation(gamma), x)

        def one(i):
            return sign * energy(x + width * noise(rng.at_step(keys, i), x.shape[1:]), gamma)

        values = jax.vmap(one)(jnp.arange(samples))
        return sign * (jax.nn.logsumexp(values, axis=0) - jnp.log(samples))

    return total


def noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 [B, *shape], each row from its own key [B]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def sample(
    estimate: Estimate,
    keys: jax.Array,
    shape: tuple[int, ...],
    *,
    schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
    steps: int = 50,
    sampler: str = "ddpm",
    variance: float = 0.2,
    edit: Edit | None = None,
) -> jax.Array:
    """Draws clean latents float32 [B, *shape], one for each key [B].

    Args:
      estimate: the model, guided or not.
      schedule: the log-SNR of the steps, which are evenly spaced in time.
      steps: calls of `estimate`.
      sampler: "ddpm", ancestral (Ho et al. 2020); "ddim", deterministic given the first noise (Song et al. 2021); or
        "dpm++", DPM-Solver++ (2M), of second order and deterministic too (Lu et al. 2022).
      variance: of "ddpm": log-interpolates between the smallest (0) and the largest (1) variance of a step (Nichol
        and Dhariwal 2021, eq. 15).
      edit: changes every latent but the last, which is the estimate itself.

    Raises:
      InputError: an unknown sampler, or fewer than one step.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}.")
    if steps < 1:
        raise InputError(f"steps is {steps}, expected at least 1.")
    gammas = schedule.log_snr(jnp.linspace(1.0, 0.0, steps + 1))
    batch = keys.shape[0]
    z = noise(rng.at_step(keys, 0), shape)

    def at(z, gamma):
        # Barriers isolate the estimate, so that it compiles to the same bits with and without a guide.
        z, gamma = jax.lax.optimization_barrier((z, jnp.full((batch,), gamma)))
        return jax.lax.optimization_barrier(estimate(z, gamma))

    def ddpm(z, x, before, gamma, then, i):
        (alpha, sigma), (alpha_then, sigma_then) = alpha_sigma(gamma), alpha_sigma(then)
        gain = -jnp.expm1(gamma - then)  # the share of the noise that this step removes
        mean = alpha_then * (z * (1 - gain) / alpha + gain * x)
        deviation = sigma_then ** (1 - variance) * sigma**variance * jnp.sqrt(gain)
        return mean + deviation * noise(rng.at_step(keys, i + 1), shape), mean, deviation

    def ddim(z, x, before, gamma, then, i):
        (alpha, sigma), (alpha_then, sigma_then) = alpha_sigma(gamma), alpha_sigma(then)
        moved = alpha_then * x + sigma_then * (z - alpha * x) / sigma
        return moved, moved, jnp.float32(0)

    def solver(z, x, before, gamma, then, i):
        (_, sigma), (alpha_then, sigma_then) = alpha_sigma(gamma), alpha_sigma(then)
        h, previous = (then - gamma) / 2, (gamma - gammas[jnp.maximum(i - 1, 0)]) / 2
        ahead = jnp.where(i == 0, 0.0, h / (2 * jnp.where(i == 0, 1.0, previous)))
        moved = sigma_then / sigma * z - alpha_then * jnp.expm1(-h) * (x + ahead * (x - before))
        return moved, moved, jnp.float32(0)

    move = {"ddpm": ddpm, "ddim": ddim, "dpm++": solver}[sampler]

    def step(carry, i):
        z, before = carry
        gamma, then = gammas[i], gammas[i + 1]
        x = at(z, gamma)
        z, mean, deviation = move(z, x, before, gamma, then, i)
        if edit is not None:
            z = edit(Step(z, x, mean, deviation, jnp.full((batch,), then), rng.at_step(keys, steps + 1 + i)))
        return (z, x), None

    (z, _), _ = jax.lax.scan(step, (z, jnp.zeros_like(z)), jnp.arange(steps - 1))
    return at(z, gammas[steps - 1])
