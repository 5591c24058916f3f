"""Conversations as token ids: the chat template of a tokenizer, and which message every token is of.

The template is rendered by the function that `apply_chat_template` of `transformers` calls, in jinja2's immutable
sandbox: a template runs no code of its own, and its text is that of `transformers` by construction. The text is encoded
here, because only here is it known which characters came from a message: what a message says never becomes a control
token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ctg_jax.data.ids import check_ids
from ctg_jax.data.messages import MOST, Messages, check_messages
from ctg_jax.types import InputError

if TYPE_CHECKING:
    from ctg_jax.data.tokenizer import Tokenizer

# Private characters, which messages do not hold: control tokens, and marks before and behind each message.
_CONTROL, _OPEN, _CLOSE = 0xF0000, 0x100000, 0x100000 + MOST
_MARK = re.compile("([\U00100000-\U0010ffff])")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The token ids of a conversation, and where they come from.

    Attributes:
      ids: T token ids.
      message: int32 [T], the number of the message that each token is of; -1 for tokens that the template writes.
      control: bool [T], which tokens are control tokens, such as `<end_of_turn>`.
      messages: the messages.
    """

    ids: list[int]
    message: np.ndarray
    control: np.ndarray
    messages: Messages

    def role(self, name: str) -> np.ndarray:
        """bool [T]: the tokens of the messages of a role, or those of the "template"."""
        numbers = [-1] if name == "template" else [i for i, m in enumerate(self.messages) if m["role"] == name]
        return np.isin(self.message, numbers)

    @property
    def answer(self) -> slice:
        """The tokens of the last message where it is the assistant's; empty, at the end, where it is not."""
        at = np.flatnonzero(self.message == len(self.messages) - 1)
        answered = self.messages[-1]["role"] == "assistant" and len(at)
        return slice(int(at[0]), int(at[-1]) + 1) if answered else slice(len(self.ids), len(self.ids))

    def closing(self, end: int) -> int:
        """Where the message that ends before token `end` is closed: behind the next control token, if one comes before
        another message, else at `end`."""
        for t in range(end, len(self.ids)):
            if self.message[t] >= 0:
                break
            if self.control[t]:
                return t + 1
        return end

    @property
    def learned(self) -> np.ndarray:
        """bool [T]: the tokens that training learns, those of messages with weight 1 and of what closes them."""
        out = np.zeros(len(self.ids), bool)
        for i, message in enumerate(self.messages):
            weight = message.get("weight")
            if message["role"] == "assistant" if weight is None else weight:
                at = np.flatnonzero(self.message == i)
                out[at] = True
                if len(at):
                    out[at[-1] : self.closing(at[-1] + 1)] = True
        return out


