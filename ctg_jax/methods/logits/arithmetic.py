"""Model arithmetic: one formula over language models, prompts and a classifier (Dekoninck et al. 2024).

    z' = z + alpha (log P - log p),   log P = (Σ λ_i log Q_i) / (Σ λ_i)

p is the distribution of the model that decodes, called `M` in the formula. The other names are the same model after
another prompt, fine-tuned changes of it, other models with its tokenizer, and `C`, a classifier. The formula is a
setting, a Python expression that `controls.formula.parse` reads:

    M - 0.6 * T                 away from T: bias of the likeliest tokens of T as well as of the others
    M - 0.96 * (T | M)          away from what T prefers to M: the union is the larger of the two for each token
    M + 0.5 * (A - B)           DExperts, whose weights add up to 1
    M - 0.96 * (T | M) + C      also towards texts that the classifier accepts

    told = {"T": "The following text is rude: "}
    control = arithmetic.make(lm, key, tokenizer=tokenizer, formula="M - 0.96 * (T | M)", prompts=told)
    cond = {arithmetic.own_entry(told): instructed(tokenizer, texts, list(told.values()))}
    samples = generate(lm, params, to_prompts(tokenizer, texts, seed=0, cond=cond), control)

alpha 1 is the paper's rule, 0 the base model. The classifier is FUDGE's (Yang & Klein 2021) with one output for each
token of the vocabulary, a linear head on the final hidden state, so that no candidate has to be read by itself; the
authors decode the likeliest candidates to text and ask a text classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ctg_jax import methods
from ctg_jax.control import Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.copies import joined
from ctg_jax.controls.formula import Formula, parse
from ctg_jax.controls.streams import Stream, check_vocabulary, log_probabilities
from ctg_jax.data.ids import check_shared
from ctg_jax.data.instructions import instructed
from ctg_jax.data.tokenizer import Tokenizer, load_tokenizer
from ctg_jax.io import dumps, sha256_of
from ctg_jax.learn import fitting, next_classifier
from ctg_jax.models import hf
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.identity import local_models
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.support import removed
from ctg_jax.types import InputError

BASE, CLASSIFIER = "M", "C"  # what every formula may name


@struct.dataclass
class Arithmetic(Control):
    """z + alpha (log P - log p). A token that the control of a stream removed keeps the logit it has.

    Attributes:
      streams: what the formula reads in addition to the base; a stream with copies gives one distribution for each.
      formula: index 0 is the base, then come the streams in their order, and the classifier last.
      value: the classifier's head {"kernel": float32 [V, D], "bias": float32 [V]}, or None: the log-odds of the
        attribute where token v follows, given the final hidden state.
      alpha: float32 [] or, per row, [B]; 0 is the base model.
      top: the number of likeliest tokens of the base that the classifier moves.
      divide: whether the sum is divided by its weights.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    streams: tuple[Stream, ...]
    formula: Formula
    value: dict[str, jax.Array] | None
    alpha: jax.Array
    top: int = struct.field(pytree_node=False, default=50)
    divide: bool = struct.field(pytree_node=False, default=True)
    cond: str | None = struct.field(pytree_node=False, default=None)

    def bind(self, frozen, params):
        return super(Arithmetic, self.replace(streams=joined(self.streams))).bind(frozen, params)

    def check(self, prompts):
        self.formula.check(whole=self.divide)
        for stream in self.streams:
            stream.check(prompts)

    def init(self, prompts, length):
        readings = tuple(stream.init(prompts, length) for stream in self.streams)
        return per_row(self.alpha, prompts, self.cond), readings

    def readers(self):
        named = ((f"model {i + 1} of the formula", stream) for i, stream in enumerate(self.streams))
        return tuple(reader for name, stream in named for reader in stream.readers(name))

    def logits(self, z, h, tokens, mask, state):
        strength, readings = state
        logps, after, known = [log_probabilities(z)], [], ~removed(z)
        for i, (stream, reading) in enumerate(zip(self.streams, readings)):
            check_vocabulary(f"Model {i + 1} of the formula", stream.lm.vocab, z.shape[-1])
            found, _, reading = stream.read(tokens, mask, z.shape[1], reading)
            after.append(reading)
            for q in [found] if stream.copies is None else jnp.moveaxis(found, 1, 0):
                logps.append(log_probabilities(q))
                known &= ~removed(q)
        if self.value is not None:
            logps.append(self._accepted(z, h, logps[0]))
        rule = self.formula.value(logps) if self.divide else self.formula.total(logps)
        push = jnp.where(known, rule - logps[0], 0.0)
        return z + strength * push, (strength, tuple(after))

    def _accepted(self, z: jax.Array, h: jax.Array, logp: jax.Array) -> jax.Array:
        """log C(y, v) - log C(y) float32 [B, M, V] of the `top` likeliest tokens v, 0 for the others. C(y) is the mean
        of C(y, v) over the next token."""
        states = h[:, h.shape[1] - z.shape[1] :]
        accepted = jax.nn.log_sigmoid(next_classifier.log_odds(self.value, states))
        prefix = jax.nn.logsumexp(logp + accepted, axis=-1, keepdims=True)
        least = lax.top_k(z, min(self.top, z.shape[-1]))[0][..., -1:]
        return jnp.where(z >= least, accepted - prefix, 0.0)


