"""Controllable text generation: a frozen language model, and a `Control` that acts on it.

data ──fit──▶ Control ──generate──▶ Samples ──reward──▶ Report
"""

from ctg_jax.control import IDENTITY, Chain, Control
from ctg_jax.decode.loop import forward, generate, score
from ctg_jax.types import Prompts, Samples, Sampling

__all__ = [
    "IDENTITY",
    "Chain",
    "Control",
    "Prompts",
    "Samples",
    "Sampling",
    "forward",
    "generate",
    "score",
]
__version__ = "0.1.0"
