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

from ctg_jax import tree
from ctg_jax.mesh import processes
from ctg_jax.run import checkpoint
from ctg_jax.types import InputError
from experiments import cli
from experiments import hosts as launch

HERE = Path(__file__).parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(devices=1):
    kept = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")}
    several = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "16"} if devices > 1 else {}
    return {**kept, **several, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}


def start(script, config, root, n=1, *argv, devices=1):
    """Starts a script as n processes, each with so many devices."""
    command = [sys.executable, str(HERE / "experiments" / script), f"--config={config}", f"--root={root}", *argv]
    port, pipe = free_port(), subprocess.PIPE
    each = [[f"--hosts=127.0.0.1:{port},{i}/{n}"] if n > 1 else [] for i in range(n)]
    return [subprocess.Popen(command + e, env=environment(devices), stdout=pipe, stderr=pipe, text=True) for e in each]


def finish(started, timeout=900):
    """(standard output of each) once all have ended well."""
    try:
        said = [p.communicate(timeout=timeout) for p in started]
    finally:
        for p in started:
            p.kill()
    assert [p.returncode for p in started] == [0] * len(started), said
    # Gloo announces its peers on standard output, of several devices in the middle of each other's lines.
    lines = [[x for x in out.splitlines() if not re.search(r"\[Gloo\]|peer ranks", x)] for out, _ in said]
    return ["\n".join(x) for x in lines]


def compare(alone, together):
    """The artifacts of two roots: the same ones; samples token for token, numbers within 1e-5, see `near`."""
    names = sorted(p.parent.name for p in alone.glob("*-*/DONE"))
    assert names and names == sorted(p.parent.name for p in together.glob("*-*/DONE"))
    assert not [p for p in together.glob("*-*") if not (p / "DONE").exists()]
    for name in names:
        a, b = alone / name, together / name
        files = [{p.relative_to(x).as_posix() for p in x.rglob("*") if "arrays/" not in p.as_posix()} for x in (a, b)]
        assert files[0] == files[1], name
        for file in sorted(files[0]):
            if file.endswith(".jsonl"):
                close(*([json.loads(line) for line in (x / file).read_text().splitlines()] for x in (a, b)), name)
            elif file.endswith(".npy"):
                near(*({file: np.load(x / file)} for x in (a, b)), name)
        if (a / "state" / "manifest.json").exists():
            near(*(tree.flatten(checkpoint.load(x / "state")) for x in (a, b)), name)
    return names


def near(left, right, where):
    """Arrays by name, within 1e-5 of the largest number of their artifact, or of 1."""
    assert left.keys() == right.keys(), where
    scale = max(1.0, *(float(np.abs(x).max(initial=0)) for x in map(np.asarray, right.values())))
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=1e-5 * scale, err_msg=f"{where} {name}")


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
    assert processes.count() == 1 and processes.first() and processes.agree(3) == 3
    batch = {"x": np.arange(4)}
    assert processes.rows(batch) is batch and processes.gather(batch) is batch and processes.local(batch) is batch
    with processes.aside(tmp_path) as mine:
        assert mine == tmp_path and processes.real(tmp_path / "a") == tmp_path / "a"
    with pytest.raises(ZeroDivisionError):
        processes.once(lambda: 1 / 0)


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


RUNS = {
    "truncate": [("main.py", "truncate")],
    "quark": [("main.py", "quark")],
    "latents and dglm": [("latents.py", "latents"), ("main.py", "dglm")],  # which share the training of DGLM
}


def ran(runs, root, n=1, *argv, devices=1):
    """What the processes printed, run after run."""
    tiny = [(script, HERE / f"configs/{config}.py:tiny") for script, config in runs]
    found = [finish(start(script, config, root, n, *argv, devices=devices)) for script, config in tiny]
    return ["\n".join(said) for said in zip(*found)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """name -> (root of one process, what it printed); run once for each."""
    made = {}

    def run(name):
        if name not in made:
            root = tmp_path_factory.mktemp("alone")
            made[name] = root, *ran(RUNS[name], root)
        return made[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_processes_give_the_artifacts_of_one(tmp_path, alone, name, n):
    root, said = alone(name)
    outs = ran(RUNS[name], tmp_path, n)
    assert outs[0] == said.replace(str(root), str(tmp_path)) and not "".join(outs[1:]).strip()
    assert all(Path(line).is_file() for line in outs[0].splitlines())
    names = compare(root, tmp_path)
    print(f"{len(names)} artifacts of {n} processes equal those of one")
    logs = sorted(p.name for p in (tmp_path / "logs").iterdir())
    assert logs == [f"host-{i:03d}.log" for i in range(1, n)]
    if name == "truncate":
        assert ran(RUNS[name], tmp_path, n)[0] == outs[0]
        assert "stages: 0 executed" in (tmp_path / "logs/host-001.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "devices", "mesh"), [(1, 4, "fsdp=2,tensor=2"), (1, 4, "data=4"), (2, 2, "fsdp=-1,tensor=2")]
)
@pytest.mark.parametrize("name", RUNS)
def test_a_mesh_gives_the_artifacts_of_one_device(tmp_path, alone, name, n, devices, mesh):
    root, said = alone(name)
    outs = ran(RUNS[name], tmp_path, n, f"--mesh={mesh}", devices=devices)
    assert outs[0] == said.replace(str(root), str(tmp_path))
    print(f"{len(compare(root, tmp_path))} artifacts under --mesh={mesh}, {n} x {devices}, equal those of one device")
