"""Tokenizers (`tokenizer.json` files, byte-level BPE training) and the way from texts to `Prompts`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import rng
from ctg_jax.types import InputError, Prompts

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      vocab: the number of ids, added tokens included.
      bos, eos, pad: ids of the special tokens, or None where the tokenizer has none.
      adds_bos: whether sequences of its model begin with `bos` (Llama: yes, GPT-2: no).
    """

    def __init__(
        self, core: tokenizers.Tokenizer, bos: str | None = None, eos: str | None = None, pad: str | None = None
    ):
        core.no_padding()
        core.no_truncation()
        self._core = core
        self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.vocab: int = core.get_vocab_size(with_added_tokens=True)
        self.bos, self.eos, self.pad = (None if t is None else core.token_to_id(t) for t in (bos, eos, pad))
        start = core.encode("a").ids[:1]
        self.adds_bos: bool = self.bos is not None and start == [self.bos]

    def encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Token ids of each text; with `special`, those that the model's own format adds too ([CLS] … [SEP])."""
        if isinstance(texts, str):
            raise InputError(f"encode: texts is one string {texts[:40]!r}, expected a list of strings")
        return [e.ids for e in self._core.encode_batch(list(texts), add_special_tokens=special)]

    def decode(self, rows: Iterable[Iterable[int]], skip_special: bool = True) -> list[str]:
        """The text of each row of ids; special tokens leave no trace."""
        return self._core.decode_batch([[int(i) for i in row] for row in rows], skip_special_tokens=skip_special)

    def token(self, id: int) -> str | None:
        """The vocabulary entry of an id, in the tokenizer's own spelling."""
        return self._core.id_to_token(int(id))

    def id(self, token: str) -> int | None:
        """The id of a vocabulary entry."""
        return self._core.token_to_id(token)

    def to_json(self) -> str:
        """The whole tokenizer as text; equal text means equal tokenizers."""
        return self._core.to_str()

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `transformers` reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {k: v for k, v in self._names.items() if v is not None}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        _write(folder / "tokenizer.json", self._core.to_str(pretty=True))
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as f:
        f.write(text)
    os.chmod(temporary, 0o644)  # mkstemp makes private files
    os.replace(temporary, path)


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or hub id.

    Raises:
      InputError: nothing there, no tokenizer in it, a broken file, or no network for a hub id.
    """
    from ctg_jax.models.hf import resolve

    folder = resolve(path_or_id)
    if (folder / "tokenizer.json").is_file():
        import tokenizers

        try:
            core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            names = _special(folder, core)
        except Exception as e:  # the Rust library raises bare Exception
            raise InputError(f"tokenizer files in {folder} cannot be read ({str(e).splitlines()[0][:160]})") from e
        return Tokenizer(core, **names)
    if not any((folder / f).is_file() for f in ("vocab.json", "vocab.txt", "tokenizer.model")):
        raise InputError(
            f"{folder} holds no tokenizer: expected tokenizer.json, vocab.json, vocab.txt or tokenizer.model"
        )
    import transformers

    try:
        fast = transformers.AutoTokenizer.from_pretrained(str(folder))
        core = fast.backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError) as e:
        reason = str(e).strip().splitlines()[0][:160]
        raise InputError(f"tokenizer files in {folder} cannot be read ({reason})") from e
    return Tokenizer(core, fast.bos_token, fast.eos_token, fast.pad_token)


def _special(folder: Path, core: tokenizers.Tokenizer) -> dict[str, str | None]:
    """Names of the special tokens: from the files beside tokenizer.json, else (GPT-2 names none there) by the ids in
    config.json. The first that says something counts."""
    found: dict[str, str] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        if not (folder / file).is_file():
            continue
        said = json.loads((folder / file).read_text(encoding="utf-8"))
        for name in ("bos", "eos", "pad"):
            token, id = said.get(f"{name}_token"), said.get(f"{name}_token_id")
            id = id[0] if isinstance(id, list) and id else id  # Llama 3 lists several ends
            token = token["content"] if isinstance(token, dict) else token
            token = core.id_to_token(id) if token is None and isinstance(id, int) else token
            if token is not None and core.token_to_id(token) is not None:
                found.setdefault(name, token)
    return found


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with `<|endoftext|>` (id 0) as its first and last token; any text round-trips to the byte.

    Deterministic: the same texts in the same order give the same file. `vocab_size` counts the 256 bytes and the end
    token, so it is at least 257; few texts may give fewer tokens.
    """
    import tokenizers

    if vocab_size < 257:
        raise InputError(f"vocab_size={vocab_size} is too small: byte-level BPE needs 257 or more")
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return Tokenizer(core, bos=END, eos=END)


def pad_rows(rows: Sequence[Sequence[int]], length: int, pad: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B, length], mask bool [B, length]) of rows that are no longer than `length`."""
    tokens, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, True
    return tokens, mask


def to_prompts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    seed: int,
    ids: Sequence[int] | None = None,
    length: int | None = None,
    cond: Any = None,
    *,
    context: int | None = None,
) -> Prompts:
    """Prompts [B, T] of texts, padded on the left.

    Args:
      texts: B strings. An empty one becomes the beginning-of-text token (or the end token, where there is no other).
      seed: row i gets the key `fold_in(key(seed), ids[i])`.
      ids: example ids int [B]; by default 0 … B-1.
      length: T; by default the longest prompt.
      cond: pytree with leading axis B for controls that read per row.
      context: the longest sequence the language model can read.

    Raises:
      InputError: no prompts, a prompt longer than `length` or `context`, ids or cond of another length.
    """
    if not len(texts):
        raise InputError("prompts are empty: give at least one prompt (it may be the empty string)")
    ids = np.arange(len(texts)) if ids is None else np.asarray(ids)
    if ids.shape != (len(texts),):
        raise InputError(f"ids have shape {ids.shape}, expected one for each of the {len(texts)} prompts")
    for leaf in jax.tree.leaves(cond):
        if np.shape(leaf)[:1] != (len(texts),):
            raise InputError(f"cond has shape {np.shape(leaf)}, expected one row for each of the {len(texts)} prompts")
    rows = tokenizer.encode(texts)
    start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    if tokenizer.adds_bos:
        rows = [[tokenizer.bos, *row] for row in rows]
    elif start is None and not all(rows):
        raise InputError(f"prompt {rows.index([])} is empty and the tokenizer has no token that begins a text")
    rows = [row or [start] for row in rows]
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    for name, limit in (("length", length), ("the context of the model", context)):
        if limit is not None and len(rows[longest]) > limit:
            raise InputError(
                f"prompt {longest} has {len(rows[longest])} tokens, but {name} is {limit}: shorten it or leave it out"
            )
    pad = next(p for p in (tokenizer.pad, tokenizer.eos, 0) if p is not None)
    tokens, mask = pad_rows(rows, length or len(rows[longest]), pad, left=True)
    keys = rng.per_example(jax.random.key(seed), jnp.asarray(ids, jnp.int32))
    return Prompts(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), keys=keys, cond=cond)
