"""The cells of a grid: what each needs and what is there of it, and three engines that run them: this process,
processes of this machine, and SLURM (through submitit). A cell is finished when its stages are; nothing else is
recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ctg_jax.run.session import Session
from ctg_jax.run.stage import UnfinishedError
from ctg_jax.types import InputError, optional
from experiments import experiment

log = logging.getLogger("ctg_jax.grid")
ABLATE = Path(__file__).with_name("ablate.py")
_PORTABLE = ("mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "timeout_min")  # names of submitit
_POLL = 0.2  # seconds between looks at processes


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of settings: its number, counted from 1, what it changes, and the whole configuration."""

    number: int
    changes: dict[str, Any]
    config: ConfigDict

    def __str__(self):
        return f"cell {self.number} ({', '.join(f'{k}={v!r}' for k, v in self.changes.items()) or 'as configured'})"


@dataclasses.dataclass(frozen=True)
class Look:
    """What is there of a cell.

    rows: the cells of its experiment, once all of its stages have run; None before.
    missing, there: directory names of its stages. more: what follows the missing ones depends on what is in them.
    error: why it cannot run, or cannot be read.
    """

    rows: list[experiment.Cell] | None
    missing: list[str]
    there: list[str]
    more: bool = False
    error: str = ""


def look(root: str, cell: Cell) -> Look:
    """What is there of a cell; nothing runs."""
    plan = Session.of(root).planning()
    rows, more, error = None, False, ""
    try:
        rows = experiment.run(plan, cell.config)
    except UnfinishedError:
        more = True
    except InputError as e:
        error = " ".join(str(e).split())
    return Look(None if plan.planned else rows, list(plan.planned), plan.tally.reused, more, error)


def overview(root: str, cells: Sequence[Cell]) -> str:
    """What running the cells would do, a line for each and a sum."""
    lines, missing, there, todo = [], set(), set(), 0
    for cell in cells:
        found = look(root, cell)
        missing, there = missing | set(found.missing), there | set(found.there)
        if found.rows is not None:
            lines.append(f"there   {cell}")
            continue
        todo += 1
        kinds = [name.rpartition("-")[0] for name in found.missing]
        counts = ", ".join(f"{k} × {kinds.count(k)}" if kinds.count(k) > 1 else k for k in dict.fromkeys(kinds))
        how = f"cannot run: {found.error}" if found.error else counts + (" and what follows" if found.more else "")
        lines.append(f"to run  {cell}: {how}")
    total = f"{len(cells) - todo} of {len(cells)} cells are there; {len(missing)} stages to run, {len(there)} there"
    return "\n".join([*lines, total])


def here(root: str, cells: Sequence[Cell]) -> dict[int, str]:
    """Runs cells in this process, one after another; number -> error of those that failed."""
    failed = {}
    with _progress(root, cells) as show:
        for done, cell in enumerate(cells):
            show(done, f"{cell.number}", failed)
            try:
                experiment.run(root, cell.config)
            except InputError as e:
                failed[cell.number] = " ".join(str(e).split())
            except Exception as e:  # a cell that breaks must not stop the others
                log.exception("%s", cell)
                failed[cell.number] = f"{type(e).__name__}: {e}"
        show(len(cells), "", failed)
    return failed


def processes(root: str, cells: Sequence[Cell], argv: Sequence[str], folder: Path, workers: int) -> dict[int, str]:
    """Runs each cell in a process of its own, so many at once; number -> error of those that failed."""
    waiting, running, failed, done = list(cells), {}, {}, 0
    with _progress(root, cells) as show:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    cell = waiting.pop(0)
                    with open(_log_of(folder, cell.number), "a", encoding="utf-8") as f:
                        job = command(argv, root, cell.number)
                        running[cell.number] = subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=f)
                for number, process in list(running.items()):
                    if process.poll() is not None:
                        del running[number]
                        done += 1
                        if process.returncode:
                            failed[number] = _reason(folder, number, process.returncode)
                            log.info("cell %d failed: %s", number, failed[number])
                show(done, ", ".join(f"{n}: {_now(folder, n)}" for n in running), failed)
                time.sleep(_POLL)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                process.kill()
    return failed


@dataclasses.dataclass(frozen=True)
class Job:
    """What a task of the cluster runs: one cell. Preempted, or out of time, it is queued again and its stages go on."""

    argv: tuple[str, ...]
    root: str
    folder: str

    def __call__(self, number: int) -> int:
        with open(_log_of(Path(self.folder), number), "a", encoding="utf-8") as f:
            return subprocess.call(command(self.argv, self.root, number), stdout=subprocess.DEVNULL, stderr=f)

    def checkpoint(self, number: int) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, number)


