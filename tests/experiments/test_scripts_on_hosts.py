"""Several processes as one run, over loopback: the artifacts of one process, written once."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ctg_jax import checkpoint, hosts, tree
from ctg_jax.types import InputError
from experiments import cli
from experiments import hosts as launch

HERE = Path(__file__).parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment():
    kept = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")}
    return {**kept, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}


def start(script, config, root, n=1, *argv):
    """Starts a script as n processes."""
    command = [sys.executable, str(HERE / "experiments" / script), f"--config={config}", f"--root={root}", *argv]
    port, pipe = free_port(), subprocess.PIPE
    each = [[f"--hosts=127.0.0.1:{port},{i}/{n}"] if n > 1 else [] for i in range(n)]
    return [subprocess.Popen(command + e, env=environment(), stdout=pipe, stderr=pipe, text=True) for e in each]


def finish(processes, timeout=900):
    """(standard output of each) once all have ended well."""
    try:
        said = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * len(processes), said
    return [out.strip() for out, _ in said]


def compare(alone, together):
    """The artifacts of two roots: the same ones; samples token for token, numbers within 1e-5."""
    names = sorted(p.parent.name for p in alone.glob("*-*/DONE"))
    assert names and names == sorted(p.parent.name for p in together.glob("*-*/DONE"))
    assert not [p for p in together.glob("*-*") if not (p / "DONE").exists()]
    for name in names:
        a, b = alone / name, together / name
        files = [{p.relative_to(x).as_posix() for p in x.rglob("*") if "arrays/" not in p.as_posix()} for x in (a, b)]
        assert files[0] == files[1], name
        for file in ("samples.jsonl", "metrics.jsonl", "scores.jsonl", "data.jsonl"):
            if (a / file).exists():
                close(*([json.loads(line) for line in (x / file).read_text().splitlines()] for x in (a, b)), name)
        if (a / "state" / "manifest.json").exists():
            left, right = (tree.flatten(checkpoint.load(x / "state")) for x in (a, b))
            assert left.keys() == right.keys()
            for path in left:
                np.testing.assert_allclose(left[path], right[path], rtol=1e-5, atol=1e-5, err_msg=f"{name} {path}")
    return names


def close(a, b, where):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "seconds" and not ("second" in str(a.get("name")) and key != "name"):
                close(a[key], b[key], f"{where} {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for x, y in zip(a, b):
            close(x, y, where)
    elif isinstance(a, float):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=where)
    else:
        assert a == b, where


def test_one_process_is_nothing_special(tmp_path):
    assert hosts.count() == 1 and hosts.first() and hosts.agree(3) == 3
    batch = {"x": np.arange(4)}
    assert hosts.rows(batch) is batch and hosts.gather(batch) is batch and hosts.local(batch) is batch
    with hosts.aside(tmp_path) as mine:
        assert mine == tmp_path and hosts.real(tmp_path / "a") == tmp_path / "a"
    with pytest.raises(ZeroDivisionError):
        hosts.once(lambda: 1 / 0)


@pytest.mark.parametrize("text", ["127.0.0.1", "127.0.0.1:1,2", "127.0.0.1:1,2/2", "here,0/2", ""])
def test_addresses_that_cannot_be_read(text):
    with pytest.raises(InputError, match="expected auto, or ADDRESS:PORT,INDEX/N"):
        launch.start([f"--hosts={text}"])


def test_auto_without_a_cluster_is_said_in_a_sentence(tmp_path):
    """In a process of its own, where nothing has run on a device yet."""
    process = start("main.py", HERE / "configs/truncate.py:tiny", tmp_path, 1, "--hosts=auto")[0]
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and re.match(r"--hosts=auto: \w.*\n$", err), err


def test_every_script_has_the_flag():
    assert "--hosts" in {f"--{name}" for name in cli.parse([], lambda fv: cli.config_flag(fv, []), "")[0]}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "n"), [("truncate", 2), ("quark", 2), ("quark", 4)])
def test_processes_give_the_artifacts_of_one(tmp_path, config, n):
    config = HERE / f"configs/{config}.py:tiny"
    (page,) = finish(start("main.py", config, tmp_path / "alone"))
    outs = finish(start("main.py", config, tmp_path / "together", n))
    assert outs[0].endswith("report.html") and outs[1:] == [""] * (n - 1)
    names = compare(tmp_path / "alone", tmp_path / "together")
    print(f"{len(names)} artifacts of {n} processes equal those of one")
    logs = sorted(p.name for p in (tmp_path / "together/logs").iterdir())
    assert logs == [f"host-{i:03d}.log" for i in range(1, n)]
    again = finish(start("main.py", config, tmp_path / "together", n))
    assert again[0] == outs[0] and Path(page).is_file()
    assert "stages: 0 executed" in (tmp_path / "together/logs/host-001.log").read_text()
