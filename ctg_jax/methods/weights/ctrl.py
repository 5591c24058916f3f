"""Control codes (CTRL, Keskar et al. 2019): one learned input vector for each label, before the text, and a change of
weights that reads it; decode on any code.

With two codes, for failures and successes, this is negative-aware training (Wang et al. 2024): what was bad is learned
as well, as bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax import rng
from ctg_jax.controls.codes import Coded, coded
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError


def init(
    lm: LM,
    key: jax.Array,
    *,
    codes: int = 2,
    kind: str = "lora",
    rank: int = 8,
    targets: str | None = None,
    cond: str | None = None,
) -> Coded:
    """Random control codes and a change of weights that is zero.

    Args:
      codes: K, control codes.
      kind, rank, targets: of the change of weights, see `ctg_jax.learn.fitting.Adapter`.
      cond: an int entry of `prompts.cond` that names the code of each row; None: the strength does, from the first code
        (0) to the last (1).
    """
    delta = fitting.delta(lm, rng.stream(key, "delta"), kind=kind, rank=rank, targets=targets)
    return coded(rng.stream(key, "codes"), delta, lm.width, codes).replace(cond=cond)


def example(lm: LM, key: jax.Array) -> Coded:
    """Two loud codes and a LoRA, decoding on the first, for the laws."""
    control = coded(key, fitting.example_delta(lm, key), lm.width, 2, deviation=1.0)
    return control.replace(scale=jnp.float32(0.0))


def neutral(control: Coded) -> None:
    """A control code has no neutral element."""
    return None


def loss(lm: LM) -> losses.LossFn:
    """-log p(x_i | x_<i, c) per token, with c the code `batch["label"]` of the text (Keskar et al. 2019, eq. 2).

    params is the control, frozen = {"params": those of the LM}.
    """
    plain = losses.control_loss(lm)

    def total(params, frozen, batch, keys):
        return plain(params.replace(cond="label"), frozen, batch | {"cond": {"label": batch["label"]}}, keys)

    return total


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """Trains the codes on the labelled records of `data`; the settings are those of the stage `ctrl`."""
    return stage(root, ctrl, settings, lm=lm, data=data)


@stage_function("ctrl")
def ctrl(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    where: Mapping[str, Any] | None = None,
    codes: int = 2,
    cond: str | None = None,
    adapter: Adapter = Adapter(),
    training: Training = Training(steps=300, batch=16, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: next-token training on texts, each behind the code of its label.

    Args:
      lm, data: an LM artifact and a data artifact whose records have a `label` from 0 to codes - 1; those without one
        are left out and counted in a warning.
      where: keep records whose fields have these values.
      codes, cond: see `init`.
      adapter: the change of weights. training: how it is trained.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: a label that names no code, a code without a text, and what `init` and training raise.
    """
    records = fitting.matching(data, where)
    records = labelled(records, str(data.path), classes=codes)
    check_codes(records, codes)
    model, params, tokenizer = open_lm(lm)
    key = jax.random.key(seed)
    made = vars(adapter) | dict(codes=codes, cond=cond)
    control = init(model, rng.stream(key, "init"), **made)
    control = fitting.like_words(control, model, params, rng.stream(key, "codes"))
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=("label",))
    control = fitting.train(
        run, control, loss(model), {"params": params}, batches, training.at(adapter.rate),
        trained=r"delta/changes/.*|codes", seed=seed,
    )  # fmt: skip
    fitting.keep(run, control, "ctrl", made)


def check_codes(records: list[dict[str, Any]], codes: int) -> None:
    """InputError unless every code has a record."""
    found = Counter(int(r["label"]) for r in records)
    for code in range(codes):
        if not found[code]:
            raise InputError(f"no text has the label {code}, so its code would learn nothing: set codes or where.")
