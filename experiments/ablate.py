"""A grid: the `sweep()` of a configuration file, all cells or one of n parts of them.

    python experiments/ablate.py --config=configs/steer.py:tiny [--cell=2/8] [--root=runs]

`sweep()` yields dictionaries of dotted settings, such as {"methods.steer.fit.layer": 3}. With --cell=i/n this job runs
cells i, i + n, … (i counted from 1); cells share stages, so nothing common is computed twice, also across jobs that
share --root. The last line is the path of report.html, once every cell that is asked for has run.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from ctg_jax.types import InputError
from experiments import cli, experiment, reporting


def cells_of(text, number):
    """The indices of the cells that --cell=i/n asks for, of `number`."""
    if text is None:
        return range(number)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--cell={text}: expected i/n with 1 <= i <= n, such as --cell=2/8")
    return range(int(match[1]) - 1, number, int(match[2]))


def main(argv):
    def define(fv):
        cli.config_flag(fv, argv)
        flags.DEFINE_string("cell", None, "i/n: run every n-th cell from the i-th on", flag_values=fv)

    values, _ = cli.parse(argv, define, __doc__)
    config = cli.chosen(values)
    spec = cli.spec_of(argv)
    module = cli.module_of(spec)
    if not hasattr(module, "sweep"):
        raise InputError(f"{spec} defines no sweep(): expected a generator of dictionaries of dotted settings")
    grid = list(module.sweep())
    settings = [cli.override(config, changes) for changes in grid]  # a wrong key stops it before anything runs
    rows = []
    for i in cells_of(values.cell, len(grid)):
        rows += [(grid[i], cell) for cell in experiment.run(values.root, settings[i])]
    if not rows:
        raise InputError(f"--cell={values.cell} names no cell: the sweep has {len(grid)}")
    return reporting.write_grid(values.root, spec, config, rows)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
