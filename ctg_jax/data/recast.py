"""Records in another form: fields that templates make of the fields that a record has."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from ctg_jax.types import InputError

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_PLACE = re.compile(r"\w+(\[\w+\])*")


def recast(record: Mapping[str, Any], templates: Mapping[str, str], where: str) -> dict[str, Any]:
    """The record with the fields that `templates` makes, which all read the record as it was.

    A template is a format string, such as "{concepts} = {sentence}", over the fields of the record, their parts
    ("{scene[0]}"), and `first`, `last` and `words`, the first and the last word of its text and their number; a list is
    written with a space between its items. A template without braces is the name of a field, whose value stays what it
    is, and as `keywords` becomes a list of words. The prompts of data that are in other words than their texts become
    prompts that their texts begin with, as `completions.continuations` asks: {"prompt": "{concepts} =", "text":
    "{concepts} = {sentence}"}.

    Args:
      where: what messages call the record.

    Raises:
      InputError: a template that is malformed or names what the record does not have; a prompt or text that is no
        string; a text that does not begin with the prompt, where both are made.
    """
    known = {**_words(record.get("text")), **record}
    made = {name: _filled(name, template, known, where) for name, template in templates.items()}
    if isinstance(made.get("keywords"), str):
        made["keywords"] = _WORD.findall(made["keywords"])
    for name in made.keys() & {"prompt", "text"}:
        if not isinstance(made[name], str):
            raise InputError(
                f"the template of {name!r} makes {made[name]!r:.60} of {where}, expected a text: write {{field}} in "
                "braces"
            )
    if {"prompt", "text"} <= made.keys() and not made["text"].startswith(made["prompt"]):
        raise InputError(
            f"{where}: the text {made['text'][:60]!r} does not begin with the prompt {made['prompt'][:60]!r}: let the "
            "template of text begin with that of prompt"
        )
    return {**record, **made}


def _words(text: Any) -> dict[str, Any]:
    found = _WORD.findall(text) if isinstance(text, str) else []
    return {"first": found[0], "last": found[-1], "words": len(found)} if found else {}


def _filled(name: str, template: Any, known: Mapping[str, Any], where: str) -> Any:
    if not isinstance(template, str):
        raise InputError(f"the template of {name!r} is {template!r}, expected a format string or the name of a field")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as e:
        raise InputError(f"the template {template!r} of {name!r} is malformed ({e}): write {{field}}") from None
    if "{" not in template and "}" not in template:
        return _value(name, template, known, where)
    out = []
    for text, place, spec, conversion in parts:
        out.append(text)
        if place is None:
            continue
        if spec or conversion or not _PLACE.fullmatch(place):
            raise InputError(f"the template {template!r} of {name!r} is malformed at {place!r}: write {{field}}")
        value = _value(name, place, known, where)
        out.append(" ".join(map(str, value)) if isinstance(value, list) else str(value))
    return "".join(out)


def _value(name: str, place: str, known: Mapping[str, Any], where: str) -> Any:
    """The value of a field, or of a part of one, "scene[0]"."""
    field, *parts = place.replace("]", "").split("[")
    try:
        value = known[field]
        for part in parts:
            value = value[int(part)] if isinstance(value, list) else value[part]
    except (KeyError, IndexError, TypeError, ValueError):
        raise InputError(
            f"the template of {name!r} names {place!r}, which {where} does not have; it has {', '.join(sorted(known))}"
        ) from None
    if value is None:
        raise InputError(f"the template of {name!r} names {place!r}, which is None in {where}: leave such records out")
    return value
