"""The lengths that rows of tokens are padded to: a few of them, so that few programs are compiled."""

from __future__ import annotations

import math

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def padded_length(n: int) -> int:
    """The smallest of `LENGTHS`, or of the powers of two above them, that is at least n."""
    return next((length for length in LENGTHS if length >= n), 2 ** math.ceil(math.log2(n)))
