"""Whether a language model has a row for every token id that it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ctg_jax.types import InputError

if TYPE_CHECKING:
    from ctg_jax.data.tokenizer import Tokenizer


def check_ids(ids: Any, rows: int, what: str, also: str = "") -> None:
    """InputError where token ids (of any shape, on the host) have no row in a model of `rows` tokens.

    what: where the ids are from, such as "prompts". also: what else is known, added to the size of the model.
    """
    ids = np.asarray(ids)
    bad = ids[(ids < 0) | (ids >= rows)]
    if bad.size:
        raise InputError(
            f"{what} holds the token id {int(bad.flat[0])}, but the model has {rows} tokens (0 to {rows - 1}){also}: "
            "use the tokenizer that the model was trained with, or give the model a row for each id"
        )


def check_sizes(tokenizer: Tokenizer, lm: Any, name: str) -> None:
    """InputError where a tokenizer has ids that the language model `lm`, called `name`, has no row for."""
    if tokenizer.vocab > lm.vocab:
        raise InputError(
            f"the tokenizer of {name} has {tokenizer.vocab} ids, but the model has {lm.vocab} tokens: use the "
            "tokenizer that the model was trained with, or give the model a row for each id"
        )


def check_shared(tokenizer: Tokenizer, other: Tokenizer, rows: int, name: str) -> None:
    """InputError where another model does not read and write the tokens of `tokenizer`, so that logits of the two
    cannot be combined.

    Args:
      tokenizer: that of the base model. other: that of the other model.
      rows: the number of tokens of the other model. name: what it is called in the message.
    """
    for i in range(tokenizer.vocab):
        mine, theirs = tokenizer.token(i), other.token(i)
        if mine is not None and (i >= rows or mine != theirs):
            raise InputError(
                f"{name} does not have the vocabulary of the base model: token {i} is {theirs!r} there and {mine!r} "
                "here, so their logits cannot be combined; use a model with the same tokenizer"
            )
