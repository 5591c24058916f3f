"""`Delta`, a change of a model's weights: dense (fine-tuning) or of low rank (LoRA); `RowDelta`, one for each row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from ctg_jax import rng, tree
from ctg_jax.control import Control
from ctg_jax.controls.conditions import check_choice, gathered
from ctg_jax.models.lm import blocks_of, check_depth
from ctg_jax.types import InputError, Params

# The matrices of every block: what LoRA changes by default.
KERNELS = r"layers/.*/kernel"


EVERYTHING = r".*"


@struct.dataclass
class Delta(Control):
    """A change of selected parameters: W + scale · ΔW, with ΔW dense or of low rank.

    Attributes:
      changes: path of a parameter in the stacked layout -> {"full": its shape} or {"a": [..., r, in],
        "b": [..., out, r]}, of which ΔW = b a (LoRA, Hu et al. 2021, eq. 3, with alpha / r left to `scale`).
      scale: float32 []; 0 is the frozen model, 1 the fitted one. Weights are shared by all rows, so it is not per row.
    """

    changes: dict[str, dict[str, jax.Array]]
    scale: jax.Array

    def layout(self, rule):
        """A change is split as its kernel is; the rank of a low-rank change is whole on every device."""
        specs = {}
        for path in self.changes:
            spec = rule(path)
            rows, columns = (None, None, *spec)[-2:]
            specs |= {f"changes/{path}/full": spec}
            specs |= {f"changes/{path}/a": PartitionSpec(None, columns), f"changes/{path}/b": PartitionSpec(rows, None)}
        return specs

    def weights(self, params: Params) -> Params:
        stacked = isinstance(params["layers"], dict)
        named = dict(self.changes)
        if not stacked:  # the layout for decoding: layers/attn/… [L, …] becomes layers/i/attn/…
            for path in [p for p in named if p.startswith("layers/")]:
                rest = path.removeprefix("layers/")
                for i, change in enumerate(tree.unstack(named.pop(path))):
                    named[f"layers/{i}/{rest}"] = change

        def moved(path, p):
            change = named.pop(path, None)
            if change is None:
                return p
            delta = change["full"] if "full" in change else change["b"] @ change["a"]
            if delta.shape != p.shape:
                raise InputError(
                    f"The control changes {path} by an array of shape {delta.shape}, but this model's has {p.shape}: "
                    "it was fitted on another model."
                )
            return (p.astype(jnp.float32) + self.scale * delta).astype(p.dtype)

        out = tree.map_with_path(moved, params)
        if named:
            raise InputError(
                f"The control changes {sorted(named)[0]}, which this model lacks: it was fitted on another model."
            )
        return out


def chosen(params: Any, pattern: str, least: int) -> dict[str, Any]:
    """The parameters whose path matches, with at least `least` axes in one layer; InputError if there is none."""
    try:
        found = tree.select(params, pattern)
    except re.error as e:
        raise InputError(f"targets is {pattern!r}, which is no regular expression ({e}).") from None
    found = {p: x for p, x in found.items() if len(x.shape) - p.startswith("layers/") >= least}
    if not found:
        paths = ", ".join(tree.flatten(params))
        raise InputError(f"targets is {pattern!r}, which matches no matrix of the model; its parameters are {paths}.")
    return found


def lora(key: jax.Array, params: Any, rank: int, targets: str = KERNELS) -> Delta:
    """A neutral low-rank `Delta` on the matrices whose whole path matches `targets`.

    Args:
      key: for `a`, normal with variance 1 / in; `b` is zero.
      params: arrays or `ShapeDtypeStruct`s in the stacked layout.
      rank: r, at least 1.
      targets: a regular expression over paths such as `layers/attn/qkv/kernel`.

    Raises:
      InputError: a rank below 1, or a pattern that matches nothing.
    """
    if rank < 1:
        raise InputError(f"rank is {rank}, expected at least 1.")
    changes = {}
    for path, w in chosen(params, targets, least=2).items():
        *lead, out, into = w.shape
        a = jax.random.normal(rng.stream(key, path), (*lead, rank, into), jnp.float32) / into**0.5
        changes[path] = {"a": a, "b": jnp.zeros((*lead, out, rank), jnp.float32)}
    return Delta(changes, jnp.ones((), jnp.float32))


def full(params: Any, targets: str = EVERYTHING) -> Delta:
    """A neutral dense `Delta` (zeros) on every parameter whose whole path matches `targets`."""
    found = chosen(params, targets, least=0)
    return Delta({p: {"full": jnp.zeros(w.shape, jnp.float32)} for p, w in found.items()}, jnp.ones((), jnp.float32))


@struct.dataclass
class RowDelta(Control):
    """Low-rank changes of weights of which each row takes its own: W + scale · s_k b_k a_k for a row of choice k. They
    are computed as products of rank r beside that with W, so that K changes share one program.

    Attributes:
      changes: path of a kernel in the stacked layout -> {"a": [K, L, r, in], "b": [K, L, out, r]}.
      strengths: float32 [K], s of each.
      scale: float32 [] or, per row, [B].
      choice: the name of an int [B] entry of `prompts.cond`, from 0 to K − 1.
    """

    changes: dict[str, dict[str, jax.Array]]
    strengths: jax.Array
    scale: jax.Array
    choice: str = struct.field(pytree_node=False, default="entry")

    def check(self, prompts):
        check_choice(prompts, self.choice, len(self.strengths), "change of weights")

    def init(self, prompts, length):
        scale = self.scale * gathered(self.strengths, prompts, self.choice)
        taken = jax.tree.map(lambda x: gathered(x, prompts, self.choice), self.changes)
        return {path: {"a": x["a"], "b": x["b"] * scale.reshape(-1, 1, 1, 1)} for path, x in taken.items()}

    def row_weights(self, params: Params, state: Any) -> Params:
        return with_rows(params, state)


def with_rows(params: Params, rows: dict[str, dict[str, jax.Array]]) -> Params:
    """Parameters in whose layers, beside each kernel that is changed, is what `models.layers.Dense` adds for rows.

    Args:
      rows: path of a kernel in the stacked layout -> float32 {"a": [R, L, r, in], "b": [R, L, out, r]}, see there.

    Raises:
      InputError: a path that is no kernel of the layers, or a change that does not fit the model.
    """
    for path, change in rows.items():
        at = path.split("/")
        if at[0] != "layers" or at[-1] != "kernel":
            raise InputError(f"The control changes {path} for each row, expected kernels of the layers.")
        check_depth(f"The control changes {path} in", change["a"].shape[1], blocks_of(params))
        per_layer = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), change)  # [L, B, …]
        if isinstance(params["layers"], dict):
            layers = _put(params["layers"], at[1:-1], per_layer)
        else:
            parts = tree.unstack(per_layer)
            layers = tuple(_put(layer, at[1:-1], part) for layer, part in zip(params["layers"], parts, strict=True))
        params = {**params, "layers": layers}
    return params


def _put(layer: Params, at: list[str], change: dict[str, jax.Array]) -> Params:
    if not at:
        shape, kernel = (change["b"].shape[-2], change["a"].shape[-1]), layer["kernel"].shape[-2:]
        if shape != kernel:
            raise InputError(
                f"The control changes a kernel by arrays of shape {shape} for each row, but this model's has {kernel}: "
                "it was fitted on another model."
            )
        held = layer.get("rows")
        joined = (
            change
            if held is None
            else {  # another control of the chain changes this kernel too
                "a": jnp.concatenate([held["a"], change["a"]], axis=-2),
                "b": jnp.concatenate([held["b"], change["b"]], axis=-1),
            }
        )
        return {**layer, "rows": joined}
    if at[0] not in layer:
        raise InputError(f"The control changes {'/'.join(at)}, which this model lacks: it was fitted on another model.")
    return {**layer, at[0]: _put(layer[at[0]], at[1:], change)}


def row_delta(deltas: Sequence[Delta], choice: str = "entry") -> RowDelta:
    """K low-rank changes, each at its strength, of which each row takes one.

    Raises:
      InputError: none; dense changes; other kernels or ranks than the first.
    """
    if not deltas:
        raise InputError("row_delta was given no changes of weights, expected at least one.")
    shapes = [{path: {k: x.shape for k, x in change.items()} for path, change in d.changes.items()} for d in deltas]
    for found in shapes:
        if found != shapes[0] or any(set(change) != {"a", "b"} for change in found.values()):
            raise InputError(
                "the changes of weights are dense, or of other kernels or ranks: expected LoRA of one shape."
            )
    changes = jax.tree.map(lambda *x: jnp.stack(x), *(d.changes for d in deltas))
    strengths = jnp.stack([jnp.asarray(d.scale, jnp.float32) for d in deltas])
    return RowDelta(changes, strengths, jnp.ones((), jnp.float32), choice)
