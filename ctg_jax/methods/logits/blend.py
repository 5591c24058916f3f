"""CombLM: a learned gate mixes the distributions of a large model and of a small tuned one (Ormazabal et al. 2023).

    P = (1 - scale g) p + scale g p_small,   g = σ(gate(what both models predict))

The gate is one number, or a network on the entropies of both distributions (the default), on their probabilities, or on
all of these; it gives one g, or one for each token of the vocabulary (`vector`), after which P is normalised. Nothing
but the probabilities of the large model is read, so it may be a black box. The network is the authors': standardised
inputs, three layers of 512 with ReLU, and an output. Their batch norm without scale is a mean and a deviation of the
fitting set here.

Only the gate learns, by the cross-entropy of P on a few texts of the domain that neither model was tuned on. The best
single number is a minimum of a convex function, at least as good as the better of the two models on those texts.
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
from ctg_jax.controls.streams import Stream, check_vocabulary, log_probabilities, mixture
from ctg_jax.data.ids import check_shared
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.learn.pretrain import small_lm
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.lm import LM
from ctg_jax.models.record import of_record, record
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.stages.sources import load_data
from ctg_jax.support import removed
from ctg_jax.types import InputError, Sum

READS = ("none", "entropies", "probabilities", "both")


@struct.dataclass
class Blend(Control):
    """A mixture with a small language model.

    Attributes:
      small: the small model.
      gate: layers {"0": {"weight" [F, H], "offset" [H]}, …}; the last gives the log-odds of g.
      mean, deviation: float32 [F], of the inputs of the gate.
      scale: float32 [] or, per row, [B], from 0, the base model, to 1.
      reads: what the gate reads, see `READS`.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `scale` row by row.
    """

    small: Stream
    gate: dict[str, dict[str, jax.Array]]
    mean: jax.Array
    deviation: jax.Array
    scale: jax.Array
    reads: str = struct.field(pytree_node=False, default="entropies")
    cond: str | None = struct.field(pytree_node=False, default=None)

    def check(self, prompts):
        self.small.check(prompts)

    def readers(self):
        return self.small.readers("small model")

    def init(self, prompts, length):
        return per_row(self.scale, prompts, self.cond), self.small.init(prompts, length)

    def logits(self, z, h, tokens, mask, state):
        strength, reading = state
        check_vocabulary("The small model", self.small.lm.vocab, z.shape[-1], larger=True)
        other, _, reading = self.small.read(tokens, mask, z.shape[1], reading)
        p, q = log_probabilities(z), log_probabilities(other[..., : z.shape[-1]])
        return z + mixture(p, q, strength * jax.nn.sigmoid(self.odds(p, q))) - p, (strength, reading)

    def odds(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """The log-odds float32 [B, M, 1 or V] of g, given the log-probabilities p and q [B, M, V]."""
        x = (inputs(p, q, self.reads) - self.mean[None, None]) / self.deviation[None, None]
        for n in range(len(self.gate)):
            layer = self.gate[str(n)]
            x = (jax.nn.relu(x) if n else x) @ layer["weight"] + layer["offset"][None, None]
        return x


def inputs(p: jax.Array, q: jax.Array, reads: str) -> jax.Array:
    """What the gate reads of log-probabilities p and q float32 [..., V]: float32 [..., F]."""
    parts = [jnp.zeros((*p.shape[:-1], 0))]
    if reads in ("entropies", "both"):
        parts += [-jnp.sum(jnp.where(removed(x), 0.0, jnp.exp(x) * x), axis=-1, keepdims=True) for x in (q, p)]
    if reads in ("probabilities", "both"):
        parts += [jnp.exp(q), jnp.exp(p)]
    return jnp.concatenate(parts, axis=-1)


def init(
    lm: LM,
    key: jax.Array,
    *,
    small: Mapping[str, Any],
    reads: str = "entropies",
    width: int = 512,
    depth: int = 3,
    vector: bool = False,
    scale: float = 1.0,
    cond: str | None = None,
) -> Blend:
    """A control that mixes both models half and half, with random weights of the small one.

    Args:
      small: the shape of the small model, the fields of a decoder (`models.record`).
      reads: "none", "entropies", "probabilities" or "both".
      width, depth: of the network; it has no layers between where it reads nothing.
      vector: whether each token of the vocabulary has a g of its own.
      scale, cond: see `Blend`.

    Raises:
      InputError: an unknown `reads`, width or depth below 1, scale outside 0 … 1, a small model with fewer tokens.
    """
    if reads not in READS:
        raise InputError(f"reads is {reads!r}, expected one of {', '.join(READS)}.")
    if width < 1 or depth < 1:
        raise InputError(f"width is {width} and depth {depth}, expected at least 1 of both.")
    if not isinstance(scale, jax.Array) and not np.all((np.asarray(scale) >= 0) & (np.asarray(scale) <= 1)):
        raise InputError(f"scale is {scale}, expected a number from 0 to 1.")
    other = of_record(small)
    check_vocabulary("The small model", other.vocab, lm.vocab, larger=True)
    size = 2 * (reads in ("entropies", "both")) + 2 * lm.vocab * (reads in ("probabilities", "both"))
    sizes = [size, *([] if reads == "none" else [width] * depth), lm.vocab if vector else 1]
    a, *keys = jax.random.split(key, len(sizes))
    gate = {
        str(n): {"weight": jax.random.normal(k, (i, o)) * np.sqrt(2 / max(i, 1)), "offset": jnp.zeros(o)}
        for n, (k, i, o) in enumerate(zip(keys, sizes, sizes[1:]))
    }
    gate[str(len(sizes) - 2)]["weight"] *= 0.0
    stream = Stream(other.init(a), lm=other)
    return Blend(stream, gate, jnp.zeros(size), jnp.ones(size), jnp.asarray(scale, jnp.float32), reads, cond)


def loss(lm: LM) -> losses.LossFn:
    """Next-token cross-entropy of the mixture; see `losses.control_loss`. The small model receives no gradient."""
    inner = losses.control_loss(lm)

    def total(params: Blend, frozen: Any, batch: dict[str, Any], keys: jax.Array) -> Sum:
        return inner(params.replace(small=lax.stop_gradient(params.small)), frozen, batch, keys)

    return total


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    small: Mapping[str, Any] | None = None,
    held: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Artifact:
    """A small model, and the gate that mixes it with the base.

    Args:
      lm, data: an LM artifact, and texts of the domain.
      small: see `ctg_jax.learn.pretrain.small_lm`; a model with a source should have been tuned on the domain.
      held: the settings of `load_data` for the texts of the gate, which the small model should not have seen; None: the
        texts of `data`.
      settings: of the stage `blend`.
    """
    small = small or {}
    other = small_lm(root, small, lm=lm, data=data)
    texts = data if held is None else stage(root, load_data, held)
    return stage(root, blend, settings, lm=lm, small=other, data=texts)


@stage_function("blend")
def blend(
    run: Run,
    *,
    lm: Artifact,
    small: Artifact,
    data: Artifact,
    gate: Mapping[str, Any] | None = None,
    observe: int = 20,
    training: Training = Training(steps=200, batch=16, rate=2e-3, warmup=0),
    seed: int = 0,
) -> None:
    """Stage: fits the gate on the texts of `data`.

    Args:
      gate: settings of `init` without `small`.
      observe: how many batches give the mean and the deviation of the inputs.
      training: how the gate is trained.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: a small model of another vocabulary, and what `init` and training raise.
    """
    model, params, tokenizer = open_lm(lm)
    other, weights, theirs = open_lm(small)
    check_shared(tokenizer, theirs, other.vocab, small.path.name)
    made = fitting.divided(gate or {}, init)[0] | {"small": record(other)}
    learner = init(model, rng.stream(jax.random.key(seed), "init"), **made)
    learner = learner.replace(small=learner.small.replace(params=weights))
    source = Source(str(data.path), "", data.rows("data.jsonl"))
    rows = dict(batch=training.batch, length=training.tokens)
    if len(learner.mean):
        seen = pipeline(source, tokenizer, seed=rng.derived_seed(seed, "observe"), **rows)
        mean, deviation = observed(model, params, other, weights, [next(seen) for _ in range(observe)], learner.reads)
        learner = learner.replace(mean=mean, deviation=deviation)
    batches = pipeline(source, tokenizer, seed=seed, **rows)
    frozen = {"params": params}
    learner = fitting.train(run, learner, loss(model), frozen, batches, training, trained="gate/.*", seed=seed)
    fitting.keep(run, learner, "blend", made)


def observed(model: LM, params: Any, other: LM, weights: Any, batches: list, reads: str) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation float32 [F] of the inputs of a gate over the tokens of some batches."""

    @jax.jit
    def sums(params, weights, tokens, mask):
        p, q = (
            log_probabilities(m.apply(w, m.embed(w, tokens), mask).logits[..., : model.vocab])
            for m, w in ((model, params), (other, weights))
        )
        x, real = inputs(p, q, reads), mask[..., None].astype(jnp.float32)
        return jnp.sum(real), jnp.sum(real * x, axis=(0, 1)), jnp.sum(real * x**2, axis=(0, 1))

    found = [sums(params, weights, jnp.asarray(b["tokens"]), jnp.asarray(b["mask"])) for b in batches]
    count, total, square = (sum(np.asarray(x, np.float64) for x in part) for part in zip(*found))
    mean = total / count
    deviation = np.sqrt(np.maximum(square / count - mean**2, 1e-10))
    return jnp.asarray(mean, jnp.float32), jnp.asarray(deviation, jnp.float32)


def example(lm: LM, key: jax.Array) -> Blend:
    """A small random model behind a random gate, for the laws."""
    small = Transformer.gpt2(vocab=lm.vocab, width=8, depth=1, heads=2, context=lm.context)
    a, b = jax.random.split(key)
    control = init(lm, a, small=record(small), width=4, depth=1)
    params = jax.tree.map(lambda x: 4 * x, control.small.params)
    last = {**control.gate["1"], "weight": jax.random.normal(b, (4, 1))}
    return control.replace(small=control.small.replace(params=params), gate={**control.gate, "1": last})


def neutral(control: Blend) -> Blend:
    """Strength 0."""
    return control.replace(scale=jnp.zeros_like(control.scale))
