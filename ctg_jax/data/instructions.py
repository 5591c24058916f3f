"""Prompts with text around them, for language models that read along under prompts of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ctg_jax.data.tokenizer import Tokenizer, pad_rows


def instructed(
    tokenizer: Tokenizer, texts: Sequence[str], before: Sequence[str], after: Sequence[str] = ()
) -> np.ndarray:
    """What `controls.streams.Stream.own` reads: int32 [n, N, T'], the tokens of every text between each of N pieces of
    text, with -1 for padding on the left. Each is encoded as one text.

    Args:
      texts: n prompts.
      before: N texts to put before a prompt. after: N texts to put after it, or none.
    """
    after = after or [""] * len(before)
    rows = tokenizer.encode_prompts([b + text + a for text in texts for b, a in zip(before, after, strict=True)])
    tokens, _ = pad_rows(rows, max(map(len, rows)), -1, left=True)
    return tokens.reshape(len(texts), len(before), -1)
