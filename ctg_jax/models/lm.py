"""The protocol every language model follows, its key/value cache and its output.

Sites of the residual stream, for reads (`tap`) and writes (`Control.hidden`) alike, with L blocks:

    0            the input embeddings, positions included
    l = 1 … L    the output of block l
    L + 1        after the final norm: what the unembedding sees
    L + 1 + l    inside block l, between attention and MLP (writes only)

Beside the stream, the outputs of the heads of block l = 1 … L before the output product of attention, [B, T, heads, H],
are read by `tap_heads` and written by `Control.heads`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import struct

from ctg_jax.control import IDENTITY, Control
from ctg_jax.types import InputError, Params

Tap = Callable[[jax.Array], Any]  # [B, T, D] -> pytree; runs inside the layer loop, so it can reduce there


@struct.dataclass
class Cache:
    """Keys and values of the tokens read so far; sequences are right-aligned, so `length` is one scalar.

    Attributes:
      k, v: one array [B, K, S, H] per layer; heads before slots, as batched matrix products want them.
      mask: bool [B, S], which slots may be attended to.
      length: int32 [], the next slot to write.
      offset: int32 [B], the position of the next token of each row (padding and prefixes do not count).
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    mask: jax.Array
    length: jax.Array
    offset: jax.Array


def blocks_of(params: Params) -> int:
    """L, the number of blocks that parameters have, stacked or not."""
    layers = params["layers"]
    return len(layers) if isinstance(layers, tuple) else len(jax.tree.leaves(layers)[0])


def check_depth(what: str, found: int, depth: int) -> None:
    """InputError where something for `found` blocks meets a model of another depth; `what` begins the sentence."""
    if found != depth:
        blocks = "1 block" if found == 1 else f"{found} blocks"
        raise InputError(f"{what} {blocks}, but this model has {depth}: it was fitted on another model.")


def write_prefix(cache: Cache, prefix: tuple[jax.Array, jax.Array]) -> Cache:
    """An empty cache whose first P slots hold the prefix (k, v), each [L, B, K, P, H]; positions do not move."""
    k, v = prefix
    check_depth("The control's prefix has keys and values for", len(k), len(cache.k))
    p = k.shape[3]
    return cache.replace(
        k=tuple(c.at[:, :, :p].set(a.astype(c.dtype)) for c, a in zip(cache.k, k)),
        v=tuple(c.at[:, :, :p].set(a.astype(c.dtype)) for c, a in zip(cache.v, v)),
        mask=cache.mask.at[:, :p].set(True),
        length=cache.length + p,
    )


@struct.dataclass
class Out:
    """logits float32 [B, M, V]; hidden [B, T, D] after the final norm; the cache moved on (or None); taps with
    leaves [L + 2, …] (or None); heads, what `tap_heads` read, with leaves [L, …] (or None)."""

    logits: jax.Array
    hidden: jax.Array
    cache: Cache | None
    taps: Any
    heads: Any = None


class LM(Protocol):
    """A frozen language model. It holds no arrays, is hashable, and so is a static argument of `jax.jit`."""

    vocab: int
    width: int
    depth: int
    context: int
    kv_heads: int
    head_dim: int

    def init(self, key: jax.Array) -> Params:
        """Random parameters; layers are stacked, leaves [L, …] under `params["layers"]`."""

    def unstack(self, params: Params) -> Params:
        """The same parameters with `params["layers"]` a tuple of L trees: the layout for decoding, where a scan
        over stacked weights would copy every layer at every token."""

    def above(self, params: Params | None, site: int) -> tuple[LM, Params | None]:
        """The blocks above a site 0 … L as a language model of its own, which reads the stream there in place of
        embedded tokens: `above.apply(stream)` gives what `apply` gives. Its sites are counted from there. With None for
        params, the model alone."""

    def init_cache(self, params: Params, batch: int, length: int) -> Cache:
        """An empty cache of `length` slots."""

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        """int [B, T] -> [B, T, D], without positions."""

    def unembed(self, params: Params, h: jax.Array) -> jax.Array:
        """Logits float32 [B, M, V] of final hidden states [B, M, D]: those that `apply` returns."""

    def apply(
        self,
        params: Params,
        x: jax.Array,
        mask: jax.Array,
        cache: Cache | None = None,
        control: Control = IDENTITY,
        state: Any = (),
        tap: Tap | None = None,
        last: int | None = None,
        beside: bool = False,
        tap_heads: Tap | None = None,
    ) -> Out:
        """Reads embedded tokens x [B, T, D] with mask bool [B, T] and predicts the next one after the last
        `last` of them (all by default; 0 for the hidden states alone). Runs `control.hidden` and `control.heads`, and
        `control.prefix` when there is no cache; never `control.logits`, which belongs to the decode loop.

        beside: the T tokens are not one text but each is read as the next one behind the cache, at the same position:
            it attends to the cache and to itself, and `mask` is not read. The cache is shared by all of them, and
            returned as it was."""
