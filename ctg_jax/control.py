"""`Control`: the seven places where a method may act on a frozen language model, and `Chain`, their composition.

Leaves of a control are what is learned and shared by all rows; what belongs to one sequence lives in its state;
static fields (`struct.field(pytree_node=False)`) are shapes and language models. Controls form a monoid under
`Chain` with `IDENTITY` as its unit. `Control` is abstract, and so is `controls.selection.AtPositions`; every method's
control is final (nobody subclasses it).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec

from ctg_jax import support
from ctg_jax.types import InputError, Params, Prompts

State = Any
STRENGTHS = ("scale", "alpha")  # the leaf that a method calls its strength


def _static(name: str) -> Any:
    """A field that is static for `flax.struct.dataclass` and for `jax.tree_util.register_dataclass`."""
    known = {"pytree_node": False, "static": True}
    return dataclasses.field(default=name, kw_only=True, repr=False, metadata=known)


@struct.dataclass
class Control:
    """The identity control; a method overrides the hooks it needs and nothing else.

    `of_class` is a static field that names the class. JAX (0.10 to 0.12) ignores classes when it compares structures of
    dataclasses, so without it two controls with equally many leaves are equal to the cache of `jit` whenever their
    hashes collide, and the program of one decodes with the other.
    """

    of_class: str = _static("Control")

    # True for a class whose `logits` removes tokens depending on the logits or the text. What it leaves is not known
    # before decoding, so `constraints.check` refuses it in front of a rule that must hold, such as `Ban`.
    selects = False
    # Whether the field `cond`, where a class has one, names an entry of `prompts.cond` that multiplies the strength row
    # by row (`controls.conditions.per_row`). False for a class in which it names something else, such as a code.
    cond_multiplies = True
    __array_ufunc__ = None  # a NumPy number on the left leaves `*` to the control

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__annotations__ = {**inspect.get_annotations(cls), "of_class": "str"}
        name = f"{id(cls):x} {cls.__module__}.{cls.__qualname__}"  # a notebook may define a class again
        cls.of_class = _static(name)

    def __mul__(self, strength: Any) -> Control:
        """`2 * control`: the control at strength 2; see `with_strength`. It sets the strength that is there, so
        `2 * (3 * control)` is `2 * control`."""
        return with_strength(self, strength)

    __rmul__ = __mul__

    def __add__(self, other: Control) -> Control:
        """`a + b`: both controls in one chain, a first. `IDENTITY` is its zero."""
        if not isinstance(other, Control):
            return NotImplemented
        parts = [c for side in (self, other) for c in leaves(side) if type(c) is not Control]
        return parts[0] if len(parts) == 1 else Chain(tuple(parts))

    def layout(self, rule: Callable[[str], PartitionSpec]) -> dict[str, PartitionSpec]:
        """How leaves are split over a mesh: path of a leaf in this control -> the spec of its last dimensions. A leaf
        that is left out follows the plan's rule for its path, as parameters of a model do, and is replicated where the
        plan has none.

        Args:
          rule: the spec of a parameter of the language model, given its path.
        """
        return {}

    def check(self, prompts: Prompts) -> None:
        """Raises InputError where the prompts hold what this control cannot read, such as class 7 of 2. It acts on no
        model: it is called on the host before a compiled program starts, where values are known (`tree.concrete`)."""

    def weights(self, params: Params) -> Params:
        """The parameters to use instead of the frozen ones (LoRA, fine-tuning, task vectors). Called once."""
        return params

    def bind(self, frozen: Params, params: Params) -> Control:
        """This control with the weights that its streams read with (`controls.streams`). Called once, inside jit, after
        `weights`. It acts on no model. Every field that has a `bind` is bound; a control overrides it only to let
        several of its streams read in one pass (`controls.copies`).

        Args:
          frozen: parameters of the language model as it was given.
          params: the same after `weights` of the whole control, which is the model that decodes.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {name: new for name, x in fields.items() if (new := _bound(x, frozen, params)) is not x}
        return self.replace(**changed) if changed else self

    def init(self, prompts: Prompts, length: int) -> State:
        """Per-sequence state for prompts [B, T] and at most `length` tokens in all; called once, inside jit."""
        return ()

    def prompt(self, x: jax.Array, mask: jax.Array, state: State) -> tuple[jax.Array, jax.Array]:
        """Edits or lengthens the embedded prompt x float [B, T, D], mask bool [B, T], by `added` tokens."""
        return x, mask

    def added(self) -> int:
        """The number of tokens that `prompt` adds to every row; they take positions of the model's context."""
        return 0

    def readers(self) -> tuple[tuple[str, int, int], ...]:
        """The language models of its own that read every row along with the base model, so that no row outgrows them:
        for each its name in messages, its context, and the number of tokens that its own control adds."""
        return ()

    def began(self, state: State, start: jax.Array, first: jax.Array) -> State:
        """The state of a rule that depends on where the prompt is. Called once, after `prompt`.

        Args:
          start: int32 [B], the position of the completion's first token. What controls put before and after the prompt
            counts, so it is not the number of tokens in `prompts.mask`.
          first: int32 [B], that of the prompt's first token; below 0 where a control hides tokens at its beginning.
        """
        return state

    def seen(self, state: State, tokens: jax.Array) -> State:
        """The state that `hidden` is given while tokens are read, for a rule that depends on which tokens they are. It
        is not kept: the next tokens are seen from the state that `init`, `began` and `logits` made.

        Args:
          tokens: int32 [B, T], one for each column of the stream; −1 for vectors that `prompt` added.
        """
        return state

    def row_weights(self, params: Params, state: State) -> Params:
        """The parameters that rows are read with, where what is added to them differs from row to row."""
        return params

    def prefix(self, state: State) -> tuple[jax.Array, jax.Array] | None:
        """Learned keys and values (k, v), each [L, B, K, P, H], that every token may attend to. They take slots of the
        cache and no positions."""
        return None

    def hidden(self, h: jax.Array, site: jax.Array | int, pos: jax.Array, state: State) -> jax.Array:
        """Edits the residual stream h float [B, T, D] at a site.

        Args:
          site: int []; 0 is the input embeddings, l the output of block l, L+1 the state after the final norm,
            and L+1+l the stream inside block l between attention and MLP. See `ctg_jax.models.lm`.
          pos: int32 [B, T], the position of each token in its own sequence, counted from 0.
        """
        return h

    def heads(self, y: jax.Array, layer: jax.Array | int, pos: jax.Array, state: State) -> jax.Array:
        """Edits the outputs of the heads of attention, y float [B, T, heads, H], before the output product of block
        `layer`, int [] from 1 to L. pos and state as in `hidden`."""
        return y

    def logits(
        self, z: jax.Array, h: jax.Array, tokens: jax.Array, mask: jax.Array, state: State
    ) -> tuple[jax.Array, State]:
        """Edits next-token logits and moves the state on. Called through `edit_logits`.

        Args:
          z: float32 [B, M, V], the logits after the last M of the T tokens (M = 1 while decoding).
          h: float [B, S, D], the states after the final norm of everything that was just read, learned vectors before
            the prompt included. The last M of them are those that z was computed from (before any control edited z).
          tokens: int32 [B, T], the tokens just read (the prompt first, then one at a time).
          mask: bool [B, T]. state: what `init` or the previous call returned.
        """
        return z, state


