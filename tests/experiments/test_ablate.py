"""Grids: what will run is said before, cells that fail stop no others, engines give one report."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ctg_jax.run.session import Session
from ctg_jax.run.stage import stage
from ctg_jax.types import InputError
from experiments import ablate, cli, grid

HERE = Path(__file__).parents[2]
STEER = HERE / "configs/steer.py"
# A grid of four cells: the cheapest world there is, and a setting of its prompts that one of them gets wrong.
GRID = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from configs import sentiment
def get_config(arg="tiny"):
    parts = sentiment.world("tiny")
    del parts["train"]
    methods = dict(top_p=dict(filter=dict(top_p=0.9)))
    return sentiment.ConfigDict({{"title": "Grid", **parts, "methods": methods}})
def sweep():
    for p in (0.3, 0.6, 1.5, 0.9):
        yield {{"methods.top_p.filter.top_p": p}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "grid.py"
    file.write_text(GRID)
    return file


@pytest.fixture
def call(root, config, capsys):
    def run(*argv):
        code = cli.run(ablate.main, [f"--config={config}", f"--root={root}", *argv])
        out, err = capsys.readouterr()
        return code, out.strip(), err

    return run


def table(page):
    """The lines of a report, without its clock."""
    lines = json.loads(Path(page).with_suffix(".json").read_text())["lines"]
    for line in lines:
        del line["figures"]["tokens_per_second"]
    return lines


def logs(root):
    """The folder of the logs of the one grid of a root; one that is not there before it has begun."""
    return next((root / "grids").glob("grid-*"), root / "grids" / "none")


def about(page):
    return json.loads(Path(page).with_suffix(".json").read_text())["about"]


def test_a_dry_run_says_what_will_run_and_runs_nothing(call, root):
    code, out, _ = call("--dry-run")
    assert code == 0 and list(root.iterdir()) == []
    lines = out.splitlines()
    assert lines[0].startswith("to run  cell 1 (methods.top_p.filter.top_p=0.3): load_data")
    assert re.fullmatch(r"0 of 4 cells are there; \d+ stages to run, 0 there", lines[-1])


def test_a_cell_that_fails_is_listed_and_stops_no_other(call, root):
    code, page, err = call("--workers=0")
    assert code == 1 and "cell 3 (methods.top_p.filter.top_p=1.5) failed: " in err and "1.5" in err
    assert [line["filter.top_p"] for line in table(page)] == [0.3, 0.6, 0.9]
    assert about(page)["cells that are not finished"] == "cell 3 (methods.top_p.filter.top_p=1.5)"
    code, out, _ = call("--dry-run")
    assert [line.split()[0] for line in out.splitlines()] == ["there", "there", "to", "there", "3"]
    assert "2 stages to run" in out
    # Every engine leaves alone what is there.
    code, again, err = call("--workers=2", "--cell=1/2", "--noreport")
    assert code == 2 and "cell 3" in err and "cell 1" not in err
    code, again, err = call("--only=3")
    assert code == 1 and table(again) == table(page)


def test_nothing_finished_is_bad_input(tmp_path, config, capsys):
    assert cli.run(ablate.main, [f"--config={config}", f"--root={tmp_path / 'new'}", "--only=9"]) == 2
    assert "the sweep has 4" in capsys.readouterr().err
    assert cli.run(ablate.main, [f"--config={config}", f"--root={tmp_path / 'new'}", "--slurm=partition"]) == 2
    assert "expected KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((HERE / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_sweep_can_run(file, tmp_path):
    """A setting that a method lacks is found before anything runs."""
    module = cli.module_of(str(file)) if "def sweep" in file.read_text() else None
    if module is None:
        pytest.skip("it has no sweep")
    config = cli.config_of(f"{file}:tiny")
    for i, changes in enumerate(module.sweep(), 1):
        found = grid.look(str(tmp_path), grid.Cell(i, changes, cli.override(config, changes)))
        assert not found.error and found.missing and found.rows is None, (changes, found.error)
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_a_fit_lacks_is_refused(tmp_path):
    config = cli.override(cli.config_of(f"{STEER}:tiny"), {"methods.steer.fit.sties": "all"})
    found = grid.look(str(tmp_path), grid.Cell(1, {}, config))
    assert "did you mean 'sites'?" in found.error
    with pytest.raises(InputError, match="did you mean 'strengths'"):
        cli.override(config, {"methods.steer.strengts": ()})


def test_a_plan_names_what_would_run_and_reads_nothing_of_it(tmp_path):
    def first(run, *, x=1):
        run.log(x=x)

    def second(run, *, left):
        run.log(x=left.metrics()[0]["x"])

    plan = Session(tmp_path).dry_run()
    a = stage(plan, first)
    b = stage(plan, second, left=a)
    assert list(plan.pending) == [a.path.name, b.path.name] and b.spec["inputs"] == {"left": a.id}
    for read in (a.metrics, a.load, lambda: a.spec["method"], lambda: a.rows("samples.jsonl")):
        with pytest.raises(InputError, match="has not run"):
            read()
    assert list(tmp_path.iterdir()) == []
    real = stage(tmp_path, second, left=stage(tmp_path, first))
    assert real == b and real.metrics() == [{"x": 1}]
    plan = Session(tmp_path).dry_run()
    assert stage(plan, second, left=stage(plan, first)).metrics() == [{"x": 1}] and not plan.pending


def test_children_are_told_the_same_settings():
    argv = ["--config=a.py:tiny", "--root", "x", "--config.sample.n=2", "--workers=3", "--slurm=partition=gpu"]
    assert ablate.command(argv, "/x", 4) == [
        sys.executable,
        str(HERE / "experiments/ablate.py"),
        "--config=a.py:tiny",
        "--config.sample.n=2",
        "--root=/x",
        "--only=4",
        "--noreport",
    ]
    assert ablate.options_of("partition=gpu,timeout_min=60") == {"partition": "gpu", "timeout_min": 60}


def environment():
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}


def stages(folder):
    """How often each stage was begun, by the logs of the cells."""
    words = [line.split() for log in folder.glob("*.log") for line in log.read_text().splitlines()]
    return Counter(w[1] for w in words if len(w) == 2 and w[0] == "running")


def last_line(process):
    return process.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The table of a run in one process."""
    root = tmp_path_factory.mktemp("alone")
    command = [sys.executable, str(HERE / "experiments/ablate.py"), f"--config={config}", f"--root={root}"]
    return table(last_line(subprocess.run(command, env=environment(), capture_output=True, text=True)))


