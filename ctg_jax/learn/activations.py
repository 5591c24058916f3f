"""Activations of texts with and without an attribute: both sides of the data, batches of texts, pooled states of every
site of the residual stream, and sums of them that add up over batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax.data.labels import labelled
from ctg_jax.data.tokenizer import Tokenizer, pad_rows
from ctg_jax.models.lengths import check_reads
from ctg_jax.models.lm import LM
from ctg_jax.types import InputError, Params


@struct.dataclass
class Moments:
    """Float32 sums over texts of each of C labels: they add up over batches in any split.

    total: [C, L + 2, D] pooled activations; count: [C]; norm: [L + 2], norms of pooled activations of all labels.
    """

    total: jax.Array
    count: jax.Array
    norm: jax.Array

    def __add__(self, other: Moments) -> Moments:
        return jax.tree.map(jnp.add, self, other)


@struct.dataclass
class Pairs:
    """Float32 sums over pairs: count []; total [L + 2, D] of differences d; square [L + 2, D, D] of d dᵀ;
    norm [L + 2] of the norms of the pooled activations, two for each pair."""

    count: jax.Array
    total: jax.Array
    square: jax.Array
    norm: jax.Array

    def __add__(self, other: Pairs) -> Pairs:
        return jax.tree.map(jnp.add, self, other)


def pool(h: jax.Array, mask: jax.Array, how: str) -> jax.Array:
    """float32 [B, D] of h [B, T, D]: the state of the last real token ("last") or the mean over real ones ("mean")."""
    h = h.astype(jnp.float32)
    if how == "mean":
        weight = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        return jnp.einsum("bt,btd->bd", weight.astype(jnp.float32), h)
    if how == "last":
        end = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return jnp.take_along_axis(h, end[:, None, None], axis=1)[:, 0]
    raise InputError(f"pool is {how!r}, expected 'mean' or 'last'.")


def moments(lm: LM, params: Params, tokens, mask, label, weight, *, classes: int, how: str = "mean") -> Moments:
    """Sums over one batch of texts: tokens int [B, T], mask bool [B, T], label int [B], weight float [B] (0 = skip).

    The sums are taken inside the layer loop, so a batch never holds more than one layer's activations.
    """
    onehot = jax.nn.one_hot(label, classes, dtype=jnp.float32) * weight[:, None]

    def tap(h):
        pooled = pool(h, mask, how)
        return onehot.T @ pooled, jnp.sum(jnp.linalg.norm(pooled, axis=-1) * weight)

    total, norm = lm.apply(params, lm.embed(params, tokens), mask, tap=tap, last=1).taps
    return Moments(total.transpose(1, 0, 2), jnp.sum(onehot, axis=0), norm)


def pair_moments(lm: LM, params: Params, with_, without, weight, *, how: str = "last") -> Pairs:
    """Sums over one batch of pairs; `with_` and `without` are (tokens int [B, T], mask bool [B, T]), weight [B]."""

    def pooled(tokens, mask):
        taps = lm.apply(params, lm.embed(params, tokens), mask, tap=lambda h: pool(h, mask, how), last=1).taps
        return taps * weight[None, :, None]  # [L + 2, B, D]

    a, b = pooled(*with_), pooled(*without)
    d = a - b
    norm = jnp.sum(jnp.linalg.norm(a, axis=-1) + jnp.linalg.norm(b, axis=-1), axis=1)
    return Pairs(jnp.sum(weight), jnp.sum(d, axis=1), jnp.einsum("sbd,sbe->sde", d, d), norm)


def gates(depth: int, sites: Any) -> np.ndarray:
    """float32 [L + 2] with ones at `sites`: a list of numbers 0 … L + 1, negative ones counted from L + 1, or
    "all" blocks (1 … L), or "middle" (the third block of five: where an attribute is usually most linear)."""
    gate = np.zeros(depth + 2, np.float32)
    if sites == "all":
        sites = list(range(1, depth + 1))
    elif sites == "middle":
        sites = [max(1, round(0.6 * depth))]
    for s in sites:
        if not isinstance(s, int) or not -(depth + 2) <= s < depth + 2:
            raise InputError(f"sites holds {s!r}, expected 'all', 'middle' or whole numbers from 0 to {depth + 1}.")
        gate[s] = 1.0
    return gate


def sides(records: Sequence[dict], target: int, paired: bool, where: str) -> tuple[list[str], list[str]]:
    """Texts with and without the attribute; for pairs, equally many, in the order of the records. Records without a
    label are left out and counted in a warning."""
    if paired and all("positive" in r and "negative" in r for r in records):
        return [r["positive"] for r in records], [r["negative"] for r in records]
    records = labelled(records, where)
    with_ = [r["text"] for r in records if r["label"] == target]
    without = [r["text"] for r in records if r["label"] != target]
    if not with_ or not without:
        found = sorted({r["label"] for r in records})
        raise InputError(f"target is {target}, but the labels in {where} are {found}: texts are needed on both sides.")
    least = min(len(with_), len(without))
    return (with_[:least], without[:least]) if paired else (with_, without)


def batches(lm: LM, tokenizer: Tokenizer, texts: Sequence[str], batch: int, length: int) -> Iterator[tuple]:
    """(tokens int32 [B, T], mask bool [B, T], weight float32 [B], 0 where a row is empty or only fills the batch), cut
    at `length` tokens.

    Raises:
      InputError: what is left of a text is longer than the context of `lm`.
    """
    for start in range(0, len(texts), batch):
        rows = [tokenizer.begun(row)[:length] for row in tokenizer.encode(texts[start : start + batch])]
        longest = max(map(len, rows))
        check_reads(lm, longest, f"A text has {longest} tokens")
        rows += [[]] * (batch - len(rows))
        tokens, mask = pad_rows(rows, length, 0, left=False)
        yield tokens, mask, mask.any(1).astype(np.float32)


def sites(depth: int, site: str | int | Sequence) -> tuple[int, ...]:
    """Sites by name: "embeddings", "attention:l" and "block:l" (after the attention and after the MLP of block l =
    1 … L), "blocks" (after every block), "middle" (block ⌈L/2⌉), "final" (after the last norm), a number as in
    `ctg_jax.models.lm`, or several of them. "memory" has none.

    Raises:
      InputError: a name or number that is none of these.
    """
    if isinstance(site, (list, tuple)):
        return tuple(sorted({s for part in site for s in sites(depth, part)}))
    named = {"embeddings": (0,), "blocks": tuple(range(1, depth + 1)), "middle": (math.ceil(depth / 2),)}
    named |= {"final": (depth + 1,), "memory": ()}
    if site in named:
        return named[site]
    kind, _, block = str(site).partition(":")
    if kind in ("attention", "block") and block.isdigit() and 1 <= int(block) <= depth:
        return (int(block) + (depth + 1) * (kind == "attention"),)
    if isinstance(site, int) and 0 <= site <= 2 * depth + 1:
        return (site,)
    raise InputError(
        f"site is {site!r}, expected one of {', '.join(named)}, 'attention:l' or 'block:l' with l from 1 to {depth}, "
        f"or a number from 0 to {2 * depth + 1}."
    )
