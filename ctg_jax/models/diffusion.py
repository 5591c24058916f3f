"""Gaussian diffusion of continuous latents: noise schedules over the log-SNR, predictions, loss weights, and which
log-SNR to train on.

A noisy latent is z = α x + σ ε with α² = sigmoid(γ), σ² = sigmoid(-γ), where γ is the log of the signal-to-noise ratio
(Kingma et al. 2021, "Variational diffusion models"). Time runs from 0 (clean) to 1 (noise) and only names points of a
schedule; networks and samplers take γ. `ctg_jax.models.samplers` draws from such models.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax.types import InputError

GAMMA = 15.0  # log-SNR is kept in ±15: beyond, one of signal and noise is below 1e-3 of the other
SCHEDULES = ("cosine", "linear", "sqrt", "loglinear")
PREDICTIONS = ("x0", "eps", "v")
WEIGHTS = ("v", "snr", "x0", "asymmetric")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The log-SNR as a function of time.

    Attributes:
      kind: "cosine" (α² = cos² πt/2, Nichol and Dhariwal 2021), "linear" (β from 0.1 to 20, Song et al. 2021), "sqrt"
        (α² = 1 - sqrt(t + 1e-4), Li et al. 2022), or "loglinear" (γ falls evenly in t).
      scale: of the signal; adds 2 log(scale) to γ, so that above 1 there is less noise (Hoogeboom et al. 2023).
    """

    kind: str = "cosine"
    scale: float = 1.0

    def __post_init__(self):
        if self.kind not in SCHEDULES:
            raise InputError(f"schedule is {self.kind!r}, expected one of {', '.join(SCHEDULES)}.")
        if not self.scale > 0:
            raise InputError(f"scale is {self.scale}, expected above 0.")

    def log_snr(self, t: jax.Array) -> jax.Array:
        """γ float32 of times in [0, 1], within ±`GAMMA`."""
        t = jnp.asarray(t, jnp.float32)
        if self.kind == "loglinear":
            gamma = GAMMA * (1 - 2 * t)
        elif self.kind == "cosine":
            gamma = -2 * jnp.log(jnp.tan(jnp.clip(t, 1e-6, 1 - 1e-6) * math.pi / 2))
        elif self.kind == "linear":
            signal = -0.1 * t - 9.95 * t * t  # log α² = -∫β
            gamma = signal - jnp.log(-jnp.expm1(jnp.minimum(signal, -1e-9)))
        else:
            noise = jnp.clip(jnp.sqrt(t + 1e-4), 1e-7, 1 - 1e-7)
            gamma = jnp.log1p(-noise) - jnp.log(noise)
        return jnp.clip(gamma + 2 * math.log(self.scale), -GAMMA, GAMMA)


def alpha_sigma(gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(α, σ) at log-SNR γ, each of its shape."""
    gamma = jnp.asarray(gamma, jnp.float32)
    return jnp.sqrt(jax.nn.sigmoid(gamma)), jnp.sqrt(jax.nn.sigmoid(-gamma))


def rows(values: jax.Array, like: jax.Array) -> jax.Array:
    """Values [B] shaped to multiply an array [B, …]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def noised(x: jax.Array, gamma: jax.Array, noise: jax.Array) -> jax.Array:
    """z = α x + σ ε for x and noise [B, …] at γ [B]."""
    alpha, sigma = alpha_sigma(gamma)
    return rows(alpha, x) * x + rows(sigma, x) * noise


def target(kind: str, x: jax.Array, gamma: jax.Array, noise: jax.Array) -> jax.Array:
    """The target of a network that predicts `kind`: x, ε, or v = α ε - σ x (Salimans and Ho 2022)."""
    alpha, sigma = alpha_sigma(gamma)
    values = {"x0": lambda: x, "eps": lambda: noise, "v": lambda: rows(alpha, x) * noise - rows(sigma, x) * x}
    return values[_known(kind)]()


def clean(kind: str, prediction: jax.Array, z: jax.Array, gamma: jax.Array) -> jax.Array:
    """The estimate of x [B, …] that a prediction at z [B, …] and γ [B] implies."""
    alpha, sigma = (rows(a, z) for a in alpha_sigma(gamma))
    values = {
        "x0": lambda: prediction,
        "eps": lambda: (z - sigma * prediction) / alpha,
        "v": lambda: alpha * z - sigma * prediction,
    }
    return values[_known(kind)]()


def weight(kind: str, gamma: jax.Array) -> jax.Array:
    """Weight of the squared error of v at γ, float32 of its shape.

    Args:
      kind: "v", errors of v count alike; "snr", errors of ε do (Ho et al. 2020, a weight of SNR on x); "x0", errors of
        x do; "asymmetric", a Cauchy bell below γ = 0 and a normal one above, both of width 2.4 (Lovelace et al.
        2024): its weight on ε falls with γ everywhere, as that of a likelihood bound does (Kingma and Gao 2023).
    """
    if kind not in WEIGHTS:
        raise InputError(f"weight is {kind!r}, expected one of {', '.join(WEIGHTS)}.")
    gamma = jnp.asarray(gamma, jnp.float32)
    if kind == "asymmetric":
        s = gamma / 2.4
        return jnp.where(s < 0, 1 / (1 + s * s), jnp.exp(-0.5 * s * s))
    # (x - x̂)² = σ² (v - v̂)² and (ε - ε̂)² = α² (v - v̂)²
    return {"v": jnp.ones_like, "snr": jax.nn.sigmoid, "x0": lambda g: jax.nn.sigmoid(-g)}[kind](gamma)


@struct.dataclass
class LogSnrSampler:
    """Draws the γ of training examples where the loss is large, and gives the weights that correct for it.

    γ is uniform within each of n bins of [-`GAMMA`, `GAMMA`]; a bin is drawn in proportion to its loss, mixed with a
    tenth of the uniform distribution (importance sampling as in Kingma and Gao 2023, appendix F). With all bins equal
    it is uniform. The losses are learned like everything else: `fit` is a squared error whose gradient step is the
    moving average of each bin.

    Attributes:
      log_loss: float32 [n], log of the weighted loss of each bin.
    """

    log_loss: jax.Array

    def probabilities(self) -> jax.Array:
        """float32 [n]."""
        p = jax.nn.softmax(jax.lax.stop_gradient(self.log_loss))
        return 0.9 * p + 0.1 / p.shape[0]

    def draw(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(γ [B], importance weights [B], of mean 1) for keys [B]."""
        p, n = self.probabilities(), self.log_loss.shape[0]

        def one(key):
            which, where = jax.random.split(key)
            i = jax.random.categorical(which, jnp.log(p))
            return i, (i + jax.random.uniform(where)) / n

        i, place = jax.vmap(one)(keys)
        return GAMMA * (2 * place - 1), 1 / (n * p[i])

    def fit(self, gamma: jax.Array, losses: jax.Array) -> jax.Array:
        """½ (log_loss[bin] - log loss)², float32 [B], for weighted losses [B] seen at γ [B]."""
        n = self.log_loss.shape[0]
        i = jnp.clip((gamma / GAMMA + 1) / 2 * n, 0, n - 1).astype(jnp.int32)
        seen = jnp.log(jnp.maximum(jax.lax.stop_gradient(losses), 1e-8))
        return 0.5 * (self.log_loss[i] - seen) ** 2


def _known(kind: str) -> str:
    if kind not in PREDICTIONS:
        raise InputError(f"prediction is {kind!r}, expected one of {', '.join(PREDICTIONS)}.")
    return kind
