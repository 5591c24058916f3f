"""Fine-tuning as a control: LoRA (Hu et al. 2021), all weights, or a soft prompt (Lester et al. 2021), on texts with an
attribute. The frozen model stays the reference, and the strength `scale` interpolates between the two.

`objective` takes the place of the next-token loss: "reweighted" is TLDR (Jiang et al. 2020), "earth_mover" is EMO (Ren
et al. 2024). Hyperfitting (Carlsson et al. 2024), fine-tuning to a loss near 0 on a few texts, and PALMS (Solaiman &
Dennison 2021), fine-tuning on a handful of texts that show the values wanted, are settings of the plain loss; see
`configs/objectives.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax import rng
from ctg_jax.controls.delta import Delta
from ctg_jax.controls.vectors import SoftPrompt, soft_prompt
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import fitting, lists, losses
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.models.heads import vocabulary
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError

OBJECTIVES = ("likelihood", "reweighted", "earth_mover")


def init(
    lm: LM,
    key: jax.Array,
    *,
    kind: str = "lora",
    rank: int = 8,
    targets: str | None = None,
    length: int = 16,
    choices: int | None = None,
) -> Delta | SoftPrompt:
    """A control that has learned nothing: a zero change of weights, or random vectors.

    Args:
      lm: the frozen model.
      key: for the random parts.
      kind, rank, targets: see `ctg_jax.learn.fitting.Adapter`.
      length: of the soft prompt.
      choices: number of soft prompts, of which `prompts.cond["label"]` names one for each row; None: one for all.

    Raises:
      InputError: a kind that is none of "lora", "full" and "prompt".
    """
    if kind == "prompt":
        vectors = soft_prompt(key, length, lm.width, choices)
        return SoftPrompt(vectors, None if choices is None else "label")
    if kind not in ("lora", "full"):
        raise InputError(f"kind is {kind!r}, expected 'lora', 'full' or 'prompt'.")
    return fitting.delta(lm, key, kind=kind, rank=rank, targets=targets)


example = fitting.example_delta


def neutral(control: Delta | SoftPrompt) -> Delta | None:
    """Strength 0; a soft prompt has no neutral element."""
    return fitting.neutral_delta(control) if isinstance(control, Delta) else None


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised of each token: the section `objective`.

    Attributes:
      kind: "likelihood", the cross-entropy; "reweighted", `losses.reweighted`; "earth_mover", half the sum of the
        cross-entropy and of `losses.earth_mover`, which is scaled to the same value without a gradient. Neither of the
        last two has its minimum at the distribution of the data: the one is flatter there, and the other prefers groups
        of similar words.
      gamma: of "reweighted".
      light: of "earth_mover": the other way round, the cross-entropy scaled to the distance, and their sum, as the
        authors' code has it for light training of a model that is good already.
    """

    kind: str = "likelihood"
    gamma: float = 1.0
    light: bool = False

    def __post_init__(self):
        if self.kind not in OBJECTIVES:
            raise InputError(f"objective.kind is {self.kind!r}, expected one of {', '.join(OBJECTIVES)}.")

    def token(self, logits: jax.Array, targets: jax.Array, frozen: Mapping[str, Any]) -> jax.Array:
        """float32 [...], for logits [..., V] and targets [...]; frozen["table"] as `losses.earth_mover` reads it."""
        if self.kind == "reweighted":
            return losses.reweighted(logits, targets, self.gamma)
        nats, far = losses.next_token(logits, targets), losses.earth_mover(logits, targets, frozen["table"])
        scale = jax.lax.stop_gradient(nats / jnp.maximum(far, 1e-6))
        return nats / jnp.maximum(scale, 1e-6) + far if self.light else 0.5 * (nats + scale * far)


def loss(lm: LM, *, kl: float = 0.0, objective: Objective = Objective()) -> losses.LossFn:
    """The loss of `objective` of the controlled model, plus `kl` · KL(controlled ‖ base) per token.

    params is the control, frozen = {"params": those of the LM, "table": float32 [V, D] where "earth_mover" reads it}.
    """
    token = None if objective.kind == "likelihood" else objective.token
    plain = losses.control_loss(lm, kl_weight=kl, token=token)

    def conditioned(params, frozen, batch, keys):
        cond = {"label": batch["label"]} if "label" in batch else None
        return plain(params, frozen, batch | {"cond": cond}, keys)

    return conditioned


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """Trains a control on the records of `data`; the settings are those of the stage `finetune`."""
    return stage(root, finetune, settings, lm=lm, data=data)


_, from_texts = lists.learners(fit)


@stage_function("finetune")
def finetune(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    where: Mapping[str, Any] | None = None,
    adapter: Adapter = Adapter(),
    length: int = 16,
    choices: int | None = None,
    kl: float = 0.0,
    objective: Objective = Objective(),
    training: Training = Training(steps=300, batch=16, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: next-token training of a control on records that match `where`.

    Args:
      lm, data: an LM artifact and a data artifact.
      where: keep records whose fields have these values, such as {"label": 1}.
      adapter: what learns. length, choices: of a soft prompt, see `init`. With `choices`, records need a `label` from 0
        to choices - 1; those without one are left out and counted in a warning.
      kl: weight of KL(controlled ‖ base) per token. objective: what is minimised of each token; "earth_mover" compares
        words by the output embeddings of the frozen model.
      training: how it is trained.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: no record matches, steps below 1, or what `init` raises.
    """
    records = fitting.matching(data, where)
    model, params, tokenizer = open_lm(lm)
    key = jax.random.key(seed)
    made = vars(adapter) | dict(length=length, choices=choices)
    control = init(model, rng.stream(key, "init"), **made)
    if adapter.kind == "prompt":  # embeddings of random tokens: Lester et al. 2021, section 2.2
        ids = jax.random.randint(rng.stream(key, "tokens"), control.vectors.shape[:-1], 0, model.vocab)
        drawn = model.embed(params, ids.reshape(1, -1))
        control = control.replace(vectors=drawn.astype(jnp.float32).reshape(control.vectors.shape))
    fields = () if choices is None else ("label",)
    if choices is not None:
        records = labelled(records, str(data.path), classes=choices)
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=fields)
    frozen = {"params": params}
    if objective.kind == "earth_mover":
        frozen["table"] = losses.unit_rows(vocabulary(params))
    control = fitting.train(
        run, control, loss(model, kl=kl, objective=objective), frozen, batches, training.at(adapter.rate),
        trained=r"changes/.*|vectors", seed=seed,
    )  # fmt: skip
    fitting.keep(run, control, "finetune", made)
