"""Controllable text generation: a frozen language model, and a `Control` that acts on it.

data ──fit──▶ Control ──generate──▶ Samples ──reward──▶ Report

`load`, `load_control`, `calibrate` and `choose` are the front door (`ctg_jax.door`), and methods are found by name:
`ctg_jax.steer` is the module `ctg_jax.methods.get("steer")`. Both are imported when they are first used, so `import
ctg_jax` stays cheap.
"""

import importlib
from pathlib import Path
from typing import Any

from ctg_jax.control import IDENTITY, Chain, Control
from ctg_jax.decode.loop import forward, generate, score
from ctg_jax.types import InputError, Prompts, Samples, Sampling

__all__ = [
    "IDENTITY",
    "Chain",
    "Control",
    "InputError",
    "Prompts",
    "Samples",
    "Sampling",
    "calibrate",
    "choose",
    "forward",
    "generate",
    "load",
    "load_control",
    "score",
]
__version__ = "0.1.0"
_DOOR = ("calibrate", "choose", "load", "load_control")


def __getattr__(name: str) -> Any:
    if name in _DOOR:
        return getattr(importlib.import_module("ctg_jax.door"), name)
    if name.isidentifier() and any((Path(__file__).parent / "methods").glob(f"*/{name}.py")) and name[0] != "_":
        return importlib.import_module("ctg_jax.methods").get(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
