"""`write`: a report as Markdown, HTML, PNG and JSON from rows of figures and samples."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctg_jax.evaluation import FIELD
from ctg_jax.evaluation.smooth import MEANING
from ctg_jax.io import dumps, write_bytes, write_text
from ctg_jax.report import plots, rounds
from ctg_jax.report.cards import side_by_side
from ctg_jax.report.meaning import best, explained
from ctg_jax.report.rows import Estimate, Line, lines
from ctg_jax.report.template import PAGE
from ctg_jax.types import InputError

# Columns of the first table, in this order, after the share of every attribute; all others follow at the end.
_MAIN = (
    "perplexity",
    "human_perplexity",
    "dist-2",
    "dist-3",
    "rep-3",
    "self_bleu",
    "kl",
    "mauve",
    "relevance",
    "similarity",
    "coverage",
    "length",
)
_CURVES = ("perplexity", "kl", "dist-2")
SMOOTH = "Each method over all its strengths (after Zhou et al. 2024, with the scores of the judge as intensities)."


def write(
    directory: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str = "Controlled generation",
    scorers: Mapping[str, str] | None = None,
    perplexity: str | None = None,
    about: Mapping[str, Any] | None = None,
    attributes: Sequence[str] = (),
    smooth: Sequence[Mapping[str, Any]] = (),
    turns: Sequence[Mapping[str, Any]] = (),
    prompts: int = 4,
    texts: int = 2,
) -> Path:
    """Writes report.html, report.md, report.json and the plots into a directory; returns the path of report.html.

    Args:
      rows: records with "method" (str), "figures" (name -> `Figure` or its JSON), and if they have one "strength",
        "seed", "samples" (records with prompt, text, prompt_id), and any other columns (direction, prompt set,
        layer …). Columns that never vary are left out; rows that differ in the seed alone become one line.
      scorers: name -> version of every reward. perplexity: its LM and convention, e.g. f"gpt2@…: {Perplexity()}".
      about: anything else that the reader should know: commit, configuration, seed, data.
      attributes: figures of the horizontal axis of a frontier each; every "<reward>/share" by default.
      smooth: rows of another table, of one line for each method over all its strengths, with the figures of
        `ctg_jax.evaluation.smooth_control` under "<reward>/<figure>".
      turns: rows of a third table, of one line for each method and "round", for methods that learn from their samples.
      prompts, texts: how many prompts and how many texts of each are shown side by side.

    Raises:
      InputError: no rows, rows without method or figures or that nothing distinguishes, an attribute that no row has,
        a directory that cannot be written.
    """
    table = lines(rows)
    names = _names(table)
    for attribute in attributes:
        if attribute not in names:
            raise InputError(f"attributes names {attribute!r}, which no row has; the rows have {', '.join(names)}")
    shares = list(attributes) or [n for n in names if n.endswith("/share")]
    main, rest = columns(table, attributes)
    swept, learned = (lines(more) if more else [] for more in (smooth, turns))
    drawn = _draw(table, shares, main, learned)
    seeds = max((c.seeds for line in table for c in line.estimates.values()), default=1)
    facts = _facts(scorers, perplexity, about, names, rows)
    shown = side_by_side(table, prompts, texts)
    pages = {
        "report.md": _markdown(title, table, main, rest, drawn, swept, learned, shown, facts, seeds),
        "report.json": _json(title, table, swept, learned, facts),
        "report.html": _html(title, table, main, rest, drawn, swept, learned, shown, facts, seeds),
    }
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, (light, _, _) in drawn.items():
            write_bytes(directory / f"{name}.png", light)
        for name, page in pages.items():
            write_text(directory / name, page)
    except OSError as e:
        raise InputError(f"cannot write the report to {directory}: {e.strerror}; give a directory with room") from None
    return directory / "report.html"


def columns(table: Sequence[Line], attributes: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """(figures of the first table, all others): the attributes, by default every share, then the usual measures."""
    names = _names(table)
    shares = list(attributes) or [n for n in names if n.endswith("/share")]
    main = shares + [n for n in _MAIN if n in names]
    return (main, [n for n in names if n not in main]) if main else (names, [])


def terminal(rows: Sequence[Mapping[str, Any]], most: int = 5) -> str:
    """The first columns of the first table as text for a terminal, the figures with their intervals.

    Args:
      rows: as of `write`. most: figures that are shown.

    Raises:
      InputError: as `rows.lines`.
    """
    table = lines(rows)
    heads, body = _grid(table, columns(table)[0][:most])
    texts = [[h["name"] for h in heads], *([f"{c['value']} {c['interval']}".strip() for c in cells] for cells in body)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(heads))]
    sides = ["<" if h["word"] else ">" for h in heads]
    aligned = ["  ".join(f"{t:{s}{w}}" for t, s, w in zip(row, sides, widths)).rstrip() for row in texts]
    return "\n".join([aligned[0], "  ".join("─" * w for w in widths), *aligned[1:]])


def _draw(
    table: list[Line], shares: list[str], main: list[str], learned: list[Line]
) -> dict[str, tuple[bytes, bytes, str]]:
    """File stem -> (light PNG, dark PNG, caption)."""
    drawn = {}
    for share in shares:
        light, dark = (plots.frontier(table, share, "perplexity", theme) for theme in ("light", "dark"))
        if light and dark:
            caption = (
                f"Control against fluency ({plots.describe(share)}, perplexity): one line for each method over its "
                "strengths, from small marker to large, with the strength written at both ends; faint bars are the "
                "intervals. Below at the same share is more fluent."
            )
            drawn["frontier-" + re.sub(r"[^A-Za-z0-9_-]+", "-", share.removesuffix("/share"))] = (light, dark, caption)
        light, dark = (plots.frontier(table, share, "kl", theme) for theme in ("light", "dark"))
        if light and dark:
            caption = (
                f"Control against the size of the intervention ({plots.describe(share)}, KL to the base): one line for "
                "each method over its strengths, as above. Below at the same share changes the model less."
            )
            drawn["kl-" + re.sub(r"[^A-Za-z0-9_-]+", "-", share.removesuffix("/share"))] = (light, dark, caption)
    wanted = shares + [n for n in _CURVES if n in main]
    light, dark = (plots.curves(table, wanted, theme) for theme in ("light", "dark"))
    if light and dark:
        caption = "Figures over the strength of each method, with the interval as a band; dashed: without control."
        drawn["strength"] = (light, dark, caption)
    light, dark = (plots.settings(table, wanted, theme) for theme in ("light", "dark"))
    if light and dark:
        caption = (
            "Settings changed one at a time, each method at its highest strength, with the intervals; dashed: as "
            "configured."
        )
        drawn["settings"] = (light, dark, caption)
    light, dark = (rounds.draw(learned, theme) for theme in ("light", "dark"))
    if light and dark:
        drawn["rounds"] = (light, dark, rounds.CAPTION)
    return drawn


def note(seeds: int) -> str:
    """What the numbers in a cell mean."""
    text = "Each figure with its bootstrap interval over prompts, in brackets (95 % unless stated otherwise below)."
    if seeds > 1:
        text += f" Mean over up to {seeds} seeds ± standard error over seeds; the interval is the mean of theirs."
    return text


def smooth_note(swept: Sequence[Line]) -> str:
    """What the figures of the table "Smooth control" mean, for those that it has."""
    had = {n.rpartition("/")[2] for line in swept for n in line.estimates}
    meanings = "; ".join(f"{plots.MEASURES[name]} is the {what}" for name, what in MEANING.items() if name in had)
    return f"{SMOOTH} Here {meanings}."


def number(value: float, like: float | None = None) -> str:
    """A figure for the table: three decimals below 1, fewer above; a dash where it is not known."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    scale = abs(value if like is None or not math.isfinite(like) else like)
    digits = 3 if scale < 10 else 1 if scale < 1000 else 0
    return f"{value:.{digits}f}".replace("-", "−")


