"""Tokenizers (`tokenizer.json` files, byte-level BPE training) and the way from texts to `Prompts`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import rng
from ctg_jax.data.chat import Chat
from ctg_jax.data.ids import check_ids
from ctg_jax.data.messages import Messages, is_messages
from ctg_jax.data.tokenizer_files import chat_template, check_settings, end_ids, model_rows, special_tokens
from ctg_jax.io import write_json, write_text
from ctg_jax.types import InputError, Prompts

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"


class Tokenizer:
    """Text to token ids and back.

    The text of a prompt or a record never becomes a control token (a special token of the file, bos, eos or pad):
    `<|endoftext|>` in a text is ordinary characters. A format that needs control tokens, such as a chat template,
    places their ids itself; a prompt may be a string, messages (see `ctg_jax.data.chat`), or ids from a format.

    Attributes:
      vocab: one more than the largest id, added tokens included.
      rows: the number of tokens of the model that the tokenizer came with, or None where that is not known. A text that
        would be encoded to an id from `rows` on is refused.
      bos, eos, pad: ids of the special tokens, or None where the tokenizer has none. `eos` is the token that is
        appended to texts in training and that fills rows. names: their spelling, as `{"bos_token": "<s>"}`.
      ends: every id that ends a text, `eos` first; () where there is none. Decoding stops at any of them.
      adds_bos: whether sequences of its model begin with `bos` (Llama: yes, GPT-2: no).
      start: what an empty prompt becomes: bos, or eos where there is no bos, or None.
      template: the text of the chat template, or None where the tokenizer has none.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        rows: int | None = None,
        ends: Sequence[int] = (),
        template: str | None = None,
    ):
        core.no_padding()
        core.no_truncation()
        added = {token.content: token for token in core.get_added_tokens_decoder().values()}
        control = (bos, eos, pad, *(core.id_to_token(i) for i in ends))
        core.add_special_tokens([t for t in control if t in added and not added[t].special])
        core.encode_special_tokens = True
        self._core = core
        names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.names: dict[str, str] = {name: token for name, token in names.items() if token is not None}
        self.vocab: int = 1 + max(core.get_vocab(with_added_tokens=True).values(), default=-1)
        self.rows, self.template = rows, template
        self.bos, self.eos, self.pad = (None if t is None else core.token_to_id(t) for t in (bos, eos, pad))
        self.ends: tuple[int, ...] = tuple(dict.fromkeys([*(() if self.eos is None else (self.eos,)), *ends]))
        start = core.encode("a").ids[:1]
        self.adds_bos: bool = self.bos is not None and start == [self.bos]
        self.start: int | None = self.eos if self.bos is None else self.bos

    def encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Token ids of each text; with `special`, those that the model's own format adds too ([CLS] … [SEP]).

        Raises:
          InputError: one string in place of a list, a text that is not Unicode, an id that the model has no row for.
        """
        if isinstance(texts, str):
            raise InputError(f"encode: texts is one string {texts[:40]!r}, expected a list of strings")
        try:
            found = [e.ids for e in self._core.encode_batch(list(texts), add_special_tokens=special)]
        except TypeError:
            i, text = next((i, t) for i, t in enumerate(texts) if not _unicode(t))
            raise InputError(
                f"text {i} is {text!r:.40}, which is not a string of Unicode characters (it may hold one half of a "
                "surrogate pair): repair it or leave it out"
            ) from None
        if self.rows is not None and self.vocab > self.rows:
            for ids, text in zip(found, texts):
                check_ids(ids, self.rows, f"the text {text[:40]!r}", f" and its tokenizer {self.vocab} ids")
        return found

    @cached_property
    def chat(self) -> Chat:
        """The chat format; InputError where the tokenizer has no template."""
        return Chat(self)

    def encode_prompts(self, prompts: Sequence[str | Sequence[int] | Messages]) -> list[list[int]]:
        """Ids of prompts as the model reads them: `bos` first, once, where its sequences begin with it, and `start` for
        an empty prompt (no id, where there is no `start`). A prompt is a string, its ids from a format, or messages,
        which have the ids that the chat template gives them, up to where the assistant answers."""
        rows = iter(self.encode([p for p in prompts if isinstance(p, str)]))
        ids = [
            self.chat.prompt(p).ids if is_messages(p)
            else self.begun(next(rows) if isinstance(p, str) else [int(i) for i in p])
            for p in prompts
        ]  # fmt: skip
        return [row or [self.start] * (self.start is not None) for row in ids]

    def begun(self, ids: Sequence[int]) -> list[int]:
        """The ids of a sequence with `bos` before them, where the model's sequences begin with it and these do not."""
        return [self.bos, *ids] if self.adds_bos and list(ids[:1]) != [self.bos] else list(ids)

    def encode_after(self, prompts: Sequence[str | Messages], texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text where it follows its prompt: encode(prompt + text) less encode(prompt), or, where the
        prompt is messages, the ids of the text as the assistant's answer.

        What precedes them is always encode(prompt), which is what a model reads when it continues the prompt. Where
        encode(prompt + text) does not begin with it ("the foo" + "d was", or a prompt that ends with a space), the ids
        are those of the text alone, without the space that a SentencePiece tokenizer puts before it, so that
        encode(prompt) and the ids together still spell prompt + text. Where no encoding of the text does that (a
        normaliser joins the last character of the prompt with the first of the text), they are those of prompt + text
        behind the longest common beginning.
        """
        plain = [(p, t) for p, t in zip(prompts, texts, strict=True) if not is_messages(p)]
        heads, wholes = self.encode([p for p, _ in plain]), self.encode([p + t for p, t in plain])
        found = iter(
            whole[len(head) :] if whole[: len(head)] == head else self._apart(head, whole, text)
            for head, whole, (_, text) in zip(heads, wholes, plain)
        )
        return [self.chat.answer(p, t) if is_messages(p) else next(found) for p, t in zip(prompts, texts)]

    def _apart(self, head: list[int], whole: list[int], text: str) -> list[int]:
        """The ids of `text` behind `head`, where encode(prompt + text), `whole`, does not begin with `head`."""
        wanted = self.decode([whole])
        for before in ("", "\n", ".", "0"):  # something that the first character of the text does not merge with
            ids, skipped = self.encode([before + text, before])
            rest = ids[len(skipped) :]
            if ids[: len(skipped)] == skipped and self.decode([head + rest]) == wanted:
                return rest
        return whole[_common(head, whole) :]

    def decode(self, rows: Iterable[Iterable[int]], skip_special: bool = True) -> list[str]:
        """The text of each row of ids that is a whole text; special tokens leave no trace. For ids that follow others,
        such as new tokens, see `decode_after`."""
        return self._core.decode_batch([[int(i) for i in row] for row in rows], skip_special_tokens=skip_special)

    def decode_after(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], skip_special: bool = True
    ) -> list[str]:
        """The text of each row of ids where it follows the ids of its prompt: decode(prompt + row) less decode(prompt).

        A SentencePiece decoder removes the space before the first word of a text, and the bytes of one character may be
        divided between prompt and row, so decode(row) alone is another text. A character that the prompt breaks off and
        the row completes belongs to the row.
        """
        wholes = self.decode([[*p, *r] for p, r in zip(prompts, rows, strict=True)], skip_special)
        heads = self.decode(prompts, skip_special)
        return [whole[_common(head, whole) :] for head, whole in zip(heads, wholes)]

    def decode_stream(self, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens as they are drawn, piece by piece; together the pieces are `decode_after` of all tokens. A
        character of which only some bytes have been drawn waits for the others."""
        row, given, text = [], 0, ""
        for token in tokens:
            row.append(token)
            (text,) = self.decode_after([prompt], [row])
            whole = len(text.rstrip("\ufffd"))
            if whole > given:
                yield text[given:whole]
                given = whole
        if len(text) > given:
            yield text[given:]

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """The text of each token inside a text, its leading space included, special tokens in their own spelling."""
        rows = [[i] for i in ids]
        return self.decode_after(self.encode(["a"]) * len(rows), rows, skip_special=False)

    def before_end(self, ids: Sequence[int]) -> list[int]:
        """The ids before the first that ends a text, or all of them."""
        return list(itertools.takewhile(lambda i: i not in self.ends, ids))

    def token(self, id: int) -> str | None:
        """The vocabulary entry of an id, in the tokenizer's own spelling."""
        return self._core.id_to_token(int(id))

    def id(self, token: str) -> int | None:
        """The id of a vocabulary entry."""
        return self._core.token_to_id(token)

    def known(self, vocab: int) -> np.ndarray:
        """bool [vocab]: which of the first `vocab` ids are tokens. Models often have rows that no token belongs to."""
        ids = list(self._core.get_vocab(with_added_tokens=True).values())
        return np.isin(np.arange(vocab), ids)

    def to_json(self) -> str:
        """The whole tokenizer as text; equal text means equal tokenizers."""
        return self._core.to_str()

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `transformers` reads too, and generation_config.json
        where several ids end a text."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= self.names | ({} if self.template is None else {"chat_template": self.template})
        write_text(folder / "tokenizer.json", self._core.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", config, indent=2)
        if len(self.ends) > 1:
            write_json(folder / "generation_config.json", {"eos_token_id": self.ends}, indent=2)


def _common(a: Sequence, b: Sequence) -> int:
    """The length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _unicode(text: Any) -> bool:
    try:
        text.encode("utf-8")
    except (AttributeError, UnicodeEncodeError):
        return False
    return True


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or hub id.

    Raises:
      InputError: nothing there, no tokenizer in it, a broken file, an `eos_token_id` that is no token id, a setting of
        tokenizer_config.json that tokenizer.json does not have, or no network for a hub id.
    """
    from ctg_jax.models.hf import resolve

    folder = resolve(path_or_id)
    if (folder / "tokenizer.json").is_file():
        import tokenizers

        try:
            core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            names, ends = special_tokens(folder, core), end_ids(folder, core)
            check_settings(folder, core)
        except InputError:
            raise
        except Exception as e:  # the Rust library raises bare Exception
            raise InputError(f"tokenizer files in {folder} cannot be read ({str(e).splitlines()[0][:160]})") from e
        return Tokenizer(core, **names, rows=model_rows(folder), ends=ends, template=chat_template(folder))
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
    named = {"bos": fast.bos_token, "eos": fast.eos_token, "pad": fast.pad_token}
    names = special_tokens(folder, core) | {k: v for k, v in named.items() if v is not None}
    ends, template = end_ids(folder, core), chat_template(folder)
    return Tokenizer(core, **names, rows=model_rows(folder), ends=ends, template=template)


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
    texts: Sequence[str | Sequence[int] | Messages],
    seed: int,
    ids: Sequence[int] | Sequence[tuple[int, ...]] | None = None,
    length: int | None = None,
    cond: Any = None,
    *,
    context: int | None = None,
) -> Prompts:
    """Prompts [B, T] of texts, padded on the left.

    Args:
      texts: B strings, or rows of token ids that a format made. `bos` is put before them where the model expects it and
        they do not begin with it; an empty one becomes `bos` (or the end token, where there is no other). Or messages,
        which the chat template of the tokenizer writes out.
      seed: row i gets the key `rng.per_example(key(seed), ids)[i]`.
      ids: example ids int [B], or [B, K] where K numbers address an example, such as (prompt, sample), each at least 0
        and below 2^32; by default 0 … B-1.
      length: T; by default the longest prompt.
      cond: pytree with leading axis B for controls that read per row.
      context: the longest sequence the language model can read.

    Raises:
      InputError: no prompts, a prompt longer than `length` or `context`, ids or cond of another length, a token that
        the model which the tokenizer came with has no row for.
    """
    if not len(texts):
        raise InputError("prompts are empty: give at least one prompt (it may be the empty string)")
    ids = np.arange(len(texts)) if ids is None else np.asarray(ids)
    if ids.shape[:1] != (len(texts),):
        raise InputError(f"ids have shape {ids.shape}, expected one for each of the {len(texts)} prompts")
    for leaf in jax.tree.leaves(cond):
        if np.shape(leaf)[:1] != (len(texts),):
            raise InputError(f"cond has shape {np.shape(leaf)}, expected one row for each of the {len(texts)} prompts")
    rows = tokenizer.encode_prompts(texts)
    if not all(rows):
        raise InputError(f"prompt {rows.index([])} is empty and the tokenizer has no token that begins a text")
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    for name, limit in (("length", length), ("the context of the model", context)):
        if limit is not None and len(rows[longest]) > limit:
            raise InputError(
                f"prompt {longest} has {len(rows[longest])} tokens, but {name} is {limit}: shorten it or leave it out"
            )
    pad = next(p for p in (tokenizer.pad, tokenizer.eos, 0) if p is not None)
    tokens, mask = pad_rows(rows, length or len(rows[longest]), pad, left=True)
    keys = rng.per_example(jax.random.key(seed), ids)
    return Prompts(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), keys=keys, cond=cond)
