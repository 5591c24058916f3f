"""Decoding: `generate` in one compiled program, `forward` and `score` through exactly the same hooks.

A decode loop is `begin`, which reads the prompt, and then `extend`, which draws a token and reads it until every row
has ended. In between it may pause and continue with some of its rows (`choose`). Token t of a row is drawn with
`fold_in(keys[row], t)`, so a row's text does not depend on its batch.
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

from ctg_jax import rng
from ctg_jax.control import IDENTITY, Control, columns, edit_logits, enter
from ctg_jax.decode.checks import check_finite, check_rows, finite
from ctg_jax.decode.reading import read_rows
from ctg_jax.decode.rows import by_rows, is_end, numbers_for_rows
from ctg_jax.mesh import layout
from ctg_jax.models.lm import LM, Cache, write_prefix
from ctg_jax.models.positions import reduced
from ctg_jax.support import likeliest
from ctg_jax.types import InputError, Params, Prompts, PyTree, Samples, Sampling


@struct.dataclass
class Decoding:
    """The state of a decode loop: t int32 [], the number of tokens written; z float32 [B, V], the controlled logits of
    token t; the cache and the control's state; done bool [B]; tokens int32, mask bool and logp float32, each [B, N].

    The first axis of every leaf is the batch, or 1 where all rows share it; scalars have none."""

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
      InputError: what `checks.check_rows` raises; logits that are not finite, once all tokens are drawn.
    """
    check_rows(lm, prompts, control, sampling.max_new)
    return finite(by_rows(loop, lm, params, prompts, control, sampling))


def ready(lm: LM, params: Params, control: Control) -> tuple[Params, Control]:
    """What decodes: the parameters after `Control.weights`, unstacked, and the control with its streams bound."""
    current = lm.unstack(control.weights(params))
    return current, control.bind(params, current)


@partial(jax.jit, static_argnames=("lm", "sampling"))
def loop(lm: LM, params: Params, prompts: Prompts, control: Control, sampling: Sampling) -> Samples:
    """The decode loop as a pure function: what `generate` runs on the rows of each device."""
    params, control = ready(lm, params, control)
    d = prefill(lm, params, prompts, control, sampling)
    d = _advance(lm, params, d, prompts.keys, control, sampling, sampling.max_new)
    return Samples(tokens=d.tokens, mask=d.mask, logp=d.logp, generated=d.t)


def begin(
    lm: LM,
    params: Params,
    prompts: Prompts,
    control: Control = IDENTITY,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
) -> Decoding:
    """A decode loop that has read the prompts and drawn nothing yet; `extend` continues it.

    Raises:
      InputError: as `generate`.
    """
    check_rows(lm, prompts, control, sampling.max_new)
    rows = layout.split_rows(prompts, layout.mesh_of((params, control)))
    params, control = _ready(lm, params, control)
    return prefill(lm, params, rows, control, sampling)


