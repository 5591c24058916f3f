"""Which candidate does best at equal KL: `ctg_jax.choose` over the arms of a configuration, on its prompts.

    python experiments/choose.py --config=configs/choose_steering.py:tiny [--config.sample.n=2] [--root=runs]

Every arm is fitted, brought to each of its `kl` on the texts of the section `calibrate`, and writes on from the
prompts, which should be others than those of the comparison that follows. The first judge scores what is written,
without the prompt. One line for each candidate and KL, the best first: mean score and its standard error over prompts.
Fits are stages, which are not run again; what is written is not kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ctg_jax import methods
from ctg_jax.data.messages import has_messages, prompt_of
from ctg_jax.door.choose import choose
from ctg_jax.door.mix import Mix, Part
from ctg_jax.door.model import Model
from ctg_jax.mesh import processes
from ctg_jax.run.stage import nearest, stage
from ctg_jax.stages import judges, sources
from ctg_jax.types import InputError
from experiments import cli, experiment, inputs
from experiments.arms import MethodArm
from experiments.samples import control_of

MEASURE = ("data", "tokens", "batch", "prompt")  # of the section `calibrate`


def candidates_of(found):
    """(label -> arm, the KL that all of them have), of the arms that are methods.

    Raises:
      InputError: no KL in common, an arm that cannot be a candidate.
    """
    arms = {label: arm for label, arm in found.items() if isinstance(arm, MethodArm)}
    levels = {tuple(arm.kl or ()) for arm in arms.values()}
    if len(levels) != 1 or () in levels:
        raise InputError("the arms of the configuration have no kl in common: give all of them the same, methods.*.kl")
    for label, arm in found.items():
        if label not in arms and getattr(arm, "kl", None):
            raise InputError(f"methods.{label} has kl and is no method of its own: candidates are single methods")
        if label in arms and arm.sampling:
            own = ", ".join(arm.sampling)
            raise InputError(
                f"methods.{label} has {own} of its own, but all candidates write under that of sample: leave it out"
            )
    return arms, levels.pop()


def main(argv, session):
    values, _ = cli.parse(argv, lambda fv: cli.config_flag(fv, argv), __doc__)
    settings = cli.chosen(values).to_dict()
    found = experiment.check(settings)
    arms, kl = candidates_of(found)
    measure, sample = dict(settings["calibrate"]), dict(settings["sample"])
    for key in measure:
        if key not in MEASURE:
            raise InputError(f"calibrate has no setting {key!r}{nearest(key, MEASURE)}")
    if sample.pop("truncate_first", False):
        raise InputError("sample.truncate_first is set, which candidates cannot be written with: leave it out")
    inputs.check_data(session, settings, found)
    lm = inputs.language_model(session, settings["lm"])
    name, options = next(iter(settings["judges"].items()))
    judge = judges.open_judge(inputs.judge(session, name, options))
    texts = stage(session, sources.load_data, measure["data"]).rows("data.jsonl")
    prompts = stage(session, sources.load_data, settings["prompts"]).rows("data.jsonl")
    model, candidates = Model(lm), {}
    for label, arm in arms.items():
        control = control_of(session, lm, arm)
        candidates[label] = Mix((Part(methods.load(control, model.lm), control),))
    choices = choose(
        candidates,
        model,
        [prompt_of(row) for row in prompts],
        lambda text: float(judge([""], [text])[0]),
        texts=[row["messages"] if has_messages(row) else row["text"] for row in texts],
        kl=kl,
        **{key: measure[key] for key in ("tokens", "prompt") if key in measure},
        **(sample.pop("filter", None) or {}),
        **sample,
    )
    lines = ["| candidate | strength | kl | score | error |", "|:--|--:|--:|--:|--:|"]
    lines += [f"| {c.name} | {c.strength:.4g} | {c.kl:.3g} | {c.score:.3f} | {c.error:.3f} |" for c in choices]
    return "\n".join(lines) if processes.first() else None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
