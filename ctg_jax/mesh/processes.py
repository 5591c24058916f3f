"""Several processes that run one program together (`jax.distributed`). In a single process every function here returns
its argument, or does nothing.

All processes run every stage on the same data. They differ only in the rows they compute: `rows` of a batch, whose
results `gather` collects, and the shards of arrays that `everywhere` places over all devices. The first process writes
the files of a stage; the others write into a temporary copy (`aside`), except for checkpoints, which all of them write
together.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax.types import InputError, PyTree

_ORIGIN = "copy-of"  # a file beside the copy that `aside` makes


def count() -> int:
    """Number of processes."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that writes files."""
    return count() == 1 or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has reached this call."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(value: int) -> int:
    """The value of the first process, in all of them."""
    if count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def once(act: Callable[[], Any]) -> None:
    """Calls `act` in the first process, while the others wait; what it raises stops all of them."""
    error = None
    if first():
        try:
            act()
        except Exception as e:
            error = e
    failed = agree(int(error is not None))
    if error is not None:
        raise error
    if failed:
        raise InputError("the first process stopped with an error: see its log")


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """The directory in which this process works for `path`: that itself in the first process, in others a copy of it
    without the arrays of checkpoints, which is removed in the end."""
    if first():
        barrier(f"{path} copied")
        yield path
        return
    folder = Path(tempfile.mkdtemp(prefix="ctg_jax-"))
    try:
        mine = folder / path.name
        shutil.copytree(path, mine, ignore=shutil.ignore_patterns("arrays", ".*"))
        (folder / _ORIGIN).write_text(str(path), encoding="utf-8")
        barrier(f"{path} copied")
        yield mine
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def real(path: Path) -> Path:
    """The path in the first process of what this one has at `path`, which may be inside a copy that `aside` made."""
    if first():
        return path
    for copy in (path, *path.parents):
        if (copy.parent / _ORIGIN).is_file():
            return Path((copy.parent / _ORIGIN).read_text("utf-8")) / path.relative_to(copy)
    return path


def rows(values: PyTree) -> PyTree:
    """This process's part of the rows of a batch, leaves [B, …]; the parts follow each other as the processes do.

    Raises:
      InputError: the rows cannot be divided evenly.
    """
    if count() == 1:
        return values

    def part(x):
        if x.shape[0] % count():
            raise InputError(
                f"a batch of {x.shape[0]} rows cannot be divided over {count()} processes: choose a multiple of that"
            )
        size = x.shape[0] // count()
        return x[size * jax.process_index() : size * (jax.process_index() + 1)]

    return jax.tree.map(part, values)


def gather(values: PyTree) -> PyTree:
    """The rows of all processes, in their order, in each of them."""
    if count() == 1:
        return values
    from jax.experimental import multihost_utils

    return jax.tree.map(jnp.asarray, multihost_utils.process_allgather(values, tiled=True))


def read(x: jax.Array) -> np.ndarray:
    """The numbers of an array that may be split over the devices of all processes."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def everywhere(values: PyTree, shardings: PyTree) -> PyTree:
    """Arrays over the devices of all processes, from values that each process holds; shardings: a tree of the same
    structure, or one for all."""
    if count() == 1:
        return jax.device_put(values, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda x, one=shardings: one, values)

    def put(x, where):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, where)
        impl, raw = _raw(x)
        raw = np.asarray(raw)
        out = jax.make_array_from_callback(raw.shape, where, lambda index: raw[index])
        return out if impl is None else jax.random.wrap_key_data(out, impl=impl)

    return jax.tree.map(put, values, shardings)


def local(values: PyTree) -> PyTree:
    """Whole arrays on this process's own device, from arrays that are spread over the devices of all processes."""
    if count() == 1:
        return values

    def get(x):
        impl, raw = _raw(x)
        raw = jnp.asarray(read(raw))
        return raw if impl is None else jax.random.wrap_key_data(raw, impl=impl)

    return jax.tree.map(get, values)


def _raw(x: Any) -> tuple[Any, Any]:
    """(the kind of random key it is, or None; the numbers of an array)"""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_impl(x), jax.random.key_data(x)
    return None, x