class Chat:
    """The chat format of a tokenizer.

    Args:
      tokenizer: with a `template`, the text of its chat template.

    Raises:
      InputError: the tokenizer has no template.
    """

    def __init__(self, tokenizer: Tokenizer):
        import tokenizers

        if tokenizer.template is None:
            raise InputError(
                "messages were given, but this tokenizer has no chat template: expected `chat_template` in "
                "tokenizer_config.json or a file chat_template.jinja; use a model tuned for chat, or give texts"
            )
        self.template, self._names, self._rows = tokenizer.template, tokenizer.names, tokenizer.rows
        # A copy that reads no control token in a text, whose own tokens for private characters take their place.
        self._core = core = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        added = {token.content: (id, token) for id, token in core.get_added_tokens_decoder().items()}
        always = [name for name, (id, token) in added.items() if token.special or id in tokenizer.ends]
        written = [name for name in added if name in self.template and not name.isspace() and name not in always]
        core.add_special_tokens(written)  # in a text of the assistant these are read, as in <think>
        core.encode_special_tokens = True
        names = always + written
        self._private = {name: chr(_CONTROL + i) for i, name in enumerate(names)}
        for name, private in self._private.items():
            kept = {key: getattr(added[name][1], key) for key in ("normalized", "lstrip", "rstrip", "single_word")}
            core.add_tokens([tokenizers.AddedToken(private, special=False, **kept)])
        self._ids = {core.token_to_id(private): added[name][0] for name, private in self._private.items()}
        self._all, self._written = _either(names), _either(written)

    def prompt(self, messages: Messages) -> Conversation:
        """The conversation up to where the assistant answers next.

        Raises:
          InputError: the last message is the assistant's, and what `encode` raises.
        """
        check_messages(messages)
        if messages[-1]["role"] == "assistant":
            raise InputError(
                f"the last of {len(messages)} messages is the assistant's, but a prompt ends where the assistant "
                "answers: leave it out, or put a message of the user behind it"
            )
        return self.encode(messages, prompt=True)

    def encode(self, messages: Messages, prompt: bool = False) -> Conversation:
        """The ids of a conversation: those of `apply_chat_template(messages, add_generation_prompt=prompt)`, except
        that a control token that a message spells is encoded as ordinary text.

        Tokens between the text of a message and the template belong to the message, and so does the space around its
        text where the template keeps it.

        Raises:
          InputError: malformed messages; a template that fails, refuses or leaves out a message, or that changes what
            else it writes with the text of one.
        """
        check_messages(messages)
        text, spans = self._located(messages, prompt)
        pieces, owners, at = [], [], 0
        for i, start, end in [*spans, (-1, len(text), len(text))]:
            start = max(start, at)
            for owner, piece in ((-1, text[at:start]), (i, text[start:end])):
                control = self._all if owner < 0 else self._written if messages[i]["role"] == "assistant" else None
                piece = piece if control is None else control.sub(lambda m: self._private[m[0]], piece)
                pieces.append(piece)
                owners.append(np.full(len(piece), owner, np.int32))
            at = end
        owner = np.concatenate([*owners, [-1]])
        found = self._core.encode("".join(pieces), add_special_tokens=False)
        ids = [self._ids.get(id, id) for id in found.ids]
        if self._rows is not None:
            check_ids(ids, self._rows, f"the conversation that begins with {messages[0]['content'][:40]!r}")
        message = [int(np.max(owner[start : max(end, start + 1)])) for start, end in found.offsets]
        return Conversation(
            ids=ids,
            message=np.asarray(message, np.int32),
            control=np.asarray([id in self._ids for id in found.ids], bool),
            messages=messages,
        )

    def answer(self, messages: Messages, text: str) -> list[int]:
        """The ids of a text as the assistant's answer to messages, without what closes it; none for a blank text."""
        if not text.strip():
            return []
        whole = self.encode([*messages, {"role": "assistant", "content": text}])
        return whole.ids[whole.answer]

    def _render(self, messages: Messages, prompt: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            (text,), _ = render_jinja_template(
                conversations=[plain], chat_template=self.template, add_generation_prompt=prompt, **self._names
            )
        except Exception as e:  # whatever a template, which is a program of others, may raise
            raise _TemplateError(f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:160]}") from e
        return text

    def _located(self, messages: Messages, prompt: bool) -> tuple[str, list[tuple[int, int, int]]]:
        """The text of a conversation, and (number of a message, start, end) of each part of it that is of a message.

        Messages are rendered once more with private characters around them, which are then taken out: around a whole
        message, or, for templates that trim it, inside the space at its ends.
        """
        try:
            text = self._render(messages, prompt)
        except _TemplateError as e:
            raise self._refused(messages, prompt, e) from e
        for trimmed in (False, True):
            try:
                marked = self._render([_marked(i, m, trimmed) for i, m in enumerate(messages)], prompt)
            except _TemplateError:
                continue
            pieces = _MARK.split(marked)
            if "".join(pieces[::2]) == text:
                spans = list(_spans(text, pieces, messages))
                missing = set(range(len(messages))) - {i for i, *_ in spans}
                for i in sorted(missing):
                    raise InputError(
                        f"the chat template leaves out message {i + 1} ({messages[i]['role']}): leave it out too, or, "
                        "if it is a system prompt, put its text in the first message of the user"
                    )
                return text, spans
        raise InputError(
            "the chat template writes other text around a message because of what the message says, so it is not known "
            f"which tokens are whose: change the message that begins with {messages[-1]['content'][:40]!r}"
        )

    def _refused(self, messages: Messages, prompt: bool, error: _TemplateError) -> InputError:
        """What to say of a template that failed: without the system prompt, does it work?"""
        rest = [m for m in messages if m["role"] != "system"]
        if rest and len(rest) < len(messages):
            try:
                self._render(rest, prompt)
            except _TemplateError:
                pass
            else:
                return InputError(
                    f"the chat template takes no system prompt ({error}): leave it out, or put its text in the first "
                    "message of the user"
                )
        return InputError(
            f"the chat template fails on these messages ({error}); most templates expect messages of the user and of "
            "the assistant by turns, the user's first"
        )


class _TemplateError(Exception):
    """A template that failed."""


def _marked(i: int, message: Mapping[str, Any], trimmed: bool) -> dict[str, Any]:
    text = message["content"]
    core = text.strip() if trimmed else text
    before, _, after = text.partition(core)
    return {"role": message["role"], "content": f"{before}{chr(_OPEN + i)}{core}{chr(_CLOSE + i)}{after}"}


def _spans(text: str, pieces: Sequence[str], messages: Messages) -> Iterator[tuple[int, int, int]]:
    """The spans between marks. Where a template cuts off the beginning or the end of a message with its mark, as those
    do that leave out earlier reasoning, the span goes on as far as text and message agree, space at that end apart."""
    marks, at = [], 0
    for piece, mark in zip(pieces[::2], pieces[1::2]):
        at += len(piece)
        number = ord(mark) - _OPEN
        marks.append((number % MOST, number < MOST, at))
    for k, (i, opens, at) in enumerate(marks):
        content = messages[i]["content"].strip()
        if opens:
            closed = marks[k + 1 : k + 2] and marks[k + 1][:2] == (i, False)
            kept = content[: _agree(text[at:], content)].rstrip()
            yield i, at, marks[k + 1][2] if closed else at + len(kept)
        elif not (k and marks[k - 1][:2] == (i, True)):
            kept = content[len(content) - _agree(text[:at][::-1], content[::-1]) :].lstrip()
            yield i, at - len(kept), at


def _agree(a: str, b: str) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _either(names: Sequence[str]) -> re.Pattern:
    """Any of these strings, the longest first; nothing where there is none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
