"""What the front door is given, checked before anything is compiled: prompts, options, decoding rules, controls."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax.controls import truncate
from ctg_jax.data.messages import Messages, is_messages, malformed, under
from ctg_jax.door.mix import Mix, mix_of, together
from ctg_jax.run.stage import nearest
from ctg_jax.stages import sampling
from ctg_jax.types import InputError

_WHOLE = ("top_k", "no_repeat_ngram", "min_length")  # rules that are whole numbers


def prompts_of(prompts: Any, system: str | None = None) -> list[str | Messages]:
    """The prompts as a list of strings and conversations, these under `system` where it is given."""
    if isinstance(prompts, str):
        raise InputError(f"prompts is one string, {prompts[:40]!r}: give a list, [{prompts[:40]!r}]")
    if is_messages(prompts):
        raise InputError("prompts is one conversation: give a list of conversations, [[{…}, {…}]]")
    if isinstance(prompts, Mapping) or not isinstance(prompts, Sequence):
        raise InputError(f"prompts is {prompts!r:.60}, expected a list of texts or of conversations")
    if not prompts:
        raise InputError("prompts is an empty list: give at least one prompt")
    if system is not None and not isinstance(system, str):
        raise InputError(f"system is {system!r:.60}, expected a text")
    return [_prompt(p, i, system) for i, p in enumerate(prompts, 1)]


def _prompt(prompt: Any, number: int, system: str | None) -> str | Messages:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"prompt {number} is empty: give at least one word")
        if system is not None:
            raise InputError(f"system is given, but prompt {number} is a text: give messages, or leave system out")
        return prompt
    if not is_messages(prompt):
        raise InputError(f"prompt {number} is {prompt!r:.60}, expected a text or a list of messages")
    if wrong := malformed(prompt):
        raise InputError(f"prompt {number}: {wrong}")
    return under(prompt, system)


def options_of(max_new: Any, stop: Any, n: Any, seed: Any, greedy: Any, batch: Any = 1) -> sampling.Options:
    """How prompts are completed."""
    for name, value, least in (("max_new", max_new, 1), ("n", n, 1), ("batch", batch, 1), ("seed", seed, 0)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} is {value!r:.60}, expected a whole number of at least {least}")
    if not isinstance(greedy, bool):
        raise InputError(f"greedy is {greedy!r:.60}, expected True or False")
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, Sequence):
        raise InputError(f"stop is {stop!r:.60}, expected a list of texts that end a completion")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise InputError(f"stop holds {text!r:.60}, expected a text of at least one character")
    return sampling.Options(int(n), int(max_new), greedy, int(batch), int(seed), tuple(stop), each=True)


def rules_of(rules: Mapping[str, Any]) -> dict[str, Any]:
    """The decoding rules that are given: options of `truncate.rules`, without those that are None."""
    known = [p.name for p in inspect.signature(truncate.rules).parameters.values() if p.kind is p.KEYWORD_ONLY]
    known.remove("eos")
    for name, value in rules.items():
        if name not in known:
            raise InputError(f"there is no option {name!r}{nearest(name, known)}")
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if name in _WHOLE and number and value != int(value):
            raise InputError(f"{name} is {value}, expected a whole number")
        if name != "banned" and value is not None and (not number or math.isnan(value)):
            raise InputError(f"{name} is {value!r:.60}, expected a number")
    return {name: value for name, value in rules.items() if value is not None}


def mixes_of(control: Any, count: int) -> list[Mix]:
    """The controls of each of `count` prompts."""
    if not isinstance(control, list | tuple):
        return mix_of(control).rows(count)
    if len(control) != count:
        raise InputError(
            f"control is a list of {len(control)}, but there are {count} prompts: give one control, or one for each "
            "prompt; controls that act together are added, a + b"
        )
    return [row for i, one in enumerate(control) for row in mix_of(one, f"control {i + 1}").rows(1)]


@dataclasses.dataclass(frozen=True)
class Group:
    """Prompts that are written together.

    mix: what they are written under. numbers: theirs in the request. cond: the strengths in which they differ, entries
    of `prompts.cond` with a row for each of them.
    """

    mix: Mix
    numbers: list[int]
    cond: dict[str, np.ndarray]


def groups(mixes: Sequence[Mix]) -> list[Group]:
    """The prompts by their mix, in the order in which mixes first come. Those that differ in strengths alone are one
    group where a row can have a strength of its own, so that they share batches and a program."""
    found: dict[Any, list[int]] = {}
    for number, mix in enumerate(mixes):
        found.setdefault(mix.key(), []).append(number)
    shared = [(numbers, together([mixes[i] for i in numbers])) for numbers in found.values()]
    return [Group(mix, numbers, cond) for numbers, (mix, cond) in shared]


def bucket(size: int, least: int, most: int) -> int:
    """The smallest power of two that is at least `size` and `least`, at most `most`: requests of many sizes share few
    shapes, and so few compiled programs."""
    return max(size, min(most, max(least, 1 << (size - 1).bit_length())))
