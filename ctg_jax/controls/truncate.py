"""Truncation and penalties: rules on the logits that choose by the logits or the text, composable in any order.

No rule sorts the vocabulary: a full sort costs more than a step of GPT-2 on a CPU. Top-k, nucleus and typical sampling
find their threshold by bisection on the bits of a float, which is exact; tokens tied with it are kept together.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ctg_jax.control import Chain, Control
from ctg_jax.controls.constraints import Ban, MinLength, marks
from ctg_jax.models.lm import LM
from ctg_jax.support import remove
from ctg_jax.types import InputError

Leaf = Any  # float [] or, per row, [B]


def _broadcast(x: Leaf, z: jax.Array) -> jax.Array:
    """A leaf [] or [B], shaped to broadcast against z [B, M, V]."""
    x = jnp.asarray(x, jnp.float32)
    return x.reshape((-1, 1, 1)) if x.ndim else jnp.full((1, 1, 1), x)


def smallest_cover(weight: jax.Array, key: jax.Array, mass: jax.Array) -> jax.Array:
    """Which entries form the smallest set, taken by decreasing `key`, whose weights sum to at least `mass`.

    Args:
      weight: float32 [..., V], non-negative.
      key: float32 [..., V], non-negative; ties are taken together.
      mass: float32 [..., 1]; at most the total (a larger mass keeps everything).

    Returns:
      bool [..., V]. The threshold is the largest float t with sum(weight[key >= t]) >= mass, found exactly by
      bisection on its bits: non-negative floats are ordered as their bit patterns are.
    """
    return _by_platform(_cover, weight, key, mass)


def largest(z: jax.Array, k: int) -> jax.Array:
    """The k-th largest of the numbers z float32 [..., V], float32 [..., 1], by bisection on its bits; 1 ≤ k ≤ V.
    `lax.top_k` takes fifty times as long at V = 262,144 on a CPU."""
    return _by_platform(partial(_largest, k), z)


def _by_platform(f, *rows):
    """f of arrays [..., any]; one row after the other on a CPU, which sums one row three times faster than several side
    by side, and where a row stops when it is done."""

    def by_row(*rows):
        out = lax.map(lambda row: f(*row), tuple(x.reshape(-1, x.shape[-1]) for x in rows))
        return out.reshape(*rows[0].shape[:-1], out.shape[-1])

    return lax.platform_dependent(*rows, cpu=by_row, default=f)


def _cover(weight, key, mass):
    bits = lax.bitcast_convert_type(key, jnp.int32)

    def covers(t):
        return jnp.sum(jnp.where(bits >= t, weight, 0.0), axis=-1, keepdims=True) >= mass

    return bits >= _threshold(covers, jnp.zeros_like(mass, dtype=jnp.int32), bits)


def _largest(k, z):
    bits = lax.bitcast_convert_type(lax.stop_gradient(z), jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered as the numbers are

    def enough(t):
        return jnp.sum(order >= t, axis=-1, keepdims=True, dtype=jnp.int32) >= k

    found = _threshold(enough, jnp.min(order, axis=-1, keepdims=True), order)
    return lax.bitcast_convert_type(jnp.where(found < 0, found ^ 0x7FFFFFFF, found), jnp.float32)


def _threshold(holds, low, bits):
    """The largest int32 t [..., 1] for which `holds`, which is true of `low` and false above all bits [..., V]."""
    high = jnp.max(bits, axis=-1, keepdims=True) + 1

    def narrow(bounds):
        low, high = bounds
        mid = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        true = holds(mid)
        return jnp.where(true, mid, low), jnp.where(true, high, mid)

    return lax.while_loop(lambda b: jnp.any(b[0] + 1 < b[1]), narrow, (low, high))[0]


@struct.dataclass
class Temperature(Control):
    """z / t. The leaf `t` is [] or per row [B]; t → 0 is greedy."""

    t: Leaf = 1.0

    def logits(self, z, h, tokens, mask, state):
        return z / jnp.maximum(_broadcast(self.t, z), 1e-6), state


@struct.dataclass
class TopP(Control):
    """Nucleus sampling (Holtzman et al. 2020): the smallest set of likeliest tokens with mass at least p."""

    selects = True

    p: Leaf = 0.9

    def logits(self, z, h, tokens, mask, state):
        q = jax.nn.softmax(z, axis=-1)
        p = _broadcast(self.p, z)
        # p = 1 keeps everything, also where the float32 sum falls short of 1.
        keep = smallest_cover(q, q, jnp.broadcast_to(p, (*z.shape[:-1], 1))) | (p >= 1)
        return remove(z, ~keep), state


@struct.dataclass
class TopK(Control):
    """The k likeliest tokens (Fan et al. 2018); k is static. Ties with the k-th are kept."""

    selects = True

    k: int = struct.field(pytree_node=False, default=50)

    def logits(self, z, h, tokens, mask, state):
        if self.k >= z.shape[-1]:
            return z, state
        return remove(z, z < largest(z, self.k)), state


@struct.dataclass
class MinP(Control):
    """Tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""

    selects = True

    p: Leaf = 0.1

    def logits(self, z, h, tokens, mask, state):
        floor = jnp.max(z, axis=-1, keepdims=True) + jnp.log(_broadcast(self.p, z))
        return remove(z, z < floor), state


