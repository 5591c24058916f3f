"""Prompt tuning (Lester et al. 2021) and control prefixes (Clive et al. 2022): vectors that stand before the prompt.

With `place="prompt"` the vectors are tokens of the input, and one prompt serves a task. With `place="prefix"` they are
keys and values of every layer, which tokens attend to and which move no position. Either has vectors that all texts
share and, for each attribute of `attributes`, vectors for each of its classes: a text is learned behind those of its
own classes, so the vectors of one attribute are combined with those of another at will. A network that is shared by all
of them may make the vectors while they are learned (Li & Liang 2021); the artifact holds what it made.

The strength `scale` moves the vectors of a class away from the mean of the classes, at 1 they are as they were learned.

Differences from the papers: the authors of control prefixes let positions of a decoder begin behind the prefix where
they use learned ones, here they begin at 0; prompts begin as embeddings of the tokens that are most frequent in the
training texts and not of the first rows of the table, which in a vocabulary of byte pairs are bytes. Mixes of prompts
by their mean or by attention follow Chen et al. (2023, mixture of soft prompts).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import methods, rng
from ctg_jax.controls.parts import MIXES, Parts, fold, memory, network, parts
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.models.lm import LM
from ctg_jax.run.identity import nearest
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, Params

PLACES, STARTS = ("prompt", "prefix"), ("vocabulary", "words", "uniform")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is learned: the section `shape` of a configuration.

    Attributes:
      place: "prompt" or "prefix".
      length: shared vectors, P.
      attributes: name of a field of the records -> the number of its classes, whose values count from 0.
      each: vectors of each class, Q.
      mix: of the vectors of several attributes in a prompt: "concat", "mean" or "attention".
      network: the hidden width M of the network that makes the vectors, or None.
      after: whether a prompt's vectors follow the text of the prompt.
    """

    place: str = "prompt"
    length: int = 20
    attributes: Mapping[str, int] | None = None
    each: int = 2
    mix: str = "concat"
    network: int | None = None
    after: bool = False


@dataclasses.dataclass(frozen=True)
class Start:
    """Where the vectors begin: the section `start` of a configuration.

    Attributes:
      kind: "vocabulary", embeddings of frequent tokens (of a prefix: the keys and values of such tokens); "words",
        shared vector i is the mean of the embeddings of the tokens of word i, those beyond the list as with
        "vocabulary"; "uniform", numbers from -0.5 to 0.5. Where a network makes the vectors they begin normal.
      words: of the kind "words".
      common: how many of the most frequent tokens of the training texts are drawn from.
      onesided: numbers from 0 to 0.5, as the authors' code draws them.
    """

    kind: str = "vocabulary"
    words: Sequence[str] = ()
    common: int = 5000
    onesided: bool = False


def init(
    lm: LM,
    key: jax.Array,
    *,
    place: str = "prompt",
    length: int = 20,
    attributes: Mapping[str, int] | None = None,
    each: int = 2,
    mix: str = "concat",
    network: int | None = None,
    after: bool = False,
    chosen: Mapping[str, int] | None = None,
) -> Parts:
    """A control with random vectors; for the settings see `Shape`.

    Args:
      chosen: attribute -> the class that all rows take, -1 for none; for the others `prompts.cond` names one.

    Raises:
      InputError: a place, mix or attribute that does not exist, a class that its attribute does not have, no vectors,
        or a prefix with `after` or another mix than "concat".
    """
    if place not in PLACES:
        raise InputError(f"place is {place!r}, expected 'prompt' or 'prefix'.")
    if mix not in MIXES:
        raise InputError(f"mix is {mix!r}, expected one of {', '.join(MIXES)}.")
    if place == "prefix" and (after or mix != "concat"):
        raise InputError(f"after is {after} and mix is {mix!r}, which a prefix cannot have: use place='prompt'.")
    attributes, chosen = dict(attributes or {}), dict(chosen or {})
    if mix != "concat" and not attributes:
        raise InputError(f"mix is {mix!r}, but there are no attributes to mix: give attributes.")
    check_chosen(chosen, attributes)
    shape = (lm.depth, lm.kv_heads, lm.head_dim) if place == "prefix" else None
    out = 2 * lm.depth * lm.kv_heads * lm.head_dim if shape else lm.width
    width, spread = (out, 0.02) if network is None else (lm.width, 1.0)
    made = parts(key, width, shared=length, attributes=attributes, each=each, deviation=spread)
    if network is not None:
        made["net"] = _network(rng.stream(key, "net"), lm.width, network, out)
    if mix == "attention":
        hidden = jax.random.normal(rng.stream(key, "gate"), (out, out)) / out**0.5
        made["gate"] = {"in": hidden, "out": jnp.zeros(out)}
    fixed = tuple(sorted((name, int(value)) for name, value in chosen.items()))
    return Parts(**made, chosen=fixed, shape=shape, mix=mix, after=after)


