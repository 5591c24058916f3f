"""Controls in the files of other libraries: LoRA adapters of PEFT, and control vectors of repeng and llama.cpp.

A PEFT adapter is a folder with adapter_config.json and adapter_model.safetensors. Its modules are named as in the
checkpoint of the model, and the name table of the model's family says which rows of which kernel each one changes: a
fused kernel takes the changes of several modules side by side, and gives each of them its rows.

A control vector is a GGUF file with a tensor `direction.l` [D] for each block l from 0, which is added to the output of
that block, site l + 1 here; llama.cpp refuses a file with a vector for block 0. It needs the package `gguf`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ctg_jax.controls.delta import Delta
from ctg_jax.io import read_json, write_bytes, write_json
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.hf.decoders import DECODERS
from ctg_jax.models.hf.tensors import Leaf, Part
from ctg_jax.types import InputError, optional

_PREFIX = "base_model.model."
_REFUSED = {
    "use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "alora_invocation_tokens": None,
}  # fmt: skip


def read_peft(folder: str | os.PathLike, lm: Transformer) -> Delta:
    """A LoRA adapter of PEFT as a control, at strength 1.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors. lm: the model that it belongs to.

    Raises:
      InputError: no such files, another kind of adapter, a setting that is more than a low-rank change of weights, a
        tensor that belongs to no kernel of the model, or one of another shape.
    """
    folder = Path(folder)
    settings = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else None
    if not isinstance(settings, Mapping) or settings.get("peft_type") != "LORA":
        raise InputError(f"{folder}: expected adapter_config.json with peft_type 'LORA', as PEFT writes it.")
    for name, plain in _REFUSED.items():
        if settings.get(name, plain) not in (plain, [], {}):
            raise InputError(
                f"{folder}: {name} is {settings[name]!r}, which is more than a low-rank change of weights."
            )
    try:
        tensors = {k: np.asarray(x, np.float32) for k, x in load_file(folder / "adapter_model.safetensors").items()}
    except (OSError, SafetensorError) as e:
        raise InputError(f"{folder / 'adapter_model.safetensors'} cannot be read ({e}).") from None
    changes, read = {}, set()
    for path, leaf in _kernels(lm):
        found = [_layer(tensors, settings, leaf, layer, read) for layer in leaf.layers]
        rank = max(a.shape[0] for a, _ in found)
        if rank:
            a = np.stack([np.pad(a, ((0, rank - len(a)), (0, 0))) for a, _ in found])
            b = np.stack([np.pad(b, ((0, 0), (0, rank - b.shape[1]))) for _, b in found])
            changes[path] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    if unread := sorted(set(tensors) - read):
        raise InputError(f"{folder}: {unread[0]} changes no kernel of this model: is the adapter of another model?")
    return Delta(changes, jnp.ones((), jnp.float32))


def write_peft(folder: str | os.PathLike, lm: Transformer, delta: Delta, base: str = "") -> None:
    """A low-rank change of weights as an adapter that PEFT loads, its strength included.

    Args:
      folder: made if need be. base: the name or folder of the model, for adapter_config.json.

    Raises:
      InputError: no change or a dense one, one of parameters that are no kernels of layers, a strength for each row, a
        folder that cannot be written.
    """
    if not delta.changes or np.ndim(delta.scale):
        raise InputError(
            "the control changes no kernel, or has a strength for each row: expected changes, one strength."
        )
    known = dict(_kernels(lm))
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for path, change in delta.changes.items():
        if path not in known or set(change) != {"a", "b"}:
            raise InputError(f"the control changes {path} densely, or it is no kernel of a layer: PEFT's LoRA cannot.")
        a, b = (np.asarray(change[k], np.float32) for k in ("a", "b"))
        for layer in known[path].layers:
            for module, rows in _modules(known[path]).items():
                whole = np.zeros((rows[0][1].shape[0], b.shape[-1]), np.float32)
                for at, part in rows:
                    whole[_taken(part)] = float(delta.scale) * b[layer, at : at + part.rows]
                parts.setdefault(module.format(layer), []).append((a[layer], whole))
    tensors, ranks = {}, {}
    for module, changes in parts.items():
        a, b = np.concatenate([a for a, _ in changes]), np.concatenate([b for _, b in changes], axis=1)
        tensors |= {f"{_PREFIX}{module}.lora_A.weight": a, f"{_PREFIX}{module}.lora_B.weight": b}
        ranks[module] = len(a)
    rank = min(ranks.values())
    other = {module: r for module, r in ranks.items() if r != rank}
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": any(p.transposed for path in delta.changes for p in known[path].parts),
        "target_modules": sorted({_suffix(m) for path in delta.changes for m in _modules(known[path])}),
        "rank_pattern": other, "alpha_pattern": other, "modules_to_save": None, "init_lora_weights": True,
    }  # fmt: skip
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
        write_json(folder / "adapter_config.json", settings, indent=2)
    except OSError as e:
        raise InputError(f"{folder}: the adapter cannot be written there ({e.strerror}).") from e


def _kernels(lm: Transformer) -> Iterator[tuple[str, Leaf]]:
    """(path, where it is stored) of each kernel of the layers."""
    for path, leaf in DECODERS[lm.family].names(lm).items():
        if path.startswith("layers/") and path.endswith("/kernel"):
            yield path, leaf


def _modules(leaf: Leaf) -> dict[str, list[tuple[int, Part]]]:
    """Module -> its parts, each with the row of the leaf where it begins."""
    found: dict[str, list[tuple[int, Part]]] = {}
    at = 0
    for part in leaf.parts:
        found.setdefault(part.name.removesuffix(".weight"), []).append((at, part))
        at += part.rows
    return found


def _taken(part: Part) -> slice:
    return slice(part.start, part.start + part.rows * part.step, part.step)


def _suffix(module: str) -> str:
    """The name of a module within its layer."""
    return module.rpartition("{}.")[2]


def _layer(tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], leaf: Leaf, layer: int, read: set) -> tuple:
    """(a [r, in], b [out, r]) of one layer of a kernel; of rank 0 where no module changes it."""
    out, into = leaf.shape[-2:]
    found_a, found_b = [np.zeros((0, into), np.float32)], [np.zeros((out, 0), np.float32)]
    for module, parts in _modules(leaf).items():
        name = module.format(layer)
        keys = [f"{_PREFIX}{name}.lora_{x}.weight" for x in "AB"]
        if not any(key in tensors for key in keys):
            continue
        if missing := [key for key in keys if key not in tensors]:
            raise InputError(f"the adapter has no tensor {missing[0]}, which its other half needs: it is incomplete.")
        a, b = (tensors[key] for key in keys)
        rows = parts[0][1].shape[0]
        if a.shape[1] != into or b.shape != (rows, a.shape[0]):
            raise InputError(f"{keys[0]} is {a.shape} and its B {b.shape}, but the kernel is ({rows}, {into}).")
        read.update(keys)
        wide = np.zeros((out, len(a)), np.float32)
        for at, part in parts:
            wide[at : at + part.rows] = b[_taken(part)]
        found_a.append(a)
        found_b.append(wide * _scaling(settings, name, len(a)))
    return np.concatenate(found_a), np.concatenate(found_b, axis=1)


def _scaling(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of a module; alpha / √r for rank-stabilised LoRA. The keys of `alpha_pattern` are regular expressions
    for the end of a module's name, as in PEFT."""
    own = settings.get("alpha_pattern") or {}
    alpha = next((x for key, x in own.items() if re.match(rf"(.*\.)?({key})$", module)), settings.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise InputError(f"adapter_config.json has lora_alpha {alpha!r}, expected a number.")
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def read_gguf(path: str | os.PathLike) -> dict[int, np.ndarray]:
    """Site -> vector float32 [D] of a control vector.

    Raises:
      InputError: `gguf` is not installed, or the file holds no control vector.
    """
    gguf = optional("gguf", "gguf")
    try:
        tensors = gguf.GGUFReader(os.fspath(path)).tensors
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read as GGUF ({e}).") from None
    found = {t.name: np.array(t.data, np.float32) for t in tensors}
    if not found or not all(name.startswith("direction.") for name in found):
        raise InputError(f"{path} holds {', '.join(sorted(found)[:3]) or 'nothing'}, expected tensors direction.1, …")
    return {int(name.removeprefix("direction.")) + 1: x for name, x in found.items()}


def write_gguf(path: str | os.PathLike, vectors: Mapping[int, np.ndarray], family: str) -> None:
    """Writes a control vector: site 1 … L -> vector [D]; family: of the model, which the file names as a hint.

    Raises:
      InputError: `gguf` is not installed, or a site that is not the output of a block.
    """
    gguf = optional("gguf", "gguf")
    if not vectors or min(vectors) < 1:
        raise InputError(f"the vectors are at sites {sorted(vectors)}, expected outputs of blocks, from 1.")
    writer = gguf.GGUFWriter(os.fspath(path), "controlvector")
    writer.add_string("controlvector.model_hint", family)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for site, vector in sorted(vectors.items()):
        writer.add_tensor(f"direction.{site - 1}", np.asarray(vector, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
