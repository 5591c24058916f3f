"""Saved controls as one safetensors file: their leaves as tensors, and in the metadata how each was made and the
fingerprint of its language model. A file becomes the folder of an artifact again when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ctg_jax import methods, tree
from ctg_jax.control import Control
from ctg_jax.io import dumps, write_bytes
from ctg_jax.models.lm import LM
from ctg_jax.types import InputError

SUFFIX = ".safetensors"
_KEY = "ctg_jax"  # of the metadata


def write(path: Path, controls: Sequence[tuple[Control, Mapping[str, Any]]]) -> None:
    """Writes (control, spec of its artifact) pairs; replaces what is there."""
    parts = [tree.flatten(control) for control, _ in controls]
    tensors = {f"{i}/{name}": np.asarray(x) for i, leaves in enumerate(parts) for name, x in leaves.items()}
    write_bytes(path, save(tensors, metadata={_KEY: dumps([spec for _, spec in controls])}))


def read(path: Path, lm: LM) -> list[tuple[Control, dict[str, Any]]]:
    """What `write` wrote, for a language model.

    Raises:
      InputError: no such file, one of another kind, or controls of a model of another shape.
    """
    try:
        with safe_open(path, framework="np") as file:
            specs = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, safe_open is no mapping
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path} cannot be read ({e})") from None
    if specs is None:
        raise InputError(f"{path} holds tensors, but no control that ctg_jax saved")
    found = []
    for i, spec in enumerate(json.loads(specs)):
        like = methods.shapes(spec, lm, str(path))
        held = {name.partition("/")[2]: x for name, x in tensors.items() if name.startswith(f"{i}/")}
        shapes, mine = ({name: tuple(x.shape) for name, x in part.items()} for part in (tree.flatten(like), held))
        if shapes != mine:
            odd = sorted(name for name in {*shapes, *mine} if shapes.get(name) != mine.get(name))[0]
            raise InputError(
                f"{path} holds {odd} of shape {mine.get(odd)}, expected {shapes.get(odd)}: it was fitted on another "
                "model"
            )
        found.append((tree.map_with_path(lambda name, _, held=held: jnp.asarray(held[name]), like), spec))
    return found
