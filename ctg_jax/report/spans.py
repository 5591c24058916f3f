"""`spans`: a text whose pieces are coloured by a score each."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from ctg_jax.types import InputError

_UP, _DOWN = "230, 126, 34", "41, 128, 185"  # orange above 0, blue below; told apart by most colour-blind readers


def spans(pieces: Sequence[str], scores: Sequence[float]) -> str:
    """One HTML paragraph: each piece on a ground as strong as its score is beside the largest, with the score as its
    tooltip. Pieces are escaped.

    Raises:
      InputError: not one score for each piece, or one that is not finite.
    """
    if len(pieces) != len(scores) or not all(map(math.isfinite, scores)):
        raise InputError(f"{len(scores)} scores for {len(pieces)} pieces of text: give a finite one for each.")
    most = max((abs(s) for s in scores), default=0.0) or 1.0
    parts = []
    for piece, score in zip(pieces, scores):
        ground = f"rgba({_UP if score > 0 else _DOWN}, {abs(score) / most:.2f})"
        parts.append(f'<span style="background: {ground}" title="{score:+.3f}">{html.escape(piece)}</span>')
    return f'<p style="white-space: pre-wrap">{"".join(parts)}</p>'
