"""What the rounds of methods that learn from their own samples sampled: a picture for the report."""

from __future__ import annotations

from collections.abc import Sequence

from ctg_jax.report import plots
from ctg_jax.report.rows import Line

FIGURES = ("reward", "KL to base", "perplexity", "dist-2")
NOTE = (
    "What each round sampled, for methods that learn from their own samples: how the reward rises, and what it costs. "
    "Round 0 samples the language model before anything was learned. The end of a text counts as one of its tokens "
    "here, so perplexity is smaller than in the table of samples."
)
CAPTION = "Figures of the samples of each round, with the interval as a band; one line for each method."


def draw(table: Sequence[Line], theme: str = "light") -> bytes | None:
    """A panel for each figure over the rounds, a line for each method. None where no method has two rounds.

    Args:
      table: lines with a column "round".
    """
    known = [name for name in FIGURES if any(name in line.estimates for line in table)]
    if "round" not in (table[0].columns if table else {}) or not known:
        return None
    return plots.over(table, "round", known, theme)
