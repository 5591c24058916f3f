"""Reports: columns that vary, seeds put together, text escaped, plots drawn, errors of one sentence."""

import base64
import html.parser
import json
import math
import re

import pytest

from ctg_jax import report
from ctg_jax.evaluation import Figure
from ctg_jax.run.stage import stage
from ctg_jax.types import InputError

NASTY = '<script>alert("x")</script> & | a_b *c*\nnew'


def figure(value, half=0.1):
    return Figure(value, value - half, value + half, 10)


def row(method="steer", strength=1.0, share=0.5, ppl=20.0, **more):
    samples = [{"prompt": "The <b>food</b>", "prompt_id": 0, "text": NASTY}]
    figures = {"positive/share": figure(share), "perplexity": figure(ppl, 2), "uniq": figure(7, 1)}
    return {"method": method, "strength": strength, "figures": figures, "samples": samples, **more}


SWEEP = [
    row("base", None, 0.3, 30),
    *(row("steer", s, 0.4 + 0.1 * s, 25 + 5 * s) for s in (1.0, 2.0, 3.0)),
    *(row("dexperts", s, 0.5 + 0.2 * s, 30 + 60 * s) for s in (0.5, 1.0)),
]


def test_lines_keep_the_columns_that_vary():
    rows = [row(layer=3, data="yelp"), row(layer=4, data="yelp"), row("base", None, data="yelp")]
    lines = report.lines(rows)
    assert [line.columns for line in lines] == [{"layer": 3}, {"layer": 4}, {"layer": None}]
    assert report.lines([row(layer=3), row("base", None)])[0].columns == {}
    assert lines[0].label == "steer @ 1, 3" and lines[2].label == "base"


def test_seeds_become_mean_and_standard_error():
    rows = [row(share=s, seed=i) for i, s in enumerate((0.4, 0.5, 0.9))]
    (line,) = report.lines(rows)
    cell = line.estimates["positive/share"]
    # mean 0.6; variance (0.04 + 0.01 + 0.09) / 2 = 0.07; standard error sqrt(0.07 / 3)
    assert cell.value == pytest.approx(0.6) and cell.error == pytest.approx(math.sqrt(0.07 / 3))
    assert (cell.low, cell.high, cell.seeds) == (pytest.approx(0.5), pytest.approx(0.7), 3)
    assert report.lines([row()])[0].estimates["positive/share"].error is None


def test_one_seed_has_no_standard_error_in_the_table(tmp_path):
    report.write(tmp_path, [row(share=0.25, seed=0), row("other", None, 0.75, seed=0)])
    text = (tmp_path / "report.md").read_text()
    assert "0.250 [0.150, 0.350]" in text and "±" not in text and "- seed: 0" in text
    report.write(tmp_path, [row(share=0.25, seed=0), row(share=0.35, seed=1)])
    text = (tmp_path / "report.md").read_text()
    assert "0.300 ± 0.050 [0.200, 0.400]" in text and "- seeds: 0, 1" in text


