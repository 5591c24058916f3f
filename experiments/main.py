"""One method: fit, sample, evaluate, report.

    python experiments/main.py --config=configs/steer.py:tiny [--config.sample.n=5] [--root=runs]

Finished stages are not run again, and interrupted ones continue. Bad input ends with one sentence and exit code 2.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ctg_jax.types import InputError
from experiments import cli, experiment, reporting
from experiments.arms import BestOf, Consensus, MethodArm, Plain


def main(argv, session):
    values, _ = cli.parse(argv, lambda fv: cli.config_flag(fv, argv), __doc__)
    config = cli.chosen(values)
    # The language model alone and choices among samples are lines to compare with.
    beside = Plain | BestOf | Consensus
    arms = [arm for arm in experiment.check(config.to_dict()).values() if not isinstance(arm, beside)]
    names = {arm.method if isinstance(arm, MethodArm) else type(arm).__name__ for arm in arms}
    if len(names) > 1:
        raise InputError(f"main runs one method and the configuration has {len(names)}: use experiments/compare.py")
    results = experiment.run(session, config)
    return reporting.write(session, cli.spec_of(argv), config, results)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
