"""Every configuration runs end to end in its tiny world; nothing runs twice; a grid shares what is common."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ctg_jax
from ctg_jax import methods
from ctg_jax.run.session import Session
from ctg_jax.types import InputError
from experiments import ablate, arms, choose, cli, compare, experiment, main, reporting
from experiments.arms import Fitted
from tests.experiments.tiny_lm import write_lm

HERE = Path(__file__).parents[2]
FILES = sorted(p for p in (HERE / "configs").glob("*.py") if "def get_config" in p.read_text() and p.stem != "latents")


# By default one or two configurations for each place where methods act. All others are long: the tests of a method run
# its fit, tests/experiments/test_sections.py rehearses every configuration, and the test of chains below runs
# `compare_together`.
DEFAULT = (
    "compare_equal_kl", "compare_sentiment", "dexperts", "finetune", "form", "mdlm", "prompt", "quark", "search",
    "steer", "truncate",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def call(root, capsys):
    def run(script, config, *argv):
        code = cli.run(script.main, [f"--config={config}", f"--root={root}", *argv])
        out, err = capsys.readouterr()
        counts = [line for line in err.splitlines() if line.startswith("stages: ")]
        return code, out.strip(), err, counts[-1] if counts else ""

    return run


def table(report):
    return json.loads(Path(report).with_suffix(".json").read_text())["lines"]


def wanted_of(arm):
    """What a report has to state of how a fitted arm came about."""
    if not isinstance(arm, Fitted):
        return []
    takes = inspect.signature(methods.get(arm.method).fit).parameters
    seed = ['"seed": '] if "seed" in takes else []
    rewards = [f'"name": "{name}"' for name in arm.rewards] if "rewards" in takes else []
    return ["load_data-", arm.data["source"], "made by ", *seed, *rewards]


@pytest.mark.parametrize(
    "file",
    [pytest.param(p, id=p.stem, marks=[] if p.stem in DEFAULT else [pytest.mark.slow]) for p in FILES],
)
def test_tiny_runs_and_a_second_time_executes_nothing(call, file):
    script = compare if file.stem.startswith("compare") else main
    code, report, err, _ = call(script, f"{file}:tiny")
    assert code == 0, err
    lines = table(report)
    judges = cli.config_of(f"{file}:tiny").judges
    assert lines and all({"perplexity", *(f"{j}/share" for j in judges)} <= line["figures"].keys() for line in lines)
    about = json.loads(Path(report).with_suffix(".json").read_text())["about"]
    for label, arm in experiment.check(cli.config_of(f"{file}:tiny").to_dict()).items():
        said = about[f"arm {label!r}"]
        assert all(text in said for text in [*wanted_of(arm), "samples "]), (label, said)
    assert Path(report).read_text().startswith("<!")
    code, again, _, counts = call(script, f"{file}:tiny")
    assert (code, again) == (0, report) and counts.startswith("stages: 0 executed")


@pytest.fixture(scope="module")
def compared(root):
    """The report of the comparison on sentiment, as JSON."""
    spec = f"{HERE / 'configs/compare_sentiment.py'}:tiny"
    config, session = cli.config_of(spec), Session(root)
    page = reporting.write(session, spec, config, experiment.run(session, config))
    return json.loads(page.with_suffix(".json").read_text())


def test_the_comparison_has_every_method_beside_the_base(compared):
    methods = [line["method"] for line in compared["lines"]]
    assert methods[:2] == ["base", "top_p"]
    assert {"steer", "finetune_positive", "finetune_negative", "dexperts"} <= set(methods)
    assert {line["strength"] for line in compared["lines"] if line["method"] == "dexperts"} == {-1.0, 1.0}


def test_the_report_says_how_smooth_every_method_is_and_how_it_was_measured(compared):
    saved = compared
    smooth = {line["method"]: line["figures"] for line in saved["smooth"]}
    several = {
        m for m in (line["method"] for line in saved["lines"]) if sum(t["method"] == m for t in saved["lines"]) > 1
    }
    assert smooth.keys() == several >= {"steer", "dexperts"}
    assert {"positive/range", "positive/consistency", "positive/monotonicity", "relevance"} <= smooth["steer"].keys()
    assert all({"kl", "relevance"} <= line["figures"].keys() for line in saved["lines"])
    about = saved["about"]
    assert re.match(r"base@[0-9a-f]{12}: mean of per-sample", about["perplexity"])
    assert "exact on texts of its own corpus" in about["scorer of 'positive'"]
    assert "accuracy" not in about["scorer of 'positive'"] and about["relevance"].startswith("nats per token")
    assert about["ctg_jax"].startswith(ctg_jax.__version__)
    assert about["ctg_jax"].endswith(f", commit {reporting._commit()}") or reporting._commit() is None


def test_arms_at_equal_kl_are_sampled_where_it_was_found(root):
    """The KL asked for, either way; an arm that has no texts for it, or strengths as well, is refused."""
    config = cli.config_of(f"{HERE / 'configs/compare_equal_kl.py'}:tiny")
    rows = [row for row in experiment.run(str(root), config) if row.label == "steer"]
    assert [row.strength > 0 for row in rows] == [False, True]
    found = [json.loads((p.parent / "spec.json").read_text()) for p in root.glob("calibrate-*/DONE")]
    assert {abs(spec["kl"] / abs(spec["config"]["kl"]) - 1) < 0.02 for spec in found} == {True}
    assert {row.strength for row in rows} <= {spec["strength"] for spec in found}
    config.methods.steer.strengths = (1.0,)
    with pytest.raises(InputError, match=r"methods\.steer has both strengths and kl"):
        experiment.run(str(root), config)
    del config.methods.steer.strengths
    del config.calibrate
    with pytest.raises(InputError, match="has kl, but there are no texts to find its strength on"):
        experiment.run(str(root), config)


def test_a_kl_that_is_not_reached_is_reported_and_the_others_go_on(call, root, tmp_path):
    """It has no row, the report says why, that of a grid too, a second run asks no stage again, and nothing but such
    arms is an error."""
    spec = f"{HERE / 'configs/compare_equal_kl.py'}:tiny"
    change = ["--config.methods.steer.kl=(1e-3, 1e6)", "--config.methods.lm_steer.kl=(1e-3,)"]
    code, page, err, _ = call(compare, spec, *change)
    assert code == 0, err
    assert [(line["method"], line["strength"] is None) for line in table(page)] == [
        ("base", True), ("top_p", True), ("lm_steer", False), ("steer", False),
    ]  # fmt: skip
    said = json.loads(Path(page).with_suffix(".json").read_text())["about"]["kl that is not reached"]
    assert said.startswith("steer: kl is 1e+06 nats per token, but the control reaches at most ") and said in err
    assert call(compare, spec, *change)[3].startswith("stages: 0 executed")
    swept = (
        f"{Path(spec.rpartition(':')[0]).read_text()}\n\ndef sweep():\n    yield {{'methods.steer.kl': (1e-3, 1e6)}}\n"
    )
    (tmp_path / "grid.py").write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{swept}")
    code, page, err, _ = call(ablate, f"{tmp_path / 'grid.py'}:tiny", "--config.methods.lm_steer.kl=(1e-3,)")
    assert code == 0, err
    assert json.loads(Path(page).with_suffix(".json").read_text())["about"]["kl that is not reached"] == said
    config = cli.config_of(spec)
    config.methods = {"steer": {**config.methods.steer.to_dict(), "kl": (1e6,)}}
    with pytest.raises(InputError, match=r"^steer: kl is 1e\+06 nats per token, but the control reaches"):
        experiment.run(str(root), config)


def test_choose_ranks_the_arms_at_one_kl(call, tmp_path, monkeypatch):
    """A line for each arm, the best first, each at the KL of the configuration; arms without one are refused."""
    file = HERE / "configs/choose_steering.py"
    code, printed, err, _ = call(choose, f"{file}:tiny")
    assert code == 0, err
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines()[2:]]
    assert sorted(line[0] for line in lines) == ["block_1_all", "block_2_all"]
    assert all(abs(float(line[2]) / 1e-3 - 1) <= 0.021 for line in lines)
    assert float(lines[0][3]) >= float(lines[1][3])
    config = experiment.check(cli.config_of(f"{file}:tiny").to_dict())
    one, other = config.values()
    assert choose.candidates_of({"a": dataclasses.replace(one, kl=[1e-3]), "b": other})[1] == (1e-3,)
    for wrong, words in (
        (dataclasses.replace(one, filter={"top_k": 2}), "methods.a has filter of its own"),
        (arms.Together(chain={"b": 1.0}, kl=(1e-3,)), "methods.a has kl and is no method of its own"),
    ):
        with pytest.raises(InputError, match=words):
            choose.candidates_of({"a": wrong, "b": other})
    mine = tmp_path / "mine.py"  # with the batch sizes of both sections, of which each has its own
    more = "from configs import choose_steering as its\ndef get_config():\n    config = its.get_config('tiny')\n"
    mine.write_text(f"{more}    config.calibrate.batch = config.sample.batch = 4\n    return config\n")
    seen = {}
    monkeypatch.setattr(choose, "choose", lambda *args, **options: seen.update(options) or [])
    code, _, err, _ = call(choose, mine, "--config.sample.greedy=True")
    assert code == 0 and seen["greedy"] is True and seen["batch"] == 4 and seen["kl"] == (1e-3,), err
    wrong = tmp_path / "wrong.py"
    wrong.write_text(f"{more}    config.calibrate.token = 4\n    return config\n")
    code, _, err, _ = call(choose, wrong)
    assert code == 2 and "calibrate has no setting 'token'; did you mean 'tokens'?" in err
    code, _, err, _ = call(choose, f"{HERE / 'configs/steer.py'}:tiny")
    assert code == 2 and "the arms of the configuration have no kl in common" in err


def test_references_are_data_of_the_evaluation(root, tmp_path):
    """A section of `evaluate`, not a setting; without an encoder it is refused in one sentence."""
    config = cli.config_of(f"{HERE / 'configs/truncate.py'}:tiny")
    config.evaluate.references = {"source": "bundled:reviews", "split": "test", "limit": 3}
    with pytest.raises(InputError, match="set embed to a sentence encoder"):
        experiment.run(str(root), config)


def test_the_perplexity_of_human_text_stands_in_the_table(root):
    config = cli.config_of(f"{HERE / 'configs/truncate.py'}:tiny")
    config.evaluate.human = {"source": "bundled:reviews", "split": "test", "limit": 3, "words": 4}
    rows = [reporting._row(cell) for cell in experiment.run(str(root), config)]
    found = {row["figures"]["human_perplexity"].value for row in rows}
    assert len(found) == 1 and found.pop() > 1  # truncation, which gives human text no probability, is left out


def test_changing_one_method_runs_that_method_alone(call, compared):
    _, _, err, counts = call(
        compare, HERE / "configs/compare_sentiment.py:tiny", "--config.methods.steer.fit.sites=all"
    )
    ran = [line.split()[1].rpartition("-")[0] for line in err.splitlines() if line.startswith("running ")]
    assert ran == ["steer", "sample", "evaluate", "sample", "evaluate", "smooth"]
    assert counts.startswith("stages: 6 executed")


def test_a_grid_in_parts_equals_the_whole(call):
    config = HERE / "configs/steer.py:tiny"
    halves = [call(ablate, config, f"--cell={i}/2") for i in (1, 2)]
    assert [h[0] for h in halves] == [0, 0]
    code, report, _, counts = call(ablate, config)
    assert code == 0 and counts.startswith("stages: 0 executed")
    steered = [line for line in table(report) if line["method"] == "steer"]
    assert sorted((line["fit.sites"], line["strength"]) for line in steered) == [
        (s, x) for s in ("all", "middle") for x in (-1.0, 1.0)
    ]
    assert len([line for line in table(report) if line["method"] == "top_p"]) == 1


def test_another_lm_on_the_command_line(call, tmp_path):
    lm_dir = write_lm(tmp_path / "lm", context=128)
    code, report, err, _ = call(main, HERE / "configs/truncate.py:tiny", f"--config.lm.source={lm_dir}")
    assert code == 0 and "running pretrain" not in err and str(lm_dir) in Path(report).read_text()


def refused(result, words):
    code, out, err, _ = result
    said = [line for line in err.splitlines() if not line.startswith(("stages:", "running", "arm "))]
    assert code == 2 and out == "" and len(said) == 1 and words in said[0], (code, out, err)


def test_bad_configurations(call):
    tiny = HERE / "configs/compare_sentiment.py:tiny"
    refused(call(compare, tiny, "--config.sample.max_nwe=3"), "did you mean 'max_new'?")
    refused(call(compare, HERE / "configs/compare_sentiment.py:huge"), "expected one of bundled, yelp, gemma, tiny")
    refused(call(main, tiny), "use experiments/compare.py")
    refused(call(compare, tiny, "--config.sample.max_new=90"), "the model's context is 64")
    refused(call(compare, tiny, "--config.methods.dexperts.strengths=(float('nan'),)"), "expected a tuple")
    refused(call(compare, tiny, "--config.prompts.split=nowhere"), "nowhere")
    refused(call(ablate, HERE / "configs/compare_sentiment.py:tiny"), "defines no sweep()")
    refused(call(ablate, HERE / "configs/steer.py:tiny", "--cell=3/2"), "expected i/n")
    refused(call(ablate, HERE / "configs/steer.py:tiny", "--cell=9/9"), "names no cell")


def test_a_setting_that_a_stage_lacks_is_refused_before_anything_runs(tmp_path, capsys):
    text = "from configs.sentiment import experiment\n\ndef get_config():\n    return experiment('tiny', 'x', {})\n"
    for change, words in [
        ("c.methods = dict(a=dict(method='ster'))", "did you mean 'steer'?"),
        ("c.methods = dict(a=dict(method='steer', strenths=(1.0,)))", "did you mean 'strengths'?"),
        ("c.jugdes = {}", "did you mean 'judges'?"),
    ]:
        body = text.replace("    return", "    c =") + f"    c.unlock()\n    {change}\n    return c\n"
        (tmp_path / "c.py").write_text(body)
        assert cli.run(compare.main, [f"--config={tmp_path / 'c.py'}", f"--root={tmp_path / 'runs'}"]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_output_directory_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    config = f"--config={HERE / 'configs/truncate.py'}:tiny"
    assert cli.run(main.main, [config, f"--root={tmp_path / 'file'}"]) == 2
    assert "output directory" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    """The persistent compilation cache, in processes of their own."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    config = f"--config={HERE / 'configs/truncate.py'}:tiny"
    made = []
    for i in (1, 2):
        command = [sys.executable, str(HERE / "experiments/main.py"), config, f"--root={tmp_path / f'runs{i}'}"]
        subprocess.run(command, check=True, env=env, capture_output=True)
        made.append(sorted(p.name for p in (tmp_path / "cache" / "ctg_jax" / "jax").glob("*-cache")))
    assert made[0] and made[0] == made[1]


def test_a_chain_names_methods_that_are_there(call):
    config = HERE / "configs/compare_together.py:tiny"
    _, report, _, _ = call(compare, config)
    strengths = {line["strength"] for line in table(report) if line["method"] == "together"}
    assert strengths == {-1.0, -0.5, 0.5, 1.0}
    settings = cli.config_of(str(config)).to_dict()
    settings["methods"]["together"]["chain"] = {"lm_ster": 1.0}
    with pytest.raises(
        InputError, match=r"together\.chain names 'lm_ster', which is no method; did you mean 'lm_steer'"
    ):
        experiment.check(settings)
