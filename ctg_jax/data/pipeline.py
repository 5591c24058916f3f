"""From records to batches of tokens: deterministic, sharded by host, resumable at the exact example.

Everything is addressed by index (grain `MapDataset`): example n of the stream is a function of the seed and n, so
batches do not depend on the number of threads or hosts, and the state is one integer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ctg_jax.data.messages import has_messages
from ctg_jax.data.sources import Source
from ctg_jax.data.tokenizer import Tokenizer, pad_rows
from ctg_jax.io import dumps, sha256_of
from ctg_jax.types import InputError

Batch = dict[str, np.ndarray]

_AHEAD = 4  # batches that reading threads hold ready


class Batches(Iterator[Batch]):
    """An endless or finite stream of batches. `get_state` after a batch and `set_state` later, in another process,
    continue with exactly the next one."""

    def __init__(self, dataset: Any, signature: dict[str, Any], threads: int):
        import grain

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD if threads else 0)
        self._iterator = iter(dataset.to_iter_dataset(options, allow_nones=False))
        self._signature = signature
        self._next = 0
        self.size: int = signature["batch"]  # rows of a batch
        self.length: int | None = None if signature["epochs"] is None else len(dataset)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """A JSON-able description of the place in the stream: batches given so far and what the stream is."""
        return {"next": self._next, "stream": dict(self._signature)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to the place that `get_state` described.

        Raises:
          InputError: the state belongs to a stream of other data, another tokenizer, seed, size, host or packing.
        """
        for name, mine in self._signature.items():
            theirs = state["stream"].get(name)
            if theirs != mine:
                raise InputError(f"pipeline state is of another stream: {name} was {theirs!r} and is now {mine!r}")
        self._iterator.set_state({"next_index": int(state["next"])})
        self._next = int(state["next"])


def pipeline(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch: int,
    length: int,
    seed: int,
    epochs: int | None = None,
    part: tuple[int, int] = (0, 1),
    fields: Sequence[str] = (),
    shuffle: bool = True,
    pack: bool = False,
    drop_last: bool = True,
    threads: int = 1,
) -> Batches:
    """Batches of token sequences.

    A sequence is the text (after the beginning-of-text token, for models that expect one) and the end token, cut at
    `length` and padded on the right. Each epoch is a new permutation; batches run across epochs.

    Of records with `messages` a sequence is the conversation in the chat format of the tokenizer, and batches have a
    `loss_mask`: training learns the text of the assistant and the token that closes it. A message with `"weight": 0`
    is not learned, and one of another role with `"weight": 1` is.

    Args:
      source: records; see `ctg_jax.data.load`.
      batch: rows of this host's batch, B; with H hosts the global batch is B * H rows.
      length: tokens of a row, T.
      seed: of the permutations.
      epochs: passes over the source; None is endless.
      part: (h, H): host h of H takes rows h, h + H, … of the one stream that a single host would see.
      fields: numeric fields of the records to add to each batch, [B] or [B, …].
      shuffle: False keeps the order of the source.
      pack: join all sequences, in the order of the source, and cut them into full rows; then `ids` number the rows.
      drop_last: whether to drop the last B * H rows that are not all there. Otherwise they are filled up with rows
        whose mask is False and whose id is 0.
      threads: how many read ahead; 0 reads a batch when it is asked for.

    Returns:
      An iterator of {"tokens": int32 [B, T], "mask": bool [B, T], "ids": uint32 [B], and `fields`}; of messages also
      "loss_mask": bool [B, T].

    Raises:
      InputError: an empty or too small source, a field that is missing or not numeric, impossible sizes; some records
        with messages and some without; a conversation of which training learns nothing, since it is cut before.
    """
    import grain

    host, hosts = part
    if batch < 1 or length < 1 or not 0 <= host < hosts:
        raise InputError(f"pipeline: batch={batch}, length={length}, host={host} of {hosts} hosts is impossible")
    if pack and fields:
        raise InputError(f"pipeline: packed rows mix records, so they have no fields {tuple(fields)}")
    if not len(source):
        raise InputError(f"{source.spec} split {source.split!r} is empty: there is nothing to train on")
    for name in fields:
        _number(source[0], name, 0)
    rows: Any = _Packed(source, tokenizer, length) if pack else _Rows(source, tokenizer, length, tuple(fields))
    dataset = grain.MapDataset.source(rows).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(epochs)
    if epochs is not None:
        full = len(dataset) // (batch * hosts) * batch * hosts
        if drop_last and full == 0:
            raise InputError(
                f"{source.spec} split {source.split!r} gives {len(dataset)} rows, fewer than a batch of "
                f"{batch * hosts}: take a smaller batch, more epochs or drop_last=False"
            )
        if drop_last:
            dataset = dataset[:full]
        else:
            short = -len(dataset) % (batch * hosts)
            blank = grain.MapDataset.source([rows.blank()] * short) if short else None
            dataset = dataset if blank is None else grain.MapDataset.concatenate([dataset, blank])
    dataset = dataset[host::hosts].batch(batch, drop_remainder=True, batch_fn=_collate)
    signature = {
        "data": _sketch(source), "tokenizer": sha256_of(tokenizer.to_json())[:12],
        "records": len(source), "seed": seed, "batch": batch,
        "length": length, "epochs": epochs, "host": host, "hosts": hosts, "shuffle": shuffle, "pack": pack,
    }  # fmt: skip
    return Batches(dataset, signature, threads)


