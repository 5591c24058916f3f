"""Speculative sampling for controls that are expensive to evaluate (Leviathan et al. 2023, Chen et al. 2023; for
formulas over several models Dekoninck et al. 2024).

A cheap draft proposes k tokens, one after the other, and the rule judges all of them in one call, so that each of its
streams reads k + 1 tokens in one pass. Texts are distributed as those of `Chain((draft, rule))`.

    control = Speculative(draft, rule, k=4)
    samples = strategies.run(lm, params, prompts, control, sampling)

With q the draft's distribution of a token and p the rule's, a proposal d is kept with probability min(1, p(d) / q(d)),
and the first that is refused is replaced by a draw from (p - q)₊; if none is, one more token is drawn from p. What was
read of refused proposals is masked in every cache, where it leaves holes that count for no position.

The state of `draft` and `rule` may hold only what can be taken back: caches of streams, and what no token changes.
Repetition penalties, n-gram rules, forms and counters of tokens are refused while the program is traced.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from ctg_jax import rng
from ctg_jax.control import IDENTITY, Chain, Control, edit_logits, leaves, overrides
from ctg_jax.controls import constraints
from ctg_jax.decode import loop
from ctg_jax.decode.checks import check_rows
from ctg_jax.decode.strategies import PLAIN, Strategy, cut, of
from ctg_jax.models.lm import LM, Cache
from ctg_jax.support import REMOVED, likeliest
from ctg_jax.types import InputError, Params, Prompts, PyTree, Samples, Sampling

# hooks that act in another place than the logits
ELSEWHERE = ("weights", "row_weights", "prompt", "prefix", "hidden", "heads")


@dataclasses.dataclass(frozen=True)
class Speculation(Strategy):
    """Several tokens in each round: proposals of the draft, judged by the rule."""

    def check(self, lm, prompts, control, sampling):
        banned, control = constraints.apart(control)
        check_rows(lm, prompts, whole(banned, control), sampling.max_new)

    def __call__(self, lm, params, prompts, control, sampling):
        banned, control = constraints.apart(control)
        return rounds(lm, params, prompts, whole(banned, control), sampling, control.k)


@struct.dataclass
class Speculative:
    """A draft and a rule, which together are `Chain((draft, rule))`.

    Attributes:
      rule: acts on logits only. It sees the logits and the states that the draft leaves.
      draft: may act anywhere: the base model, a change of weights, steering, truncation.
      k: how many tokens the draft proposes in a round, at least 1.
    """

    strategy: ClassVar = Speculation()

    rule: Control
    draft: Control = IDENTITY
    k: int = struct.field(pytree_node=False, default=4)

    def __post_init__(self):
        if isinstance(self.k, int) and self.k < 1:
            raise InputError(f"k is {self.k}, expected at least 1 proposed token in a round.")
        for part in leaves(self.rule) if isinstance(self.rule, Control) else ():
            for hook in ELSEWHERE:
                if overrides(part, hook):
                    raise InputError(
                        f"The rule holds {type(part).__name__}, which acts in {hook}, expected controls that act on "
                        "logits only: make it part of the draft."
                    )


def whole(banned: jax.Array | None, control: Speculative) -> Chain:
    """`Chain((draft, rule))`; ids that are no token are removed by the draft."""
    draft = control.draft if banned is None else Chain((constraints.Ban(banned), control.draft))
    return Chain((draft, control.rule))


def split(control: Control, k: int) -> Speculative:
    """The same chain, of which the controls behind the last one that acts in another place than the logits are judged
    after the others have proposed k tokens.

    Raises:
      InputError: a control that replaces the decode loop; k below 1.
    """
    if of(control) is not PLAIN:
        raise InputError(f"{type(control).__name__} replaces the decode loop, so there is nothing to speculate about.")
    parts = leaves(Chain((control,)))
    last = max((i + 1 for i, part in enumerate(parts) if any(overrides(part, hook) for hook in ELSEWHERE)), default=0)
    return Speculative(Chain(tuple(parts[last:])), Chain(tuple(parts[:last])), k)


@struct.dataclass
class _Rows:
    """The loop: rounds int32 []; how many tokens each row has written, int32 [B]; which rows have ended, bool [B]; the
    tokens int32 [B, N + k + 1], -1 where none is written, and their log-probabilities; the base's cache and state."""

    rounds: jax.Array
    t: jax.Array
    done: jax.Array
    tokens: jax.Array
    logp: jax.Array
    cache: Cache
    state: Any


