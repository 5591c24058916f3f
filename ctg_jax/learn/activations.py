"""Activations of texts with and without an attribute: both sides of the data, batches of texts, pooled states of every
site of the residual stream, and sums of them that add up over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax.data.labels import labelled
from ctg_jax.data.messages import Messages, has_messages, is_messages
from ctg_jax.data.tokenizer import Tokenizer, pad_rows
from ctg_jax.models.lengths import check_reads
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm
from ctg_jax.types import InputError, Params

STEP = 0.05  # of the length of the stream


@struct.dataclass
class Moments:
    """Float32 sums over texts of each of C labels: they add up over batches in any split.

    total: [C, L + 2, D] pooled activations; count: [C]; norm, square: [L + 2], the norms of the pooled activations of
    all labels, and the squares of these norms.
    """

    total: jax.Array
    count: jax.Array
    norm: jax.Array
    square: jax.Array

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
    """float32 [B, D] of h [B, T, D]: the state of the last token of the mask ("last"), or the mean over them ("mean").
    "prompt" and "assistant" are the same two, for the masks that `batches` makes of conversations."""
    h = h.astype(jnp.float32)
    if how in ("mean", "assistant"):
        weight = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        return jnp.einsum("bt,btd->bd", weight.astype(jnp.float32), h)
    if how in ("last", "prompt"):
        end = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return jnp.take_along_axis(h, end[:, None, None], axis=1)[:, 0]
    raise InputError(f"pool is {how!r}, expected 'mean' or 'last', or of conversations 'prompt' or 'assistant'.")


def moments(
    lm: LM, params: Params, tokens, mask, label, weight, read=None, *, classes: int, how: str = "mean"
) -> Moments:
    """Sums over one batch of texts: tokens int [B, T], mask bool [B, T], label int [B], weight float [B] (0 = skip),
    read bool [B, T], the tokens whose states are pooled (None: all real ones).

    The sums are taken inside the layer loop, so a batch never holds more than one layer's activations.
    """
    onehot = jax.nn.one_hot(label, classes, dtype=jnp.float32) * weight[:, None]

    def tap(h):
        pooled = pool(h, mask if read is None else read, how)
        norm = jnp.linalg.norm(pooled, axis=-1)
        return onehot.T @ pooled, jnp.sum(norm * weight), jnp.sum(norm**2 * weight)

    total, norm, square = lm.apply(params, lm.embed(params, tokens), mask, tap=tap, last=1).taps
    return Moments(total.transpose(1, 0, 2), jnp.sum(onehot, axis=0), norm, square)


def pooled(lm: LM, params: Params, tokens, mask, read, *, how: str) -> jax.Array:
    """float32 [L + 2, B, D], the pooled states of texts at every site: tokens int [B, T], mask bool [B, T], read bool
    [B, T], the tokens whose states are pooled."""
    return lm.apply(params, lm.embed(params, tokens), mask, tap=lambda h: pool(h, read, how), last=1).taps


def pooled_rows(lm: LM, params: Params, tokens, mask, read, *, how: str) -> jax.Array:
    """`pooled` with the texts first, [B, L + 2, D]."""
    return pooled(lm, params, tokens, mask, read, how=how).transpose(1, 0, 2)


def pair_moments(lm: LM, params: Params, with_, without, weight, *, how: str = "last") -> Pairs:
    """Sums over one batch of pairs; `with_` and `without` are (tokens int [B, T], mask bool [B, T]), with the tokens to
    pool, bool [B, T], as a third unless all real ones are, weight [B]."""

    def states(tokens, mask, read=None):
        return pooled(lm, params, tokens, mask, mask if read is None else read, how=how) * weight[None, :, None]

    a, b = states(*with_), states(*without)
    d = a - b
    norm = jnp.sum(jnp.linalg.norm(a, axis=-1) + jnp.linalg.norm(b, axis=-1), axis=1)
    return Pairs(jnp.sum(weight), jnp.sum(d, axis=1), jnp.einsum("sbd,sbe->sde", d, d), norm)


def gates(depth: int, sites: Any) -> np.ndarray:
    """float32 [L + 2] with ones at `sites`: a number or a list of them, 0 … L + 1, negative ones counted from L + 1, or
    "all" blocks (1 … L), or "middle" (the third block of five: where an attribute is usually most linear)."""
    gate = np.zeros(depth + 2, np.float32)
    if sites == "all":
        sites = list(range(1, depth + 1))
    elif sites == "middle":
        sites = [max(1, round(0.6 * depth))]
    elif isinstance(sites, int | str):
        sites = [sites]
    for s in sites:
        if not isinstance(s, int) or not -(depth + 2) <= s < depth + 2:
            raise InputError(f"sites holds {s!r}, expected 'all', 'middle' or whole numbers from 0 to {depth + 1}.")
        gate[s] = 1.0
    return gate


Read = str | Messages  # what activations are read of


def sides(records: Sequence[dict], target: int, paired: bool, where: str) -> tuple[list[Read], list[Read]]:
    """Texts, or conversations, with and without the attribute; for pairs, equally many, in the order of the records.
    Records without a label are left out and counted in a warning.

    The `positive` and `negative` of a pair are texts, or messages, or, in a record with `messages`, the assistant's
    answers to them.
    """
    if paired and all("positive" in r and "negative" in r for r in records):
        return tuple([_side(r, name) for r in records] for name in ("positive", "negative"))
    records = labelled(records, where)
    with_ = [whole(r) for r in records if r["label"] == target]
    without = [whole(r) for r in records if r["label"] != target]
    if not with_ or not without:
        found = sorted({r["label"] for r in records})
        raise InputError(f"target is {target}, but the labels in {where} are {found}: texts are needed on both sides.")
    least = min(len(with_), len(without))
    return (with_[:least], without[:least]) if paired else (with_, without)


def whole(record: dict) -> Read:
    """The conversation of a record with `messages`, or else its `text`."""
    return record["messages"] if has_messages(record) else record["text"]


def _side(record: dict, name: str) -> Read:
    side = record[name]
    if not has_messages(record) or is_messages(side):
        return side
    return [*record["messages"], {"role": "assistant", "content": side}]


def batches(
    lm: LM, tokenizer: Tokenizer, texts: Sequence[Read], batch: int, length: int, how: str = "mean"
) -> Iterator[tuple]:
    """(tokens int32 [B, T], mask bool [B, T], weight float32 [B], 0 where a row is empty or only fills the batch, read
    bool [B, T], the tokens to pool), cut at `length` tokens.

    A conversation is read to the end of the assistant's last answer, or, where its last message is none, to where the
    assistant would answer.

    Args:
      how: "mean" and "last" pool over all tokens. Of conversations also "prompt", the last token before the answer, and
        "assistant", the tokens of the answer.

    Raises:
      InputError: what is left of a text is longer than the context of `lm`; a conversation that is longer than `length`
        and pooled otherwise than by "mean"; "prompt" or "assistant" of a text; "assistant" without an answer.
    """
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        plain = iter(tokenizer.encode([t for t in part if not is_messages(t)]))
        found = [_conversation(tokenizer, t, length, how) if is_messages(t) else _text(next(plain), tokenizer, how)
                 for t in part]  # fmt: skip
        rows = [row[:length] for row, _ in found]
        longest = max(map(len, rows))
        check_reads(lm, longest, f"A text has {longest} tokens")
        rows += [[]] * (batch - len(rows))
        tokens, mask = pad_rows(rows, length, 0, left=False)
        read = mask.copy()
        for row, (_, pooled) in zip(read, found):
            row[: pooled.start] = row[pooled.stop :] = False
        yield tokens, mask, mask.any(1).astype(np.float32), read


def read_texts(
    read: Callable[..., jax.Array],
    lm: LM,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[Read],
    *,
    batch: int,
    tokens: int,
    how: str,
) -> np.ndarray:
    """[N, …], what `read(params, tokens [B, T], mask [B, T], pooled [B, T])` [B, …] returns for texts, in their order;
    `batch`, `tokens` (its `length`) and `how` as in `batches`, which raises."""
    parts = batches(lm, tokenizer, texts, batch, tokens, how)
    return np.concatenate([np.asarray(read(params, t, mask, pooled))[w > 0] for t, mask, w, pooled in parts])


def keep_sides(
    run: Run,
    make: Callable[[LM], Callable[..., jax.Array]],
    lm: Artifact,
    data: Artifact,
    *,
    target: int,
    limit: int,
    **how: Any,
) -> None:
    """The work of a stage that reads the texts of both sides of labelled records: state is {"with", "without"}, each
    float32 [N, …], and metrics.jsonl has how many there are.

    Args:
      make: the function that reads a batch, given the model; it is compiled. See `read_texts`, which has `how` too.
      target: the label of the texts with the attribute. limit: how many texts are read, half of them of each side.

    Raises:
      InputError: what `sides` and `batches` raise.
    """
    model, params, tokenizer = open_lm(lm)
    texts = sides(data.rows("data.jsonl"), target, False, str(data.path))
    read, found = jax.jit(make(model)), {}
    for side, rows in zip(("with", "without"), texts):
        found[side] = read_texts(read, model, params, tokenizer, rows[: max(1, limit // 2)], **how)
        run.log(side=side, texts=len(found[side]))
    checkpoint.save(run.path / "state", found)


def _text(ids: list[int], tokenizer: Tokenizer, how: str) -> tuple[list[int], slice]:
    if how in ("prompt", "assistant"):
        raise InputError(
            f"pool is {how!r}, but a text has no such part: give records with messages, or pool otherwise."
        )
    ids = tokenizer.begun(ids)
    return ids, slice(0, len(ids))


def _conversation(tokenizer: Tokenizer, messages: Messages, length: int, how: str) -> tuple[list[int], slice]:
    """(token ids, which of them are pooled)."""
    answered = messages[-1]["role"] == "assistant"
    found = tokenizer.chat.encode(messages) if answered else tokenizer.chat.prompt(messages)
    answer, ids = found.answer, found.ids[: found.answer.stop]
    if how != "mean" and len(ids) > length:
        raise InputError(f"A conversation has {len(ids)} tokens, but only {length} are read: raise tokens.")
    if how == "assistant" and not answered:
        raise InputError("pool is 'assistant', but the last message of a conversation is not the assistant's.")
    at = {"prompt": slice(answer.start - 1, answer.start), "assistant": answer}
    return ids, at.get(how, slice(0, len(ids)))


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


def scaled(vector: np.ndarray, norm: np.ndarray, how: str) -> np.ndarray:
    """A vector [L + 2, D] as it is ("none"), of length 1 ("unit"), of the mean length `norm` [L + 2] of the stream at
    its site ("stream"), or a twentieth of that ("step"), so that a scale means the same at every layer and in every
    model. On Gemma 3 270M 1 step is a nudge, 2 are clear, and at 4 the text breaks.
    """
    if how == "none":
        return vector
    unit = vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-12)
    if how == "unit":
        return unit
    if how in ("stream", "step"):
        return unit * norm[:, None] * (STEP if how == "step" else 1.0)
    raise InputError(f"normalise is {how!r}, expected 'none', 'unit', 'stream' or 'step'.")
