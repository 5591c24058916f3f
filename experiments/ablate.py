"""A grid: the `sweep()` of a configuration file, all cells or one of n parts of them.

    python experiments/ablate.py --config=configs/steer.py:tiny [--cell=2/8] [--root=runs]
    python experiments/ablate.py --config=configs/steer.py --dry-run         what would run, and what is there
    python experiments/ablate.py --config=configs/steer.py --workers=4       four processes of this machine
    python experiments/ablate.py --config=configs/steer.py --workers=16 --slurm=partition=gpu,timeout_min=60

`sweep()` yields dictionaries of dotted settings, such as {"methods.steer.fit.layer": 3}. With --cell=i/n this job runs
cells i, i + n, … (i counted from 1). Cells share stages, so nothing common is computed twice, also across processes and
machines that share --root: the second one waits for the first. A cell that fails is listed with its error (exit code 1)
and does not stop the others; the same command runs what is missing. With SLURM the cells are an array; a task that is
preempted or runs out of time is queued again and continues where it stopped. Logs are in ROOT/grids/NAME, one for each
cell, where NAME is the name of the report's folder.

The last line is the path of report.html, drawn from all cells of the grid that are finished.
"""

import ast
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from ctg_jax.types import InputError
from experiments import cli, experiment, grid, reporting


def cells_of(text, number):
    """The indices of the cells that --cell=i/n selects out of `number`."""
    if text is None:
        return range(number)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--cell={text}: expected i/n with 1 <= i <= n, such as --cell=2/8")
    if int(match[1]) > number:
        raise InputError(f"--cell={text} names no cell: the sweep has {number}")
    return range(int(match[1]) - 1, number, int(match[2]))


def options_of(text):
    """The settings of --slurm=KEY=VALUE,…"""
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--slurm={text}: expected KEY=VALUE with commas between, such as --slurm=timeout_min=60")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def main(argv, session):
    def define(fv):
        cli.config_flag(fv, argv)
        flags.DEFINE_string("cell", None, "i/n: run every n-th cell from the i-th on", flag_values=fv)
        flags.DEFINE_integer("only", None, "run the cell of this number alone", flag_values=fv)
        flags.DEFINE_boolean("dry-run", False, "print what would run and what is there", flag_values=fv)
        flags.DEFINE_integer("workers", 0, "cells at once, in processes; 0: one by one in this one", flag_values=fv)
        flags.DEFINE_string("slurm", None, "KEY=VALUE,…: run on a cluster; options of sbatch", flag_values=fv)
        flags.DEFINE_boolean("report", True, "write the report", flag_values=fv)

    values, _ = cli.parse(argv, define, __doc__)
    config = cli.chosen(values)
    spec = cli.spec_of(argv)
    module = cli.module_of(spec)
    if not hasattr(module, "sweep"):
        raise InputError(f"{spec} defines no sweep(): expected a generator of dictionaries of dotted settings")
    # A wrong key is found before anything runs.
    cells = [grid.Cell(i, changes, cli.override(config, changes)) for i, changes in enumerate(module.sweep(), 1)]
    asked = [cells[i] for i in cells_of(values.cell, len(cells))]
    if values.only is not None:
        asked = [cell for cell in cells if cell.number == values.only]
        if not asked:
            raise InputError(f"--only={values.only} names no cell: the sweep has {len(cells)}")
    if values["dry-run"].value:
        return grid.overview(session, asked)
    # A job that runs one cell writes no report and needs no folder.
    several = values.report or values.workers or values.slurm is not None
    sweep = [cell.changes for cell in cells]
    folder = reporting.grid_folder(session, spec, config, sweep) if several else Path()
    failed = run(values, session, argv, asked, session.root / "grids" / folder.name)
    errors = "\n".join(f"{cell} failed: {failed[cell.number]}" for cell in asked if cell.number in failed)
    if not values.report:
        if failed:
            raise InputError(errors)
        return None
    looks = {cell.number: grid.look(session, cell) for cell in cells}
    rows = [(cell.changes, row) for cell in cells for row in looks[cell.number].rows or ()]
    if not rows:
        raise InputError(errors)
    missing = [str(cell) for cell in cells if looks[cell.number].rows is None]
    about = {"cells that are not finished": "; ".join(missing)} if missing else {}
    finished = [cell for cell in cells if looks[cell.number].rows is not None]
    about |= reporting.not_reached([s for cell in finished for s in experiment.unreached(session, cell.config)])
    page = reporting.write_grid(folder, session, spec, config, rows, about)
    if failed:
        raise cli.Incomplete(errors, page)
    return page


def run(values, session, argv, asked, folder):
    """Runs the cells on the engine that the flags choose; number -> error of those that failed."""
    if (values.workers or values.slurm is not None) and values.hosts:
        raise InputError("--hosts and --workers (or --slurm) are two ways to use several processes: give one of them")
    if values.workers < 0:
        raise InputError(f"--workers={values.workers}: expected 0 or more")
    if values.slurm is None and not values.workers:
        return grid.here(session, asked)
    todo = [cell for cell in asked if grid.look(session, cell).rows is None]
    if not todo:
        return {}
    commands = {cell.number: command(argv, session, cell.number) for cell in todo}
    if values.slurm is None:
        return grid.processes(session, todo, commands, folder, values.workers)
    return grid.slurm(session, todo, commands, folder, values.workers, options_of(values.slurm))


def command(argv, session, number):
    """The command line of a process that runs one cell and writes no report."""
    names = ("config", "noconfig", "mesh", "plan", "precision", "remat", "noremat", "tensorboard", "wandb")
    shared = tuple(f"--{name}" for name in names)
    own = [f"--root={session}", f"--only={number}", "--noreport"]
    return [sys.executable, str(Path(__file__).resolve()), *(a for a in argv if a.startswith(shared)), *own]


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
