"""DisCup: a soft prompt that learns which of the model's own likely tokens a discriminator prefers (Zhang & Song 2022).

Texts are read without the prompt, and the `top` likeliest next tokens of the frozen model at every position are the
candidates. With D(v) the discriminator's probability of the wanted attribute after the text and candidate v, the model
behind the soft prompt, q, learns from

    loss = -Σ_v softmax(D / tau)_v log q(v) - unlikely Σ_v softmax((1 - D) / tau)_v log(1 - q(v))

so that it moves towards good candidates and away from bad ones, and never towards tokens that the model would not
write. The softmax runs over the candidates; in the authors' code ("whole") over all tokens, of which the others count
as 0, so that they keep weight where tau is large.

D is a head on the states of the frozen model with an output for every next token (`learn.next_classifier`), in place of
the authors' tuned model, so all candidates cost one product. Their prompt vectors come from a recurrent network; here
they are learned directly. The result is a plain soft prompt, without a strength, whose decoding costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax import rng
from ctg_jax.control import Control
from ctg_jax.controls.truncate import largest
from ctg_jax.controls.vectors import SoftPrompt, soft_prompt
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.decode.reading import read
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.learn.next_classifier import head, log_odds, next_classifier
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.support import REMOVED
from ctg_jax.types import InputError, Prompts, Sum

OVER = ("candidates", "whole")


@struct.dataclass
class Odds(Control):
    """The discriminator's log-odds in place of the logits, for the loss."""

    value: dict[str, jax.Array]

    def logits(self, z, h, tokens, mask, state):
        return log_odds(self.value, h[:, h.shape[1] - z.shape[1] :]), state


def init(lm: LM, key: jax.Array, *, vectors: int = 12) -> SoftPrompt:
    """A soft prompt of this many random vectors; InputError where they are fewer than 1."""
    return SoftPrompt(soft_prompt(key, vectors, lm.width))


def example(lm: LM, key: jax.Array) -> SoftPrompt:
    """Two vectors, large enough to change what the model writes, for the laws."""
    return SoftPrompt(soft_prompt(key, 2, lm.width, deviation=1.0))


def neutral(control: SoftPrompt) -> None:
    """A soft prompt has no neutral element."""


def loss(
    lm: LM, *, top: int = 50, tau: float = 0.01, unlikely: float = 1.0, over: str = "candidates", target: int = 1
) -> losses.LossFn:
    """The loss above, per token. params is the soft prompt, frozen = {"params": LM parameters, "value": the head of the
    discriminator}.

    Args:
      top: how many candidates; those that tie with the last count too (authors: 50, for one script 110).
      tau: the temperature of the weights. unlikely: the weight of the second term.
      over: "candidates" or "whole".
      target: 1 for texts with the attribute, 0 for texts without it.

    Raises:
      InputError: top below 1 or above the vocabulary, tau that is not above 0, unknown `over` or target.
    """
    if not 1 <= top <= lm.vocab:
        raise InputError(f"top is {top}, expected from 1 to {lm.vocab} candidates.")
    if not tau > 0 or not unlikely >= 0:
        raise InputError(f"tau is {tau} and unlikely {unlikely}, expected above 0 and at least 0.")
    if over not in OVER:
        raise InputError(f"over is {over!r}, expected 'candidates' or 'whole'.")
    if target not in (0, 1):
        raise InputError(f"target is {target}, expected 0 or 1.")

    def terms(z, base, odds, targets):
        logq = jax.nn.log_softmax(z, axis=-1)
        kept = base >= largest(base, top)
        liked = jax.nn.sigmoid(odds if target else -odds)
        others = 0.0 if over == "whole" else REMOVED
        good, bad = (jax.nn.softmax(jnp.where(kept, x / tau, others), axis=-1) for x in (liked, 1 - liked))
        less = jnp.log(-jnp.expm1(jnp.minimum(logq, -1e-6)))
        towards, away = -jnp.sum(good * logq, axis=-1), -jnp.sum(bad * less, axis=-1)
        return {"towards": towards, "away": away, "liked": jnp.sum(jnp.exp(logq) * kept * liked, axis=-1)}

    def total(params, frozen, batch, keys):
        losses.check_rows(lm, batch["tokens"].shape[1], params)
        targets, mask = losses.predicted(batch)
        prompts = Prompts(batch["tokens"][:, :1], batch["mask"][:, :1], keys, None)
        base = read(lm, frozen["params"], prompts, targets)
        texts = (
            read(lm, frozen["params"], prompts, targets, params),
            base,
            read(lm, frozen["params"], prompts, targets, Odds(frozen["value"])),
        )
        found = {name: losses.masked_sum(x, mask) for name, x in reduced(texts, terms, targets).items()}
        value = found["towards"][0] + unlikely * found["away"][0]
        return Sum(value, found["towards"][1], found)

    return total


def fit(
    root, *, lm: Artifact, data: Artifact, discriminator: Mapping[str, Any] | None = None, **settings: Any
) -> Artifact:
    """A discriminator, and the soft prompt that is distilled from it.

    Args:
      lm, data: an LM artifact and records with `text` and a `label`, 0 or 1.
      discriminator: settings of the stage `next_classifier`.
      settings: of the stage `discup`.
    """
    judge = stage(root, next_classifier, discriminator or {}, lm=lm, data=data)
    return stage(root, discup, settings, lm=lm, data=data, discriminator=judge)


@stage_function("discup")
def discup(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    discriminator: Artifact,
    where: Mapping[str, Any] | None = None,
    vectors: int = 12,
    objective: Mapping[str, Any] | None = None,
    training: Training = Training(steps=300, batch=16, rate=1e-2, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: distils a discriminator into a soft prompt, on the texts of `data`.

    Args:
      where: the fields of the records that are read, such as {"label": 1}; None: all records.
      vectors: of the soft prompt, which begins as the embeddings of random tokens.
      objective: settings of `loss`. training: how it is trained.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: no record matches, and what `init`, `loss` and training raise.
    """
    records = fitting.matching(data, where)
    model, params, tokenizer = open_lm(lm)
    options, key = fitting.divided(objective or {}, loss)[0], jax.random.key(seed)
    ids = jax.random.randint(rng.stream(key, "tokens"), (1, vectors), 0, model.vocab)
    control = init(model, key, vectors=vectors).replace(vectors=model.embed(params, ids)[0].astype(jnp.float32))
    value = discriminator.load(jax.eval_shape(lambda: head(model)))
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed)
    frozen = {"params": params, "value": value}
    control = fitting.train(
        run, control, loss(model, **options), frozen, batches, training, trained="vectors", seed=seed
    )  # fmt: skip
    fitting.keep(run, control, "discup", {"vectors": vectors})