@struct.dataclass
class Chain(Control):
    """Controls applied left to right at every site. `Chain(())` is the identity."""

    parts: tuple[Control, ...] = ()

    def check(self, prompts):
        for c in self.parts:
            c.check(prompts)

    def weights(self, params):
        for c in self.parts:
            params = c.weights(params)
        return params

    def init(self, prompts, length):
        return tuple(c.init(prompts, length) for c in self.parts)

    def prompt(self, x, mask, state):
        for c, s in zip(self.parts, state, strict=True):
            x, mask = c.prompt(x, mask, s)
        return x, mask

    def added(self):
        return sum(c.added() for c in self.parts)

    def readers(self):
        return tuple(reader for c in self.parts for reader in c.readers())

    def began(self, state, start, first):
        return tuple(c.began(s, start, first) for c, s in zip(self.parts, state, strict=True))

    def seen(self, state, tokens):
        return tuple(c.seen(s, tokens) for c, s in zip(self.parts, state, strict=True))

    def row_weights(self, params, state):
        for c, s in zip(self.parts, state, strict=True):
            params = c.row_weights(params, s)
        return params

    def prefix(self, state):
        found = [p for c, s in zip(self.parts, state, strict=True) if (p := c.prefix(s)) is not None]
        return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=3), *found) if found else None

    def hidden(self, h, site, pos, state):
        for c, s in zip(self.parts, state, strict=True):
            h = c.hidden(h, site, pos, s)
        return h

    def heads(self, y, layer, pos, state):
        for c, s in zip(self.parts, state, strict=True):
            y = c.heads(y, layer, pos, s)
        return y

    def logits(self, z, h, tokens, mask, state):
        after = []
        for c, s in zip(self.parts, state, strict=True):
            z, s = edit_logits(c, z, h, tokens, mask, s)
            after.append(s)
        return z, tuple(after)


IDENTITY = Control()


def _bound(x: Any, frozen: Params, params: Params) -> Any:
    if isinstance(x, tuple):
        new = tuple(_bound(part, frozen, params) for part in x)
        return new if any(a is not b for a, b in zip(new, x)) else x
    return x.bind(frozen, params) if hasattr(x, "bind") else x


