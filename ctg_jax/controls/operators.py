"""What a control does with a state of the residual stream and a direction: operators beside adding.

With a state h, a vector v, its direction u = v / ‖v‖ and a strength s:

    add      h + s v
    ablate   h − s (h·u) u                     s = 1 projects the direction out (Arditi et al. 2024)
    rotate   (h + s v) ‖h‖ / ‖h + s v‖         turns the state towards v in their plane and keeps its length
    clamp    h + s (t ‖v‖ − h·u) u             s = 1 sets the coordinate along v to t times the length of v

At s = 0 each of them leaves the state as it is. A vector of zeros has no direction, and nothing is done.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax.types import InputError

OPERATORS = ("add", "ablate", "rotate", "clamp")


def operate(operator: str, h: jax.Array, vector: jax.Array, strength: jax.Array, target: jax.Array | None) -> jax.Array:
    """The edited states, float32 [B, T, D].

    Args:
      operator: one of `OPERATORS`; "add" is left to the caller, who adds in the type of the stream.
      h: float [B, T, D]. vector: float32, [D] or [B, D]. strength: float32, broadcast against [B, T, 1].
      target: float32 [], t of "clamp".
    """
    h = h.astype(jnp.float32)
    vector = vector.reshape((-1, 1, vector.shape[-1]))
    if operator == "rotate":
        moved = h + strength * vector
        before, after = (jnp.sum(jnp.square(x), axis=-1, keepdims=True) for x in (h, moved))
        return moved * jnp.sqrt(before / jnp.where(after > 0, after, 1.0))
    square = jnp.sum(jnp.square(vector), axis=-1, keepdims=True)
    along = jnp.sum(h * vector, axis=-1, keepdims=True) / jnp.where(square > 0, square, 1.0)  # in lengths of v
    goal = 0.0 if operator == "ablate" else target
    return h + strength * (goal - along) * vector


def check_operator(operator: str) -> str:
    """The operator; InputError where there is none of that name."""
    if operator not in OPERATORS:
        raise InputError(f"operator is {operator!r}, expected one of {', '.join(OPERATORS)}.")
    return operator


@struct.dataclass
class Probe:
    """A gate that opens at a token whose state a linear probe calls positive, w·h + b > 0, at the site where a control
    acts.

    Attributes:
      vector, bias: float32 [L + 2, D] and [L + 2], the probe w and b of every site.
    """

    vector: jax.Array
    bias: jax.Array

    def open(self, h: jax.Array, site: jax.Array | int) -> jax.Array:
        """bool [B, T, 1] for states h [B, T, D] at a site 0 … L + 1."""
        z = jnp.einsum("btd,d->bt", h.astype(jnp.float32), self.vector[site], precision="highest") + self.bias[site]
        return (z > 0)[:, :, None]
