"""Controlling word diffusion by gradients (Diffusion-LM, Li et al. 2022): energies of noisy vectors, and the updates
that lower them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from ctg_jax.models.diffusion import alpha_sigma, rows
from ctg_jax.models.samplers import SAMPLERS, Edit, Energy
from ctg_jax.models.word_diffusion import words
from ctg_jax.support import remove
from ctg_jax.types import InputError

PULLS = ("drawn", "mean")


@dataclasses.dataclass(frozen=True)
class How:
    """How a text is drawn and steered.

    Attributes:
      calls, sampler: `steps` and `sampler` of `samplers.sample`.
      clamp: see `estimate`.
      updates, rate: of Adagrad, after each step; 0.8 made every length and tag hold on E2E, where 0.1 had not. coef: of
        the pull back.
      pull: to what: what the sampler drew, over σ², the noise it holds ("drawn"), or the mean of the sampler's step,
        over the deviation of that step ("mean"), as the authors have it; see `steered`.
      floor: what Adagrad starts its sum of squares with: entries whose gradient is far below its root stay in place.
        With 0, as the authors have it, every entry moves by `rate` however small its gradient is.
      start: the token of an empty prompt, which rows do not begin with; None: they do (`whole_rows.start_token`).
    """

    calls: int = 100
    sampler: str = "ddpm"
    clamp: float = 0.0
    updates: int = 3
    rate: float = 0.1
    coef: float = 0.01
    floor: float = 1e-4
    pull: str = "drawn"
    start: int | None = None

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise InputError(f"sampler is {self.sampler!r}, expected one of {', '.join(SAMPLERS)}.")
        if not 0 <= self.clamp <= 1 or self.calls < 1 or min(self.updates, self.rate, self.coef, self.floor) < 0:
            raise InputError(f"{self}: expected clamp from 0 to 1, calls from 1, and the others from 0.")
        if self.pull not in PULLS:
            raise InputError(f"pull is {self.pull!r}, expected one of {', '.join(PULLS)}.")
        if self.pull == "mean" and self.sampler != "ddpm":
            raise InputError(f"pull is 'mean', but a step of the sampler {self.sampler!r} draws nothing: use ddpm.")


def energy(
    table: jax.Array,
    aims: Mapping[str, jax.Array],
    free: jax.Array,
    ends: tuple[int, ...],
    tags: jax.Array,
    classify: Callable[[jax.Array, jax.Array], jax.Array],
    fields: Mapping[str, int],
) -> Energy:
    """-log p(c | z) float32 [B] of noisy vectors z, summed over the controls c.

    Those of places are exact where words are independent and alike: a place counts -log of the probability, given its
    own vector, of the words that are allowed there.

    Args:
      aims: "length" int [B], the place in the row where the text ends: `ends[0]` from there on and none of `ends`
        before; "tags" int [B, S], of `tags` int [V]; and of fields their class int [B]. In all of them -1 asks for
        nothing.
      free: bool [B, S], the places that are not given.
      ends: ids that end a text, first the one that fills rows.
      classify: (z, γ) -> logits [B, Σ classes] of `fields`, name -> classes.
    """
    vocab, place = jnp.arange(len(table)), jnp.arange(free.shape[1])[None, :]

    def minus_log_p(z, gamma):
        total = jnp.zeros(len(z))
        logp = words(table, z, gamma) if {"length", "tags"} & set(aims) else None
        if "length" in aims:
            end = aims["length"][:, None]
            inner, fill = ~jnp.isin(vocab, jnp.asarray(ends, jnp.int32)), vocab == ends[0]
            right = jnp.where((place >= end)[:, :, None], fill[None, None, :], inner[None, None, :])
            total += _outside(logp, right, free & (end >= 0))
        if "tags" in aims:
            right = tags[None, None, :] == aims["tags"][:, :, None]
            total += _outside(logp, right, free & (aims["tags"] >= 0))
        logits = classify(z, gamma) if set(fields) & set(aims) else None
        at = 0
        for name, classes in fields.items():
            if name in aims:
                logp = jax.nn.log_softmax(logits[:, at : at + classes], axis=-1)
                mine = jnp.take_along_axis(logp, jnp.maximum(aims[name], 0)[:, None], axis=1)[:, 0]
                total -= jnp.where(aims[name] >= 0, mine, 0.0)
            at += classes
        return total

    return minus_log_p


def _outside(logp, right, counts):
    """-log p of the words that are right bool [B, S, V], summed over the places that count bool [B, S]."""
    inside = jax.nn.logsumexp(remove(logp, ~right), axis=-1)
    return -jnp.sum(jnp.where(counts, inside, 0.0), axis=1)


def steered(energy: Energy, scale: jax.Array, how: How) -> Edit:
    """What follows each step of the sampler: `updates` steps of Adagrad, each time from a new state, down
    scale · energy(z) + coef · |z - z'|² / σ², with z' what the sampler drew and σ the noise it holds (Li et al. 2022,
    section 5.1), or, as the authors' code has it, coef · |z - m|² / s with mean m and deviation s of the step.

    Args:
      scale: float32 [] or [B]; where it is 0 the sampler's latent is kept, bit for bit.
    """
    tx = optax.adagrad(how.rate, initial_accumulator_value=how.floor, eps=1e-10)

    def edit(step):
        z, gamma = step.z, step.gamma
        strength = jnp.broadcast_to(scale, z.shape[:1])
        if how.pull == "drawn":
            centre, width = z, rows(alpha_sigma(gamma)[1] ** 2, z)
        else:
            centre, width = step.mean, step.deviation

        def total(y):
            return jnp.sum(strength * energy(y, gamma)) + how.coef * jnp.sum((y - centre) ** 2 / width)

        def update(_, carry):
            y, state = carry
            change, state = tx.update(jax.grad(total)(y), state)
            return y + change, state

        def moved(z):
            return jax.lax.fori_loop(0, how.updates, update, (z, tx.init(z)))[0]

        y = jax.lax.cond(jnp.any(strength != 0), moved, lambda z: z, z)
        return jnp.where(rows(strength != 0, z), y, z)

    return edit
