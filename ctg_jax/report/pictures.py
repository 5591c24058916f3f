"""Small pictures of one experiment each: a heat map, curves of one figure over another, a scatter of points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctg_jax.io import write_bytes
from ctg_jax.report.plots import _png


def heat_map(path: Path, cells: Sequence[Mapping[str, Any]], rows: str, columns: str, value: str) -> None:
    """Each cell's `value` as colour and number, over the values of two of its keys; the mean where several agree."""
    from matplotlib.figure import Figure

    down = list(dict.fromkeys(str(c[rows]) for c in cells))
    across = list(dict.fromkeys(str(c[columns]) for c in cells))
    found: dict[tuple[str, str], list[float]] = {}
    for c in cells:
        found.setdefault((str(c[rows]), str(c[columns])), []).append(c[value])
    table = np.asarray([[np.mean(found.get((r, c), [np.nan])) for c in across] for r in down])
    fig = Figure(figsize=(1.6 + 1.1 * len(across), 1.2 + 0.36 * len(down)), layout="constrained")
    ax = fig.add_subplot()
    image = ax.imshow(table, aspect="auto", cmap="viridis")
    ax.set_xticks(range(len(across)), across)
    ax.set_yticks(range(len(down)), down)
    ax.set(xlabel=columns, ylabel=rows)
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (i, j), x in np.ndenumerate(table):
        if np.isfinite(x):
            ax.text(j, i, f"{x:.1f}", ha="center", va="center", color="white" if x < middle else "black", fontsize=9)
    fig.colorbar(image, label=value)
    write_bytes(path, _png(fig))


def curves(path: Path, rows: Sequence[Mapping[str, Any]], x: str, y: str, line: str, label: str) -> None:
    """Figure y over figure x with its interval, one line for each value of `line`, points labelled by `label`."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6.4, 4.4), layout="constrained")
    ax = fig.add_subplot()
    for value in dict.fromkeys(row[line] for row in rows):
        mine = [row for row in rows if row[line] == value]
        xs, ys = ([row["figures"][name] for row in mine] for name in (x, y))
        low, high = ([f.value - f.low for f in ys], [f.high - f.value for f in ys])
        ax.errorbar(
            [f.value for f in xs], [f.value for f in ys], [low, high], marker="o", capsize=2, label=f"{line} {value}"
        )
        for row, a, b in zip(mine, xs, ys):
            ax.annotate(f"{row[label]:g}", (a.value, b.value), xytext=(4, 4), textcoords="offset points", fontsize=8)
    ax.set(xlabel=x, ylabel=y)
    ax.grid(alpha=0.3)
    ax.legend()
    write_bytes(path, _png(fig))


def scatter(path: Path, points: Sequence[Mapping[str, Any]], x: str, y: str) -> None:
    """Points with x, y and a label, one colour for each label."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5.6, 4.6), layout="constrained")
    ax = fig.add_subplot()
    for label in sorted({str(p["label"]) for p in points}):
        mine = [p for p in points if str(p["label"]) == label]
        ax.scatter([p["x"] for p in mine], [p["y"] for p in mine], s=10, alpha=0.6, label=f"label {label}")
    ax.set(xlabel=x, ylabel=y)
    ax.legend()
    write_bytes(path, _png(fig))
