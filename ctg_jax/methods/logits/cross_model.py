"""Cross-model control: a tiny language model learns what to add to the logits of one model, and serves others.

Source: Wu et al. 2024 (CMC).

    z' = z + alpha δ

δ are the logits of the tiny model, which is trained beside one frozen template model and then carried to models of
another size, of other weights, and of another vocabulary (`carry`). Where δ is free to fit, z + δ is the data's
log-probability up to a constant, so that on a base p₂ it gives p₂ p_data / p₁: proxy-tuning without its two experts.

    fitted = cross_model.fit(root, lm=template, data=data, shape={"width": 64, "depth": 2, "heads": 2})
    moved = cross_model.carry(root, lm=other, control=fitted)

alpha 1 is the paper's rule, 0 the base model. The authors' code normalises the base's logits, or both, before adding;
this moves all logits of a position alike, and so changes neither the distribution nor the loss. Across vocabularies it
encodes the whole text once more where a token has no equal; here the tiny model reads the pieces of each new token that
its own tokenizer makes of it, one token at a time, with its cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ctg_jax import rng
from ctg_jax.control import Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.streams import Reading, Stream
from ctg_jax.data.instructions import instructed
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.data.token_map import pieces, token_map
from ctg_jax.data.tokenizer import load_tokenizer
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError

OWN = "cross_model"  # the entry of `prompts.cond` with the prompt in the tiny model's tokens, int32 [B, T']


@struct.dataclass
class Words:
    """What a tiny model of another vocabulary reads and writes for the base's tokens; see `data.token_map`.

    Attributes:
      map: int32 [V], whose logit each token gets; where it is -1, the token's logit stays.
      pieces: int32 [V, k], what is read for it, with -1 for padding on the left.
    """

    map: jax.Array
    pieces: jax.Array


@struct.dataclass
class CrossModel(Control):
    """z + alpha δ.

    Attributes:
      delta: the tiny model.
      alpha: float32 [] or, per row, [B]; 0 is the base model.
      words: None, or the tables of another vocabulary.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    delta: Stream
    alpha: jax.Array
    words: Words | None = None
    cond: str | None = struct.field(pytree_node=False, default=None)

    def check(self, prompts):
        self.delta.check(prompts)

    def init(self, prompts, length):
        strength = per_row(self.alpha, prompts, self.cond)
        if self.words is None:
            return strength, self.delta.init(prompts, length), None
        rows, t = prompts.tokens.shape
        slots = t + self.words.pieces.shape[1] * (length - t)
        return strength, self.delta.init(prompts, slots), jnp.zeros((rows, self.delta.lm.vocab), jnp.float32)

    def readers(self):
        return self.delta.readers("tiny model")

    def logits(self, z, h, tokens, mask, state):
        strength, reading, last = state
        if self.words is not None:
            moved, reading, last = self._across(tokens, mask, z.shape[1], reading, last)
        elif self.delta.lm.vocab == z.shape[-1]:
            moved, _, reading = self.delta.read(tokens, mask, z.shape[1], reading)
        else:
            raise InputError(
                f"The tiny model has a vocabulary of {self.delta.lm.vocab} tokens and the base model one of "
                f"{z.shape[-1]}: use cross_model.carry, which makes the tables between them."
            )
        return z + strength * moved, (strength, reading, last)

    def _across(
        self, tokens: jax.Array, mask: jax.Array, new: int, reading: Reading, last: jax.Array
    ) -> tuple[jax.Array, Reading, jax.Array]:
        """δ float32 [B, M, V] in the base's vocabulary, and the tiny model's logits [B, V'] after the last token that
        has pieces. On the first call the tiny model reads its own prompt and the pieces of the M - 1 tokens after it,
        later those of the new token."""
        rows, width = tokens.shape[0], self.words.pieces.shape[1]
        fresh = tokens if reading.started else tokens[:, tokens.shape[1] - (new - 1) :]
        real = mask[:, mask.shape[1] - fresh.shape[1] :]
        parts = self.words.pieces[fresh]
        held = (parts >= 0) & real[:, :, None]
        read = jnp.maximum(parts, 0).reshape(rows, -1), held.reshape(rows, -1)
        if reading.started:
            after, _, reading = self.delta.read(*read, 1, reading)
            found = jnp.where(held.any(axis=(1, 2), keepdims=True), after, last[:, None])
        else:
            after, _, reading = self.delta.read(*read, width * (new - 1) + 1, reading)
            # After a token without pieces, the logits are those after the last token that has some.
            at = jnp.arange(1, new)[None] * held.any(axis=2)
            at = lax.cummax(jnp.pad(at, ((0, 0), (1, 0))), axis=1)
            found = jnp.take_along_axis(after, width * at[:, :, None], axis=1)
        moved = jnp.where(self.words.map[None, None] >= 0, found[..., jnp.maximum(self.words.map, 0)], 0.0)
        return moved, reading, found[:, -1]


def init(
    lm: LM,
    key: jax.Array,
    *,
    shape: Mapping[str, int],
    vocab: int | None = None,
    context: int | None = None,
    width: int = 0,
    alpha: float = 1.0,
    cond: str | None = None,
) -> CrossModel:
    """A tiny GPT-2 with random weights.

    Args:
      shape: its `width`, `depth` and `heads`.
      vocab, context: of the tiny model; None: those of `lm`.
      width: k, the most pieces of a token, where the vocabulary is another one; else 0.
      alpha, cond: see `CrossModel`.

    Raises:
      InputError: a shape with other entries, a width that `heads` does not divide, alpha that is not finite.
    """
    if set(shape) != {"width", "depth", "heads"} or shape["width"] % shape["heads"]:
        raise InputError(f"shape is {dict(shape)}, expected width, depth and heads, of which heads divides width.")
    if not isinstance(alpha, jax.Array) and not np.all(np.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}, expected a finite number.")
    tiny = Transformer.gpt2(**shape, vocab=vocab or lm.vocab, context=context or lm.context)
    words = None
    if width:
        words = Words(jnp.zeros(lm.vocab, jnp.int32), jnp.zeros((lm.vocab, width), jnp.int32))
    stream = Stream(tiny.init(key), lm=tiny, own=OWN if width else None)
    return CrossModel(stream, jnp.asarray(alpha, jnp.float32), words, cond)


