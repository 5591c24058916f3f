"""`experiments/generate.py`: prompts in, texts out, and every way to get it wrong."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from ctg_jax import methods
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import stage
from ctg_jax.stages import sampling, sources
from ctg_jax.types import InputError
from experiments import cli, generate
from tests.experiments.tiny_lm import write_lm


def fit_steer(run, *, lm, width=16, push=1.0):
    """A steering control with a constant vector, as a `fit` would leave it."""
    model = sampling.opened(lm)[0]
    control = methods.get("steer").init(model, jax.random.key(0))
    control = control.replace(vector=jnp.full_like(control.vector, push))
    checkpoint.save(run.path / "state", control)
    run.record(method="steer", init={})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def lm(root, lm_dir):
    return stage(root, sources.load_lm, {"source": str(lm_dir)})


@pytest.fixture(scope="module")
def control(root, lm):
    return stage(root, fit_steer, lm=lm)


@pytest.fixture
def call(root, lm_dir, capsys):
    def run(*argv, model=lm_dir):
        code = cli.run(generate.main, [f"--lm={model}", f"--root={root}", "--max_new=4", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def refused(result, words):
    code, out, err = result
    said = [line for line in err.splitlines() if not line.startswith(("stages:", "running"))]
    assert code == 2 and out == "" and len(said) == 1, (code, out, err)
    assert words in said[0], said[0]


def test_text_and_jsonl(call, tmp_path):
    code, out, err = call("the food was", "we", "--n=2")
    lines = out.split("\n")[:-1]  # other line separators may be part of a text
    assert code == 0 and [line.startswith(p) for line, p in zip(lines, ["the food was"] * 2 + ["we"] * 2)] == [True] * 4
    assert "stages:" in err
    code, _, _ = call("the food was", "we", "--n=2", "--format=jsonl", f"--out={tmp_path / 'x.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().split("\n")[:-1]]
    assert code == 0 and [r["prompt"] + r["text"] for r in rows] == [line.replace("\\n", "\n") for line in lines]
    assert [(r["prompt_id"], r["sample"]) for r in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_prompts_from_a_file_and_from_standard_input(call, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("the food\n\nwe left\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "the food"}\n{"text": "we left"}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("the food\nwe left\n"))
    outputs = [call(*a)[1] for a in ([f"--file={tmp_path / 'p.txt'}"], [f"--file={tmp_path / 'p.jsonl'}"], [])]
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0].splitlines()) == 2


def test_proposals_that_nothing_judges_are_the_texts_of_the_loop(call, control):
    words = ["the food was", "we", "--control", f"{control.path}=2"]
    assert call(*words, "--speculate=2")[:2] == call(*words)[:2]
    refused(call(*words, "--speculate=2", "--no_repeat_ngram=2"), "changes its state with every token")
    refused(call(*words, "--speculate=-1"), "k is -1, expected at least 1")


def test_a_control_at_its_strengths(call, control):
    plain = call("the food was", "--greedy")[1]
    assert call("the food was", "--greedy", "--control", f"{control.path}=0")[1] == plain
    assert call("the food was", "--greedy", "--control", f"{control.path}=300")[1] != plain
    once = call("the food was", "--greedy", "--control", f"{control.path}=2")[1]
    twice = call("the food was", "--greedy", *["--control", f"{control.path}=1"] * 2)[1]
    assert once == twice


def test_bad_prompts(call, tmp_path, monkeypatch):
    refused(call(" ".join(["the food was good"] * 12)), "the model's context is 32")
    refused(call("good", ""), "prompt 2 is empty")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    refused(call(), "the list of prompts is empty")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    refused(call(f"--file={tmp_path / 'p.jsonl'}"), "p.jsonl line 2 ")
    (tmp_path / "q.jsonl").write_text('{"prompt": 3}\n')
    refused(call(f"--file={tmp_path / 'q.jsonl'}"), 'record 1 has no "prompt"')
    refused(call(f"--file={tmp_path / 'none.txt'}"), "cannot be read")
    refused(call("a", f"--file={tmp_path / 'p.jsonl'}"), "use one of the two")


def test_bad_flags(call, tmp_path):
    refused(call("a", "--top_q=0.9"), "did you mean 'top_p'?")
    refused(call("a", "--top_p=1.5"), "top_p is 1.5")
    refused(call("a", "--n=0"), "--n=0")
    refused(call("a", f"--out={tmp_path / 'no' / 'x'}"), "cannot be written")
    assert not (tmp_path / "no").exists()


def test_bad_strengths_and_controls(call, control, tmp_path):
    refused(call("a", "--control", f"{control.path}=nan"), "strength is nan")
    refused(call("a", "--control", f"{control.path}=much"), "'much' is not a number")
    refused(call("a", "--control", f"{tmp_path}=1"), "holds no artifact")


def test_a_control_of_another_lm(call, control, tmp_path_factory):
    other = write_lm(tmp_path_factory.mktemp("other"), seed=1)
    refused(call("a", "--control", f"{control.path}=1", model=other), "fitted on another language model")


def test_a_damaged_control_names_the_file(call, control, tmp_path):
    copy = shutil.copytree(control.path, tmp_path / control.path.name)
    victim = max((p for p in (copy / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    refused(call("a", "--control", f"{copy}=1"), str(victim))
    victim.unlink()
    refused(call("a", "--control", f"{copy}=1"), str(victim))


def test_bad_models(call, lm_dir, tmp_path):
    refused(call("a", model=tmp_path / "nothing"), "nothing")
    for name, damage, words in [
        ("truncated", lambda d: _cut(d / "model.safetensors"), "model.safetensors"),
        ("missing", lambda d: (d / "model.safetensors").unlink(), "safetensors"),
        ("pickled", lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin"),
        ("family", lambda d: _edit(d / "config.json", model_type="bert"), "bert"),
        ("shape", lambda d: _edit(d / "config.json", n_embd=32), "shape"),
    ]:
        folder = shutil.copytree(lm_dir, tmp_path / name)
        damage(folder)
        refused(call("a", model=folder), words)
    assert not [p for p in (tmp_path / "runs").glob("*")]


def test_a_hub_id_without_network(call):
    refused(call("a", model="nobody/no-such-model"), "network")


def test_an_imported_model_that_changed(tmp_path):
    folder = write_lm(tmp_path / "lm")
    artifact = stage(tmp_path / "runs", sources.load_lm, {"source": str(folder)})
    write_lm(folder, seed=5)
    with pytest.raises(InputError, match="have changed since"):
        sampling.build(artifact)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
