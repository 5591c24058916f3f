"""GeDi: a language model that reads the text under codes of classes, and Bayes' rule (Krause et al. 2020).

    S_c = Σ_j log p(x_j | x_<j, c),   l_c(v) = a (S_c + log p(v | x, c)) / (n + 1) + b_c
    z' = z + alpha log softmax_c(l(v))[wanted]

n is the number of tokens read so far, the prompt included. What follows is the paper's filter: of w = softmax(z'), the
tokens with the highest posterior of the wanted class stay until they have the mass `cover`, and so does every token
whose posterior is at least `tau`. The filter acts where alpha is above 0. alpha 0 is the base model; below 0 the wanted
class is avoided.

    control = methods.load(gedi.fit(root, lm=lm, data=data, words=("negative", "positive")), model)

All codes are copies of one stream: the base with a change of its weights, or a small model with the base's tokenizer
(the paper has GPT-2 Medium beside GPT-2 XL), read in one pass of C rows for each row of the batch. The codes of the
paper are words, and here vectors that begin as those words. Its setting `filter_p` is 1 - cover, and alpha is ω, 30 by
default. For detoxification the authors set a `bias` of 2 for the wanted class and a `tau` of .9673. Greedy decoding and
a repetition penalty of 1.2 follow, which are rules of their own here. prompt="skip" begins with S = 0 behind the
prompt, which is another method, and unembeds nothing of the prompt. The authors' codes for topics, a word for true or
false and a word for the topic, are left out: a class for each topic compares all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import rng
from ctg_jax.control import Chain, Control
from ctg_jax.controls.conditions import check_choice, gathered, per_row
from ctg_jax.controls.streams import Stream, check_vocabulary, heard, log_probabilities
from ctg_jax.controls.truncate import smallest_cover
from ctg_jax.controls.vectors import SoftPrompt, soft_prompt
from ctg_jax.data.ids import check_shared
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pretrain import small_lm
from ctg_jax.models.lengths import check_reads
from ctg_jax.models.lm import LM
from ctg_jax.models.record import of_record, record
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.support import remove
from ctg_jax.types import InputError, Prompts, Sum


@struct.dataclass
class Gedi(Control):
    """z + alpha log P(wanted | text so far, next token), and the filter.

    Attributes:
      reader: the class-conditional model in C copies, the c-th behind the code of class c.
      temper: float32 [], a. prior: float32 [C], b.
      bias: float32 [], added to l of the wanted class.
      alpha: float32 [] or, per row, [B]; 0 is the base model.
      cover: float32 [], the mass that the filter keeps at least; 1 keeps everything.
      tau: float32 [], the posterior from which a token is kept.
      mean: whether l divides by n + 1; False is Bayes' rule itself.
      skip: whether S begins behind the prompt.
      wanted: None, the last class, or the name of an int [B] entry of `prompts.cond`, the class of each row.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    selects = True

    reader: Stream
    temper: jax.Array
    prior: jax.Array
    bias: jax.Array
    alpha: jax.Array
    cover: jax.Array
    tau: jax.Array
    mean: bool = struct.field(pytree_node=False, default=True)
    skip: bool = struct.field(pytree_node=False, default=False)
    wanted: str | None = struct.field(pytree_node=False, default=None)
    cond: str | None = struct.field(pytree_node=False, default=None)

    def check(self, prompts):
        self.reader.check(prompts)
        if self.wanted is not None:
            check_choice(prompts, self.wanted, len(self.prior), "class")

    def init(self, prompts, length):
        rows, classes = prompts.tokens.shape[0], len(self.prior)
        each = jnp.eye(classes)
        one = jnp.tile(each[-1:], (rows, 1)) if self.wanted is None else gathered(each, prompts, self.wanted)
        heard = (jnp.zeros((rows, classes)), jnp.zeros(rows), None)
        return per_row(self.alpha, prompts, self.cond), one, heard, self.reader.init(prompts, length)

    def readers(self):
        return self.reader.readers("class-conditional model")

    def logits(self, z, h, tokens, mask, state):
        strength, one, (total, count, last), reading = state
        new, size = z.shape[1], z.shape[2]
        check_vocabulary("The class-conditional model", self.reader.lm.vocab, size, larger=True)
        whole = last is None and not self.skip
        r, _, reading = self.reader.read(tokens, mask, new, reading, everything=whole)
        r = r[..., :size]
        if last is not None:
            r = jnp.concatenate([last[:, :, None], r], axis=2)
        read = r.shape[2] - 1  # of how many of the last tokens the likelihood is known
        tokens, mask = (x[:, x.shape[1] - read :] for x in (tokens, mask))
        logp = jax.vmap(heard, in_axes=(1, None, None), out_axes=1)(r, tokens, mask)
        total = jnp.concatenate([total[..., None], total[..., None] + jnp.cumsum(logp, axis=2)], axis=2)
        count = jnp.concatenate([count[:, None], count[:, None] + jnp.cumsum(mask, axis=1)], axis=1)
        log_post = self.posterior(total[..., -new:], count[:, -new:], r[:, :, -new:], one)
        out = z + strength * log_post
        after = (strength, one, (total[..., -1], count[:, -1], r[:, :, -1]), reading)
        post, weight = jnp.exp(log_post), jax.nn.softmax(out, axis=-1)
        mass = jnp.broadcast_to(self.cover, (*out.shape[:-1], 1))
        keep = smallest_cover(weight, post, mass) | (self.cover >= 1) | (post >= self.tau) | ~(strength > 0)
        return remove(out, ~keep), after

    def posterior(self, total, count, r, one):
        """log P(wanted | …) float32 [B, M, V] of S [B, C, M], n [B, M], logits [B, C, M, V] and a choice [B, C]."""
        value = total[..., None] + log_probabilities(r)
        if self.mean:
            value = value / (count[:, None, :, None] + 1)
        value = self.temper * value + (self.prior[None] + self.bias * one)[:, :, None, None]
        return jnp.einsum("bcmv,bc->bmv", jax.nn.log_softmax(value, axis=1), one)


