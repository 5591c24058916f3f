"""Coverage of the keywords of each prompt: the share of CommonGen's concepts that a text mentions (Lin et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctg_jax.evaluation.text import coverage
from ctg_jax.rewards.asked import Asked, by_prompt, wanted_in
from ctg_jax.types import InputError

SETTINGS = ("data",)


def keywords_of(record: Mapping[str, Any], where: str) -> list[str] | None:
    """The field `keywords` of a record, None where it is missing or empty; InputError for other than strings with
    a letter or digit."""
    found = record.get("keywords") or None
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(word, str) and any(map(str.isalnum, word)) for word in found):
        raise InputError(f"{where} has the keywords {found!r:.60}, expected a list of strings with letters or digits")
    return found


def fit(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], where: str) -> Asked:
    """The judge of kind "keywords"; see `ctg_jax.rewards`. A text has the attribute where it mentions all of them."""
    return _judge(by_prompt(records, keywords_of, where), settings)


def load(folder: Path, settings: Mapping[str, Any]) -> Asked:
    """The judge of kind "keywords" that was saved in a folder."""
    return _judge(wanted_in(folder), settings)


def _judge(wanted: Mapping[str, Any], settings: Mapping[str, Any]) -> Asked:
    return Asked("keywords@1", wanted, coverage, name=settings["name"], threshold=1.0)
