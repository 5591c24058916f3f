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
from ctg_jax.controls import bricks
from ctg_jax.controls.bricks import Coded
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import losses
from ctg_jax.methods.weights import finetune, quark
from ctg_jax.models.lm import LM
from ctg_jax.run import stage
from ctg_jax.run.stage import Artifact, Run, open_lm
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
      kind, rank, targets: "lora" or "full", and of what; see `finetune.delta`.
      cond: an int entry of `prompts.cond` that names the code of each row; None: the strength does, from the first code
        (0) to the last (1).
    """
    delta = finetune.delta(lm, rng.stream(key, "delta"), kind=kind, rank=rank, targets=targets)
    return bricks.coded(rng.stream(key, "codes"), delta, lm.width, codes).replace(cond=cond)


def example(lm: LM, key: jax.Array) -> Coded:
    """Two loud codes and a LoRA, decoding on the first, for the laws."""
    control = bricks.coded(key, finetune.example(lm, key), lm.width, 2, deviation=1.0)
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


def fit(root, *, lm: Artifact, data: Artifact, **hp: Any) -> Artifact:
    """Trains the codes on the labelled records of `data`; hyper-parameters are those of `ctrl`."""
    return stage.stage(root, ctrl, hp, lm=lm, data=data)


@stage.stage_function("ctrl", how=("save_every",))
def ctrl(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    where: Mapping[str, Any] | None = None,
    codes: int = 2,
    cond: str | None = None,
    kind: str = "lora",
    rank: int = 8,
    targets: str | None = None,
    steps: int = 300,
    batch: int = 16,
    tokens: int = 64,
    rate: float | None = None,
    warmup: int = 20,
    schedule: str = "linear",
    decay: float = 0.0,
    seed: int = 0,
    save_every: int = 100,
) -> None:
    """Stage: next-token training on texts, each behind the code of its label.

    Args:
      lm, data: an LM artifact and a data artifact whose records have a `label` from 0 to codes - 1; those without one
        are left out and counted in a warning.
      where: keep records whose fields have these values.
      codes, cond, kind, rank, targets: see `init`.
      steps, batch, tokens: updates, texts in a batch, tokens of a text (longer ones are cut).
      rate, warmup, schedule, decay: of the optimizer; rate None: one that suits the kind.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: a label that names no code, a code without a text, and what `init` and training raise.
    """
    records = finetune.matching(data, where)
    records = labelled(records, str(data.path), classes=codes)
    check_codes(records, codes)
    model, params, tokenizer = open_lm(lm)
    key = jax.random.key(seed)
    hp = dict(codes=codes, kind=kind, rank=rank, targets=targets, cond=cond)
    control = quark.start(init(model, rng.stream(key, "init"), **hp), params, rng.stream(key, "codes"))
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=batch, length=tokens, seed=seed, fields=("label",))
    control = finetune.learn(
        run, control, loss(model), {"params": params}, batches, trained=r"delta/changes/.*|codes", steps=steps,
        rate=rate or finetune.RATES[kind], warmup=warmup, schedule=schedule, decay=decay, seed=seed,
        save_every=save_every,
    )  # fmt: skip
    finetune.keep(run, control, "ctrl", hp)


def check_codes(records: list[dict[str, Any]], codes: int) -> None:
    """InputError unless every code has a record."""
    found = Counter(int(r["label"]) for r in records)
    for code in range(codes):
        if not found[code]:
            raise InputError(f"no text has the label {code}, so its code would learn nothing: set codes or where.")
