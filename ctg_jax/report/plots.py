"""The plots of a report: control against fluency, and figures against strength. PNG bytes, drawn without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from ctg_jax.report.rows import Line

# Colours of Okabe and Ito (2008), which readers with any colour vision can distinguish, without yellow and black; on a
# dark background the same hues, lighter.
_COLOURS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7A5195"),
    "dark": ("#5AB4E6", "#FF8A4C", "#3CCB9F", "#E79BC7", "#E6B84C", "#9AD1F5", "#B79AD6"),
}
_GROUND = {"light": ("#ffffff", "#222222", "#dddddd"), "dark": ("#16181d", "#e4e4e4", "#3a3d45")}
_MARKERS = "osD^vPX*"  # one more than colours, so that 56 methods look different
MEASURES = {  # what is measured of an attribute -> its name for readers
    "share": "share of samples",
    "mean": "mean score",
    "max": "average maximum",
    "any": "P(any sample)",
    "calibration": "distance to a line",
    "consistency": "spread between prompts",
    "consistency_samples": "spread between samples",
    "monotonicity": "rank correlation",
    "monotone": "monotone prompts",
    "range": "range",
}


def frontier(lines: Sequence[Line], x: str, y: str, theme: str = "light") -> bytes | None:
    """One panel for each setting of the columns, one line for each method over its strengths, from small marker to
    large; where settings are changed one at a time, one line for each of them in one panel. x is the attribute, y the
    perplexity, or the KL to the base (logarithmic where it spans a lot). None where no line has both."""
    usable = [line for line in lines if _known(line, x) and _known(line, y)]
    panels = _panels(usable)
    if not panels:
        return None
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    fig, axes = _figure(across, down, (4.6 if across > 1 else 6.4, 3.9), theme, sharex=True, sharey=True)
    colours = _methods(usable, theme)
    values = [line.estimates[y].value for line in usable]
    logarithmic = _wide(values, 4)
    for ax, (title, members) in zip(axes, panels.items()):
        ax.set_title(title, fontsize=10)
        for method, (colour, marker) in colours.items():
            for path in _paths(members, method):
                _path(ax, path, x, y, colour, marker, theme)
        if logarithmic:
            ax.set_yscale("log")
            _plain_ticks(ax)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for i, ax in enumerate(axes[: len(panels)]):
        below = i + across >= len(panels)
        ax.tick_params(labelbottom=below)  # the panel below may be missing in the last row
        ax.set_xlabel(describe(x) if below else "")
        ax.set_ylabel(describe(y) if i % across == 0 else "")
    _legend(fig, colours, theme, {m for m in colours if len(_strengths(usable, m)) > 1})
    _label_ends(fig, axes[: len(panels)], panels, x, y, colours, theme)
    return _png(fig)


def curves(lines: Sequence[Line], figures: Sequence[str], theme: str = "light") -> bytes | None:
    """One row for each figure, one column for each method with at least two strengths, a band for the interval; one
    line for each setting of the columns. Lines without a strength, such as the base, are dashed levels. None where
    no method has two strengths."""
    swept = [m for m in dict.fromkeys(line.method for line in lines) if len(_strengths(lines, m)) > 1]
    figures = [f for f in figures if any(_known(line, f) for line in lines if line.method in swept)]
    if not swept or not figures:
        return None
    fig, axes = _figure(len(swept), len(figures), (2.6, 1.6), theme, sharex="col", sharey="row")
    settings = list(dict.fromkeys(_setting(line) for line in lines if line.method in swept))
    colours = looks(settings, theme)
    plain = dict.fromkeys(line.method for line in lines if line.strength is None and line.method not in swept)
    level = "base" if "base" in plain else next(iter(plain), None)
    ink = _GROUND[theme][1]
    for at, ax in enumerate(axes):
        figure, method = figures[at // len(swept)], swept[at % len(swept)]
        for setting, (colour, marker) in colours.items():
            chosen = [m for m in lines if m.method == method and _setting(m) == setting and _known(m, figure)]
            chosen = sorted((m for m in chosen if m.strength is not None), key=_strength)
            if chosen:
                _band(ax, [m.strength for m in chosen], chosen, figure, colour, marker)
        for line in lines:
            if line.method == level and _known(line, figure):
                colour = colours.get(_setting(line), (ink,))[0] if len(settings) > 1 else ink
                ax.axhline(line.estimates[figure].value, color=colour, lw=1.1, ls="--", alpha=0.75, zorder=1)
        if figure.startswith("perplexity") and _wide(
            [m.estimates[figure].value for m in lines if _known(m, figure)], 20
        ):
            ax.set_yscale("log")
            _plain_ticks(ax)
        if at < len(swept):
            ax.set_title(method, fontsize=10)
        if at % len(swept) == 0:
            ax.set_ylabel(describe(figure).replace(": ", ":\n"), fontsize=9)
        if at >= len(axes) - len(swept):
            ax.set_xlabel("strength", fontsize=9)
    names = {s or "method at its strength": look for s, look in colours.items()}
    _legend(fig, names, theme, set(names), level=level)
    return _png(fig)


def settings(lines: Sequence[Line], figures: Sequence[str], theme: str = "light") -> bytes | None:
    """One column for each figure, one row for each setting of a method that is changed alone, at the method's highest
    strength; dashed: the method with nothing changed. None where no method has three rows."""
    top = {}
    for line in lines:
        key = (line.method, _setting(line))
        if key not in top or _strength(line) > _strength(top[key]):
            top[key] = line
    counts = {method: sum(m == method for m, _ in top) for method, _ in top}
    rows = {key: line for key, line in top.items() if counts[key[0]] > 2}
    figures = [f for f in figures if any(_known(line, f) for line in rows.values())]
    if not rows or not figures or None not in [v for line in rows.values() for v in line.columns.values()]:
        return None
    fig, axes = _figure(len(figures), 1, (2.6, 0.9 + 0.26 * len(rows)), theme, sharey=True)
    colours = _methods(list(rows.values()), theme)
    for ax, figure in zip(axes, figures):
        for at, ((method, setting), line) in enumerate(rows.items()):
            if not _known(line, figure):
                continue
            (colour, marker), found = colours[method], line.estimates[figure]
            ax.errorbar(found.value, at, xerr=_reach(found), fmt=marker, ms=5, color=colour, elinewidth=1, zorder=3)
            if not setting:
                ax.axvline(found.value, color=colour, lw=1, ls="--", alpha=0.7, zorder=1)
        if figure.startswith("perplexity") and _wide([m.estimates[figure].value for m in rows.values()], 20):
            ax.set_xscale("log")
        ax.set_xlabel(describe(figure).replace(": ", ":\n"), fontsize=9)
    axes[0].set_yticks(range(len(rows)), [f"{m} {s}" if s else f"{m} as configured" for m, s in rows])
    axes[0].invert_yaxis()
    return _png(fig)


def over(lines: Sequence[Line], column: str, figures: Sequence[str], theme: str = "light") -> bytes:
    """One panel for each figure over a column of numbers, with a band for the interval; one line for each method, and
    for each setting of the other columns."""

    def name(line):
        others = (str(v) for c, v in line.columns.items() if c != column and v is not None)
        return ", ".join([line.method, *others])

    fig, axes = _figure(len(figures), 1, (2.6, 2.4), theme)
    known = looks(list(dict.fromkeys(map(name, lines))), theme)
    for ax, figure in zip(axes, figures):
        for method, (colour, marker) in known.items():
            chosen = [m for m in lines if name(m) == method and _known(m, figure)]
            chosen = sorted(chosen, key=lambda m: m.columns[column])
            if chosen:
                _band(ax, [m.columns[column] for m in chosen], chosen, figure, colour, marker)
        ax.set_title(describe(figure), fontsize=10)
        ax.set_xlabel(column, fontsize=9)
        ax.xaxis.get_major_locator().set_params(integer=True)
    _legend(fig, known, theme, set(known))
    return _png(fig)


def describe(name: str) -> str:
    """A figure's name for an axis or a heading: `positive: share of samples`."""
    head, _, tail = name.rpartition("/")
    if head and tail in MEASURES:
        return f"{head}: {MEASURES[tail]}"
    also = {
        "perplexity_pooled": "perplexity, pooled",
        "human_perplexity": "perplexity of human text",
        "kl": "KL to base, nats per token",
        "length": "length, words",
    }
    return also.get(name, name.replace("_", " "))


