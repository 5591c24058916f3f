"""Losses of diffusion models that write whole rows, and of the classifiers that guide them.

Batches are those of `ctg_jax.data.pipeline`; what follows a text in its row is filled with end tokens, `eos`.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from ctg_jax.learn import losses
from ctg_jax.models import masked, word_diffusion
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.word_diffusion import VectorDenoiser
from ctg_jax.types import InputError, Sum

KINDS = ("bound", "film")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a masked diffusion model minimises: the section `objective` of a configuration.

    Attributes:
      kind: "bound", the bound of masked diffusion, or "film", the mean cross-entropy of masked tokens (FiLM).
      schedule, draws, block, interval: of the bound, see `masked.nelbo`. With a `block` the network is one of blocks
        (BD3LM, Arriola et al. 2025).
      rate: the two parameters of the Beta distribution of the masked share, see `masked.film`.
      mean: of "film", over the masked tokens of a "batch", or over those of a "row" and then over rows.
    """

    kind: str = "bound"
    schedule: str = "cosine"
    draws: int = 4
    rate: tuple[float, float] = (2.5, 2.5)
    mean: str = "batch"
    block: int = 0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        for name in ("rate", "interval"):  # configurations hold lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, neutral in (("block", 0), ("interval", (0.0, 1.0))):
            if self.kind == "film" and (found := getattr(self, name)) != neutral:
                raise InputError(f"objective.{name} is {found}, which the kind 'film' does not have: take 'bound'.")
        if self.kind not in KINDS or self.mean not in ("batch", "row"):
            raise InputError(
                f"objective is {self.kind!r} with the mean over a {self.mean!r}, expected a kind of {', '.join(KINDS)} "
                "and a mean over a batch or a row."
            )
        if len(self.rate) != 2 or min(self.rate) <= 0:
            raise InputError(f"rate is {self.rate}, expected the two positive parameters of a Beta distribution.")


def masked_loss(net: Transformer, eos: int, objective: Objective = Objective()) -> losses.LossFn:
    """The objective in nats per token; params are those of the network.

    The nats are those of whole rows, including the end tokens that fill them. The bound is divided by the number of
    tokens of the text, its end included, so it bounds the nats of the text.

    Raises:
      InputError: the network has blocks of another size than `objective.block`.
    """
    if objective.block != net.block:
        raise InputError(f"objective.block is {objective.block}, but the network has blocks of {net.block}.")

    def total(params, frozen, batch, keys):
        recover = partial(masked.recovery, net, params)
        rows, real = filled(batch, eos), jnp.any(batch["mask"], axis=1)
        if objective.kind == "film":
            nats, count = masked.film(recover, rows, keys, net.vocab - 1, objective.rate)
            share = count if objective.mean == "row" else jnp.ones_like(count)
            weight = jnp.where(real, count / share, 0.0)
            return Sum(jnp.sum(jnp.where(real, nats / share, 0.0)), jnp.sum(weight))
        nats = masked.nelbo(
            recover, rows, keys, net.vocab - 1, schedule=objective.schedule, draws=objective.draws,
            block=net.block, interval=objective.interval,
        )  # fmt: skip
        return Sum(jnp.sum(jnp.where(real, nats, 0.0)), jnp.sum(batch["mask"], dtype=jnp.float32))

    return total


def word_loss(net: VectorDenoiser, eos: int, *, read: float = 1.0) -> losses.LossFn:
    """|x0 - f(z_t)|² / d - log p(w | x0), plus `read` times -log p(w | z_t), per token that is not given (see
    `word_diffusion.errors`); params = {"raw": the word vectors, "net": those of the network}.

    The last term is not in the paper: f is the mean of the words under the distribution that the network predicts, and
    this term trains that distribution (Dieleman et al. 2022).
    """

    def total(params, frozen, batch, keys):
        free, *parts = word_diffusion.errors(net, params, filled(batch, eos), keys)
        free &= jnp.any(batch["mask"], axis=1)[:, None]
        names = ("error", "rounding", "reading")
        sums = {name: losses.masked_sum(value, free) for name, value in zip(names, parts)}
        value = sums["error"][0] + sums["rounding"][0] + read * sums["reading"][0]
        return Sum(value, sums["error"][1], sums)

    return total


def word_classifier_loss(reader: VectorDenoiser, fields: tuple, eos: int) -> losses.LossFn:
    """Cross-entropy of the classifier on word vectors noised at a uniform time, summed over fields; params are those of
    `reader`, frozen = {"raw": the word vectors}.

    Args:
      fields: (name, classes) of each field of the records; the outputs of `reader` are those of the fields in order.
    """

    def total(params, frozen, batch, keys):
        tokens = filled(batch, eos)
        table = word_diffusion.vectors(frozen["raw"])
        logits = word_diffusion.classify(reader, params, *word_diffusion.noisy(table[tokens], keys))
        at, count = 0, jnp.float32(len(tokens))
        value, metrics = jnp.float32(0), {}
        for name, classes in fields:
            mine = logits[:, at : at + classes]
            value += jnp.sum(losses.next_token(mine, batch[name]))
            right = jnp.sum(jnp.argmax(mine, axis=-1) == batch[name], dtype=jnp.float32)
            metrics[f"{name}_accuracy"] = (right, count)
            at += classes
        return Sum(value, count, metrics)

    return total


def filled(batch: dict, eos: int) -> jax.Array:
    """The tokens of a batch, int32 [B, S], with end tokens behind each text."""
    return jnp.where(batch["mask"], batch["tokens"], eos)
