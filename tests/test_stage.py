"""`stage`: memoised, resumed, guarded and verified."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from ctg_jax.run import stage as S
from ctg_jax.run.session import Session
from ctg_jax.run.stage import Artifact, stage, stage_function
from ctg_jax.types import InputError


def number(run, *, value=1, scale=2.0):
    (run.path / "state").mkdir(exist_ok=True)
    (run.path / "state" / "value.txt").write_text(str(value))
    run.log(value=value, scale=scale)


def add(run, *, left, right, extra=()):
    values = [float(a.metrics()[0]["value"]) for a in (left, right, *extra)]
    run.log(total=sum(values))


def test_runs_once_for_each_distinct_call(tmp_path):
    session = Session(tmp_path)
    a = stage(session, number, {"value": 3})
    again = stage(session, number, {"scale": 2.0, "value": 3})  # the default said aloud is the same call
    other = stage(session, number, {"value": 4})
    total = stage(session, add, left=a, right=other, extra=[a])
    assert a == again and a.id != other.id
    assert (len(session.tally.executed), len(session.tally.reused)) == (3, 0)
    assert total.metrics() == [{"total": 10.0}]
    assert a.path.name == f"number-{a.id}" and a.spec["config"] == {"scale": 2.0, "value": 3}
    assert total.spec["inputs"] == {"extra": [a.id], "left": a.id, "right": other.id}
    session = Session(tmp_path)
    assert stage(session, number, {"value": 3}) == a
    assert session.tally.executed == [] and session.tally.reused == [a.path.name]


def test_id_depends_on_revision_inputs_and_name(tmp_path):
    a, b = stage(tmp_path, number, {"value": 1}), stage(tmp_path, number, {"value": 2})
    assert stage(tmp_path, add, left=a, right=b).id != stage(tmp_path, add, left=b, right=a).id

    def revised(run, *, value=1, scale=2.0):
        run.log(value=value)

    made = [stage(tmp_path, stage_function("number", revision=n)(revised), {"value": 1}) for n in (0, 1)]
    assert made[0].id != made[1].id and made[0].path.name.startswith("number-")


def test_values_of_other_libraries_are_recorded_as_json(tmp_path):
    given = {"value": np.float32(2), "scale": ConfigDict({"a": (1, 2)})}
    assert stage(tmp_path, number, given).spec["config"] == {"scale": {"a": [1, 2]}, "value": 2.0}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"vlaue": 1}, "number has no setting 'vlaue'; did you mean 'value'?"),
        ({"value": float("nan")}, "value=nan"),
        ({"value": object()}, "cannot be recorded"),
    ],
)
def test_bad_configuration_writes_nothing(tmp_path, config, words):
    with pytest.raises(InputError) as e:
        stage(tmp_path / "new", number, config)
    assert words in str(e.value) and not (tmp_path / "new").exists()


def test_missing_and_wrong_inputs(tmp_path):
    a = stage(tmp_path, number)
    with pytest.raises(InputError, match="needs a value for 'right'"):
        stage(tmp_path, add, left=a)
    with pytest.raises(InputError, match="'right' is a str"):
        stage(tmp_path, add, left=a, right="here")


def test_interrupted_stage_goes_on_in_its_own_directory(tmp_path):
    def train(run, *, steps=3):
        done = [r for r in S.read_jsonl(run.path / "metrics.jsonl")] if (run.path / "metrics.jsonl").exists() else []
        for step in range(len(done), steps):
            run.log(step=step)
            if step == 1 and len(done) == 0:
                run.log(note="lost with the attempt")
                raise KeyboardInterrupt
        run.log(final=True)

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, train)
    (place,) = tmp_path.glob("train-*")
    assert not (place / "DONE").exists()
    with open(place / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "half": ')  # a row cut in the middle by the kill
    (place / "sub").mkdir()
    for half in (place / ".samples.jsonl.4321", place / "sub" / ".facts.json.17"):
        half.write_text("what a kill left of a file that is written whole or not at all")
    session = Session(tmp_path)
    a = stage(session, train)
    assert a.path == place and session.tally.executed == [place.name]
    assert a.metrics() == [{"step": 0}, {"step": 1}, {"step": 2}, {"final": True}]
    assert not list(place.rglob(".*"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "state" / "value.txt").write_text("2"), "other contents"),
        (lambda p: (p / "metrics.jsonl").write_text(""), "has 0 bytes"),
        (lambda p: (p / "state" / "value.txt").unlink(), "is missing"),
        (lambda p: (p / "DONE").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_damaged_artifact_names_the_file(tmp_path, damage, words):
    a = stage(tmp_path, number)
    damage(a.path)
    with pytest.raises(InputError, match=words) as e:
        stage(tmp_path, number)
    assert str(a.path) in str(e.value)
    with pytest.raises(InputError, match=words):
        S.open_artifact(a.path)


def test_open_artifact(tmp_path):
    a = stage(tmp_path, number)
    assert S.open_artifact(a.path) == a
    with pytest.raises(InputError, match="holds no artifact"):
        S.open_artifact(tmp_path)


def test_recorded_facts_are_read_back(tmp_path):
    def fit(run):
        run.record(method="steer", init={"layer": 3}, fingerprint="abc")

    a = stage(tmp_path, fit)
    assert a.spec["init"] == {"layer": 3} and a.fingerprint == "abc"


def test_bad_input_leaves_nothing_half_written(tmp_path):
    def broken(run):
        (run.path / "half.txt").write_text("half")
        raise InputError("no")

    with pytest.raises(InputError):
        stage(tmp_path, broken)
    assert not list(tmp_path.glob("broken-*"))


def test_output_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output directory"):
        stage(tmp_path / "file", number)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        stage(tmp_path / "new", number)


def test_full_disk_is_bad_input(tmp_path):
    def full(run):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        stage(tmp_path, full)


def test_an_error_of_another_file_is_not_blamed_on_the_output(tmp_path):
    def denied(run):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/secret")

    with pytest.raises(PermissionError):
        stage(tmp_path, denied)


def test_malformed_jsonl_names_the_line(tmp_path):
    for text, line in (('{"a": 1}\n\n{"a": \n', 3), ("[1]\n", 1), ('{"a": 1}\n\xff', 2)):
        (tmp_path / "x.jsonl").write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=f"x.jsonl line {line} "):
            S.read_jsonl(tmp_path / "x.jsonl")


def test_jsonl_round_trip(tmp_path):
    rows = [{"text": "naïve \u2028 line", "x": 1.5}, {"text": ""}]
    S.write_jsonl(tmp_path / "x.jsonl", rows)
    assert S.read_jsonl(tmp_path / "x.jsonl") == rows


SLOW = """
import sys, time
from pathlib import Path
from ctg_jax.run.stage import stage
def slow(run, *, wait=0.0):
    with open(run.path.parent / "starts", "a") as f: f.write("x")
    if (run.path.parent / "hang").exists(): time.sleep(60)
    time.sleep(0.5)
    run.log(ok=1)
print(stage(sys.argv[1], slow).id)
"""


def _start(root: Path):
    env = {**os.environ, "PYTHONPATH": str(Path(S.__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", SLOW, str(root)], env=env, stdout=subprocess.PIPE, text=True)


def _wait_for(path: Path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


def test_two_processes_run_a_stage_once_and_a_dead_holder_blocks_nobody(tmp_path):
    (tmp_path / "hang").touch()
    first = _start(tmp_path)
    _wait_for(tmp_path / "starts")
    second, third = _start(tmp_path), _start(tmp_path)
    (tmp_path / "hang").unlink()
    first.kill()  # while it holds the lock
    first.wait()
    ids = {p.communicate(timeout=60)[0].strip() for p in (second, third)}
    assert len(ids) == 1 and (tmp_path / "starts").read_text() == "xx"


def test_artifact_is_a_value(tmp_path):
    a = stage(tmp_path, number)
    assert a == Artifact(a.path, a.id) and hash(a) == hash(Artifact(a.path, a.id))
    assert json.loads((a.path / "DONE").read_text()).keys() == {
        "spec.json",
        "metrics.jsonl",
        "state/value.txt",
        "DONE",
    }
