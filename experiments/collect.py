"""One report of everything that was evaluated below a root.

    python experiments/collect.py [--root=runs] [--title=TEXT]

The settings in which the evaluations differ are columns of the table. The last line is the path of report.html.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from ctg_jax import report
from experiments import cli


def define(fv):
    flags.DEFINE_string("root", "runs", "where artifacts are kept", flag_values=fv)
    flags.DEFINE_string("title", "Everything that was evaluated", "of the page", flag_values=fv)


def main(argv, session):
    fv, _ = cli.parse(argv, define, __doc__)
    rows = report.collect(session.root)
    print(report.terminal(rows), file=sys.stderr)
    return report.write(session.root / "reports" / "everything", rows, title=fv.title)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
