"""One vector per example, learned under a frozen model: thousands of small optimisations in one compiled loop.

A fixed number of slots works at once. As soon as a slot's example is solved, or has used up its steps, its result is
written out and the slot takes the next example of the queue, so no slot waits for the slowest one. Every example has
an optimizer of its own; what it becomes does not depend on its neighbours, on the slots or on the devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctg_jax.mesh import processes
from ctg_jax.run import checkpoint
from ctg_jax.types import PyTree

# (z [B, d], rows: leaves [B, …], frozen) -> (loss float32 [B], score float32 [B], solved bool [B])
Objective = Callable[[jax.Array, PyTree, PyTree], tuple[jax.Array, jax.Array, jax.Array]]


@struct.dataclass
class Slots:
    """What is being worked on: row int32 [B] (the number of rows where a slot is empty), z float32 [B, d], the
    optimizer's state of each, steps taken int32 [B], and the best z so far with its loss and score."""

    row: jax.Array
    z: jax.Array
    opt: PyTree
    step: jax.Array
    best: tuple[jax.Array, jax.Array, jax.Array]


@struct.dataclass
class Found:
    """Results of N rows, and one more that is never read: z float32 [N + 1, d] of the lowest loss, or of the moment it
    was solved; loss and score float32, steps int32, solved bool, [N + 1] each."""

    z: jax.Array
    loss: jax.Array
    score: jax.Array
    steps: jax.Array
    solved: jax.Array


@struct.dataclass
class SearchState:
    """Everything that a search is at one moment; next int32 [1]: the first row that no slot has taken."""

    slots: Slots
    found: Found
    next: jax.Array


def begin(start: jax.Array, tx: optax.GradientTransformation, slots: int) -> SearchState:
    """A search at its start; start float32 [N + 1, d], of which the last row only fills empty slots."""
    n, d = start.shape[0] - 1, start.shape[1]
    row = jnp.minimum(jnp.arange(slots, dtype=jnp.int32), n)
    zeros = jnp.zeros(n + 1, jnp.float32)
    nothing = Found(jnp.zeros((n + 1, d)), zeros, zeros, zeros.astype(jnp.int32), zeros.astype(bool))
    return SearchState(_fresh(row, start[row], tx), nothing, jnp.full((1,), min(slots, n), jnp.int32))


def advance(
    search: SearchState,
    start: jax.Array,
    rows: PyTree,
    frozen: PyTree,
    *,
    objective: Objective,
    tx: optax.GradientTransformationExtraArgs,
    steps: int,
    iterations: int,
) -> SearchState:
    """At most `iterations` updates of every slot; ends early when no row is left.

    Args:
      start: float32 [N + 1, d], where each z begins. rows: leaves [N + 1, …], what the objective reads of each row.
      frozen: what it reads for all of them.
      tx: the optimizer of one z [d]; its update is given `value`, the loss, as `optax.contrib.reduce_on_plateau` needs.
      steps: updates that a row is given before it counts as unsolved.
    """
    n = start.shape[0] - 1

    def total(z, at):
        loss, score, solved = objective(z, at, frozen)
        return jnp.sum(loss), (loss, score, solved)

    def more(carry):
        search, i = carry
        return (i < iterations) & jnp.any(search.slots.row < n)

    def body(carry):
        search, i = carry
        s = search.slots
        grad, (loss, score, solved) = jax.grad(total, has_aux=True)(s.z, jax.tree.map(lambda x: x[s.row], rows))
        better = solved | (loss < s.best[1])
        best = jax.tree.map(lambda new, old: _where(better, new, old), (s.z, loss, score), s.best)
        done = solved | (s.step >= steps) | (s.row == n)
        at = jnp.where(done, s.row, n)
        found = Found(
            *(old.at[at].set(new) for old, new in zip(_fields(search.found), (*best, s.step, solved), strict=True))
        )
        # Slots that are free take the next rows of the queue, in order.
        taken = search.next[0] + jnp.cumsum(done, dtype=jnp.int32) - 1
        row = jnp.where(done, jnp.minimum(taken, n), s.row)
        update, opt = jax.vmap(lambda g, o, z, value: tx.update(g, o, z, value=value))(grad, s.opt, s.z, loss)
        moved = Slots(row, s.z + update, opt, s.step + 1, best)
        slots = jax.tree.map(lambda new, old: _where(done, new, old), _fresh(row, start[row], tx), moved)
        left = jnp.minimum(search.next + jnp.sum(done, dtype=jnp.int32), n)
        return SearchState(slots, found, left), i + 1

    return jax.lax.while_loop(more, body, (search, jnp.zeros((), jnp.int32)))[0]


