"""Tables between the vocabularies of two tokenizers, for a language model that reads along with one of another kind.

The map follows PM-MinED of Wu et al. 2024 (cross-model control): a token is given its equal, else, among the tokens
that begin it or that it begins, the one at the least edit distance.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from ctg_jax.data.tokenizer import Tokenizer


def token_map(tokenizer: Tokenizer, other: Tokenizer, vocab: int) -> np.ndarray:
    """int32 [vocab]: the token of `other` that takes the place of each token of `tokenizer`, -1 where none does.

    Tokens that end a text are mapped to the one that does so in `other`. A token that is a part of a character, which
    has no text of its own, has an equal only by the spelling of the vocabulary.
    """
    texts, theirs = _texts(tokenizer), _texts(other)
    ids: dict[str, int] = {}
    for i, text in theirs.items():
        ids.setdefault(text, i)
    known = sorted(text for text in ids if text.strip())
    found = np.full(vocab, -1, np.int32)
    for i, text in texts.items():
        same = other.id(tokenizer.token(i))
        if i in tokenizer.ends:
            found[i] = other.ends[0] if other.ends else -1
        elif "\ufffd" in text or not text:
            found[i] = -1 if same is None else same
        elif text in ids:
            found[i] = ids[text]
        else:
            parts = [text[:n] for n in range(1, len(text)) if text[:n] in ids and text[:n].strip()]
            at = bisect_left(known, text)
            while at < len(known) and known[at].startswith(text):
                parts.append(known[at])
                at += 1
            # Where one string begins the other, their edit distance is the difference of their lengths.
            if parts:
                found[i] = ids[min(parts, key=lambda part: (abs(len(part) - len(text)), part))]
    return found


def pieces(tokenizer: Tokenizer, other: Tokenizer, vocab: int) -> np.ndarray:
    """int32 [vocab, k]: the tokens of `other` that spell each token of `tokenizer` inside a text, with -1 for padding
    on the left; only -1 where the token has no text. One that ends a text is the one that does so in `other`."""
    rows: list[list[int]] = [[] for _ in range(vocab)]
    texts = {i: text for i, text in _texts(tokenizer).items() if text and "\ufffd" not in text}
    plain = [i for i in texts if i not in tokenizer.ends]
    for i, ids in zip(plain, other.encode_after(["a"] * len(plain), [texts[i] for i in plain])):
        rows[i] = ids
    for i in tokenizer.ends:
        rows[i] = list(other.ends[:1])
    width = max(1, *map(len, rows))
    return np.asarray([[-1] * (width - len(row)) + row for row in rows], np.int32)


def _texts(tokenizer: Tokenizer) -> dict[int, str]:
    ids = np.flatnonzero(tokenizer.known(tokenizer.vocab)).tolist()
    return dict(zip(ids, tokenizer.token_texts(ids)))
