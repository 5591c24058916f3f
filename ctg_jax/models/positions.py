"""Logits a few positions at a time: what a loss or a score needs of them, without ever holding those of a whole batch.

Logits float32 [B, N, V] of a batch are the largest array of scoring and training: 1.3 GB for 32 rows of 40 tokens and a
vocabulary of 262,144, several times over in a backward pass. But a score needs one number of each position, and a loss
a few. `reduced` computes these numbers chunk by chunk, and its backward pass makes the logits of a chunk again, which
costs one more product with the unembedding. A batch that fits into one chunk runs as one program without either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from ctg_jax.control import IDENTITY, Control, edit_logits
from ctg_jax.models.lm import LM
from ctg_jax.types import InputError, Params, PyTree

# Logits of one chunk, B · M · V: 256 MB in float32. A product with the unembedding this large runs at full speed, and
# the few copies of it that a loss makes fit beside any model that has such a vocabulary.
CHUNK = 2**26


@struct.dataclass
class Read:
    """A text that a language model has read, before any logits were computed.

    Attributes:
      params: of `lm`; those that its unembedding reads with.
      hidden: float [B, S, D], the states after the final norm.
      tokens, mask: int32 and bool [B, T], the tokens that were read; S > T where a control put vectors before them.
        None where `control` does not act on logits.
      control: bound to its weights (`Control.bind`). state: its state before the first call of `Control.logits`.
    """

    params: Params
    hidden: jax.Array
    tokens: jax.Array | None = None
    mask: jax.Array | None = None
    control: Control = IDENTITY
    state: Any = ()
    lm: LM = struct.field(pytree_node=False, kw_only=True)

    def logits(self, new: int) -> tuple[jax.Array, Any]:
        """(controlled logits float32 [B, M, V] of the last M = `new` positions, the control's state after them)."""
        z = self.lm.unembed(self.params, self.hidden[:, self.hidden.shape[1] - new :])
        return edit_logits(self.control, z, self.hidden, self.tokens, self.mask, self.state)


def reduced(
    reads: Read | Sequence[Read],
    reduce: Callable[..., PyTree],
    *values: jax.Array,
    chunk: int | None = None,
) -> PyTree:
    """`reduce(z, …, *values)` for the logits z float32 [B, N, V] of each reading, a chunk of positions at a time.

    The hook `Control.logits` gives the same logits for M positions at once as for one at a time, so chunks of any size
    give the same result, up to rounding.

    Args:
      reads: one reading, or several of the same completion that are reduced together, such as two whose KL is wanted.
      reduce: called with logits [B, M, V] of each reading and the same positions of each of `values`; returns arrays
        [B, M, …]. It must treat positions independently, and what it returns should be small: it is kept.
      values: arrays [B, N, …] with the positions as their second axis, at least one; the last N positions of every
        reading are theirs.
      chunk: the number of logits of one reading in a chunk, at most, but at least one position; None: `CHUNK`.

    Returns:
      What `reduce` returns, with leaves [B, N, …].
    """
    reads = (reads,) if isinstance(reads, Read) else tuple(reads)
    if not values:
        raise InputError("reduced needs at least one array [B, N, …] of values, which tells the number of positions.")
    n = values[0].shape[1]

    def part(states, positions):
        texts, values = positions
        now = [r.replace(hidden=h, tokens=t, mask=m, state=s) for r, (h, t, m), s in zip(reads, texts, states)]
        logits, states = zip(*(r.logits(values[0].shape[1]) for r in now))
        return states, reduce(*logits, *values)

    states = tuple(r.state for r in reads)
    given = (tuple((r.hidden, r.tokens, r.mask) for r in reads), values)
    size, later = chunks(len(values[0]), n, max(r.lm.vocab for r in reads), CHUNK if chunk is None else chunk)
    if not later:
        return part(states, given)[1]

    def apart(x):
        x = x[:, x.shape[1] - later * size :]
        return jnp.moveaxis(x.reshape(len(x), later, size, *x.shape[2:]), 1, 0)

    begin = jax.tree.map(lambda x: x[:, : x.shape[1] - later * size], given)
    states, first = jax.checkpoint(part)(states, begin)
    _, rest = lax.scan(jax.checkpoint(part, prevent_cse=False), states, jax.tree.map(apart, given))

    def together(a, b):
        b = jnp.moveaxis(b, 0, 1)
        return jnp.concatenate([a, b.reshape(len(b), later * size, *b.shape[3:])], axis=1)

    return jax.tree.map(together, first, rest)


def chunks(rows: int, new: int, vocab: int, chunk: int = CHUNK) -> tuple[int, int]:
    """(M, C): after the first chunk come C of M positions each, with rows · M · vocab ≤ chunk where one position fits.

    C is 0 where everything fits into the first chunk. Otherwise the first reads the prompt as well and so is a program
    of its own, whose logits XLA may keep beside those of another chunk. M is therefore the size, from half the largest
    to the largest, that leaves the fewest positions for the first.
    """
    most = max(1, chunk // max(1, rows * vocab))
    if new <= most:
        return new, 0
    size = min(range(most, most // 2, -1), key=lambda m: (new - 1) % m)
    return size, (new - 1) // size
