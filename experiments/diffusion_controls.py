"""How often each target of Diffusion-LM is met, alone and with others, and how often without control.

    python experiments/diffusion_controls.py --config=configs/diffusion_lm.py[:yelp|:e2e|:tiny] [--root=runs]

Runs what `main.py` runs and prints a table: for every arm the share of samples that have each of the targets of the
configuration (label by the first judge and other fields by the judges of their names, length and tags by the tokens,
exactly; length within two tokens as well, which is what the paper counts), that have all targets of the arm, and the
pooled perplexity under the autoregressive LM (the mean over samples leaves out those above 10,000, which may be all).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ctg_jax.data.tags import TAGS, tag_table
from ctg_jax.mesh import processes
from ctg_jax.run.stage import open_artifact, open_lm
from ctg_jax.stages.judges import open_judge
from ctg_jax.types import InputError
from experiments import cli, experiment, inputs

WITHIN = "length within 2 of"


def holds(name, value, rows, liked, tags, ends):
    """bool [n]: which samples have a target.

    Args:
      rows: their tokens, with the end token where they have one. liked: name -> bool [n], what a judge finds.
      tags: int [V], of every token. ends: the ids that end a text.

    Raises:
      InputError: a target that no judge can tell.
    """
    if name in liked:
        if value not in (0, 1):
            raise InputError(f"target {name} is {value}, but a judge tells 1 from 0 only: give it a field of its own")
        return liked[name] == bool(value)
    if name in ("length", WITHIN):
        far = 0 if name == "length" else 2
        return np.asarray([len(row) > 0 and row[-1] in ends and abs(len(row) - value - 1) <= far for row in rows])
    if name != "tags":
        raise InputError(f"target {name} has no judge: give one of this name under judges")
    wanted = [(i, TAGS.index(tag)) for i, tag in enumerate(value) if tag is not None]
    return np.asarray([all(i < len(row) and tags[row[i]] == tag for i, tag in wanted) for row in rows])


def columns(targets):
    """The columns of the table, title -> (name, value): each value of each target once, a length also within two."""
    found = {f"{name} {value}": (name, value) for target in targets for name, value in target.items()}
    near = {f"{WITHIN} {value}": (WITHIN, value) for name, value in found.values() if name == "length"}
    return found | near


def main(argv, session):
    values, _ = cli.parse(argv, lambda fv: cli.config_flag(fv, argv), __doc__)
    config = cli.chosen(values)
    settings, results = config.to_dict(), experiment.run(session, config)
    lm = inputs.language_model(session, settings["lm"])
    tokenizer = open_lm(lm)[2]
    tags = tag_table(tokenizer)
    judges = settings["judges"]
    thresholds = {name: open_judge(inputs.judge(session, name, judge)).threshold for name, judge in judges.items()}
    arms = experiment.check(settings)
    asked = {label: dict(getattr(arm, "fit", {}).get("aim", {}).get("target", {})) for label, arm in arms.items()}
    every = columns(asked.values())
    lines = [" | ".join(["", "arm", *every, "all of its targets", "pooled perplexity", ""])]
    lines.append("|---" * (len(every) + 3) + "|")
    for result in results:
        samples = open_artifact(result.samples.path).rows("samples.jsonl")
        scores = result.figures.rows("scores.jsonl")
        rows = [r["tokens"] for r in samples]
        liked = {name: np.asarray([s["scores"][name] >= t for s in scores]) for name, t in thresholds.items()}
        liked = {"label": next(iter(liked.values()))} | liked
        found = [holds(key, value, rows, liked, tags, tokenizer.ends) for key, value in every.values()]
        mine = [holds(key, value, rows, liked, tags, tokenizer.ends) for key, value in asked[result.label].items()]
        fluency = next(m for m in result.figures.metrics() if m["name"] == "perplexity_pooled")
        shares = [f"{share.mean():.3f}" for share in found]
        both = f"{np.all(mine, axis=0).mean():.3f}" if mine else "–"
        spread = "{value:,.4g} [{low:,.4g}, {high:,.4g}]".format(**fluency)
        lines.append(" | ".join(["", result.label, *shares, both, spread, ""]))
    return "\n".join(line.strip() for line in lines) if processes.first() else None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
