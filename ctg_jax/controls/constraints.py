"""Rules that depend on constants alone: tokens that are forbidden, forced, or forbidden for a while.

The method `allowed` of each, and of any other control that has one, returns the tokens that it leaves at the n-th new
token, so that rules which together leave none are refused on the host, before decoding. They come before rules that
choose by the logits or the text (top-p, no-repeat), which then choose among what is allowed; one whose `must_hold` is
False at its present strength may come after them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax.control import Chain, Control, leaves
from ctg_jax.support import require
from ctg_jax.types import InputError


@struct.dataclass
class Ban(Control):
    """Tokens that are never produced: the leaf `banned` is bool [V] or, per row, [B, V]."""

    banned: Any

    def logits(self, z, h, tokens, mask, state):
        return require(z, self.allowed(jnp.zeros(1, jnp.int32), z.shape[-1])), state

    def allowed(self, at: jax.Array, vocab: int) -> jax.Array:
        """bool [1 or B, 1 or M, V]: what may be the new tokens number `at` int [M], counted from 0."""
        return ~jnp.atleast_2d(jnp.asarray(self.banned))[:, None]

    def steps(self) -> list[int]:
        """The numbers of the new tokens before which `allowed` changes."""
        return []

    def check_vocabulary(self, vocab: int) -> None:
        """InputError where the constants do not fit a vocabulary of this size."""
        _fits("banned", self.banned, vocab)


@struct.dataclass
class Force(Control):
    """Tokens that must be produced: `forced` int32 [N] or per row [B, N]; new token n is forced where its entry
    is not negative."""

    forced: Any

    def init(self, prompts, length):
        return jnp.zeros((), jnp.int32)  # number of the next new token

    def logits(self, z, h, tokens, mask, state):
        m, v = z.shape[1:]
        return require(z, self.allowed(state + jnp.arange(m), v)), state + m

    def allowed(self, at, vocab):
        """See `Ban`."""
        forced = jnp.atleast_2d(jnp.asarray(self.forced))
        last = forced.shape[1] - 1
        want = jnp.where((at <= last)[None], forced[:, jnp.minimum(at, last)], -1)[:, :, None]
        return (want < 0) | (jnp.arange(vocab)[None, None] == want)

    def steps(self):
        """See `Ban`."""
        forced = np.flatnonzero(np.any(np.atleast_2d(self.forced) >= 0, axis=0)).tolist()
        return [*forced, *(n + 1 for n in forced)]

    def check_vocabulary(self, vocab):
        """See `Ban`."""
        if not np.size(self.forced):
            raise InputError("Force: forced is empty, expected a token id (or -1 for none) for each new token.")
        if (largest := np.max(self.forced)) >= vocab:
            raise InputError(f"Force: forced holds token id {largest}, expected ids below {vocab}, the vocabulary.")


@struct.dataclass
class MinLength(Control):
    """Bans the tokens marked in `eos`, bool [V] or [B, V], for the first n new tokens; n is [] or, per row, [B]."""

    eos: Any
    n: Any = 3

    def init(self, prompts, length):
        return jnp.zeros((), jnp.int32)

    def logits(self, z, h, tokens, mask, state):
        m, v = z.shape[1:]
        return require(z, self.allowed(state + jnp.arange(m), v)), state + m

    def allowed(self, at, vocab):
        """See `Ban`."""
        late = at[None, :, None] >= jnp.reshape(jnp.asarray(self.n, jnp.float32), (-1, 1, 1))
        return late | ~jnp.atleast_2d(jnp.asarray(self.eos))[:, None]

    def steps(self):
        """See `Ban`."""
        return np.unique(np.ceil(np.maximum(self.n, 0))).astype(int).tolist()

    def check_vocabulary(self, vocab):
        """See `Ban`."""
        _fits("eos", self.eos, vocab)


def marks(ids: Iterable[int], vocab: int) -> np.ndarray:
    """bool [V], True at the given token ids: what `Ban` and `MinLength` take; InputError for an id outside 0 … V-1."""
    ids = np.asarray(list(ids), np.int64)
    if bad := [int(i) for i in ids if not 0 <= i < vocab]:
        raise InputError(f"token id {bad[0]} is not in the vocabulary, expected ids from 0 to {vocab - 1}.")
    return np.isin(np.arange(vocab), ids)


def check(control: Control, vocab: int, new: int) -> None:
    """Raises InputError where the constants of a control cannot hold while `new` tokens are decoded:

    * a rule of this module comes after one that chooses by the logits or the text (top-p may have removed the only
      token that is allowed);
    * an id is outside the vocabulary, or a mask has another size;
    * a rule needs more new tokens than `new`, which its `check_new` tells where it has one;
    * rules together leave no token, such as `Ban` and `Force` of the same one.

    Under `jit`, where leaves have no values, only the first is checked; the others give NaN logits there.
    """
    parts = leaves(control)
    for i, rule in enumerate(parts):
        before = next((c for c in parts[:i] if c.selects), None)
        if hasattr(rule, "allowed") and getattr(rule, "must_hold", True) and before is not None:
            names = type(rule).__name__, type(before).__name__
            raise InputError(
                f"{names[0]} comes after {names[1]}, which may have removed every token that {names[0]} allows: put "
                f"{names[0]} before {names[1]} in the chain."
            )
    rules = [c for c in parts if hasattr(c, "allowed")]
    if not rules or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(rules)):
        return
    rules = jax.device_get(rules)
    for rule in rules:
        rule.check_vocabulary(vocab)
        if hasattr(rule, "check_new"):
            rule.check_new(new)
    at = sorted({0, *(n for rule in rules for n in rule.steps() if n < new)})
    allowed = np.ones((1, 1, vocab), bool)
    for rule in rules:
        allowed = allowed & np.asarray(rule.allowed(np.asarray(at), vocab))
    if len(none := np.argwhere(~allowed.any(axis=-1))):
        row, step = none[0]
        names = " and ".join(dict.fromkeys(type(rule).__name__ for rule in rules))
        where = f" in row {row}" if len(allowed) > 1 else ""
        raise InputError(
            f"{names} leave no token that could be new token number {at[step] + 1}{where}: allow at least one."
        )


def only(known: np.ndarray, control: Control) -> Control:
    """`control` without probability for ids that are no token of the tokenizer; `control` itself where all are.

    Args:
      known: bool [V], which rows of the model's vocabulary are tokens (`Tokenizer.known`).
    """
    return control if known.all() else Chain((Ban(jnp.asarray(~known)), control))


def apart(control: Control) -> tuple[jax.Array | None, Control]:
    """The inverse of `only`: (bool [V] of ids that are no token, or None; the control). For methods that replace the
    decode loop, where no rule acts on next-token logits."""
    if isinstance(control, Chain) and len(control.parts) == 2 and isinstance(control.parts[0], Ban):
        return control.parts[0].banned, control.parts[1]
    return None, control


def _fits(name: str, mask: Any, vocab: int) -> None:
    if np.ndim(mask) not in (1, 2) or np.shape(mask)[-1] != vocab or np.asarray(mask).dtype != bool:
        raise InputError(
            f"{name} is {np.asarray(mask).dtype} of shape {np.shape(mask)}, expected bool [{vocab}], a mark for each "
            "token of the vocabulary; `marks` makes it from ids."
        )
