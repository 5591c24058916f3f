"""Roots in an object store: a store in memory stands for gs://, without renames, locks or directories of its own."""

import json

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ctg_jax.learn import train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.run import checkpoint
from ctg_jax.run.session import Session
from ctg_jax.run.stage import stage
from ctg_jax.run.store import Store
from ctg_jax.types import InputError, Sum


class Bucket(MemoryFileSystem):
    """gs:// in memory. `log` is the order in which objects came, `broken` the name that cannot be written."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]
    log, broken = [], None

    def __init__(self, *args, finalize_on_close=True, **kw):
        super().__init__(*args, **kw)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("gs://", "memory://"))

    def open(self, path, mode="rb", **kw):
        if "w" in mode:
            if self.broken and path.endswith(self.broken):
                raise OSError("the line is cut")
            self.log.append(path.removeprefix("gs://bucket/"))
        return super().open(path, mode, **kw)


@pytest.fixture
def bucket(monkeypatch):
    from etils.epath import backend

    monkeypatch.setenv("EPATH_USE_TF", "0")
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(Bucket, "log", [])
    monkeypatch.setattr(Bucket, "broken", None)
    found = Bucket()
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: found)
    return found


def write(run, *, text="a"):
    run.log(value=1.0)
    (run.path / "deep").mkdir()
    (run.path / "deep" / "text.txt").write_text(text)


def test_another_machine_finds_what_is_finished(bucket, tmp_path):
    one, two = (Store("gs://bucket/runs/", tmp_path / name) for name in ("one", "two"))
    first = stage(one, write, {"text": "b"})
    names = [name.removeprefix(f"runs/{first.path.name}/") for name in bucket.log]
    assert names[-1] == "DONE" and sorted(names) == ["DONE", "deep/text.txt", "metrics.jsonl", "spec.json"]
    session = Session(two)
    second = stage(session, write, {"text": "b"})
    assert (session.tally.executed, session.tally.reused) == ([], [first.path.name])
    assert second.path.parent == tmp_path / "two" and second.metrics() == [{"value": 1.0}]
    assert (second.path / "deep" / "text.txt").read_text() == "b"


def test_without_done_nothing_is_there(bucket, tmp_path):
    first = stage(Store("gs://bucket/runs", tmp_path / "one"), write)
    del bucket.store[f"/bucket/runs/{first.path.name}/DONE"]
    session = Session(Store("gs://bucket/runs", tmp_path / "two"))
    stage(session, write)
    assert session.tally.executed == [first.path.name]


def test_a_line_that_is_cut_says_where_the_work_is_and_the_next_run_copies_it(bucket, tmp_path, monkeypatch):
    store = Store("gs://bucket/runs", tmp_path / "one")
    monkeypatch.setattr(Bucket, "broken", "text.txt")
    with pytest.raises(InputError, match=r"cannot be reached .*the line is cut.*what was made is in .*one"):
        stage(store, write)
    assert not [name for name in bucket.log if name.endswith("DONE")]
    monkeypatch.setattr(Bucket, "broken", None)
    session = Session(store)
    found = stage(session, write)
    assert session.tally.executed == [] and bucket.exists(f"gs://bucket/runs/{found.path.name}/DONE")


def test_a_damaged_object_is_named(bucket, tmp_path):
    first = stage(Store("gs://bucket/runs", tmp_path / "one"), write)
    bucket.pipe(f"gs://bucket/runs/{first.path.name}/deep/text.txt", b"c")
    with pytest.raises(InputError, match=r"deep/text.txt has other contents"):
        stage(Store("gs://bucket/runs", tmp_path / "two"), write)


def loss(params, frozen, batch, keys):
    return Sum(jnp.sum((params["w"][None] - batch["x"]) ** 2), jnp.float32(batch["x"].shape[0]))


def learn(run):
    state = train.init_state({"w": jnp.zeros(3)}, optimizer(0.1), jax.random.key(0))
    rows = ({"x": np.full((2, 3), i, np.float32), "ids": np.arange(2)} for i in range(100))
    state = train.loop(
        run.path, state, train.make_step(loss, optimizer(0.1)), rows, steps=9, save_every=2, progress=False
    )
    checkpoint.save(run.path / "state", state.params)


def test_training_goes_on_where_another_machine_was_taken_away(bucket, tmp_path, monkeypatch):
    whole = stage(tmp_path / "whole", learn)
    real = train.store.step_saved
    monkeypatch.setattr(train.store, "step_saved", lambda path: real(path) or taken_away(path))

    def taken_away(path):
        if path.name == "00000006":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(Store("gs://bucket/runs", tmp_path / "one"), learn)
    monkeypatch.setattr(train.store, "step_saved", real)
    steps = {p.split("/steps/")[1].split("/")[0] for p in bucket.find("gs://bucket/runs") if "/steps/" in p}
    assert steps == {"00000006"}
    began = []
    loop = checkpoint.load_last
    monkeypatch.setattr(checkpoint, "load_last", lambda *a: began.append(loop(*a)) or began[-1])
    again = stage(Store("gs://bucket/runs", tmp_path / "two"), learn)
    assert began[0][0] == 6
    assert np.array_equal(again.load()["w"], whole.load()["w"])
    assert (again.path / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()
    third = stage(Store("gs://bucket/runs", tmp_path / "three"), learn)
    assert sorted(p.name for p in (third.path / "steps").iterdir()) == ["00000008", "00000009"]


def test_no_file_system_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("EPATH_USE_TF", "0")
    monkeypatch.setattr(fsspec, "filesystem", lambda *a, **k: (_ for _ in ()).throw(ImportError("install gcsfs")))
    with pytest.raises(InputError, match=r"root gs://nowhere/runs cannot be reached .*install gcsfs"):
        stage(Store("gs://nowhere/runs", tmp_path), write)


def test_the_flag(tmp_path, monkeypatch):
    from experiments import roots

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = roots.opened("gs://bucket/a/b/")
    assert isinstance(store, Store) and store.local == tmp_path / "ctg_jax" / "roots" / "gs" / "bucket" / "a" / "b"
    assert str(Session(store)) == "gs://bucket/a/b" and json.dumps(roots.opened("runs")) == '"runs"'