def over_mesh(mesh: Mesh, **options: Any) -> Callable[[SearchState, jax.Array, PyTree, PyTree], SearchState]:
    """`advance` over a mesh with the axis "data", to be compiled.

    Each device searches rows of its own: leaves are split along their first axis (N + 1 rows and all the slots of a
    device for each), and no device ever waits for another.
    """

    def run(search, start, rows, frozen):
        return advance(search, start, rows, frozen, **options)

    if mesh.size == 1:
        return run
    each, all_ = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(run, mesh=mesh, in_specs=(each, each, each, all_), out_specs=each, check_vma=False)


def shrink(search: SearchState, slots: int, devices: int = 1) -> SearchState:
    """The same search in fewer slots on each device: those at work come first. Reads the rows back to the host."""
    row = processes.read(search.slots.row).reshape(devices, -1)
    if row.shape[1] == slots:
        return search
    empty = search.found.loss.shape[0] // devices - 1
    order = np.argsort(row == empty, axis=1, kind="stable")[:, :slots]
    index = (order + np.arange(devices)[:, None] * row.shape[1]).reshape(-1)
    return search.replace(slots=jax.tree.map(lambda x: processes.read(x)[index], search.slots))


def solve(
    run: Callable[[SearchState, jax.Array, PyTree, PyTree], SearchState],
    start: np.ndarray,
    rows: PyTree,
    frozen: PyTree,
    tx: optax.GradientTransformation,
    slots: int,
    mesh: Mesh,
    *,
    least: int = 8,
    keep: Path | None = None,
    save_every: float = 60.0,
    progress: Callable[[int], None] = lambda finished: None,
) -> dict[str, np.ndarray]:
    """z [N, d], loss, score, steps and solved [N] of N rows, found by `run` (`over_mesh`, compiled).

    Slots are reduced while three quarters of them are empty, down to `least`, so that the last difficult rows do not
    cost a whole batch. Several processes search together, on the devices of all of them.

    Args:
      start: float32 [N, d]. rows: numpy leaves [N, …].
      slots: rows at work at once on each device.
      keep: where a checkpoint of the search is written every `save_every` seconds, and from which it is continued.
      progress: is called with the number of rows that are finished.
    """
    n, devices = len(start), mesh.size
    per_device = -(-n // devices)
    # Row j goes to device j mod devices; each device has one more row of zeros that empty slots read.
    place = np.arange(n) % devices * (per_device + 1) + np.arange(n) // devices
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def spread(x):
        out = np.zeros((devices * (per_device + 1), *x.shape[1:]), x.dtype)
        out[place] = x
        return out

    start, rows = jax.tree.map(spread, (np.asarray(start), rows))
    parts = [begin(x, tx, min(slots, per_device)) for x in np.split(start, devices)]
    search = processes.everywhere(jax.tree.map(lambda *x: np.concatenate(x), *parts), sharding)
    start, rows = processes.everywhere((start, rows), sharding)
    if keep is not None and (keep / checkpoint.MANIFEST).exists():
        size = checkpoint.read_meta(keep)["slots"]
        search = checkpoint.load(keep, processes.everywhere(shrink(search, size, devices), sharding))
    saved = time.monotonic()
    while True:
        search = run(search, start, rows, frozen)
        busy = (processes.read(search.slots.row) < per_device).reshape(devices, -1).sum(1)
        waiting = devices * per_device - int(processes.read(search.next).sum())
        progress(max(0, n - int(busy.sum()) - waiting))
        if not busy.any():
            break
        size = len(search.slots.row) // devices
        while waiting == 0 and size > least and busy.max() <= size // 4:
            size = max(least, size // 4)
        search = processes.everywhere(shrink(search, size, devices), sharding)
        if keep is not None and processes.agree(time.monotonic() - saved >= save_every):
            checkpoint.save(keep, search, {"slots": size})
            saved = time.monotonic()
    found = search.found
    return {k: processes.read(getattr(found, k))[place] for k in ("z", "loss", "score", "steps", "solved")}


def _fresh(row: jax.Array, z: jax.Array, tx: optax.GradientTransformation) -> Slots:
    zeros = jnp.zeros(row.shape, jnp.float32)
    return Slots(row, z, jax.vmap(tx.init)(z), zeros.astype(jnp.int32), (z, zeros + jnp.inf, zeros))


def _where(rows: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _fields(found: Found) -> tuple[jax.Array, ...]:
    return found.z, found.loss, found.score, found.steps, found.solved
