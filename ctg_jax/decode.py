"""Decoding: `generate` in one compiled program, `forward` and `score` through exactly the same hooks.

A decode loop is `prefill` (read the prompt), then `step` (sample a token, read it) until every row has ended.
Token t of a row is drawn with `fold_in(prompts.keys[row], t)`, so a row's text does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ctg_jax import constraints, hosts, layout, rng, tree
from ctg_jax.control import IDENTITY, Control, edit_logits
from ctg_jax.data.ids import check_ids
from ctg_jax.models.lm import LM, Cache
from ctg_jax.types import InputError, Params, Prompts, Samples, Sampling

_STRENGTHS = ("scale", "alpha")  # leaves of a control that may have a number for each row


@struct.dataclass
class Decoding:
    """The loop's carry: t int32 [] tokens written; z float32 [B, V] controlled logits of token t; the cache and
    the control's state; done bool [B]; tokens int32, mask bool and logp float32, each [B, N]."""

    t: jax.Array
    z: jax.Array
    cache: Cache
    state: Any
    done: jax.Array
    tokens: jax.Array
    mask: jax.Array
    logp: jax.Array


def generate(
    lm: LM,
    params: Params,
    prompts: Prompts,
    control: Control = IDENTITY,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
) -> Samples:
    """Completions of `prompts` under `control`: one compiled program, compiled once per shape and control structure.

    Strengths and other leaves of the control may change without recompiling. Pass parameters through `lm.unstack`
    once to decode without a second copy of the weights.

    Raises:
      InputError: the prompts and `max_new` do not fit in the LM's context, or there are no prompts; a token has no row
        in the LM; what `control.check` raises; rules of the control that cannot hold (`constraints.check`); logits that
        are not finite, once all tokens are drawn.
    """
    check_lengths(lm, prompts, sampling.max_new)
    check_values(lm, prompts, control)
    constraints.check(control, lm.vocab, sampling.max_new)
    if not _divisible(prompts, control):
        return finite(_generate(lm, params, layout.spread(prompts), control, sampling))
    out = _generate(lm, params, layout.spread(hosts.rows(prompts)), control, sampling)
    whole = hosts.gather({"tokens": out.tokens, "mask": out.mask, "logp": out.logp})
    return finite(Samples(**whole, generated=jnp.max(hosts.gather(out.generated[None]))))


def _divisible(prompts: Prompts, control: Control) -> bool:
    """Whether several processes share the rows: each decodes its own, which changes none of them. A batch they do not
    divide, and a control with numbers for each row, is decoded by all."""
    size = prompts.tokens.shape[0]
    if hosts.count() == 1 or isinstance(prompts.tokens, jax.core.Tracer) or size % hosts.count():
        return False
    return not any(x.shape[:1] == (size,) for path, x in tree.flatten(control).items() if path.endswith(_STRENGTHS))


@partial(jax.jit, static_argnames=("lm", "sampling"))
def _generate(lm, params, prompts, control, sampling):
    params = lm.unstack(control.weights(params))
    d = prefill(lm, params, prompts, control, sampling)
    d = sample(d, prompts.keys, sampling)

    def going(d):
        return (d.t < sampling.max_new) & ~jnp.all(d.done)

    def body(d):
        return sample(read(lm, params, d, control), prompts.keys, sampling)

    d = lax.while_loop(going, body, d)
    return Samples(tokens=d.tokens, mask=d.mask, logp=d.logp, generated=d.t)


def stream(lm: LM, params: Params, prompts: Prompts, control: Control, sampling: Sampling) -> Iterator[np.ndarray]:
    """Yields int32 [B] tokens as they are made, `sampling.pad` for rows that have ended: the loop of `generate`
    with one dispatch per token, for notebooks and terminals (`Tokenizer.decode_stream` gives their text). The tokens
    are those of `generate`."""
    check_lengths(lm, prompts, sampling.max_new)
    check_values(lm, prompts, control)
    constraints.check(control, lm.vocab, sampling.max_new)
    params = _weights(lm, params, control)
    d = _first(lm, params, prompts, control, sampling)
    while True:
        t = int(d.t)
        check_finite(d.logp[:, :t])
        yield np.asarray(d.tokens[:, t - 1])
        if t >= sampling.max_new or bool(jnp.all(d.done)):
            return
        d = _next(lm, params, d, prompts.keys, control, sampling)


@partial(jax.jit, static_argnames=("lm",))
def _weights(lm, params, control):
    return lm.unstack(control.weights(params))


@partial(jax.jit, static_argnames=("lm", "sampling"))
def _first(lm, params, prompts, control, sampling):
    return sample(prefill(lm, params, prompts, control, sampling), prompts.keys, sampling)


@partial(jax.jit, static_argnames=("lm", "sampling"), donate_argnames=("d",))
def _next(lm, params, d, keys, control, sampling):
    return sample(read(lm, params, d, control), keys, sampling)


