"""Vocabulary filters of the constrained text generation studio (Roush et al. 2022): rules about the letters of a token.

A token whose text breaks a rule gets the probability (1 - alpha) times its own, before the distribution is normalised:
alpha 1 removes it, which is the studio's filter, 0 is the base model.

    control = filters.make(lm, key, tokenizer=tokenizer, rules=[{"without": ["e"]}], transforms=["lower"])

The mask over the vocabulary is made once, on the host. A rule about letters is exact for text: a text lacks "e" if all
its tokens do. A rule about words is not, since a word may be several tokens; with `whole_words` only tokens that begin
a word are left, and what has no letters, so that every new word is one token. The distribution is the model's,
truncated and normalised step by step; it is not the model's given that the whole text keeps the rules.

The authors' program filters after top-p, which may leave nothing, and continues from the transformed string. Here
filters come before truncation in a chain, and the text of a token is never changed. Its predicates on sound and meaning
that need dictionaries (double metaphone, stress, word vectors) are left to a function of one's own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import tree
from ctg_jax.control import Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.models.lm import LM
from ctg_jax.rewards.code import named
from ctg_jax.run.stage import nearest
from ctg_jax.support import require
from ctg_jax.types import InputError


@struct.dataclass
class Filter(Control):
    """Tokens that break a rule get (1 - alpha) of their probability.

    Attributes:
      kept: float32 [V], at least ½ where a token keeps the rules.
      alpha: float32 [] or, per row, [B], from 0, the base model, to 1, which removes the others.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    kept: jax.Array
    alpha: jax.Array
    cond: str | None = struct.field(pytree_node=False, default=None)

    def init(self, prompts, length):
        return per_row(self.alpha, prompts, self.cond)

    def logits(self, z, h, tokens, mask, state):
        self.check_vocabulary(z.shape[-1])
        kept = (self.kept >= 0.5)[None, None]
        less = jnp.log1p(-jnp.minimum(state, 1 - 1e-6))
        return require(jnp.where(kept, z, z + less), kept | (state < 1)), state

    @property
    def must_hold(self) -> bool:
        """Whether it removes tokens at its present strength; True where that has no value, inside a program."""
        value = tree.concrete(self.alpha)
        return value is None or bool(np.any(value >= 1))

    def allowed(self, at: jax.Array, vocab: int) -> jax.Array:
        """bool [1 or B, 1, V]: what may be new tokens; see `controls.constraints`. Everything, where rows choose."""
        soft = jnp.reshape(self.alpha, (-1, 1, 1)) < (1 if self.cond is None else jnp.inf)
        return (jnp.asarray(self.kept) >= 0.5)[None, None] | soft

    def steps(self) -> list[int]:
        """The numbers of the new tokens before which `allowed` changes."""
        return []

    def check_vocabulary(self, vocab: int) -> None:
        """InputError where the mask is that of another vocabulary."""
        if self.kept.shape[-1] != vocab:
            raise InputError(
                f"The filter is of a vocabulary of {self.kept.shape[-1]} tokens, but the model has {vocab}: make it "
                "for this model."
            )


def init(
    lm: LM,
    key: jax.Array,
    *,
    rules: Sequence[Mapping[str, Any]] = (),
    transforms: Sequence[str] = (),
    blank: str = "keep",
    whole_words: bool = False,
    alpha: float = 1.0,
    cond: str | None = None,
) -> Filter:
    """A filter that keeps every token; `make`, which has the tokenizer, marks those that break a rule.

    Args:
      rules: conjunctions of predicates, name -> argument, see `PREDICATES`. A token is kept where all of them hold.
      transforms: what is done to the text of a token before it is examined, see `TRANSFORMS`.
      blank: "keep" or "cut" tokens whose text is empty after that.
      whole_words: whether to leave only tokens that begin a word, and those without letters.
      alpha, cond: see `Filter`.

    Raises:
      InputError: an unknown predicate or transform (with the nearest name), no rule at all, an unknown `blank`, alpha
        outside 0 … 1.
    """
    if not rules and not whole_words:
        raise InputError("rules is empty: give at least one, such as {'without': ['e']}, or set whole_words.")
    for rule in rules:
        for name in rule:
            if name not in PREDICATES:
                raise InputError(f"rules have no predicate {name!r}{nearest(name, PREDICATES)}.")
    for name in transforms:
        if name not in TRANSFORMS:
            raise InputError(f"transforms have no {name!r}{nearest(name, TRANSFORMS)}.")
    if blank not in ("keep", "cut"):
        raise InputError(f"blank is {blank!r}, expected 'keep' or 'cut'.")
    if (value := tree.concrete(alpha)) is not None and not np.all((value >= 0) & (value <= 1)):
        raise InputError(f"alpha is {alpha}, expected a number from 0 to 1.")
    return Filter(jnp.ones(lm.vocab), jnp.asarray(alpha, jnp.float32), cond)


