"""Parameter trees to and from safetensors files, one tensor at a time.

A name table says where each leaf comes from: path -> `Leaf`, whose rows (first axis, after the layer axis) are
consecutive blocks of rows of named tensors. That one form covers renaming, transposed kernels, fused or separate
query, key and value, and heads that are interleaved in the file; and it can be read in both directions, and in
slices, so that a sharded load reads from disk only what its shards hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ctg_jax import tree
from ctg_jax.io import atomic, dumps, read_json
from ctg_jax.types import InputError, Params

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_READABLE = (*_DTYPES.values(), "F64")  # others hold quantised weights, which are numbers only with their scales


@dataclass(frozen=True)
class Part:
    """`rows` rows from row `start` of a tensor, every `step`-th one; "{}" in its name becomes the number of the layer.

    `shape` is that of the whole tensor as the leaf sees it; the file holds the transpose of a transposed tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    rows: int
    transposed: bool = False
    step: int = 1

    @property
    def stored(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class Leaf:
    """The parts whose rows, one after another, are a leaf; with a `depth` it is stacked, [L, …]."""

    parts: tuple[Part, ...]
    depth: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        layer = (sum(p.rows for p in self.parts), *self.parts[0].shape[1:])
        return layer if self.depth is None else (self.depth, *layer)

    @property
    def layers(self) -> Sequence[int | None]:
        return (None,) if self.depth is None else range(self.depth)


Table = dict[str, Leaf]


def tensor(config: Any, name: str, *shape: int) -> Leaf:
    """A leaf that is one tensor of this shape."""
    return Leaf((Part(name, shape, 0, shape[0]),), config.depth if "{}" in name else None)


def norm(config: Any, path: str, stem: str) -> Table:
    """The scale, and for LayerNorm the bias, of a norm."""
    out = {f"{path}/scale": tensor(config, f"{stem}.weight", config.width)}
    if config.norm == "layer":
        out[f"{path}/bias"] = tensor(config, f"{stem}.bias", config.width)
    return out


def dense(
    config: Any,
    path: str,
    stems: str | Sequence[str],
    rows: int | Sequence[int],
    columns: int,
    bias: bool,
    *,
    transposed: bool = False,
    blocks: Sequence[tuple[int, int]] | None = None,
) -> Table:
    """The kernel (out, in) and bias of a dense layer.

    Args:
      config: a model configuration; its `depth` stacks names with "{}".
      path: of the layer in the parameters.
      stems: name of the module in the file, or several whose outputs are joined.
      rows, columns: outputs of each module, and inputs.
      bias: whether it has one.
      transposed: the file stores (in, out).
      blocks: the output rows (start, rows) of a single module in the order that the leaf wants.
    """
    stems, rows = ([stems], [rows]) if isinstance(stems, str) else (stems, rows)
    depth = config.depth if "{}" in stems[0] else None
    cuts = [(s, n, a, k) for s, n in zip(stems, rows, strict=True) for a, k in blocks or [(0, n)]]
    kernels = tuple(Part(f"{s}.weight", (n, columns), a, k, transposed) for s, n, a, k in cuts)
    out = {f"{path}/kernel": Leaf(kernels, depth)}
    if bias:
        out[f"{path}/bias"] = Leaf(tuple(Part(f"{s}.bias", (n,), a, k) for s, n, a, k in cuts), depth)
    return out


class Checkpoint:
    """The tensors of a folder of safetensors files, memory-mapped and read in slices.

    Args:
      folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files it names.
      prefix: may be missing from the names in the file (a model saved without its head).
      aliases: (old, new) pieces of names. Two tensors of one name must be equal.
      also: folders of further `model.safetensors` by the prefix that their names get.

    Raises:
      InputError: no safetensors, or a file that cannot be read; the sentence names it.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str = "",
        aliases: Sequence[tuple[str, str]] = (),
        also: Mapping[str, Path] | None = None,
    ):
        self.folder = folder
        self._where: dict[str, tuple[Path, str]] = {}
        self._twins: list[tuple[tuple[Path, str], tuple[Path, str]]] = []
        self._files = {}
        for head, place in {"": folder, **(also or {})}.items():
            for file in _files(place):
                for stored in self._open(file).keys():  # noqa: SIM118, safe_open is no mapping
                    name = head + stored
                    for old, new in aliases:
                        name = name.replace(old, new)
                    if name in self._where:
                        self._twins.append((self._where[name], (file, stored)))
                    self._where[name] = (file, stored)
        if prefix and not any(n.startswith(prefix) for n in self._where):
            self._where |= {prefix + n: at for n, at in self._where.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def lacks(self, name: str, *, but_has: str) -> bool:
        """Whether the first tensor is missing and the second is there."""
        return name not in self and but_has in self

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; both are read, a slice at a time."""
        return self._equal(self._where[name], self._where[other])

    def rename(self, old: str, new: str) -> None:
        """Lets a tensor be found under another name instead of its own."""
        self._where[new] = self._where.pop(old)

    def _equal(self, one, other):
        a, b = (self._open(file).get_slice(stored) for file, stored in (one, other))
        if (a.get_shape(), a.get_dtype()) != (b.get_shape(), b.get_dtype()):
            return False
        rows, step = a.get_shape()[0], 1024
        return all(np.array_equal(a[i : min(i + step, rows)], b[i : min(i + step, rows)]) for i in range(0, rows, step))

    def check(self, names: Table, ignored: str) -> None:
        """Raises InputError unless every tensor of the table is there with its shape and holds plain floating-point
        numbers, and every tensor of the files is used, except names that match `ignored`."""
        used = set()
        for leaf in names.values():
            for layer in leaf.layers:
                for part in leaf.parts:
                    name = part.name.format(layer)
                    if name in used:
                        continue
                    used.add(name)
                    file, stored = self._find(name)
                    piece = self._open(file).get_slice(stored)
                    if piece.get_dtype() not in _READABLE:
                        raise InputError(
                            f"{file}: tensor {stored} holds {piece.get_dtype()}, expected {', '.join(_READABLE)}; "
                            "quantised weights cannot be read, take the model's unquantised files."
                        )
                    found = tuple(piece.get_shape())
                    if found != part.stored:
                        raise InputError(
                            f"{file}: tensor {stored} has shape {list(found)}, config.json asks for "
                            f"{list(part.stored)}; the weights and the configuration are of different models."
                        )
        for one, (file, stored) in self._twins:
            if not self._equal(one, (file, stored)):
                raise InputError(
                    f"{file}: tensors {one[1]} and {stored} are one weight of the model, but they differ; "
                    "the files are damaged or of another architecture."
                )
        used = {self._where[n] for n in used} | {one for one, _ in self._twins}
        for file, stored in sorted(set(self._where.values()) - used):
            if not re.search(ignored, stored):
                raise InputError(
                    f"{file}: tensor {stored} has no place in the model of config.json; "
                    "the weights are of another depth or architecture."
                )

    def read(self, leaf: Leaf, index: Sequence[slice], dtype: Any) -> np.ndarray:
        """The part of a leaf that a shard holds, e.g. `index` = (slice(None),) * rank for all of it."""
        spans = [s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True)]
        out = np.empty([b - a for a, b in spans], jnp.dtype(dtype))
        if leaf.depth is None:
            self._fill(out, leaf, None, spans)
        else:
            for layer in range(*spans[0]):
                self._fill(out[layer - spans[0][0]], leaf, layer, spans[1:])
        return out

    def _fill(self, out, leaf, layer, spans):
        (low, high), rest = spans[0], [slice(a, b) for a, b in spans[1:]]
        offset = 0
        for part in leaf.parts:
            a, b = max(low, offset), min(high, offset + part.rows)
            if a < b:
                file, stored = self._find(part.name.format(layer))
                first, final = (part.start + part.step * (i - offset) for i in (a, b - 1))
                at = [slice(first, final + 1), *rest]
                piece = self._open(file).get_slice(stored)[tuple(at[::-1] if part.transposed else at)]
                out[a - low : b - low] = (piece.T if part.transposed else piece)[:: part.step]
            offset += part.rows

    def _find(self, name):
        if name not in self._where:
            raise InputError(
                f"{self.folder}: tensor {name} is missing from its safetensors files; "
                "they are incomplete or of another architecture than config.json says."
            )
        return self._where[name]

    def _open(self, file):
        if file not in self._files:
            try:
                self._files[file] = safe_open(file, framework="np")
            except (SafetensorError, OSError) as e:
                raise InputError(
                    f"{file}: it cannot be read as safetensors ({e}); the file is truncated or damaged, fetch it again."
                ) from e
        return self._files[file]


