"""Coloured spans: escaped text, the strongest score at full strength, bad input."""

import pytest

from ctg_jax.report import spans
from ctg_jax.types import InputError


def test_pieces_are_escaped_and_coloured_by_their_score():
    page = spans(["<b>good", " & ", "bad</b>"], [2.0, 0.0, -1.0])
    assert "&lt;b&gt;good" in page and " &amp; " in page and "<b>" not in page
    assert "rgba(230, 126, 34, 1.00)" in page and "rgba(41, 128, 185, 0.50)" in page and 'title="-1.000"' in page
    assert spans([], []).startswith("<p") and "0.00" in spans(["a"], [0.0])


def test_scores_must_fit():
    with pytest.raises(InputError, match="1 scores for 2 pieces"):
        spans(["a", "b"], [1.0])
    with pytest.raises(InputError, match="finite"):
        spans(["a"], [float("nan")])
