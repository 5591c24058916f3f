"""`calibrate`: a control at the strength at which it is as far from the base as one asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ctg_jax.data.messages import Messages
from ctg_jax.door.mix import Mix, mix_of
from ctg_jax.door.model import Model, check_model
from ctg_jax.evaluation.strength import Divergence, dial, solve
from ctg_jax.stages import sampling
from ctg_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What `calibrate` found.

    Attributes:
      control: the control at the strength that was found, to write with.
      strength: that strength; of several controls, that of the first.
      kl: KL(controlled ‖ base) there, nats per token.
      tried: every (strength, KL) that was evaluated, in order.
    """

    control: Mix
    strength: float
    kl: float
    tried: tuple[tuple[float, float], ...]


def calibrate(
    control: Any,
    lm: Model,
    texts: Sequence[str | Messages],
    *,
    kl: float,
    leaf: str | None = None,
    tokens: int = 64,
    batch: int = 16,
    prompt: int = 1,
) -> Calibrated:
    """The strength at which a control changes the next-token distributions of texts by `kl` nats per token, within 2 %
    and in at most twelve evaluations, which share one compiled program.

    The KL is KL(controlled ‖ base), exact over the vocabulary, and its mean is taken over the tokens of the texts (of
    conversations, of the last answer). So controls of all methods are comparable at equal KL.

    Args:
      control: a mix or a `Control`. The search begins at its strength and keeps the sign; controls in a mix keep the
        ratios of their strengths.
      lm: the language model, as `load` returns it.
      texts: ordinary texts that the control was not fitted on, or conversations; a few dozen are enough.
      kl: nats per token; 0.1 is hardly visible, and at 2 few controls leave the text readable.
      leaf: the path of a leaf to change in place of the strength, for a control whose strength only chooses one of a
        few codes: `"delta/scale"` for Quark and for control codes.
      tokens: read of a text, at most. batch: rows of a compiled batch.
      prompt: tokens of a text that are its prompt, the beginning token included; for a control that acts on the prompt
        alone, about as many as the prompts have that it is meant for.

    Raises:
      InputError: an argument that cannot be used; a KL that the control does not reach, with the one that it reaches.
    """
    check_model(lm)
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise InputError(f"texts is {texts!r:.60}, expected a list of texts or of conversations")
    mix = mix_of(control)
    for artifact in mix.artifacts:
        sampling.same_lm(artifact, lm.artifact)
    start, at = dial(mix.control, leaf)
    measure = Divergence(
        *sampling.opened(lm.artifact), list(texts), tokens=tokens, batch=batch, prompt=prompt,
        cond=lambda prompts: sampling.conditions(mix.artifacts, lm.artifact, prompts),
    )  # fmt: skip
    found = solve(lambda value: measure(at(value)), kl, start)
    return Calibrated(mix.over(at(found.strength)), found.strength, found.kl, found.tried)