class Strict(html.parser.HTMLParser):
    """Collects tags and the text between them."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_html_escapes_everything(tmp_path):
    rows = [row(method=NASTY), row("base", None, **{"<i>column</i>": "<u>value</u>"})]
    rows[0]["figures"]["<em>figure</em>"] = figure(1.0)
    page = report.write(tmp_path, rows, title=NASTY, about={NASTY: NASTY}, scorers={"positive": "<s>"}).read_text()
    parser = Strict()
    parser.feed(page)
    assert not {"script", "b", "u", "i", "em", "s"} & (set(parser.tags) - {"b"})
    assert "<b>food" not in page and "<script" not in page
    assert any(NASTY in t for t in parser.text)  # the reader sees the text as it is


def test_markdown_escapes_everything(tmp_path):
    report.write(tmp_path, [row(method=NASTY), row("base", None)], title=NASTY)
    text = (tmp_path / "report.md").read_text()
    assert "<script" not in text and r"&lt;script&gt;" in text and r"\| a\_b \*c\* new" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    first = table[: next(i for i, line in enumerate(table) if "text" in line)]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in first}) == 1


def test_html_is_self_contained_with_plots_for_both_grounds(tmp_path):
    page = report.write(tmp_path, SWEEP, scorers={"positive": "probe@1"}, perplexity="tiny: mean").read_text()
    assert not re.search(r'(src|href|srcset)="(?!data:image/png;base64,)', page)
    images = re.findall(r"base64,([A-Za-z0-9+/=]+)", page)
    assert len(images) == 4 and all(base64.b64decode(i).startswith(b"\x89PNG") for i in images)
    assert len(set(images)) == 4 and "prefers-color-scheme: dark" in page
    for name in ("frontier-positive.png", "strength.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in (tmp_path / "report.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "frontier-positive.png", "report.html", "report.json", "report.md", "strength.png",
    ]  # fmt: skip


def test_scorers_and_conventions_are_always_named(tmp_path):
    report.write(tmp_path, SWEEP, scorers={"positive": "probe@1"}, perplexity="tiny: pooled", about={"commit": "abc"})
    text = (tmp_path / "report.md").read_text()
    for fact in ("- scorer of 'positive': probe@1", "- perplexity: tiny: pooled", "- commit: abc"):
        assert fact in text
    report.write(tmp_path, SWEEP)
    text = (tmp_path / "report.md").read_text()
    assert "- scorer of 'positive': not named" in text and "language model not named; mean of per-sample" in text


def test_figures_outside_the_main_table_are_not_lost(tmp_path):
    report.write(tmp_path, SWEEP)
    text = (tmp_path / "report.md").read_text()
    assert "7.000 [6.000, 8.000]" in text[text.index("All other figures") :]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["lines"][1]["figures"]["uniq"]["value"] == 7 and len(saved["lines"]) == len(SWEEP)


def test_unknown_values_are_dashes_and_do_not_stop_the_plots(tmp_path):
    rows = [*SWEEP, row("broken", 1.0, math.nan, math.inf), row("broken", 2.0, 0.9, 50)]
    rows[-1]["figures"] = {k: f.as_json() for k, f in rows[-1]["figures"].items()}  # as read from a file
    del rows[-1]["figures"]["uniq"]
    report.write(tmp_path, rows)
    text = (tmp_path / "report.md").read_text()
    assert "| broken | 1 | – | ∞ |" in text and "| broken | 2 | – |" in text
    assert json.loads((tmp_path / "report.json").read_text())["lines"][-2]["figures"]["perplexity"]["value"] is None


def test_rounds_are_in_the_page(tmp_path):
    """A table and a picture, and in the page they are under their own heading."""
    names = ("reward", "KL to base")
    turns = [
        {"method": m, "round": r, "figures": {n: figure(0.1 * r + i) for i, n in enumerate(names)}}
        for m in ("quark", "ppo")
        for r in range(3)
    ]
    page = report.write(tmp_path, SWEEP, turns=turns).read_text()
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
    after = page[page.index("<h2>Rounds</h2>") :]
    assert after.index("base64,") < after.index("<td") and "mean reward of the samples of a round" in page
    text = (tmp_path / "report.md").read_text()
    assert "| method | round | reward | KL to base |" in text and "| ppo | 2 | 0.200 [0.100, 0.300] |" in text
    assert json.loads((tmp_path / "report.json").read_text())["rounds"][4]["round"] == 1
    report.write(tmp_path / "one", SWEEP, turns=turns[:1])  # of one round there is nothing to draw
    assert "## Rounds" in (tmp_path / "one" / "report.md").read_text() and not (tmp_path / "one/rounds.png").exists()


def test_samples_stand_side_by_side(tmp_path):
    def text(method, prompt, i):
        return {"prompt": prompt, "prompt_id": prompt, "text": f"{method} {prompt} {i}"}

    rows = [row("a", None), row("b", None)]
    rows[0]["samples"] = [text("a", p, i) for p in "PQR" for i in range(3)]
    rows[1]["samples"] = [text("b", p, i) for p in "QR" for i in range(3)]
    report.write(tmp_path, rows, prompts=2, texts=1)
    after = (tmp_path / "report.md").read_text().split("## Samples")[1].split("## All other")[0]
    assert re.findall(r"\| \w \| (.*) \|", after) == ["a Q 0", "b Q 0", "a R 0", "b R 0"]


def test_smooth_control_is_a_table_of_its_own(tmp_path):
    names = ("range", "calibration", "monotone")
    smooth = [
        {"method": m, "figures": {**{f"positive/{n}": figure(v) for n, v in zip(names, vs)}, "relevance": figure(0.7)}}
        for m, vs in (("steer", (0.5, 0.125, 1.0)), (NASTY, (-0.25, 0.3, 0.6)))
    ]
    del smooth[1]["figures"]["positive/calibration"]  # two strengths
    page = report.write(tmp_path, SWEEP, smooth=smooth).read_text()
    text = (tmp_path / "report.md").read_text()
    part = text.split("## Smooth control")[1].split("\n## ")[0]
    assert "| steer | 0.500 [0.400, 0.600] | 0.125 [0.025, 0.225] | 1.000 [0.900, 1.100] | 0.700" in part
    assert "| −0.250 [−0.350, −0.150] | – | 0.600" in part and "positive: distance to a line" in part
    assert "least-squares line" in part and "spread between prompts" not in part  # says what it has, and no more
    assert "<h2>Smooth control</h2>" in page and "<script" not in page
    saved = json.loads((tmp_path / "report.json").read_text())["smooth"]
    assert [s["figures"]["positive/range"]["value"] for s in saved] == [0.5, -0.25]
    report.write(tmp_path, SWEEP)
    assert "Smooth control" not in (tmp_path / "report.md").read_text() + (tmp_path / "report.html").read_text()


def test_plots_without_what_they_need_are_left_out(tmp_path):
    rows = [{"method": "base", "figures": {"length": figure(3.0)}}]
    report.write(tmp_path, rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    lines = report.lines(rows)
    assert report.frontier(lines, "positive/share", "perplexity") is None and report.curves(lines, ["length"]) is None


def test_panels_for_each_setting_and_base_in_all(tmp_path):
    rows = [row("base", None, 0.3, 30)]
    rows += [row("steer", s, 0.1 * s, 20 * s, direction=d) for s in (1.0, 2.0) for d in ("up", "down")]
    from ctg_jax.report.plots import _panels

    panels = _panels(report.lines(rows))
    assert {t: [m.method for m in ms] for t, ms in panels.items()} == {
        "direction: up": ["base", "steer", "steer"],
        "direction: down": ["base", "steer", "steer"],
    }
    assert report.frontier(report.lines(rows), "positive/share", "perplexity").startswith(b"\x89PNG")


def test_settings_changed_one_at_a_time_are_rows_of_one_plot_and_no_line_joins_two(tmp_path):
    from ctg_jax.report.plots import _paths

    changed = [{}, {"rank": 2}, {"rank": 4}, {"kl": 0.1}]
    rows = [row("base", None, 0.3, 30)]
    rows += [row("quark", s, 0.1 * s, 20 * s, **c) for s in (1.0, 2.0) for c in changed]
    lines = report.lines(rows)
    paths = _paths(lines, "quark")
    assert [[m.strength for m in path] for path in paths] == [[1.0, 2.0]] * 4
    assert [len({tuple(m.columns.items()) for m in path}) for path in paths] == [1] * 4
    report.write(tmp_path, rows)
    assert (tmp_path / "settings.png").read_bytes().startswith(b"\x89PNG")
    assert "one at a time" in (tmp_path / "report.md").read_text()
    # Nothing to put side by side: two settings, or panels of their own.
    assert report.settings(report.lines(rows[:3]), ["perplexity"]) is None
    both = [row("steer", s, 0.1 * s, 20 * s, direction=d) for s in (1.0, 2.0) for d in ("up", "down", "on")]
    assert report.settings(report.lines(both), ["perplexity"]) is None


@pytest.mark.parametrize(
    "rows, options, word",
    [
        ([], {}, "rows are empty"),
        ([{"figures": {}}], {}, "row 0 lacks 'method'"),
        ([row(), row()], {}, "2 rows of method 'steer' agree"),
        ([row()], {"attributes": ["joy/share"]}, "'joy/share', which no row has"),
    ],
)
def test_errors_are_one_sentence(tmp_path, rows, options, word):
    with pytest.raises(InputError, match=word) as error:
        report.write(tmp_path / "out", rows, **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the report"):
        report.write(tmp_path / "file" / "out", [row()])


# --- from artifacts ------------------------------------------------------------------------------------------------


def fit(run, *, layer: int = 0):
    run.record(method="steer")


def sample(run, *, controls=(), strengths=(), seed: int = 0):
    (run.path / "samples.jsonl").write_text(json.dumps({"prompt": "p", "prompt_id": 0, "text": "t"}) + "\n")


def evaluate(run, *, samples, offset: float = 0.0):
    config = samples.spec["config"]
    value = config["seed"] + sum(config["strengths"]) + offset
    run.log(name="positive/share", **figure(float(value)).as_json())


def test_collect_reads_the_settings_of_all_stages(tmp_path):
    for layer in (2, 3):
        control = stage(tmp_path, fit, {"layer": layer})
        for seed in (0, 1):
            texts = stage(tmp_path, sample, {"strengths": [4.0], "seed": seed}, controls=[control])
            scored = stage(tmp_path, evaluate, {}, samples=texts)
    rows = report.collect(tmp_path)
    assert len(rows) == 4 and {r["method"] for r in rows} == {"steer"} and {r["strength"] for r in rows} == {4.0}
    lines = report.lines(rows)
    assert all(list(line.columns) == ["samples.controls.0.layer"] for line in lines)
    assert sorted(line.columns["samples.controls.0.layer"] for line in lines) == [2, 3]
    assert [line.estimates["positive/share"].value for line in lines] == [4.5, 4.5]
    one = report.row(scored, texts, method="steer")
    assert one["samples"][0]["text"] == "t" and one["figures"]["positive/share"].value == 5.0
    with pytest.raises(InputError, match="holds no figure"):
        report.row(texts)
    with pytest.raises(InputError, match="no finished evaluate"):
        report.collect(tmp_path / "nowhere")


def test_no_two_methods_look_alike():
    from ctg_jax.report.plots import looks

    for theme in ("light", "dark"):
        assert len(set(looks([str(i) for i in range(56)], theme).values())) == 56


def test_the_page_says_what_its_columns_mean_and_marks_the_best(tmp_path):
    figures = [
        {"positive/share": figure(0.2), "perplexity": figure(p, 1), "dist-3": figure(d)}
        for p, d in ((9.0, 0.5), (7.0, 0.9), (8.0, 0.7))
    ]
    rows = [{"method": name, "figures": f} for name, f in zip("abc", figures)]
    page = report.write(tmp_path, rows).read_text()
    assert "lower is better" in page and "higher is better" in page and "What the columns mean" in page
    assert [page.count(f'class="best">{v}<') for v in ("7.000", "0.900", "9.000", "0.200")] == [1, 1, 0, 0]
    assert "**7.000**" in (tmp_path / "report.md").read_text()
    text = report.terminal(rows)
    assert [line.split()[0] for line in text.splitlines()][2:] == ["a", "b", "c"] and "7.000 [6.000, 8.000]" in text
