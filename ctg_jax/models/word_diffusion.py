"""Continuous diffusion over word vectors (Diffusion-LM, Li et al. 2022): the vectors and the way back to words, the
network that reads noisy vectors, its errors, and the updates that steer what it writes."""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ctg_jax import rng
from ctg_jax.models.denoiser import Denoiser, Trunk
from ctg_jax.models.diffusion import Schedule, alpha_sigma, noised, rows
from ctg_jax.models.layers import Dense, param
from ctg_jax.models.samplers import Estimate, noise
from ctg_jax.support import remove
from ctg_jax.types import Params

SCHEDULE = Schedule("sqrt")
FIRST = 1 / 200  # times below this are the first step, whose target is the vector itself


@dataclasses.dataclass(frozen=True)
class VectorDenoiser:
    """Noisy vectors [B, T, d] at γ [B] -> `out` numbers for each of them, float32 [B, T, out].

    The same architecture predicts the words of the vectors (out = V) and classifies noisy texts (the mean over T).

    Attributes:
      dim: d. trunk: the transformer; its `positions` is the longest T.
    """

    trunk: Trunk
    dim: int
    out: int

    def init(self, key: jax.Array) -> Params:
        """Random parameters."""
        z = jnp.zeros((1, 1, self.dim))
        return _VectorNetwork(self).init(key, z, jnp.zeros(1), jnp.zeros((1, 1), bool))["params"]

    def apply(self, params: Params, z: jax.Array, gamma: jax.Array, given: jax.Array | None = None) -> jax.Array:
        """See the class. given: bool [B, T], the positions where z is clean; None: all are noisy."""
        given = jnp.zeros(z.shape[:2], bool) if given is None else given
        return _VectorNetwork(self).apply({"params": params}, z, gamma, given)


class _VectorNetwork(nn.Module):
    net: VectorDenoiser

    @nn.compact
    def __call__(self, z, gamma, given):
        c = self.net.trunk
        seen = param(self, "given", nn.initializers.normal(0.02), (c.width,), c.param_dtype)
        x = Dense(c.width, c, True, 10.0, name="in")(z)
        x = x + jnp.where(given[:, :, None], seen[None, None].astype(x.dtype), 0)
        x = Denoiser(c, name="denoiser")(x, gamma)
        return Dense(self.net.out, c, True, name="out")(x).astype(jnp.float32)


def vectors(raw: jax.Array) -> jax.Array:
    """float32 [V, d]: every word's vector at norm √d, so that its entries have unit power and γ is their log-SNR
    (Dieleman et al. 2022, section 3.1); without it the loss is lowered by shrinking them."""
    raw = raw.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(raw * raw, axis=-1, keepdims=True) + 1e-12)
    return raw / norm * jnp.sqrt(jnp.float32(raw.shape[-1]))


def words(table: jax.Array, z: jax.Array, gamma: jax.Array | None = None) -> jax.Array:
    """log p(word | z) float32 [B, T, V] of vectors z [B, T, d], with a uniform prior over the words of the table
    [V, d].

    It is the posterior of w where z = α EMB(w) + σ ε, for γ [B]; without γ, for α = σ = 1: the rounding distribution
    softmax(z · EMB(w)) of Li et al. 2022 where the vectors have one norm.
    """
    alpha, sigma = (1.0, 1.0) if gamma is None else (rows(a, z) for a in alpha_sigma(gamma))
    inner = jnp.einsum("btd,vd->btv", z.astype(jnp.float32), table)
    half = 0.5 * jnp.sum(table * table, axis=-1)[None, None]
    return jax.nn.log_softmax((alpha * inner - alpha**2 * half) / sigma**2, axis=-1)


def nearest(table: jax.Array, x: jax.Array, banned: jax.Array | None = None) -> jax.Array:
    """int32 [B, T]: the word whose vector is nearest to each x [B, T, d], without those that are banned, bool [V];
    the first one of a tie."""
    half = 0.5 * jnp.sum(table * table, axis=-1)[None, None]
    near = jnp.einsum("btd,vd->btv", x, table) - half
    near = near if banned is None else remove(near, banned[None, None])
    return jnp.argmax(near, axis=-1).astype(jnp.int32)


