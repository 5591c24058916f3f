"""Finite automata over bytes and over tokens, for constraints on the form of a text.

`outlines-core` translates regular expressions and JSON schemas; the rest is array work on the host. The other
well-kept library, `llguidance`, covers more of JSON schema, but its parser finds the allowed tokens of one state at a
time on the host and numbers no states, so that a compiled loop would have to call back for every token of every row.

Two properties of `outlines-core` 0.2 matter here. Its automata stop at the first alternative that matches, so "a|ab"
would never write "ab"; an end mark behind the expression keeps all alternatives. And it ignores keywords of a schema
that it does not know, such as "minimum"; they are refused here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax.types import InputError, optional

LIMIT = 50_000  # states over bytes, while automata are combined
_MARK = "\U0010ffff"  # ends a text while a regular expression is translated; no character of Unicode text

FREE, ENDED = 0, 1  # the first two states of `Tokens`
_NEVER, _END = 0, 1  # the first two classes of tokens
FAR = 1e9  # `Tokens.need` of a state from which no text can be completed

# Whether a byte is of a letter or digit: those of ASCII, and all of which other characters consist.
_LETTER = [byte >= 0x80 or chr(byte).isalnum() or byte == ord("_") for byte in range(256)]

_ANNOTATIONS = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions"}
_KEYWORDS = {
    *("type", "enum", "const", "anyOf", "$ref", "properties", "required", "additionalProperties"),
    *("items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength"),
}


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A deterministic automaton over the bytes of UTF-8 text; state 0 is the first.

    Attributes:
      table: int32 [S, 256], the next state; -1 where the text cannot go on.
      accepts: bool [S], where the text may end.
    """

    table: np.ndarray
    accepts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Automata over tokens that share one table. State 0 is `FREE`, where nothing is known about the text any more, and
    state 1 is `ENDED`, behind a token that ends a text.

    Attributes:
      starts: int32 [K], the first state of each automaton.
      table: int32 [S, C], the next state after a token of each class; `FREE` where it is not allowed.
      classes: int32 [V], the class of each token. Tokens of one class act alike in every state.
      need: float32 [S], the least number of tokens with which a text can be completed; `FAR` where it cannot.
    """

    starts: np.ndarray
    table: np.ndarray
    classes: np.ndarray
    need: np.ndarray


def of_regex(pattern: str) -> Bytes:
    """The automaton of the texts that a regular expression matches as a whole, in the syntax of Rust's `regex`.

    Raises:
      InputError: `outlines-core` is missing, or it cannot translate the expression.
    """
    core = optional("outlines_core", "form")
    vocabulary = core.Vocabulary(256, {bytes([b]): [b] for b in range(256)})
    try:
        index = core.Index(f"(?:{pattern}){_MARK}", vocabulary)
    except ValueError as e:
        raise InputError(f"regex is {pattern!r}, which cannot be translated ({str(e).splitlines()[0]:.160}).") from None
    transitions, marked = index.get_transitions(), index.get_final_states()
    number = {s: i for i, s in enumerate(dict.fromkeys([index.get_initial_state(), *transitions, *marked]))}
    table = np.full((len(number), 256), -1, np.int32)
    for state, after in transitions.items():
        for byte, following in after.items():
            if byte < 256:
                table[number[state], byte] = number[following]
    final = np.zeros(len(number) + 1, bool)
    final[[number[s] for s in marked]] = True
    reached = np.arange(len(number))
    for byte in _MARK.encode():
        reached = np.where(reached < 0, -1, table[reached, byte])
    table[final[table]] = -1  # behind the mark there is no text
    return _smallest(Bytes(table, final[reached]))


def of_schema(schema: str | Mapping[str, Any]) -> Bytes:
    """The automaton of JSON texts that a JSON schema describes, with at most one space between their parts, and with
    the properties of an object in the order of the schema. A schema that refers to itself is unrolled three times.

    Raises:
      InputError: no JSON, a keyword that would not be enforced, a required property without a description, or what
        `outlines-core` cannot translate.
    """
    try:
        schema = json.loads(schema) if isinstance(schema, str) else _plain(schema)
    except ValueError as e:
        raise InputError(f"schema is {schema!r:.80}, which is no JSON ({e}).") from None
    _check_keywords(schema)
    core = optional("outlines_core", "form")
    try:
        return of_regex(core.json_schema.build_regex_from_schema(json.dumps(schema)))
    except ValueError as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"schema cannot be translated ({str(e).splitlines()[0]:.160}).") from None


def of_word(word: str, appears: bool = True) -> Bytes:
    """The automaton of the byte strings in which `word` appears, or in which it does not: as a whole word, so that
    "cat" is not in "vacation". Where an edge of it is no letter, as in "?!" or "ab ", anything may be beside that edge.

    Raises:
      InputError: an empty word.
    """
    if not (spelled := word.encode()):
        raise InputError("words hold the empty string, expected strings of at least one character.")
    size, first, last = len(spelled), _LETTER[spelled[0]], _LETTER[spelled[-1]]
    found = "found"

    def after(state, byte):  # (lengths of the beginnings of the word that end here, whether a letter was just read)
        if state == found or (size in state[0] and not (last and _LETTER[byte])):
            return found
        lengths = {n + 1 for n in state[0] if n < size and spelled[n] == byte}
        if spelled[0] == byte and not (first and state[1]):
            lengths.add(1)
        return frozenset(lengths), bool(_LETTER[byte])

    others = [next(b for b in range(256) if _LETTER[b] == kind and b not in spelled) for kind in (False, True)]
    states, rows = [(frozenset(), False)], []
    for state in states:  # which grows meanwhile
        row = {byte: after(state, byte) for byte in (*others, *spelled)}
        states += [new for new in dict.fromkeys(row.values()) if new not in states]
        rows.append([states.index(row.get(byte, row[others[_LETTER[byte]]])) for byte in range(256)])
    there = np.array([state == found or size in state[0] for state in states])
    table = np.array(rows, np.int32)
    if not appears:
        table[table == states.index(found)] = -1
    return _smallest(Bytes(table, there == appears))


def both(a: Bytes, b: Bytes) -> Bytes:
    """The automaton of the texts that both accept.

    Raises:
      InputError: it has more than `LIMIT` states, or none, because the two exclude each other.
    """
    width = len(b.table)
    codes, new = np.zeros(0, np.int64), np.zeros(1, np.int64)
    while new.size:
        codes = np.concatenate([codes, new])
        if codes.size > LIMIT:
            raise InputError(f"The rules of a form together have more than {LIMIT} states: give fewer words.")
        after = _paired(a.table[new // width], b.table[new % width], width)
        new = np.setdiff1d(after[after >= 0], codes)
    order = np.argsort(codes)
    after = _paired(a.table[codes // width], b.table[codes % width], width)
    table = order[np.searchsorted(codes, np.maximum(after, 0), sorter=order)]
    return _smallest(Bytes(np.where(after < 0, -1, table), a.accepts[codes // width] & b.accepts[codes % width]))


def over_tokens(
    automata: Sequence[Bytes], spelled: Sequence[bytes | None], ends: Sequence[int], states: int, classes: int
) -> Tokens:
    """The automata over the tokens of a vocabulary, in a table of a given size.

    Args:
      spelled: the bytes of each token, None for what is no text.
      ends: the ids that end a text.
      states, classes: S and C of the table; S · C numbers and one for each token are all that it takes.

    Raises:
      InputError: the table is too small, or no text made of these tokens is accepted.
    """
    sizes = [len(a.table) for a in automata]
    starts = 2 + np.cumsum([0, *sizes[:-1]])
    if (total := 2 + sum(sizes)) > states:
        raise InputError(f"The forms have {total} states, more than states={states}: set it higher or simplify them.")
    joint, accepts = np.zeros((total, 256), np.int32), np.zeros(total, bool)
    for start, a in zip(starts, automata):
        joint[start : start + len(a.table)] = np.where(a.table < 0, FREE, a.table + start)
        accepts[start : start + len(a.table)] = a.accepts
    found = {bytes(4 * total): _NEVER, b"end": _END}
    of_token = np.zeros(len(spelled), np.int32)
    path, before = [np.arange(total, dtype=np.int32)], b""
    for id in sorted((i for i, text in enumerate(spelled) if text), key=lambda i: spelled[i]):
        text = spelled[id]
        same = next((n for n, (x, y) in enumerate(zip(text, before)) if x != y), min(len(text), len(before)))
        del path[same + 1 :]
        for byte in text[same:]:
            path.append(joint[path[-1], byte])
        of_token[id], before = found.setdefault(path[-1].tobytes(), len(found)), text
        if len(found) > classes:
            raise InputError(
                f"The forms divide the tokens into more than classes={classes} classes: set it higher or simplify them."
            )
    of_token[list(ends)] = _END
    table = np.zeros((states, classes), np.int32)
    for column, number in found.items():
        if number != _END:
            table[:total, number] = np.frombuffer(column, np.int32)
    need, used = np.where(accepts, 0, FAR).astype(np.float32), table[:total, : len(found)]
    while not np.array_equal(shorter := np.minimum(need, 1 + np.min(need[used], axis=1)), need):
        need = shorter
    if np.any(none := need[starts] >= FAR):
        raise InputError(f"form {int(np.argmax(none))}: no text that is made of tokens of this tokenizer has it.")
    table[:total][accepts, _END] = ENDED
    table[ENDED, _END] = ENDED
    need[[FREE, ENDED]] = 0
    return Tokens(starts.astype(np.int32), table, of_token, np.append(need, np.zeros(states - total, np.float32)))


def _smallest(a: Bytes) -> Bytes:
    """The least automaton that accepts the same texts (Moore 1956)."""
    dead = len(a.table)
    table = np.vstack([np.where(a.table < 0, dead, a.table), np.full((1, 256), dead)])
    group = np.append(a.accepts, False).astype(np.int64)
    columns = table[:, np.unique(table, axis=1, return_index=True)[1]]  # many bytes act alike
    while True:
        finer = np.unique(np.column_stack([group, group[columns]]), axis=0, return_inverse=True)[1].reshape(-1)
        if finer.max() == group.max():
            break
        group = finer
    if group[0] == group[dead]:
        raise InputError("A form accepts no text: its rules exclude each other.")
    order = list(dict.fromkeys([group[0], *group]))
    order.remove(group[dead])
    number = np.full(group.max() + 1, -1)
    number[order] = np.arange(len(order))
    member = np.unique(group, return_index=True)[1][order]
    return Bytes(number[group[table[member]]].astype(np.int32), np.append(a.accepts, False)[member])


def _paired(a: np.ndarray, b: np.ndarray, width: int) -> np.ndarray:
    return np.where((a < 0) | (b < 0), -1, a.astype(np.int64) * width + b)


def _plain(schema: Any) -> Any:
    """Dictionaries and lists in place of the mappings and tuples of a configuration."""
    if isinstance(schema, Mapping):
        return {str(name): _plain(x) for name, x in schema.items()}
    return [_plain(x) for x in schema] if isinstance(schema, list | tuple) else schema


def _check_keywords(schema: Any) -> None:
    if not isinstance(schema, dict):
        return
    if absent := [name for name in schema.get("required", ()) if name not in schema.get("properties", {})]:
        raise InputError(f"schema requires the property {absent[0]!r}, which it does not describe: add it.")
    for name, x in schema.items():
        if name in ("properties", "$defs", "definitions"):
            for inner in x.values():
                _check_keywords(inner)
        elif name in ("items", "prefixItems", "anyOf"):
            for inner in x if isinstance(x, list) else [x]:
                _check_keywords(inner)
        elif name not in _KEYWORDS | _ANNOTATIONS:
            raise InputError(f"schema has the keyword {name!r}, expected only {', '.join(sorted(_KEYWORDS))}.")
