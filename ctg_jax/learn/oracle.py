"""An oracle about whole texts that samples of a language model teach, divided among their tokens: the control, loss and
training of NADO (Meng et al. 2022; see `ctg_jax.methods.nado`), which other methods have as a guide."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax.control import IDENTITY, Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.streams import Stream, check_vocabulary
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.learn.next_classifier import log_odds
from ctg_jax.learn.pool import Pool, batches, positive, read
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.heads import linear_head
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run.stage import Artifact, Run
from ctg_jax.types import InputError, Params, Sum

KINDS = ("head", "stream", "mixed")
DIVERGENCES = ("forward", "backward", "squared")


@struct.dataclass
class Nado(Control):
    """z + alpha log σ(r).

    Attributes:
      value: the head {"kernel": float32 [V, D'], "bias": float32 [V]} on the states of the scorer, or of the base.
      alpha: float32 [] or, per row, [B]; 0 is the base model.
      scorer: None, or the small language model whose states the head reads.
      project: None, or float32 [D', D]: makes inputs of the scorer of the base's states.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    value: dict[str, jax.Array]
    alpha: jax.Array
    scorer: Stream | None = None
    project: jax.Array | None = None
    cond: str | None = struct.field(pytree_node=False, default=None)

    def check(self, prompts):
        if self.scorer is not None:
            self.scorer.check(prompts)

    def init(self, prompts, length):
        reading = None if self.scorer is None else self.scorer.init(prompts, length)
        return per_row(self.alpha, prompts, self.cond), reading

    def readers(self):
        return () if self.scorer is None else self.scorer.readers("scorer")

    def odds(self, z, h, tokens, mask, reading):
        """(r float32 [B, M, V], the next reading)."""
        if self.scorer is not None:
            extra = None if self.project is None else h.astype(jnp.float32) @ self.project.T
            _, h, reading = self.scorer.read(tokens, mask, z.shape[1], reading, extra=extra)
        return log_odds(self.value, h[:, h.shape[1] - z.shape[1] :]), reading

    def logits(self, z, h, tokens, mask, state):
        strength, reading = state
        check_vocabulary("The oracle", self.value["kernel"].shape[0], z.shape[-1])
        r, reading = self.odds(z, h, tokens, mask, reading)
        return z + strength * jax.nn.log_sigmoid(r), (strength, reading)


@struct.dataclass
class Odds(Control):
    """r in place of the logits, for the loss."""

    nado: Nado

    def init(self, prompts, length):
        return self.nado.init(prompts, length)[1]

    def logits(self, z, h, tokens, mask, state):
        return self.nado.odds(z, h, tokens, mask, state)


def init(
    lm: LM,
    key: jax.Array,
    *,
    kind: str = "head",
    shape: Mapping[str, int] | None = None,
    alpha: float = 1.0,
    cond: str | None = None,
) -> Nado:
    """A control with R = ½ everywhere, which changes nothing.

    Args:
      kind: "head", "stream" or "mixed".
      shape: width, depth and heads of the small language model, for the last two; None: 128, 2 and 2.
      alpha, cond: see `Nado`.

    Raises:
      InputError: another kind, a shape for a head, a width that the heads do not divide, alpha that is not finite.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}.")
    if not isinstance(alpha, jax.Array) and not np.all(np.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}, expected a finite number.")
    alpha = jnp.asarray(alpha, jnp.float32)
    if kind == "head":
        if shape is not None:
            raise InputError(f"shape is {dict(shape)}, but a head has no model of its own: choose another kind.")
        return Nado(linear_head(lm.vocab, lm.width), alpha, cond=cond)
    sizes = dict(width=128, depth=2, heads=2) | dict(shape or {})
    if unknown := sizes.keys() - {"width", "depth", "heads"}:
        raise InputError(f"shape has {sorted(unknown)[0]!r}, expected width, depth and heads.")
    if sizes["width"] % sizes["heads"]:
        raise InputError(f"shape has the width {sizes['width']}, which heads={sizes['heads']} does not divide.")
    small = Transformer.gpt2(vocab=lm.vocab, context=lm.context, **sizes)
    a, b = jax.random.split(key)
    project = 0.02 * jax.random.normal(b, (small.width, lm.width)) if kind == "mixed" else None
    return Nado(linear_head(lm.vocab, small.width), alpha, Stream(small.init(a), lm=small), project, cond)


def loss(lm: LM, *, weight: float = 1.0, divergence: str = "forward") -> losses.LossFn:
    """Binary cross-entropy of c and r at every token of a completion, plus `weight` times the divergence of
    o = Σ_v p(v | y_≤t) R(y_≤t, v) and m = R(y_≤t) at every token but the last; the mean over tokens.

    params is the control, frozen = {"params": those of the LM}; the batch has `label` float [B], c or its probability,
    and `importance` float [B], the weight of each text. Both o and m receive gradients.

    Args:
      weight: of the regularisation (the authors' code: 1 for lexical constraints, 0.5 for translation).
      divergence: "forward" KL(o ‖ m), as in the lexical code, "backward" KL(m ‖ o), as in that of translation, or
        "squared" (o - m)².

    Raises:
      InputError: another divergence.
    """
    if divergence not in DIVERGENCES:
        raise InputError(f"divergence is {divergence!r}, expected one of {', '.join(DIVERGENCES)}.")

    def terms(z, r, target):
        expected = jnp.sum(jax.nn.softmax(z, axis=-1) * jax.nn.sigmoid(r), axis=-1)
        return jnp.take_along_axis(r, target[..., None], axis=-1)[..., 0], expected

    def total(params, frozen, batch, keys):
        text = read(lm, frozen["params"], batch, keys, Odds(params))
        both = (text.replace(control=IDENTITY, state=()), text)
        r, expected = reduced(both, terms, batch["completion"])
        label, rows = batch["label"][:, None], batch["importance"][:, None]
        entropy = -label * jax.nn.log_sigmoid(r) - (1 - label) * jax.nn.log_sigmoid(-r)
        o = jnp.clip(expected[:, 1:], 1e-6, 1 - 1e-6)
        far = bernoulli(o, r[:, :-1], divergence)
        ce, count = losses.masked_sum(rows * entropy, batch["written"])
        apart, inner = losses.masked_sum(rows * far, batch["written"][:, 1:])
        return Sum(ce + weight * apart, count, {"cross_entropy": (ce, count), "inconsistency": (apart, inner)})

    return total


def bernoulli(o: jax.Array, r: jax.Array, divergence: str) -> jax.Array:
    """The divergence of a probability o, between 0 and 1, and m = σ(r), float32 [...]; see `loss`."""
    yes, no, m = jax.nn.log_sigmoid(r), jax.nn.log_sigmoid(-r), jax.nn.sigmoid(r)
    if divergence == "squared":
        return jnp.square(o - m)
    if divergence == "forward":
        return o * (jnp.log(o) - yes) + (1 - o) * (jnp.log1p(-o) - no)
    return m * (yes - jnp.log(o)) + (1 - m) * (no - jnp.log1p(-o))


def teach(
    run: Run,
    control: Nado,
    objective: losses.LossFn,
    params: Params,
    tokenizer: Tokenizer,
    samples: Pool,
    *,
    threshold: float | str,
    importance: np.ndarray,
    training: Training,
    seed: int,
    start_from: Artifact | None,
) -> Nado:
    """The control after learning from samples of the model with these params, inside a stage.

    Args:
      objective: `loss`. samples: with their rewards. threshold: see `Pool.threshold`; c is 1 from there on.
      importance: float [n], the weight of each sample. start_from: the artifact of the round before, or None.

    Raises:
      InputError: all samples on one side of the threshold, and what training raises.
    """
    limit = samples.threshold(threshold)
    label = positive(samples.column("reward"), limit).astype(np.float32)
    run.record(oracle={"threshold": limit, "positives": int(label.sum()), "samples": len(label)})
    records = samples.with_(label=label, importance=np.asarray(importance, np.float32))
    rows = batches(records, tokenizer, batch=training.batch, seed=seed, fields=("label", "importance"))
    return fitting.train(
        run, control, objective, {"params": params}, rows, training.at(1e-2 if control.scorer is None else 1e-3),
        trained=r"value/.*|scorer/params/.*|project", seed=seed, start_from=start_from,
    )  # fmt: skip
