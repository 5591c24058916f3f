"""The JSONL of a run: exactly one row per step, whatever a crash left behind."""

import json
import sys

import numpy as np
import pytest

from ctg_jax.run.metrics import Writer
from ctg_jax.run.session import Session
from ctg_jax.types import InputError


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_flushed_and_appended(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with Writer(path) as w:
        w.write(1, {"loss": np.float32(0.1)})
        assert rows(path) == [{"step": 1, "loss": float(np.float32(0.1))}]
        w.write(2, {"loss": 0.5})
    with Writer(path, step=2) as w:
        w.write(3, {"loss": 0.25})
    assert [r["step"] for r in rows(path)] == [1, 2, 3]


def test_resume_drops_later_rows_and_a_torn_line_and_keeps_rows_without_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"note": "start"}\n{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    with Writer(path, step=1) as w:
        w.write(2, {"loss": 2.5})
    assert rows(path) == [{"note": "start"}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.5}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_without_its_newline_is_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}')
    Writer(path, step=2).close()
    assert [r["step"] for r in rows(path)] == [1]


def test_values_that_are_not_finite_stay_json(tmp_path):
    with Writer(tmp_path / "m.jsonl") as w:
        w.write(1, {"loss": float("nan"), "x": float("inf")})
    assert rows(tmp_path / "m.jsonl") == [{"step": 1, "loss": None, "x": None}]


def test_tensorboard_gets_the_same_figures(tmp_path):
    pytest.importorskip("tensorboardX")
    with Writer(tmp_path / "m.jsonl", boards=["tensorboard"]) as w:
        w.write(1, {"loss": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes()


class Board:
    """Stands in for the package wandb and for one of its runs."""

    def __init__(self):
        self.asked, self.rows, self.ended = None, [], 0

    def init(self, **asked):
        self.asked = asked
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.ended += 1


def test_wandb_gets_the_same_figures(tmp_path, monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    folder = tmp_path / "lm_steer-0123456789ab"
    folder.mkdir()
    (folder / "spec.json").write_text('{"config": {"rank": 4}}')
    with Writer(folder / "metrics.jsonl", boards=["wandb"]) as w:
        w.write(1, {"loss": np.float32(0.5)})
    assert board.rows == [(1, {"loss": 0.5})] and board.ended == 1
    assert board.asked["id"] == folder.name and board.asked["resume"] == "allow"
    assert board.asked["group"] == "lm_steer" and board.asked["config"] == {"rank": 4}
    assert board.asked["dir"] == str(tmp_path)  # nothing but figures in the folder of the artifact


def test_an_unknown_board_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="boards names 'wand', expected some of tensorboard, wandb"):
        Session(tmp_path, boards=["wand"])
