"""Reports: rows of figures and samples as Markdown, HTML and PNG, with intervals and named scorers."""

from ctg_jax.report.plots import curves, frontier, settings
from ctg_jax.report.rows import Estimate, Line, collect, lines, row
from ctg_jax.report.spans import spans
from ctg_jax.report.write import escape, terminal, write

__all__ = [
    "Estimate",
    "Line",
    "collect",
    "curves",
    "escape",
    "frontier",
    "lines",
    "row",
    "settings",
    "spans",
    "terminal",
    "write",
]