_network = network  # `init` has a setting of that name


def check_chosen(chosen: Mapping[str, Any], attributes: Mapping[str, int]) -> None:
    """InputError where `chosen` names an attribute that is none, or a class that its attribute does not have."""
    for name, value in chosen.items():
        if name not in attributes:
            raise InputError(f"chosen names the attribute {name!r}, which was not learned{nearest(name, attributes)}")
        if not isinstance(value, int) or not -1 <= value < attributes[name]:
            raise InputError(
                f"chosen has {name}={value!r}, but it has {attributes[name]} classes: expected 0 to "
                f"{attributes[name] - 1}, or -1 for none of them."
            )


def example(lm: LM, key: jax.Array) -> Parts:
    """A prefix of two shared vectors and one for an attribute, which a network makes, for the laws."""
    shape = dict(place="prefix", length=2, attributes={"label": 2}, each=1, chosen={"label": 1})
    return init(lm, key, **shape, network=8)


def neutral(control: Parts) -> None:
    """There is no neutral element: vectors of zeros are still attended to."""


def loss(lm: LM, *, attributes: Sequence[str] = (), z: float = 0.0) -> losses.LossFn:
    """-log p(x_i | vectors, x_<i) per token of the frozen model, each text behind the vectors of its own classes, which
    fields [B] of the batch name, plus `z` times the squared log-normaliser. params is the control, frozen =
    {"params": those of the LM}."""
    plain = losses.control_loss(lm, z=z)

    def conditioned(params, frozen, batch, keys):
        return plain(params, frozen, batch | {"cond": {name: batch[name] for name in attributes}}, keys)

    return conditioned


def fit(
    root, *, lm: Artifact, data: Artifact, chosen: Mapping[str, int] | None = None, **settings: Any
) -> Artifact:  # fmt: skip
    """Learns the vectors on the records of `data`.

    Args:
      chosen: attribute -> class of the control that is returned, for prompts without a class of their own. Whatever it
        is, the vectors are learned once.
      settings: of the stage `prompt`.

    Raises:
      InputError: what the stage and `check_chosen` raise.
    """
    attributes = (settings.get("shape") or {}).get("attributes") or {}
    check_chosen(chosen or {}, attributes)
    learned = stage(root, prompt, settings, lm=lm, data=data)
    return stage(root, of_classes, {"chosen": chosen}, lm=lm, learned=learned) if chosen else learned


