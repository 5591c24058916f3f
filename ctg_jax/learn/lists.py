"""Controls from lists of texts: what `from_pairs` and `from_texts` of the methods share.

The lists become records with a label, which the `fit` of a method reads; so a list in memory and a file of the same
texts are the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax.data.messages import Messages, is_messages, malformed
from ctg_jax.types import InputError

Text = str | Messages


def learners(
    fit: Callable, pairs: Mapping[str, Any] | None = None, texts: Mapping[str, Any] | None = None
) -> tuple[Callable, Callable]:
    """(from_pairs, from_texts) of a method.

    Args:
      fit: of the method. pairs, texts: its settings in which the two functions differ from the defaults of `fit`.
    """

    def from_pairs(lm: Any, examples: Sequence[tuple[Text, Text]], **settings: Any) -> Any:
        """What the method learns from pairs (text with the attribute, text without it): labels 1 and 0.

        Args:
          lm: the language model, as `ctg_jax.load` returns it.
          examples: pairs of texts or of conversations.
          settings: of the `fit` of the method.

        Returns:
          A mix (`ctg_jax.door.Mix`) of the control at the strength that it was fitted with.

        Raises:
          InputError: no list of pairs, a pair that is none, an empty text, and what `fit` raises.
        """
        _check(lm, examples, "pairs", "a list of pairs of texts, [(with, without), …]")
        records = []
        for i, pair in enumerate(examples, 1):
            if isinstance(pair, str | Mapping) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise InputError(f"pair {i} is {pair!r:.60}, expected two texts, (with, without)")
            if pair[0] == pair[1]:
                raise InputError(f"pair {i} holds the same text twice, {pair[0]!r:.60}: nothing tells its sides apart")
            records += [_record(text, 1 - side, f"pair {i}") for side, text in enumerate(pair)]
        return lm.fit(fit, records, {**(pairs or {}), **settings})

    def from_texts(lm: Any, examples: Sequence[Text], labels: Sequence[int] | None = None, **settings: Any) -> Any:
        """What the method learns from texts with labels, whole numbers from 0; None: label 1 for all of them.

        The other arguments, the result and the errors are those of `from_pairs`.
        """
        _check(lm, examples, "texts", "a list of texts")
        labels = [1] * len(examples) if labels is None else labels
        several = isinstance(labels, Sequence | np.ndarray) and not isinstance(labels, str)
        if not several or len(labels) != len(examples):
            found = f"a list of {len(labels)}" if several else f"{labels!r:.60}"
            raise InputError(f"labels is {found}, expected one for each of the {len(examples)} texts")
        for i, label in enumerate(labels, 1):
            if not isinstance(label, int | np.integer) or label < 0:
                raise InputError(f"label {i} is {label!r:.60}, expected a whole number from 0 (1: with the attribute)")
        records = [_record(t, int(x), f"text {i}") for i, (t, x) in enumerate(zip(examples, labels), 1)]
        return lm.fit(fit, records, {**(texts or {}), **settings})

    return from_pairs, from_texts


def _check(lm: Any, given: Any, name: str, expected: str) -> None:
    if not hasattr(lm, "write"):
        raise InputError(f"lm is {type(lm).__name__}, expected a language model that ctg_jax.load returned")
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise InputError(f"{name} is {given!r:.60}, expected {expected}")
    if not given:
        raise InputError(f"{name} is an empty list, expected {expected}")


def _record(text: Any, label: int, where: str) -> dict[str, Any]:
    if isinstance(text, str):
        if not text.strip():
            raise InputError(f"{where} holds an empty text: give at least one word")
        return {"text": text, "label": label}
    if not is_messages(text):
        raise InputError(f"{where} holds {text!r:.60}, expected a text or a list of messages")
    if wrong := malformed(text):
        raise InputError(f"{where}: {wrong}")
    return {"messages": list(text), "label": label}