@pytest.mark.slow
def test_processes_share_stages_and_a_killed_cell_stops_no_other(config, alone, tmp_path):
    """Two cells start together from nothing; one is killed with -9; the second call runs what is missing."""
    command = [sys.executable, str(HERE / "experiments/ablate.py"), f"--config={config}", f"--root={tmp_path}"]
    process = subprocess.Popen([*command, "--workers=2"], env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not ((log := logs(tmp_path) / "001.log").exists() and "running sample" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ps = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "--", "--only=1 "], capture_output=True, text=True)
    for pid in ps.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1 and "killed (signal 9)" in err and "cell 3" in err, err
    again = subprocess.run([*command, "--workers=2"], env=environment(), capture_output=True, text=True)
    assert again.returncode == 1, again.stderr
    begun = stages(logs(tmp_path))
    twice = {name for name, n in begun.items() if n > 1}
    assert all(name.startswith("sample") for name in twice) and len(twice) <= 2, begun
    assert table(last_line(again)) == alone


# So many samples that a cell can be caught in the middle of them.
SIX = GRID.replace("(0.3, 0.6, 1.5, 0.9)", "(0.3, 0.4, 0.5, 0.6, 0.7, 0.9)").replace(
    'del parts["train"]', 'del parts["train"]; parts["sample"].update(n=1000, batch=1)'
)


@pytest.fixture
def cluster(tmp_path):
    """SLURM on this machine: a controller and a node of two processors, on loopback."""
    pytest.importorskip("submitit")
    script = HERE / "tests/experiments/slurm.sh"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name)]
    if os.geteuid() != 0 or (missing and not shutil.which("apt-get")):
        pytest.skip(f"SLURM is started by root, with Debian's slurm-wlm; missing here: {missing}")
    folder = tmp_path / "slurm"
    done = subprocess.run([script, "start", folder], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode and missing:
        pytest.skip(f"slurm-wlm could not be installed: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    yield {**environment(), "SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([script, "stop", folder], check=True)


@pytest.mark.slow
def test_slurm_runs_a_grid_with_a_requeue_in_the_middle(cluster, tmp_path):
    """Six cells, two at a time; one is requeued while it runs; the report equals that of one process."""
    config = tmp_path / "grid.py"
    config.write_text(SIX)

    def command(root):
        return [sys.executable, str(HERE / "experiments/ablate.py"), f"--config={config}", f"--root={tmp_path / root}"]

    options = "--slurm=partition=test,timeout_min=30,cpus_per_task=1"
    process = subprocess.Popen(
        [*command("cluster"), "--workers=2", options],
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    most, requeued, deadline = 0, False, time.monotonic() + 900
    while process.poll() is None and time.monotonic() < deadline:
        listed = ["squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i"]
        running = subprocess.run(listed, env=cluster, capture_output=True, text=True).stdout.split()
        most = max(most, len(running))
        log = logs(tmp_path / "cluster") / "003.log"
        if not requeued and log.exists() and "running sample" in log.read_text():
            (task,) = [name for name in running if name.endswith("_2")]
            requeued = subprocess.run(["scontrol", "requeue", task], env=cluster).returncode == 0
        time.sleep(0.2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert requeued and most == 2
    alone = subprocess.run([*command("alone")], env=environment(), capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    lines = table(out.strip().splitlines()[-1])
    assert len(lines) == 6 and lines == table(last_line(alone))
    begun = stages(logs(tmp_path / "cluster"))
    assert max(begun.values()) == 2
    assert [name for name, n in begun.items() if n > 1 and not name.startswith(("sample", "evaluate"))] == []
