"""Parameter trees: paths, selection by regular expression, and the two layouts of stacked layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def path_str(path: Sequence[Any]) -> str:
    """`layers/attn/qkv/kernel` for a JAX key path."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def map_with_path(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` whose function is given the path string first."""
    return jax.tree_util.tree_map_with_path(lambda p, *x: fn(path_str(p), *x), tree, *rest)


def flatten(tree: PyTree) -> dict[str, Any]:
    """Path string -> leaf, in tree order."""
    return {path_str(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def select(tree: PyTree, pattern: str) -> dict[str, Any]:
    """The leaves whose whole path matches the regular expression."""
    rx = re.compile(pattern)
    return {p: x for p, x in flatten(tree).items() if rx.fullmatch(p)}


def split(tree: PyTree, pattern: str) -> tuple[PyTree, PyTree]:
    """(matching, others): two trees of the same structure with `None` in the places of the other."""
    rx = re.compile(pattern)
    match = map_with_path(lambda p, x: x if rx.fullmatch(p) else None, tree)
    rest = map_with_path(lambda p, x: None if rx.fullmatch(p) else x, tree)
    return match, rest


def join(a: PyTree, b: PyTree) -> PyTree:
    """The inverse of `split`."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def concrete(x: Any) -> np.ndarray | None:
    """The values of an array, for a check on the host; None where they are not known here: inside a compiled program,
    on another machine, or where x is a shape or None."""
    if x is None or isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return None
    return None if isinstance(x, jax.Array) and not x.is_fully_addressable else np.asarray(x)


def size_bytes(tree: PyTree) -> int:
    """Bytes of all leaves (arrays or `ShapeDtypeStruct`s)."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def unstack(tree: PyTree) -> tuple[PyTree, ...]:
    """A tree whose leaves are [L, …] as a tuple of L trees."""
    depth = jax.tree.leaves(tree)[0].shape[0]
    return tuple(jax.tree.map(lambda x, i=i: x[i], tree) for i in range(depth))


def stack(trees: Sequence[PyTree]) -> PyTree:
    """The inverse of `unstack`."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