def _path(ax, path, x, y, colour, marker, theme):
    xs, ys = ([m.estimates[n].value for m in path] for n in (x, y))
    sizes = [7.0] if len(path) == 1 else [4 + 5 * i / (len(path) - 1) for i in range(len(path))]
    ax.plot(xs, ys, color=colour, lw=1.6, alpha=0.85, zorder=2)
    for m, size in zip(path, sizes):
        a, b = m.estimates[x], m.estimates[y]
        bars = {"xerr": _reach(a), "yerr": _reach(b)}
        ax.errorbar(a.value, b.value, **bars, fmt="none", ecolor=colour, elinewidth=1, alpha=0.35, zorder=1)
        ax.plot(a.value, b.value, marker=marker, ms=size, color=colour, mec=_GROUND[theme][0], mew=0.8, zorder=3)


def _band(ax, xs, chosen, figure, colour, marker):
    found = [m.estimates[figure] for m in chosen]
    ax.plot(xs, [e.value for e in found], color=colour, lw=1.6, marker=marker, ms=4, zorder=3)
    ends = [(e.low, e.high) if math.isfinite(e.low) and math.isfinite(e.high) else (e.value, e.value) for e in found]
    ax.fill_between(xs, [e[0] for e in ends], [e[1] for e in ends], color=colour, alpha=0.18, lw=0, zorder=2)