def init(
    lm: LM,
    key: jax.Array,
    *,
    codes: Sequence[int] = (2, 1),
    small: Mapping[str, Any] | None = None,
    adapter: Mapping[str, Any] | None = None,
    alpha: float = 30.0,
    filter: Mapping[str, float] | None = None,
    bias: float = 0.0,
    mean: bool = True,
    prompt: str = "read",
    wanted: str | None = None,
    cond: str | None = None,
) -> Gedi:
    """Random codes and a change of weights that is zero.

    Args:
      codes: C, the number of classes, and the number of vectors of each code.
      small: the fields of a decoder that reads along; None: the base model.
      adapter: settings of `learn.fitting.delta`.
      alpha, bias, mean, wanted, cond: see `Gedi`.
      filter: `cover` and `tau`; by default 0.2 and 0.8.
      prompt: "read", or "skip" for S = 0 behind the prompt.

    Raises:
      InputError: fewer than two classes, no vector, alpha or bias that is not finite, another `prompt`, a filter with
        other names or numbers outside 0 … 1, a small model with fewer tokens than the base.
    """
    classes, vectors = codes
    if classes < 2:
        raise InputError(f"codes is {tuple(codes)}, expected at least 2 classes.")
    for name, value in (("alpha", alpha), ("bias", bias)):
        if not isinstance(value, jax.Array) and not np.all(np.isfinite(value)):
            raise InputError(f"{name} is {value}, expected a finite number.")
    if prompt not in ("read", "skip"):
        raise InputError(f"prompt is {prompt!r}, expected 'read' or 'skip'.")
    limits = {"cover": 0.2, "tau": 0.8} | dict(filter or {})
    if len(limits) > 2 or not all(0 <= x <= 1 for x in limits.values()):
        raise InputError(f"filter is {dict(filter or {})}, expected cover and tau, numbers from 0 to 1.")
    reader = lm if small is None else of_record(small)
    check_vocabulary("The small model", reader.vocab, lm.vocab, larger=True)
    a, b, c = jax.random.split(key, 3)
    behind = SoftPrompt(soft_prompt(b, vectors, reader.width, choices=classes), choice="copy")
    change = Chain((fitting.delta(reader, c, **(adapter or {})), behind))
    stream = Stream(None if small is None else reader.init(a), change, lm=reader, copies=classes)
    given = (1.0, np.zeros(classes), bias, alpha, limits["cover"], limits["tau"])
    numbers = (jnp.asarray(x, jnp.float32) for x in given)
    return Gedi(stream, *numbers, mean, prompt == "skip", wanted, cond)


def example(lm: LM, key: jax.Array) -> Gedi:
    """Two random codes that a random change of weights reads, for the laws."""
    a, b = jax.random.split(key)
    control = init(lm, a, adapter={"rank": 2}, alpha=2.0, filter={"cover": 0.6})
    codes = SoftPrompt(soft_prompt(b, 1, lm.width, choices=2, deviation=1.0), choice="copy")
    return control.replace(reader=control.reader.replace(control=Chain((fitting.example_delta(lm, b), codes))))


def neutral(control: Gedi) -> Gedi:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))