def _texts(cell: Estimate | None) -> tuple[str, str]:
    """(value, interval) as text."""
    if cell is None:
        return "–", ""
    error = "" if cell.error is None else f" ± {number(cell.error, cell.value)}"
    if not math.isfinite(cell.value) or math.isnan(cell.low) or math.isnan(cell.high):
        return number(cell.value) + error, ""
    return number(cell.value) + error, f"[{number(cell.low, cell.value)}, {number(cell.high, cell.value)}]"


def _grid(table: list[Line], names: list[str], mark: bool = True) -> tuple[list[dict], list[list[dict]]]:
    columns = list(table[0].columns)
    strengths = any(line.strength is not None for line in table)
    heads = [{"name": h, "word": True} for h in ["method", *columns]]
    heads += [{"name": "strength", "word": False}] * strengths
    heads += [{"name": plots.describe(n), "word": False} for n in names]
    body, winners = [], {n: _winners(table, n) if mark else set() for n in names}
    for line in table:
        words = [line.method, *("" if v is None else str(v) for v in line.columns.values())]
        cells = [{"value": w, "interval": "", "word": True, "best": False} for w in words]
        if strengths:
            strength = "" if line.strength is None else f"{line.strength:g}".replace("-", "−")
            cells.append({"value": strength, "interval": "", "word": False, "best": False})
        for n in names:
            value, interval = _texts(line.estimates.get(n))
            cells.append({"value": value, "interval": interval, "word": False, "best": line.label in winners[n]})
        body.append(cells)
    return heads, body


def _winners(table: list[Line], name: str) -> set[str]:
    """The labels of the lines with the best value of a figure."""
    values = [line.estimates[name].value if name in line.estimates else math.nan for line in table]
    return {table[i].label for i in best(name, values)}


