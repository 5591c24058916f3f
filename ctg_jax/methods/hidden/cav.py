"""Concept activation vectors: a probe in each layer, and the least change of a state that brings it to a probability.

GCAV (Zhang et al. 2025, "Controlling Large Language Models Through Concept Activation Vectors"). A logistic probe per
layer gives P(concept | h) = σ(w·h + b). While decoding, each state of each row is moved by its own amount,

    minimise |ε|  subject to  σ(w·(h + ε v) + b) ≥ p0,  v = w / ‖w‖:
    ε = (logit(p0) − w·h − b) / ‖w‖ where that is positive, else 0

for a concept that is added, and with ≤ and "negative" for one that is removed. Several concepts are a `Chain` of
controls, one after another, or `join`ed: the least change that meets all their constraints at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax.controls.conditions import condition, per_row
from ctg_jax.controls.least_change import multipliers
from ctg_jax.controls.selection import AtPositions, Positions
from ctg_jax.controls.selection import positions as selected
from ctg_jax.learn import activations, lists
from ctg_jax.learn.activations import gates
from ctg_jax.learn.fitting import divided
from ctg_jax.learn.probes import choose_sites, fit_probes, split
from ctg_jax.models.lm import LM, blocks_of, check_depth
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError

DIRECTIONS = ("add", "remove", "both")
MOST = 6  # concepts joined; the active constraints are found by trying all sets of them


@struct.dataclass
class Cav(AtPositions):
    """h + scale · gate[site] · the least change that brings the probes of the site to their targets.

    At scale 1 a target is met, between 0 and 1 a part of the way is gone, and a negative scale asks the same of the
    opposite concepts, whose probability is 1 − P. So scale −1 of "add to 0.9" removes to 0.1.

    Attributes:
      vector, bias: the probes w float32 [L + 2, K, D] and b [L + 2, K] of K concepts at every site.
      gate: float32 [L + 2, K], how much each site takes part; 0 leaves a concept's constraint out there.
      p0: float32 [K], or [B, K] row by row: the probabilities to reach, between 0 and 1.
      scale: float32 [] or, per row, [B]; 0 leaves the model's logits exactly as they are.
      direction: for each concept "add" (P ≥ p0), "remove" (P ≤ p0) or "both" (P = p0).
      positions: the tokens that are edited, see `ctg_jax.controls.selection`; in the paper the last of the prompt and
        what follows.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `scale` row by row.
      goal: None, or the name of a float [B] or [B, K] entry of `prompts.cond` that replaces `p0`, kept within
        1e-6 of 0 and 1.
    """

    vector: jax.Array
    bias: jax.Array
    gate: jax.Array
    p0: jax.Array
    scale: jax.Array
    direction: tuple[str, ...] = struct.field(pytree_node=False, default=("add",))
    positions: Positions = struct.field(pytree_node=False, default=Positions("answer"))
    cond: str | None = struct.field(pytree_node=False, default=None)
    goal: str | None = struct.field(pytree_node=False, default=None)

    def bind(self, frozen, params):
        check_depth("The control has probes for", self.vector.shape[-3] - 2, blocks_of(params))
        return super().bind(frozen, params)

    def init(self, prompts, length):
        p0 = self.p0[None] if self.p0.ndim == 1 else self.p0
        if self.goal is not None:
            p0 = condition(prompts, self.goal).astype(jnp.float32)
            p0 = p0[:, None] if p0.ndim == 1 else p0
        p0 = jnp.clip(p0, 1e-6, 1 - 1e-6)
        target = (jnp.log(p0) - jnp.log1p(-p0))[:, None]
        return per_row(self.scale, prompts, self.cond), target, self.positions.begin(prompts)

    def hidden(self, h, site, pos, state):
        sites, _, width = self.vector.shape
        if width != h.shape[-1]:
            raise InputError(
                f"The probes have width {width}, but the model's is {h.shape[-1]}: they were fitted on another model."
            )
        if isinstance(site, int):  # unrolled layers: nothing to compute inside a block
            if site >= sites:
                return h
            at, gate = site, self.gate[site]
        else:
            at = jnp.minimum(site, sites - 1)
            gate = jnp.where(site < sites, self.gate[at], 0.0)
        scale, target, placed = state
        w = jnp.where((gate > 0)[:, None], self.vector[at], 0.0)
        z = jnp.einsum("btd,kd->btk", h.astype(jnp.float32), w, precision="highest") + self.bias[at][None, None]
        steps = multipliers(target - jnp.sign(scale) * z, w, self.direction)
        steps = scale * gate[None, None] * steps
        steps = self.positions.within(steps, pos, placed)
        return h + jnp.einsum("btk,kd->btd", steps, w, precision="highest").astype(h.dtype)


def init(
    lm: LM,
    key: jax.Array,
    *,
    p0: float | Sequence[float] = 0.9,
    direction: str | Sequence[str] = "add",
    positions: Any = "answer",
    cond: str | None = None,
    goal: str | None = None,
) -> Cav:
    """A neutral control: zero probes, every gate open, scale 1; of as many concepts as `direction` has entries.

    Raises:
      InputError: an unknown direction, or a p0 that is no probability between 0 and 1.
    """
    direction = check_directions(direction)
    sites, k = lm.depth + 2, len(direction)
    probes = jnp.zeros((sites, k, lm.width), jnp.float32), jnp.zeros((sites, k), jnp.float32)
    gate, scale = jnp.ones((sites, k), jnp.float32), jnp.ones((), jnp.float32)
    return Cav(*probes, gate, check_p0(p0, k), scale, direction, selected(positions), cond, goal)


def example(lm: LM, key: jax.Array) -> Cav:
    """Random probes at two sites, for the laws."""
    control = init(lm, key)
    vector = jax.random.normal(key, control.vector.shape)
    gate = jnp.zeros_like(control.gate).at[jnp.array([1, lm.depth])].set(1.0)
    return control.replace(vector=vector, gate=gate)


def neutral(control: Cav) -> Cav:
    """Strength 0."""
    return control.replace(scale=jnp.zeros_like(control.scale))


def join(*controls: Cav) -> Cav:
    """The concepts of several controls as one, which meets all constraints of a site with the least change. Its scale
    and options are those of the first, and options must not differ.

    Raises:
      InputError: no controls, more than six concepts, other options or a model of another shape.
    """
    if not controls:
        raise InputError("join was given no controls, expected at least one.")
    first = controls[0]
    for c in controls:
        if (c.positions, c.cond, c.goal) != (first.positions, first.cond, first.goal):
            raise InputError("the controls to join differ in positions, cond or goal: fit them with the same.")
        if (len(c.vector), c.vector.shape[2]) != (len(first.vector), first.vector.shape[2]):
            raise InputError(
                f"the controls to join have probes of shapes {first.vector.shape} and {c.vector.shape}: expected those "
                "of one model."
            )
    leaves = {
        name: jnp.concatenate([getattr(c, name) for c in controls], axis=axis)
        for name, axis in (("vector", 1), ("bias", 1), ("gate", 1), ("p0", -1))
    }
    return first.replace(**leaves, direction=check_directions([d for c in controls for d in c.direction]))


def check_directions(direction: str | Sequence[str]) -> tuple[str, ...]:
    """One direction or several as a tuple; InputError where one is unknown or they are too many."""
    found = (direction,) if isinstance(direction, str) else tuple(direction)
    for d in found:
        if d not in DIRECTIONS:
            raise InputError(f"direction is {d!r}, expected 'add', 'remove' or 'both'.")
    if not 1 <= len(found) <= MOST:
        raise InputError(f"there are {len(found)} concepts, expected from 1 to {MOST}: chain controls for more.")
    return found


def check_p0(p0: float | Sequence[float], concepts: int) -> jax.Array:
    """float32 [K] of one probability or K; InputError where one is not between 0 and 1."""
    values = np.asarray(p0, np.float32)
    if not np.all((values > 0) & (values < 1)) or values.shape not in ((), (concepts,)):
        raise InputError(
            f"p0 is {p0}, expected a probability between 0 and 1 (both excluded), or one for each concept."
        )
    return jnp.asarray(np.broadcast_to(values, (concepts,)))


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """A control for the concept "a text of label `target`", in three stages: `states`, which reads the texts once,
    `probes`, and `cav`, which is instant, so a sweep over p0 or layers reads and fits nothing twice.

    Args:
      lm, data: an LM artifact, and records with `text` or `messages`, and `label`; labels other than `target` are the
        other side.
      settings: of the three stages.

    Raises:
      InputError: a setting that no stage has, and what `init` and the stages raise.
    """
    reading, probing, acting = divided(settings, states, probes, cav)
    check_p0(acting.get("p0", 0.9), 1), check_directions(acting.get("direction", "add"))
    read = stage(root, states, reading, lm=lm, data=data)
    return stage(root, cav, acting, lm=lm, probed=stage(root, probes, probing, read=read))


from_pairs, from_texts = lists.learners(fit)


@stage_function("cav.states")
def states(
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
    """Stage: pooled states of texts, {"with", "without"}: float32 [N, L + 2, D].

    Args:
      pool: the state of a text: that of its "last" token, as in the paper, or the "mean" over all; of a conversation
        also that of the last token of the "prompt", or the mean over the "assistant"'s last answer.
      target: the label of the texts with the concept.
      limit: how many texts are read, half of them of each side.
      batch, tokens: texts in a batch, and tokens read of a text.

    Raises:
      InputError: no record has a label, one side has no text, a state is not finite.
    """

    def make(model):
        return partial(activations.pooled_rows, model, how=pool)

    activations.keep_sides(run, make, lm, data, target=target, limit=limit, batch=batch, tokens=tokens, how=pool)


@stage_function("cav.probes", revision=1)
def probes(run: Run, *, read: Artifact, inverse_l2: float = 1e-3, heldout: float = 0.2) -> None:
    """Stage: a probe for each site, vector float32 [L + 2, D] and bias [L + 2]; metrics.jsonl has the share of texts
    that each sorts correctly, of those it was fitted on (`train_accuracy`) and of the others (`heldout_accuracy`).

    Args:
      read: of the stage `states`.
      inverse_l2: the inverse weight of the L2 penalty of the logistic regression. Where it is large, probes find
        directions that separate best and that the model hardly reads, so that targets are met and the text does not
        change. Where it is small, they approach the difference of means and are less confident, so that the same p0
        needs larger steps.
      heldout: the share of texts that the regression does not see.

    Raises:
      InputError: what `split` raises.
    """
    found = read.load()
    x, y, held = split(np.asarray(found["with"]), np.asarray(found["without"]), heldout)
    vector, bias, fitted, tested = fit_probes(x, y, held, inverse_l2)
    checkpoint.save(run.path / "state", {"vector": vector, "bias": bias})
    for site, (a, b) in enumerate(zip(fitted, tested)):
        run.log(site=site, train_accuracy=float(a), heldout_accuracy=float(b), norm=float(np.linalg.norm(vector[site])))


@stage_function("cav", revision=1)
def cav(
    run: Run,
    *,
    lm: Artifact,
    probed: Artifact,
    sites: Any = "all",
    top: int | None = None,
    threshold: float = 0.0,
    p0: float = 0.9,
    direction: str = "add",
    positions: Any = "answer",
    scale: float = 1.0,
    cond: str | None = None,
    goal: str | None = None,
) -> None:
    """Stage: the control; metrics.jsonl has the rows of its probes and whether each site is `chosen`.

    Args:
      probed: of the stage `probes`.
      sites: where to act, see `ctg_jax.learn.activations.gates`; of these the `top` with the best held-out accuracy
        (None: all), if it is at least `threshold`.
      p0, direction, positions, scale, cond, goal: see `Cav`.

    Raises:
      InputError: no site is left, and what `init` raises.
    """
    found = {name: np.asarray(x) for name, x in probed.load().items()}
    vector, bias = found["vector"], found["bias"]
    rows = probed.metrics()
    accuracy = np.asarray([row["heldout_accuracy"] for row in rows])
    gate = choose_sites(accuracy, gates(len(vector) - 2, sites), top, threshold)
    for row in rows:
        run.log(**row, chosen=bool(gate[row["site"]]))
    options = dict(p0=p0, direction=direction, positions=positions, cond=cond, goal=goal)
    control = init(open_lm(lm)[0], jax.random.key(0), **options)
    leaves = dict(vector=vector[:, None], bias=bias[:, None], gate=gate[:, None], scale=np.float32(scale))
    checkpoint.save(run.path / "state", control.replace(**{k: jnp.asarray(v) for k, v in leaves.items()}))
    run.record(method="cav", init=options)
