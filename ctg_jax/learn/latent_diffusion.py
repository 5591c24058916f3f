"""Diffusion over the latents of texts: the denoiser, conditioned on the latent of the prefix, and its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ctg_jax import rng
from ctg_jax.learn import embeddings, fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.models import diffusion, samplers
from ctg_jax.models.denoiser import Trunk
from ctg_jax.models.diffusion import LogSnrSampler
from ctg_jax.models.latent_net import LatentNet
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, stage_function
from ctg_jax.types import Sum

BINS = 100  # of the log-SNR, for importance sampling


def network(
    latent: int,
    *,
    width: int = 256,
    depth: int = 6,
    heads: int = 4,
    pseudo_tokens: int = 16,
    spread: int = 4,
    context_spread: int = 0,
    join: str = "sequence",
    time_width: int = 0,
) -> LatentNet:
    """The denoiser: a `LatentNet` that reads latent and prefix, each as `pseudo_tokens`.

    Args:
      latent: Z. width, depth, heads, time_width: of its `Trunk`. pseudo_tokens, spread, context_spread, join: see
        `LatentNet`.
    """
    positions = pseudo_tokens * (1 if join == "features" else 2)
    trunk = Trunk(width=width, depth=depth, heads=heads, positions=positions, time_width=time_width)
    sizes = dict(pseudo_tokens=pseudo_tokens, spread=spread, context_spread=context_spread, join=join)
    return LatentNet(trunk, latent=latent, out=latent, context=latent, **sizes)


@stage_function("embeddings.denoiser", revision=1)
def denoise(
    run: Run,
    *,
    latents: Artifact,
    net: Mapping[str, Any] | None = None,
    weight: str = "asymmetric",
    drop: float = 0.1,
    training: Training = Training(
        steps=5000, batch=128, rate=1e-3, warmup=100, schedule="cosine", ema=0.999, save_every=500
    ),
    seed: int = 0,
) -> None:
    """Stage: trains the denoiser of standardised latents, conditioned on the prefix; its moving average is kept.

    Args:
      net: settings of `network`. weight: of the squared error of v, see `diffusion.weight`.
      drop: share of rows whose prefix is hidden, for classifier-free guidance.
      training: how it is trained. seed: of initial values, batches and noise.
    """
    x = embeddings.arrays(latents)[0]
    model = network(x.shape[1], **(net or {}))
    key = jax.random.key(seed)
    params = {"net": model.init(rng.stream(key, "init")), "bins": jnp.zeros(BINS)}
    # The bins are a moving average, which is plain gradient descent: at this rate a twentieth or so a visit.
    net_tx = training.optimizer(b2=0.99)
    tx = optax.partition({"net": net_tx, "bins": optax.sgd(3.0)}, {"net": "net", "bins": "bins"})
    mean, deviation = moments(x)
    batches = embeddings.batches(latents, batch=training.batch, seed=seed)
    averages = fitting.train(
        run, params, denoiser_loss(model, weight, drop), {"mean": mean, "deviation": deviation}, batches, training,
        seed=seed, tx=tx,
    )  # fmt: skip
    checkpoint.save(run.path / "state", averages["net"])
    run.discard("steps")
    run.record(net=dict(net or {}))


def denoiser_loss(net: LatentNet, weight: str = "asymmetric", drop: float = 0.1) -> losses.LossFn:
    """Weighted squared error of v, per dimension, at log-SNRs drawn by importance.

    params = {"net": …, "bins": float32 [n] of `LogSnrSampler`}; frozen has the latents' mean and deviation [Z], by
    which prefixes are standardised too: embeddings of length one are small numbers, which a network hardly reads
    beside a latent of variance one.
    """

    def total(params, frozen, batch, keys):
        chooser = LogSnrSampler(params["bins"])
        gamma, importance = chooser.draw(rng.named(keys, "gamma"))
        x = (batch["latent"] - frozen["mean"][None]) / frozen["deviation"][None]
        eps = samplers.noise(rng.named(keys, "noise"), x.shape[1:])
        given = jax.vmap(lambda key: jax.random.uniform(rng.stream(key, "drop")) >= drop)(keys)
        context = (batch["context"] - frozen["mean"][None]) / frozen["deviation"][None]
        v = net.apply(params["net"], diffusion.noised(x, gamma, eps), gamma, context, given)
        error = jnp.mean((v - diffusion.target("v", x, gamma, eps)) ** 2, axis=1)
        weighted = diffusion.weight(weight, gamma) * error
        count = jnp.float32(error.shape[0])
        value = jnp.sum(importance * weighted)
        own = jnp.sum(chooser.fit(gamma, weighted))
        return Sum(value + own, count, {"error": (jnp.sum(importance * error), count), "weighted": (value, count)})

    return total


def moments(x: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(mean, deviation) float32 [Z] of latents [n, Z]."""
    return jnp.asarray(x.mean(0)), jnp.asarray(np.maximum(x.std(0), 1e-6))