def prefill(lm: LM, params: Params, prompts: Prompts, control: Control, sampling: Sampling) -> Decoding:
    """Reads the prompts into a new cache; nothing is sampled yet. `params` have been through `control.weights`."""
    batch, t = prompts.tokens.shape
    n = sampling.max_new
    state = control.init(prompts, t + n)
    x, mask = control.prompt(lm.embed(params, prompts.tokens), prompts.mask, state)
    prefix = control.prefix(state)
    p = 0 if prefix is None else prefix[0].shape[3]
    cache = lm.init_cache(params, batch, p + x.shape[1] + n - 1)
    if prefix is not None:
        cache = write_prefix(cache, prefix)
    out = lm.apply(params, x, mask, cache, control, state, last=1)
    z, state = edit_logits(control, out.logits, prompts.tokens, prompts.mask, state)
    return Decoding(
        t=jnp.zeros((), jnp.int32),
        z=z[:, 0],
        cache=out.cache,
        state=state,
        done=jnp.zeros((batch,), bool),
        tokens=jnp.full((batch, n), sampling.pad, jnp.int32),
        mask=jnp.zeros((batch, n), bool),
        logp=jnp.zeros((batch, n), jnp.float32),
    )


def write_prefix(cache: Cache, prefix: tuple[jax.Array, jax.Array]) -> Cache:
    """An empty cache whose first P slots hold the prefix (k, v), each [L, B, K, P, H]; positions do not move."""
    k, v = prefix
    p = k.shape[3]
    return cache.replace(
        k=tuple(c.at[:, :, :p].set(a.astype(c.dtype)) for c, a in zip(cache.k, k)),
        v=tuple(c.at[:, :, :p].set(a.astype(c.dtype)) for c, a in zip(cache.v, v)),
        mask=cache.mask.at[:, :p].set(True),
        length=cache.length + p,
    )


def sample(d: Decoding, keys: jax.Array, sampling: Sampling) -> Decoding:
    """Draws token t of every row from `d.z` and writes it; rows that have ended write padding."""
    if sampling.greedy:
        token = jnp.argmax(d.z, axis=-1)
    else:
        token = rng.draw(rng.at_step(keys, d.t), d.z)
    token = jnp.where(d.done, sampling.pad, token.astype(jnp.int32))
    z = jnp.take_along_axis(d.z, token[:, None], axis=1)[:, 0]
    logp = jnp.where(d.done, 0.0, z - jax.nn.logsumexp(d.z, axis=-1))
    alive = ~d.done
    d = d.replace(
        t=d.t + 1,
        tokens=lax.dynamic_update_slice(d.tokens, token[:, None], (0, d.t)),
        mask=lax.dynamic_update_slice(d.mask, alive[:, None], (0, d.t)),
        logp=lax.dynamic_update_slice(d.logp, logp[:, None], (0, d.t)),
    )
    return d.replace(done=d.done | ended(d, token, sampling))


def ended(d: Decoding, token: jax.Array, sampling: Sampling) -> jax.Array:
    """bool [B]: whether the token just written is an EOS or completes a stop sequence."""
    end = is_end(token, sampling.eos)
    for stop in sampling.stop:
        size = len(stop)
        if size > d.tokens.shape[1]:
            continue
        window = lax.dynamic_slice_in_dim(d.tokens, jnp.maximum(d.t - size, 0), size, axis=1)
        end |= (d.t >= size) & jnp.all(window == jnp.asarray(stop, jnp.int32)[None, :], axis=1)
    return end