def _html(title, table, main, rest, drawn, swept, learned, shown, facts, seeds) -> str:
    from jinja2 import Environment, StrictUndefined

    images = {}
    for name, (light, dark, caption) in drawn.items():
        width = int.from_bytes(light[16:20], "big") * 3 // 4  # from the PNG header, in CSS pixels at this resolution
        light64, dark64 = (base64.b64encode(x).decode() for x in (light, dark))
        images[name] = {"light": light64, "dark": dark64, "caption": caption, "width": width}
    turns_picture = images.pop("rounds", None)
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    grid = _grid(table, [])
    return page.render(
        title=title,
        note=note(seeds),
        main=_grid(table, main),
        rest=_grid(table, rest),
        words=len(grid[0]),
        images=list(images.values()),
        smooth=_grid(swept, _names(swept)) if swept else None,
        smooth_note=smooth_note(swept),
        turns=_grid(learned, _names(learned), mark=False) if learned else None,
        turns_note=rounds.NOTE,
        turns_picture=turns_picture,
        columns=[(plots.describe(name), text) for name, text in explained([*main, *rest, *_names(learned)])],
        samples=shown,
        about=facts,
    )


def _markdown(title, table, main, rest, drawn, swept, learned, shown, facts, seeds) -> str:
    out = [f"# {escape(title)}", "", note(seeds), "", *_markdown_table(table, main)]
    for name, (_, _, caption) in drawn.items():
        out += ["", f"![{name}]({name}.png)", "", escape(caption)]
    if swept:
        out += ["", "## Smooth control", "", escape(smooth_note(swept)), "", *_markdown_table(swept, _names(swept))]
    if learned:
        out += ["", "## Rounds", "", rounds.NOTE, "", *_markdown_table(learned, _names(learned), mark=False)]
    if shown:
        out += ["", "## Samples, side by side"]
    for prompt in shown:
        out += ["", f"**{escape(prompt['prompt'])} …**", "", "| method | text |", "|:--|:--|"]
        out += [f"| {escape(card['label'])} | {escape(text)} |" for card in prompt["cards"] for text in card["texts"]]
    if rest:
        out += ["", "## All other figures", "", *_markdown_table(table, rest)]
    known = [(plots.describe(name), text) for name, text in explained([*main, *rest, *_names(learned)])]
    out += ["", "## What the columns mean", "", *(f"- {escape(name)}: {escape(text)}" for name, text in known)]
    out += ["", "## How it was measured", "", *(f"- {escape(name)}: {escape(value)}" for name, value in facts)]
    return "\n".join(out) + "\n"


def _markdown_table(table: list[Line], names: list[str], mark: bool = True) -> list[str]:
    heads, body = _grid(table, names, mark)
    out = ["| " + " | ".join(escape(h["name"]) for h in heads) + " |"]
    out.append("|" + "|".join(":--" if h["word"] else "--:" for h in heads) + "|")
    for cells in body:
        values = [f"**{escape(c['value'])}**" if c["best"] else escape(c["value"]) for c in cells]
        texts = [v + (f" {c['interval']}" if c["interval"] else "") for v, c in zip(values, cells)]
        out.append("| " + " | ".join(texts) + " |")
    return out


def escape(text: Any) -> str:
    """Text for one cell or line of Markdown: HTML and Markdown marks are taken literally, line breaks are spaces."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(flat, quote=False))


def _names(table: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(n for line in table for n in line.estimates))


def _json(title, table, swept, learned, facts) -> str:
    def plain(cell: Estimate):
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(cell).items()}

    def figures(line: Line):
        return {**line.columns, "figures": {n: plain(c) for n, c in line.estimates.items()}}

    records = [{"method": t.method, "strength": t.strength, **figures(t)} for t in table]
    smooth = [{"method": t.method, **figures(t)} for t in swept]
    turns = [{"method": t.method, **figures(t)} for t in learned]
    about = {n: v for n, v in facts}
    report = {"title": title, "about": about, "lines": records, "smooth": smooth, "rounds": turns}
    return dumps(report, indent=1, default=str) + "\n"


def _facts(scorers, perplexity, about, names, rows) -> list[tuple[str, str]]:
    """(name, value) of everything that describes how the figures were made, with a note for a scorer without a name."""
    facts = [(f"scorer of {name!r}", version) for name, version in (scorers or {}).items()]
    judged = dict.fromkeys(n.rpartition("/")[0] for n in names if n.endswith("/share"))
    facts += [(f"scorer of {n!r}", "not named") for n in judged if n not in (scorers or {})]
    if any(n.startswith("perplexity") for n in names):
        facts.append(("perplexity", perplexity or f"language model not named; {FIELD.perplexity}"))
    seeds = sorted({r["seed"] for r in rows if r.get("seed") is not None}, key=str)
    if seeds:
        facts.append(("seeds" if len(seeds) > 1 else "seed", ", ".join(map(str, seeds))))
    return facts + [(str(name), str(value)) for name, value in (about or {}).items()]
