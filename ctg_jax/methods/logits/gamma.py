"""Gamma sampling: the probability of a set of tokens is moved to a power of itself, and nothing is learned.

Source: Wu & Sun 2022. For a set A of probability m and a number Γ between 0 and 1,

    m' = m ^ (tan(π Γ / 2) ^ alpha)

The tokens of A are scaled to m' together and all others to 1 - m', so that proportions inside and outside of A stay.
Γ < ½ raises A, Γ > ½ lowers it, ½ changes nothing. Several sets act in their order: what a set holds is frozen for the
sets after it, which share the remaining probability; a token of two sets belongs to the later one.

    control = gamma.make(lm, key, tokenizer=tokenizer, words=[["space", "rocket", "orbit"]], gamma=[0.2])

alpha 1 is the paper's rule, 0 the base model, and -1 exchanges Γ and 1 - Γ. As in the authors' code, truncation comes
before this control in a chain, since it would raise the unlikely tokens of the set as well; temperature comes after it.
The other exponents of that code are the settings "log", log 2 / log(1 / Γ), "inverse", 1 / Γ, and "linear", Γ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax.control import Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.constraints import marks
from ctg_jax.controls.streams import log_probabilities
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.models.lm import LM
from ctg_jax.types import InputError

LEAST = 1e-6  # a set whose share is below this, or above 1 less this, is left alone

EXPONENTS = {
    "tan": lambda g: jnp.tan(jnp.pi * g / 2),
    "log": lambda g: -jnp.log(2.0) / jnp.log(g),
    "inverse": lambda g: 1 / g,
    "linear": lambda g: g,
}


@struct.dataclass
class Gamma(Control):
    """The probabilities of K sets of tokens, moved one after the other.

    Attributes:
      member: float32 [K, V], at least ½ where a token belongs to a set.
      gamma: float32 [K], Γ of each set, between 0 and 1.
      alpha: float32 [] or, per row, [B]; 0 is the base model.
      activation: the exponent as a function of Γ, a key of `EXPONENTS`.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    member: jax.Array
    gamma: jax.Array
    alpha: jax.Array
    activation: str = struct.field(pytree_node=False, default="tan")
    cond: str | None = struct.field(pytree_node=False, default=None)

    def init(self, prompts, length):
        return per_row(self.alpha, prompts, self.cond)

    def logits(self, z, h, tokens, mask, state):
        if self.member.shape[1] != z.shape[-1]:
            raise InputError(
                f"The sets are of a vocabulary of {self.member.shape[1]} tokens, but the model has {z.shape[-1]}: make "
                "the control for this model."
            )
        start = now = log_probabilities(z)
        frozen = jnp.zeros((1, 1, z.shape[-1]), bool)
        for row, g in zip(self.member, self.gamma):
            inside = (row >= 0.5)[None, None]
            frozen &= ~inside
            q = jnp.exp(now)
            free = 1 - jnp.sum(jnp.where(frozen, q, 0.0), axis=-1, keepdims=True)
            share = jnp.sum(jnp.where(inside, q, 0.0), axis=-1, keepdims=True) / jnp.maximum(free, LEAST)
            usable = (share >= LEAST) & (share <= 1 - LEAST)
            old = jnp.log(jnp.where(usable, share, 0.5))
            new = old * jnp.exp(state * jnp.log(EXPONENTS[self.activation](g)))
            others = jnp.where(frozen, 0.0, _rest(new) - _rest(old))
            now += jnp.where(usable, jnp.where(inside, new - old, others), 0.0)
            frozen |= inside
        return z + (now - start), state


def _rest(log_share: jax.Array) -> jax.Array:
    """log(1 - m) of log m."""
    return jnp.log(-jnp.expm1(log_share))


def init(
    lm: LM,
    key: jax.Array,
    *,
    gamma: Sequence[float],
    words: Sequence[Sequence[str]] | None = None,
    sets: Sequence[Sequence[int]] | None = None,
    whole: bool = False,
    alpha: float = 1.0,
    activation: str = "tan",
    cond: str | None = None,
) -> Gamma:
    """The control of sets of token ids. Sets of words are empty until `make` has the tokenizer.

    Args:
      gamma: Γ of each set.
      words: the words of each set, of which `make` takes the first token, at the beginning of a text and inside one;
        or sets: the token ids of each set.
      whole: whether words that are more than one token are left out; their first token may begin many others.
      alpha, activation, cond: see `Gamma`.

    Raises:
      InputError: both or neither of words and sets, or as many as there are no `gamma`; Γ that is not between 0 and 1;
        an unknown activation; alpha that is not finite; an id outside the vocabulary.
    """
    if (words is None) == (sets is None):
        raise InputError("gamma needs either words or sets, and was given both or neither.")
    given = words if sets is None else sets
    if len(given) != len(gamma) or not len(gamma):
        raise InputError(f"There are {len(given)} sets and {len(gamma)} numbers gamma: give at least one, and as many.")
    for g in gamma:
        if not 0 < g < 1:
            raise InputError(f"gamma is {g}, expected a number between 0 and 1: below 0.5 raises a set.")
    if activation not in EXPONENTS:
        raise InputError(f"activation is {activation!r}, expected one of {', '.join(EXPONENTS)}.")
    if not isinstance(alpha, jax.Array) and not np.all(np.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}, expected a finite number.")
    rows = [marks(ids, lm.vocab) for ids in sets] if sets is not None else np.zeros((len(gamma), lm.vocab))
    numbers = (jnp.asarray(x, jnp.float32) for x in (np.asarray(rows), gamma, alpha))
    return Gamma(*numbers, activation, cond)


def make(lm: LM, key: jax.Array, *, tokenizer: Tokenizer, **settings: Any) -> Gamma:
    """`init` with the tokens of the words.

    Raises:
      InputError: a set of words without a token, and what `init` raises.
    """
    control = init(lm, key, **settings)
    if settings.get("words") is None:
        return control
    rows = []
    for words in settings["words"]:
        ids = first_tokens(tokenizer, words, settings.get("whole", False))
        if not ids:
            raise InputError(f"The set of words {list(words)[:3]} … has no token: set whole=False, or change it.")
        rows.append(marks(ids, lm.vocab))
    return control.replace(member=jnp.asarray(np.asarray(rows), jnp.float32))


def first_tokens(tokenizer: Tokenizer, words: Sequence[str], whole: bool) -> list[int]:
    """The first token of each word, at the beginning of a text and after a space; with `whole`, of those words alone
    that are one token. A token that is a space alone is passed over."""
    found = set()
    for ids in (*tokenizer.encode(list(words)), *tokenizer.encode_after(["a"] * len(words), [f" {w}" for w in words])):
        spelled = [i for i, text in zip(ids, tokenizer.token_texts(ids)) if text.strip()]
        if spelled and (len(spelled) == 1 or not whole):
            found.add(spelled[0])
    return sorted(found)


def example(lm: LM, key: jax.Array) -> Gamma:
    """Two overlapping sets, one raised and one lowered, for the laws."""
    half = lm.vocab // 2
    return init(lm, key, gamma=(0.2, 0.7), sets=(range(half), range(half - 2, half + 2)))


def neutral(control: Gamma) -> Gamma:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))
