"""Every method through every script: controls of every strategy are fitted, sampled, streamed and stopped by the same
commands, on one device, on simulated accelerators and on a mesh."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ctg_jax import methods
from ctg_jax.decode import strategies
from ctg_jax.mesh import layout
from ctg_jax.run.stage import open_artifact, open_lm
from experiments import cli, compare, diffusion_controls, experiment, generate, latents, main

HERE = Path(__file__).parents[2]
# Those that have a configuration of their own; `truncate` is an arm without a control.
METHODS = [n for n in methods.names() if (HERE / "configs" / f"{n}.py").exists() and n != "truncate"]
PROMPTS = ("last week, we", "yesterday")


def every(*default):
    """All methods, with --slow; those named, always."""
    return [n if n in default else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def config(name):
    return f"--config={HERE / 'configs' / name}.py:tiny"


def lines(out):
    """Lines of an output; other separators of lines may be part of a text."""
    return out.split("\n")[:-1]


def records(out):
    return [json.loads(line) for line in lines(out)]


@pytest.fixture(scope="module")
def fitted(root):
    """(LM, what --control is given, the control) of a configuration, as `main.py` leaves them."""

    def fit(name):
        cells = experiment.run(str(root), cli.config_of(config(name).removeprefix("--config=")))
        cell = next(cell for cell in cells if cell.controls)
        id = cell.samples.spec["inputs"]["lm"]
        strength = "" if cell.strength is None else "=1"
        lm = open_artifact(root / f"pretrain-{id}")
        return lm, f"{cell.controls[0].path}{strength}", methods.load(cell.controls[0], open_lm(lm)[0])

    return fit


@pytest.fixture(autouse=True)
def forget_programs():
    """The programs of one method serve no other, and those of all of them would use up the memory maps of a process."""
    yield
    jax.clear_caches()


@pytest.fixture
def call(capsys):
    def run(script, *argv, code=0):
        found = cli.run(script.main, list(map(str, argv)))
        out, err = capsys.readouterr()
        assert found == code, err
        return out, err

    return run


# By default a model that writes in place of the decode loop.
@pytest.mark.parametrize("name", every("mdlm"))
def test_generate_takes_the_controls_of_every_method_with_every_flag(name, root, fitted, call):
    lm, given, control = fitted(name)
    strategy = strategies.of(control)
    argv = [*PROMPTS, f"--lm={lm.path}", f"--root={root}", f"--control={given}", "--max_new=6", "--batch=4"]
    rows = records(call(generate, *argv, "--format=jsonl")[0])
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    stop = next(c for c in rows[0]["text"] if c.isascii() and c.isalnum())
    cut = records(call(generate, *argv, "--format=jsonl", f"--stop={stop}")[0])
    for whole, short in zip(rows, cut, strict=True):
        kept = len(short["tokens"])
        assert short["tokens"] == whole["tokens"][:kept] and (stop in short["text"]) == (stop in whole["text"])
        assert kept == len(whole["tokens"]) or (stop in short["text"] and short["logp"] >= whole["logp"])
    streamed, err = call(generate, *argv, f"--stop={stop}", "--stream", code=0 if strategy.apart else 2)
    if strategy.apart:
        assert streamed == "".join(generate.shown(row, "text") for row in cut)
    else:
        assert "writes completions in groups" in err
    refused = strategy is not strategies.PLAIN  # there is no next-token distribution to truncate
    out, err = call(generate, *argv, "--min_p=0.5", code=2 if refused else 0)
    assert err.count("give it alone, and set filter to {}") == refused and bool(out) != refused


@pytest.mark.parametrize("name", every("mdlm"))
def test_accelerators_and_meshes_write_what_one_device_writes(name, root, fitted, call, monkeypatch):
    """Four rows on four of eight simulated devices, each with a row of its own, and on meshes of them."""
    lm, given, _ = fitted(name)
    argv = [*PROMPTS, f"--lm={lm.path}", f"--root={root}", f"--control={given}", "--max_new=6", "--n=2"]
    argv += ["--format=jsonl", "--batch=4"]
    alone = records(call(generate, *argv)[0])
    with monkeypatch.context() as patched:
        patched.setattr(layout, "accelerators", lambda: tuple(jax.devices()[:4]))
        found = [records(call(generate, *argv)[0])]
    found.append(records(call(generate, *argv, "--mesh=fsdp=4,tensor=2")[0]))
    for rows in found:
        assert [row["tokens"] for row in rows] == [row["tokens"] for row in alone]
        np.testing.assert_allclose([row["logp"] for row in rows], [row["logp"] for row in alone], atol=1e-4)


@pytest.mark.parametrize(
    "name", ["steer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mdlm", "compare_together"))]
)
def test_a_whole_experiment_on_simulated_accelerators(name, tmp_path, call, monkeypatch):
    """Training and sampling are split over devices where they are accelerators; the report is made as on one."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    out, _ = call(compare, config(name), f"--root={tmp_path}")
    assert Path(out.strip()).exists()


def test_scripts_refuse_what_is_not_theirs_in_a_sentence(root, call):
    for script, name, words in [
        (main, "compare_together", "use experiments/compare.py"),
        (main, "latents", "unknown section 'analysis'"),
        (compare, "latents", "unknown section 'analysis'"),
        (latents, "steer", "has none of the sections recovery"),
    ]:
        out, err = call(script, config(name), f"--root={root}", code=2)
        assert words in err and out == ""


@pytest.mark.slow
def test_every_script_runs_a_configuration_with_chains(root, call):
    out, _ = call(diffusion_controls, config("compare_together"), f"--root={root}")
    assert "| together |" in out


def test_flags_are_read_in_every_spelling():
    assert cli.spelled(["--mesh", "data=8", "-hosts=auto", "--config", "a.py", "-h", "text"]) == [
        "--mesh=data=8", "--hosts=auto", "--config=a.py", "-h", "text",
    ]  # fmt: skip