def make(lm: LM, key: jax.Array, *, tokenizer: Tokenizer, **settings: Any) -> Filter:
    """`init` with the tokens that keep the rules.

    Raises:
      InputError: rules that leave no token but those that end a text, a predicate whose argument it cannot use, and
        what `init` raises.
    """
    control = init(lm, key, **settings)
    ids = np.flatnonzero(tokenizer.known(lm.vocab))
    texts = tokenizer.token_texts(ids)
    options = {name: settings[name] for name in ("transforms", "blank", "whole_words") if name in settings}
    keeps = passed(texts, settings.get("rules", ()), **options)
    ends = np.isin(ids, tokenizer.ends)
    if not np.any(keeps & ~ends):
        raise InputError(f"rules is {list(settings.get('rules', ()))}, which no token keeps: give weaker rules.")
    kept = np.ones(lm.vocab, np.float32)
    kept[ids] = keeps | ends
    return control.replace(kept=jnp.asarray(kept))


def passed(
    texts: Sequence[str],
    rules: Sequence[Mapping[str, Any]],
    transforms: Sequence[str] = (),
    blank: str = "keep",
    whole_words: bool = False,
) -> np.ndarray:
    """bool [n]: which texts of tokens keep all rules; see `init`.

    Raises:
      InputError: a predicate cannot use its argument.
    """
    checks = [(name, value, PREDICATES[name]) for rule in rules for name, value in rule.items()]
    checks = [(name, named(v)[0] if name == "function" else v, test) for name, v, test in checks]
    found = []
    for text in texts:
        word = text
        for name in transforms:
            word = TRANSFORMS[name](word)
        keeps = not whole_words or text[:1].isspace() or not any(c.isalpha() for c in text)
        if not word:
            found.append(keeps and blank == "keep")
            continue
        for name, value, test in checks:
            try:
                keeps = keeps and bool(test(word, value))
            except (TypeError, KeyError, ValueError, AttributeError) as e:
                raise InputError(f"rules: {name!r} cannot use {value!r} ({e}).") from None
        found.append(keeps)
    return np.asarray(found, bool)


TRANSFORMS: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "strip": str.strip,
    "strip_left": str.lstrip,
    "strip_right": str.rstrip,
    "letters": lambda text: "".join(c for c in text if c.isalpha()),
}


def vowels(word: str) -> list[str]:
    """The groups of vowels of an English word, each about a syllable; a silent e at the end is none."""
    word = word.lower()
    silent = re.search(r"[^aeiouyl\W]e$", word) and len(re.findall(r"[aeiouy]+", word)) > 1
    return re.findall(r"[aeiouy]+", word[:-1] if silent else word)


def rime(word: str) -> str:
    """The end of a word from its last sounded vowels on, by spelling: what two words that rhyme share."""
    groups = vowels(word)
    return word.lower()[word.lower().rindex(groups[-1]) :] if groups else word.lower()


def distance(a: str, b: str) -> int:
    """The least number of insertions, deletions and replacements that make one string of the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def _listed(value: Any) -> Sequence[str]:
    """A list of strings; a single string is a list of one."""
    return [value] if isinstance(value, str) else value


PREDICATES: dict[str, Callable[[str, Any], Any]] = {
    "without": lambda word, some: not any(s in word for s in _listed(some)),
    "without_all": lambda word, some: not all(s in word for s in _listed(some)),
    "with_any": lambda word, some: any(s in word for s in _listed(some)),
    "with_all": lambda word, some: all(s in word for s in _listed(some)),
    "starts": lambda word, some: any(word.startswith(s) for s in _listed(some)),
    "ends": lambda word, some: any(word.endswith(s) for s in _listed(some)),
    "letter_at": lambda word, at: all(word[int(i) : int(i) + 1] == c for i, c in at.items()),
    "length": lambda word, n: len(word) == n,
    "shorter": lambda word, n: len(word) < n,
    "longer": lambda word, n: len(word) > n,
    "near": lambda word, to: distance(word, to["word"]) <= to["distance"],
    "syllables": lambda word, n: len(vowels(word)) == n,
    "rhymes": lambda word, other: rime(word) == rime(other) and word.lower() != other.lower(),
    "palindrome": lambda word, wanted: (word == word[::-1]) == wanted,
    "anagram": lambda word, other: Counter(word) == Counter(other),
    "from_letters": lambda word, letters: not Counter(word) - Counter(letters),
    "letters_at_most": lambda word, n: max(Counter(word).values()) <= n,
    "letters_at_least": lambda word, n: min(Counter(word).values()) >= n,
    "function": lambda word, fn: fn(word),  # "package.module:function", a function of one string
}


def example(lm: LM, key: jax.Array) -> Filter:
    """A random half of the vocabulary, most of whose probability is taken, for the laws."""
    return Filter(jnp.where(jax.random.bernoulli(key, 0.5, (lm.vocab,)), 1.0, 0.0), jnp.float32(0.9))


def neutral(control: Filter) -> Filter:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))
