"""Blanks in given texts, filled by a model that writes whole rows (`ctg_jax.learn.whole_rows`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import rng
from ctg_jax.control import Chain
from ctg_jax.controls import constraints
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.decode import strategies
from ctg_jax.learn.whole_rows import WORDS, WholeRows, end_token
from ctg_jax.stages.sampling import Options
from ctg_jax.types import InputError, Prompts

OPEN = -1  # a token that is to be written


@dataclasses.dataclass(frozen=True)
class Blanks:
    """How blanks are written in a text.

    Attributes:
      mark: the text that stands for a blank.
      tokens: the tokens that are written in place of each; masked models write rows in which places are fixed.
    """

    mark: str = "___"
    tokens: int = 4

    def __post_init__(self):
        if not isinstance(self.mark, str) or not self.mark.strip():
            raise InputError(f"blank is {self.mark!r:.60}, expected a text that marks a blank, such as '___'")
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 1:
            raise InputError(f"blank_tokens is {self.tokens!r:.60}, expected a whole number of at least 1")

    def row(self, tokenizer: Tokenizer, text: str, number: int) -> list[int]:
        """The tokens of a text, `OPEN` in its blanks. A space before a blank belongs to what is written there.

        Raises:
          InputError: text number `number` is no text, or has no blank or nothing but blanks.
        """
        if not isinstance(text, str):
            raise InputError(f"text {number} is {text!r:.60}, expected a text with blanks")
        pieces = text.split(self.mark)
        if len(pieces) == 1:
            raise InputError(f"text {number} has no blank: write {self.mark!r} where words are missing")
        if not any(piece.strip() for piece in pieces):
            raise InputError(f"text {number} holds nothing but blanks: give at least one word")
        pieces = [piece.removesuffix(" ") for piece in pieces[:-1]] + pieces[-1:]
        first = tokenizer.encode_prompts([pieces[0]])[0] if pieces[0] or tokenizer.adds_bos else []
        # Behind a blank a text is encoded as behind a word, so that no tokenizer puts a space before it.
        rest = tokenizer.encode_after([pieces[0] or "."] * (len(pieces) - 1), pieces[1:])
        return first + [token for piece in rest for token in [OPEN] * self.tokens + piece]


def fill(
    model: Any,
    params: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    control: Any,
    options: Options,
    blanks: Blanks,
) -> Iterator[list[dict[str, Any]]]:
    """Yields batches of records of texts whose blanks are filled, `options.n` for each, in order, with prompt_id,
    sample, prompt (the text as given), text and tokens (of the whole text), and whole, True.

    A text ends where it ended: no end token is written in a blank. What follows its end in a row is given too.

    Args:
      model, params, tokenizer: what `sampling.opened` returns. control: a `Masked` or a `WordDiffusion`.
      options: n, greedy, batch and seed are read.

    Raises:
      InputError: no texts, a control that does not write whole rows, a text without a blank or too long for a row, and
        what `strategies.run` raises.
    """
    strategy = strategies.of(control)
    if not isinstance(strategy, WholeRows):
        raise InputError(
            "the control does not write whole rows, so it cannot fill blanks in a text: give a model that "
            "mdlm or diffusion_lm fitted"
        )
    if not texts:
        raise InputError("there are no texts to fill: give at least one with a blank")
    vocab, length = strategy.shape(control)
    end = end_token(tokenizer, "the model")
    rows = np.full((len(texts), length), end, np.int32)
    for i, text in enumerate(texts):
        row = blanks.row(tokenizer, text, i + 1)
        if len(row) > length:
            raise InputError(
                f"text {i + 1} has {len(row)} tokens with its blanks, but rows of {length} tokens were trained on: "
                "shorten it or fit with a larger length"
            )
        rows[i, : len(row)] = row
    banned = ~tokenizer.known(vocab) | constraints.marks(tokenizer.ends, vocab)
    chain = Chain((constraints.Ban(jnp.asarray(banned)), control))
    sampling = dataclasses.replace(options, max_new=length, stop=()).sampling(tokenizer)
    work = [(i, j) for i in range(len(texts)) for j in range(options.n)]
    batch = min(options.batch, len(work))
    for at in range(0, len(work), batch):
        part = work[at : at + batch]
        full = part + [part[0]] * (batch - len(part))
        none = np.zeros((batch, 1), np.int32)
        keys = rng.per_example(jax.random.key(options.seed), np.asarray(full))
        prompts = Prompts(none, none.astype(bool), keys, {WORDS: rows[[i for i, _ in full]]})
        out = strategies.run(model, params, prompts, chain, sampling)
        kept = [
            tokenizer.before_end(row[real].tolist()) for row, real in zip(np.asarray(out.tokens), np.asarray(out.mask))
        ]
        written = tokenizer.decode(kept[: len(part)])
        yield [
            {"prompt_id": i, "sample": j, "prompt": texts[i], "text": text, "tokens": ids, "whole": True}
            for (i, j), text, ids in zip(part, written, kept)
        ]
