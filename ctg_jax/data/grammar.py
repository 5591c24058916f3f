"""Sentence templates: drawn from, counted and enumerated by one reading of the same `{slot}` notation.

A template is text with slots, `The {aspect} was {adj} and {adj}.`; a table maps each slot to its words. A slot that
occurs twice in one template is filled without repetition. `a(n)` becomes `a` or `an`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

Table = Mapping[str, Sequence[str]]
SLOT = re.compile(r"\{(\w+)\}")


class Draws:
    """Uniform integers from SHA-256 of a name and a counter: the same on every platform and Python version."""

    def __init__(self, name: str):
        self._name, self._block, self._words = name, 0, []

    def below(self, n: int) -> int:
        """An integer of [0, n); the bias of the remainder is below n / 2**32."""
        if not self._words:
            digest = hashlib.sha256(f"{self._name}/{self._block}".encode()).digest()
            self._words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)]
            self._block += 1
        return self._words.pop() % n

    def choice(self, options: Sequence):
        return options[self.below(len(options))]


def finish(text: str) -> str:
    """Chooses the article and capitalises the first letter."""
    text = re.sub(r"\b([Aa])\(n\) (?=(\w))", lambda m: m[1] + ("n " if m[2].lower() in "aeiou" else " "), text)
    return text[0].upper() + text[1:]


def draw(template: str, table: Table, draws: Draws) -> str:
    """One sentence of the template."""
    left: dict[str, list[str]] = {}

    def word(match: re.Match) -> str:
        options = left.setdefault(match[1], list(table[match[1]]))
        return options.pop(draws.below(len(options)))

    return finish(SLOT.sub(word, template))


def count(template: str, table: Table) -> int:
    """How many ways there are to fill the template."""
    uses = Counter(SLOT.findall(template))
    return math.prod(math.perm(len(table[slot]), k) for slot, k in uses.items())


def enumerate_all(template: str, table: Table) -> Iterator[str]:
    """Every sentence of the template, `count` of them."""
    slots = SLOT.findall(template)
    uses = Counter(slots)
    for fill in itertools.product(*(itertools.permutations(table[s], k) for s, k in uses.items())):
        words = {slot: iter(chosen) for slot, chosen in zip(uses, fill, strict=True)}
        yield finish(SLOT.sub(lambda m, words=words: next(words[m[1]]), template))


def ordered(counts: Sequence[int], k: int) -> int:
    """The number of ordered choices of one sentence from each of k different groups of these sizes:
    k! times the k-th elementary symmetric polynomial."""
    e = [1] + [0] * k
    for n in counts:
        for i in range(k, 0, -1):
            e[i] += e[i - 1] * n
    return e[k] * math.factorial(k)
