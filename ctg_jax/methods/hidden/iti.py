"""Inference-time intervention on attention heads (ITI, Li et al. 2023, "Inference-Time Intervention: Eliciting Truthful
Answers from a Language Model").

A probe of each head's output tells how much the head knows of an attribute. The K best heads on held-out texts are
moved along their direction θ, in steps of the deviation σ of texts along it: y + α σ θ, before the output product of
attention. In the residual stream that is the constant W_O α σ θ.

As in the authors' code, θ is the difference of class means ("mean") or the probe's weight ("probe"), of length 1; heads
are ranked by the accuracy of a logistic regression on a fifth of the texts; K is 48 and α 15 for models with 1,024
heads; what is moved is the last token of the prompt and each new one. Unlike there, σ is measured on the texts that θ
is fitted on, the probe reads standardised outputs, and K is a share of the heads unless it is given.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.selection import AtPositions, Positions
from ctg_jax.controls.selection import positions as selected
from ctg_jax.learn import activations, lists
from ctg_jax.learn.activations import pool
from ctg_jax.learn.fitting import divided
from ctg_jax.learn.probes import choose_sites, fit_probes, split
from ctg_jax.models.lm import LM, blocks_of, check_depth
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError

KINDS = ("mean", "probe")
SHARE = 48 / 1024  # of the heads, in the authors' code


@struct.dataclass
class Iti(AtPositions):
    """y + scale · deviation · direction for the outputs y of some heads, before the output product of attention.

    Attributes:
      direction: float32 [L, heads, H], of length 1 for each head.
      deviation: float32 [L, heads], σ; 0 for the heads that do not take part.
      scale: float32 [] or, per row, [B], α; 0 leaves the model's logits exactly as they are.
      positions: the tokens that are edited, see `ctg_jax.controls.selection`.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `scale` row by row.
    """

    direction: jax.Array
    deviation: jax.Array
    scale: jax.Array
    positions: Positions = struct.field(pytree_node=False, default=Positions())
    cond: str | None = struct.field(pytree_node=False, default=None)

    def bind(self, frozen, params):
        check_depth("The control has directions for the heads of", self.direction.shape[-3], blocks_of(params))
        return super().bind(frozen, params)

    def init(self, prompts, length):
        return per_row(self.scale, prompts, self.cond), self.positions.begin(prompts)

    def heads(self, y, layer, pos, state):
        if self.direction.shape[1:] != y.shape[2:]:
            raise InputError(
                f"The directions are of {self.direction.shape[1]} heads of {self.direction.shape[2]} features, but the "
                f"model has {y.shape[2]} of {y.shape[3]}: they were fitted on another model."
            )
        scale, placed = state
        scale = self.positions.within(scale, pos, placed)
        push = self.deviation[layer - 1][:, None] * self.direction[layer - 1]
        return y + (scale[..., None] * push[None, None]).astype(y.dtype)


def init(lm: LM, key: jax.Array, *, positions: Any = "answer", cond: str | None = None) -> Iti:
    """A neutral control: every deviation is 0.

    Args:
      positions, cond: see `Iti`.

    Raises:
      InputError: what `positions` raises, and a model without heads.
    """
    if not hasattr(lm, "heads"):
        raise InputError(f"{type(lm).__name__} has no attention heads to act on.")
    zeros = jnp.zeros((lm.depth, lm.heads, lm.head_dim), jnp.float32)
    return Iti(zeros, zeros[..., 0], jnp.ones(()), selected(positions), cond)


def example(lm: LM, key: jax.Array) -> Iti:
    """Random directions of half of the heads, for the laws."""
    control = init(lm, key, positions="all")
    push = jax.random.normal(key, control.direction.shape)
    norm = jnp.linalg.norm(push, axis=-1, keepdims=True)
    some = 3.0 * (jnp.arange(lm.depth * lm.heads).reshape(lm.depth, lm.heads) % 2)
    return control.replace(direction=push / norm, deviation=some.astype(jnp.float32))


def neutral(control: Iti) -> Iti:
    """Strength 0."""
    return control.replace(scale=jnp.zeros_like(control.scale))


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """A control towards the texts of label `target`, in three stages: `outputs`, which reads the texts once, `probes`,
    and `iti`, which is instant.

    Args:
      lm, data: an LM artifact, and records with `text` or `messages`, and `label`; labels other than `target` are the
        other side.
      settings: of the three stages.

    Raises:
      InputError: a setting that no stage has, and what the stages raise.
    """
    reading, probing, acting = divided(settings, outputs, probes, iti)
    check_kind(acting.get("kind", "mean"))
    read = stage(root, outputs, reading, lm=lm, data=data)
    return stage(root, iti, acting, lm=lm, probed=stage(root, probes, probing, read=read))


from_pairs, from_texts = lists.learners(fit)


def check_kind(kind: str) -> str:
    """The kind of direction; InputError where there is none of that name."""
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}.")
    return kind


def head_outputs(lm: LM, params: Any, tokens: jax.Array, mask: jax.Array, read: jax.Array, *, how: str) -> jax.Array:
    """float32 [B, L, heads, H]: the outputs of all heads, pooled over the tokens read bool [B, T] of texts, tokens int
    [B, T] with mask bool [B, T]; see `ctg_jax.learn.activations.pool`."""

    def tap(y):
        return pool(y.reshape(*y.shape[:2], -1), read, how).reshape(-1, *y.shape[2:])

    return lm.apply(params, lm.embed(params, tokens), mask, last=1, tap_heads=tap).heads.transpose(1, 0, 2, 3)


@stage_function("iti.outputs")
def outputs(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    pool: str = "last",
    target: int = 1,
    limit: int = 2000,
    batch: int = 32,
    tokens: int = 64,
) -> None:
    """Stage: what the heads put out after texts, {"with", "without"}: float32 [N, L, heads, H].

    Args:
      pool: the output at the "last" token of a text, as the authors have it, or the "mean" over all; of a conversation
        also that at the last token of the "prompt", or the mean over the "assistant"'s last answer.
      target: the label of the texts with the attribute.
      limit: how many texts are read, half of them of each side.
      batch, tokens: texts in a batch, and tokens read of a text.

    Raises:
      InputError: no record has a label, one side has no text.
    """

    def make(model):
        init(model, jax.random.key(0))  # refuses a model without heads to act on before anything is read
        return partial(head_outputs, model, how=pool)

    activations.keep_sides(run, make, lm, data, target=target, limit=limit, batch=batch, tokens=tokens, how=pool)


@stage_function("iti.probes", revision=1)
def probes(run: Run, *, read: Artifact, inverse_l2: float = 1e-3, heldout: float = 0.2) -> None:
    """Stage: of each head the direction of its probe and that of the means, float32 [L, heads, H] of length 1, and the
    deviation of all texts along them, [L, heads]; metrics.jsonl has the share of texts that its probe sorts correctly.

    Args:
      read: of the stage `outputs`. inverse_l2: of the logistic regression, as of `cav`.
      heldout: the share of texts that the regression does not see.

    Raises:
      InputError: fewer than two texts on a side, outputs that are not finite, a share that is none.
    """
    found = {side: np.asarray(x) for side, x in read.load().items()}
    depth, heads, size = found["with"].shape[1:]
    flat = (found[side].reshape(-1, depth * heads, size) for side in ("with", "without"))
    x, y, held = split(*flat, heldout)
    weight, _, fitted, tested = fit_probes(x, y, held, inverse_l2)
    ways = {"probe": weight, "mean": x[y].mean(0, dtype=np.float64) - x[~y].mean(0, dtype=np.float64)}
    saved = {}
    for kind, way in ways.items():
        way = (way / np.maximum(np.linalg.norm(way, axis=-1, keepdims=True), 1e-12)).astype(np.float32)
        spread = np.einsum("nsd,sd->ns", x, way).std(0, dtype=np.float64).astype(np.float32)
        saved[kind] = {"direction": way.reshape(depth, heads, size), "deviation": spread.reshape(depth, heads)}
    checkpoint.save(run.path / "state", saved)
    for i, (a, b) in enumerate(zip(fitted, tested)):
        run.log(layer=i // heads + 1, head=i % heads, train_accuracy=float(a), heldout_accuracy=float(b))


@stage_function("iti")
def iti(
    run: Run,
    *,
    lm: Artifact,
    probed: Artifact,
    kind: str = "mean",
    top: int | None = None,
    threshold: float = 0.0,
    positions: Any = "answer",
    scale: float = 15.0,
    cond: str | None = None,
) -> None:
    """Stage: the control; metrics.jsonl has the rows of the probes and whether each head is `chosen`.

    Args:
      probed: of the stage `probes`.
      kind: the direction, "mean" or "probe". top: K, the heads with the best held-out accuracy that act, if it is at
        least `threshold`; None: the authors' share, 48 of 1,024, and at least one.
      positions, cond: see `init`. scale: α.

    Raises:
      InputError: an unknown kind, no head is left, and what `init` raises.
    """
    found = {name: np.asarray(x) for name, x in probed.load()[check_kind(kind)].items()}
    rows, shape = probed.metrics(), found["deviation"].shape
    accuracy = np.asarray([row["heldout_accuracy"] for row in rows])
    top = max(1, round(SHARE * accuracy.size)) if top is None else top
    chosen = choose_sites(accuracy, np.ones(accuracy.size, np.float32), top, threshold)
    for row, acts in zip(rows, chosen):
        run.log(**row, chosen=bool(acts))
    options = dict(positions=positions, cond=cond)
    leaves = found | {"deviation": found["deviation"] * chosen.reshape(shape), "scale": np.float32(scale)}
    control = init(open_lm(lm)[0], jax.random.key(0), **options)
    checkpoint.save(run.path / "state", control.replace(**{k: jnp.asarray(v) for k, v in leaves.items()}))
    run.record(method="iti", init=options)