def _sketch(source: Source) -> str:
    """A fingerprint of up to 64 records spread over the source: cheap at any size, and free of paths, so that a run
    resumes after its folder has moved."""
    some = [source[i * len(source) // 64] for i in range(64)] + [source[-1]]
    return sha256_of(dumps([len(source), some], sort_keys=True, ensure_ascii=True, allow_nan=True))[:12]


def _collate(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _sequences(tokenizer: Tokenizer, records: Sequence[dict[str, Any]], chat: bool) -> list[tuple[Any, Any]]:
    """(token ids, what is learned of them: bool, or None for all) of each record."""
    for record in records:
        if has_messages(record) != chat:
            raise InputError(
                f"some records have messages and some have not, such as {record['text'][:40]!r}: keep conversations "
                "and texts in data sets of their own"
            )
    if chat:
        found = [tokenizer.chat.encode(record["messages"]) for record in records]
        return [(conversation.ids, conversation.learned) for conversation in found]
    after = [] if tokenizer.eos is None else [tokenizer.eos]
    return [(tokenizer.begun(row) + after, None) for row in tokenizer.encode([r["text"] for r in records])]


def _fill(tokenizer: Tokenizer, row: Sequence[int], length: int, id: int, learned: Any = None) -> Batch:
    pad = next(p for p in (tokenizer.pad, tokenizer.eos, 0) if p is not None)
    tokens, mask = pad_rows([row[:length]], length, pad, left=False)
    found = {"tokens": tokens[0], "mask": mask[0], "ids": np.uint32(id)}
    if learned is not None:
        found["loss_mask"] = np.zeros(length, bool)
        found["loss_mask"][: len(row[:length])] = learned[:length]
    return found


def _number(record: dict[str, Any], name: str, index: int) -> np.ndarray:
    try:
        value = np.asarray(record[name])
    except KeyError:
        raise InputError(f"record {index} has no field {name!r}, only {', '.join(sorted(record))}") from None
    if value.dtype.kind not in "biuf":
        raise InputError(f"field {name!r} of record {index} is {record[name]!r}, expected numbers")
    return value.astype({"b": bool, "f": np.float32}.get(value.dtype.kind, np.int32))


class _Rows(Sequence):
    """Row i is record i."""

    def __init__(self, source: Source, tokenizer: Tokenizer, length: int, fields: tuple[str, ...]):
        self.source, self.tokenizer, self.length, self.fields = source, tokenizer, length, fields
        self.chat = has_messages(source[0])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Batch:
        record = self.source[i]
        ((ids, learned),) = _sequences(self.tokenizer, [record], self.chat)
        if learned is not None and not learned[: self.length].any():
            raise InputError(
                f"training learns nothing of record {i}: of its {len(ids)} tokens the first {self.length} hold no text "
                "of the assistant; raise the tokens of a row, or leave the record out"
            )
        row = _fill(self.tokenizer, ids, self.length, i, learned)
        return {**row, **{name: _number(record, name, i) for name in self.fields}}

    def blank(self) -> Batch:
        extra = {name: np.zeros_like(_number(self.source[0], name, 0)) for name in self.fields}
        return {**_fill(self.tokenizer, [], self.length, 0, [] if self.chat else None), **extra}


class _Packed(Sequence):
    """Row i is tokens [i * length, (i + 1) * length) of all sequences joined; the last row may be padded."""

    def __init__(self, source: Source, tokenizer: Tokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length
        self.learned = [] if has_messages(source[0]) else None
        parts = []
        for start in range(0, len(source), 1024):
            records = [source[i] for i in range(start, min(start + 1024, len(source)))]
            found = _sequences(tokenizer, records, self.learned is not None)
            parts += [np.asarray(row, np.int32) for row, _ in found]
            if self.learned is not None:
                self.learned += [learned for _, learned in found]
        self.stream = np.concatenate(parts)
        self.learned = None if self.learned is None else np.concatenate(self.learned)

    def __len__(self) -> int:
        return -(-len(self.stream) // self.length)

    def __getitem__(self, i: int) -> Batch:
        part = slice(i * self.length, (i + 1) * self.length)
        learned = None if self.learned is None else self.learned[part]
        return _fill(self.tokenizer, self.stream[part], self.length, i, learned)

    def blank(self) -> Batch:
        return _fill(self.tokenizer, [], self.length, 0, None if self.learned is None else [])
