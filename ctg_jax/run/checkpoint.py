"""Checkpoints: Orbax arrays in a directory with a manifest of SHA-256 digests. A checkpoint is complete or absent.

    PATH/arrays/…        Orbax (OCDBT); restores onto any mesh
         manifest.json   paths, shapes and types of the leaves, JSON facts, digest of every file, digest of itself

Orbax alone restores a flipped bit silently, so every file is checked before it is read. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from ctg_jax import tree
from ctg_jax.io import dumps, read_json, sha256, sha256_of, write_json
from ctg_jax.mesh import layout, processes
from ctg_jax.types import InputError, PyTree

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


class DamagedError(InputError):
    """A checkpoint whose files are not those that were written."""


def save(path: str | os.PathLike, values: PyTree, meta: Mapping[str, Any] | None = None) -> None:
    """Writes the leaves of a pytree, and JSON facts, as one checkpoint directory.

    A reader sees the whole checkpoint or none: it is written to a directory beside `path`, which is then renamed. In a
    run of several processes all of them call this function.

    Args:
      path: the directory to make; a checkpoint that is already there is replaced.
      values: arrays, numbers and typed PRNG keys.
      meta: JSON-able facts, read back by `read_meta`.

    Raises:
      InputError: `path` is there and is not a checkpoint; it cannot be written, for example because the disk is full.
    """
    mine = Path(path).absolute()
    path = processes.real(mine)
    if path.exists() and not (path / MANIFEST).is_file() and (path.is_file() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not a checkpoint: choose another path or remove it")
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    leaves, keys, arrays = {}, {}, {}
    for name, x in tree.flatten(values).items():
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            keys[name] = str(jax.random.key_impl(x))
            x = jax.random.key_data(x)
        x = x if isinstance(x, jax.Array) else _plain(name, x)
        if processes.count() > 1 and isinstance(x, jax.Array) and x.is_fully_addressable:
            x = np.asarray(x)  # the first process writes it; Orbax takes only arrays that all processes share
        leaves[name] = [str(x.dtype), list(x.shape)]
        if x.size:  # Orbax refuses empty arrays; their shape is all that there is to save
            arrays[name] = x
    if processes.first():
        with _disk(path, new):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in (new, old):
                if left.exists():
                    shutil.rmtree(left)
            new.mkdir()
    processes.barrier(f"{path} begin")
    with _disk(path, new):
        if arrays:
            ocp.save(new / "arrays", _nest(arrays))
    processes.barrier(f"{path} written")
    if processes.first():
        with _disk(path, new):
            _seal(new, {"leaves": leaves, "keys": keys, "meta": dict(meta or {})})
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
        shutil.rmtree(old, ignore_errors=True)
    processes.barrier(f"{path} done")
    if mine != path:
        mine.mkdir(parents=True, exist_ok=True)
        shutil.copy(path / MANIFEST, mine)


def _seal(new: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of a directory that holds all its other files."""
    files = {p.relative_to(new).as_posix(): _digest(p, flush=True) for p in sorted(new.rglob("*")) if p.is_file()}
    body = {**facts, "files": files}
    write_json(new / MANIFEST, {"body": body, "sha256": _sha(body)})


@contextlib.contextmanager
def _disk(path: Path, new: Path) -> Iterator[None]:
    """Reports a full or broken disk in one sentence and removes the unfinished files. Orbax hides the number of the
    error in the text of another one and logs a traceback."""
    logger = logging.getLogger("absl")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    except (OSError, ValueError) as e:
        code = e.errno if isinstance(e, OSError) else _OS_ERROR.search(str(e))
        if code is None:
            raise
        code = code if isinstance(code, int) else int(code[1])
        shutil.rmtree(new, ignore_errors=True)
        raise InputError(
            f"the checkpoint {path} cannot be written ({os.strerror(code)}): make room and run again; what was saved "
            "before is whole"
        ) from e
    finally:
        logger.disabled = was


def load(path: str | os.PathLike, like: PyTree = None, shardings: PyTree = None) -> PyTree:
    """Reads a checkpoint after checking every file of it.

    Args:
      path: the directory that `save` made.
      like: a pytree of arrays or `ShapeDtypeStruct`s that gives structure and static fields, and shardings where
        its leaves carry them; without it, a nested dict of what was saved.
      shardings: the same structure with a sharding per leaf, or one for all; before those of `like`.

    Raises:
      InputError: no checkpoint there, a pickle, a damaged file (named), a leaf (named) of another shape or type than
        `like` has, or missing, or unexpected.
    """
    path = processes.real(Path(path).absolute())
    body = verify(path)
    leaves, keys = body["leaves"], body["keys"]
    wanted = dict.fromkeys(leaves) if like is None else tree.flatten(like)
    if like is not None:
        _compare(path, leaves, keys, wanted)
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        put = dict.fromkeys(leaves, shardings)
    else:
        put = tree.flatten(shardings)
    found, abstract, own = {}, {}, {}
    for name, (dtype, shape) in leaves.items():
        where = put.get(name) or getattr(wanted[name], "sharding", None)
        where = where or layout.default_sharding()
        if 0 in shape:
            found[name] = jax.device_put(jnp.zeros(shape, dtype), where)
        else:
            own[name] = where
            abstract[name] = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=_shared(where))
    if abstract:
        found |= _flat(ocp.load(path / "arrays", _nest(abstract)), abstract)
    for name, where in own.items():
        if _shared(where) is not where:
            found[name] = jax.device_put(found[name].addressable_data(0), where)
    for name, impl in keys.items():
        found[name] = jax.random.wrap_key_data(found[name], impl=impl)
    if like is None:
        return _nest({name: found[name] for name in leaves})
    return tree.map_with_path(lambda name, _: found[name], like)


