"""Faults, counted: files that were damaged in any way, a disk that fills up, processes that meet or die, clocks that
disagree. Nothing is lost, nothing half-written is read, and every outcome is one sentence that names the file."""

import errno
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.learn import experience, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.learn.pool import POOL
from ctg_jax.run import checkpoint
from ctg_jax.run import stage as S
from ctg_jax.run.session import Session
from ctg_jax.run.stage import stage
from ctg_jax.types import InputError, Sum

WIDTH = 20_000  # numbers: with Adam's moments a checkpoint of 240 kB, mostly noise


def flip(file, bit):
    raw = bytearray(file.read_bytes())
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    file.write_bytes(raw)


DAMAGE = {
    "one bit": lambda file: flip(file, random.Random(str(file.name)).randrange(8 * file.stat().st_size)),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "missing": lambda file: file.unlink(),
}


def distance(params, frozen, batch, keys):
    noise = jnp.sum(jax.vmap(jax.random.normal)(keys))
    return Sum(jnp.sum((params["x"] - batch["at"][0] - noise) ** 2), jnp.float32(1.0))


class Batches:
    """An endless stream with a position."""

    def __init__(self):
        self.at = 0

    def __next__(self):
        self.at += 1
        return {"at": np.full(2, np.sin(self.at), np.float32), "ids": np.arange(2, dtype=np.int32) + 2 * self.at}

    def get_state(self):
        return {"next": self.at}

    def set_state(self, state):
        self.at = state["next"]


TX = optimizer(0.1)


