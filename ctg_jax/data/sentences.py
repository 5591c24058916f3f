"""Documents as lists of sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ctg_jax.types import InputError

_END = re.compile(r"(?<=[.!?])\s+")


def sentences_of(record: Mapping[str, Any]) -> list[str]:
    """The sentences of a record: its list `sentences` where it has one, or else its `text`, cut behind every ".", "!"
    and "?" that white space follows, so that abbreviations cut too. Sentences without a character are left out.

    Raises:
      InputError: `sentences` is no list of strings.
    """
    found = record["sentences"] if "sentences" in record else _END.split(record["text"])
    if not isinstance(found, list) or not all(isinstance(s, str) for s in found):
        raise InputError(f"a record has the sentences {found!r:.60}, expected a list of strings, or leave them out")
    return [s.strip() for s in found if s.strip()]
