"""`Bank`: K controls of one kind, of which each row of a batch takes one, in one program.

The leaves of the controls are stacked [K, …] and gathered by the choice of a row when decoding begins; the hooks of the
control then run row by row under `vmap`, so that no control needs a second version of its rule. A bank of one kind in a
chain with banks of others gives every row a control of any kind: the entry of strength 0 does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax.control import Chain, Control, leaves, overrides, strength_of, with_strength
from ctg_jax.controls.conditions import check_choice, condition, gathered
from ctg_jax.controls.streams import Stream
from ctg_jax.types import InputError, Prompts


@struct.dataclass
class Bank(Control):
    """The control of each row, chosen by an entry of `prompts.cond`.

    Attributes:
      one: a control whose leaves have a first axis K.
      scale: float32 [] or, per row, [B]; multiplies the strength of the control of each row. The parts of a chain
        keep their ratios.
      choice: the name of an int [B] entry of `prompts.cond`, from 0 to K − 1.
    """

    one: Control
    scale: jax.Array
    choice: str = struct.field(pytree_node=False, default="entry")

    @property
    def selects(self) -> bool:
        """See `Control.selects`."""
        return any(part.selects for part in leaves(self.one))

    @property
    def count(self) -> int:
        """K."""
        return jax.tree.leaves(self.one)[0].shape[0]

    def check(self, prompts):
        check_choice(prompts, self.choice, self.count, "control")
        self._entry.check(prompts)

    @property
    def _entry(self) -> Control:
        """One of the controls, for what does not depend on which."""
        return jax.tree.map(lambda x: x[0], self.one)

    def init(self, prompts, length):
        rows = jax.tree.map(lambda x: gathered(x, prompts, self.choice), self.one)
        scale = jnp.broadcast_to(jnp.asarray(self.scale, jnp.float32), condition(prompts, self.choice).shape)

        def begun(control: Control, factor: jax.Array, row: Prompts) -> Any:
            control = _scaled(control, factor)
            return control, control.init(jax.tree.map(lambda x: x[None], row), length)

        return jax.vmap(begun)(rows, scale, prompts)

    def added(self):
        return self._entry.added()

    def prompt(self, x, mask, state):
        return _each(lambda c, s, x, mask: c.prompt(x, mask, s), state, x, mask)

    def began(self, state, start, first):
        return state[0], jax.vmap(lambda c, s, *at: c.began(s, *(x[None] for x in at)))(*state, start, first)

    def seen(self, state, tokens):
        return state[0], jax.vmap(lambda c, s, ids: c.seen(s, ids[None]))(*state, tokens)

    def prefix(self, state):
        if not overrides(self.one, "prefix"):
            return None
        found = jax.vmap(lambda c, s: c.prefix(s), out_axes=1)(*state)
        return found and jax.tree.map(lambda x: x[:, :, 0], found)

    def hidden(self, h, site, pos, state):
        if not overrides(self.one, "hidden"):
            return h
        return _each(lambda c, s, h, pos: c.hidden(h, site, pos, s), state, h, pos)

    def heads(self, y, layer, pos, state):
        if not overrides(self.one, "heads"):
            return y
        return _each(lambda c, s, y, pos: c.heads(y, layer, pos, s), state, y, pos)

    def logits(self, z, h, tokens, mask, state):
        if not overrides(self.one, "logits"):
            return z, state

        def edited(control, inner, *row):
            z, inner = control.logits(*(x[None] for x in row), inner)
            return z[0], inner

        z, inner = jax.vmap(edited)(*state, z, h, tokens, mask)
        return z, (state[0], inner)


def bank(controls: Sequence[Control], choice: str = "entry") -> Bank:
    """A bank of controls of one kind, each at its strength.

    Args:
      controls: K controls of one structure: the same kind and static fields, and leaves of the same shapes. A chain
        counts as a kind. A strength 0 is an entry for rows that are left alone.
      choice: the name of the entry of `prompts.cond` by which a row takes its control.

    Raises:
      InputError: none, controls of other structures, or a kind that changes weights or reads with language models of
        its own, which rows cannot do apart (for LoRA see `ctg_jax.controls.delta.row_delta`).
    """
    if not controls:
        raise InputError("a bank was given no controls, expected at least one.")
    first = controls[0]
    for part in leaves(first):
        weights = overrides(part, "weights") or overrides(part, "row_weights")
        if weights or part.readers() or _streams(part):
            raise InputError(
                f"{type(part).__name__} changes weights or reads with language models of its own, so its entries "
                "cannot share one program: expected controls of prompts, states or logits."
            )
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(c)] for c in controls]
    for i, control in enumerate(controls):
        if jax.tree.structure(control) != jax.tree.structure(first) or shapes[i] != shapes[0]:
            raise InputError(
                f"control {i + 1} of the bank is another kind, or has other settings or shapes, than the first: a bank "
                "holds one kind, and banks of several kinds form a chain."
            )
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(a) for a in x]), *controls)
    return Bank(stacked, jnp.ones((), jnp.float32), choice)


def _streams(control: Control) -> bool:
    """Whether a control holds a stream, also where `readers` lists none, such as one with a prompt of its own."""
    found = jax.tree.leaves(control, is_leaf=lambda x: isinstance(x, Stream))
    return any(isinstance(x, Stream) for x in found)


def _scaled(control: Control, factor: jax.Array) -> Control:
    """The control at `factor` times its strength; each part of a chain at `factor` times its own."""
    if isinstance(control, Chain):
        return control.replace(parts=tuple(_scaled(part, factor) for part in control.parts))
    strength = strength_of(control)
    return control if strength is None else with_strength(control, factor * strength)


def _each(fn, state, *arrays: jax.Array) -> Any:
    """fn(control, its state, *arrays with a batch of 1) for each row, without that batch."""

    def alone(control, inner, *row):
        return jax.tree.map(lambda x: x[0], fn(control, inner, *(x[None] for x in row)))

    return jax.vmap(alone)(*state, *arrays)
