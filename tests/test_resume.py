"""kill -9 at a random moment, then run again: the same parameters and metrics, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ctg_jax.run import checkpoint

STEPS = 24
SCRIPT = """
import os, sys, time
os.environ["NPROC"] = "16"
import jax
import numpy as np
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from ctg_jax.learn import losses, train
from ctg_jax.learn.optimizer import optimizer, schedule
from ctg_jax.run import checkpoint
from ctg_jax.models.decoder import Transformer

class Batches:
    at = 0
    def __next__(self):
        time.sleep(float(sys.argv[2]))
        r = np.random.default_rng(self.at)
        ids = np.arange(4 * self.at, 4 * self.at + 4, dtype=np.int32)
        mask = np.arange(8)[None, :] < r.integers(2, 9, 4)[:, None]
        self.at += 1
        return {"tokens": r.integers(0, 16, (4, 8), np.int32), "mask": mask, "ids": ids}
    def get_state(self):
        return {"next": self.at}
    def set_state(self, state):
        self.at = state["next"]

lm = Transformer.gpt2(vocab=16, width=8, depth=1, heads=2, context=8)
tx = optimizer(schedule(1e-2, "cosine", warmup=2, steps=STEPS), decay=0.1)
state = train.init_state(jax.jit(lm.init)(jax.random.key(0)), tx, jax.random.key(1), ema=True)
step = train.make_step(losses.lm_loss(lm), tx)
end = train.loop(sys.argv[1], state, step, Batches(), steps=STEPS, save_every=2, log_every=1, progress=False)
checkpoint.save(sys.argv[1] + "/state", end)
"""


def start(path, pause):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    given = [str(path), str(pause), str(path.parent / "cache")]
    command = [sys.executable, "-c", f"STEPS = {STEPS}\n{SCRIPT}", *given]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(path):
    process = start(path, 0)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with an uninterrupted run in it."""
    path = tmp_path_factory.mktemp("runs")
    finish(path / "whole")
    return path


def killed_and_rerun(runs, seed):
    """Kills a run at a random moment: some milliseconds after a random step was saved."""
    path, whole, random_ = runs / f"run{seed}", runs / "whole", random.Random(seed)
    after, wait = random_.randrange(0, STEPS - 4), random_.uniform(0, 0.15)
    process = start(path, 0.03)
    while process.poll() is None and max(checkpoint.saved_steps(path / "steps"), default=0) < after:
        time.sleep(0.002)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    steps = checkpoint.saved_steps(path / "steps")
    print(f"killed with checkpoints {steps} and {len(list((path / 'steps').glob('.*')))} half-written")
    finish(path)
    assert (path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    a, b = checkpoint.load(path / "state"), checkpoint.load(whole / "state")
    flat_a, flat_b = ({p: x for p, x in _flat(t)} for t in (a, b))
    assert flat_a.keys() == flat_b.keys()
    for name in flat_a:
        np.testing.assert_array_equal(flat_a[name], flat_b[name], err_msg=name)
    assert len((path / "metrics.jsonl").read_text().splitlines()) == STEPS


def _flat(tree):
    import jax

    from ctg_jax.tree import flatten

    for name, x in flatten(tree).items():
        key = isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
        yield name, np.asarray(jax.random.key_data(x) if key else x)


def test_killed_and_rerun_equals_uninterrupted(runs):
    killed_and_rerun(runs, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_killed_ten_times_over(runs, seed):
    killed_and_rerun(runs, seed)