@partial(jax.jit, static_argnames=("lm", "sampling", "k"))
def rounds(lm: LM, params: Params, prompts: Prompts, chain: Chain, sampling: Sampling, k: int) -> Samples:
    """Completions of prompts [B, T] under `Chain((draft, rule))`. Each round takes as many slots of every cache as the
    row that keeps most of it, but caches are made for the worst case, (k + 1) N slots beside the prompt.
    `Samples.generated` is the number of calls of the rule."""
    params, chain = loop.ready(lm, params, chain)
    draft, rule = chain.parts
    rows, n = len(prompts.keys), sampling.max_new
    each, extra = jnp.arange(k + 1, dtype=jnp.int32)[None], rng.named(prompts.keys, "rest")
    chance = rng.named(prompts.keys, "accept")
    on_row = jnp.arange(rows)[:, None]

    def propose(carry, step):
        token, alive, t, cache, state = carry
        mask = alive[:, None]
        told = draft.seen(state, token[:, None])
        own = draft.row_weights(params, state)
        out = lm.apply(own, lm.embed(params, token[:, None]), mask, cache, draft, told)
        z, after = edit_logits(draft, out.logits, out.hidden, token[:, None], mask, state)
        drawn = likeliest(z[:, 0]) if sampling.greedy else rng.draw(_at(prompts.keys, t + step), z[:, 0])
        after = undone(draft, state, after, None)
        return (drawn, alive, t, out.cache, after), (token, z[:, 0], out.hidden[:, 0])

    def on(r: _Rows) -> _Rows:
        alive = ~r.done
        last = jnp.take_along_axis(r.tokens, jnp.maximum(r.t - 1, 0)[:, None], axis=1)[:, 0]
        begin = (jnp.maximum(last, 0), alive, r.t, r.cache, r.state[0])
        (_, _, _, cache, drafted), read = lax.scan(propose, begin, jnp.arange(k + 1, dtype=jnp.int32))
        tokens, q, h = (jnp.moveaxis(x, 0, 1) for x in read)
        mask = jnp.broadcast_to(alive[:, None], tokens.shape)
        p, judged = edit_logits(rule, q, h, tokens, mask, r.state[1])
        logp, logq = (jax.nn.log_softmax(x, axis=-1) for x in (p, q))
        proposed = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)  # the last entry is not used
        if sampling.greedy:
            fits = proposed == likeliest(p)
        else:
            ratio = _of(logp, proposed) - _of(logq, proposed)
            fits = jnp.log(jax.vmap(_uniform)(chance, r.t[:, None] + each)) < ratio
        kept = jnp.sum(jnp.cumprod(fits[:, :k], axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
        at = kept[:, None, None]
        p_next, q_next = (jnp.take_along_axis(x, at, axis=1)[:, 0] for x in (logp, logq))
        if sampling.greedy:
            new = likeliest(p_next)
        else:
            left = jnp.maximum(jnp.exp(p_next) - jnp.exp(q_next), 0)
            rest = jnp.where(left > 0, jnp.log(jnp.where(left > 0, left, 1.0)), REMOVED)
            rest = jnp.where(jnp.any(left > 0, axis=-1, keepdims=True), rest, p_next)
            ahead = (kept == k)[:, None]
            keys = jnp.where(ahead[:, 0], _at(prompts.keys, r.t + kept), _at(extra, r.t + kept))
            new = rng.draw(keys, jnp.where(ahead, p_next, rest))
        proposed = jnp.where(each == kept[:, None], new[:, None], proposed)
        valid, where = (each <= kept[:, None]) & alive[:, None], r.t[:, None] + each
        written = r.tokens.at[on_row, where].set(jnp.where(valid, proposed, r.tokens[on_row, where]))
        chances = r.logp.at[on_row, where].set(jnp.where(valid, _of(logp, proposed), r.logp[on_row, where]))
        t = jnp.where(alive, jnp.minimum(r.t + kept + 1, n), r.t)
        used = jnp.where(alive, kept + 1, 0)
        state = (undone(draft, r.state[0], drafted, used), undone(rule, r.state[1], judged, used))
        done = r.done | ended(written[:, :n], t, sampling)
        return _Rows(r.rounds + 1, t, done, written, chances, _undone(r.cache, cache, used), state)

    slots = dataclasses.replace(sampling, max_new=(k + 1) * n)
    d = loop.sample(loop.prefill(lm, params, prompts, chain, slots), prompts.keys, slots)
    tokens, logp = jnp.full((rows, n + k + 1), -1, jnp.int32), jnp.zeros((rows, n + k + 1), jnp.float32)
    first = tokens.at[:, 0].set(d.tokens[:, 0]), logp.at[:, 0].set(d.logp[:, 0])
    t = jnp.ones(rows, jnp.int32)
    r = _Rows(jnp.ones((), jnp.int32), t, ended(first[0][:, :n], t, sampling), *first, d.cache, d.state)
    r = lax.while_loop(lambda r: ~jnp.all(r.done), on, r)
    tokens, mask = cut(r.tokens[:, :n], sampling)
    return Samples(tokens=tokens, mask=mask, logp=jnp.where(mask, r.logp[:, :n], 0.0), generated=r.rounds)


def ended(tokens: jax.Array, t: jax.Array, sampling: Sampling) -> jax.Array:
    """bool [B]: which rows of tokens int32 [B, N] have ended after t int32 [B] of them; the others are -1."""
    _, mask = cut(tokens, sampling)
    whole = jnp.concatenate([mask, jnp.zeros_like(mask[:, :1])], axis=1)  # the token behind the end is not in the mask
    return (t >= tokens.shape[1]) | ~jnp.take_along_axis(whole, t[:, None], axis=1)[:, 0]


def undone(control: Control, before: PyTree, after: PyTree, kept: jax.Array | None) -> PyTree:
    """The state of a control after k + 1 tokens, as if only the first `kept` of each row had been read.

    Args:
      before, after: the state before and after they were read.
      kept: int32 [B]; None: all of them.

    Raises:
      InputError: something other than a cache has changed, which cannot be taken back; the message names the control.
    """
    if isinstance(control, Chain):
        return tuple(undone(c, a, b, kept) for c, a, b in zip(control.parts, before, after, strict=True))
    is_cache = lambda x: isinstance(x, Cache)  # noqa: E731
    old, shape = jax.tree.flatten(before, is_leaf=is_cache)
    new, other = jax.tree.flatten(after, is_leaf=is_cache)
    if shape != other or any(a is not b for a, b in zip(old, new) if not is_cache(a)):
        raise InputError(
            f"{type(control).__name__} changes its state with every token, which speculative sampling cannot take "
            "back: decode without speculation, or leave the control out."
        )
    found = [_undone(a, b, kept) if is_cache(a) and kept is not None else b for a, b in zip(old, new)]
    return jax.tree.unflatten(shape, found)


def _undone(before: Cache, after: Cache, kept: jax.Array) -> Cache:
    length = jnp.minimum(after.length, before.length + jnp.max(kept))
    kept = kept.reshape(-1, *(1,) * (after.offset.ndim - 1))  # copies of a stream have an axis of their own
    place = jnp.arange(after.mask.shape[-1]).reshape((1,) * kept.ndim + (-1,)) - before.length
    return after.replace(
        mask=after.mask & (place < kept[..., None]),
        length=length,
        offset=jnp.minimum(after.offset, before.offset + kept),
    )


def _at(keys: jax.Array, steps: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in)(keys, steps)


def _uniform(key: jax.Array, steps: jax.Array) -> jax.Array:
    return jax.vmap(lambda step: jax.random.uniform(jax.random.fold_in(key, step)))(steps)


def _of(z: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(z, tokens[..., None], axis=-1)[..., 0]
