"""The cells of an experiment as the rows of a report."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import ctg_jax
from ctg_jax import hosts, report
from ctg_jax.evaluation import Figure
from ctg_jax.report import pictures
from experiments import roots
from experiments.experiment import Cell


def write(root: str, spec: str, config: ConfigDict, cells: Sequence[Cell]) -> Path:
    """Writes the report of one experiment and returns the path of report.html."""
    return _write(root, spec, config, [_row(cell) for cell in cells], [_smooth(cell) for cell in cells], cells)


def write_grid(
    root: str,
    spec: str,
    config: ConfigDict,
    cells: Sequence[tuple[dict[str, Any], Cell]],
    about: dict[str, str] | None = None,
) -> Path:
    """Writes the report of a grid: pairs of changed settings and a cell. A setting of one method is a column of that
    method's rows alone, and a cell that several settings share is shown once. `about`: more facts for the report."""
    rows, smooth, seen = [], [], {}
    for changes, cell in cells:
        if cell.figures.id in seen:
            continue
        seen[cell.figures.id] = cell
        columns = {}
        for key, value in changes.items():
            section, _, rest = key.partition(".")
            label, _, setting = rest.partition(".")
            if section == "methods" and label == cell.label and setting != "strengths":
                columns[setting] = value
            elif section != "methods":
                columns[key] = value
        rows.append({**columns, **_row(cell)})
        smooth.append(_smooth(cell) and {**columns, **_smooth(cell)})
    return _write(root, spec, config, rows, smooth, list(seen.values()), about)


def _row(cell: Cell) -> dict[str, Any]:
    row = report.row(cell.figures, cell.samples, method=cell.label, strength=cell.strength, seed=cell.seed)
    if cell.human is not None:
        row["figures"] |= report.row(cell.human)["figures"]
    return row


def _smooth(cell: Cell) -> dict[str, Any] | None:
    if cell.smooth is None:
        return None
    return {**report.row(cell.smooth, method=cell.label, seed=cell.seed), "smooth": cell.smooth.id}


def _commit() -> str | None:
    """The commit of this checkout, with -dirty where files differ from it; None where there is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def name_of(spec: str) -> str:
    """What the files of an experiment are called: `FILE.py:ARGUMENT` is FILE-ARGUMENT."""
    file, _, argument = spec.partition(":")
    return "-".join(filter(None, (Path(file).stem, argument)))


def _write(
    root: str,
    spec: str,
    config: ConfigDict,
    rows: list[dict],
    smooth: list,
    cells: Sequence[Cell],
    more: dict[str, str] | None = None,
) -> Path:
    if not hosts.first():
        return None
    settings = config.to_dict()
    facts = cells[0].figures.spec
    about = {name: facts[name] for name in ("relevance", "encoder") if facts[name]}
    about |= {name: json.dumps(settings[name]) for name in ("lm", "prompts", "sample")}
    commit = _commit()
    version = ctg_jax.__version__ + (f", commit {commit}" if commit else "")
    # The cells of one method share their smoothness.
    swept = {row.pop("smooth"): row for row in smooth if row}
    folder = Path(root) / "reports" / name_of(spec)
    page = report.write(
        folder,
        rows,
        title=settings.get("title", Path(spec.partition(":")[0]).stem),
        scorers=facts["judges"],
        perplexity=facts["perplexity"],
        about={"configuration": spec, **about, **(more or {}), "ctg_jax": version},
        smooth=list(swept.values()),
    )
    _draw_rounds(folder, cells)
    roots.keep_files(root, folder)
    return page


def _draw_rounds(folder: Path, cells: Sequence[Cell]) -> None:
    """rounds-….png: what the methods that learn from rewards sampled over their rounds, against the KL to the base."""
    found: dict[str, dict[int, dict]] = {}
    for cell in cells:
        for row in cell.rounds.metrics() if cell.rounds else ():
            at = found.setdefault(cell.label, {}).setdefault(row["round"], {})
            at[row["name"]] = Figure(*(row[k] for k in ("value", "low", "high", "n")))
    points = [
        {"method": label, "round": r, "figures": figures}
        for label, all_ in found.items()
        for r, figures in all_.items()
    ]
    for name in ("reward", "perplexity", "dist-2") if points else ():
        pictures.curves(folder / f"rounds-{name}.png", points, "KL to base", name, "method", "round")
