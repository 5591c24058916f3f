"""Decoding-time experts: combine the logits of several language models (Liu et al. 2021, eq. 2).

    z' = z + alpha (z⁺ − z⁻)

The logits of the model that decodes may take the place of either side, which gives contrastive decoding (Li et al.
2023; O'Brien & Lewis 2023) and classifier-free guidance (Sanchez et al. 2023); neither needs a fit. A filter before the
experts in a `Chain` filters the base, as in the DExperts paper; one after them filters the combination.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import methods
from ctg_jax.controls.experts import Experts, experts
from ctg_jax.controls.streams import LastTokens, Stream
from ctg_jax.data.instructions import instructed
from ctg_jax.learn import lists
from ctg_jax.learn.fitting import example_delta
from ctg_jax.models import hf
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.identity import nearest
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError

SIDES = ("both", "expert", "anti", "forget")
FITTED = ("lora", "full", "prompt")  # kinds of expert that are trained
INSTRUCTED = "instructed"  # the entry of `prompts.cond` with instruction and prompt, int32 [B, T'], −1 for padding


def guidance(lm: LM, gamma: float = 1.5, keep: int = 1, cond: str | None = None) -> Experts:
    """Classifier-free guidance, z_∅ + gamma (z − z_∅) (Sanchez et al. 2023, eq. 7): z_∅ reads only the last `keep`
    tokens of the prompt."""
    return experts(anti=Stream(control=LastTokens(keep), lm=lm, of="current"), alpha=gamma - 1.0, cond=cond)


def prompted(lm: LM, alpha: float = 1.0, cond: str | None = None) -> Experts:
    """The same model after an instruction is the expert, or below alpha 0 the anti-expert. Each row reads the tokens
    `prompts.cond["instructed"]`, instruction and prompt, in place of the prompt."""
    return experts(Stream(lm=lm, of="current", own=INSTRUCTED), alpha=alpha, cond=cond)


class Own(TypedDict, total=False):
    """Settings of trained experts, see `finetune.init`."""

    rank: int
    targets: str | None
    length: int
    choices: int | None


def init(
    lm: LM,
    key: jax.Array,
    *,
    kind: str = "lora",
    sides: str = "both",
    amateur: str | None = None,
    keep: int = 1,
    instruction: str | None = None,
    alpha: float = 2.0,
    cond: str | None = None,
    **adapter: Unpack[Own],
) -> Experts:
    """Experts that have learned nothing.

    Args:
      kind: "lora", "full" or "prompt": an expert and an anti-expert that `fit` trains. "contrastive": contrastive
        decoding, (1 + alpha) z − alpha z_amateur (O'Brien & Lewis 2023, eq. 3); the plausibility mask of Li et al.
        (2023) is the rule `min_p` before it. "guidance": see `guidance`, gamma = 1 + alpha. "instruction": see
        `prompted`.
      sides: of experts that are trained: "both"; "expert" or "anti", the base taking the other side's place; "forget",
        an anti-expert under the rule of that name (`controls.experts.Experts`).
      adapter: `rank`, `targets`, `length` and `choices` of the experts; see `finetune.init`.
      amateur: folder or hub id of the weaker model of contrastive decoding, with the same tokenizer.
      keep: the number of tokens of the prompt that the unconditional side of guidance reads.
      instruction: the text that is put before every prompt.

    Raises:
      InputError: an unknown kind, side or setting of the experts, or a kind that lacks its amateur or instruction.
    """
    if sides not in SIDES:
        raise InputError(f"sides is {sides!r}, expected one of {', '.join(SIDES)}.")
    own = list(Own.__annotations__)
    for name in adapter:
        if name not in own:
            raise InputError(f"dexperts has no setting {name!r}{nearest(name, own)}")
    if kind in FITTED:
        tuned = methods.get("finetune").init
        both = [Stream(control=tuned(lm, k, kind=kind, **adapter), lm=lm) for k in jax.random.split(key)]
        return combined(*both, sides, alpha, cond)
    if kind == "guidance":
        return guidance(lm, 1.0 + alpha, keep, cond)
    if kind == "instruction":
        if not instruction:
            raise InputError("kind is 'instruction', which needs the text of an instruction.")
        return prompted(lm, alpha, cond)
    if kind == "contrastive":
        if not amateur:
            raise InputError("kind is 'contrastive', which needs an amateur: the folder or hub id of a weaker model.")
        small = hf.shape(amateur)
        return experts(anti=Stream(small.init(key), lm=small), alpha=alpha, cond=cond)
    raise InputError(f"kind is {kind!r}, expected {', '.join(FITTED)}, contrastive, guidance or instruction.")


def combined(expert: Stream | None, anti: Stream | None, sides: str, alpha: float, cond: str | None) -> Experts:
    """The control of the sides that `sides` names."""
    kept = (expert if sides in ("both", "expert") else None, None if sides == "expert" else anti)
    return experts(*kept, alpha, cond, rule="forget" if sides == "forget" else "linear")


def make(lm: LM, key: jax.Array, **settings: Any) -> Experts:
    """A control that needs no fit: `init` of the kinds "contrastive", "guidance" and "instruction".

    Raises:
      InputError: a kind that is fitted, and what `init` raises.
    """
    kind = settings.get("kind", FITTED[0])
    if kind in FITTED:
        raise InputError(
            f"kind is {kind!r}, whose experts are fitted: give data, or choose contrastive, guidance or instruction."
        )
    control = init(lm, key, **settings)
    if kind == "contrastive":
        control = control.replace(anti=control.anti.replace(params=hf.load(settings["amateur"])[1]))
    return control


def conditions(artifact: Artifact, lm: Artifact, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """What a control of the kind "instruction" reads for each prompt: the tokens of instruction and prompt."""
    settings = artifact.spec["init"]
    if settings.get("kind") != "instruction":
        return {}
    return {INSTRUCTED: instructed(open_lm(lm)[2], texts, [settings["instruction"]])[:, 0]}


def example(lm: LM, key: jax.Array) -> Experts:
    """Two random changes of weights, for the laws."""
    return experts(*(Stream(control=example_delta(lm, k), lm=lm) for k in jax.random.split(key)), alpha=2.0)


def neutral(control: Experts) -> Experts:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    expert: Mapping[str, Any] | None = None,
    anti: Mapping[str, Any] | None = None,
    sides: str = "both",
    alpha: float = 2.0,
    cond: str | None = None,
    **settings: Any,
) -> Artifact:
    """Two fine-tuning stages on the same model, and their combination; or one, where `sides` is not "both".

    Args:
      lm, data: an LM artifact, and records with `text` and a field to choose by.
      expert, anti: `where` of each side; by default {"label": 1} and {"label": 0}.
      sides: see `init`.
      alpha: the strength at first. cond: see `Experts`.
      settings: the other settings of `finetune`, the same for both.

    Raises:
      InputError: what `finetune` raises.
    """
    if sides not in SIDES:
        raise InputError(f"sides is {sides!r}, expected one of {', '.join(SIDES)}.")
    chosen = {"expert": expert or {"label": 1}, "anti": anti or {"label": 0}}
    names = {"both": ("expert", "anti"), "expert": ("expert",)}.get(sides, ("anti",))
    tune = methods.get("finetune").fit
    tuned = {name: tune(root, lm=lm, data=data, **{**settings, "where": dict(chosen[name])}) for name in names}
    return stage(root, dexperts, dict(sides=sides, alpha=alpha, cond=cond), lm=lm, **tuned)


from_pairs, from_texts = lists.learners(fit)


@stage_function("dexperts", revision=1)
def dexperts(
    run: Run,
    *,
    lm: Artifact,
    expert: Artifact | None = None,
    anti: Artifact | None = None,
    sides: str = "both",
    alpha: float = 2.0,
    cond: str | None = None,
) -> None:
    """Stage: controls that were fitted on `lm` become the sides of one. It holds what they change, such as a LoRA each,
    and no weights of the model."""
    model = open_lm(lm)[0]
    both = [None if a is None else Stream(control=methods.load(a, model), lm=model) for a in (expert, anti)]
    checkpoint.save(run.path / "state", combined(*both, sides, alpha, cond))
    run.record(method="dexperts", init=(expert or anti).spec["init"] | dict(sides=sides, alpha=alpha, cond=cond))
