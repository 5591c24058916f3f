"""RE-Control (Kong et al. 2024, "Aligning Large Language Models with Representation Editing: A Control Perspective"): a
value function of the final state, and steps up its gradient before each token.

V(h), a network with one hidden layer, learns the reward of a whole text from each state on its way. While decoding, the
state that the unembedding reads takes n steps h ← h + η ∇V(h); keys and values stay. Here V learns from labelled texts,
as the logit of P(label | text so far); the paper regresses it on rewards of the model's own samples.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax import rng
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.selection import AtPositions, Positions
from ctg_jax.controls.selection import positions as selected
from ctg_jax.data.pipeline import pipeline
from ctg_jax.learn import fitting, lists, losses
from ctg_jax.learn.critics import Objective, of_label
from ctg_jax.learn.fitting import Training
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, Sum


@struct.dataclass
class Ascent(AtPositions):
    """h + scale · (h* − h) at site L + 1, where h* is h after n steps of h ← h + rate · ∇V(h).

    Attributes:
      value: float32 {"in": [F, D], "bias": [F], "out": [F], "offset": []}; V(h) = out · max(in h + bias, 0) + offset.
      rate: float32 [], η.
      scale: float32 [] or, per row, [B]; 0 leaves the model's logits exactly as they are.
      steps: n. site: L + 1, where the layer scan never comes.
      positions: after which tokens it acts, see `ctg_jax.controls.selection`.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `scale` row by row.
    """

    value: dict[str, jax.Array]
    rate: jax.Array
    scale: jax.Array
    steps: int = struct.field(pytree_node=False, kw_only=True)
    site: int = struct.field(pytree_node=False, kw_only=True)
    positions: Positions = struct.field(pytree_node=False, default=Positions())
    cond: str | None = struct.field(pytree_node=False, default=None)

    def init(self, prompts, length):
        return per_row(self.scale, prompts, self.cond), self.positions.begin(prompts)

    def hidden(self, h, site, pos, state):
        if not isinstance(site, int) or site != self.site:
            return h
        if (width := self.value["in"].shape[1]) != h.shape[-1]:
            raise InputError(
                f"The value function reads width {width}, but the model's is {h.shape[-1]}: it was fitted on another "
                "model."
            )
        scale, placed = state
        scale = self.positions.within(scale, pos, placed)
        x = h.astype(jnp.float32)
        return h + (scale * (ascended(self.value, x, self.rate, self.steps) - x)).astype(h.dtype)


def values(value: dict[str, jax.Array], h: jax.Array) -> jax.Array:
    """V float32 [...] of states [..., D]."""
    inner = jnp.einsum("...d,fd->...f", h.astype(jnp.float32), value["in"], precision="highest")
    inner = jax.nn.relu(inner + value["bias"].reshape((1,) * (h.ndim - 1) + (-1,)))
    return jnp.einsum("...f,f->...", inner, value["out"], precision="highest") + value["offset"]


def ascended(value: dict[str, jax.Array], h: jax.Array, rate: jax.Array, steps: int) -> jax.Array:
    """States [..., D] after `steps` steps up the gradient of V."""
    slope = jax.grad(lambda x: jnp.sum(values(value, x)))
    return jax.lax.fori_loop(0, steps, lambda _, x: x + rate * slope(x), h)


def init(
    lm: LM,
    key: jax.Array,
    *,
    width: int = 4096,
    steps: int = 30,
    rate: float = 1.0,
    positions: Any = "all",
    cond: str | None = None,
) -> Ascent:
    """A control whose V is 0 and so changes nothing.

    Args:
      width: F, of the hidden layer of V. steps, rate: n and η; the authors' are 30 and 1 for Llama-3-8B.
      positions, cond: see `Ascent`.

    Raises:
      InputError: a width or a number of steps below 1, and what `positions` raises.
    """
    if width < 1 or steps < 1:
        raise InputError(f"width is {width} and steps {steps}, expected at least 1 of each.")
    value = {
        "in": jax.random.normal(key, (width, lm.width), jnp.float32) / lm.width**0.5,
        "bias": jnp.zeros((width,), jnp.float32),
        "out": jnp.zeros((width,), jnp.float32),
        "offset": jnp.zeros((), jnp.float32),
    }
    static = dict(steps=steps, site=lm.depth + 1, positions=selected(positions), cond=cond)
    return Ascent(value, jnp.float32(rate), jnp.ones(()), **static)


def example(lm: LM, key: jax.Array) -> Ascent:
    """A random V with eight hidden units, three steps, for the laws."""
    control = init(lm, key, width=8, steps=3, rate=0.5)
    return control.replace(value=control.value | {"out": jax.random.normal(key, (8,))})


def neutral(control: Ascent) -> Ascent:
    """Strength 0."""
    return control.replace(scale=jnp.zeros_like(control.scale))


def loss(lm: LM, objective: Objective = Objective()) -> losses.LossFn:
    """The error of V at every token of a text, per token: params is the control, frozen = {"params": LM parameters}; a
    batch has `goal` and `importance` [B] beside tokens and mask."""

    def total(params, frozen, batch, keys):
        tokens, mask = batch["tokens"], batch["mask"]
        h = lm.apply(frozen["params"], lm.embed(frozen["params"], tokens), mask, last=0).hidden
        v = values(params.value, jax.lax.stop_gradient(h))
        error, weight = objective.errors(v, mask, batch["goal"], batch["importance"])
        sums = jnp.sum(jnp.where(mask, error * weight, 0.0)), jnp.sum(weight, dtype=jnp.float32)
        return Sum(*sums, {"error": sums})

    return total


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """Trains V on the labelled records of `data`; the settings are those of the stage `recontrol`."""
    return stage(root, recontrol, settings, lm=lm, data=data)


from_pairs, from_texts = lists.learners(fit)


@stage_function("recontrol")
def recontrol(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    label: int = 1,
    value: dict[str, Any] | None = None,
    objective: Objective = Objective(),
    training: Training = Training(steps=300, batch=16, rate=1e-3),
    seed: int = 0,
) -> None:
    """Stage: trains V on the states of labelled texts.

    Args:
      label: the texts that are to be valued high; all others are valued low.
      value: settings of `init`: width, steps, rate, positions, cond.
      objective: what V learns of each text so far; by default the logit of P(label | text so far).
      training: how it is trained. seed: of initial values and of the order of texts.

    Raises:
      InputError: texts of one label only, and what `init` and training raise.
    """
    options = fitting.divided(value or {}, init)[0]
    source = of_label(data, label)
    model, params, tokenizer = open_lm(lm)
    control = init(model, rng.stream(jax.random.key(seed), "init"), **options)
    fields = ("goal", "importance")
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=fields)
    frozen = {"params": params}
    control = fitting.train(
        run, control, loss(model, objective), frozen, batches, training, trained="value/.*", seed=seed
    )
    fitting.keep(run, control, "recontrol", options)
