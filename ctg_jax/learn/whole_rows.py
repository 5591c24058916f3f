"""What models that write whole rows share: how they complete prompts.

The rows have one length S, that of training, and what follows the end of a text is filled with end tokens, so that the
length of a text is part of what is modelled. A prompt is completed as the beginning of such a row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax.controls import constraints
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.decode import strategies
from ctg_jax.types import InputError, Prompts, Samples, Sampling

WORDS = "words"  # the entry of `prompts.cond` with tokens behind the prompt that are given, see `with_words`


@dataclasses.dataclass(frozen=True)
class WholeRows(strategies.Strategy):
    """Completes prompts by writing whole rows. The language model and its parameters are not read.

    A completion ends with its first end token or stop sequence. `Samples.logp` is 0, because the probability of a text
    has no closed form; `generated` is the number of calls of the network.
    """

    likelihood = False

    def shape(self, control: Any) -> tuple[int, int]:
        """(V, S): the size of the vocabulary and the length of a row."""
        raise NotImplementedError

    def write(self, prompts: Prompts, control: Any, sampling: Sampling, banned: jax.Array | None) -> Samples:
        """Completions without the tokens that are banned, bool [V] or None. Pure."""
        raise NotImplementedError

    def check(self, lm, prompts, control, sampling):
        """
        Raises:
          InputError: the control has another vocabulary, or the prompts and `max_new` do not fit a row.
        """
        control = constraints.apart(control)[1]
        vocab, length = self.shape(control)
        if lm.vocab != vocab:
            raise InputError(f"control has {vocab} tokens and the model {lm.vocab}: use the one it was fitted with.")
        strategies.check_row(prompts, sampling.max_new, length)

    def __call__(self, lm, params, prompts, control, sampling):
        banned, control = constraints.apart(control)
        return self.write(prompts, control, sampling, banned)


def start_token(tokenizer: Tokenizer) -> int | None:
    """The token that stands for an empty prompt (`Tokenizer.encode_prompts`) and that no row of training begins with;
    None where all rows begin with it."""
    return None if tokenizer.adds_bos else tokenizer.start


def placed(prompts: Prompts, length: int, start: int | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prompts at the beginning of rows: (tokens int32 [B, S], given bool [B, S], size int32 [B, 1] of each prompt).
    A prompt that is nothing but the token `start` is empty, see `start_token`."""
    size = jnp.sum(prompts.mask, axis=1)[:, None]
    column = jnp.arange(length)[None, :]
    padding = prompts.mask.shape[1] - size  # prompts are padded on the left
    tokens = moved(prompts.tokens, column + padding, 0)
    if start is not None:
        size = jnp.where((size == 1) & (tokens[:, :1] == start), 0, size)
    return tokens, column < size, size


def with_words(tokens: jax.Array, given: jax.Array, size: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tokens, given) of `placed` with `words` int [B, n] behind the prompts given too; -1 where a token is open."""
    inner = moved(words, jnp.arange(tokens.shape[1])[None, :] - size, -1)
    return jnp.where(inner >= 0, inner, tokens), given | (inner >= 0)


def moved(values: jax.Array, columns: jax.Array, other: jax.Array | int) -> jax.Array:
    """values [B, n] at `columns` int [B, S]; `other` where there is no such column."""
    n = values.shape[1]
    inside = (columns >= 0) & (columns < n)
    return jnp.where(inside, jnp.take_along_axis(values, jnp.clip(columns, 0, n - 1), axis=1), other)


def completed(rows: jax.Array, size: jax.Array, sampling: Sampling, calls: jax.Array) -> Samples:
    """The completions in rows int32 [B, S] behind prompts of `size` [B, 1] tokens. A token of -1 could not be written,
    because the outputs of the network were not finite; its log-probability is NaN."""
    text = jnp.take_along_axis(rows, size + jnp.arange(sampling.max_new)[None, :], axis=1)
    tokens, mask = strategies.cut(text, sampling)
    written = text >= 0
    return Samples(jnp.where(written, tokens, sampling.pad), mask, jnp.where(written, 0.0, jnp.nan), calls)


def end_token(tokenizer: Tokenizer, name: str) -> int:
    """The token that fills rows; InputError where the tokenizer, that of the model `name`, has no end token."""
    if tokenizer.eos is None:
        raise InputError(f"the tokenizer of {name} has no end token to fill rows with: use another model.")
    return tokenizer.eos
