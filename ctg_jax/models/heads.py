"""Heads, which turn hidden states into values, logits of classes and logits of words.

The head of a classifier that was imported with its encoder is a Flax module. The linear heads that this library trains
are plain dicts {"kernel", "bias"} with pure functions, so that a loss can treat them as parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ctg_jax.models.layers import ACTIVATIONS, Dense
from ctg_jax.types import Params

Head = Mapping[str, jax.Array]


class ClassHead(nn.Module):
    """A dense layer, the activation `config.head`, and logits [B, C] of `config.labels` for states [B, D]; without
    labels the activations [B, D] themselves, as in BERT's pooler."""

    config: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = activation(c.head)(Dense(c.width, c, True, name="dense")(x))
        return Dense(len(c.labels), c, True, name="out")(x) if c.labels else x


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function of a head; "" is the identity."""
    return {"": lambda x: x, "tanh": jnp.tanh, **ACTIVATIONS}[name]


def linear_head(classes: int, width: int) -> dict[str, jax.Array]:
    """A linear classifier that gives every class the same logit: kernel float32 [C, D], bias [C]."""
    return {"kernel": jnp.zeros((classes, width)), "bias": jnp.zeros(classes)}


def class_log_probabilities(head: Head, states: jax.Array) -> jax.Array:
    """log p(class | state) float32 [B, C] of states float32 [B, D] under a `linear_head`."""
    return jax.nn.log_softmax(states @ head["kernel"].T + head["bias"][None], axis=-1)


def value_head(width: int) -> dict[str, jax.Array]:
    """A value head that predicts 0: kernel float32 [D], bias []."""
    return {"kernel": jnp.zeros((width,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def values(head: Head, hidden: jax.Array) -> jax.Array:
    """Expected return float32 [B, N] of hidden states [B, N, D], which receive no gradient, under a `value_head`."""
    return jnp.einsum("bnd,d->bn", lax.stop_gradient(hidden).astype(jnp.float32), head["kernel"]) + head["bias"]


def vocabulary(params: Params) -> jax.Array:
    """The vocabulary head [V, D] of a decoder's parameters: the embeddings of the input where the two are tied."""
    return params["head"]["kernel"] if "head" in params else params["embed"]["tokens"]


def unembedding(params: Params) -> Params:
    """The part of a model's parameters that its `unembed` reads: the head, or where it is tied the embeddings."""
    return {"head": params["head"]} if "head" in params else {"embed": {"tokens": params["embed"]["tokens"]}}
