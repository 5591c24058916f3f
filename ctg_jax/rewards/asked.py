"""A reward that asks something else of each prompt's text, and knows what from the records of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctg_jax.data.messages import prompt_of, shown
from ctg_jax.io import digest, read_json, write_json
from ctg_jax.rewards.check import checked, readable
from ctg_jax.types import InputError


class Asked:
    """Scores by a function of a text and of what its prompt asks for.

    Args:
      rules: the name and number of the rules, such as "keywords@1", which begin the version.
      wanted: prompt -> what it asks for, JSON values.
      score: (text, what its prompt asks for) -> a number.
      name: what it measures. threshold: the score from which a text counts as having the attribute.
    """

    def __init__(
        self, rules: str, wanted: Mapping[str, Any], score: Callable[[str, Any], float], *, name: str, threshold: float
    ):
        self.name, self.threshold, self.wanted, self.score = name, threshold, dict(wanted), score
        self.version = f"{rules},{digest(self.wanted)}"

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Scores float32 [n].

        Raises:
          InputError: a prompt without a record, or with one that asks for nothing.
        """
        rows = readable(self.name, prompts, texts, "text")
        unknown = next((p for p in prompts if p not in self.wanted), None)
        if unknown is not None:
            raise InputError(
                f"the prompt {unknown[-60:]!r} is not among the records that the judge {self.name!r} was given, or "
                "asks for nothing that it checks: give the judge the data of the prompts, and leave out such prompts"
            )
        return checked(self.name, [self.score(t, self.wanted[p]) for p, t in zip(prompts, rows)], len(rows))

    def save(self, folder: str | Path) -> None:
        """Writes what the prompts ask for, for `wanted_in`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "asked.json", self.wanted)


def wanted_in(folder: Path) -> dict[str, Any]:
    """What `Asked.save` wrote."""
    return read_json(folder / "asked.json")


def by_prompt(
    records: Sequence[Mapping[str, Any]], question: Callable[[Mapping[str, Any], str], Any], where: str
) -> dict[str, Any]:
    """prompt, as judges are shown it -> `question(record, what messages call it)`, without records for which that is
    None.

    Raises:
      InputError: two records with one prompt ask for different things, or none asks for anything.
    """
    found: dict[str, Any] = {}
    for i, record in enumerate(records):
        value, prompt = question(record, f"record {i + 1} of {where}"), shown(prompt_of(record))
        if value is None:
            continue
        if found.setdefault(prompt, value) != value:
            raise InputError(
                f"record {i + 1} of {where} asks {value!r:.60} of the prompt {prompt[-60:]!r} and another one "
                f"{found[prompt]!r:.60}: expected one answer for each prompt"
            )
    if not found:
        raise InputError(f"no record of {where} asks for anything that this judge can check")
    return found
