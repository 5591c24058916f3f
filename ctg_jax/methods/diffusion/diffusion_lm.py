"""Diffusion-LM: continuous diffusion over learned word vectors, controlled by gradients (Li et al. 2022), in place of
the decode loop.

The rows of a text have one length, that of training; what follows the end of a text is end tokens. Tokens may be given
anywhere: the network is told their vectors without noise. Every step of the sampler is followed by a few updates of the
noisy vectors against an energy, the sum of those of the controls that a row asks for:

  label, …  a field of the records, by a classifier of noisy vectors (semantic content)
  length    tokens before the end token, exactly: end tokens from there on and none before
  tags      a part of speech for each place, or for a span with -1 elsewhere; see `ctg_jax.data.tags`
  words     tokens that are given behind the prompt, -1 where they are not (infilling); these are kept, not guided

They come from `target`, the same for all rows, or from the entries of these names in `prompts.cond`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import methods, rng
from ctg_jax.controls import constraints
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.data.tags import TAGS, tag_table
from ctg_jax.decode import strategies
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training, keep, matching
from ctg_jax.models import samplers, word_diffusion
from ctg_jax.models.denoiser import Trunk
from ctg_jax.models.lm import LM
from ctg_jax.models.word_diffusion import How, WordNet, vectors
from ctg_jax.run import stage
from ctg_jax.run.stage import Artifact, Run, open_lm
from ctg_jax.types import InputError, Params, Prompts, Samples, Sum

PLACES = ("length", "tags", "words")  # the controls that need no classifier


@dataclasses.dataclass(frozen=True)
class WordVectorDiffusion(strategies.Strategy):
    """Denoises the word vectors of whole rows; the language model and its parameters are not read.

    A row ends with its first end token or stop sequence. `Samples.logp` is 0, because the probability of a text has no
    closed form; `generated` is the number of calls of the network. Rounding takes the nearest word, so `greedy` changes
    nothing.
    """

    likelihood = False

    def check(self, lm, prompts, control, sampling):
        """
        Raises:
          InputError: prompts and `max_new` that do not fit a row of training, entries of `prompts.cond` that are no
            control or have another shape or value, a control of another vocabulary.
        """
        control = constraints.apart(control)[1]
        batch, new = len(prompts.tokens), sampling.max_new
        if lm.vocab != len(control.tags):
            raise InputError(
                f"control has {len(control.tags)} tokens and the model {lm.vocab}: use the one it was fitted on."
            )
        strategies.check_row(prompts, new, control.length)
        size, fields = np.asarray(prompts.mask).sum(1), dict(control.fields)
        for name in prompts.cond or {}:
            if name not in fields and name not in PLACES:
                raise InputError(f"cond names {name!r}, expected one of {', '.join([*fields, *PLACES])}.")
        for name, value in _asked(control, prompts).items():
            value, many = np.asarray(value), int(name in ("tags", "words"))
            if value.shape[:1] != (batch,) or value.ndim != 1 + many or (many and value.shape[1] > new):
                wanted = f"[{batch}, up to {new}]" if many else f"[{batch}]"
                raise InputError(f"{name} has shape {value.shape}, expected {wanted}.")
            limit = {"length": int((control.length - size).min()) - 1, "tags": len(TAGS) - 1, "words": lm.vocab - 1}
            most = limit[name] if name in limit else fields[name] - 1
            if value.max(initial=-1) > most or value.min(initial=-1) < -1:
                raise InputError(f"{name} is {value.max()} or {value.min()} somewhere, expected -1 (none) to {most}.")

    def __call__(self, lm, params, prompts, control, sampling):
        banned, control = constraints.apart(control)
        return _write(prompts, control, sampling, banned)


@struct.dataclass
class WordDiffusion:
    """A diffusion model over word vectors, how it samples, and what it is steered to.

    Attributes:
      params: {"raw": [V, d], see `vectors`; "net": those of `net`}. guide: parameters of `reader`, or {}.
      tags: int32 [V], the tag of every token.
      scale: float32 [] or, per row, [B]: what the energy counts. At 0 nothing is steered.
      net: says which words the noisy vectors are. reader: classifies noisy ones; None where no classifier was fitted.
      eos: what fills a row after its text. length: S, tokens of a row.
      fields: (name, classes) of what `reader` was fitted to say. target: (control, value) for all rows.
    """

    strategy: ClassVar = WordVectorDiffusion()

    params: Params
    guide: Params
    tags: jax.Array
    scale: jax.Array
    net: WordNet = struct.field(pytree_node=False)
    reader: WordNet | None = struct.field(pytree_node=False)
    eos: int = struct.field(pytree_node=False)
    length: int = struct.field(pytree_node=False)
    fields: tuple = struct.field(pytree_node=False, default=())
    target: tuple = struct.field(pytree_node=False, default=())
    how: How = struct.field(pytree_node=False, default=How())


def init(
    lm: LM,
    key: jax.Array,
    *,
    dim: int = 16,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    length: int = 48,
    eos: int = 0,
    fields: Mapping[str, int] | None = None,
    reader_width: int = 64,
    reader_depth: int = 2,
    target: Mapping[str, Any] | None = None,
    **how: Any,
) -> WordDiffusion:
    """A model that has learned nothing; all tags are 0.

    Args:
      lm: gives the vocabulary.
      dim: d, of the word vectors. width, depth, heads: of the network. length: S. eos: fills a row after its text.
      fields: name -> classes of what the classifier says; None: no classifier. reader_width, reader_depth: of it.
      target: control -> value, see the head of this file; tags may be names of `TAGS`, with None where any will do.
      how: of `How`.

    Raises:
      InputError: sizes that do not fit each other, a control that there is not, a value that it cannot have.
    """
    fields, target = dict(fields or {}), dict(target or {})
    for name, classes in fields.items():
        if name in PLACES or classes < 2:
            raise InputError(
                f"fields is {fields}, expected names other than {', '.join(PLACES)}, of 2 classes or more."
            )
    trunk = Trunk(width=width, depth=depth, heads=heads, positions=length)
    net = WordNet(trunk, dim, lm.vocab)
    reader = None
    if fields:
        narrow = Trunk(width=reader_width, depth=reader_depth, heads=heads, positions=length)
        reader = WordNet(narrow, dim, sum(fields.values()))
    given = tuple(sorted((name, _value(name, value, fields)) for name, value in target.items()))
    params = {"raw": jax.random.normal(rng.stream(key, "words"), (lm.vocab, dim)), "net": net.init(key)}
    guide = {} if reader is None else reader.init(rng.stream(key, "guide"))
    return WordDiffusion(
        params, guide, jnp.zeros(lm.vocab, jnp.int32), jnp.ones(()), net, reader, eos, length, tuple(fields.items()),
        given, How(**how),
    )  # fmt: skip


def _value(name: str, value: Any, fields: Mapping[str, int]) -> int | tuple[int, ...]:
    """A value of `target` as int or a tuple of them; InputError where the control cannot have it."""
    if name not in fields and name not in PLACES:
        raise InputError(f"target names {name!r}, expected one of {', '.join([*fields, *PLACES])}: give it in fields.")
    if name in fields and value not in range(fields[name]):
        raise InputError(f"target {name} is {value!r}, expected a class from 0 to {fields[name] - 1}.")
    if name == "tags":
        if unknown := [t for t in value if t is not None and t not in TAGS]:
            raise InputError(f"target tags has {unknown[0]!r}, expected None or one of {', '.join(TAGS)}.")
        return tuple(-1 if t is None else TAGS.index(t) for t in value)
    return tuple(int(v) for v in value) if name == "words" else int(value)


@partial(jax.jit, static_argnames="ends")
def infill(
    control: WordDiffusion, tokens: jax.Array, given: jax.Array, aims: Mapping[str, jax.Array], keys: jax.Array,
    banned: jax.Array | None = None, ends: tuple[int, ...] = (),
) -> jax.Array:  # fmt: skip
    """Rows int32 [B, S] with the tokens where given bool [B, S], written elsewhere, without those that are banned, and
    steered to `aims`; -1 where a vector is NaN.

    Args:
      aims: see `word_diffusion.energy`. keys: of the rows, [B]; a row depends on its own key, tokens and aims only.
      banned: bool [V], or None. ends: ids that end a text besides `control.eos`.
    """
    table, how, edit = vectors(control.params["raw"]), control.how, None
    if aims and how.updates:
        read = partial(word_diffusion.classify, control.reader, control.guide)
        fields, free = dict(control.fields), ~given
        against = word_diffusion.energy(table, aims, free, (control.eos, *ends), control.tags, read, fields)
        edit = word_diffusion.steered(against, control.scale, how)
    clean = word_diffusion.estimate(control.net, control.params["net"], table, tokens, given, how.clamp)
    x = samplers.sample(
        clean, keys, (control.length, table.shape[1]), schedule=word_diffusion.SCHEDULE, steps=how.calls,
        sampler=how.sampler, edit=edit,
    )  # fmt: skip
    found = jnp.where(jnp.any(jnp.isnan(x), axis=-1), -1, word_diffusion.nearest(table, x, banned))
    return jnp.where(given, tokens, found).astype(jnp.int32)


def _asked(control: WordDiffusion, prompts: Prompts) -> dict[str, jax.Array]:
    """What each row is steered to, int32 [B] or [B, …]: `target` for all of them, and the entries of `prompts.cond`."""
    batch = len(prompts.tokens)
    every = {name: jnp.broadcast_to(jnp.asarray(value, jnp.int32), (batch, *np.shape(value)))
             for name, value in control.target}  # fmt: skip
    return every | {name: jnp.asarray(value, jnp.int32) for name, value in (prompts.cond or {}).items()}


@partial(jax.jit, static_argnames="sampling")
def _write(prompts, control, sampling, banned):
    size = jnp.sum(prompts.mask, axis=1)[:, None]
    place = jnp.arange(control.length)[None, :]
    blank = prompts.mask.shape[1] - size  # columns of padding before a prompt
    tokens = word_diffusion.moved(prompts.tokens, place + blank, prompts.tokens[:, :1])
    given, aims = place < size, _asked(control, prompts)
    if "words" in aims:
        inner = word_diffusion.moved(aims.pop("words"), place - size, -1)
        tokens, given = jnp.where(inner >= 0, inner, tokens), given | (inner >= 0)
    if "tags" in aims:
        aims["tags"] = word_diffusion.moved(aims["tags"], place - size, -1)
    if "length" in aims:
        aims["length"] = jnp.where(aims["length"] >= 0, aims["length"] + size[:, 0], -1)
    out = infill(control, tokens, given, aims, prompts.keys, banned, ends=sampling.eos)
    text = jnp.take_along_axis(out, size + jnp.arange(sampling.max_new)[None, :], axis=1)
    shown, mask = strategies.cut(text, sampling)
    logp = jnp.where(text >= 0, 0.0, jnp.nan)
    return Samples(jnp.where(text >= 0, shown, sampling.pad), mask, logp, jnp.int32(control.how.calls))


def loss(net: WordNet, eos: int, *, read: float = 1.0) -> losses.LossFn:
    """|x0 - f(z_t)|² / d - log p(w | x0), plus `read` times -log p(w | z_t), per token that is not given (see
    `word_diffusion.errors`); params are those of `WordDiffusion`.

    `read` is not in the paper: f is the mean of the words that the network says, and this trains what it says (Dieleman
    et al. 2022).
    """

    def total(params, frozen, batch, keys):
        tokens = jnp.where(batch["mask"], batch["tokens"], eos)
        free, *parts = word_diffusion.errors(net, params, tokens, keys)
        free &= jnp.any(batch["mask"], axis=1)[:, None]
        names = ("error", "rounding", "reading")
        sums = {name: losses.masked_sum(value, free) for name, value in zip(names, parts)}
        value = sums["error"][0] + sums["rounding"][0] + read * sums["reading"][0]
        return Sum(value, sums["error"][1], sums)

    return total


def guide_loss(reader: WordNet, fields: tuple, eos: int) -> losses.LossFn:
    """Cross-entropy of the classifier on vectors noised at a uniform time, summed over fields; params is
    `WordDiffusion.guide`, frozen = {"raw": the word vectors}."""

    def total(params, frozen, batch, keys):
        tokens = jnp.where(batch["mask"], batch["tokens"], eos)
        logits = word_diffusion.classify(reader, params, *word_diffusion.noisy(vectors(frozen["raw"])[tokens], keys))
        at, count = 0, jnp.float32(len(tokens))
        value, metrics = jnp.float32(0), {}
        for name, classes in fields:
            mine = logits[:, at : at + classes]
            value += jnp.sum(losses.next_token(mine, batch[name]))
            right = jnp.sum(jnp.argmax(mine, axis=-1) == batch[name], dtype=jnp.float32)
            metrics[f"{name}_accuracy"] = (right, count)
            at += classes
        return Sum(value, count, metrics)

    return total


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    guide: Mapping[str, Any] | None = None,
    aim: Mapping[str, Any] | None = None,
    **hp: Any,
) -> Artifact:
    """Trains the network, then the classifier that guides it, then says what to steer to; three stages.

    Args:
      guide: settings of `classifier`, with `fields`; None: no classifier.
      aim: settings of `aimed`, with which targets and sampling are changed without training anything again.
      hp: of `diffusion_lm`.
    """
    control = stage.stage(root, diffusion_lm, hp, lm=lm, data=data)
    if guide:
        control = stage.stage(root, classifier, guide, lm=lm, data=data, network=control)
    return stage.stage(root, aimed, aim or {}, lm=lm, network=control)


@stage.stage_function("diffusion_lm")
def diffusion_lm(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    where: Mapping[str, Any] | None = None,
    dim: int = 16,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    length: int = 48,
    read: float = 1.0,
    training: Training = Training(steps=2000, rate=1e-3, warmup=50, schedule="linear", save_every=200),
    seed: int = 0,
) -> None:
    """Stage: the word vectors and the network, trained on the texts of records that match `where`.

    Args:
      lm: gives the tokenizer and the size of the vocabulary.
      dim, width, depth, heads, length: see `init`; longer texts are cut. read: see `loss`.
      training: how it is trained. seed: of initial values, of the order of texts, and of the noise.

    Raises:
      InputError: no record matches, a tokenizer without an end token, and what `init` and training raise.
    """
    records = matching(data, where)
    model, _, tokenizer = open_lm(lm)
    if tokenizer.eos is None:
        raise InputError(f"the tokenizer of {lm.path.name} has no end token, with which rows are filled: use another.")
    hp = dict(dim=dim, width=width, depth=depth, heads=heads, length=length, eos=tokenizer.eos)
    control = init(model, rng.stream(jax.random.key(seed), "init"), **hp)
    batches = pipeline(
        Source(str(data.path), str(where), records), tokenizer, batch=training.batch, length=length, seed=seed
    )
    objective = loss(control.net, control.eos, read=read)
    params = fitting.train(run, control.params, objective, {}, batches, training, seed=seed)
    keep(run, control.replace(params=params, tags=jnp.asarray(tag_table(tokenizer))), "diffusion_lm", hp)


@stage.stage_function("diffusion_lm.classifier")
def classifier(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    network: Artifact,
    fields: Mapping[str, int],
    where: Mapping[str, Any] | None = None,
    reader_width: int = 64,
    reader_depth: int = 2,
    training: Training = Training(steps=500, rate=1e-3, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: the model of `network` with a classifier of its noisy word vectors.

    Args:
      fields: fields of the records -> their classes, counted from 0; records without one are left out, with a warning.
      where, reader_width, reader_depth: as for `diffusion_lm` and `init`.
      training: how the classifier is trained. seed: of its initial values and training.

    Raises:
      InputError: a value that is no class, a class without a record, and what `init` and training raise.
    """
    records = matching(data, where)
    for name, classes in fields.items():
        records = labelled(records, f"{name} of {data.path}", name, classes)
    for name, classes in fields.items():
        if missing := set(range(classes)) - {r[name] for r in records}:
            raise InputError(f"no record of {data.path} has the {name} {min(missing)}: set fields or where.")
    model, _, tokenizer = open_lm(lm)
    old = methods.load(network, model)
    hp = network.spec["init"] | dict(fields=dict(fields), reader_width=reader_width, reader_depth=reader_depth)
    control = init(model, rng.stream(jax.random.key(seed), "guide"), **hp).replace(params=old.params, tags=old.tags)
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=old.length, seed=seed, fields=tuple(fields))
    objective, frozen = guide_loss(control.reader, control.fields, control.eos), {"raw": old.params["raw"]}
    guide = fitting.train(run, control.guide, objective, frozen, batches, training, seed=seed)
    keep(run, control.replace(guide=guide), "diffusion_lm", hp)


@stage.stage_function("diffusion_lm.aim")
def aimed(
    run: Run,
    *,
    lm: Artifact,
    network: Artifact,
    target: Mapping[str, Any] | None = None,
    calls: int = 100,
    sampler: str = "ddpm",
    clamp: float = 0.0,
    updates: int = 3,
    rate: float = 0.1,
    coef: float = 0.01,
    floor: float = 1e-4,
) -> None:
    """Stage: a trained model with what it is steered to (see `init`) and how it samples (see `How`)."""
    model = open_lm(lm)[0]
    how = dict(calls=calls, sampler=sampler, clamp=clamp, updates=updates, rate=rate, coef=coef, floor=floor)
    hp = network.spec["init"] | dict(target=dict(target or {}), **how)
    control, old = init(model, jax.random.key(0), **hp), methods.load(network, model)
    keep(run, control.replace(params=old.params, guide=old.guide, tags=old.tags), "diffusion_lm", hp)
