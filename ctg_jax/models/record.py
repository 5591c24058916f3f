"""A decoder's configuration as plain values, for the settings of a control that holds another language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ctg_jax.models.decoder import Transformer


def record(lm: Transformer) -> dict[str, Any]:
    """The fields of a decoder that differ from their defaults, as JSON values; whether its blocks are recomputed in the
    backward pass is left out, since that belongs to a run."""
    fields = [f for f in dataclasses.fields(lm) if f.name != "remat" and getattr(lm, f.name) != f.default]
    whole = dataclasses.asdict(lm)
    return {f.name: whole[f.name] for f in fields}


def of_record(values: Mapping[str, Any]) -> Transformer:
    """The decoder that `record` describes."""
    defaults = {f.name: f.default for f in dataclasses.fields(Transformer)}
    return Transformer(**{name: _value(x, defaults.get(name)) for name, x in values.items()})


def _value(x: Any, default: Any) -> Any:
    """A JSON value as the field has it: lists are tuples, of records where the default is one of records."""
    if not isinstance(x, list | tuple):
        return x
    if isinstance(default, tuple) and default and dataclasses.is_dataclass(default[0]):
        return tuple(type(default[0])(**{name: _value(part[name], None) for name in part}) for part in x)
    return tuple(x)
