"""The stage that finds the strength at which controls are as far from the base as was asked."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from ctg_jax.data.messages import has_messages
from ctg_jax.decode import strategies
from ctg_jax.evaluation.strength import Divergence, Unreached, dial, solve
from ctg_jax.run.stage import Artifact, Run, open_lm, stage_function
from ctg_jax.stages import sampling
from ctg_jax.types import InputError

log = logging.getLogger(__name__)


@stage_function("calibrate", revision=1, how=("batch",))
def calibrate(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    controls: Sequence[Artifact],
    kl: float,
    strengths: Sequence[float | None] = (),
    tokens: int = 64,
    batch: int = 16,
    prompt: int = 1,
) -> None:
    """Stage: the strength at which the KL of controls to the base is `kl` nats per token, within 2 %, on the texts of
    `data`; see `ctg_jax.door.calibrate`. The spec has `strength` and the `kl` there, metrics.jsonl all that was tried.
    Where no strength reaches that KL, both are None and `unreached` is a sentence that says what was reached.

    Args:
      data: records with `text`, or `messages` that end with an answer of the assistant.
      controls: one control, or those of a chain.
      kl: nats per token; a negative number asks for a KL of its size at a negative strength.
      strengths: of the controls, which keep their ratios; the one that is found multiplies them. Without any it is the
        strength itself, of several controls that of the first.
      tokens, batch, prompt: read of a text, rows of a compiled batch, and tokens of a text that are its prompt; see
        `ctg_jax.evaluation.strength.Divergence`.

    Raises:
      InputError: controls without a likelihood or a strength, a KL of 0, texts that are too short.
    """
    rows = data.rows("data.jsonl")
    texts = [row["messages"] if has_messages(row) else row["text"] for row in rows]
    given = list(strengths) or [None] * len(controls)
    control = sampling.build(lm, controls, given)
    if not strategies.of(control).likelihood:
        raise InputError(
            f"{controls[0].path.name} gives no text a likelihood, so it has no KL to the base: leave kl out"
        )
    start, at = dial(control)

    def cond(prompts):
        return sampling.conditions(controls, lm, prompts, rows)

    measure = Divergence(*open_lm(lm), texts, tokens=tokens, batch=batch, prompt=prompt, cond=cond)
    try:
        found = solve(lambda value: measure(at(value)), abs(kl), math.copysign(start, kl))
        factor = next((x for x in given if x), 1.0)
        run.record(strength=found.strength / factor, kl=found.kl)
    except Unreached as e:
        log.warning("%s: %s", ", ".join(control.path.name for control in controls), e)
        found = e
        run.record(strength=None, kl=None, unreached=str(e))
    for strength, value in found.tried:
        run.log(strength=strength, kl=value)
