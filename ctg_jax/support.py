"""The support of a next-token distribution: how a rule removes a token, and what holds for every control.

A removed token has the logit `REMOVED`, and no other number means removal. It is finite, so that differences of two
truncated distributions, their products with a strength and their gradients are finite too; under a softmax with any
token that is left, its probability is exactly 0. `settle` keeps the constant exact: whatever a later control adds to a
removed logit, or divides it by, it is `REMOVED` again before anything else reads it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

REMOVED = -1e30


def removed(z: jax.Array) -> jax.Array:
    """bool [...]: which tokens the logits z [...] exclude; -inf, which a model may give by itself, excludes as well."""
    return z <= REMOVED


def remove(z: jax.Array, which: jax.Array) -> jax.Array:
    """Logits z without the tokens that `which`, a bool array that broadcasts to z, marks."""
    return jnp.where(which, REMOVED, z)


def require(z: jax.Array, allowed: jax.Array) -> jax.Array:
    """Logits z [..., V] of the tokens that `allowed`, bool of the same rank, marks; the others are removed. A row of z
    that holds none of them becomes NaN: no token can be right there, and decoding stops with an error."""
    out = remove(z, ~allowed)
    return jnp.where(jnp.max(lax.stop_gradient(out), axis=-1, keepdims=True) <= REMOVED, jnp.nan, out)


def settle(before: jax.Array, after: jax.Array) -> jax.Array:
    """The logits float32 [..., V] that a control leaves, given those it found and those it returned.

    * What was removed before stays removed, whatever the control made of it; what it removes is `REMOVED`.
    * The support is never empty. A control that would leave no token leaves the likeliest of those it found (several
      where they are tied).
    * A row that is not a number, or held no token at all, is NaN throughout, so that no later rule hides it.
    """
    out = jnp.where(removed(before) | removed(after), REMOVED, after)
    top, left = (jnp.max(lax.stop_gradient(z), axis=-1, keepdims=True) for z in (before, out))
    out = jnp.where(left <= REMOVED, jnp.where(before == top, before, REMOVED), out)
    return jnp.where((top > REMOVED) & ~jnp.isnan(left), out, jnp.nan)


def likeliest(z: jax.Array) -> jax.Array:
    """The first of the likeliest tokens int32 [...] of logits z [..., V], as `argmax` gives them. On a CPU `argmax`
    reduces pairs of number and index one by one, eight times as slow as these two passes at V = 262,144. Where z holds
    NaN the result means nothing, but it is a token."""
    top = jnp.max(z, axis=-1, keepdims=True)
    at = lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    return jnp.min(jnp.where(z == top, at, z.shape[-1] - 1), axis=-1)
