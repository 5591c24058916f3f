"""What word diffusion may be steered towards: the values of its controls, from settings and from `prompts.cond`.

The controls are `POSITIONAL`, which need no classifier, and the fields that a classifier was fitted on. In every value
-1 means that nothing is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax.data.tags import TAGS
from ctg_jax.types import InputError, Prompts

POSITIONAL = ("length", "tags", "words")


def target_value(name: str, value: Any, fields: Mapping[str, int]) -> int | tuple[int, ...]:
    """A value from settings as an int or a tuple of ints.

    Args:
      fields: name -> number of classes of each field that the classifier predicts.

    Raises:
      InputError: an unknown control, or a value that it cannot have.
    """
    if name not in fields and name not in POSITIONAL:
        known = ", ".join([*fields, *POSITIONAL])
        raise InputError(f"target names {name!r}, expected one of {known}: give it in fields.")
    if name in fields and value not in range(fields[name]):
        raise InputError(f"target {name} is {value!r}, expected a class from 0 to {fields[name] - 1}.")
    if name == "tags":
        if unknown := [t for t in value if t is not None and t not in TAGS]:
            raise InputError(f"target tags has {unknown[0]!r}, expected None or one of {', '.join(TAGS)}.")
        return tuple(-1 if t is None else TAGS.index(t) for t in value)
    return tuple(int(v) for v in value) if name == "words" else int(value)


def requested(target: Sequence[tuple[str, Any]], prompts: Prompts) -> dict[str, jax.Array]:
    """The values of the controls for each row, int32 [B] or [B, n]: those of `target` (control, value), which are the
    same for all rows, and those of `prompts.cond`, which take their place."""
    batch = len(prompts.tokens)
    for_all = {
        name: jnp.broadcast_to(jnp.asarray(value, jnp.int32), (batch, *np.shape(value))) for name, value in target
    }
    return for_all | {name: jnp.asarray(value, jnp.int32) for name, value in (prompts.cond or {}).items()}


def check_requested(
    values: Mapping[str, jax.Array], prompts: Prompts, new: int, fields: Mapping[str, int], vocab: int, length: int
) -> None:
    """Checks what `requested` returned, for completions of `new` tokens in rows of `length` tokens.

    Raises:
      InputError: an entry that is not a control, or that has a wrong shape or value.
    """
    batch, size = len(prompts.tokens), np.asarray(prompts.mask).sum(1)
    for name, value in values.items():
        if name not in fields and name not in POSITIONAL:
            raise InputError(f"cond names {name!r}, expected one of {', '.join([*fields, *POSITIONAL])}.")
        value, per_token = np.asarray(value), int(name in ("tags", "words"))
        if value.shape[:1] != (batch,) or value.ndim != 1 + per_token or (per_token and value.shape[1] > new):
            wanted = f"[{batch}, up to {new}]" if per_token else f"[{batch}]"
            raise InputError(f"{name} has shape {value.shape}, expected {wanted}.")
        limit = {"length": int((length - size).min()) - 1, "tags": len(TAGS) - 1, "words": vocab - 1}
        most = limit[name] if name in limit else fields[name] - 1
        if value.max(initial=-1) > most or value.min(initial=-1) < -1:
            raise InputError(f"{name} has values from {value.min()} to {value.max()}, expected -1 (none) to {most}.")
