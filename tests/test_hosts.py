"""Two processes as one over loopback: training, decoding, checkpoints and stages give what one process gives."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ctg_jax import tree
from ctg_jax.run import checkpoint, stage

HERE = Path(__file__).parents[1]
SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import jax, numpy as np, jax.numpy as jnp
root, index, count, port, stop = sys.argv[1], *map(int, sys.argv[2:])
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
from ctg_jax import Sampling
from ctg_jax.decode import loop
from ctg_jax.learn import losses, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.mesh import processes
from ctg_jax.run import checkpoint
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import stage, write_jsonl
from ctg_jax.types import InputError, Prompts

LM = Transformer.gpt2(vocab=24, width=8, depth=1, heads=2, context=16)

class Batches:
    at = 0
    def __next__(self):
        r = np.random.default_rng(self.at)
        if self.at == stop:
            raise KeyboardInterrupt
        self.at += 1
        ids = np.arange(4 * self.at, 4 * self.at + 4, dtype=np.int32)
        return {"tokens": r.integers(0, 24, (4, 8), np.int32), "mask": np.ones((4, 8), bool), "ids": ids}
    def get_state(self): return {"next": self.at}
    def set_state(self, state): self.at = state["next"]

def learn(run, *, steps=6):
    tx = optimizer(1e-2)
    state = train.init_state(LM.init(jax.random.key(0)), tx, jax.random.key(1))
    step = train.make_step(losses.lm_loss(LM), tx)
    state = train.loop(run.path, state, step, Batches(), steps=steps, save_every=2, progress=False)
    run.log(norm=float(jnp.sum(state.params["embed"]["tokens"] ** 2)))
    checkpoint.save(run.path / "state", state.params)

def write(run, *, lm):
    params = LM.unstack(lm.load(jax.eval_shape(LM.init, jax.random.key(0))))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 24, (6, 4)), jnp.int32)
    prompts = Prompts(tokens, jnp.ones((6, 4), bool), jax.random.split(jax.random.key(3), 6))
    out = loop.generate(LM, params, prompts, sampling=Sampling(max_new=5))
    again = loop.score(LM, params, prompts, out.tokens)
    odd = loop.generate(LM, params, jax.tree.map(lambda x: x[:3], prompts), sampling=Sampling(max_new=5))
    assert odd.tokens.tolist() == out.tokens[:3].tolist()
    rows = zip(out.tokens.tolist(), out.logp.tolist(), again.tolist())
    write_jsonl(run.path / "samples.jsonl", [{"tokens": t, "logp": p, "again": q} for t, p, q in rows])
    (run.path / "who").write_text(str(jax.process_index()))

def bad(run):
    raise InputError("no such thing")

fitted = stage(root, learn)
stage(root, write, lm=fitted)
try:
    stage(root, bad)
except InputError as e:
    print(processes.count(), jax.device_count(), e, flush=True)
"""


def run(root, n, stop=-1):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")}
    env = {**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE)}
    pipe = subprocess.PIPE
    commands = [[sys.executable, "-c", SCRIPT, str(root), str(i), str(n), str(port), str(stop)] for i in range(n)]
    processes = [subprocess.Popen(c, env=env, stdout=pipe, stderr=pipe, text=True) for c in commands]
    try:
        said = [p.communicate(timeout=600) for p in processes]
    finally:
        for p in processes:
            p.kill()
    # Gloo announces its peers on standard output.
    lines = ["\n".join(x for x in out.splitlines() if not x.startswith("[Gloo]")) for out, _ in said]
    return [p.returncode for p in processes], lines, [err for _, err in said]


def artifact(root, name):
    (path,) = Path(root).glob(f"{name}-*")
    return stage.open_artifact(path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    codes, said, err = run(root, 1)
    assert codes == [0] and said == ["1 1 no such thing"], err
    return root


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_processes_give_what_one_gives(tmp_path, alone, n):
    """Three do not divide a batch of four, which is said by all of them."""
    codes, said, err = run(tmp_path, n)
    if n == 3:
        assert all(codes) and all("a batch of 4 rows cannot be divided over 3 processes" in e for e in err), err
        return
    assert codes == [0] * n and said == [f"{n} {n} no such thing"] * n, err
    same(tmp_path, alone)


def same(root, alone):
    a, b = (tree.flatten(checkpoint.load(artifact(r, "learn").path / "state")) for r in (root, alone))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5, err_msg=name)
    left, right = (artifact(r, "learn").metrics() for r in (root, alone))
    assert [r.get("step") for r in left] == [r.get("step") for r in right]
    for x, y in zip(left, right):
        np.testing.assert_allclose(list(x.values()), list(y.values()), rtol=1e-5, atol=1e-5)
    left, right = (artifact(r, "write").rows("samples.jsonl") for r in (root, alone))
    assert [r["tokens"] for r in left] == [r["tokens"] for r in right]
    np.testing.assert_allclose([r["logp"] for r in left], [r["logp"] for r in right], atol=1e-5)
    np.testing.assert_allclose([r["again"] for r in left], [r["logp"] for r in left], atol=1e-5)
    assert (artifact(root, "write").path / "who").read_text() == "0" and not list(root.glob("bad-*"))


@pytest.mark.slow
def test_processes_that_stopped_go_on_together_and_alone(tmp_path, alone):
    """Stopped after five steps of six: two go on from step four; what two began one may end, and the other way."""
    for root, first, then in ((tmp_path / "a", 2, 2), (tmp_path / "b", 2, 1), (tmp_path / "c", 1, 2)):
        codes, _, err = run(root, first, 5)
        assert all(codes), err
        (place,) = root.glob("learn-*")
        assert checkpoint.saved_steps(place / "steps") == [2, 4] and not (place / "DONE").exists()
        codes, _, err = run(root, then)
        assert not any(codes), err
        same(root, alone)