def loss(lm: LM, *, balance: float = 0.8) -> losses.LossFn:
    """balance · m_label + (1 - balance) · cross-entropy of softmax_c(b_c - a m_c) and the label, the mean over texts.

    m_c is the mean negative log-likelihood of a token under the code of class c, the first token included. params is
    the control, frozen = {"params": those of `lm`, the base}; the batch has `label` int [B]. `Gedi.mean` = False has no
    part in it.

    Raises:
      InputError: balance outside 0 … 1.
    """
    if not 0 <= balance <= 1:
        raise InputError(f"balance is {balance}, expected a number from 0 to 1.")

    def total(params, frozen, batch, keys):
        tokens, mask, label = batch["tokens"], batch["mask"], batch["label"].astype(jnp.int32)
        length = tokens.shape[1]
        stream = params.reader.bind(frozen["params"], frozen["params"])
        check_reads(stream.lm, length, f"The rows of training have {length} tokens", stream.control)
        reading = stream.init(Prompts(tokens, mask, keys), length + 1)
        z, _, _ = stream.read(tokens, mask, length, reading, everything=True)
        logp = jax.vmap(heard, in_axes=(1, None, None), out_axes=1)(z, tokens, mask)
        nats = -jnp.sum(logp, axis=2) / jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None]
        own, apart, right = terms(nats, label, params.temper, params.prior)
        weight = jnp.float32(len(label))
        parts = {"generative": own, "discriminative": apart, "accuracy": right}
        value = jnp.sum(balance * own + (1 - balance) * apart)
        return Sum(value, weight, {name: (jnp.sum(x), weight) for name, x in parts.items()})

    return total


def terms(nats: jax.Array, label: jax.Array, temper: jax.Array, prior: jax.Array) -> tuple[jax.Array, ...]:
    """The generative and the discriminative loss float32 [B] of m [B, C], and whether the label is the likeliest."""
    scores = prior[None] - temper * nats
    own = jnp.take_along_axis(nats, label[:, None], axis=1)[:, 0]
    return own, losses.next_token(scores, label), (jnp.argmax(scores, axis=1) == label).astype(jnp.float32)


def fit(root, *, lm: Artifact, data: Artifact, small: Mapping[str, Any] | None = None, **settings: Any) -> Artifact:
    """Trains codes and reader on the labelled records of `data`.

    Args:
      small: the model that reads along, see `ctg_jax.learn.pretrain.small_lm`; None: a change of `lm`.
      settings: of the stage `gedi`.
    """
    if small is None:
        return stage(root, gedi, settings, lm=lm, data=data)
    reader = small_lm(root, small, lm=lm, data=data)
    return stage(root, gedi, settings, lm=lm, data=data, small=reader)


@stage_function("gedi")
def gedi(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    small: Artifact | None = None,
    words: Sequence[str] = ("negative", "positive"),
    vectors: int = 1,
    control: Mapping[str, Any] | None = None,
    balance: float = 0.8,
    adapter: Adapter = Adapter(),
    training: Training = Training(steps=300, batch=16, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: trains the codes, the change of weights, a and b on labelled texts.

    Args:
      lm, data: an LM artifact and records with a `label` from 0 on; those without one are left out and counted in a
        warning. small: the model that reads along, or None.
      words: a word for each class, with whose embeddings its code begins. vectors: of each code.
      control: the other settings of `init`, such as alpha and filter.
      balance: of the loss. adapter: the change of weights. training: how it is trained.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: a label that no word is for, a word for a class without a text, and what `init` and training raise.
    """
    records = labelled(data.rows("data.jsonl"), str(data.path), classes=len(words))
    if missing := set(range(len(words))) - {int(r["label"]) for r in records}:
        raise InputError(f"No text has the label {min(missing)}, the class of {words[min(missing)]!r}: set words.")
    model, params, tokenizer = open_lm(lm)
    made = fitting.divided(control or {}, init)[0] | dict(codes=(len(words), vectors), adapter=vars(adapter))
    reader, weights = model, params
    if small is not None:
        reader, weights, theirs = open_lm(small)
        check_shared(tokenizer, theirs, reader.vocab, small.path.name)
        made["small"] = record(reader)
    learner = init(model, rng.stream(jax.random.key(seed), "init"), **made)
    change, codes = learner.reader.control.parts
    ids = tokenizer.encode_after(["a"] * len(words), [f" {word}" for word in words])
    begin = np.asarray([[row[i % len(row)] for i in range(codes.added())] for row in ids])
    codes = codes.replace(vectors=reader.embed(weights, jnp.asarray(begin)).astype(jnp.float32))
    own = None if small is None else weights
    learner = learner.replace(reader=learner.reader.replace(params=own, control=Chain((change, codes))))
    source = Source(str(data.path), "", records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=("label",))
    learner = fitting.train(
        run, learner, loss(model, balance=balance), {"params": params}, batches, training.at(adapter.rate),
        trained=r"reader/control/.*(changes/.*|vectors)|temper|prior", seed=seed,
    )  # fmt: skip
    fitting.keep(run, learner, "gedi", made)