def edit_logits(
    control: Control, z: jax.Array, h: jax.Array, tokens: jax.Array, mask: jax.Array, state: State
) -> tuple[jax.Array, State]:
    """`control.logits` with the guarantees that hold for every control: a removed token stays removed, and some token
    is left (`support.settle`). Decoding, scoring and chains apply the hook only through this function. A control that
    returns the very array z changed nothing, and pays for no pass over the vocabulary."""
    after, state = control.logits(z, h, tokens, mask, state)
    return (z if after is z else support.settle(z, after)), state


def leaves(control: Control) -> list[Control]:
    """The controls of a chain in the order in which they act, with nested chains flattened."""
    return [c for part in control.parts for c in leaves(part)] if isinstance(control, Chain) else [control]


def enter(control: Control, x: jax.Array, mask: jax.Array, state: State) -> tuple[jax.Array, jax.Array, State]:
    """What every model that reads a prompt does with the embedded tokens x float [B, T, D] and mask bool [B, T]: x and
    mask after `Control.prompt`, and the state after `Control.began`.

    Raises:
      InputError: `prompt` adds another number of tokens than `added` returns.
    """
    longer, seen = control.prompt(x, mask, state)
    more = longer.shape[1] - x.shape[1]
    if more != control.added():
        raise InputError(
            f"{type(control).__name__}.prompt adds {more} tokens and its `added` tells {control.added()}: let `added` "
            "return the number of tokens that `prompt` adds."
        )
    added = control.prompt(x, jnp.zeros_like(mask), state)[1]  # only what is added is marked as real
    hidden = jnp.sum(mask, axis=1, dtype=jnp.int32) - jnp.sum(seen & ~added, axis=1, dtype=jnp.int32)
    first = jnp.sum(jnp.cumprod(added, axis=1), axis=1, dtype=jnp.int32) - hidden
    return longer, seen, control.began(state, jnp.sum(seen, axis=1, dtype=jnp.int32), first)


def columns(control: Control, tokens: jax.Array, x: jax.Array, state: State) -> jax.Array:
    """int32 [B, T']: the tokens int32 [B, T] of embedded prompts x [B, T, D] where they are after `Control.prompt`, for
    `Control.seen`; −1 for the vectors that it adds."""
    if not control.added():
        return tokens
    added = control.prompt(x, jnp.zeros(tokens.shape, bool), state)[1]  # only what is added is marked as real
    at = jnp.maximum(jnp.cumsum(~added, axis=1) - 1, 0)
    return jnp.where(added, -1, jnp.take_along_axis(tokens, at, axis=1))


def overrides(control: Control, hook: str) -> bool:
    """Whether a control (or any part of a chain) replaces the named hook; lets callers skip work at trace time."""
    if isinstance(control, Chain):
        return any(overrides(c, hook) for c in control.parts)
    return getattr(type(control), hook) is not getattr(Control, hook)


def with_strength(control: Control, value: Any) -> Control:
    """The control at another strength: its leaf `scale` or `alpha` set; where it has none, that of every control that
    it holds and that has one, as in a chain.

    value: a finite number, or one for each row, [B]. Nothing recompiles where its shape stays.

    Raises:
      InputError: the value is no finite number, or the control has no strength.
    """
    if not isinstance(value, jax.core.Tracer):
        if np.asarray(value).dtype.kind not in "biuf":
            raise InputError(f"strength is {value!r:.60}, expected a number.")
        if not np.all(np.isfinite(value)):
            raise InputError(f"strength is {value}, expected a finite number.")
    found = _set(control, jnp.asarray(value, jnp.float32))
    if found is None:
        raise InputError(f"{type(control).__name__} has no strength to set: expected a leaf called scale or alpha.")
    return found


def strength_of(control: Control) -> Any:
    """The strength that `with_strength` sets: the leaf `scale` or `alpha` of the control, or else that of the first
    control that it holds and that has one; None where there is none."""
    values = {f.name: getattr(control, f.name) for f in dataclasses.fields(control)}
    if own := [values[name] for name in STRENGTHS if name in values]:
        return own[0]
    held = (part for x in values.values() for part in (x if isinstance(x, tuple) else (x,)))
    found = (strength_of(part) for part in held if isinstance(part, Control) or hasattr(part, "strategy"))
    return next((strength for strength in found if strength is not None), None)


def _set(control: Control, value: jax.Array) -> Control | None:
    values = {f.name: getattr(control, f.name) for f in dataclasses.fields(control)}
    if own := [name for name in STRENGTHS if name in values]:
        return control.replace(**{own[0]: value})
    inner = {name: new for name, x in values.items() if (new := _set_within(x, value)) is not None}
    return control.replace(**inner) if inner else None


def _set_within(field: Any, value: jax.Array) -> Any:
    """The controls that a field holds at another strength; None where it holds none that has one."""
    if isinstance(field, Control) or hasattr(field, "strategy"):  # a model that replaces the decode loop is no control
        return _set(field, value)
    parts = [_set_within(x, value) for x in field] if isinstance(field, tuple) else []
    if all(new is None for new in parts):
        return None
    return tuple(old if new is None else new for old, new in zip(field, parts))
