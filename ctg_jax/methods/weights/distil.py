"""Distillation of a control into weights: what one or several controls make of the next-token distributions while
decoding, a change of weights learns to give alone, at the cost of the model itself.

Any control that gives texts a likelihood can be the teacher, on logits, on the stream or on the prompt. Who's Harry
Potter (Eldan & Russinovich 2023) is the case of `dexperts` with sides="forget" as the teacher: a model that was trained
further on what is to be forgotten says which tokens to make less likely, and the labels are the likeliest tokens that
are left (`hard`). The dictionary of generic names that an LLM makes for the paper is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax import methods, rng
from ctg_jax.control import Control
from ctg_jax.controls.delta import Delta
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.decode import strategies
from ctg_jax.decode.reading import read
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.stages import sampling
from ctg_jax.stages.controls import made
from ctg_jax.stages.sources import load_data
from ctg_jax.types import InputError, Prompts, Sum

init, example, neutral = fitting.delta, fitting.example_delta, fitting.neutral_delta


def loss(lm: LM, *, hard: bool = False) -> losses.LossFn:
    """KL(teacher ‖ π) per token of a text, or with `hard` the cross-entropy of the teacher's likeliest token.

    params is the control, frozen = {"params": those of the LM, "teacher": a Control}; a batch is what `pipeline` gives,
    whose first token is the prompt. The minimum over texts that reach every context is the teacher itself.
    """

    def total(params: Delta, frozen: Mapping[str, Any], batch: dict[str, Any], keys: jax.Array) -> Sum:
        teacher: Control = frozen["teacher"]
        for control in (params, teacher):
            losses.check_rows(lm, batch["tokens"].shape[1], control)
        targets, mask = losses.predicted(batch)
        prompts = Prompts(batch["tokens"][:, :1], batch["mask"][:, :1], keys)
        both = tuple(read(lm, frozen["params"], prompts, targets, control) for control in (params, teacher))

        def terms(z, wanted, targets):
            wanted = jax.lax.stop_gradient(wanted)
            best = jnp.argmax(wanted, axis=-1)
            distance = losses.next_token(z, best) if hard else losses.kl(wanted, z)
            return {"distance": distance, "agreement": jnp.argmax(z, axis=-1) == best}

        values = reduced(both, terms, targets)
        value, weight = losses.masked_sum(values["distance"], mask)
        return Sum(value, weight, {"agreement": losses.masked_sum(values["agreement"], mask)})

    return total


def fit(root, *, lm: Artifact, data: Artifact, teacher: Mapping[str, Any], **settings: Any) -> Artifact:
    """Makes or fits the teacher, and distils it.

    Args:
      lm: the language model. data: the texts on which the two are compared.
      teacher: `method`, its name; `fit`, settings of its `fit`, with `data`, settings of `load_data`, where it learns
        from other texts than those of the student; or `init`, settings of a control that needs no training.
      settings: of the stage `distil`.

    Raises:
      InputError: settings of a teacher that are none, and what its method raises.
    """
    known = ("method", "fit", "init", "data")
    if "method" not in teacher or ("init" in teacher) == ("fit" in teacher) or set(teacher) - set(known):
        raise InputError(
            f"teacher is {dict(teacher)}, expected method and one of fit and init, and with fit also data."
        )
    if "init" in teacher:
        found = stage(root, made, {"method": teacher["method"], "init": dict(teacher["init"])}, lm=lm)
    else:
        module = methods.get(teacher["method"])
        if "rewards" in inspect.signature(module.fit).parameters:
            raise InputError(
                f"the teacher {teacher['method']!r} learns from rewards: distil learns from those that do not."
            )
        texts = stage(root, load_data, dict(teacher["data"])) if "data" in teacher else data
        found = module.fit(root, lm=lm, data=texts, **teacher["fit"])
    return stage(root, distil, settings, lm=lm, data=data, teacher=found)


@stage_function("distil")
def distil(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    teacher: Artifact,
    strength: float | None = None,
    filter: Mapping[str, Any] | None = None,
    where: Mapping[str, Any] | None = None,
    hard: bool = False,
    adapter: Adapter = Adapter(),
    training: Training = Training(steps=300, batch=16, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: a change of weights learns what the model writes under the teacher.

    Args:
      data: texts. where: keep records whose fields have these values.
      teacher: the artifact of a control. strength: at which it teaches; None: as fitted. filter: rules of
        `controls.truncate` behind it.
      hard: see `loss`. adapter: the change of weights. training: how it is trained.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: a teacher that gives texts no likelihood or reads more than tokens, and what `init` and training
        raise.
    """
    model, params, tokenizer = open_lm(lm)
    taught = sampling.build(lm, [teacher], [strength], filter)
    if not strategies.of(taught).likelihood or sampling.conditions([teacher], lm, ["a"]):
        raise InputError(
            f"{teacher.path.name} cannot teach: expected a control that gives texts a likelihood by their tokens."
        )
    records = fitting.matching(data, where)
    control = init(model, rng.stream(jax.random.key(seed), "init"), **vars(adapter))
    source = Source(str(data.path), str(where), records)
    rows = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed)
    frozen = {"params": params, "teacher": jax.tree.map(jnp.asarray, taught)}
    control = fitting.train(
        run, control, loss(model, hard=hard), frozen, rows, training.at(adapter.rate), trained=r"changes/.*", seed=seed
    )
    fitting.keep(run, control, "distil", vars(adapter))
