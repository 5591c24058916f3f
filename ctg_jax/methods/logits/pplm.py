"""PPLM: keys and values of the past move up the gradient of an attribute before each token (Dathathri et al. 2020).

The last token is read again with a change Δ of the keys and values before it. From Δ = 0, in `steps` turns,

    Δ ← Δ - rate · g / ‖g‖^power,    g = ∇_Δ [loss + kl · KL(p_Δ ‖ p)]

with a norm for each layer and row. The loss of a bag of words is -log of the probability of its words, summed over
bags; that of a classifier is the cross-entropy of a class, given the mean of the final states of the text so far, the
changed one and that of the expected next token (`horizon`). The changed keys and values stay in the cache of a stream
of the base model, and the token is drawn from

    log P = alpha log p_Δ + (1 - alpha) log p + const

    control = pplm.make(lm, key, tokenizer=tokenizer, words=[["space", "rocket", "orbit"]])

alpha 0.9 is the authors' fusion and 0 the base model; they cut to the 10 likeliest tokens after it. Unlike in their
code, norms are those of one row, so that a row does not depend on its batch, and a window holds the newest positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ctg_jax.control import Control
from ctg_jax.controls.conditions import check_choice, condition, per_row
from ctg_jax.controls.constraints import marks
from ctg_jax.controls.streams import Reading, Stream, check_vocabulary, log_probabilities
from ctg_jax.data.labels import of_all_classes
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.models.heads import class_log_probabilities, linear_head
from ctg_jax.models.lm import LM, Cache
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.support import REMOVED, removed
from ctg_jax.types import InputError, Sum

LEAST = 1e-12  # a gradient whose norm is below this moves nothing


@struct.dataclass
class Pplm(Control):
    """A base model whose past moves towards an attribute before every token.

    Attributes:
      reader: the base model, whose cache holds the changed keys and values.
      member: float32 [K, V], at least ½ where a token belongs to a bag of words; None: a classifier.
      value: {"kernel" [C, D], "bias" [C]}, the classifier of mean states; None: bags of words.
      rate: float32 [], the size of a step.
      power: float32 [], of the norm; 1.5 for bags and 1 for a classifier in the authors' code.
      kl: float32 [], the weight of the KL to the base.
      alpha: float32 [] or, per row, [B], the weight of p_Δ; 0 is the base model.
      target: the class that is wanted.
      steps: of the ascent.
      window: how many of the newest positions change; 0: all.
      horizon: how many expected tokens the classifier reads, 0 or 1.
      choice: None, or the name of the int [B] entry of `prompts.cond` that picks the bag or the class of each row.
    """

    reader: Stream
    member: jax.Array | None
    value: dict[str, jax.Array] | None
    rate: jax.Array
    power: jax.Array
    kl: jax.Array
    alpha: jax.Array
    target: int = struct.field(pytree_node=False, default=1)
    steps: int = struct.field(pytree_node=False, default=3)
    window: int = struct.field(pytree_node=False, default=0)
    horizon: int = struct.field(pytree_node=False, default=1)
    choice: str | None = struct.field(pytree_node=False, default=None)

    def check(self, prompts):
        if self.choice is not None:
            kind, count = ("class", len(self.value["bias"])) if self.member is None else ("bag", len(self.member))
            check_choice(prompts, self.choice, count, kind)

    def readers(self):
        return self.reader.readers("PPLM's reader")

    def init(self, prompts, length):
        rows = len(prompts.keys)
        picked = None if self.choice is None else condition(prompts, self.choice)
        sums = jnp.zeros((rows, self.reader.lm.width), jnp.float32), jnp.zeros(rows, jnp.float32)
        return per_row(self.alpha, prompts, None), self.reader.init(prompts, length), picked, sums

    def logits(self, z, h, tokens, mask, state):
        strength, reading, picked, (total, count) = state
        m, lm, params = z.shape[1], self.reader.lm, self.reader.params
        check_vocabulary("PPLM's reader", lm.vocab, z.shape[-1])
        cache, old = reading.cache, tokens.shape[1] - m
        if not reading.started and old:
            x = lm.embed(params, tokens[:, :old])
            cache = lm.apply(params, x, mask[:, :old], cache, last=0).cache
            before = h[:, h.shape[1] - m - old : h.shape[1] - m].astype(jnp.float32)
            total = total + jnp.einsum("bt,btd->bd", mask[:, :old].astype(jnp.float32), before)
            count = count + jnp.sum(mask[:, :old], axis=1, dtype=jnp.float32)

        def step(carry, new):
            cache, total, count = carry
            token, real, now, hidden = new
            x, real = lm.embed(params, token[:, None]), real[:, None]
            logp = log_probabilities(now)
            cache = self._moved(cache, x, real, lax.stop_gradient(logp), picked, (total, count))
            out = lm.apply(params, x, real, cache, last=1)
            total = total + real * hidden.astype(jnp.float32)
            found = jax.nn.log_softmax(out.logits[:, 0], axis=-1) - logp
            return (out.cache, total, count + real[:, 0]), found

        last = (tokens[:, old:], mask[:, old:], z, h[:, h.shape[1] - m :])
        (cache, total, count), found = lax.scan(
            step, (cache, total, count), jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), last)
        )
        reading = Reading(cache, reading.state, None, True)
        return z + strength * jnp.moveaxis(found, 0, 1), (strength, reading, picked, (total, count))

    def _moved(self, cache: Cache, x, real, logp, picked, sums) -> Cache:
        """The cache with its keys and values changed, for the token that is embedded in x [B, 1, D]."""
        lm, held = self.reader.lm, cache.mask
        if self.window:
            held = held & (jnp.sum(held, axis=1, keepdims=True) - jnp.cumsum(held, axis=1) < self.window)
        held = held[:, None, :, None]
        params, control = lax.stop_gradient((self.reader.params, self.replace(reader=None)))
        cache, sums = lax.stop_gradient((cache, sums))
        plain = None
        if self.member is None and self.horizon:
            plain = lm.apply(params, x, real, cache, last=0).cache

        def loss(change):
            out = lm.apply(params, x, real, shifted(cache, change), last=1)
            found = jax.nn.log_softmax(out.logits[:, 0], axis=-1)
            kept = ~removed(logp)
            away = jnp.sum(jnp.where(kept, jnp.exp(found) * (found - jnp.where(kept, logp, 0.0)), 0.0), axis=-1)
            if self.member is not None:
                return jnp.sum(control.bags(found, picked) + control.kl * away)
            total, count = sums[0] + out.hidden[:, -1].astype(jnp.float32), sums[1] + 1
            if self.horizon:
                words = lm.embed(params, jnp.arange(lm.vocab)[None])[0]
                expected = jnp.einsum("bv,vd->bd", jnp.exp(found).astype(words.dtype), words)
                ahead = lm.apply(params, expected[:, None], real, plain, last=0).hidden[:, -1]
                total, count = total + ahead.astype(jnp.float32), count + 1
            classes_logp = class_log_probabilities(control.value, total / count[:, None])
            wanted = jnp.full(len(classes_logp), self.target) if picked is None else picked
            own = jnp.take_along_axis(classes_logp, wanted[:, None], axis=1)[:, 0]
            return jnp.sum(control.kl * away - own)

        def turn(_, change):
            slope = jax.tree.map(lambda g: jnp.where(held, g, 0.0), jax.grad(loss)(change))
            return jax.tree.map(lambda d, g: d - control.rate * g, change, scaled(slope, control.power))

        pairs = tuple(zip(cache.k, cache.v))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), pairs)
        change = lax.stop_gradient(lax.fori_loop(0, self.steps, turn, zero))
        return shifted(cache, change)

    def bags(self, logp: jax.Array, picked: jax.Array | None) -> jax.Array:
        """float32 [B]: -log of the probability of a bag under logp [B, V], summed over bags where none is picked."""
        inside = jnp.where(self.member[None] >= 0.5, logp[:, None], REMOVED)
        nats = -jax.nn.logsumexp(inside, axis=-1)
        return jnp.sum(nats, axis=1) if picked is None else jnp.take_along_axis(nats, picked[:, None], axis=1)[:, 0]


Change = tuple[tuple[jax.Array, jax.Array], ...]  # of the keys and values of each layer


def shifted(cache: Cache, change: Change) -> Cache:
    """The cache with the change added to its keys and values."""
    k, v = zip(*change)
    more = lambda old, new: tuple(a + b.astype(a.dtype) for a, b in zip(old, new))  # noqa: E731
    return cache.replace(k=more(cache.k, k), v=more(cache.v, v))


def scaled(slope: Change, power: jax.Array) -> Change:
    """g / ‖g‖^power with a norm for each layer and row, over keys and values."""
    found = []
    for k, v in slope:
        square = sum(jnp.sum(jnp.square(g), axis=(1, 2, 3), keepdims=True) for g in (k, v))
        some = square > LEAST**2
        factor = jnp.where(some, jnp.where(some, square, 1.0) ** (-power / 2), 0.0)
        found.append((k * factor, v * factor))
    return tuple(found)


def init(
    lm: LM,
    key: jax.Array,
    *,
    words: Sequence[Sequence[str]] | None = None,
    sets: Sequence[Sequence[int]] | None = None,
    classes: int | None = None,
    target: int = 1,
    steps: int = 3,
    rate: float = 0.03,
    power: float | None = None,
    kl: float = 0.01,
    alpha: float = 0.9,
    options: Mapping[str, Any] | None = None,
) -> Pplm:
    """The control of bags of token ids, or of a classifier that gives every class the same probability.

    Args:
      words: bags of words, which `make` turns into tokens; or sets: of token ids; or classes: C, of a classifier.
      target: the class wanted.
      power: None: 1.5 for bags, 1 for a classifier.
      steps, rate, kl, alpha: see `Pplm`.
      options: window (0), horizon (1), choice (None); see `Pplm`.

    Raises:
      InputError: not exactly one of words, sets and classes; a number out of its range; an id outside the vocabulary.
    """
    if sum(x is not None for x in (words, sets, classes)) != 1:
        raise InputError("pplm needs exactly one of words, sets and classes.")
    more = {"window": 0, "horizon": 1, "choice": None} | dict(options or {})
    if unknown := set(more) - {"window", "horizon", "choice"}:
        raise InputError(f"options hold {min(unknown)!r}, expected window, horizon or choice.")
    if steps < 0 or more["window"] < 0 or more["horizon"] not in (0, 1):
        raise InputError(f"steps is {steps} and options are {more}: expected at least 0, and a horizon of 0 or 1.")
    if classes is not None and not 0 <= target < classes:
        raise InputError(f"target is {target}, expected a class from 0 to {classes - 1}.")
    power = (1.0 if words is None and sets is None else 1.5) if power is None else power
    for name, number in (("rate", rate), ("power", power), ("kl", kl), ("alpha", alpha)):
        if not isinstance(number, jax.Array) and not (np.all(np.isfinite(number)) and np.all(np.asarray(number) >= 0)):
            raise InputError(f"{name} is {number}, expected a finite number of at least 0.")
    bags = words if sets is None else sets
    if bags is not None and not len(bags):
        raise InputError("There is no bag of words: give at least one.")
    member = value = None
    if sets is not None:
        member = jnp.asarray(np.asarray([marks(ids, lm.vocab) for ids in sets]), jnp.float32)
    elif words is not None:
        member = jnp.zeros((len(words), lm.vocab))
    else:
        value = linear_head(classes, lm.width)
    numbers = (jnp.asarray(x, jnp.float32) for x in (rate, power, kl, alpha))
    return Pplm(Stream(lm=lm, of="current"), member, value, *numbers, target, steps, **more)


def make(lm: LM, key: jax.Array, *, tokenizer: Tokenizer, **settings: Any) -> Pplm:
    """`init` with the tokens of the words: those words that are one token, behind a space or at the start of a text.

    Raises:
      InputError: a classifier, which has to be fitted; a bag without such a word; and what `init` raises.
    """
    control = init(lm, key, **settings)
    if control.member is None:
        raise InputError("The classifier of PPLM has to be fitted: give the settings as fit, or give words or sets.")
    if settings.get("words") is None:
        return control
    rows = []
    for words in settings["words"]:
        rows.append(np.zeros(lm.vocab, bool))
        spelled = tokenizer.encode(list(words)) + tokenizer.encode_after(["a"] * len(words), [f" {w}" for w in words])
        rows[-1][[ids[0] for ids in spelled if len(ids) == 1]] = True
        if not rows[-1].any():
            raise InputError(f"No word of the bag {list(words)[:3]} … is one token: give other words.")
    return control.replace(member=jnp.asarray(np.asarray(rows), jnp.float32))


def loss(lm: LM) -> losses.LossFn:
    """Cross-entropy of the field `label` [B] of the batch, given the mean of the final states of the text. The trained
    parameters are the control's, frozen = {"params": LM parameters}."""

    def total(params: Pplm, frozen: Any, batch: dict[str, Any], keys: jax.Array) -> Sum:
        tokens, mask = batch["tokens"], batch["mask"]
        losses.check_rows(lm, tokens.shape[1])
        states = lm.apply(frozen["params"], lm.embed(frozen["params"], tokens), mask, last=0).hidden
        weight = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        mean = jnp.einsum("bt,btd->bd", weight, lax.stop_gradient(states).astype(jnp.float32))
        classes_logp = class_log_probabilities(params.value, mean)
        own, rows = jnp.take_along_axis(classes_logp, batch["label"][:, None], axis=1)[:, 0], jnp.float32(len(mean))
        right = jnp.sum(jnp.argmax(classes_logp, axis=1) == batch["label"], dtype=jnp.float32)
        return Sum(-jnp.sum(own), rows, {"accuracy": (right, rows)})

    return total


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """Trains the classifier on labelled texts; settings of the stage `pplm`."""
    return stage(root, pplm, settings, lm=lm, data=data)


