"""The rows of a batch: how they are split over devices, and which tokens end one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax.control import STRENGTHS
from ctg_jax.mesh import layout
from ctg_jax.models.lm import LM
from ctg_jax.types import Params, Prompts, Samples, Sampling


def by_rows(
    write: Callable[..., Samples],
    lm: LM,
    params: Params,
    prompts: Prompts,
    control: Any,
    sampling: Sampling,
    devices: Sequence[jax.Device] = (),
    split: bool = True,
) -> Samples:
    """`write(lm, params, prompts, control, sampling)` with its rows split as `layout.run_rows` does, where they may be
    split. `write` is pure and hashable; `generated` is that of the part that ran longest."""
    split = split and not numbers_for_rows(control, len(prompts.tokens))
    whole = (params, control)
    out = layout.run_rows(_part, (write, lm, sampling), whole, prompts, devices=devices, split=split)
    return out.replace(generated=jnp.max(out.generated))


def _part(static, whole, prompts):
    write, lm, sampling = static
    out = write(lm, whole[0], prompts, whole[1], sampling)
    return out.replace(generated=jnp.broadcast_to(out.generated, out.mask.shape[:1]))


def numbers_for_rows(control: Any, rows: int) -> bool:
    """Whether a strength of the control is a number for each row of the batch, so that its rows cannot be split."""
    found = [x for path, x in jax.tree_util.tree_leaves_with_path(control) if is_strength(path)]
    return any(x.shape[:1] == (rows,) for x in found)


def is_strength(path: Sequence[Any]) -> bool:
    """Whether a JAX key path in a control leads to a strength: to a field that is called so, and not to a parameter of
    a model in it, such as the `scale` of a norm."""
    return isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in STRENGTHS


def is_end(tokens: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    """bool, of the shape of `tokens`: which of them are among the ids `ends`."""
    return jnp.isin(tokens, jnp.asarray(ends, jnp.int32))
