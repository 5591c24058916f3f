"""The cells of a grid: which stages each needs and which of them are finished, and three engines that run cells: this
process, processes of this machine, and SLURM (through submitit). A cell is finished when its stages are; nothing else
is recorded. The engines that start processes are given the command line of each cell."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ctg_jax.run.session import Session
from ctg_jax.run.stage import UnfinishedError
from ctg_jax.types import InputError, optional
from experiments import experiment

log = logging.getLogger("ctg_jax.grid")
HERE = Path(__file__).parents[1]  # what the tasks of a cluster import
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
    """The state of a cell.

    Attributes:
      rows: the results of its experiment, once all of its stages have run; None before.
      missing, there: directory names of the stages that have to run and of the finished ones.
      more: whether later stages depend on the contents of the missing ones, so that their names are not known yet.
      error: why it cannot run or cannot be read; empty where it can.
    """

    rows: list[experiment.Result] | None
    missing: list[str]
    there: list[str]
    more: bool = False
    error: str = ""


def look(root: str, cell: Cell) -> Look:
    """The state of a cell; no stage runs."""
    trial = Session.of(root).dry_run()
    rows, more, error = None, False, ""
    try:
        rows = experiment.run(trial, cell.config)
    except UnfinishedError:
        more = True
    except InputError as e:
        error = " ".join(str(e).split())
    return Look(None if trial.pending else rows, list(trial.pending), trial.tally.reused, more, error)


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


Commands = Mapping[int, Sequence[str]]  # number of a cell -> the command line that runs it alone


def processes(root: str, cells: Sequence[Cell], commands: Commands, folder: Path, workers: int) -> dict[int, str]:
    """Runs each cell in a process of its own, `workers` at once; number -> error of those that failed. Logs are written
    to `folder`."""
    waiting, running, failed, done = list(cells), {}, {}, 0
    with _progress(root, cells) as show:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    cell = waiting.pop(0)
                    with open(_log_of(folder, cell.number), "a", encoding="utf-8") as f:
                        job = subprocess.Popen(commands[cell.number], stdout=subprocess.DEVNULL, stderr=f)
                        running[cell.number] = job
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
    """What a task of the cluster runs: one cell. A task that is preempted or out of time is queued again, and its
    stages continue where they stopped."""

    commands: Commands
    folder: str

    def __call__(self, number: int) -> int:
        with open(_log_of(Path(self.folder), number), "a", encoding="utf-8") as f:
            return subprocess.call(self.commands[number], stdout=subprocess.DEVNULL, stderr=f)

    def checkpoint(self, number: int) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, number)


def slurm(
    root: str, cells: Sequence[Cell], commands: Commands, folder: Path, workers: int, options: dict[str, Any]
) -> dict[int, str]:
    """Runs cells as an array of SLURM; number -> error of those that failed.

    Args:
      commands: the command line of each cell. folder: of the logs.
      workers: tasks at once; 0: as many as the cluster allows.
      options: of submitit's executor, such as timeout_min and cpus_per_task, or of sbatch, such as partition.

    Raises:
      InputError: submitit is not installed, sbatch is not there, or an unknown option.
    """
    submitit = optional("submitit", "slurm")
    folder = folder.absolute()
    try:
        executor = submitit.AutoExecutor(folder / "slurm" / "%A", cluster="slurm", slurm_max_num_timeout=1000)
        named = {k if k in _PORTABLE else f"slurm_{k}": v for k, v in options.items()}
        executor.update_parameters(
            name=folder.name,
            slurm_array_parallelism=workers or len(cells),
            slurm_additional_parameters={"requeue": True},
            slurm_setup=[f"export PYTHONPATH={HERE}${{PYTHONPATH:+:$PYTHONPATH}}"],
            **named,
        )
        jobs = executor.map_array(Job(dict(commands), str(folder)), [cell.number for cell in cells])
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


def _queued() -> set[str]:
    """Ids of the tasks that wait or run, as submitit writes them. `squeue` needs no accounting, which some clusters
    lack."""
    command = ["squeue", "--noheader", "--me", "--array", "--format=%i"]
    for _ in range(5):  # the controller may be restarting
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return set(done.stdout.split())
        time.sleep(2)
    why = " ".join(done.stderr.split())
    raise InputError(f"squeue failed: {why}; the jobs keep running, run the same command again")


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
    lines = [line for line in _lines(folder, number) if not line.startswith(("stages:", "running "))]
    if code is not None and code < 0:
        return f"killed (signal {-code}); see {_log_of(folder, number)}"
    return lines[-1] if lines else f"see {_log_of(folder, number)}"


@contextlib.contextmanager
def _progress(root: str, cells: Sequence[Cell]) -> Iterator[Callable[[int, str, dict], None]]:
    """A progress bar over the stages that are known to be missing, with the cells that are done, running and failed."""
    from tqdm import tqdm

    names = {name for cell in cells for name in look(root, cell).missing}
    with tqdm(total=len(names), unit="stage", desc=f"{len(cells)} cells", disable=None) as bar:

        def show(done: int, now: str, failed: dict) -> None:
            finished = sum((Path(root) / name / "DONE").exists() for name in names)
            bar.set_postfix_str(f"{done} done, {len(failed)} failed; {now}", refresh=False)
            bar.update(finished - bar.n)

        yield show
