"""The least change of a state that meets several linear constraints at once."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def multipliers(gap: jax.Array, w: jax.Array, direction: tuple[str, ...]) -> jax.Array:
    """The least change Σ λ_k w_k of a state that closes the gaps: λ float32 [B, T, K].

    For one concept λ = gap / ‖w‖² where the constraint is violated. For more, the set of active constraints is the
    one of all sets whose least-norm solution meets the Karush-Kuhn-Tucker conditions; there is exactly one change.

    Args:
      gap: float32 [B, T, K], how much each w_k·h must grow.
      w: float32 [K, D]; a zero vector has no constraint.
      direction: "add" (grow at least by it), "remove" (at most) or "both" (exactly), K of them.
    """
    square = jnp.sum(jnp.square(w), axis=-1)
    inverse = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)  # 1 / ‖w‖
    sign = jnp.array([-1.0 if d == "remove" else 1.0 for d in direction])
    exact = np.array([d == "both" for d in direction])
    need = (inverse * sign)[None, None] * gap  # the distances to go along each oriented unit vector
    if len(direction) == 1:
        return (inverse * sign)[None, None] * (need if exact[0] else jnp.maximum(need, 0.0))
    unit = (inverse * sign)[:, None] * w
    eye = jnp.eye(len(direction))
    gram = jnp.where(eye > 0, 1.0 + 1e-6, jnp.einsum("kd,jd->kj", unit, unit, precision="highest"))
    sets = np.array([s for s in itertools.product([False, True], repeat=len(direction)) if np.all(s >= exact)])
    system = jnp.where(sets[:, :, None] & sets[:, None, :], gram[None], eye[None])
    forces = jnp.einsum("skj,btsj->btsk", jnp.linalg.inv(system), jnp.where(sets, need[:, :, None], 0.0),
                        precision="highest")  # fmt: skip
    short = need[:, :, None] - jnp.einsum("btsj,jk->btsk", forces, gram, precision="highest")
    wrong = jnp.max(jnp.where(exact, 0.0, jnp.maximum(-forces, short)), axis=-1)
    best = jnp.argmin(wrong, axis=-1)[:, :, None, None]
    return (inverse * sign)[None, None] * jnp.take_along_axis(forces, best, axis=2)[:, :, 0]
