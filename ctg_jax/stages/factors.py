"""`factor`: a method's strength, chosen on half of the prompts and scored on the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax.run.stage import Artifact, Run, nearest, stage_function
from ctg_jax.types import InputError


@stage_function("factor")
def factor(
    run: Run,
    *,
    figures: Sequence[Artifact],
    strengths: Sequence[float],
    scores: Sequence[str],
    fluent: float | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> None:
    """Stage: writes what `ctg_jax.evaluation.held_out` finds to metrics.jsonl, and the strength that it chose to
    spec.json.

    Args:
      figures: what `evaluate` made of the samples at each of the `strengths`.
      scores: judges of the evaluation with scores from 0 to 1, or the "relevance" of an evaluation with `embed` (0
        where it is negative or, as for an empty text, not defined).
      fluent: where it is given, a further score `fluency`, exp(fluent - nats per token) and at most 1: 1 for texts of
        at most `fluent` nats per token under the language model of the evaluation, and for texts without tokens. The
        nats per token of texts of people are a choice that is not tuned.
      seed: of the halves. resamples: of the bootstrap over the held-out prompts.

    Raises:
      InputError: numbers that do not match, a score that the evaluations do not have or that exceeds 1, `fluent` beside
        a judge called "fluency", and what `held_out` raises.
    """
    from ctg_jax import evaluation

    if len(figures) != len(strengths):
        raise InputError(f"{len(strengths)} strengths were given for {len(figures)} evaluations: give one for each")
    rows = [(float(s), row) for s, a in zip(strengths, figures) for row in a.rows("scores.jsonl")]
    table = {name: [_score(row, name) for _, row in rows] for name in scores}
    for name, values in table.items():
        if max(values, default=0.0) > 1 + 1e-6:  # cosines are rounded
            raise InputError(
                f"the score {name!r} reaches {max(values):g}, expected scores from 0 to 1, such as a probability; "
                "relevance is within them in an evaluation with embed"
            )
    if fluent is not None:
        if "fluency" in table:
            raise InputError("fluent is given, but a judge is called 'fluency' too: leave one out of scores")
        if any("nats" not in row for _, row in rows):
            raise InputError("fluent is given, but the evaluations have no likelihood: give evaluate a language model")
        table["fluency"] = [min(1.0, float(np.exp(fluent - row["nats"] / max(row["read"], 1)))) for _, row in rows]
    at, prompts = [s for s, _ in rows], [row["prompt_id"] for _, row in rows]
    found = evaluation.held_out(at, prompts, table, seed=seed, resamples=resamples)
    for name, figure in found.figures.items():
        run.log(name=name, **figure.as_json())
    run.record(strength=found.strength, curve=[[s, value] for s, value in sorted(found.curve.items())])


def _score(row: Mapping[str, Any], name: str) -> float:
    if name == "relevance" and "relevance" in row:
        return max(0.0, row["relevance"] or 0.0)
    if name not in row["scores"]:
        known = [*row["scores"], *(["relevance"] if "relevance" in row else [])]
        raise InputError(f"the evaluations have no score {name!r}{nearest(name, known)}")
    return row["scores"][name]
