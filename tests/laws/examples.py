"""One small control of every method, and a chain of four that together use every hook."""

import functools

import jax
import jax.numpy as jnp
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain, Control
from ctg_jax.controls import truncate
from ctg_jax.controls.vectors import SoftPrompt, soft_prompt
from ctg_jax.methods import dexperts, finetune, steer

LM = worlds.tiny()
METHODS = [n for n in methods.names() if hasattr(methods.get(n), "example")]
CASES = [*METHODS, "chain"]


def mixed(lm, key, parts=None) -> Chain:
    parts = parts or (finetune.example, steer.example, dexperts.example)
    keys = jax.random.split(key, 4)
    prompt = SoftPrompt(soft_prompt(keys[3], 2, lm.width, deviation=1.0))
    made = [make(lm, k) for make, k in zip(parts, keys)]
    return Chain((prompt, Chain((truncate.TopP(jnp.float32(0.95)), *made[1:])), made[0]))


def example(name, lm, key) -> Control:
    if name == "chain":
        return mixed(lm, key)
    module = methods.get(name)
    for need in ("init", "example", "neutral"):
        assert hasattr(module, need), f"methods/{name}.py lacks {need}; see docs/new_method.md"
    return jax.tree.map(jnp.asarray, module.example(lm, key))


@functools.cache
def build(name) -> Control:
    return example(name, LM, jax.random.key(7))
