"""The command `ctg`: every subcommand is a script, and a user's own texts go through it without a configuration."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ctg_jax.door import command as launcher
from experiments import cli, command, fit, generate
from tests.experiments.tiny_lm import TEXTS

ROOT = Path(__file__).parents[2]


def test_help_lists_every_subcommand(capsys):
    assert command.main([]) == command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name:8}  {command.about(name)}" in out and command.about(name) for name in command.COMMANDS)
    assert command.main(["compair"]) == 2
    assert "did you mean 'compare'?" in capsys.readouterr().err


def test_the_launcher_finds_the_scripts_from_any_folder(tmp_path):
    """In a process of its own, in a folder that holds packages of the same names."""
    for name in ("experiments", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); from ctg_jax.door.command import main; sys.exit(main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "compare" in done.stdout, done.stderr
    assert launcher.folder() == ROOT


def test_a_wheel_carries_the_scripts_without_their_names():
    text = (ROOT / "setup.py").read_text("utf-8")
    assert '{"ctg_jax._scripts.experiments": "experiments", "ctg_jax._scripts.configs": "configs"}' in text
    assert '"ctg = ctg_jax.door.command:main"' in text


@pytest.fixture
def own(tmp_path):
    """A user's own texts: emoji, a long one, labels that are words."""
    rows = [{"text": t, "mood": m} for t in (*TEXTS, "so good 🙂", "word " * 300) for m in ("good", "bad")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "own.jsonl"


@pytest.fixture
def call(tmp_path, lm_dir, capsys):
    def run(script, *argv):
        code = cli.run(script.main, [f"--lm={lm_dir}", f"--root={tmp_path / 'runs'}", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, [x for x in err.splitlines() if not x.startswith(("running", "stages:"))]

    return run


def test_own_texts_become_a_control(call, own, tmp_path):
    labels = '--read=labels={"mood": {"bad": 0, "good": 1}}'
    out = f"--out={tmp_path / 'cheerful'}"
    code, last, said = call(fit, "steer", f"--data=jsonl:{own}", labels, "--set=sites=1", "--set=tokens=16", out)
    assert (code, last.strip()) == (0, str(tmp_path / "cheerful"))
    assert len(said) == 1 and "the two sides hardly differ" in said[0]  # `own` has every text with both labels
    code, text, _ = call(generate, "the food", f"--control={tmp_path / 'cheerful'}=2", "--max_new=3")
    assert code == 0 and text.startswith("the food")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "one method is expected"),
        (["ster"], "did you mean 'steer'"),
        (["truncate"], "truncate has no fit"),
        (["steer", "--data="], "--data is missing"),
        (["steer", "--data=jsonl:nothing.jsonl"], "there is no such file"),
        (["steer", "--read=labels"], "expected KEY=VALUE"),
        (["steer", "--set=a=1", "--set=a.b=2"], "a was given as a value and as a section"),
        (["steer", "--read=lables=3"], "did you mean 'labels'"),
        (["steer", "--set=site=3"], "did you mean 'sites'"),
        (["quark"], "quark learns from a reward: give --reward=FILE.py:FUNCTION"),
        (["steer", "--reward=mine.py:short"], "steer learns from no reward"),
        (["quark", "--reward=mine:short"], "expected FILE.py:FUNCTION"),
        (["quark", "--reward=nothing.py:short"], "there is no file nothing.py"),
        (["proxy"], "proxy needs the setting 'small'"),
    ],
)
def test_what_is_wrong_is_one_sentence(call, own, argv, words):
    code, out, said = call(fit, f"--data=jsonl:{own}", *argv)
    assert code == 2 and out == "" and len(said) == 1 and words in said[0], said


def test_trainings_are_drawn_where_a_flag_says_so(call, own, tmp_path, monkeypatch):
    """On TensorBoard, and a missing package is told before the texts are read."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, said = call(fit, "finetune", "--data=jsonl:nothing.jsonl", "--wandb")
    assert code == 2 and len(said) == 1 and "pip install 'ctg_jax[wandb]'" in said[0]
    pytest.importorskip("tensorboardX")
    quick = [f"--set=training.{setting}" for setting in ("steps=2", "batch=2", "tokens=8")]
    code, folder, said = call(fit, "finetune", f"--data=jsonl:{own}", *quick, "--tensorboard")
    assert (code, said) == (0, []) and list((Path(folder.strip()) / "tensorboard").iterdir())


def test_faults_of_the_data_come_before_the_model(call, own, tmp_path):
    rows = [json.loads(line) for line in own.read_text().splitlines()]
    own.write_text("".join(json.dumps({"text": r["text"], "label": r["mood"]}) + "\n" for r in rows))
    code, _, said = call(fit, "steer", f"--data=jsonl:{own}")
    assert code == 2 and "--read labels=\"{'bad': 0, 'good': 1}\"" in said[0]
    own.write_text(own.read_text() + '{"text": "broken, "label": 1}\n')
    code, _, said = call(fit, "steer", f"--data=jsonl:{own}")
    assert code == 2 and "own.jsonl line 11 is not a valid JSON object" in said[0]
    assert not list((tmp_path / "runs").glob("load_lm-*"))


def test_texts_that_are_left_out_are_counted(call, own, tmp_path):
    """A label that is missing, one that has no number, and a text that is empty."""
    more = [{"text": "no mood"}, {"text": "so-so", "mood": "neither"}, {"text": "", "mood": "good"}]
    own.write_text(own.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    labels = '--read=labels={"mood": {"bad": 0, "good": 1}}'
    code, _, said = call(fit, "steer", f"--data=jsonl:{own}", labels, "--set=site=1")
    assert code == 2 and "left out 2 of 13" in said[0] and "the text of 1 of 11 records is empty" in said[1], said


@pytest.mark.slow
def test_a_method_learns_from_a_function_in_a_file(call, own, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "my_own_reward.py"
    file.write_text("def short(prompt, text):\n    return -len(text) / 100\n")
    quick = [f"--set=training.{s}" for s in ("steps=2", "batch=4")] + ["--set=explore={'n': 2, 'max_new': 4}"]
    asked = ["quark", f"--data=jsonl:{own}", "--read=words=2", "--set=rounds=1", *quick, f"--out={tmp_path / 'q'}"]
    code, last, said = call(fit, *asked, f"--reward={file}:shrt")
    assert code == 2 and "has no attribute 'shrt'" in said[-1]
    code, last, said = call(fit, *asked, f"--reward={file}:short")
    assert (code, last.strip()) == (0, str(tmp_path / "q")), said
