"""Documents as lists of sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_END = re.compile(r"(?<=[.!?])\s+")


def sentences_of(record: Mapping[str, Any]) -> list[str]:
    """The sentences of a record: its list `sentences` where it has one, or else its `text`, cut behind every ".", "!"
    and "?" that white space follows, so that abbreviations cut too. Sentences without a character are left out."""
    found = record["sentences"] if "sentences" in record else _END.split(record["text"])
    return [s.strip() for s in found if s.strip()]
