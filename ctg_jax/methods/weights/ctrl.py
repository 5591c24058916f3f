"""Control codes (CTRL, Keskar et al. 2019): one learned input vector for each label, before the text, and a change of
weights that reads it; decode on any code.

With two codes, for failures and successes, this is negative-aware training (Wang et al. 2024): what was bad is learned
as well, as bad.

The code stands where a text begins, so the first token of a text is learned from it too, and the empty prompt is a
prompt like others: the control writes whole texts. `attributed` asks the other way round which code a text belongs to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import evaluation, rng
from ctg_jax.controls.codes import Coded, coded
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.models.lm import LM
from ctg_jax.rewards.logistic import class_probabilities
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, Params


def init(
    lm: LM,
    key: jax.Array,
    *,
    codes: int = 2,
    kind: str = "lora",
    rank: int = 8,
    targets: str | None = None,
    cond: str | None = None,
    start: int | None = None,
) -> Coded:
    """Random control codes and a change of weights that is zero.

    Args:
      codes: K, control codes.
      kind, rank, targets: of the change of weights, see `ctg_jax.learn.fitting.Adapter`.
      cond: an int entry of `prompts.cond` that names the code of each row; None: the strength does, from the first code
        (0) to the last (1).
      start: the token that stands for an empty prompt, see `Coded`.
    """
    delta = fitting.delta(lm, rng.stream(key, "delta"), kind=kind, rank=rank, targets=targets)
    return coded(rng.stream(key, "codes"), delta, lm.width, codes).replace(cond=cond, start=start)


def example(lm: LM, key: jax.Array) -> Coded:
    """Two loud codes and a LoRA, decoding on the first, for the laws."""
    control = coded(key, fitting.example_delta(lm, key), lm.width, 2, deviation=1.0)
    return control.replace(scale=jnp.float32(0.0))


def neutral(control: Coded) -> None:
    """A control code has no neutral element."""
    return None


def loss(lm: LM, *, first: bool = True) -> losses.LossFn:
    """-log p(x_i | x_<i, c) per token, with c the code `batch["label"]` of the text (Keskar et al. 2019, eq. 2).

    params is the control, frozen = {"params": those of the LM}.

    Args:
      first: whether the first token of a row is learned; False where it is the one with which the model's texts begin.
    """
    plain = losses.control_loss(lm)

    def total(params, frozen, batch, keys):
        coded = params.replace(cond="label")
        given = batch | {"cond": {"label": batch["label"]}}
        if first:  # behind an empty prompt, for which token 0 stands here
            coded = coded.replace(start=0)
            begin = jnp.zeros_like(batch["tokens"][:, :1])
            for name in ("tokens", "mask", "loss_mask"):
                if name in batch:
                    column = begin if name == "tokens" else jnp.ones_like(begin, bool)
                    given[name] = jnp.concatenate([column, batch[name]], axis=1)
        return plain(coded, frozen, given, keys)

    return total


def attributed(
    lm: LM,
    params: Params,
    tokenizer: Tokenizer,
    control: Coded,
    texts: Sequence[str],
    *,
    prior: Sequence[float] | None = None,
    batch: int = 32,
) -> np.ndarray:
    """p(c | x) ∝ p(x | c) p(c), float64 [n, K]: to which code each text belongs (Keskar et al. 2019, section 5).

    Args:
      texts: n whole texts. prior: p(c) [K], the same for all codes by default. batch: rows of a compiled batch.

    Raises:
      InputError: a prior of another length, or not of positive numbers.
    """
    count = control.codes.shape[0]
    prior = np.ones(count) if prior is None else np.asarray(prior, np.float64)
    if prior.shape != (count,) or not (prior > 0).all():
        raise InputError(f"prior is {prior.tolist()}, expected {count} positive numbers, one for each code.")
    heads, tails = [tokenizer.begun([])] * len(texts), tokenizer.encode_after([""] * len(texts), texts)
    logp = []
    for code in range(count):
        at = control.replace(cond=None, scale=jnp.float32(code / (count - 1)))
        logp.append(evaluation.log_probabilities(lm, params, tokenizer, heads, tails, at, batch=batch))
    return class_probabilities(np.stack(logp, axis=1) + np.log(prior))


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """Trains the codes on the labelled records of `data`; the settings are those of the stage `ctrl`."""
    return stage(root, ctrl, settings, lm=lm, data=data)


@stage_function("ctrl", revision=1)
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
    """Stage: next-token training on texts, each behind the code of its label. The first token is learned as well,
    unless it is the one with which all texts of the model begin.

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
    first = not tokenizer.adds_bos
    made = vars(adapter) | dict(codes=codes, cond=cond, start=tokenizer.start if first else None)
    control = init(model, rng.stream(key, "init"), **made)
    control = fitting.like_words(control, model, params, rng.stream(key, "codes"))
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=("label",))
    control = fitting.train(
        run, control, loss(model, first=first), {"params": params}, batches, training.at(adapter.rate),
        trained=r"delta/changes/.*|codes", seed=seed,
    )  # fmt: skip
    fitting.keep(run, control, "ctrl", made)


def check_codes(records: list[dict[str, Any]], codes: int) -> None:
    """InputError unless every code has a record."""
    found = Counter(int(r["label"]) for r in records)
    for code in range(codes):
        if not found[code]:
            raise InputError(f"no text has the label {code}, so its code would learn nothing: set codes or where.")
