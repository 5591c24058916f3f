"""Texts through an encoder: batches by length, a fixed set of shapes, so that few programs are compiled."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax.data.ids import check_sizes
from ctg_jax.data.shapes import padded_length
from ctg_jax.io import digest
from ctg_jax.run.identity import model_content
from ctg_jax.run.session import Session
from ctg_jax.tree import flatten
from ctg_jax.types import Params


class Embedder:
    """`embed(texts) -> float32 [n, D]`, with a version that names the weights.

    Args:
      encoder: `ctg_jax.models.encoder.Encoder` (anything with its `embed`, `context` and `pad`).
      params: its parameters.
      encode: texts -> token ids with the special tokens the encoder was trained with.
      batch: rows of a compiled batch.
      length: longest input in tokens, the rest is cut off; by default the encoder's context.
    """

    def __init__(
        self,
        encoder,
        params: Params,
        encode: Callable[[list[str]], list[list[int]]],
        *,
        name: str = "encoder",
        batch: int = 32,
        length: int | None = None,
    ):
        self.encoder, self.params, self.encode = encoder, params, encode
        self.batch, self.length = batch, min(length or encoder.context, encoder.context)
        self.version = f"{name}@{params_digest(params)}"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return self.run(self.encoder.embed, texts, self.encoder.embed_width)

    def run(self, fn: Callable[..., jax.Array], texts: Sequence[str], width: int) -> np.ndarray:
        """float32 [n, width]: `fn(params, tokens [B, T], mask [B, T])` over all texts, in their order."""
        rows = [ids[: self.length] for ids in self.encode(list(texts))]
        out = np.zeros((len(rows), width), np.float32)
        for indices, tokens, mask in length_batches(rows, self.batch, self.encoder.pad, self.length):
            got = fn(self.params, jnp.asarray(tokens), jnp.asarray(mask))
            out[indices] = np.asarray(got, np.float32)[: len(indices)]
        return out


def sentence_embedder(
    path: str | Path, *, batch: int = 32, length: int | None = None, dtype: str = "float32"
) -> Embedder:
    """An `Embedder` from a Hugging Face directory or hub id of a sentence encoder.

    Raises:
      InputError: the model cannot be read (see `ctg_jax.models.hf.load_encoder`).
    """
    encoder, params, encode = load_text_encoder(path, dtype=dtype, length=length)
    return Embedder(encoder, params, encode, name=Path(path).name, batch=batch, length=length)


def open_embedder(session: Session, path: str | Path, *, batch: int = 32) -> Embedder:
    """`sentence_embedder(path)`, whose weights the session keeps: all judges and stages that read an encoder share one
    copy of it in a layout. An encoder is identified by the contents of its folder, or by its hub id.

    Args:
      batch: rows of a compiled batch.
    """
    content = model_content(path, None, session.sha256) or str(path)
    found = copy.copy(session.keep("encoder", (Path(path).name, content), lambda: sentence_embedder(path), most=2))
    found.batch = batch
    return found


@dataclasses.dataclass(frozen=True)
class _Mean:
    """A language model as an encoder: the mean of its final states over the tokens of a text."""

    lm: Any
    pad: int

    @property
    def context(self) -> int:
        return self.lm.context

    @property
    def embed_width(self) -> int:
        return self.lm.width

    @partial(jax.jit, static_argnums=0)
    def embed(self, params, tokens, mask):
        x = self.lm.apply(params, self.lm.embed(params, tokens), mask, last=1).hidden.astype(jnp.float32)
        some = mask[:, :, None].astype(jnp.float32)
        return jnp.sum(x * some, axis=1) / jnp.sum(some, axis=1)


def lm_embedder(lm, params: Params, tokenizer, *, batch: int = 64) -> Embedder:
    """An `Embedder` out of a language model itself, where no sentence encoder is at hand; see `_Mean`. Texts are read
    as prompts are (`Tokenizer.encode_prompts`), so the state of BOS counts where the model's sequences begin with it.

    Raises:
      InputError: the tokenizer has more ids than the model has tokens.
    """
    name = "mean-of-states-from-bos" if tokenizer.adds_bos else "mean-of-states"
    check_sizes(tokenizer, lm, name)
    pad = next(p for p in (tokenizer.pad, tokenizer.eos, 0) if p is not None)
    return Embedder(_Mean(lm, pad), params, tokenizer.encode_prompts, name=name, batch=batch)


def load_text_encoder(path: str | Path, *, dtype: str = "float32", length: int | None = None):
    """(encoder, params, encode) of a model directory or hub id; `encode` adds [CLS], [SEP] and the like and cuts at
    `length`, at most the encoder's context, without losing the last special token. The files of a
    sentence-transformers model also determine whether texts are lower-cased first and what is put before them."""
    from ctg_jax.models.hf import load_encoder, resolve
    from ctg_jax.models.hf.sentence import text_format

    encoder, params = load_encoder(path, dtype=dtype)
    folder = resolve(path)
    lower, before = text_format(folder)
    ids = text_ids(folder, min(length or encoder.context, encoder.context))

    def encode(texts: list[str]) -> list[list[int]]:
        texts = [before + t for t in texts]
        return ids([t.lower() for t in texts] if lower else texts)

    return encoder, params, encode


def text_ids(folder: Path, longest: int) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> token ids with the special tokens of a model in a folder, cut at `longest` without losing the last one.
    What sentence-transformers does to texts before that is left out."""
    from transformers import AutoTokenizer

    # A text that spells a control token such as [SEP] is read as characters, as `Tokenizer` does.
    tokenizer = AutoTokenizer.from_pretrained(str(folder), split_special_tokens=True)

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=longest)["input_ids"] if texts else []

    return encode


def params_digest(params: Params) -> str:
    """Digest of all weights and their paths."""
    return digest(*(part for path, x in sorted(flatten(params).items()) for part in (path, np.asarray(x))))


def length_batches(rows: Sequence[Sequence[int]], batch: int, pad: int, longest: int):
    """Yields (indices [b], tokens int32 [batch, T], mask bool [batch, T]) with b <= batch and T from a short list of
    widths. Short rows go together; a batch that is not full repeats its first row, so shapes stay few and no row is
    all padding. An empty row is read as one padding token."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        need = max(1, max(len(rows[i]) for i in indices))
        width = max(need, min(padded_length(need), longest))
        tokens, mask = np.full((batch, width), pad, np.int32), np.zeros((batch, width), bool)
        for r, i in enumerate(indices + [indices[0]] * (batch - len(indices))):
            tokens[r, : len(rows[i])] = rows[i]
            mask[r, : max(1, len(rows[i]))] = True
        yield np.asarray(indices), tokens, mask
