"""Streams of one model that differ by low-rank changes of its weights, read in one pass.

Each expert of DExperts is the base model under a LoRA of its own. Apart, N experts read the weights N times for every
token. Together they are one `Stream` with N copies, whose rows meet the shared kernels in one product and have their
low-rank changes added beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax.control import Control
from ctg_jax.controls.delta import Delta, with_rows
from ctg_jax.controls.streams import Stream


@struct.dataclass
class CopyDelta(Control):
    """Low-rank changes of weights for a stream with N copies, one for each copy: W + b_n a_n.

    Attributes:
      changes: path of a kernel in the stacked layout -> float32 {"a": [N, L, r, in], "b": [N, L, out, r]}.
    """

    changes: dict[str, dict[str, jax.Array]]

    def row_weights(self, params, state):
        return with_rows(params, self.changes)


def joined(streams: Iterable[Stream]) -> tuple[Stream, ...]:
    """The streams in their order, neighbours that can be read in one pass as one stream with copies: those that are not
    bound yet and are one model under low-rank changes of the same kernels and ranks, with the same prompt."""
    out: list[Stream] = []
    for kind, found in groupby(streams, _kind):
        group = list(found)
        out += group if kind is None or len(group) == 1 else [_copies(group)]
    return tuple(out)


def _kind(stream: Stream) -> tuple | None:
    """What streams of one pass share; None for one that is read by itself."""
    if stream.bound or stream.ahead or stream.copies is not None or stream.params is not None:
        return None
    if type(stream.control) is not Delta:
        return None
    changes = stream.control.changes
    low = all(set(change) == {"a", "b"} for change in changes.values())
    if not (low and all(path.startswith("layers/") and path.endswith("/kernel") for path in changes)):
        return None
    return stream.lm, stream.of, stream.own, stream.before, jax.tree.map(jnp.shape, changes)


def _copies(streams: Sequence[Stream]) -> Stream:
    scaled = [
        {path: {"a": x["a"], "b": stream.control.scale * x["b"]} for path, x in stream.control.changes.items()}
        for stream in streams
    ]
    changes = jax.tree.map(lambda *x: jnp.stack(x), *scaled)
    return streams[0].replace(control=CopyDelta(changes), copies=len(streams))