@stage_function("prompt", revision=1)
def prompt(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    where: Mapping[str, Any] | None = None,
    shape: Shape = Shape(),
    start: Start = Start(),
    z: float = 0.0,
    training: Training = Training(steps=300, batch=16, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: next-token training of the vectors, on records that match `where`.

    Args:
      lm, data: an LM artifact, and a data artifact. Records without one of the attributes are left out and counted in a
        warning.
      shape: what is learned. start: where it begins. z: see `loss`.
      training: how it is trained; the paper of prompt tuning has the algorithm "adafactor". The rate is by default 0.1
        for a prompt, 0.3 with Adafactor, and 1e-3 for a prefix.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: no record matches or has the attributes, a class out of its range, an unknown start, and
        what `init` and training raise.
    """
    records = fitting.matching(data, where)
    attributes = dict(shape.attributes or {})
    for name, classes in attributes.items():
        if not any(name in r for r in records):
            raise InputError(
                f"shape.attributes names {name!r}, which no record of {data.path} has{nearest(name, records[0])}"
            )
        records = labelled(records, str(data.path), field=name, classes=classes)
    if start.kind not in STARTS:
        raise InputError(f"start.kind is {start.kind!r}, expected one of {', '.join(STARTS)}.")
    model, params, tokenizer = open_lm(lm)
    key, made = jax.random.key(seed), dataclasses.asdict(shape)
    control = init(model, rng.stream(key, "init"), **made)
    if shape.network is None:
        control = begun(control, model, params, tokenizer, [r["text"] for r in records], start, seed)
    source = Source(str(data.path), str(where), records)
    batches = pipeline(
        source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=tuple(attributes)
    )
    training = training.at(1e-3 if shape.place == "prefix" else 0.1 if training.algorithm == "adam" else 0.3)
    objective, frozen = loss(model, attributes=tuple(attributes), z=z), {"params": params}
    tx = training.optimizer(r"(shared|parts|net|gate).*", slow=r"gate.*")
    control = fitting.train(run, control, objective, frozen, batches, training, seed=seed, tx=tx)
    fitting.keep(run, fold(control), "prompt", made | {"network": None})


@stage_function("prompt_of")
def of_classes(run: Run, *, lm: Artifact, learned: Artifact, chosen: Mapping[str, int]) -> None:
    """Stage: the vectors of these classes, attribute -> class, of what `prompt` learned."""
    control = methods.load(learned, open_lm(lm)[0])
    check_chosen(chosen, {name: len(table) for name, table in control.parts.items()})
    fixed = tuple(sorted((name, int(value)) for name, value in chosen.items()))
    fitting.keep(run, control.replace(chosen=fixed), "prompt", {**learned.spec["init"], "chosen": dict(chosen)})


def begun(
    control: Parts, lm: LM, params: Params, tokenizer: Any, texts: Sequence[str], start: Start, seed: int = 0
) -> Parts:
    """The control with the vectors that `start` describes.

    Args:
      texts: those whose most frequent tokens are drawn from, each at most once for the shared vectors.

    Raises:
      InputError: words for a prefix or more than there are shared vectors, or none.
    """
    generator = np.random.default_rng(rng.derived_seed(seed, "start"))
    if start.kind == "uniform":
        low = 0.0 if start.onesided else -0.5

        def drawn(x):
            return jnp.asarray(generator.uniform(low, 0.5, x.shape), jnp.float32)

    else:
        counts = np.bincount([i for row in tokenizer.encode(list(texts)) for i in row], minlength=lm.vocab)
        common = np.argsort(-counts, kind="stable")[: max(1, min(start.common, np.count_nonzero(counts)))]

        def drawn(x):
            rows = x.reshape(-1, *x.shape[-2:])
            again = rows.shape[1] > len(common)
            ids = jnp.asarray([generator.choice(common, rows.shape[1], replace=again) for _ in rows])
            found = memory(lm, params, ids) if control.shape else lm.embed(params, ids)
            return found.astype(jnp.float32).reshape(x.shape)

    own = {name: drawn(control.parts[name]) for name in sorted(control.parts)}
    shared = None if control.shared is None else drawn(control.shared)
    if start.kind == "words":
        count = 0 if shared is None or control.shape else len(shared)
        if not 1 <= len(start.words) <= count:
            raise InputError(
                f"start has {len(start.words)} words for {count} shared vectors of a prompt: expected 1 to {count}."
            )
        shared = shared.at[: len(start.words)].set(of_words(lm, params, tokenizer, start.words))
    return control.replace(shared=shared, parts=own)


def of_words(lm: LM, params: Params, tokenizer: Any, words: Sequence[str]) -> jax.Array:
    """float32 [n, D]: the mean of the embeddings of the tokens of each word."""
    rows = [lm.embed(params, jnp.asarray([ids]))[0].astype(jnp.float32) for ids in tokenizer.encode(list(words))]
    return jnp.stack([jnp.mean(row, axis=0) for row in rows])
