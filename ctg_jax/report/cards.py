"""Which texts a report shows beside one another."""

from __future__ import annotations

from typing import Any

from ctg_jax.io import dumps
from ctg_jax.report.rows import Line

CARDS = 12  # texts beside one another for one prompt


def side_by_side(table: list[Line], prompts: int, texts: int) -> list[dict[str, Any]]:
    """The first prompts that most lines have, with the first texts of each line; where that makes too many cards, the
    smallest, middle and largest strength of each method, and if need be fewer prompts."""
    with_samples = [line for line in table if line.samples]
    if not with_samples or prompts < 1:
        return []
    chosen = with_samples if len(with_samples) <= CARDS else _fewer(with_samples)
    found: dict[Any, dict[str, Any]] = {}
    for line in chosen:
        mine: dict[Any, list[str]] = {}
        for s in line.samples:
            key = (str(s.get("prompt_id", "")), s["prompt"])
            mine.setdefault(key, []).append(s["text"])
        for key, written in mine.items():
            entry = found.setdefault(key, {"prompt": key[1], "cards": []})
            entry["cards"].append({"label": line.label, "texts": [t.lstrip() for t in written[:texts]]})
    common = sorted(found.values(), key=lambda e: -len(e["cards"]))  # stable: the order of the samples among equals
    return common[: prompts if len(chosen) <= CARDS else max(1, prompts // 2)]


def _fewer(table: list[Line]) -> list[Line]:
    groups: dict[Any, list[Line]] = {}
    for line in table:
        groups.setdefault((line.method, dumps(line.columns, allow_nan=True, default=str)), []).append(line)
    kept = []
    for members in groups.values():
        order = sorted(members, key=lambda m: m.strength or 0.0)
        kept += [order[i] for i in sorted({0, (len(order) - 1) // 2, len(order) - 1})]
    return kept
