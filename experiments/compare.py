"""Many methods on the same prompts with the same decoding: one table and one report.

    python experiments/compare.py --config=configs/compare_sentiment.py[:yelp|:tiny] [--config.KEY=VALUE] [--root=runs]

Finished stages are not run again, and interrupted ones continue. Bad input ends with one sentence and exit code 2.
The last line is the path of report.html.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import cli, experiment, reporting


def main(argv, session):
    values, _ = cli.parse(argv, lambda fv: cli.config_flag(fv, argv), __doc__)
    config = cli.chosen(values)
    results = experiment.run(session, config)
    return reporting.write(session, cli.spec_of(argv), config, results)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