def _shared(where: Any) -> Any:
    """A sharding that replicates over the devices of all processes, in place of one on devices of this process alone,
    because Orbax takes only shardings that all processes share."""
    if processes.count() == 1 or not where.is_fully_addressable:
        return where
    return NamedSharding(Mesh(np.asarray(jax.devices()), ("all",)), PartitionSpec())


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON facts given to `save`."""
    return _manifest(processes.real(Path(path).absolute()))["meta"]


def verify(path: Path) -> dict[str, Any]:
    """Checks every file against the manifest and returns its body; InputError naming the file that is wrong."""
    body = _manifest(path)
    for name, (size, digest) in body["files"].items():
        file = path / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing: the checkpoint is damaged; restore another or train again")
        if _digest(file) != [size, digest]:
            raise DamagedError(
                f"{file} has other contents than were written: the checkpoint is damaged; restore another or train "
                "again"
            )
    return body


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a training directory, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit())


def step_path(folder: Path, step: int) -> Path:
    """The path of the checkpoint of a step in a training directory."""
    return folder / f"{step:08d}"


def load_last(folder: Path, like: PyTree, shardings: PyTree = None) -> tuple[int, PyTree, dict[str, Any]] | None:
    """(step, values, meta) of the last whole checkpoint in a training directory, or None where there is none.

    A damaged checkpoint is reported in the log with the name of its bad file, and the one before it is read.

    Raises:
      InputError: every checkpoint is damaged, or the last whole one does not fit `like`.
    """
    steps, problem = saved_steps(folder), None
    for step in reversed(steps):
        path = step_path(folder, step)
        try:
            values = load(path, like, shardings)
        except DamagedError as e:
            problem = problem or e
            log.warning("skipping the checkpoint of step %d: %s", step, e)
            continue
        return step, values, read_meta(path)
    if problem:
        raise problem
    return None


def prune(folder: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints of a training directory."""
    for step in saved_steps(folder)[: -keep or None]:
        shutil.rmtree(step_path(folder, step))


def prune_after(folder: Path, step: int) -> None:
    """Removes the checkpoints of steps after `step`."""
    for later in saved_steps(folder):
        if later > step:
            shutil.rmtree(step_path(folder, later))


def _manifest(path: Path) -> dict[str, Any]:
    if path.is_file():
        with open(path, "rb") as f:
            pickled = f.read(2)[:1] == b"\x80" or path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin")
        kind = "a pickle, which can run code and is never read" if pickled else "a file"
        raise InputError(f"{path} is {kind}: expected a checkpoint directory with {MANIFEST}")
    if not path.is_dir():
        raise InputError(f"there is no checkpoint at {path}: check the path or train first")
    file = path / MANIFEST
    if not file.is_file():
        raise DamagedError(f"{file} is missing: {path} is no checkpoint, or a damaged one")
    try:
        whole = read_json(file)
        if whole["sha256"] == _sha(whole["body"]):
            return whole["body"]
    except (InputError, KeyError, TypeError):
        pass
    raise DamagedError(f"{file} has other contents than were written: the checkpoint is damaged")


def _compare(path: Path, leaves: dict, keys: dict, wanted: dict[str, Any]) -> None:
    for name in wanted:
        if name not in leaves:
            raise InputError(
                f"{path} has no {name!r}, which is expected here: it was saved from another model, method or optimizer"
            )
    for name in leaves:
        if name not in wanted:
            raise InputError(
                f"{path} has {name!r}, which is not expected here: it was saved from another model, method or optimizer"
            )
    for name, x in wanted.items():
        dtype, shape = leaves[name]
        if name in keys:
            dtype, shape = f"key<{keys[name]}>", shape[:-1]
        x = x if hasattr(x, "dtype") else _plain(name, x)
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        if tuple(shape) != tuple(x.shape) or key != (name in keys) or (not key and dtype != str(x.dtype)):
            raise InputError(
                f"{path}: {name!r} is {dtype}{list(shape)} where {x.dtype}{list(x.shape)} is expected: it was saved "
                "from a model or control of another size or type"
            )


def _plain(name: str, x: Any) -> np.ndarray:
    """A number or numpy array in the type JAX gives it: 32 bits where 64-bit types are off."""
    wide = np.asarray(x)
    narrow = wide.astype(jax.dtypes.canonicalize_dtype(wide.dtype))
    if wide.dtype.kind in "iu" and not np.array_equal(wide, narrow):
        raise InputError(f"{name!r} is {wide.dtype} with values that do not fit {narrow.dtype}; store it in meta")
    return narrow


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, x in flat.items():
        *parents, last = name.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last or "value"] = x
    return nested


def _flat(nested: dict[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name in names:
        x = nested
        for part in name.split("/"):
            x = x[part or "value"]
        found[name] = x
    return found


def _digest(file: Path, flush: bool = False) -> list:
    if flush:
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    return [file.stat().st_size, sha256(file)]


def _sha(body: Any) -> str:
    return sha256_of(dumps(body, sort_keys=True, ensure_ascii=True, allow_nan=True))