def extend(
    lm: LM,
    params: Params,
    d: Decoding,
    keys: jax.Array,
    control: Control,
    sampling: Sampling,
    steps: int,
) -> Decoding:
    """At most `steps` more tokens of every row; d itself where all rows have ended or `max_new` tokens are written.

    `generate` is `extend` by `max_new` steps after `begin`, and any other division into steps gives the same tokens.
    One program is compiled for each batch size and value of `steps`.

    Args:
      lm, params, control, sampling: those that `begin` was given. Where rows were chosen and the control has leaves
        with a number for each row, the caller chooses the same rows of those leaves.
      d: not changed, so that two continuations may begin from it.
      keys: typed PRNG keys [B]: those of the prompts, or others for rows that are to draw different tokens.
      steps: at least 1.

    Raises:
      InputError: steps below 1, other numbers of rows or of new tokens than those of `d`.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}, expected at least 1.")
    rows, new = d.tokens.shape
    if keys.shape != (rows,) or new != sampling.max_new:
        raise InputError(
            f"The decoding has {rows} rows and max_new {new}, but there are keys of shape {keys.shape} and "
            f"sampling.max_new is {sampling.max_new}: give one key for each row and the sampling of `begin`."
        )
    params, control = _ready(lm, params, control)
    return _extend(lm, params, d, keys, control, sampling, min(steps, new))


def choose(tree: PyTree, index: jax.Array) -> PyTree:
    """The rows int [B'] of a `Decoding` (or of keys, or of both together), in that order; a row may be taken several
    times. Leaves that all rows share stay as they are.

    Raises:
      InputError: a leaf whose first axis is neither the batch nor 1.
    """
    rows = max((x.shape[0] for x in jax.tree.leaves(tree) if x.ndim), default=1)

    def some(x):
        if x.ndim == 0 or (x.shape[0] == 1 < rows):
            return x
        if x.shape[0] != rows:
            raise InputError(f"A leaf has shape {x.shape}, expected {rows} rows, or 1, as its first axis.")
        return x[index]

    return jax.tree.map(some, tree)


def stream(lm: LM, params: Params, prompts: Prompts, control: Control, sampling: Sampling) -> Iterator[np.ndarray]:
    """Yields int32 [B] tokens as they are made, `sampling.pad` for rows that have ended: `begin` and `extend` by one
    token at a time, for notebooks and terminals (`Tokenizer.decode_stream` gives their text). The tokens are those of
    `generate`."""
    d = begin(lm, params, prompts, control, sampling)
    params, control = _ready(lm, params, control)
    for t in range(sampling.max_new):
        d = _onward(lm, params, d, prompts.keys, control, sampling, 1)
        check_finite(d.logp[:, : t + 1])
        yield np.asarray(d.tokens[:, t])
        if bool(jnp.all(d.done)):
            return


_ready = jax.jit(ready, static_argnames=("lm",))


def _advance(lm, params, d, keys, control, sampling, steps):
    """`steps` more tokens of a decoding that is not finished, with what `ready` returned: draws a token, then reads it
    unless nothing is drawn after it."""
    end = jnp.minimum(d.t + steps, sampling.max_new)

    def going(d):
        return (d.t < end) & ~jnp.all(d.done)

    def body(d):
        return sample(read(lm, params, d, control), keys, sampling)

    d = sample(d, keys, sampling)
    if steps > 1:
        d = lax.while_loop(going, body, d)
    if steps == sampling.max_new:  # nothing is left to draw
        return d
    return lax.cond(_unfinished(d), lambda d: read(lm, params, d, control), lambda d: d, d)


def _unfinished(d):
    return (d.t < d.tokens.shape[1]) & ~jnp.all(d.done)


@partial(jax.jit, static_argnames=("lm", "sampling", "steps"))
def _extend(lm, params, d, keys, control, sampling, steps):
    def on(d):
        return _advance(lm, params, d, keys, control, sampling, steps)

    return lax.cond(_unfinished(d), on, lambda d: d, d)


_onward = jax.jit(_advance, static_argnames=("lm", "sampling", "steps"), donate_argnames=("d",))


@partial(jax.jit, static_argnames=("lm", "sampling"))
def prefill(lm: LM, params: Params, prompts: Prompts, control: Control, sampling: Sampling) -> Decoding:
    """Reads the prompts into a new cache; nothing is sampled yet. `params` and `control` are those of `ready`."""
    batch, t = prompts.tokens.shape
    n = sampling.max_new
    state = control.init(prompts, t + n)
    embedded = lm.embed(params, prompts.tokens)
    ids = columns(control, prompts.tokens, embedded, state)
    x, mask, state = enter(control, embedded, prompts.mask, state)
    prefix = control.prefix(state)
    p = 0 if prefix is None else prefix[0].shape[3]
    cache = lm.init_cache(params, batch, p + x.shape[1] + n - 1)
    if prefix is not None:
        cache = write_prefix(cache, prefix)
    params = control.row_weights(params, state)
    out = lm.apply(params, x, mask, cache, control, control.seen(state, ids), last=1)
    z, state = edit_logits(control, out.logits, out.hidden, prompts.tokens, prompts.mask, state)
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


def sample(d: Decoding, keys: jax.Array, sampling: Sampling) -> Decoding:
    """Draws token t of every row from `d.z` and writes it; rows that have ended write padding."""
    if sampling.greedy:
        token = likeliest(d.z)
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


def read(lm: LM, params: Params, d: Decoding, control: Control) -> Decoding:
    """Reads the last written token of every row and computes the controlled logits of the next."""
    token = lax.dynamic_slice_in_dim(d.tokens, d.t - 1, 1, axis=1)
    mask = lax.dynamic_slice_in_dim(d.mask, d.t - 1, 1, axis=1)
    params = control.row_weights(params, d.state)
    out = lm.apply(params, lm.embed(params, token), mask, d.cache, control, control.seen(d.state, token))
    z, state = edit_logits(control, out.logits, out.hidden, token, mask, d.state)
    return d.replace(z=z[:, 0], cache=out.cache, state=state)


def forward(lm: LM, params: Params, prompts: Prompts, completion: jax.Array, control: Control = IDENTITY) -> jax.Array:
    """Controlled logits float32 [B, N, V] of each token of a completion int32 [B, N], teacher-forced.

    Position n saw the prompt and completion tokens before n: exactly what `generate` saw when it drew token n, so
    what follows the end of a completion does not matter. Where a few numbers of each position are enough,
    `reading.read` and `positions.reduced` give them without holding these logits.

    Raises:
      InputError: what `checks.check_rows` raises. Inside `jit`, where masks are not known, padding counts as well.
    """
    check_rows(lm, prompts, control, completion.shape[1], completion)
    return _forward(lm, params, prompts, completion, control)


@partial(jax.jit, static_argnames=("lm",))
def _forward(lm, params, prompts, completion, control):
    return read_rows(lm, params, prompts, completion, control).logits(completion.shape[1])[0]


def score(
    lm: LM,
    params: Params,
    prompts: Prompts,
    completion: jax.Array,
    control: Control = IDENTITY,
    written: jax.Array | None = None,
) -> jax.Array:
    """Log-probability float32 [B, N] of each token of a completion int32 [B, N] under `control`; for a token that the
    control removed it is `support.REMOVED`, of probability 0.

    Args:
      written: bool [B, N], False for padding on the right of a completion, which scores 0. None: all True.

    Raises:
      InputError: what `checks.check_rows` raises; padding does not count. Logits that are not finite.
    """
    return scored(lm, params, prompts, completion, control, written)[0]


def scored(
    lm: LM,
    params: Params,
    prompts: Prompts,
    completion: jax.Array,
    control: Control = IDENTITY,
    written: jax.Array | None = None,
    *,
    states: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """(what `score` returns, and with `states` the final states [B, N, D] that predict each token, otherwise None)."""
    check_rows(lm, prompts, control, completion.shape[1], completion, written)
    with layout.split_activations(layout.mesh_of((params, control))):
        split = not numbers_for_rows(control, len(prompts.tokens))
        rows = (prompts, completion, written)
        logp, hidden = layout.run_rows(_score_part, (lm, states), (params, control), rows, split=split)
    check_finite(logp)
    return logp, hidden


def _score_part(static, whole, rows):
    return _score(*static, whole[0], *rows, whole[1])


@partial(jax.jit, static_argnames=("lm", "states"))
def _score(lm, states, params, prompts, completion, written, control):
    def chosen(z, tokens):
        return jnp.take_along_axis(z, tokens[:, :, None], axis=2)[:, :, 0] - jax.nn.logsumexp(z, axis=-1)

    text = read_rows(lm, params, prompts, completion, control)
    logp = reduced(text, chosen, completion)
    hidden = text.hidden[:, text.hidden.shape[1] - completion.shape[1] :] if states else None
    return logp if written is None else jnp.where(written, logp, 0.0), hidden
