"""Constraints of form: regular expressions, JSON schemas, words that must or must not appear, different for each row.

    control = form.make(lm, key, tokenizer=tokenizer, forms=[{"schema": {"type": "object", …}}, {"words": ["good"]}])

Each form becomes a finite automaton over the tokens of the model (`controls.automaton`), kept as arrays: a class for
each token of the vocabulary and a table of states by classes, of a size that is fixed beforehand (`states`, `classes`)
and that all forms of the control share. A row carries the number of its state through the compiled loop. A token that
its state does not allow gets (1 - alpha) of its probability before the distribution is normalised: alpha 1 removes it,
0 is the base model. Under alpha < 1 a row that breaks its form is free from there on.

A text ends only where its form is complete, and it is complete after `max_new` tokens at the latest: a token is allowed
only if a text can be completed with the tokens that are left. A form that needs more than `max_new` tokens is refused
before decoding. The distribution is the model's, cut and normalised step by step (as that of other constrained
decoders: Willard & Louf 2023); it is not the model's given that the whole text has the form.

A form describes the text behind the prompt, its leading space included. In a chain it comes before truncation, as other
rules that must hold. A `stop` text ends a row whether or not its form is complete.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ctg_jax import tree
from ctg_jax.control import Control
from ctg_jax.controls import automaton
from ctg_jax.controls.automaton import FAR, FREE
from ctg_jax.controls.conditions import check_choice, condition
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, nearest
from ctg_jax.support import require
from ctg_jax.types import InputError

PARTS = ("regex", "schema", "words", "without")


@struct.dataclass
class Place:
    """Where the rows are: their states int32 [B], how many tokens may be written from there on, int32 [], and whether
    the prompt has been read."""

    at: jax.Array
    left: jax.Array
    started: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Form(Control):
    """Tokens that lead away from a form get (1 - alpha) of their probability. All arrays but `alpha` hold whole numbers
    as float32 and are read rounded.

    Attributes:
      starts: float32 [K], the first state of each form.
      table: float32 [S, C], the next state after a token of each class; 0 where it is not allowed.
      classes: float32 [V], the class of each token.
      need: float32 [S], the least number of tokens that complete a text.
      alpha: float32 [] or, per row, [B], from 0, the base model, to 1, which removes other tokens.
      choice: None, where there is one form, or the name of the int [B] entry of `prompts.cond` that picks each row's.
    """

    starts: jax.Array
    table: jax.Array
    classes: jax.Array
    need: jax.Array
    alpha: jax.Array
    choice: str | None = struct.field(pytree_node=False, default=None)

    def check(self, prompts):
        if self.choice is not None:
            check_choice(prompts, self.choice, len(self.starts), "form")

    def init(self, prompts, length):
        rows, prompt = prompts.tokens.shape
        pick = jnp.zeros(rows, jnp.int32) if self.choice is None else condition(prompts, self.choice)
        at = jnp.take(_whole(self.starts), jnp.where(pick < 0, len(self.starts), pick), mode="fill", fill_value=-1)
        return Place(at.astype(jnp.int32), jnp.asarray(length - prompt, jnp.int32))

    def logits(self, z, h, tokens, mask, state):
        self.check_vocabulary(z.shape[-1])
        m, classes = z.shape[1], _whole(self.classes)
        read = m if state.started else m - 1
        left = state.left - jnp.arange(m + 1, dtype=jnp.int32)  # before each token that was read or is to come

        def step(at, seen):
            after = self._after(at, seen[1])[jnp.arange(len(at)), classes[seen[0]]]
            return after, after

        last, later = lax.scan(step, state.at, (tokens[:, tokens.shape[1] - read :].T, left[:read]))
        at = later if state.started else jnp.concatenate([state.at[None], later])
        left = left[read - m + 1 : read + 1]
        allowed = (jax.vmap(self._after)(at, left) != FREE) | (at == FREE)[..., None]
        allowed = jnp.moveaxis(jnp.take(allowed, classes, axis=-1), 0, 1)
        strength = jnp.reshape(jnp.asarray(self.alpha, jnp.float32), (-1, 1, 1))
        less = jnp.log1p(-jnp.minimum(strength, 1 - 1e-6))
        z = require(jnp.where(allowed, z, z + less), allowed | (strength < 1))
        return z, Place(last, left[-1], started=True)

    def _after(self, at: jax.Array, left: jax.Array) -> jax.Array:
        """int32 [B, C]: the state after a token of each class, `FREE` where no text can be completed in time.

        Args:
          at: int32 [B]; -1 where a row has no form, so that no token is allowed there.
          left: int32 [], how many tokens may be written, that one included.
        """
        after = _whole(self.table[jnp.maximum(at, FREE)])
        return jnp.where(self.need[after] <= left - 1, after, FREE)

    @property
    def must_hold(self) -> bool:
        """Whether it removes tokens at its present strength; True where that has no value, inside a program."""
        value = tree.concrete(self.alpha)
        return value is None or bool(np.any(value >= 1))

    def allowed(self, at: jax.Array, vocab: int) -> jax.Array:
        """bool [1 or B, M, V]: what may be the new tokens number `at` int [M] of some row; see `controls.constraints`.
        The number of tokens that are left is not considered."""
        table, classes = (np.rint(x).astype(int) for x in (self.table, self.classes))
        reached, found = np.zeros(len(table), bool), {}
        reached[np.rint(self.starts).astype(int)] = True
        for n in range(int(np.max(at)) + 1):
            after = np.where((self.need[table] < FAR) & reached[:, None], table, FREE)
            found[n] = np.any(after != FREE, axis=0)[classes] | reached[FREE]
            reached = np.isin(np.arange(len(table)), after[after != FREE]) | (reached & (np.arange(len(table)) == FREE))
        soft = np.reshape(self.alpha, (-1, 1, 1)) < 1
        return np.stack([found[int(n)] for n in at])[None] | soft

    def steps(self) -> list[int]:
        """The numbers of the new tokens before which `allowed` is examined for its own sake: the first alone."""
        return []

    def check_vocabulary(self, vocab: int) -> None:
        """InputError where the classes are those of another vocabulary."""
        if self.classes.shape[-1] != vocab:
            raise InputError(
                f"The forms are of a vocabulary of {self.classes.shape[-1]} tokens, but the model has {vocab}: make "
                "the control for this model."
            )

    def check_new(self, new: int) -> None:
        """InputError where a form needs more than `new` tokens."""
        need = np.asarray(self.need)[np.rint(self.starts).astype(int)]
        if self.must_hold and np.any(late := need > new):
            row = int(np.argmax(late))
            raise InputError(
                f"form {row} cannot be met: its shortest text takes {int(need[row])} tokens, more than the {new} that "
                "may be written; set max_new higher or simplify the form."
            )


def _whole(x: jax.Array) -> jax.Array:
    return jnp.rint(x).astype(jnp.int32)


def init(
    lm: LM,
    key: jax.Array,
    *,
    forms: Sequence[Mapping[str, Any]],
    choice: str | None = None,
    alpha: float = 1.0,
    states: int = 2048,
    classes: int = 512,
) -> Form:
    """A control that allows every text; `make`, which has the tokenizer, fills its table.

    Args:
      forms: the forms, each with some of these parts, all of which hold: "regex", an expression (the syntax of Rust's
        `regex`, without look-around) that matches the whole text; "schema", a JSON schema; "words", which all appear,
        as whole words; "without", words that do not.
      choice: see `Form`; needed where there are several forms. Scripts read the field of this name of the prompts'
        records (`conditions`).
      alpha: see `Form`.
      states, classes: the size of the table, 4 · states · classes bytes. JSON schemas take some hundreds of states and
        fewer than a hundred classes; a count such as {1,80} multiplies the states.

    Raises:
      InputError: no form, an unknown or empty part, several forms and no choice, alpha outside 0 … 1.
    """
    if not forms:
        raise InputError("forms is empty: give at least one, such as {'regex': '(yes|no)'}.")
    for form in forms:
        for name in form:
            if name not in PARTS:
                raise InputError(f"forms have no part {name!r}{nearest(name, PARTS)}.")
        if not any(name in form for name in PARTS):
            raise InputError(f"forms hold an empty form: give at least one of {', '.join(PARTS)}.")
    if len(forms) > 1 and choice is None:
        raise InputError(f"There are {len(forms)} forms and choice is None: name the entry of prompts.cond that picks.")
    if (value := tree.concrete(alpha)) is not None and not np.all((value >= 0) & (value <= 1)):
        raise InputError(f"alpha is {alpha}, expected a number from 0 to 1.")
    empty = jnp.zeros(len(forms)), jnp.zeros((states, classes)), jnp.zeros(lm.vocab), jnp.zeros(states)
    return Form(*empty, jnp.asarray(alpha, jnp.float32), choice)


def make(lm: LM, key: jax.Array, *, tokenizer: Tokenizer, **settings: Any) -> Form:
    """`init` with the automata of the forms.

    Raises:
      InputError: a form that no text has, that cannot be translated, or that is too large for the table; a tokenizer
        without a token that ends a text; and what `init` raises.
    """
    control = init(lm, key, **settings)
    if not tokenizer.ends:
        raise InputError("The tokenizer has no token that ends a text, so no text of a form could end.")
    built = [compiled(form) for form in settings["forms"]]
    found = automaton.over_tokens(built, token_bytes(tokenizer, lm.vocab), tokenizer.ends, *control.table.shape)
    arrays = dict(starts=found.starts, table=found.table, classes=found.classes, need=found.need)
    return control.replace(**{name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()})


def conditions(
    artifact: Artifact, lm: Artifact, texts: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """The form of each prompt, where the control has a `choice`: the number in that field of the prompt's record, or
    where no record has the field form i for prompt i.

    Raises:
      InputError: a number that is no form's; no field, and another number of forms than of prompts.
    """
    choice, count = artifact.spec["init"].get("choice"), len(artifact.spec["init"]["forms"])
    if choice is None:
        return {}
    if not any(choice in record for record in records):
        if count != len(texts):
            raise InputError(
                f"There are {count} forms and {len(texts)} prompts, none of which has a field {choice!r}: write the "
                "number of its form there for every prompt, or give as many forms as prompts."
            )
        return {choice: np.arange(count, dtype=np.int32)}
    found = [record.get(choice) for record in records]
    for i, number in enumerate(found):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
            raise InputError(
                f"prompt {i + 1} has {number!r} as its {choice!r}, expected the number of a form, 0 to {count - 1}."
            )
    return {choice: np.asarray(found, np.int32)}


def compiled(form: Mapping[str, Any]) -> automaton.Bytes:
    """The automaton of one form.

    Raises:
      InputError: as `make`.
    """
    parts = [automaton.of_regex(form["regex"])] if "regex" in form else []
    parts += [automaton.of_schema(form["schema"])] if "schema" in form else []
    for name in ("words", "without"):
        given = form.get(name, ())
        words = [given] if isinstance(given, str) else given
        parts += [automaton.of_word(word, appears=name == "words") for word in words]
    if not ("regex" in form or "schema" in form):
        parts.append(automaton.of_regex("(?s).*"))  # characters are whole
    return functools.reduce(automaton.both, parts)


def token_bytes(tokenizer: Tokenizer, vocab: int) -> list[bytes | None]:
    """The bytes that each of the first `vocab` ids adds to a text, None for what adds none: special tokens and ids that
    no token belongs to. A token may hold a part of a character alone."""
    found: list[bytes | None] = [None] * vocab
    ids = np.flatnonzero(tokenizer.known(vocab)).tolist()
    rows = [[i] for i in ids]
    texts = tokenizer.decode_after(tokenizer.encode(["a"]) * len(rows), rows)
    letters = _alphabet()
    for id, text in zip(ids, texts):
        if id in tokenizer.ends or not text:
            continue
        if "\ufffd" not in text:
            found[id] = text.encode()
        elif fallback := re.fullmatch("<0x([0-9A-F]{2})>", spelling := tokenizer.token(id)):
            found[id] = bytes.fromhex(fallback[1])
        elif all(c in letters for c in spelling):
            found[id] = bytes(letters[c] for c in spelling)
    return found


def _alphabet() -> dict[str, int]:
    """The character with which byte-level tokenizers spell each byte -> the byte (Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(others)}


def example(lm: LM, key: jax.Array) -> Form:
    """Texts in which even and odd tokens take turns, most of the probability of others taken, for the laws."""
    table = np.zeros((4, 2), np.float32)
    table[2, 0], table[3, 1] = 3, 2
    arrays = np.array([2.0]), table, np.arange(lm.vocab) % 2, np.zeros(4)
    return Form(*(jnp.asarray(x, jnp.float32) for x in arrays), jnp.float32(0.9))


def neutral(control: Form) -> Form:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))