def _files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            files = [folder / n for n in sorted(set(read_json(index)["weight_map"].values()))]
        except (InputError, KeyError, AttributeError, TypeError) as e:
            raise InputError(f"{index}: it is no index of safetensors files, its weight_map cannot be read.") from e
        for file in files:
            if file.resolve().parent != folder.resolve() and not file.is_symlink():
                raise InputError(f"{index}: it names {file}, a file outside of its folder.")
            if not file.is_file():
                raise InputError(f"{file}: the file is missing, {index.name} names it; fetch the checkpoint again.")
        return files
    pickled = next((f.name for p in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in sorted(folder.glob(p))), None)
    if pickled:
        raise InputError(
            f"{folder / pickled}: it is a pickle, which can run code and is never read; "
            "save the model again as safetensors (transformers: model.save_pretrained)."
        )
    raise InputError(f"{folder}: it holds no model.safetensors and no model.safetensors.index.json.")


def place(checkpoint: Checkpoint, leaf: Leaf, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """A leaf on its devices; each distinct shard is read once, and no more than one is in host memory at a time."""
    if sharding is None:
        return jnp.asarray(checkpoint.read(leaf, [slice(None)] * len(leaf.shape), dtype))
    held = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        held.setdefault(tuple((s.start, s.stop) for s in index), (index, []))[1].append(device)
    arrays = []
    for index, devices in held.values():
        shard = checkpoint.read(leaf, index, dtype)
        arrays += [jax.device_put(shard, d) for d in devices]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def check_tree(params: Params, names: Table) -> dict[str, Any]:
    """The leaves of `params` by path; InputError unless they are those of the table, with their shapes."""
    flat = tree.flatten(params)
    for path in sorted(set(flat) ^ set(names)):
        word = "missing from" if path in names else "unknown to the model's configuration but in"
        raise InputError(f"params: leaf {path} is {word} the tree; pass the stacked parameters of this very model.")
    for path, leaf in names.items():
        if tuple(flat[path].shape) != leaf.shape:
            raise InputError(f"params: leaf {path} has shape {flat[path].shape}, the model asks for {leaf.shape}.")
    return flat


def write(file: Path, names: Table, leaves: Mapping[str, Any]) -> None:
    """Writes the leaves as one safetensors file, atomically. In host memory is one leaf at a time, with those that are
    parts of the same tensor. Rows that no leaf has are zero."""
    groups: dict[str, list[str]] = {}
    for path, leaf in names.items():
        groups.setdefault(leaf.parts[0].name, []).append(path)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for paths in groups.values():
        dtype = jnp.dtype(leaves[paths[0]].dtype)
        for layer in names[paths[0]].layers:
            for part in {p.name: p for path in paths for p in names[path].parts}.values():
                size = int(np.prod(part.shape)) * dtype.itemsize
                entry = {"dtype": _DTYPES[dtype.name], "shape": part.stored, "data_offsets": [offset, offset + size]}
                header[part.name.format(layer)] = entry
                offset += size
    text = dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(file) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for paths in groups.values():
            whole = {path: np.asarray(leaves[path]) for path in paths}
            for layer in names[paths[0]].layers:
                rows = [(names[path], x if layer is None else x[layer]) for path, x in whole.items()]
                for tensor in _tensors(rows):
                    out.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _tensors(leaves: Sequence[tuple[Leaf, np.ndarray]]) -> list[np.ndarray]:
    """The file's tensors, in the file's order, from one layer of leaves, each with its rows."""
    out = {}
    for leaf, rows in leaves:
        offset = 0
        for part in leaf.parts:
            tensor = out.setdefault(part.name, (np.zeros(part.shape, rows.dtype), part.transposed))[0]
            tensor[part.start : part.start + part.rows * part.step : part.step] = rows[offset : offset + part.rows]
            offset += part.rows
    return [t.T if transposed else t for t, transposed in out.values()]