def conditions(artifact: Artifact, lm: Artifact, texts) -> dict[str, np.ndarray]:
    """Where the vocabularies differ, each prompt in the tokens of the tiny model."""
    if not artifact.spec["init"].get("width"):
        return {}
    return {OWN: instructed(load_tokenizer(artifact.path / "tokenizer"), texts, [""])[:, 0]}


def example(lm: LM, key: jax.Array) -> CrossModel:
    """A random tiny model whose logits differ visibly, for the laws."""
    control = init(lm, key, shape=dict(width=8, depth=1, heads=2))
    return control.replace(delta=control.delta.replace(params=jax.tree.map(lambda x: 6 * x, control.delta.params)))


def neutral(control: CrossModel) -> CrossModel:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))


def loss(lm: LM) -> losses.LossFn:
    """Next-token loss of the base and the tiny model together; texts whose field `sign` [B] is -1 count negatively, so
    that they are unlearned: CE(retain) - CE(forget)."""
    plain = losses.control_loss(lm)

    def signed(params, frozen, batch, keys):
        if "sign" not in batch:
            return plain(params, frozen, batch, keys)
        learn, forget = (
            plain(params, frozen, batch | {"loss_mask": batch["mask"] & (s * batch["sign"] > 0)[:, None]}, keys)
            for s in (1, -1)
        )
        metrics = {"learned": (learn.total, learn.weight), "forgotten": (forget.total, forget.weight)}
        return learn.replace(total=learn.total - forget.total, weight=learn.weight + forget.weight, metrics=metrics)

    return signed


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """Trains a tiny model beside the template `lm`; the settings are those of the stage `cross_model`."""
    return stage(root, cross_model, settings, lm=lm, data=data)


@stage_function("cross_model")
def cross_model(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    shape: Mapping[str, int],
    where: Mapping[str, Any] | None = None,
    forget: Mapping[str, Any] | None = None,
    alpha: float = 1.0,
    cond: str | None = None,
    training: Training = Training(steps=500, batch=16, rate=2e-3, schedule="cosine"),
    seed: int = 0,
) -> None:
    """Stage: next-token training of the tiny model beside the frozen template.

    Args:
      lm, data: an LM artifact, the template, and a data artifact.
      shape: of the tiny model; see `init`.
      where: learn the records whose fields have these values, such as {"label": 1}.
      forget: unlearn those whose fields have these values.
      alpha, cond: of the control that is kept; it is trained at strength 1.
      training: how it is trained. seed: of initial weights and of the order of texts.

    Raises:
      InputError: no record matches, and what `init` and training raise.
    """
    records, fields = fitting.matching(data, where), ()
    if forget is not None:
        records = [{**r, "sign": 1} for r in records] + [{**r, "sign": -1} for r in fitting.matching(data, forget)]
        fields = ("sign",)
    model, params, tokenizer = open_lm(lm)
    control = init(model, rng.stream(jax.random.key(seed), "init"), shape=shape)
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=fields)
    control = fitting.train(
        run, control, loss(model), {"params": params}, batches, training, trained="delta/params/.*", seed=seed
    )
    tokenizer.save(run.path / "tokenizer")
    control = control.replace(alpha=jnp.float32(alpha), cond=cond)
    fitting.keep(run, control, "cross_model", dict(shape=dict(shape), alpha=alpha, cond=cond))


def carry(root, *, lm: Artifact, control: Artifact) -> Artifact:
    """The control that was fitted beside another model, for `lm`.

    Raises:
      InputError: `control` was not made by this method.
    """
    return stage(root, carried, {}, lm=lm, control=control)


@stage_function("cross_model_carried")
def carried(run: Run, *, lm: Artifact, control: Artifact) -> None:
    """Stage: the same tiny model for another base, with the tables between their vocabularies where these differ."""
    if control.spec.get("method") != "cross_model":
        raise InputError(f"{control.path.name} is no control of cross_model: expected what its fit or carry left.")
    model, _, tokenizer = open_lm(lm)
    theirs = load_tokenizer(control.path / "tokenizer")
    spec = control.spec["init"]
    first = control.load()["delta"]["params"]
    vocab, _ = first["embed"]["tokens"].shape
    settings = dict(shape=spec["shape"], alpha=spec.get("alpha", 1.0), cond=spec.get("cond"))
    settings |= dict(vocab=vocab, context=first["embed"]["positions"].shape[0])
    tables = None
    if vocab != model.vocab or any(tokenizer.token(i) != theirs.token(i) for i in range(model.vocab)):
        made = token_map(tokenizer, theirs, model.vocab), pieces(tokenizer, theirs, model.vocab)
        tables, settings["width"] = Words(*map(jnp.asarray, made)), made[1].shape[1]
        run.log(mapped=float(np.mean(made[0] >= 0)), width=made[1].shape[1])
    fresh = jax.eval_shape(lambda key: init(model, key, **settings), jax.random.key(0))
    alpha = control.load()["alpha"]
    moved = fresh.replace(delta=fresh.delta.replace(params=first), alpha=jnp.asarray(alpha), words=tables)
    theirs.save(run.path / "tokenizer")
    checkpoint.save(run.path / "state", moved)
    run.record(method="cross_model", init=settings)
