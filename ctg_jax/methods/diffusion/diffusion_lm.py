"""Diffusion-LM: continuous diffusion over learned word vectors, controlled by gradients (Li et al. 2022), in place of
the decode loop.

It writes whole rows (`ctg_jax.learn.whole_rows`), in which any tokens may be given: the network reads their vectors
without noise. Every step of the sampler is followed by a few updates of the noisy vectors that lower an energy, the sum
of those of the controls that a row asks for:

  label, …  a field of the records, by a classifier of noisy vectors (semantic content)
  length    the exact number of tokens before the end token: end tokens from there on, and none before
  tags      a part of speech for each position, or for a span of them with -1 elsewhere; see `ctg_jax.data.tags`
  words     tokens at positions behind the prompt, -1 elsewhere (infilling); these are given, not guided

The values come from `target`, which holds for all rows, or from the entries of these names in `prompts.cond`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax import methods, rng
from ctg_jax.controls import constraints
from ctg_jax.data.labels import labelled, mentioned, of_all_classes
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.data.tags import tag_table
from ctg_jax.learn import fitting
from ctg_jax.learn.diffusion_losses import word_classifier_loss, word_loss
from ctg_jax.learn.fitting import Training, keep, matching
from ctg_jax.learn.whole_rows import WholeRows, completed, end_token, moved, placed, start_token, with_words
from ctg_jax.learn.word_targets import POSITIONAL, check_requested, requested, target_value
from ctg_jax.models import samplers, word_diffusion
from ctg_jax.models.denoiser import Trunk
from ctg_jax.models.lm import LM
from ctg_jax.models.word_control import How, energy, steered
from ctg_jax.models.word_diffusion import VectorDenoiser, vectors
from ctg_jax.run import stage
from ctg_jax.run.stage import Artifact, Run, open_lm
from ctg_jax.types import InputError, Params


@dataclasses.dataclass(frozen=True)
class WordVectorDiffusion(WholeRows):
    """Completes prompts by denoising the word vectors of whole rows; see `WholeRows`. Rounding takes the nearest word,
    so `greedy` changes nothing."""

    def shape(self, control):
        return len(control.tags), control.length

    def write(self, prompts, control, sampling, banned):
        return _write(prompts, control, sampling, banned)

    def check(self, lm, prompts, control, sampling):
        """
        Raises:
          InputError: an entry of `prompts.cond` that is not a control, or that has a wrong shape or value, and what
            `WholeRows.check` raises.
        """
        super().check(lm, prompts, control, sampling)
        model = constraints.apart(control)[1]
        check_requested(
            requested(model.target, prompts), prompts, sampling.max_new, dict(model.fields), *self.shape(model)
        )


@struct.dataclass
class WordDiffusion:
    """A diffusion model over word vectors, how it samples, and what it is steered towards.

    Attributes:
      params: {"raw": [V, d], see `vectors`; "net": the parameters of `net`}. guide: the parameters of `reader`, or {}.
      tags: int32 [V], the part-of-speech tag of every token.
      scale: float32 [] or, per row, [B]: the weight of the energy. At 0 nothing is steered.
      net: predicts the words from noisy vectors. reader: classifies noisy texts; None where no classifier was fitted.
      eos: the token that fills a row behind its text. length: S, the tokens of a row.
      fields: (name, classes) of each field that `reader` classifies. target: (control, value) pairs for all rows.
      how: how a text is drawn and steered.
    """

    strategy: ClassVar = WordVectorDiffusion()

    params: Params
    guide: Params
    tags: jax.Array
    scale: jax.Array
    net: VectorDenoiser = struct.field(pytree_node=False)
    reader: VectorDenoiser | None = struct.field(pytree_node=False)
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
    """An untrained model whose tokens all have tag 0.

    Args:
      lm: gives the vocabulary.
      dim: d, of the word vectors. width, depth, heads: of the network. length: S. eos: fills a row behind its text.
      fields: name -> number of classes, of the fields that the classifier predicts; None: no classifier.
      reader_width, reader_depth: of the classifier.
      target: control -> value, see the top of this file; tags are names of `TAGS`, or None for any tag.
      how: settings of `How`.

    Raises:
      InputError: sizes that do not fit each other, an unknown control, or an invalid value of one.
    """
    fields, target = dict(fields or {}), dict(target or {})
    for name, classes in fields.items():
        if name in POSITIONAL or classes < 2:
            raise InputError(
                f"fields is {fields}, expected names other than {', '.join(POSITIONAL)}, of 2 classes or more."
            )
    trunk = Trunk(width=width, depth=depth, heads=heads, positions=length)
    net = VectorDenoiser(trunk, dim, lm.vocab)
    reader = None
    if fields:
        narrow = Trunk(width=reader_width, depth=reader_depth, heads=heads, positions=length)
        reader = VectorDenoiser(narrow, dim, sum(fields.values()))
    given = tuple(sorted((name, target_value(name, value, fields)) for name, value in target.items()))
    params = {"raw": jax.random.normal(rng.stream(key, "words"), (lm.vocab, dim)), "net": net.init(key)}
    guide = {} if reader is None else reader.init(rng.stream(key, "guide"))
    return WordDiffusion(
        params, guide, jnp.zeros(lm.vocab, jnp.int32), jnp.ones(()), net, reader, eos, length, tuple(fields.items()),
        given, How(**how),
    )  # fmt: skip


@partial(jax.jit, static_argnames="ends")
def infill(
    control: WordDiffusion, tokens: jax.Array, given: jax.Array, aims: Mapping[str, jax.Array], keys: jax.Array,
    banned: jax.Array | None = None, ends: tuple[int, ...] = (),
) -> jax.Array:  # fmt: skip
    """Writes the tokens of rows that are not given, and steers them towards `aims`.

    Args:
      tokens: int32 [B, S]. given: bool [B, S], which of them are kept.
      aims: see `word_control.energy`. keys: of the rows, [B]; a row depends on its own key, tokens and aims only.
      banned: bool [V], tokens that are never written; None: none. ends: ids that end a text besides `control.eos`.

    Returns:
      The rows, int32 [B, S]; -1 where a vector is NaN.
    """
    table, how, edit = vectors(control.params["raw"]), control.how, None
    if aims and how.updates:
        read = partial(word_diffusion.classify, control.reader, control.guide)
        fields, free = dict(control.fields), ~given
        against = energy(table, aims, free, (control.eos, *ends), control.tags, read, fields)
        edit = steered(against, control.scale, how)
    clean = word_diffusion.estimate(control.net, control.params["net"], table, tokens, given, how.clamp)
    x = samplers.sample(
        clean, keys, (control.length, table.shape[1]), schedule=word_diffusion.SCHEDULE, steps=how.calls,
        sampler=how.sampler, edit=edit,
    )  # fmt: skip
    found = jnp.where(jnp.any(jnp.isnan(x), axis=-1), -1, word_diffusion.nearest(table, x, banned))
    return jnp.where(given, tokens, found).astype(jnp.int32)


@partial(jax.jit, static_argnames="sampling")
def _write(prompts, control, sampling, banned):
    tokens, given, size = placed(prompts, control.length, control.how.start)
    behind = jnp.arange(control.length)[None, :] - size
    aims = requested(control.target, prompts)
    if "words" in aims:
        tokens, given = with_words(tokens, given, size, aims.pop("words"))
    if "tags" in aims:
        aims["tags"] = moved(aims["tags"], behind, -1)
    if "length" in aims:
        aims["length"] = jnp.where(aims["length"] >= 0, aims["length"] + size[:, 0], -1)
    rows = infill(control, tokens, given, aims, prompts.keys, banned, ends=sampling.eos)
    return completed(rows, size, sampling, jnp.int32(control.how.calls))


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    guide: Mapping[str, Any] | None = None,
    aim: Mapping[str, Any] | None = None,
    **hp: Any,
) -> Artifact:
    """Trains the network, then the classifier that guides it, and then sets what to steer towards, in three stages.

    Args:
      guide: settings of `classifier`; None: no classifier.
      aim: settings of `aimed`. Changing targets and sampling there trains nothing again.
      hp: settings of `diffusion_lm`.

    Raises:
      InputError: what the stages raise; records that the classifier cannot learn from, before any network is trained.
    """
    if guide:
        with suppress(stage.UnfinishedError):  # a dry run may have no data to read yet
            _classes(data, **{name: guide[name] for name in ("fields", "mentions", "reads", "where") if name in guide})
    control = stage.stage(root, diffusion_lm, hp, lm=lm, data=data)
    if guide:
        control = stage.stage(root, classifier, guide, lm=lm, data=data, network=control)
    return stage.stage(root, aimed, aim or {}, lm=lm, network=control)


@stage.stage_function("diffusion_lm", revision=1)
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
    """Stage: trains the word vectors and the network on the texts of records that match `where`.

    Args:
      lm: gives the tokenizer and the size of the vocabulary.
      dim, width, depth, heads, length: see `init`; longer texts are cut. read: see `word_loss`.
      training: how it is trained. seed: of initial values, of the order of texts, and of the noise.

    Raises:
      InputError: no record matches, a tokenizer without an end token, and what `init` and training raise.
    """
    records = matching(data, where)
    model, _, tokenizer = open_lm(lm)
    eos = end_token(tokenizer, lm.path.name)
    hp = dict(dim=dim, width=width, depth=depth, heads=heads, length=length, eos=eos)
    control = init(model, rng.stream(jax.random.key(seed), "init"), **hp)
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=length, seed=seed)
    objective = word_loss(control.net, eos, read=read)
    params = fitting.train(run, control.params, objective, {}, batches, training, seed=seed)
    keep(run, control.replace(params=params, tags=jnp.asarray(tag_table(tokenizer))), "diffusion_lm", hp)


def _classes(data, fields=None, mentions=None, reads="mr", where=None):
    """(records that have a class for each field, {field: number of classes}), see `classifier`."""
    records, mentions = matching(data, where), dict(mentions or {})
    fields = dict(fields or {}) | {name: 1 + len(options) for name, options in mentions.items()}
    if not fields:
        raise InputError("fields and mentions are empty: give what the classifier is to predict.")
    for name, options in mentions.items():
        if isinstance(options, str) or name in ("text", reads):
            raise InputError(f"mentions {name} is {options!r:.60}, expected a list of texts, under a name of its own.")
    found = [
        {name: mentioned(r, options, reads, f"record {i} of {data.path}") for name, options in mentions.items()}
        for i, r in enumerate(records)
    ]
    records = [r | classes for r, classes in zip(records, found)]
    for name, classes in fields.items():
        records = labelled(records, f"{name} of {data.path}", name, classes)
    for name, classes in fields.items():  # after all, since a record that one field leaves out is missing to the others
        of_all_classes(records, str(data.path), classes, name)
    return records, fields


@stage.stage_function("diffusion_lm.classifier", revision=1)
def classifier(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    network: Artifact,
    fields: Mapping[str, int] | None = None,
    mentions: Mapping[str, Sequence[str]] | None = None,
    reads: str = "mr",
    where: Mapping[str, Any] | None = None,
    reader_width: int = 64,
    reader_depth: int = 2,
    training: Training = Training(steps=500, rate=1e-3, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: trains a classifier of noisy word vectors for the model of `network`.

    Args:
      fields: field of the records -> number of its classes, which are counted from 0; records without the field are
        left out and counted in a warning.
      mentions: name of a further field -> texts; class i of it are the records whose text under `reads` holds the
        i-th of them, and class 0 those that hold none, see `ctg_jax.data.labels.mentioned`.
      where, reader_width, reader_depth: as for `diffusion_lm` and `init`.
      training: how the classifier is trained. seed: of its initial values and training.

    Raises:
      InputError: no field, a value that is not a class, a class without a record, and what `init` and training raise.
    """
    records, fields = _classes(data, fields, mentions, reads, where)
    model, _, tokenizer = open_lm(lm)
    old = methods.load(network, model)
    hp = network.spec["init"] | dict(fields=fields, reader_width=reader_width, reader_depth=reader_depth)
    control = init(model, rng.stream(jax.random.key(seed), "guide"), **hp).replace(params=old.params, tags=old.tags)
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=old.length, seed=seed, fields=tuple(fields))
    objective, frozen = word_classifier_loss(control.reader, control.fields, control.eos), {"raw": old.params["raw"]}
    guide = fitting.train(run, control.guide, objective, frozen, batches, training, seed=seed)
    keep(run, control.replace(guide=guide), "diffusion_lm", hp)


@stage.stage_function("diffusion_lm.aim", revision=1)
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
    pull: str = "drawn",
) -> None:
    """Stage: sets what a trained model is steered towards (see `init`) and how it samples (see `How`)."""
    model, _, tokenizer = open_lm(lm)
    how = dict(calls=calls, sampler=sampler, clamp=clamp, updates=updates, rate=rate, coef=coef, floor=floor, pull=pull)
    hp = network.spec["init"] | dict(target=dict(target or {}), **how, start=start_token(tokenizer))
    control, old = init(model, jax.random.key(0), **hp), methods.load(network, model)
    keep(run, control.replace(params=old.params, guide=old.guide, tags=old.tags), "diffusion_lm", hp)
