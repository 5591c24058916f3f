"""Steering by the features of a sparse autoencoder: towards the code of a class, or one feature to a level.

A small autoencoder learns the states of texts at one site, c = ReLU(E (h − d) + e) and ĥ = W c + d with columns of W of
length 1. While decoding, the code of each state moves by n steps of gradient descent on ½ ‖c − μ‖² over chosen
features, with a ReLU after each, and h' = h + scale · W (c* − c), so that what the autoencoder misses stays.

Bhattacharyya & Rooshenas (2025, "Steered Generation via Gradient Descent on Sparse Features") encode queries of the
attention; the hooks here reach the residual stream, so the states are those. With one feature, η = 1 and n = 1 the
feature is clamped to a level, as in Templeton et al. (2024, "Scaling Monosemanticity").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import rng
from ctg_jax.controls.conditions import check_choice, gathered, per_row
from ctg_jax.controls.selection import AtPositions, Positions
from ctg_jax.controls.selection import positions as selected
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import fitting, lists, losses
from ctg_jax.learn.activations import batches, gates, whole
from ctg_jax.learn.fitting import Training
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, Sum


@struct.dataclass
class SparseSteer(AtPositions):
    """h + scale · W (c* − c) at one site, for the code c of h and what it becomes.

    Attributes:
      code: the autoencoder, float32 {"encode": E [F, D], "bias": e [F], "decode": W [D, F], "offset": d [D],
        "size": []}; states are divided by `size` before they are encoded.
      goal: float32 [C, F], μ of each class. moved: float32 [C, F], 1 for the features that move, 0 for the others.
      rate: float32 [], η.
      scale: float32 [] or, per row, [B]; 0 leaves the model's logits exactly as they are.
      iterations: n. site: 0 … L + 1. target: the class where `choice` is None.
      choice: None, or the name of an int [B] entry of `prompts.cond` that names the class of each row.
      positions: the tokens that are edited, see `ctg_jax.controls.selection`.
    """

    code: dict[str, jax.Array]
    goal: jax.Array
    moved: jax.Array
    rate: jax.Array
    scale: jax.Array
    site: int = struct.field(pytree_node=False, kw_only=True)
    iterations: int = struct.field(pytree_node=False, default=10)
    target: int = struct.field(pytree_node=False, default=1)
    choice: str | None = struct.field(pytree_node=False, default=None)
    positions: Positions = struct.field(pytree_node=False, default=Positions())

    def init(self, prompts, length):
        if self.choice is None:
            both = self.goal[self.target][None], self.moved[self.target][None]
        else:
            both = gathered(self.goal, prompts, self.choice), gathered(self.moved, prompts, self.choice)
        return per_row(self.scale, prompts, None), both, self.positions.begin(prompts)

    def check(self, prompts):
        super().check(prompts)
        if self.choice is not None:
            check_choice(prompts, self.choice, len(self.goal), "class")

    def hidden(self, h, site, pos, state):
        if isinstance(site, int) and site != self.site:
            return h
        if (width := self.code["offset"].shape[0]) != h.shape[-1]:
            raise InputError(
                f"The autoencoder has width {width}, but the model's is {h.shape[-1]}: it was fitted on another model."
            )
        scale, (goal, moved), placed = state
        scale = self.positions.within(scale, pos, placed)
        if not isinstance(site, int):
            scale = jnp.where(site == self.site, scale, 0.0)
        c = encoded(self.code, h)
        step = self.rate * moved[:, None]
        after = jax.lax.fori_loop(0, self.iterations, lambda _, x: jax.nn.relu(x - step * (x - goal[:, None])), c)
        return h + (scale * decoded(self.code, after - c)).astype(h.dtype)


def encoded(code: dict[str, jax.Array], h: jax.Array) -> jax.Array:
    """The codes float32 [..., F] of states [..., D]."""
    axes = (1,) * (h.ndim - 1) + (-1,)
    x = h.astype(jnp.float32) / code["size"] - code["offset"].reshape(axes)
    return jax.nn.relu(jnp.einsum("...d,fd->...f", x, code["encode"], precision="highest") + code["bias"].reshape(axes))


def decoded(code: dict[str, jax.Array], c: jax.Array) -> jax.Array:
    """float32 [..., D]: what codes [..., F] add up to, in the units of the states and without the offset."""
    w = code["decode"] / jnp.maximum(jnp.linalg.norm(code["decode"], axis=0, keepdims=True), 1e-12)
    return code["size"] * jnp.einsum("...f,df->...d", c, w, precision="highest")


def init(
    lm: LM,
    key: jax.Array,
    *,
    features: int | None = None,
    classes: int = 2,
    site: int | str = "middle",
    iterations: int = 10,
    rate: float = 0.1,
    target: int = 1,
    choice: str | None = None,
    positions: Any = "all",
) -> SparseSteer:
    """An autoencoder that has learned nothing, and classes whose features all move to 0.

    Args:
      features: F; None: eight times the width. classes: C.
      site: where it acts, one of those of `ctg_jax.learn.activations.gates`.
      iterations, rate, target, choice, positions: see `SparseSteer`.

    Raises:
      InputError: a target that is no class, iterations below 1, several sites, and what `positions` raises.
    """
    at = np.flatnonzero(gates(lm.depth, site)).tolist()
    if len(at) != 1 or not 0 <= target < classes or iterations < 1:
        raise InputError(
            f"site is {site!r}, target {target} of {classes} classes and iterations {iterations}: expected one site, a "
            "class that exists, and at least one iteration."
        )
    f = 8 * lm.width if features is None else features
    rows = jax.random.normal(key, (f, lm.width), jnp.float32) / lm.width**0.5
    code = {"encode": rows, "bias": jnp.zeros(f), "decode": rows.T, "offset": jnp.zeros(lm.width), "size": jnp.ones(())}
    shape = (classes, f)
    static = dict(site=at[0], iterations=iterations, target=target, choice=choice, positions=selected(positions))
    return SparseSteer(code, jnp.zeros(shape), jnp.ones(shape), jnp.float32(rate), jnp.ones(()), **static)


def example(lm: LM, key: jax.Array) -> SparseSteer:
    """A random autoencoder of 24 features after the first block, all of which move half way, for the laws."""
    control = init(lm, key, features=24, site=1, iterations=2, rate=0.3)
    return control.replace(goal=2 * jax.random.uniform(key, control.goal.shape))


def neutral(control: SparseSteer) -> SparseSteer:
    """Strength 0."""
    return control.replace(scale=jnp.zeros_like(control.scale))


def one_feature(control: SparseSteer, feature: int, level: float) -> SparseSteer:
    """The control that sets one feature to a level and leaves the others, for every class.

    Raises:
      InputError: a feature that there is not.
    """
    if not 0 <= feature < control.goal.shape[1]:
        raise InputError(f"feature is {feature}, expected from 0 to {control.goal.shape[1] - 1}.")
    moved = jnp.zeros_like(control.moved).at[:, feature].set(1.0)
    goal = jnp.full_like(control.goal, level)
    return control.replace(goal=goal, moved=moved, rate=jnp.ones(()), iterations=1)


def loss(lm: LM, *, sparsity: float = 1e-3) -> losses.LossFn:
    """‖h − ĥ‖² / D + `sparsity` · ‖c‖₁ of the states of texts, in units of `size`, per token. params is the control,
    frozen = {"params": LM parameters}."""

    def total(params, frozen, batch, keys):
        h = jax.lax.stop_gradient(states(lm, frozen["params"], batch["tokens"], batch["mask"], params.site))
        c, size = encoded(params.code, h), params.code["size"]
        back = decoded(params.code, c) / size + params.code["offset"][None, None]
        error = jnp.mean(jnp.square(h / size - back), axis=-1)
        active = jnp.sum(c > 0, axis=-1)
        sums = {"error": error, "sparsity": jnp.sum(c, axis=-1), "active": active}
        found = {name: losses.masked_sum(x, batch["mask"]) for name, x in sums.items()}
        value = found["error"][0] + sparsity * found["sparsity"][0]
        return Sum(value, found["error"][1], found)

    return total


def states(lm: LM, params: Any, tokens: jax.Array, mask: jax.Array, site: int) -> jax.Array:
    """float32 [B, T, D], the states of texts at a site."""
    read = lm.apply(params, lm.embed(params, tokens), mask, tap=lambda h: h.astype(jnp.float32), last=1)
    return read.taps[site]


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """Trains the autoencoder and averages the codes of each class; the settings are those of the stage."""
    return stage(root, sparse_steer, settings, lm=lm, data=data)


from_pairs, from_texts = lists.learners(fit)


@stage_function("sparse_steer")
def sparse_steer(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    features: int | None = None,
    site: int | str = "middle",
    sparsity: float = 1e-3,
    iterations: int = 10,
    rate: float = 0.1,
    target: int = 1,
    positions: Any = "all",
    training: Training = Training(steps=500, batch=16, rate=1e-3),
    seed: int = 0,
) -> None:
    """Stage: an autoencoder of the states of all texts, and the mean code of the texts of each label.

    Args:
      data: records with `text` or `messages`, and a whole `label` from 0; those without one only teach the autoencoder.
      features, site, iterations, rate, target, positions: see `init`. sparsity: see `loss`.
      training: how it is trained. seed: of initial values and of the order of texts.

    Raises:
      InputError: no text of label `target`, and what `init` and training raise.
    """
    model, params, tokenizer = open_lm(lm)
    known = labelled(data.rows("data.jsonl"), str(data.path))
    sides = {i: [whole(r) for r in known if r["label"] == i] for i in range(1 + max(r["label"] for r in known))}
    if not sides.get(target):
        raise InputError(f"target is {target}, but the labels in {data.path} are {[i for i in sides if sides[i]]}.")
    options = dict(features=features, classes=len(sides), site=site, iterations=iterations, rate=rate, target=target)
    options |= dict(positions=positions)
    control = init(model, rng.stream(jax.random.key(seed), "init"), **options)
    read = jax.jit(lambda tokens, mask: states(model, params, tokens, mask, control.site))

    def parts(texts):
        return batches(model, tokenizer, texts, 16, training.tokens)

    size, center = _measured(read, parts([whole(r) for r in known[:64]]))
    code = control.code | {"size": jnp.float32(size), "offset": jnp.asarray(center / size)}
    source = Source(str(data.path), "", data.rows("data.jsonl"))
    rows = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed)
    control = fitting.train(
        run, control.replace(code=code), loss(model, sparsity=sparsity), {"params": params}, rows, training,
        trained="code/(encode|bias|decode|offset)", seed=seed,
    )  # fmt: skip
    goal = [_mean_code(control, read, parts(texts or [""])) for texts in sides.values()]
    fitting.keep(run, control.replace(goal=jnp.stack(goal)), "sparse_steer", options)


def _measured(read: Any, parts: Any) -> tuple[float, np.ndarray]:
    """(the root mean square of an entry of a centred state, the mean state [D])."""
    found = [np.asarray(read(t, m))[m] for t, m, *_ in parts]
    rows = np.concatenate(found).astype(np.float64)
    center = rows.mean(0)
    return float(np.sqrt(np.mean((rows - center) ** 2))) or 1.0, center.astype(np.float32)


def _mean_code(control: SparseSteer, read: Any, parts: Any) -> jax.Array:
    """float32 [F], the mean code of all tokens of texts."""
    codes: Sequence[tuple] = [(encoded(control.code, read(t, m)), m) for t, m, *_ in parts]
    total = sum(jnp.sum(jnp.where(jnp.asarray(m)[:, :, None], c, 0.0), axis=(0, 1)) for c, m in codes)
    return total / max(1, sum(int(m.sum()) for _, m in codes))
