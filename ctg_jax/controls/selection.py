"""Which tokens a control of the hidden state acts on: one language for all of them, as data.

    "all"                                       every token
    "prompt", "generated"                       the tokens of the prompt; those of the completion
    "answer"                                    the last token of the prompt and what follows
    "first", "last"                             of the prompt
    dict(part="prompt", start=2, stop=-1)       a window of the part; negative numbers count from the end of the prompt
    dict(part="generated", every=3)             every third token of it, from the first
    dict(tokens=(11, 13))                       tokens with these ids
    dict(roles=("user",))                       what the messages of these roles say, in a conversation
    dict(row="where")                           each row its own: `prompts.cond["where"]`, int [B, 4] of part (its
                                                number in `PARTS`), start, stop and every

All that is given must hold. What other controls put before a prompt is part of "all" alone, and what they put after it
counts as its end. The layers are those of the control (its sites or gates).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import tree
from ctg_jax.control import Control
from ctg_jax.controls.conditions import condition
from ctg_jax.types import InputError, Prompts

PARTS = ("all", "prompt", "generated", "answer")
ROLES = ("system", "user", "assistant", "tool")
ROLE = "roles"  # the entry of `prompts.cond` that `roles` makes
END = 2**30  # a stop behind every text
_NAMED = {"first": {"part": "prompt", "stop": 1}, "last": {"part": "prompt", "start": -1}}


@dataclasses.dataclass(frozen=True)
class Positions:
    """A selection of tokens; static, so that a control holds it in a static field. See the module for its meaning."""

    part: str = "all"
    start: int = 0
    stop: int = END
    every: int = 1
    tokens: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()
    row: str | None = None

    def check(self, prompts: Prompts) -> None:
        """InputError where the prompts lack what the selection reads; for `Control.check`."""
        if self.roles:
            condition(prompts, ROLE)
        if self.row is None:
            return
        rows = tree.concrete(condition(prompts, self.row))
        if rows is None:
            return
        if rows.dtype.kind not in "iu" or rows.ndim != 2 or rows.shape[1] != 4:
            raise InputError(
                f"prompts.cond[{self.row!r}] has shape {rows.shape} and type {rows.dtype}, expected whole numbers "
                "[B, 4]: part, start, stop and every of each row."
            )
        part, start, stop, every = rows.T
        late = (part >= 2) & ((start < 0) | (stop < 0))
        bad = np.flatnonzero((part < 0) | (part >= len(PARTS)) | (every < 1) | late)
        if bad.size:
            raise InputError(
                f"prompts.cond[{self.row!r}] is {rows[bad[0]].tolist()} in row {bad[0]}, expected a part from 0 to "
                f"{len(PARTS) - 1}, start and stop (from 0 where the part is 2 or 3), and every from 1."
            )

    def begin(self, prompts: Prompts) -> Placed:
        """The state of the selection; for `Control.init`."""
        rows = None if self.row is None else condition(prompts, self.row).astype(jnp.int32)
        marks = None
        if self.roles:
            marks = jnp.isin(condition(prompts, ROLE), jnp.asarray([ROLES.index(r) for r in self.roles]))
        return Placed.behind(jnp.sum(prompts.mask, axis=1, dtype=jnp.int32), rows, marks)

    def mask(self, pos: jax.Array, placed: Placed) -> jax.Array | None:
        """bool [B, T]: the tokens at positions int32 [B, T] that are selected; None for all of them."""
        if self == Positions():
            return None
        first, end = placed.first[:, None], placed.end[:, None]
        begin = jnp.maximum(first, 0)
        if placed.rows is None:
            part, start, stop, every = (
                jnp.full((1, 1), x, jnp.int32) for x in (PARTS.index(self.part), self.start, self.stop, self.every)
            )
        else:
            part, start, stop, every = (x[:, None] for x in placed.rows.T)
        origin = jnp.where(part == 2, end, jnp.where(part == 3, end - 1, begin))
        low, high = (jnp.where((x < 0) & (part < 2), jnp.maximum(x + end - begin, 0), x) for x in (start, stop))
        at = pos - origin
        chosen = (at >= low) | ((part == 0) & (start == 0))
        chosen &= (at < high) & ((part != 1) | (pos < end)) & ((at - low) % every == 0)
        if self.tokens:
            chosen &= placed.hit
        if placed.marks is not None:
            width = placed.marks.shape[1]
            at = pos - first
            column = jnp.clip(at - placed.size[:, None] + width, 0, width - 1)
            spoken = jnp.take_along_axis(placed.marks, column, axis=1) & (at >= 0) & (at < placed.size[:, None])
            chosen &= spoken | ((pos >= end) & ("assistant" in self.roles))
        return chosen

    def within(self, x: jax.Array, pos: jax.Array, placed: Placed) -> jax.Array:
        """x float [B or 1, T or 1, …] where the tokens at positions int32 [B, T] are selected, and 0 elsewhere."""
        chosen = self.mask(pos, placed)
        return x if chosen is None else jnp.where(chosen[:, :, None], x, 0.0)

    def seen(self, placed: Placed, tokens: jax.Array) -> Placed:
        """The state for reading tokens int32 [B, T], −1 for vectors that are none; for `Control.seen`."""
        return placed.replace(hit=jnp.isin(tokens, jnp.asarray(self.tokens))) if self.tokens else placed


@struct.dataclass
class Placed:
    """Where the prompt of each row is: size int32 [B], its tokens; first and end int32 [B], the positions of its first
    token and of the first token of the completion (see `Control.began`); rows int32 [B, 4], each row's own numbers;
    marks bool [B, W], the prompt's tokens of chosen roles; hit bool [B, T], which of the tokens that are being read are
    of the set, while they are read."""

    size: jax.Array
    first: jax.Array
    end: jax.Array
    rows: jax.Array | None = None
    marks: jax.Array | None = None
    hit: jax.Array | None = None

    @classmethod
    def behind(cls, size: jax.Array, rows: jax.Array | None = None, marks: jax.Array | None = None) -> Placed:
        """Of prompts of these sizes, int32 [B], with nothing before or after them."""
        return cls(size, jnp.zeros_like(size), size, rows, marks)

    def began(self, start: jax.Array, first: jax.Array) -> Placed:
        """For `Control.began`."""
        return self.replace(end=start, first=first)


@struct.dataclass
class AtPositions(Control):
    """The hooks that controls acting at selected positions share. Abstract: a subclass has a static field `positions`,
    and its `init` returns a tuple that ends with `self.positions.begin(prompts)`."""

    def check(self, prompts):
        self.positions.check(prompts)

    def began(self, state, start, first):
        return *state[:-1], state[-1].began(start, first)

    def seen(self, state, tokens):
        return *state[:-1], self.positions.seen(state[-1], tokens)


def positions(value: Any) -> Positions:
    """The selection that a setting names: a string, a dictionary as in the docstring of this module, or a `Positions`.

    Raises:
      InputError: an unknown name or entry, a window that cannot be, an unknown role.
    """
    if isinstance(value, Positions):
        return value
    known = [f.name for f in dataclasses.fields(Positions)]
    given = {"part": value} if isinstance(value, str) else value
    if isinstance(value, str) and value in _NAMED:
        given = _NAMED[value]
    if not isinstance(given, Mapping) or not set(given) <= set(known):
        raise InputError(f"positions is {value!r}, expected a name or a dictionary with some of {', '.join(known)}.")
    found = Positions(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in given.items()})
    whole = isinstance(found.start, int) and isinstance(found.stop, int) and isinstance(found.every, int)
    if found.part not in PARTS or not whole or found.every < 1:
        raise InputError(
            f"positions is {value!r}, expected one of {', '.join((*PARTS, *_NAMED))}, with whole numbers start and "
            "stop, and every from 1."
        )
    if min(found.start, found.stop) < 0 and found.part in PARTS[2:]:
        raise InputError(
            f"positions is {value!r}, expected start and stop from 0: a completion has no end to count from."
        )
    if not isinstance(found.tokens, tuple) or any(type(i) is not int or i < 0 for i in found.tokens):
        raise InputError(f"positions has the tokens {found.tokens!r}, expected a list of token ids, from 0.")
    if set(found.roles) - set(ROLES):
        raise InputError(f"positions has the roles {found.roles}, expected some of {', '.join(ROLES)}.")
    if found.row is not None and replaced(found) != Positions():
        raise InputError(
            f"positions is {value!r}, expected no part, start, stop or every beside row, which replaces them."
        )
    return found


def replaced(found: Positions) -> Positions:
    """The numbers of a selection alone, which a `row` replaces."""
    return Positions(found.part, found.start, found.stop, found.every)


def asks_roles(settings: Any) -> bool:
    """Whether `positions` reads the roles of messages, in the settings of a control or of one that it holds."""
    if not isinstance(settings, Mapping):
        return False
    own = settings.get("positions")
    return (isinstance(own, Mapping) and bool(own.get("roles"))) or any(map(asks_roles, settings.values()))


def roles(tokenizer: Any, texts: Any) -> np.ndarray:
    """int32 [n, W], the entry `ROLE` of `prompts.cond`: of each prompt, from the right, the number of the role of each
    token in `ROLES`; −1 for the words of the template, for texts and for padding."""
    rows = [list(_roles(tokenizer, text)) for text in texts]
    out = np.full((len(rows), max(1, *map(len, rows))), -1, np.int32)
    for row, found in zip(out, rows):
        row[len(row) - len(found) :] = found
    return out


def _roles(tokenizer: Any, text: Any) -> Iterator[int]:
    if isinstance(text, str):
        return
    found = tokenizer.chat.prompt(text)
    for message in found.message:
        role = found.messages[message]["role"] if message >= 0 else None
        yield ROLES.index(role) if role in ROLES else -1