@struct.dataclass
class Typical(Control):
    """Locally typical sampling (Meister et al. 2023): the smallest set of mass p, nearest to the entropy first."""

    selects = True

    p: Leaf = 0.95

    def logits(self, z, h, tokens, mask, state):
        logq = jax.nn.log_softmax(z, axis=-1)
        q = jnp.exp(logq)
        entropy = -jnp.sum(q * jnp.where(q > 0, logq, 0.0), axis=-1, keepdims=True)
        nearness = 1 / (1 + jnp.abs(-logq - entropy))
        p = _broadcast(self.p, z)
        keep = smallest_cover(q, nearness, jnp.broadcast_to(p, (*z.shape[:-1], 1))) | (p >= 1)
        return remove(z, ~keep), state


def seen_so_far(tokens: jax.Array, mask: jax.Array, before: jax.Array, m: int) -> jax.Array:
    """bool [B, M, V]: the tokens of each row up to each of its last m positions, given `before` bool [B, V]."""
    t, v = tokens.shape[1], before.shape[1]
    rows = jnp.arange(tokens.shape[0])[:, None]
    head = before.at[rows, tokens[:, : t - m + 1]].max(mask[:, : t - m + 1])
    if m == 1:
        return head[:, None]
    later = jax.nn.one_hot(tokens[:, t - m + 1 :], v, dtype=jnp.bool_) & mask[:, t - m + 1 :, None]
    return lax.associative_scan(jnp.logical_or, jnp.concatenate([head[:, None], later], axis=1), axis=1)


@struct.dataclass
class RepetitionPenalty(Control):
    """CTRL's penalty (Keskar et al. 2019): logits of tokens seen in the prompt or the text so far are divided by
    theta where positive and multiplied by it where negative; theta = 1 changes nothing."""

    theta: Leaf = 1.2
    vocab: int = struct.field(pytree_node=False, kw_only=True)

    def init(self, prompts, length):
        return jnp.zeros((prompts.tokens.shape[0], self.vocab), bool)

    def logits(self, z, h, tokens, mask, state):
        if self.vocab != z.shape[-1]:
            raise InputError(
                f"The repetition penalty is of a vocabulary of {self.vocab} tokens, but the model has {z.shape[-1]}: "
                "make it for this model."
            )
        seen = seen_so_far(tokens, mask, state, z.shape[1])
        theta = _broadcast(self.theta, z)
        return jnp.where(seen, jnp.where(z > 0, z / theta, z * theta), z), seen[:, -1]


