"""Messages of a conversation: checks, system prompts, and what records with `messages` mean.

A conversation is a list of messages `{"role": "system" | "user" | "assistant", "content": str}`; `"weight": 0` or `1`
says whether training learns a message (by default the assistant's alone). How messages become token ids is in
`ctg_jax.data.chat`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ctg_jax.types import InputError

Messages = Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant")
MOST = 0x8000  # messages of a conversation
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


def is_messages(value: Any) -> bool:
    """Whether a prompt is given as messages (or one message, which `check_messages` refuses), not as text or ids."""
    several = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return isinstance(value, Mapping) or (several and isinstance(value[0], Mapping))


def malformed(messages: Any) -> str | None:
    """What is wrong with messages, or None."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        return f"messages is {messages!r:.60}, expected a list of messages"
    if not messages:
        return "messages is an empty list, expected at least one message"
    if len(messages) > MOST:
        return f"messages holds {len(messages)} messages, expected at most {MOST}"
    for i, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            return f'message {i} is {message!r:.60}, expected {{"role": …, "content": …}}'
        role, content, weight = (message.get(key) for key in ("role", "content", "weight"))
        if role not in ROLES:
            return f"message {i} has the role {role!r}, expected one of {', '.join(ROLES)}"
        if not isinstance(content, str):
            return f"message {i} ({role}) has the content {content!r:.60}, expected a string"
        if not content.strip():
            return f"message {i} ({role}) is empty: leave it out, or give it at least one word"
        if found := _PRIVATE.search(content):
            return f"message {i} ({role}) holds the private character U+{ord(found[0]):X}, which marks tokens here"
        if weight not in (None, 0, 1):
            return f"message {i} ({role}) has the weight {weight!r}, expected 0 or 1"
    return None


def check_messages(messages: Any) -> None:
    """InputError unless this is a list of messages with known roles and texts."""
    if wrong := malformed(messages):
        raise InputError(wrong)


def asked(text: str, system: str | None = None) -> list[dict[str, str]]:
    """A text as the message of a user, behind a system prompt where one is given."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


def under(messages: Messages, system: str | None) -> list[Mapping[str, Any]]:
    """Messages behind a system prompt, where one is given.

    Raises:
      InputError: they begin with a system prompt of their own.
    """
    check_messages(messages)
    if system and messages[0]["role"] == "system":
        raise InputError(
            f"system is {system[:40]!r}, but the messages begin with a system prompt: leave out one of them"
        )
    return [{"role": "system", "content": system}, *messages] if system else list(messages)


def shown(prompt: str | Messages) -> str:
    """A prompt as text for people and judges: of messages a line each, "role: text", and "assistant: " at the end."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{m['role']}: {m['content']}\n" for m in prompt) + "assistant: "


def has_messages(record: Mapping[str, Any]) -> bool:
    """Whether a record is a conversation."""
    return record.get("messages") is not None


def prompt_of(record: Mapping[str, Any]) -> str | Messages:
    """The prompt of a record: its `messages`, or else `prompt`, or else `text`."""
    return record["messages"] if has_messages(record) else record.get("prompt", record.get("text", ""))


def unanswered(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without the assistant's last message, which is then no part of the prompt."""
    answered = has_messages(record) and record["messages"][-1]["role"] == "assistant"
    return {**record, "messages": list(record["messages"][:-1])} if answered else dict(record)
