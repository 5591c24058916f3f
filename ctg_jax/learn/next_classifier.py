"""A classifier of what a text becomes with each possible next token: a linear head on the final hidden state.

FUDGE (Yang & Klein 2021) learns P(attribute | prefix) from every prefix of labelled texts and reads each
candidate token by itself. Here the state before a token has one output for each token of the vocabulary, which is
trained on the token that follows, so that all candidates cost one matrix product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax.data.labels import of_all_classes
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.models.heads import linear_head
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage_function
from ctg_jax.types import Sum


def head(lm: LM) -> dict[str, jax.Array]:
    """A head that gives every text the probability ½: kernel float32 [V, D], bias float32 [V]."""
    return linear_head(lm.vocab, lm.width)


def log_odds(value: dict[str, jax.Array], states: jax.Array) -> jax.Array:
    """The log-odds float32 [B, M, V] of the attribute after each next token, given the final states [B, M, D]."""
    return jnp.einsum("bmd,vd->bmv", states.astype(jnp.float32), value["kernel"]) + value["bias"][None, None]


def loss(lm: LM) -> losses.LossFn:
    """Binary cross-entropy of the label, the field `label` [B] of the batch, at every token after the first. The
    parameters are those of `head`, and frozen = {"params": LM parameters}."""

    def cross_entropy(params: Any, frozen: Any, batch: dict[str, Any], keys: jax.Array) -> Sum:
        targets, mask = losses.predicted(batch)
        tokens, seen = batch["tokens"][:, :-1], batch["mask"][:, :-1]
        losses.check_rows(lm, batch["tokens"].shape[1])
        states = lm.apply(frozen["params"], lm.embed(frozen["params"], tokens), seen, last=1).hidden
        states = jax.lax.stop_gradient(states).astype(jnp.float32)
        odds = jnp.einsum("btd,btd->bt", states, params["kernel"][targets]) + params["bias"][targets]
        sign = 2.0 * batch["label"].astype(jnp.float32)[:, None] - 1.0
        total, weight = losses.masked_sum(-jax.nn.log_sigmoid(sign * odds), mask)
        right, _ = losses.masked_sum(sign * odds > 0, mask)
        return Sum(total=total, weight=weight, metrics={"accuracy": (right, weight)})

    return cross_entropy


@stage_function("next_classifier")
def next_classifier(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    training: Training = Training(steps=300, batch=16, rate=1e-2, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: trains a `head` on the records of `data`, which have `text` and a `label`, 0 or 1.

    Args:
      lm, data: an LM artifact and a data artifact; records without a label are left out and counted in a warning.
      training: how it is trained. seed: of the order of texts.

    Raises:
      InputError: a label that is neither 0 nor 1, or no text of one of the two, and what training raises.
    """
    model, params, tokenizer = open_lm(lm)
    source = Source(str(data.path), "", of_all_classes(data.rows("data.jsonl"), str(data.path), 2))
    batches = pipeline(
        source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=("label",)
    )  # fmt: skip
    learned = fitting.train(run, head(model), loss(model), {"params": params}, batches, training, seed=seed)
    checkpoint.save(run.path / "state", learned)
    run.discard("steps")