def init(
    lm: LM,
    key: jax.Array,
    *,
    formula: str,
    tuned: Sequence[str] = (),
    adapter: Mapping[str, Any] | None = None,
    prompts: Mapping[str, str] | None = None,
    models: Mapping[str, str] | None = None,
    top: int = 50,
    divide: bool = True,
    alpha: float = 1.0,
    cond: str | None = None,
) -> Arithmetic:
    """The control of a formula, in which changes of weights have learned nothing and other models are random.

    Args:
      formula: see `controls.formula.parse`; the names are `M`, `C` and those of the next arguments.
      tuned: names of fine-tuned changes of the model. adapter: their settings of `finetune.init`.
      prompts: name -> text that is put before the prompt; the model that decodes reads all of them in one pass.
      models: name -> folder or hub id of a model with the same tokenizer.
      top, divide, cond: see `Arithmetic`. With divide False the sum is used as it is, which is what the authors' code
        does where the weights add up to 0.
      alpha: the strength.

    Raises:
      InputError: a formula that cannot be read or whose weights do not add up to more than 0; a name that is used twice
        or not at all; `top` below 1; alpha that is not finite.
    """
    prompts, models = dict(prompts or {}), dict(models or {})
    names = [BASE, *prompts, *tuned, *models]
    found = understood(formula, names, divide)
    if top < 1:
        raise InputError(f"top is {top}, expected at least 1 token.")
    if not isinstance(alpha, jax.Array) and not np.all(np.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}, expected a finite number.")
    streams = [Stream(lm=lm, of="current", own=own_entry(prompts), copies=len(prompts))] if prompts else []
    change = methods.get("finetune").init
    for k in jax.random.split(key, len(tuned)):
        streams.append(Stream(control=change(lm, k, **(adapter or {})), lm=lm))
    for source in models.values():
        other = hf.shape(source)
        streams.append(Stream(other.init(key), lm=other))
    value = next_classifier.head(lm) if len(names) in found.reads() else None
    return Arithmetic(tuple(streams), found, value, jnp.asarray(alpha, jnp.float32), top, divide, cond)


def understood(formula: str, names: Sequence[str], divide: bool) -> Formula:
    """The formula over the named models, the first of which is the base, and the classifier after them.

    Raises:
      InputError: it cannot be read, its weights do not add up to more than 0, a name is used twice or not at all.
    """
    for name in names:
        if names.count(name) > 1 or name == CLASSIFIER:
            raise InputError(f"{name!r} is the name of two models of the formula: give every model a name of its own.")
    found = parse(formula, names, [CLASSIFIER])
    if unused := [name for i, name in enumerate(names) if i and i not in found.reads()]:
        raise InputError(f"formula is {formula!r}, which does not use {unused[0]!r}: use it or leave it out.")
    found.check(whole=divide)
    return found


def own_entry(prompts: Mapping[str, str]) -> str:
    """The entry of `prompts.cond` with the prompts of the formula, int32 [n, N, T']: a name of their own, so that two
    formulas in a chain read different ones."""
    return f"arithmetic {sha256_of(dumps(list(prompts.values())))[:8]}"


def make(lm: LM, key: jax.Array, *, tokenizer: Tokenizer, **settings: Any) -> Arithmetic:
    """A control that needs no fit: the settings of `init` without `tuned` and without a classifier.

    Args:
      tokenizer: that of the base model, which other models must share.

    Raises:
      InputError: a formula with something that is fitted, models of another vocabulary, and what `init` raises.
    """
    control = init(lm, key, **settings)
    if control.value is not None or settings.get("tuned"):
        raise InputError("The formula has a classifier or fine-tuned models, which are fitted: give data and use fit.")
    return with_models(control, settings.get("models") or {}, tokenizer)