def _label_ends(fig, axes, panels, x, y, colours, theme):
    """Writes the strength beside both ends of each line, where it covers neither a marker nor another label."""
    from matplotlib.patheffects import withStroke

    fig.canvas.draw()  # the layout must be known before boxes can be compared
    halo = [withStroke(linewidth=2.5, foreground=_GROUND[theme][0])]
    for ax, members in zip(axes, panels.values()):
        markers = [ax.transData.transform((m.estimates[x].value, m.estimates[y].value)) for m in members]
        taken: list[Any] = []
        ends: list[Line] = []
        for method in colours:
            for path in _paths([m for m in members if m.strength is not None], method):
                ends += [path[-1], path[0]] if len(path) > 1 else path
        for line in sorted(ends, key=_strength, reverse=True):
            at = (line.estimates[x].value, line.estimates[y].value)
            for offset, side in (((6, 5), "left"), ((-6, 5), "right"), ((6, -12), "left"), ((-6, -12), "right")):
                text = ax.annotate(
                    f"{line.strength:g}", at, xytext=offset, textcoords="offset points", fontsize=8, ha=side,
                    color=colours[line.method][0], path_effects=halo, zorder=4,
                )  # fmt: skip
                box = text.get_window_extent()
                inside = ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1
                if inside and not any(box.overlaps(b) for b in taken) and not any(box.contains(*m) for m in markers):
                    taken.append(box)
                    break
                text.remove()


def _figure(across, down, size, theme, **options):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ground, ink, rule = _GROUND[theme]
    fig = Figure(figsize=(size[0] * across, size[1] * down + 0.5), dpi=130, layout="constrained", facecolor=ground)
    FigureCanvasAgg(fig)
    axes = fig.subplots(down, across, squeeze=False, **options).ravel().tolist()
    for ax in axes:
        ax.set_facecolor(ground)
        ax.grid(color=rule, lw=0.6, zorder=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(rule)
        ax.tick_params(colors=ink, labelsize=8.5, length=3)
        ax.xaxis.label.set_color(ink)
        ax.yaxis.label.set_color(ink)
        ax.title.set_color(ink)
    return fig, axes


def _legend(fig, looks, theme, swept, level=None):
    """Below all axes; methods without a range of strengths have a marker and no line."""
    from matplotlib.lines import Line2D

    ink = _GROUND[theme][1]
    handles = [
        Line2D([], [], color=c, marker=m, lw=1.6 if name in swept else 0, ms=6, label=name)
        for name, (c, m) in looks.items()
    ]
    if level is not None:
        handles.append(Line2D([], [], color=ink, lw=1, ls="--", alpha=0.6, label=level))
    width = fig.get_size_inches()[0]
    longest = max(len(h.get_label()) for h in handles)
    columns = max(1, min(len(handles), int(width / (0.6 + 0.085 * longest))))
    side = "left" if width > 11 else "center"  # a wide picture scrolls, and is seen from the left
    fig.legend(handles=handles, loc=f"outside lower {side}", ncols=columns, frameon=False, fontsize=9, labelcolor=ink)


def _plain_ticks(ax):
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5) if high / low < 100 else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _paths(members, method) -> list[list[Line]]:
    """The lines of a method over its strengths, one path for each setting."""
    mine = [m for m in members if m.method == method]
    return [
        sorted((m for m in mine if _setting(m) == s), key=_strength) for s in dict.fromkeys(_setting(m) for m in mine)
    ]


def _methods(lines, theme):
    names = list(dict.fromkeys(line.method for line in lines))
    return looks(names, theme)


def looks(names: Sequence[str], theme: str = "light") -> dict[str, tuple[str, str]]:
    """Name -> (colour, marker), no two alike."""
    palette = _COLOURS[theme]
    return {n: (palette[i % len(palette)], _MARKERS[i % len(_MARKERS)]) for i, n in enumerate(names)}


def _panels(lines) -> dict[str, list[Line]]:
    """Settings of the columns -> lines. Lines that lack a column (the base has no direction) are in every panel."""
    titles = list(dict.fromkeys(_setting(line) for line in lines if None not in line.columns.values()))
    if not titles:
        return {"": list(lines)} if lines else {}
    every = {t: next(line.columns for line in lines if _setting(line) == t) for t in titles}
    return {
        t: [m for m in lines if all(v is None or v == columns[c] for c, v in m.columns.items())]
        for t, columns in every.items()
    }


def _setting(line: Line) -> str:
    return ", ".join(f"{c}: {v}" for c, v in line.columns.items() if v is not None)


def _strengths(lines, method):
    return {line.strength for line in lines if line.method == method and line.strength is not None}


def _wide(values: Sequence[float], ratio: float) -> bool:
    return min(values) > 0 and max(values) / min(values) > ratio


def _strength(line: Line) -> float:
    return 0.0 if line.strength is None else line.strength


def _known(line: Line, name: str) -> bool:
    return name in line.estimates and math.isfinite(line.estimates[name].value)


def _reach(estimate):
    """[[below], [above]] for an error bar; nothing where the interval is unknown."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return None
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]


def _png(fig) -> bytes:
    out = io.BytesIO()
    fig.savefig(out, format="png", facecolor=fig.get_facecolor(), metadata={"Software": None})
    return out.getvalue()