def errors(net: VectorDenoiser, params: Params, tokens: jax.Array, keys: jax.Array) -> tuple[jax.Array, ...]:
    """The terms of the losses, at one random time for each row: (bool [B, S], which tokens were not given; and
    float32 [B, S] each |x0 - f(z_t)|² / d, -log p(w | x0) and -log p(w | z_t)).

    x0 ~ N(EMB(w), σ0²) and t is uniform; in the first step the error is that of EMB(w) (Li et al. 2022, section 4.2).
    Half of the rows are written freely; in a quarter a prefix is given, and in a quarter tokens anywhere, whose share
    is uniformly random.

    Args:
      params: {"raw": [V, d], "net": those of `net`}. tokens: int [B, S]. keys: of the rows, [B].
    """
    table = vectors(params["raw"])
    e = table[tokens]
    of = {name: jax.vmap(partial(rng.stream, name=name))(keys) for name in ("time", "word", "noise", "given")}
    t = jax.vmap(jax.random.uniform)(of["time"])
    alpha, sigma = alpha_sigma(SCHEDULE.log_snr(0.0))
    x0 = e + sigma / alpha * noise(of["word"], e.shape[1:])
    given, gamma = _given(of["given"], tokens.shape[1]), SCHEDULE.log_snr(t)
    z = noised(x0, gamma, noise(of["noise"], e.shape[1:]))
    logp = jax.nn.log_softmax(net.apply(params["net"], jnp.where(given[:, :, None], e, z), gamma, given), axis=-1)
    f = jnp.exp(logp) @ table
    error = jnp.mean((jnp.where(rows(t < FIRST, e), e, x0) - f) ** 2, axis=-1)
    true = tokens[:, :, None]
    rounding, reading = (-jnp.take_along_axis(x, true, axis=2)[:, :, 0] for x in (words(table, x0), logp))
    return ~given, error, rounding, reading


def _given(keys, length):
    """bool [B, S]: which tokens of a row of training are given; never all of them."""

    def one(key):
        kind, share, each, last = jax.random.split(key, 4)
        kind, share = jax.random.uniform(kind), jax.random.uniform(share)
        place = jnp.arange(length)
        prefix, anywhere = place < share * (length - 1), jax.random.uniform(each, (length,)) < share
        anywhere &= place != jax.random.randint(last, (), 0, length)
        return jnp.where(kind < 0.5, False, jnp.where(kind < 0.75, prefix, anywhere))

    return jax.vmap(one)(keys)


def estimate(
    net: VectorDenoiser, params: Params, table: jax.Array, tokens: jax.Array, given: jax.Array, clamp: float = 0.0
) -> Estimate:
    """The estimate of the clean vectors of rows whose tokens int [B, S] are known where given bool [B, S]: the mean of
    the word vectors over the distribution that the network predicts (Dieleman et al. 2022, section 3.1), which is f of
    Li et al. 2022.

    Args:
      clamp: the last share of the time, in which the nearest word vectors take the place of the estimate (the clamping
        trick of Li et al. 2022, section 4.3); 0 for never.
    """
    known, where = table[tokens], given[:, :, None]

    def clean(z, gamma):
        x = jax.nn.softmax(net.apply(params, jnp.where(where, known, z), gamma, given), axis=-1) @ table
        if clamp:
            late = gamma >= SCHEDULE.log_snr(jnp.float32(clamp))
            x = jnp.where(rows(late, x), table[nearest(table, x)], x)
        return jnp.where(where, known, x)

    return clean


def noisy(e: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(z [B, S, d], γ [B]): the vectors e [B, S, d] at a uniform time for each of the keys [B]."""
    of = {name: jax.vmap(partial(rng.stream, name=name))(keys) for name in ("time", "noise")}
    gamma = SCHEDULE.log_snr(jax.vmap(jax.random.uniform)(of["time"]))
    return noised(e, gamma, noise(of["noise"], e.shape[1:])), gamma


def classify(reader: VectorDenoiser, params: Params, z: jax.Array, gamma: jax.Array) -> jax.Array:
    """Logits float32 [B, out] of noisy texts z [B, S, d] at γ [B]."""
    return jnp.mean(reader.apply(params, z, gamma), axis=1)
