"""Steering: add a vector to the residual stream, found from the activations of texts with and without an attribute.

Difference of means of labelled texts (Subramani et al. 2022; Turner et al. 2023), mean difference of contrastive pairs
(CAA, Rimsky et al. 2024), or the first principal component of pair differences (Zou et al. 2023).
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax.controls import interchange
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.operators import Probe, check_operator, operate
from ctg_jax.controls.selection import AtPositions, Positions
from ctg_jax.controls.selection import positions as selected
from ctg_jax.learn import lists
from ctg_jax.learn.activations import Moments, Pairs, batches, gates, moments, pair_moments, scaled, sides
from ctg_jax.learn.fitting import divided
from ctg_jax.models.lm import LM, blocks_of, check_depth
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError

log = logging.getLogger(__name__)
DISAGREE = 0.05  # agreement of pairs below which a direction is hardly one
TOGETHER = (
    "the pairs hardly agree on a direction where steering acts (agreement %.2f; 1: all differences are equal, 0: they "
    "have nothing in common): give more pairs, or pairs that differ in the attribute alone"
)
ALIKE = 0.2  # separation of two classes below which their difference is hardly more than chance
APART = (
    "the texts of the two sides hardly differ where steering acts (separation %.2f; 1: a clear difference, 0: as two "
    "random halves): give more texts, look at their labels, or act at other sites"
)
STEPS = {"normalise": "step"}  # settings of controls from lists


@struct.dataclass
class Steer(AtPositions):
    """h + scale · gate[site] · vector[site] at sites 0 … L+1, or another operator with that vector and strength.

    Attributes:
      vector: float32 [L + 2, D], one for each site of the residual stream (see `ctg_jax.models.lm`).
      gate: float32 [L + 2], how much each site takes part.
      scale: float32 [] or, per row, [B]; 0 leaves the model's logits exactly as they are.
      target: float32 [], where "clamp" sets the coordinate, in lengths of the vector; None for the other operators.
      probe: None, or a gate for each token.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `scale` row by row.
      positions: the tokens that are edited, see `ctg_jax.controls.selection`.
      operator: see `ctg_jax.controls.operators`.
    """

    vector: jax.Array
    gate: jax.Array
    scale: jax.Array
    target: jax.Array | None = None
    probe: Probe | None = None
    cond: str | None = struct.field(pytree_node=False, default=None)
    positions: Positions = struct.field(pytree_node=False, default=Positions())
    operator: str = struct.field(pytree_node=False, default="add")

    def bind(self, frozen, params):
        check_depth("The control has steering vectors for", self.vector.shape[-2] - 2, blocks_of(params))
        return super().bind(frozen, params)

    def init(self, prompts, length):
        return per_row(self.scale, prompts, self.cond), self.positions.begin(prompts)

    def hidden(self, h, site, pos, state):
        sites, width = self.vector.shape
        if width != h.shape[-1]:
            raise InputError(
                f"The steering vector has width {width}, but the model's is {h.shape[-1]}: it was fitted on another "
                "model."
            )
        if isinstance(site, int):  # unrolled layers: nothing to compute inside a block
            if site >= sites:
                return h
            at, gate = site, self.gate[site]
        else:
            at = jnp.minimum(site, sites - 1)
            gate = jnp.where(site < sites, self.gate[at], 0.0)
        scale, placed = state
        scale = self.positions.within(scale, pos, placed)
        if self.probe is not None:
            scale = jnp.where(self.probe.open(h, at), scale, 0.0)
        if self.operator != "add":
            return operate(self.operator, h, self.vector[at], scale * gate, self.target).astype(h.dtype)
        return h + (scale * (gate * self.vector[at])[None, None, :]).astype(h.dtype)


def init(
    lm: LM,
    key: jax.Array,
    *,
    cond: str | None = None,
    positions: Any = "all",
    operator: str = "add",
    target: float = 1.0,
    probe: bool = False,
) -> Steer:
    """A neutral control: zero vectors, every gate open, scale 1.

    Args:
      cond: see `Steer`. positions: see `ctg_jax.controls.selection.positions`.
      operator: see `ctg_jax.controls.operators`. target: of "clamp", in lengths of the vector.
      probe: whether it has a gate for each token.

    Raises:
      InputError: an unknown operator, and what `positions` raises.
    """
    sites, ones = lm.depth + 2, jnp.ones((), jnp.float32)
    vector = jnp.zeros((sites, lm.width), jnp.float32)
    gate = Probe(vector, jnp.zeros((sites,), jnp.float32)) if probe else None
    goal = target * ones if check_operator(operator) == "clamp" else None
    return Steer(vector, jnp.ones((sites,), jnp.float32), ones, goal, gate, cond, selected(positions), operator)


def example(lm: LM, key: jax.Array) -> Steer:
    """Random vectors at two sites, for the laws."""
    control = init(lm, key)
    vector = 0.5 * jax.random.normal(key, control.vector.shape)
    gate = jnp.zeros_like(control.gate).at[jnp.array([1, lm.depth + 1])].set(1.0)
    return control.replace(vector=vector, gate=gate)


def neutral(control: Steer) -> Steer:
    """Strength 0."""
    return control.replace(scale=jnp.zeros_like(control.scale))


def read_gguf(path: str | os.PathLike, lm: LM) -> Steer:
    """A control vector of repeng or llama.cpp, a GGUF file, at strength 1; the package `gguf` reads it.

    Raises:
      InputError: what `interchange.read_gguf` raises; vectors of another model.
    """
    found, control = interchange.read_gguf(path), init(lm, jax.random.key(0))
    vector, gate = np.zeros(control.vector.shape, np.float32), np.zeros(control.gate.shape, np.float32)
    for site, x in found.items():
        if site > lm.depth or x.shape != (lm.width,):
            raise InputError(
                f"{path} has a vector of {x.shape} for block {site - 1}, but the model has {lm.depth} blocks of width "
                f"{lm.width}: it is another model's."
            )
        vector[site], gate[site] = x, 1.0
    return control.replace(vector=jnp.asarray(vector), gate=jnp.asarray(gate))


def write_gguf(path: str | os.PathLike, control: Steer, lm: LM) -> None:
    """The vectors of a control at the sites where it acts, at its strength, as a vector for repeng or llama.cpp.

    Raises:
      InputError: another operator than "add", a strength for each row, a choice of tokens, a vector behind the final
        norm, and what `interchange.write_gguf` raises.
    """
    if control.operator != "add" or np.ndim(control.scale) or control.cond is not None:
        raise InputError("a control vector is added at one strength to all rows: expected operator 'add', one scale.")
    if control.positions != Positions() or control.probe is not None or float(control.gate[lm.depth + 1]):
        raise InputError(
            "a control vector is added to the outputs of blocks at every token: expected positions 'all', no probe, "
            f"and sites up to {lm.depth}."
        )
    push = np.asarray(control.scale * control.gate[:, None] * control.vector)
    interchange.write_gguf(path, {s: push[s] for s in np.flatnonzero(np.asarray(control.gate)).tolist()}, lm.family)


def difference_of_means(m: Moments, target: int, rest: tuple[int, ...]) -> np.ndarray:
    """float32 [L + 2, D]: mean of label `target` minus the mean of the texts of the labels `rest`."""
    total, count = np.asarray(m.total, np.float64), np.asarray(m.count, np.float64)
    for name, labels in (("target", [target]), ("rest", list(rest))):
        if count[labels].sum() == 0:
            raise InputError(f"{name} is {labels}, but the data hold no text with that label; counts are {count}.")
    away = total[list(rest)].sum(0) / count[list(rest)].sum()
    return (total[target] / count[target] - away).astype(np.float32)


def mean_difference(p: Pairs) -> np.ndarray:
    """float32 [L + 2, D]: the mean pair difference (CAA)."""
    return (np.asarray(p.total, np.float64) / np.asarray(p.count, np.float64)).astype(np.float32)


def principal_component(p: Pairs) -> np.ndarray:
    """float32 [L + 2, D]: the first principal component (uncentred) of pair differences, as long as the mean
    difference is along it, and with its sign."""
    mean = mean_difference(p).astype(np.float64)
    _, vectors = np.linalg.eigh(np.asarray(p.square, np.float64))  # ascending
    first = vectors[:, :, -1]
    return (first * np.sum(first * mean, axis=-1, keepdims=True)).astype(np.float32)


def agreement(p: Pairs) -> np.ndarray:
    """float32 [L + 2]: how far the pairs agree on a direction, the mean inner product of the differences of two pairs
    over the mean square of a difference. 1: all differences are the same; 0: a pair says nothing about another. It is
    not flattered by few pairs, as the separation of the texts that were fitted is. NaN for one pair."""
    total, square, n = (np.asarray(x, np.float64) for x in (p.total, p.square, p.count))
    if n < 2:
        return np.full(len(total), np.nan, np.float32)
    size = np.trace(square, axis1=1, axis2=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((np.sum(total**2, axis=-1) - size) / ((n - 1) * size)).astype(np.float32)


def separation(m: Moments) -> np.ndarray:
    """float32 [L + 2]: how far two classes differ: 1 - V (1/n_0 + 1/n_1) / |difference of means|², where V is the
    variance of the texts around the mean of their class. What is subtracted is what two random halves of one class give
    on average, so 1 is a clear difference, and 0 none. NaN for two texts, which have no variance."""
    total, count = np.asarray(m.total, np.float64), np.asarray(m.count, np.float64)
    if count.sum() <= 2:
        return np.full(total.shape[1], np.nan, np.float32)
    means = total / count[:, None, None]
    spread = np.asarray(m.square, np.float64) - np.sum(count[:, None] * np.sum(means**2, axis=-1), axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = np.maximum(spread, 0.0) / (count.sum() - 2) * np.sum(1 / count)
        return (1 - chance / np.sum((means[1] - means[0]) ** 2, axis=-1)).astype(np.float32)


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """A steering control towards the texts of label `target`, in two stages: `activations`, which reads the texts once,
    and `steer`, which is instant, so a sweep over sites, normalisations or kinds reads nothing twice.

    Args:
      lm, data: an LM artifact, and records with `text` or `messages`, and `label`; or, for pairs, records with
        `positive` and `negative`, see `ctg_jax.learn.activations.sides` (records with labels are paired in their order,
        label `target` against the others).
      settings: of the two stages; `paired` follows from `kind`.

    Raises:
      InputError: a setting that no stage has, an unknown kind, and what the stages raise.
    """
    reading, acting = divided(settings, activations, steer)
    kind = acting.get("kind", "mean")
    if kind not in ("mean", "pairs", "pca"):
        raise InputError(f"kind is {kind!r}, expected 'mean', 'pairs' or 'pca'.")
    sums = stage(root, activations, {**reading, "paired": kind != "mean"}, lm=lm, data=data)
    return stage(root, steer, acting, lm=lm, sums=sums)


# From lists: the last token of each text of a pair, as CAA; strengths are steps of the stream's length.
from_pairs, from_texts = lists.learners(fit, pairs={"kind": "pairs", "pool": "last", **STEPS}, texts=STEPS)


@stage_function("steer.activations", revision=1)
def activations(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    paired: bool = False,
    pool: str = "mean",
    target: int = 1,
    batch: int = 32,
    tokens: int = 64,
) -> None:
    """Stage: `Moments` of two classes (1 = label `target`, 0 = the others), or, for `paired`, `Pairs`.

    Args:
      pool: which states of a text are averaged: "mean" over all tokens, or the "last" one; of a conversation also the
        last one of the "prompt", or the mean over those of the "assistant"; see `ctg_jax.learn.activations.batches`.
      target: the label to steer towards; all others are the other side.
      batch, tokens: texts in a batch, and tokens read of a text.

    Raises:
      InputError: no record has a label, a record lacks its pair, or one side has no text; what `batches` raises.
    """
    model, params, tokenizer = open_lm(lm)
    with_, without = sides(data.rows("data.jsonl"), target, paired, str(data.path))
    if paired:
        read = jax.jit(partial(pair_moments, model, how=pool))
        both = zip(*(batches(model, tokenizer, side, batch, tokens, pool) for side in (with_, without)))
        parts = (read(params, (*a[:2], a[3]), (*b[:2], b[3]), a[2] * b[2]) for a, b in both)
    else:
        read = jax.jit(partial(moments, model, classes=2, how=pool))
        parts = (
            read(params, t, m, np.full(len(t), label), weight, pooled)
            for label, texts in ((1, with_), (0, without))
            for t, m, weight, pooled in batches(model, tokenizer, texts, batch, tokens, pool)
        )
    total = next(parts)
    for part in parts:
        total = total + part
    checkpoint.save(run.path / "state", total)
    run.record(paired=paired)


@stage_function("steer", revision=1)
def steer(
    run: Run,
    *,
    lm: Artifact,
    sums: Artifact,
    kind: str = "mean",
    sites: Any = "middle",
    normalise: str = "none",
    scale: float = 1.0,
    cond: str | None = None,
    positions: Any = "all",
    operator: str = "add",
    target: float = 1.0,
) -> None:
    """Stage: the control, from what `activations` summed.

    Args:
      kind: "mean" (difference of means), "pairs" (mean pair difference) or "pca" (first component of differences).
      sites: see `ctg_jax.learn.activations.gates`. normalise: see `scaled`.
      scale: the strength at first. cond, positions, operator, target: see `init`.

    metrics.jsonl has the `agreement` of pairs, or the `separation` of classes, at each site; a warning says where the
    sites that act have little of it.
    """
    found = sums.load()
    if kind == "mean":
        m = Moments(**found)
        vector, texts = difference_of_means(m, 1, (0,)), np.sum(m.count)
        name, shared = "separation", separation(m)
    else:
        m = Pairs(**found)
        vector, texts = (mean_difference if kind == "pairs" else principal_component)(m), 2 * m.count
        name, shared = "agreement", agreement(m)
    norm = np.asarray(m.norm) / np.asarray(texts)
    vector = scaled(vector, norm, normalise)
    gate = gates(len(vector) - 2, sites)
    options = dict(cond=cond, positions=positions, operator=operator, target=target)
    control = init(open_lm(lm)[0], jax.random.key(0), **options)
    control = control.replace(vector=jnp.asarray(vector), gate=jnp.asarray(gate), scale=jnp.float32(scale))
    checkpoint.save(run.path / "state", control)
    for site, (length, stream) in enumerate(zip(np.linalg.norm(vector, axis=-1), norm)):
        known = {name: float(shared[site])} if np.isfinite(shared[site]) else {}
        run.log(site=site, vector_norm=float(length), stream_norm=float(stream), **known)
    best = float(np.max(shared[gate > 0])) if np.any(gate) else np.nan
    least, words = (ALIKE, APART) if kind == "mean" else (DISAGREE, TOGETHER)
    if best < least:
        log.warning(words, best)
    run.record(method="steer", init=options)