@stage_function("pplm")
def pplm(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    classes: int = 2,
    control: Mapping[str, Any] | None = None,
    training: Training = Training(steps=300, batch=16, rate=1e-3, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: a linear classifier of the mean final state of a text.

    Args:
      lm, data: an LM artifact and records with a `label` from 0 to classes - 1.
      control: the other settings of `init`; steps is 10 by default here, as in the paper.
      training: how it is trained.
      seed: of the order of texts.

    Raises:
      InputError: a label that is no class, a class without a text, and what `init` and training raise.
    """
    records = of_all_classes(data.rows("data.jsonl"), str(data.path), classes)
    model, params, tokenizer = open_lm(lm)
    made = {"steps": 10, **fitting.divided(control or {}, init)[0], "classes": classes}
    learner = init(model, jax.random.key(seed), **made)
    source = Source(str(data.path), "", records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=("label",))
    frozen = {"params": params}
    learner = fitting.train(run, learner, loss(model), frozen, batches, training, trained="value/.*", seed=seed)
    fitting.keep(run, learner, "pplm", made)


def example(lm: LM, key: jax.Array) -> Pplm:
    """A bag of half the vocabulary, for the laws."""
    return init(lm, key, sets=(range(lm.vocab // 2),), rate=0.3, power=1.0, steps=2)


def neutral(control: Pplm) -> Pplm:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))