@struct.dataclass
class NoRepeatNgram(Control):
    """Bans every token that would repeat an n-gram of the prompt or the text so far (Paulus et al. 2018)."""

    selects = True

    n: int = struct.field(pytree_node=False, default=4)

    def init(self, prompts, length):
        batch = prompts.tokens.shape[0]
        empty = jnp.full((batch, length), -1, jnp.int32)  # -1: padding, never equal to a token
        return empty, jnp.zeros((), jnp.int32)

    def logits(self, z, h, tokens, mask, state):
        history, size = state
        history = lax.dynamic_update_slice(history, jnp.where(mask, tokens, -1), (0, size))
        size = size + tokens.shape[1]
        m = z.shape[1]
        banned = [self._banned(history, size - m + 1 + i, z.shape[-1]) for i in range(m)]
        return remove(z, jnp.stack(banned, axis=1)), (history, size)

    def _banned(self, history: jax.Array, size: jax.Array, vocab: int) -> jax.Array:
        """bool [B, V] given histories [B, S] of which the first `size` slots are filled."""
        n, (batch, slots) = self.n, history.shape
        if slots < n:
            return jnp.zeros((batch, vocab), bool)
        tail = lax.dynamic_slice_in_dim(history, jnp.maximum(size - n + 1, 0), n - 1, axis=1)
        starts = slots - n + 1
        match = (jnp.arange(starts) + n - 1 < size)[None, :] & (size >= n)
        for i in range(n - 1):
            gram = history[:, i : i + starts]
            match = match & (gram == tail[:, i : i + 1]) & (gram >= 0)
        nexts = history[:, n - 1 :]
        match = match & (nexts >= 0)
        rows = jnp.arange(batch)[:, None]
        return jnp.zeros((batch, vocab), bool).at[rows, jnp.maximum(nexts, 0)].max(match)


def rules(
    lm: LM,
    key: jax.Array | None = None,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    typical_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    no_repeat_ngram: int | None = None,
    min_length: int | None = None,
    banned: tuple[int, ...] = (),
    eos: tuple[int, ...] = (),
) -> Chain:
    """The usual decoding options as a chain, with the distribution that `transformers` (5.23) makes of the same ones:
    penalties, temperature, top-k, top-p, min-p, typical, in its order. What is forbidden outright (`banned`,
    `min_length`) comes first, before anything chooses among tokens; `transformers` removes it after the penalties,
    which leaves the same logits. Tokens whose logits tie with the last one that top-p keeps are kept together, where
    `transformers` keeps those that its sort put first. For another order, build the `Chain` yourself. Nothing is
    learned, so there is no `fit`.

    Raises:
      InputError: an option is out of its range.
    """
    for name, value, low, high in [
        ("temperature", temperature, 0, np.inf),
        ("top_p", top_p, 0, 1),
        ("typical_p", typical_p, 0, 1),
        ("min_p", min_p, 0, 1),
        ("repetition_penalty", repetition_penalty, 0, np.inf),
    ]:
        if value is not None and not low < value <= high:
            raise InputError(f"{name} is {value}, expected a number above {low} and at most {high}.")
    for name, value, low in [
        ("top_k", top_k, 1),
        ("no_repeat_ngram", no_repeat_ngram, 1),
        ("min_length", min_length, 0),
    ]:
        if value is not None and value < low:
            raise InputError(f"{name} is {value}, expected an integer of at least {low}.")
    if min_length and not eos:
        raise InputError("min_length needs eos, the token ids that must not come early, but eos is empty.")
    parts: list[Control] = []
    if banned:
        parts.append(Ban(jnp.asarray(marks(banned, lm.vocab))))
    if min_length:
        parts.append(MinLength(jnp.asarray(marks(eos, lm.vocab)), min_length))
    if repetition_penalty is not None:
        parts.append(RepetitionPenalty(repetition_penalty, vocab=lm.vocab))
    if no_repeat_ngram is not None:
        parts.append(NoRepeatNgram(no_repeat_ngram))
    if temperature is not None:
        parts.append(Temperature(temperature))
    if top_k is not None:
        parts.append(TopK(top_k))
    if top_p is not None:
        parts.append(TopP(top_p))
    if min_p is not None:
        parts.append(MinP(min_p))
    if typical_p is not None:
        parts.append(Typical(typical_p))
    return Chain(tuple(parts))
