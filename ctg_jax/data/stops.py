"""Texts that end a completion: where one occurs, in tokens and in characters.

A text may be spelled with many token sequences, and its last token may hold more than its end. So the decode loop ends
rows at the usual spelling alone, which saves work, and the exact place is found in the decoded text.
"""

from __future__ import annotations

from collections.abc import Sequence

from ctg_jax.data.tokenizer import Tokenizer


def spellings(tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each text, where they spell it: a tokenizer may drop or change characters that it does not know."""
    found = tokenizer.encode(list(stop)) if stop else []
    spelled = tokenizer.decode(found) if found else []
    return tuple(tuple(ids) for text, ids, s in zip(stop, found, spelled) if ids and text in s)


def tokens_until(tokenizer: Tokenizer, head: Sequence[int], row: Sequence[int], stop: Sequence[str]) -> int:
    """The number of tokens of a completion up to the one that completes a text of `stop`; all where none occurs.

    head: the tokens of its prompt.
    """
    texts = tokenizer.decode_after([head] * len(row), [row[: k + 1] for k in range(len(row))])
    return next((k + 1 for k, text in enumerate(texts) if any(s in text for s in stop)), len(row))


def cut(text: str, stop: Sequence[str]) -> str:
    """A completion up to the end of the first text of `stop` in it; all of it where none occurs."""
    ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text
