"""Rows of a report: read from artifacts, columns that vary, mean and standard error over seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctg_jax.evaluation import Figure
from ctg_jax.io import dumps
from ctg_jax.run.stage import Artifact, open_artifact
from ctg_jax.types import InputError

RESERVED = ("method", "strength", "seed", "figures", "samples")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure of one line of the table: mean over seeds of the value and of the ends of its interval over prompts,
    and the standard error over seeds (None for one seed)."""

    value: float
    low: float
    high: float
    error: float | None
    seeds: int


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table: a method at a strength, under the columns that vary."""

    method: str
    strength: float | None
    columns: dict[str, Any]
    estimates: dict[str, Estimate]
    samples: list[Mapping[str, Any]]

    @property
    def label(self) -> str:
        """`steer @ 2` or `steer @ 2, positive`."""
        name = self.method if self.strength is None else f"{self.method} @ {self.strength:g}"
        return ", ".join([name, *(str(v) for v in self.columns.values() if v is not None)])


def row(figures: Artifact | Path | str, samples: Artifact | Path | str | None = None, **columns: Any) -> dict[str, Any]:
    """A row from an evaluation artifact, whose metrics.jsonl holds one figure a line (name, value, low, high, n), and
    from a samples artifact; `columns` are method, strength, seed and anything else that distinguishes rows.

    Raises:
      InputError: an artifact that is missing or damaged, or that holds no figure.
    """
    figures = _artifact(figures)
    found = {r["name"]: Figure.from_json(r) for r in figures.metrics() if "name" in r and "value" in r}
    if not found:
        raise InputError(
            f"{figures.path / 'metrics.jsonl'} holds no figure; expected lines with name, value, low, high"
        )
    texts = [] if samples is None else _artifact(samples).rows("samples.jsonl")
    return {"method": "base", **columns, "figures": found, "samples": texts}


def collect(root: Path | str, function: str = "evaluate") -> list[dict[str, Any]]:
    """A row for every finished evaluation below `root`, with the settings of all stages behind it as columns.

    Columns are named by their path through the inputs, e.g. `samples.controls.0.layer`. The method and the strength are
    those of the controls that made the samples; the seed joins those of sampling and fitting.
    """
    known = {p.parent.name.rpartition("-")[2]: p.parent for p in sorted(Path(root).glob("*/DONE"))}
    rows = []
    for path in known.values():
        artifact = Artifact(path, path.name.rpartition("-")[2])
        spec = artifact.spec
        if spec.get("stage", "").rpartition(".")[2] != function:
            continue
        columns = dict(_settings(spec, known, ""))
        samples = known.get(spec.get("inputs", {}).get("samples") or "")
        made = {} if samples is None else Artifact(samples, "").spec
        controls = [Artifact(known[i], "").spec for i in made.get("inputs", {}).get("controls") or [] if i in known]
        strengths = [s for s in made.get("config", {}).get("strengths") or [] if s is not None]
        # The bootstrap's own seed moves no figure but its interval, so it is no seed of the experiment.
        seeds = {name: columns.pop(name) for name in list(columns) if name.rpartition(".")[2] == "seed"}
        seeds = {name: str(seed) for name, seed in seeds.items() if name != "seed"}
        columns.pop("samples.strengths", None)
        columns |= {
            "method": " + ".join(c.get("method", c["stage"].rpartition(".")[2]) for c in controls) or "base",
            "strength": strengths[0] if len(strengths) == 1 else None,
            "seed": "/".join(seeds.values()) or None,
        }
        rows.append(row(artifact, samples, **columns))
    if not rows:
        raise InputError(f"{root} holds no finished {function} stage; run an experiment with that root first")
    return rows


def lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The lines of the table in the order of the rows, seeds put together, columns that never vary left out.

    Raises:
      InputError: no rows, a row without method or figures, two rows that nothing distinguishes.
    """
    if not rows:
        raise InputError("rows are empty; a report needs at least one row with a method and its figures")
    for i, r in enumerate(rows):
        if not isinstance(r.get("method"), str) or not isinstance(r.get("figures"), Mapping):
            raise InputError(f"row {i} lacks 'method' (string) or 'figures' (name -> figure); both are needed")
    varying = _varying(rows)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for r in rows:
        key = _key([r["method"], r.get("strength"), *(r.get(c) for c in varying)])
        groups.setdefault(key, []).append(r)
    out = []
    for members in groups.values():
        seeds = [m.get("seed") for m in members]
        if len(set(seeds)) < len(seeds):
            raise InputError(
                f"{len(members)} rows of method {members[0]['method']!r} agree in strength, seed and every column; "
                "give each its own seed or a column that distinguishes them"
            )
        first = members[0]
        strength = None if first.get("strength") is None else float(first["strength"])
        columns = {c: first.get(c) for c in varying}
        out.append(Line(first["method"], strength, columns, _estimates(members), list(first.get("samples") or [])))
    return out


def _estimates(members: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    estimates = {}
    for name in dict.fromkeys(n for m in members for n in m["figures"]):
        found = [m["figures"][name] for m in members if name in m["figures"]]
        figures = [f if isinstance(f, Figure) else Figure.from_json(f) for f in found]
        k = len(figures)
        value, low, high = (math.fsum(getattr(f, end) for f in figures) / k for end in ("value", "low", "high"))
        error = None
        if k > 1:
            error = math.sqrt(math.fsum((f.value - value) ** 2 for f in figures) / (k - 1) / k)
        estimates[name] = Estimate(value, low, high, error, k)
    return estimates


def _varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns with at least two values. A missing value counts only among rows of one method, because it is no
    difference in settings that the base has no learning rate."""
    names = dict.fromkeys(c for r in rows for c in r if c not in RESERVED)
    methods = {r["method"] for r in rows}

    def distinct(column, chosen):
        return len({_key(r.get(column)) for r in chosen})

    return [
        c
        for c in names
        if distinct(c, [r for r in rows if r.get(c) is not None]) > 1
        or any(distinct(c, [r for r in rows if r["method"] == m]) > 1 for m in methods)
    ]


def _key(value: Any) -> str:
    return dumps(value, sort_keys=True, allow_nan=True, default=str)


def _settings(spec: Mapping[str, Any], known: Mapping[str, Path], prefix: str) -> Iterator[tuple[str, Any]]:
    """(column, value) of a stage and, by way of its inputs, of every stage before it."""
    for name, value in (spec.get("config") or {}).items():
        yield from _flat(prefix + name, value)
    for name, ids in (spec.get("inputs") or {}).items():
        several = isinstance(ids, list)
        for i, id in enumerate(ids if several else [ids]):
            if id in known:
                inner = f"{prefix}{name}.{i}." if several else f"{prefix}{name}."
                yield from _settings(Artifact(known[id], id).spec, known, inner)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value


def _artifact(value: Artifact | Path | str) -> Artifact:
    return value if isinstance(value, Artifact) else open_artifact(value)