def learn(path, steps=8):
    noise = jax.random.normal(jax.random.key(1), (WIDTH,))
    state = train.init_state({"x": noise}, TX, jax.random.key(0))
    return train.loop(path, state, train.make_step(distance, TX), Batches(), steps=steps, save_every=2, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole")
    return path, learn(path)


def equal(path, end, whole):
    np.testing.assert_array_equal(end.params["x"], whole[1].params["x"])
    jax.tree.map(np.testing.assert_array_equal, end.opt_state, whole[1].opt_state)
    assert (path / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("damage", DAMAGE)
def test_training_goes_on_from_the_last_good_step_whatever_file_is_damaged(tmp_path, whole, damage, caplog):
    """Every file of the last checkpoint in turn; the bad file is named and the end is the same, to the bit."""
    files = [p.relative_to(whole[0]) for p in sorted((whole[0] / "steps/00000008").rglob("*")) if p.is_file()]
    files = [p for p in files if (whole[0] / p).stat().st_size]
    assert len(files) >= 5 and any(p.name == "manifest.json" for p in files)
    for i, file in enumerate(files):
        path = tmp_path / str(i)
        shutil.copytree(whole[0], path)
        DAMAGE[damage](path / file)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ctg_jax.run.checkpoint"):
            end = learn(path)
        assert f"{path / file} " in caplog.text and "step 8" in caplog.text
        equal(path, end, whole)
    print(f"{len(files)} files {damage}: all named, all mended")


def every_kind(run, *, n=3):
    """A stage that leaves every kind of file there is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    run.log(value=1.5)
    S.write_jsonl(run.path / "samples.jsonl", [{"text": "good", "tokens": [1, 2]}] * n)
    checkpoint.save(run.path / "state", {"a": jnp.arange(300.0)}, {"note": "x"})
    table = {"prompt_id": list(range(n)), "reward": [0.5] * n, "text": ["so good"] * n}
    pq.write_table(pa.table(table), run.path / POOL)
    run.record(method="none")


def reader(run, *, given):
    run.log(read=len(given.rows("samples.jsonl")))


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damaged_file_of_an_artifact_is_named_and_never_read(tmp_path, damage):
    good = stage(tmp_path / "good", every_kind)
    files = [p.relative_to(good.path) for p in sorted(good.path.rglob("*")) if p.is_file() and p.stat().st_size]
    kinds = {p.name for p in files}
    assert {"spec.json", "DONE", "metrics.jsonl", "samples.jsonl", "manifest.json", POOL} <= kinds
    for i, file in enumerate(files):
        root = tmp_path / str(i)
        shutil.copytree(tmp_path / "good", root)
        DAMAGE[damage](root / good.path.name / file)
        if damage == "missing" and file.name == "DONE":
            continue  # an artifact without it is an unfinished one, and runs again
        for use in (
            lambda root=root: stage(root, every_kind),
            lambda root=root: S.open_artifact(root / good.path.name),
            lambda root=root: stage(root, reader, given=stage(root, every_kind)),
        ):
            with pytest.raises(InputError) as e:
                use()
            assert str(root / good.path.name / file) in str(e.value) and "\n" not in str(e.value)
        assert not list(root.glob("reader-*"))
    print(f"{len(files)} files {damage}: all named, none read")


def test_a_damaged_file_is_found_by_the_process_that_wrote_it(tmp_path):
    """What was compared once is compared again when it has changed."""
    made = stage(tmp_path, every_kind)
    assert stage(tmp_path, every_kind) == made == stage(tmp_path, every_kind)
    times = (made.path / "samples.jsonl").stat()
    flip(made.path / "samples.jsonl", 77)
    os.utime(made.path / "samples.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))  # even with the old time
    with pytest.raises(InputError, match=r"samples\.jsonl has other contents"):
        stage(tmp_path, every_kind)


def test_a_score_that_was_damaged_while_it_was_written_is_computed_again(tmp_path):
    def judge(prompts, texts):
        asked.extend(texts)
        return [float(len(t)) for t in texts]

    rows, asked = [{"prompt": "a", "text": "b" * i} for i in range(1, 7)], []
    run, partial = S.Run(tmp_path), tmp_path / "scores.partial"
    first = experience._scored(run, rows, [judge], 2)
    good = partial.read_bytes()
    for bit in range(8 * good.index(b"4.0") - 8, 8 * good.index(b"4.0") + 32):
        partial.write_bytes(good)
        flip(partial, bit)
        asked.clear()
        np.testing.assert_array_equal(experience._scored(run, rows, [judge], 2), first)
        assert asked == ["b" * i for i in (4, 5, 6)] and partial.read_bytes() == good
    partial.write_bytes(good[:-4])
    np.testing.assert_array_equal(experience._scored(run, rows, [judge], 2), first)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own that holds two checkpoints and no third; `grow` makes room."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    grow = ["mount", "-o", "remount,size=8m", str(place)]
    yield place, lambda: subprocess.run(grow, check=True)
    subprocess.run(["umount", str(place)], check=True)


def training(run, *, steps=8):
    checkpoint.save(run.path / "state", learn(run.path, steps).params)


def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint(small_disk, whole):
    """One sentence; the step before is whole; with room made, the run ends to the bit as if nothing had happened."""
    disk, grow = small_disk
    (disk / "filler").write_bytes(os.urandom(150_000))
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        stage(disk, training)
    (place,) = disk.glob("training-*")
    steps = checkpoint.saved_steps(place / "steps")
    assert steps and sorted(p.name for p in (place / "steps").iterdir()) == [f"{s:08d}" for s in steps]
    assert checkpoint.load_last(place / "steps", learn_shapes())[0] == steps[-1] < 8
    grow()
    done = stage(disk, training)
    np.testing.assert_array_equal(done.load()["x"], whole[1].params["x"])
    assert (done.path / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()


def learn_shapes():
    return jax.eval_shape(lambda: train.init_state({"x": jnp.zeros(WIDTH)}, TX, jax.random.key(0)))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("where", ["orbax", "manifest"])
def test_a_disk_that_fails_is_said_and_the_old_checkpoint_stays(tmp_path, monkeypatch, where, number):
    checkpoint.save(tmp_path / "c", {"a": jnp.ones(3)})

    def fail(*args, **kw):
        if where == "orbax":  # which gives the number in the text of another error
            raise ValueError(f"RESOURCE_EXHAUSTED: Failed writing: … [os_error_code='{number}']")
        raise OSError(number, os.strerror(number))

    place = (checkpoint.ocp, "save") if where == "orbax" else (os, "fsync")
    with monkeypatch.context() as patch:
        patch.setattr(*place, fail)
        with pytest.raises(InputError, match=rf"cannot be written \({os.strerror(number)}\)"):
            checkpoint.save(tmp_path / "c", {"a": jnp.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and float(checkpoint.load(tmp_path / "c")["a"].sum()) == 3
    checkpoint.save(tmp_path / "c", {"a": jnp.zeros(3)})


@pytest.mark.parametrize("days", [-3650, 3650])
def test_clocks_play_no_part(tmp_path, whole, days):
    """Files from a machine whose clock is ten years off: found, verified, and gone on from."""
    made = stage(tmp_path / "runs", every_kind)
    shutil.copytree(whole[0], tmp_path / "train")
    shutil.rmtree(tmp_path / "train/steps/00000008")
    S.write_text(tmp_path / "runs/.locks" / made.path.name, "")  # the lock of a process that is long gone
    for p in tmp_path.rglob("*"):
        os.utime(p, (time.time() + 86400 * days,) * 2)
    # The older step looks newer.
    os.utime(tmp_path / "train/steps/00000006", (time.time() - 2 * 86400 * abs(days),) * 2)
    session = Session(tmp_path / "runs")
    assert stage(session, every_kind) == made
    assert session.tally.executed == []
    equal(tmp_path / "train", learn(tmp_path / "train"), whole)


HOLDER = """
import os, sys, time
from pathlib import Path
from ctg_jax.run.stage import stage
def held(run, *, seconds=0.0):
    with open(run.path.parent / "starts", "a") as f: f.write(f"{os.getpid()}\\n")
    time.sleep(seconds)
    run.log(ok=1)
print(stage(sys.argv[1], held, {"seconds": float(sys.argv[2])}).id, flush=True)
"""


@pytest.mark.slow
def test_every_holder_of_a_lock_may_die(tmp_path):
    """Eight processes start one stage at once; whoever holds it is killed with -9, seven times; the last runs it."""
    env = {**os.environ, "PYTHONPATH": str(Path(S.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOLDER, str(tmp_path), "2"]
    processes = {p.pid: p for p in (subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(8))}
    starts, killed = tmp_path / "starts", []
    deadline = time.monotonic() + 300
    while len(killed) < 7 and time.monotonic() < deadline:
        begun = [int(x) for x in starts.read_text().split()] if starts.exists() else []
        if len(begun) > len(killed):
            os.kill(begun[-1], signal.SIGKILL)
            processes[begun[-1]].wait()
            killed.append(begun[-1])
        time.sleep(0.01)
    (last,) = set(processes) - set(killed)
    out, _ = processes[last].communicate(timeout=120)
    assert processes[last].returncode == 0 and len(out.split()) == 1
    assert [int(x) for x in starts.read_text().split()] == [*killed, last] and len(killed) == 7
    assert len(list(tmp_path.glob("held-*/DONE"))) == 1
