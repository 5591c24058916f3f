"""A reward for texts of the length that was asked for, in words or characters (Jie et al. 2024, section 3.1)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctg_jax.rewards.check import checked, readable
from ctg_jax.types import InputError

# The words before the number -> (whether it bounds the length from below, from above).
_KINDS = {"": (1, 1), "exactly": (1, 1), "equal to": (1, 1), "about": (1, 1)}
_KINDS |= {"at most": (0, 1), "less than": (0, 1), "at least": (1, 0), "more than": (1, 0)}
_REQUEST = re.compile(
    rf"(?:\bbetween (?P<low>\d+) and |(?:\b(?P<kind>{'|'.join(filter(None, _KINDS))}) )?)(?P<number>\d+) "
    r"(?P<unit>word|character)s?\b",
    re.IGNORECASE,
)
_REQUESTS = "'12 words', 'at most 40 characters', 'at least 5 words' or 'between 5 and 9 words'"


def asked(text: str) -> tuple[float, float, str] | None:
    """(shortest, longest, "word" or "character") of the last request for a length in a text; None where there is none.
    "less than N" is at most N and "more than N" at least N, as in the paper's reward.

    Raises:
      InputError: between a number and a smaller one.
    """
    found = list(_REQUEST.finditer(text))
    if not found:
        return None
    number, unit = int(found[-1]["number"]), found[-1]["unit"].lower()
    if found[-1]["low"] is not None:
        if int(found[-1]["low"]) > number:
            raise InputError(f"the request {found[-1][0]!r} asks for no length: expected the smaller number first.")
        return float(found[-1]["low"]), float(number), unit
    below, above = _KINDS[(found[-1]["kind"] or "").lower()]
    return float(number) if below else 0.0, float(number) if above else math.inf, unit


class Length:
    """Minus the number of words or characters by which a text is too long or too short; 0 where it is as asked.

    Args:
      request: the length of all texts, such as "12 words"; None: that which each prompt asks for.
      name: what it measures.

    Raises:
      InputError: `request` is no request.
    """

    threshold = -0.5

    def __init__(self, request: str | None = None, *, name: str = "length"):
        self.name, self.request = name, request
        self.fixed = None if request is None else asked(request)
        if request is not None and self.fixed is None:
            raise InputError(f"target is {request!r}, which asks for no length: expected {_REQUESTS}")
        self.version = f"length[{request or 'of the prompt'}]@1"

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]):
        """Scores float32 [n].

        Raises:
          InputError: a prompt that asks for no length, where there is no request for all texts.
        """
        rows = readable(self.name, prompts, texts, "text")
        return checked(self.name, [self._one(p, t) for p, t in zip(prompts, rows)], len(rows))

    def explain(self, prompts: Sequence[str], texts: Sequence[str]) -> list[str]:
        """By how much each text is too long or too short, such as "3 words too many"; "" where it is as asked."""
        return [self._explained(p, t) for p, t in zip(prompts, readable(self.name, prompts, texts, "text"))]

    def _explained(self, prompt: str, text: str) -> str:
        short, long, unit = self._gaps(prompt, text)
        by = max(short, long)
        if by <= 0:
            return ""
        return f"{by:g} {unit}{'s' if by > 1 else ''} too {'few' if short > 0 else 'many'}"

    def _one(self, prompt: str, text: str) -> float:
        return -max(*self._gaps(prompt, text)[:2], 0.0)

    def _gaps(self, prompt: str, text: str) -> tuple[float, float, str]:
        """(by how much a text is too short, too long, the unit)."""
        wanted = self.fixed or asked(prompt)
        if wanted is None:
            raise InputError(
                f"the prompt {prompt[-60:]!r} asks reward {self.name!r} for no length: expected {_REQUESTS}"
            )
        low, high, unit = wanted
        size = len(text.split()) if unit == "word" else len(text)
        return low - size, size - high, unit


SETTINGS = ("target",)


def load(folder: Path, settings: Mapping[str, Any]) -> Length:
    """The judge of kind "length"; see `ctg_jax.rewards`. `target` is the request, or left out."""
    target = settings["target"]
    if not isinstance(target, str) and target != 1:
        raise InputError(f"target is {target!r}, which asks for no length: expected {_REQUESTS}")
    return Length(target if isinstance(target, str) else None, name=settings["name"])
