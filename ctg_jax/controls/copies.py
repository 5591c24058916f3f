"""Streams of one model that differ by low-rank changes of its weights, read in one pass.

Each expert of DExperts is the base model under a LoRA of its own. Apart, N experts read the weights N times for every
token. Together they are one `Stream` with N copies, whose rows meet the shared kernels in one product and have their
low-rank changes added beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

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
      changes: path of a kernel in the stacked layout -> {"a": [N, L, r, in], "b": [N, L, out, r]}.
    """

    changes: dict[str, dict[str, jax.Array]]

    def row_weights(self, params, state):
        return with_rows(params, self.changes)


def joined(streams: Sequence[Stream]) -> tuple[Stream, ...]:
    """The streams in their order, neighbours that can be read in one pass as one stream with copies: those that are not
    bound yet and are one model under low-rank changes of the same kernels and ranks, with the same prompt."""
    out: list[Stream] = []
    together: list[Stream] = []

    def done():
        out.extend(together if len(together) < 2 else [_copies(together)])
        together.clear()

    for stream in streams:
        if together and not (_joins(stream) and _kind(stream) == _kind(together[0])):
            done()
        (together if _joins(stream) else out).append(stream)
    done()
    return tuple(out)


def _joins(stream: Stream) -> bool:
    if stream.bound or stream.ahead or stream.copies is not None or type(stream.control) is not Delta:
        return False
    paths, changes = stream.control.changes, stream.control.changes.values()
    low = all(set(change) == {"a", "b"} for change in changes)
    return stream.params is None and low and all(p.startswith("layers/") and p.endswith("/kernel") for p in paths)


def _kind(stream: Stream):
    """What streams of one pass share."""
    return stream.lm, stream.of, stream.own, stream.before, jax.tree.map(jnp.shape, stream.control.changes)


def _copies(streams: Sequence[Stream]) -> Stream:
    scaled = [
        {path: {"a": x["a"], "b": stream.control.scale * x["b"]} for path, x in stream.control.changes.items()}
        for stream in streams
    ]
    changes = jax.tree.map(lambda *x: jnp.stack(x), *scaled)
    return streams[0].replace(control=CopyDelta(changes), copies=len(streams))
