"""Reading a prompt and its completion with a language model under a control, teacher-forced, before any logits."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ctg_jax.control import IDENTITY, Control, columns, enter
from ctg_jax.decode.checks import check_rows
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import Read
from ctg_jax.types import Params, Prompts


def read(lm: LM, params: Params, prompts: Prompts, completion: jax.Array, control: Control = IDENTITY) -> Read:
    """What `loop.forward` makes its logits of, for `positions.reduced`: its last N positions are those that predict the
    tokens of a completion int32 [B, N].

    Raises:
      InputError: what `checks.check_rows` raises. Inside `jit`, where masks are not known, padding counts as well.
    """
    check_rows(lm, prompts, control, completion.shape[1], completion)
    return read_rows(lm, params, prompts, completion, control)


@partial(jax.jit, static_argnames=("lm",))
def read_rows(lm: LM, params: Params, prompts: Prompts, completion: jax.Array, control: Control) -> Read:
    """`read` for rows that the caller has checked. The sequence runs through stacked layers without a cache."""
    frozen, params = params, control.weights(params)
    control = control.bind(frozen, params)
    n = completion.shape[1]
    state = control.init(prompts, prompts.tokens.shape[1] + n)
    seen = completion[:, : n - 1]
    embedded = lm.embed(params, prompts.tokens)
    ids = columns(control, prompts.tokens, embedded, state)
    x, mask, state = enter(control, embedded, prompts.mask, state)
    ones = jnp.ones(seen.shape, bool)
    x = jnp.concatenate([x, lm.embed(params, seen)], axis=1)
    mask = jnp.concatenate([mask, ones], axis=1)
    told = control.seen(state, jnp.concatenate([ids, seen.astype(ids.dtype)], axis=1))
    rows = control.row_weights(params, state)
    hidden = lm.apply(rows, x, mask, control=control, state=told, last=0).hidden
    tokens = jnp.concatenate([prompts.tokens, seen.astype(prompts.tokens.dtype)], axis=1)
    return Read(params, hidden, tokens, jnp.concatenate([prompts.mask, ones], axis=1), control, state, lm=lm)
