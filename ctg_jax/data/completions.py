"""Batches of prompts with their completions, for methods that learn from what a model wrote, and what people wrote
after the same prompts.

The tokens of a model's completion are those that were drawn, never its text encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax import rng
from ctg_jax.data.messages import Messages, has_messages, prompt_of
from ctg_jax.data.pipeline import Batch, Batches, _collate, _number, _sketch
from ctg_jax.data.sources import Source
from ctg_jax.data.tokenizer import Tokenizer, pad_rows
from ctg_jax.io import sha256_of
from ctg_jax.types import InputError


def completions(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch: int,
    prompt: int,
    new: int,
    seed: int,
    fields: Sequence[str] = (),
    strata: str | None = None,
    also: str | None = None,
    threads: int = 1,
) -> Batches:
    """An endless, shuffled, resumable stream of batches.

    Args:
      source: records with `prompt` (a string) or `messages`, and `tokens` (those drawn after it).
      batch: rows B. prompt, new: tokens of a prompt T and of a completion N; a longer completion is cut.
      seed: of the permutations.
      fields: numeric fields of the records to add to each batch, [B] or [B, …].
      strata: a numeric field; its values take turns in the stream, so that each has its share of every batch. None:
        batches are drawn uniformly.
      also: a field with the tokens of a second completion of the same prompt, such as the worse one of a pair.

    Returns:
      An iterator of {"tokens": int32 [B, T], "mask": bool [B, T] (padding on the left), "completion": int32 [B, N],
      "written": bool [B, N] (padding on the right), "ids": uint32 [B], and `fields`}; with `also`, a second completion
      under that name and that name + "_written".

    Raises:
      InputError: no records, a field that is missing or not numeric, a prompt longer than `prompt`.
    """
    import grain

    if not len(source):
        raise InputError(f"{source.spec} holds no completion to learn from: raise n, the samples of each prompt")
    if batch < 1:
        raise InputError(f"batch is {batch}, expected at least 1")
    for name in fields:
        _number(source[0], name, 0)
    rows = Completions(source, tokenizer, prompt, new, tuple(fields), also)
    whole = grain.MapDataset.source(rows)
    if strata is None:
        dataset = whole.seed(seed).shuffle().repeat()
    else:
        values = np.asarray([_number(source[i], strata, i) for i in range(len(source))])
        groups = [np.flatnonzero(values == v) for v in np.unique(values)]
        parts = [grain.MapDataset.source(_Part(rows, group)) for group in groups]
        seeds = [rng.derived_seed(seed, "stratum", i) for i in range(len(parts))]
        dataset = grain.MapDataset.mix([p.seed(s).shuffle().repeat() for p, s in zip(parts, seeds)])
    dataset = dataset.batch(batch, drop_remainder=True, batch_fn=_collate)
    signature = {
        "data": _sketch(source), "tokenizer": sha256_of(tokenizer.to_json())[:12],
        "records": len(source), "seed": seed, "batch": batch, "prompt": prompt, "new": new, "strata": strata,
        "also": also, "epochs": None,
    }  # fmt: skip
    return Batches(dataset, signature, threads)


class Completions(Sequence):
    """Row i is record i."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        prompt: int,
        new: int,
        fields: tuple[str, ...] = (),
        also: str | None = None,
    ):
        self.source, self.tokenizer, self.fields, self.also = source, tokenizer, fields, also
        self.prompt, self.new = prompt, new
        self.pad = next(p for p in (tokenizer.pad, tokenizer.eos, 0) if p is not None)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Batch:
        record = self.source[i]
        (head,) = self.tokenizer.encode_prompts([prompt_of(record)])
        if len(head) > self.prompt:
            raise InputError(f"prompt of record {i} has {len(head)} tokens, expected at most {self.prompt}")
        tokens, mask = pad_rows([head], self.prompt, self.pad, left=True)
        row = {"tokens": tokens[0], "mask": mask[0], "ids": np.uint32(i)}
        wanted = [("tokens", "completion", "written")]
        if self.also is not None:
            wanted.append((self.also, self.also, f"{self.also}_written"))
        for field, name, real in wanted:
            tail, written = pad_rows([list(record[field])[: self.new]], self.new, self.pad, left=False)
            row |= {name: tail[0], real: written[0]}
        return {**row, **{name: _number(record, name, i) for name in self.fields}}


class _Part(Sequence):
    """Some rows of another sequence."""

    def __init__(self, rows: Sequence, indices: np.ndarray):
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Batch:
        return self.rows[int(self.indices[i])]


def continuations(records: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """What people wrote after each prompt, with the end token, cut at `length` tokens; see `Tokenizer.encode_after`.

    The prompt of a record is what `ctg_jax.stages.sampling.sample` takes for it: `prompt`, or else `text`; the whole
    text is `reference`, which `load_data` keeps when it cuts to `words`, or else `text`. Of a record with `messages`
    the continuation is the last one, of the assistant, with the token that closes it; the prompt is the others
    (`ctg_jax.data.messages.unanswered`).

    Raises:
      InputError: a record with no text behind its prompt, or no answer of the assistant.
    """
    chats = {i: _answer(r["messages"], i, tokenizer)[:length] for i, r in enumerate(records) if has_messages(r)}
    prompts, tails = [], []
    for i, record in enumerate(records):
        if i in chats:
            continue
        prompt = record.get("prompt", record["text"])
        text = record.get("reference", record["text"])
        text = text if text.startswith(prompt) else " ".join(text.split())
        if not text.startswith(prompt) or not text[len(prompt) :].strip():
            raise InputError(
                f"record {i} of the data has no text behind its prompt {prompt[:40]!r}: load texts cut to `words`, or "
                "records with a `prompt` that their `text` begins with"
            )
        prompts.append(prompt)
        tails.append(text[len(prompt) :])
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    plain = iter(tokenizer.encode_after(prompts, tails))
    return [chats[i] if i in chats else (next(plain) + end)[:length] for i in range(len(records))]


def _answer(messages: Messages, i: int, tokenizer: Tokenizer) -> list[int]:
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise InputError(f"record {i} of the data has no answer of the assistant: its last message must be one")
    found = tokenizer.chat.encode(messages)
    return found.ids[found.answer.start : found.closing(found.answer.stop)]
