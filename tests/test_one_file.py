"""One file is one method: a new method is found by its file name, obeys the laws and runs through every script with no
other edit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctg_jax import methods
from ctg_jax.run.stage import open_artifact
from ctg_jax.types import InputError
from experiments import ablate, arms, cli, experiment, generate, main

HERE = Path(__file__).parents[1]

METHOD = '''\
"""Naive Bayes on the next token: z + scale · (log p(token | label 1) − log p(token | label 0))."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax.control import Control
from ctg_jax.data.labels import labelled
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function


@struct.dataclass
class Pull(Control):
    """Adds `scale` times `bias` to the logits; at scale 0 it is the base model."""

    bias: jax.Array  # float32 [V]
    scale: jax.Array  # float32 []

    def logits(self, z, h, tokens, mask, state):
        return z + self.scale * self.bias[None, None, :], state


def make(lm, key, *, tokens=()) -> Pull:
    """A pull of 1 towards each of `tokens`, and none towards the others."""
    return Pull(jnp.zeros(lm.vocab).at[jnp.asarray(tokens, jnp.int32)].set(1.0), jnp.ones(()))


init = make  # a fitted control has the same shapes


def example(lm, key) -> Pull:
    return Pull(2 * jax.random.normal(key, (lm.vocab,)), jnp.ones(()))


def neutral(control: Pull) -> Pull:
    return control.replace(scale=jnp.zeros(()))


def fit(root, *, lm: Artifact, data: Artifact, smoothing: float = 1.0) -> Artifact:
    return stage(root, pull, {"smoothing": smoothing}, lm=lm, data=data)


@stage_function("pull")
def pull(run: Run, *, lm: Artifact, data: Artifact, smoothing: float = 1.0) -> None:
    """Stage: counts the tokens of the texts of each label, `smoothing` added to every count."""
    model, _, tokenizer = open_lm(lm)
    counts = np.full((2, model.vocab), smoothing)
    for row in labelled(data.rows("data.jsonl"), str(data.path)):
        np.add.at(counts[row["label"]], tokenizer.encode([row["text"]])[0], 1)
    logp = np.log(counts) - np.log(counts.sum(1, keepdims=True))
    checkpoint.save(run.path / "state", Pull(jnp.asarray(logp[1] - logp[0], jnp.float32), jnp.ones(())))
    run.record(method="pull", init={})
'''

CONFIG = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from configs import sentiment
def get_config(arg="tiny"):
    fitted = dict(method="pull", fit=dict(smoothing=1.0), strengths=(-1.0, 1.0))
    made = dict(method="pull", init=dict(tokens=(5, 6)), strengths=(30.0,))
    return sentiment.experiment(arg, "Pull", dict(top_p=dict(), fitted=fitted, made=made))
def sweep():
    for smoothing in (0.1, 10.0):
        yield {{"methods.fitted.fit.smoothing": smoothing}}
"""

# In the process of the laws: the folder is added once the environment of the tests is there.
PLUGIN = """
def pytest_sessionstart(session):
    from ctg_jax import methods
    methods.__path__.append({folder!r})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one room and one file in it, which is added to the package of methods."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "own").mkdir()
    (folder / "own" / "__init__.py").touch()
    (folder / "own" / "pull.py").write_text(METHOD)
    methods.__path__.append(str(folder))
    yield folder
    methods.__path__.remove(str(folder))
    for name in [name for name in sys.modules if name.startswith("ctg_jax.methods.own")]:
        del sys.modules[name]


@pytest.fixture
def call(folder, tmp_path_factory, capsys, monkeypatch):
    monkeypatch.setattr(cli, "keep_compiled", lambda: None)

    def run(script, *argv, code=0):
        found = cli.run(script.main, list(map(str, argv)))
        out, err = capsys.readouterr()
        assert found == code, err
        return out.strip()

    return run


def table(page):
    return json.loads(Path(page).with_suffix(".json").read_text())["lines"]


def test_it_is_found_by_its_name(folder):
    assert len(METHOD.splitlines()) <= 60
    assert "pull" in methods.names() and methods.get("pull").Pull.__module__ == "ctg_jax.methods.own.pull"


def test_a_setting_that_its_fit_lacks_is_refused_before_anything_runs(folder):
    with pytest.raises(InputError, match="did you mean 'smoothing'"):
        arms.read(dict(a=dict(method="pull", data={}, fit=dict(smothing=1.0))))


def test_it_runs_through_every_script(folder, call, tmp_path):
    config = tmp_path / "pull.py"
    config.write_text(CONFIG)
    given = [f"--config={config}:tiny", f"--root={tmp_path / 'runs'}"]
    lines = table(call(main, *given))
    assert [(line["method"], line["strength"]) for line in lines] == [
        ("top_p", None), ("fitted", -1.0), ("fitted", 1.0), ("made", 30.0)
    ]  # fmt: skip
    assert all({"positive/share", "perplexity", "kl"} <= line["figures"].keys() for line in lines)
    swept = {(line.get("fit.smoothing"), line["strength"]) for line in table(call(ablate, *given))}
    assert swept >= {(s, x) for s in (0.1, 10.0) for x in (-1.0, 1.0)}
    cells = experiment.run(str(tmp_path / "runs"), cli.config_of(f"{config}:tiny"))
    (control,) = cells[-1].controls
    lm = open_artifact(next((tmp_path / "runs").glob("pretrain-*")))
    argv = ["we were", f"--lm={lm.path}", f"--root={tmp_path / 'runs'}", "--format=jsonl", "--max_new=5"]
    row = json.loads(call(generate, *argv, f"--control={control.path}=50"))
    assert set(row["tokens"]) == {5, 6}


def test_it_obeys_every_law(folder, tmp_path, request):
    """By default those that are tested for every method by default."""
    (tmp_path / "one_file.py").write_text(PLUGIN.format(folder=str(folder)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(HERE)])}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "one_file", "-p", "no:cacheprovider"]
    argv += ["-k", "pull and not None", "tests/laws/test_laws.py"]  # None: all layers of the largest shapes
    slow = request.config.getoption("--slow")
    argv += ["--slow"] * slow
    done = subprocess.run(argv, cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= (15 if slow else 8), done.stdout[-300:]