def is_end(tokens: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    """bool, of the shape of `tokens`: which of them are among the ids `ends`."""
    return jnp.isin(tokens, jnp.asarray(ends, jnp.int32))


def up_to_end(tokens: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    """bool [B, N]: the places of rows that were written whole, up to the first end and with it: `Samples.mask`."""
    end = is_end(tokens, ends)
    return jnp.cumsum(end, axis=1) - end == 0


def read(lm: LM, params: Params, d: Decoding, control: Control) -> Decoding:
    """Reads the last written token of every row and computes the controlled logits of the next."""
    token = lax.dynamic_slice_in_dim(d.tokens, d.t - 1, 1, axis=1)
    mask = lax.dynamic_slice_in_dim(d.mask, d.t - 1, 1, axis=1)
    out = lm.apply(params, lm.embed(params, token), mask, d.cache, control, d.state)
    z, state = edit_logits(control, out.logits, token, mask, d.state)
    return d.replace(z=z[:, 0], cache=out.cache, state=state)


def forward(lm: LM, params: Params, prompts: Prompts, completion: jax.Array, control: Control = IDENTITY) -> jax.Array:
    """Controlled logits float32 [B, N, V] of each token of a completion int32 [B, N], teacher-forced.

    Position n saw the prompt and completion tokens before n: exactly what `generate` saw when it drew token n, so
    what follows the end of a completion does not matter. The sequence runs through stacked layers without a cache.

    Raises:
      InputError: a token has no row in the LM, or what `control.check` raises.
    """
    check_values(lm, prompts, control, completion)
    return _forward(lm, params, prompts, completion, control)


@partial(jax.jit, static_argnames=("lm",))
def _forward(lm, params, prompts, completion, control):
    return forward_states(lm, params, prompts, completion, control)[0]


@partial(jax.jit, static_argnames=("lm",))
def forward_states(
    lm: LM, params: Params, prompts: Prompts, completion: jax.Array, control: Control = IDENTITY
) -> tuple[jax.Array, jax.Array]:
    """What `forward` gives, and the final hidden states [B, N, D] that each of the logits was read off."""
    params = control.weights(params)
    n = completion.shape[1]
    constraints.check(control, lm.vocab, n)
    state = control.init(prompts, prompts.tokens.shape[1] + n)
    seen = completion[:, : n - 1]
    x, mask = control.prompt(lm.embed(params, prompts.tokens), prompts.mask, state)
    ones = jnp.ones(seen.shape, bool)
    x = jnp.concatenate([x, lm.embed(params, seen)], axis=1)
    mask = jnp.concatenate([mask, ones], axis=1)
    out = lm.apply(params, x, mask, control=control, state=state, last=n)
    tokens = jnp.concatenate([prompts.tokens, seen.astype(prompts.tokens.dtype)], axis=1)
    z, _ = edit_logits(control, out.logits, tokens, jnp.concatenate([prompts.mask, ones], axis=1), state)
    return z, out.hidden[:, out.hidden.shape[1] - n :]


def score(lm: LM, params: Params, prompts: Prompts, completion: jax.Array, control: Control = IDENTITY) -> jax.Array:
    """Log-probability float32 [B, N] of each token of a completion int32 [B, N] under `control`; for a token that the
    control removed it is `support.REMOVED`, of probability 0.

    Raises:
      InputError: a token has no row in the LM, what `control.check` raises, rules of the control that cannot hold
        (`constraints.check`), or logits that are not finite.
    """
    check_values(lm, prompts, control, completion)
    constraints.check(control, lm.vocab, completion.shape[1])
    if _divisible(prompts, control) and not isinstance(completion, jax.core.Tracer):
        prompts, completion = hosts.rows((prompts, completion))
        with layout.on():
            logp = hosts.gather(_score(lm, params, *layout.spread((prompts, completion)), control))
    else:
        with layout.on():
            logp = _score(lm, params, *layout.spread((prompts, completion)), control)
    check_finite(logp)
    return logp


@partial(jax.jit, static_argnames=("lm",))
def _score(lm, params, prompts, completion, control):
    z = forward(lm, params, prompts, completion, control)
    chosen = jnp.take_along_axis(z, completion[:, :, None], axis=2)[:, :, 0]
    return chosen - jax.nn.logsumexp(z, axis=-1)


def check_values(lm: LM, prompts: Prompts, control: Control, completion: jax.Array | None = None) -> None:
    """Raises InputError where a token of the prompts or the completion has no row in the LM, or the control cannot read
    the prompts. Traced values cannot be looked at and pass."""
    tokens, mask, rest = (tree.concrete(x) for x in (prompts.tokens, prompts.mask, completion))
    if tokens is not None and mask is not None:
        check_ids(tokens[mask], lm.vocab, "prompts.tokens")
    if rest is not None:
        check_ids(rest, lm.vocab, "completion")
    control.check(prompts)


def finite(out: Samples) -> Samples:
    """The samples themselves; raises InputError as `check_finite`."""
    check_finite(out.logp)
    return out


def check_finite(logp: jax.Array) -> None:
    """Raises InputError where a log-probability [B, N] is NaN; under `jit`, where nothing is known, never."""
    if isinstance(logp, jax.core.Tracer):
        return
    if len(bad := np.argwhere(np.isnan(np.asarray(logp)))):
        row, step = bad[0]
        raise InputError(
            f"The logits of row {row}, new token {step + 1}, are not finite: parameters of the model or of a control "
            "hold NaN or infinity, or a control removed every token that Ban, Force or MinLength allows."
        )


def check_lengths(lm: LM, prompts: Prompts, new: int) -> None:
    """Raises InputError when prompts [B, T] and `new` tokens do not fit the LM, or the batch is empty."""
    batch, t = prompts.tokens.shape
    if batch == 0 or t == 0:
        raise InputError(f"prompts has shape {prompts.tokens.shape}, expected at least one row and one token.")
    if new < 1:
        raise InputError(f"max_new is {new}, expected at least 1.")
    longest = t if isinstance(prompts.mask, jax.core.Tracer) else int(np.asarray(prompts.mask).sum(1).max())
    if longest + new > lm.context:
        raise InputError(
            f"The longest prompt has {longest} tokens and max_new is {new}, but the model's context is {lm.context}: "
            "shorten the prompts or max_new."
        )