def slurm(
    root: str, cells: Sequence[Cell], argv: Sequence[str], folder: Path, workers: int, options: dict[str, Any]
) -> dict[int, str]:
    """Runs cells as an array of SLURM, `workers` tasks at once (0: as many as the cluster gives); number -> error.

    options: of submitit's executor, such as timeout_min and cpus_per_task, or of sbatch, such as partition.

    Raises:
      InputError: submitit is not installed, sbatch is not there, or an unknown option.
    """
    submitit = optional("submitit", "slurm")
    root, folder = str(root), folder.absolute()
    try:
        executor = submitit.AutoExecutor(folder / "slurm" / "%A", cluster="slurm", slurm_max_num_timeout=1000)
        named = {k if k in _PORTABLE else f"slurm_{k}": v for k, v in options.items()}
        executor.update_parameters(
            name=folder.name,
            slurm_array_parallelism=workers or len(cells),
            slurm_additional_parameters={"requeue": True},
            slurm_setup=[f"export PYTHONPATH={ABLATE.parents[1]}${{PYTHONPATH:+:$PYTHONPATH}}"],
            **named,
        )
        jobs = executor.map_array(Job(tuple(argv), root, str(folder)), [cell.number for cell in cells])
    except (RuntimeError, ValueError, TypeError, NameError, submitit.core.utils.FailedJobError) as e:
        raise InputError(f"--slurm: {' '.join(str(e).split())}") from None
    log.info("submitted %d cells as job %s", len(cells), jobs[0].job_id.partition("_")[0])
    left, gone, failed = {cell.number: job for cell, job in zip(cells, jobs)}, set(), {}
    with _progress(root, cells) as show:
        while left:
            queued = _queued()
            for number, job in list(left.items()):
                over = job.paths.result_pickle.exists()
                if over or (job.job_id not in queued and number in gone):
                    del left[number]
                    if look(root, cells[[c.number for c in cells].index(number)]).rows is None:
                        failed[number] = _reason(folder, number, None if over else -9)
                        log.info("cell %d failed: %s", number, failed[number])
                elif job.job_id not in queued:
                    gone.add(number)  # its result may be on its way over the network
            running = [n for n in left if _log_of(folder, n).exists()]
            show(len(cells) - len(left), ", ".join(f"{n}: {_now(folder, n)}" for n in running), failed)
            time.sleep(1.0)
    return failed


def one(argv: Sequence[str], root: str, number: int) -> list[str]:
    """The command line of a job that runs one cell and writes no report."""
    told = ("--config", "--noconfig", "--mesh", "--plan", "--precision", "--remat", "--noremat")
    kept = [a for a in argv if a.startswith(told)]
    return [*kept, f"--root={root}", f"--only={number}", "--noreport"]


def command(argv: Sequence[str], root: str, number: int) -> list[str]:
    """What a process is started with that runs one cell."""
    return [sys.executable, str(ABLATE), *one(argv, root, number)]


def _queued() -> set[str]:
    """Ids of the tasks that wait or run, as submitit writes them; needs no accounting, which not all clusters have."""
    command = ["squeue", "--noheader", "--me", "--array", "--format=%i"]
    for _ in range(5):  # the controller may be restarting
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return set(done.stdout.split())
        time.sleep(2)
    raise InputError(f"squeue failed: {' '.join(done.stderr.split())}; the jobs go on, run the same command again")


def _log_of(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{number:03d}.log"


def _lines(folder: Path, number: int) -> list[str]:
    file = _log_of(folder, number)
    text = file.read_text("utf-8", errors="replace") if file.exists() else ""
    return [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]


def _now(folder: Path, number: int) -> str:
    """The stage that a cell is at."""
    ran = [line.split()[1] for line in _lines(folder, number) if line.startswith("running ")]
    return ran[-1].rpartition("-")[0] if ran else "starting"


def _reason(folder: Path, number: int, code: int | None) -> str:
    """Why a cell failed: the last line it left."""
    said = [line for line in _lines(folder, number) if not line.startswith(("stages:", "running "))]
    if code is not None and code < 0:
        return f"killed (signal {-code}); see {_log_of(folder, number)}"
    return said[-1] if said else f"see {_log_of(folder, number)}"


@contextlib.contextmanager
def _progress(root: str, cells: Sequence[Cell]) -> Iterator[Callable[[int, str, dict], None]]:
    """A bar over the stages that are known to be missing, with the cells that are done, at work and failed."""
    from tqdm import tqdm

    names = {name for cell in cells for name in look(root, cell).missing}
    with tqdm(total=len(names), unit="stage", desc=f"{len(cells)} cells", disable=None) as bar:

        def show(done: int, now: str, failed: dict) -> None:
            finished = sum((Path(root) / name / "DONE").exists() for name in names)
            bar.set_postfix_str(f"{done} done, {len(failed)} failed; {now}", refresh=False)
            bar.update(finished - bar.n)

        yield show