def with_models(control: Arithmetic, models: Mapping[str, str], tokenizer: Tokenizer) -> Arithmetic:
    """The control with the parameters of its other models, name -> folder or hub id."""
    kept = len(control.streams) - len(models)
    loaded = []
    for stream, source in zip(control.streams[kept:], models.values()):
        check_shared(tokenizer, load_tokenizer(source), stream.lm.vocab, source)
        loaded.append(stream.replace(params=hf.load(source)[1]))
    return control.replace(streams=(*control.streams[:kept], *loaded))


def conditions(artifact: Artifact, lm: Artifact, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The tokens that the prompts of the formula put before each prompt, and the prompt."""
    prompts = artifact.spec["init"].get("prompts")
    if not prompts:
        return {}
    return {own_entry(prompts): instructed(open_lm(lm)[2], texts, list(prompts.values()))}


def example(lm: LM, key: jax.Array) -> Arithmetic:
    """Two random changes of weights, a union and a random classifier, for the laws."""
    a, b, c = jax.random.split(key, 3)
    control = init(
        lm, key, formula="1.5 * M - 0.4 * (A | M) + 0.3 * B + C", tuned=("A", "B"), adapter={"rank": 2}, top=5
    )
    streams = tuple(Stream(control=fitting.example_delta(lm, k), lm=lm) for k in (a, b))
    kernel = jax.random.normal(c, (lm.vocab, lm.width))
    return control.replace(streams=streams, value={**control.value, "kernel": kernel})


def neutral(control: Arithmetic) -> Arithmetic:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    formula: str,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
    classifier: Mapping[str, Any] | None = None,
    prompts: Mapping[str, str] | None = None,
    models: Mapping[str, str] | None = None,
    top: int = 50,
    divide: bool = True,
    alpha: float = 1.0,
    cond: str | None = None,
    **settings: Any,
) -> Artifact:
    """A stage of fine-tuning for each of `tuned`, one for the classifier where the formula names it, and their
    combination.

    Args:
      lm, data: an LM artifact, and records with `text` and `label`.
      formula, prompts, models, top, divide, alpha, cond: see `init`.
      tuned: name -> the fields of the records that this change is trained on, such as {"N": {"label": 0}}.
      classifier: settings of the stage `next_classifier`.
      settings: the other settings of `finetune`, the same for all.

    Raises:
      InputError: what `init`, `finetune` and `next_classifier` raise.
    """
    hp = dict(formula=formula, prompts=prompts, models=models, top=top, divide=divide, alpha=alpha, cond=cond)
    tuned = dict(tuned or {})
    names = [BASE, *(prompts or {}), *tuned, *(models or {})]
    needed = len(names) in understood(formula, names, divide).reads()
    tune = methods.get("finetune").fit
    changes = [tune(root, lm=lm, data=data, **{**settings, "where": dict(where)}) for where in tuned.values()]
    head = stage(root, next_classifier.next_classifier, dict(classifier or {}), lm=lm, data=data) if needed else None
    return stage(root, arithmetic, hp | {"tuned": tuple(tuned)}, lm=lm, changes=changes, head=head)


@stage_function("arithmetic", contents={"models": local_models})
def arithmetic(
    run: Run, *, lm: Artifact, changes: Sequence[Artifact] = (), head: Artifact | None = None, formula: str,
    tuned: Sequence[str] = (), prompts: Mapping[str, str] | None = None, models: Mapping[str, str] | None = None,
    top: int = 50, divide: bool = True, alpha: float = 1.0, cond: str | None = None,
) -> None:  # fmt: skip
    """Stage: what was fitted on `lm` becomes the control of a formula; see `init`."""
    model, _, tokenizer = open_lm(lm)
    hp = dict(formula=formula, tuned=tuned, prompts=prompts, models=models, top=top, divide=divide, cond=cond)
    hp |= dict(alpha=alpha, adapter=changes[0].spec["init"] if changes else None)
    control = with_models(init(model, jax.random.key(0), **hp), models or {}, tokenizer)
    streams = list(control.streams)
    for i, change in enumerate(changes, start=bool(prompts)):
        streams[i] = streams[i].replace(control=methods.load(change, model))
    value = control.value if head is None else head.load(control.value)
    checkpoint.save(run.path / "state", control.replace(streams=tuple(streams), value=value))
    run.record(method="arithmetic", init=hp)
