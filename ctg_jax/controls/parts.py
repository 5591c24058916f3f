"""`Parts`, learned vectors that are shared by all rows and others that a row takes by its attributes, put before the
prompt as tokens (prompt tuning) or into the attention of every layer as keys and values (prefixes)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax.control import Control
from ctg_jax.controls.conditions import check_choice, condition, gathered, per_row
from ctg_jax.controls.vectors import joined
from ctg_jax.models.lm import LM
from ctg_jax.types import InputError, Params, Prompts

MIXES = ("concat", "mean", "attention")


@struct.dataclass
class Parts(Control):
    """Vectors of every row: the shared ones, then those of the row's class of each attribute.

    Of an attribute with classes c a row gets mean_c + scale (v_c - mean_c): at `scale` 1 the vectors of its class, at 0
    the mean of the classes, above 1 away from the others. There is no strength at which a row is the base model's.

    Attributes:
      shared: float32 [P, W], or None.
      parts: name of an attribute -> float32 [C, Q, W]. Each row takes the class that the int [B] entry of
        `prompts.cond` with this name gives; -1 stands for no class, and gives the mean of the classes.
      scale: float32 [] or [B].
      net: a network that makes each vector from W numbers, out · tanh(in · w + bias) + bias, as
        {"in": {"kernel": [M, W], "bias": [M]}, "out": {"kernel": [W', M], "bias": [W']}}; None: W' is W. It reads the
        vectors of a class once, not those of a row, and `fold` applies it for good.
      gate: of the mix "attention", {"in": [M, W'], "out": [M]}; else None.
      chosen: (attribute, class) that all rows take, in place of the entry of `prompts.cond`.
      shape: (L, K, H) where the vectors are keys and values, W' = 2 · L · K · H; None where they are tokens, W' = D.
      mix: how the vectors of several attributes become one row: "concat" of all of them, their "mean", or their mean
        with weights softmax_a(out · silu(in · v_a)), v_a the mean of the vectors of attribute a ("attention").
      after: whether tokens follow the prompt.
    """

    shared: jax.Array | None
    parts: dict[str, jax.Array]
    scale: jax.Array
    net: Params | None = None
    gate: Params | None = None
    chosen: tuple[tuple[str, int], ...] = struct.field(pytree_node=False, default=())
    shape: tuple[int, int, int] | None = struct.field(pytree_node=False, default=None)
    mix: str = struct.field(pytree_node=False, default="concat")
    after: bool = struct.field(pytree_node=False, default=False)

    def init(self, prompts, length):
        batch = prompts.tokens.shape[0]
        own = [self.of(name, prompts) for name in sorted(self.parts)]
        own = [jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in own]
        if self.mix != "concat":
            own = [self.mixed(jnp.stack(own, axis=1))]
        if self.shared is not None:
            shared = self.written(self.shared)
            own = [jnp.broadcast_to(shared[None], (batch, *shared.shape)), *own]
        return jnp.concatenate(own, axis=1)

    def written(self, vectors: jax.Array) -> jax.Array:
        """Vectors [..., W'] of [..., W]: what the network makes of them."""
        if self.net is None:
            return vectors
        inner, outer = self.net["in"], self.net["out"]
        inside = jnp.tanh(vectors.reshape(-1, vectors.shape[-1]) @ inner["kernel"].T + inner["bias"][None])
        return (inside @ outer["kernel"].T + outer["bias"][None]).reshape(*vectors.shape[:-1], -1)

    def of(self, name: str, prompts: Prompts) -> jax.Array:
        """The vectors of one attribute, float32 [B or 1, Q, W']."""
        table = self.written(self.parts[name])
        mean = jnp.mean(table, axis=0, keepdims=True)
        fixed = dict(self.chosen)
        if name in fixed:
            rows = mean if fixed[name] == -1 else table[fixed[name]][None]
        else:
            unknown = condition(prompts, name)[:, None, None] == -1
            rows = jnp.where(unknown, mean, gathered(table, prompts, name))
        return mean + per_row(self.scale, prompts, None) * (rows - mean)

    def mixed(self, own: jax.Array) -> jax.Array:
        """One row float32 [B, Q, W'] of those of all attributes, [B, A, Q, W']."""
        if self.mix == "mean":
            return jnp.mean(own, axis=1)
        score = jax.nn.silu(jnp.mean(own, axis=2) @ self.gate["in"].T) @ self.gate["out"]
        return jnp.einsum("ba,baqw->bqw", jax.nn.softmax(score, axis=1), own)

    def check(self, prompts):
        for name, table in self.parts.items():
            if name not in dict(self.chosen):
                index = condition(prompts, name)
                known = jnp.where(index == -1, 0, index)
                check_choice(prompts.replace(cond={name: known}), name, table.shape[0], "class")

    def count(self) -> int:
        """The number of vectors of a row."""
        sizes = [table.shape[1] for table in self.parts.values()]
        own = sum(sizes) if self.mix == "concat" else max(sizes)
        return own + (0 if self.shared is None else self.shared.shape[0])

    def added(self):
        return self.count() if self.shape is None else 0

    def prompt(self, x, mask, state):
        return joined(x, mask, state, self.after) if self.shape is None else (x, mask)

    def prefix(self, state):
        if self.shape is None:
            return None
        both = state.reshape(*state.shape[:2], 2, *self.shape).transpose(2, 3, 0, 4, 1, 5)
        return both[0], both[1]


def parts(
    key: jax.Array, width: int, *, shared: int, attributes: Mapping[str, int] | None = None, each: int = 1,
    deviation: float = 0.02,
) -> dict:  # fmt: skip
    """Random fields of a `Parts`: `shared` vectors and, for each attribute with its number of classes, `each` vectors
    for each class; W is `width`.

    Raises:
      InputError: no vectors at all, or an attribute without classes.
    """
    attributes = dict(attributes or {})
    if shared < 0 or each < 1 or shared + len(attributes) < 1:
        raise InputError(
            f"length is {shared} and each is {each} for {len(attributes)} attributes: expected at least 1 vector."
        )
    if bad := [name for name, classes in attributes.items() if classes < 1]:
        raise InputError(f"attribute {bad[0]!r} has {attributes[bad[0]]} classes, expected at least 1.")
    keys = jax.random.split(key, len(attributes) + 1)

    def draw(key, *shape):
        return deviation * jax.random.normal(key, (*shape, width), jnp.float32)

    own = {name: draw(k, attributes[name], each) for name, k in zip(sorted(attributes), keys[1:])}
    return {"shared": draw(keys[0], shared) if shared else None, "parts": own, "scale": jnp.ones(())}


def network(key: jax.Array, width: int, hidden: int, out: int) -> Params:
    """A random network for `Parts.net` from `width` numbers over `hidden` to `out`; normal, of variance 1 / fan-in."""
    first, second = jax.random.split(key)
    return {
        "in": {"kernel": jax.random.normal(first, (hidden, width)) / width**0.5, "bias": jnp.zeros(hidden)},
        "out": {"kernel": jax.random.normal(second, (out, hidden)) / hidden**0.5, "bias": jnp.zeros(out)},
    }


def fold(control: Parts) -> Parts:
    """The same control with its network applied once to every vector, so that it holds only what decoding reads."""
    own = {name: control.written(table) for name, table in control.parts.items()}
    shared = None if control.shared is None else control.written(control.shared)
    return control.replace(shared=shared, parts=own, net=None)


def memory(lm: LM, params: Params, tokens: jax.Array) -> jax.Array:
    """float32 [n, P, 2 · L · K · H]: the keys and values that a model computes for rows of tokens int [n, P]. As the
    vectors of a prefix they are these tokens before the prompt, wherever positions play no part; with positions the
    tokens of the prompt count from 0, and not from P."""
    params, seen = lm.unstack(params), jnp.ones(tokens.shape, bool)
    cache = lm.apply(params, lm.embed(params, tokens), seen, lm.init_cache(params, *tokens.shape), last=1).cache
    both = jnp.stack([jnp.stack(cache.k), jnp.stack(cache.v)])
    return both.transpose(2, 4, 0, 1, 3, 5).reshape(*tokens.shape, -1).astype(jnp.float32)
