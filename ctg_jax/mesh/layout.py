"""The layout of a run: on which devices its arrays are placed. The scripts' --mesh, --plan and --precision choose it.

Training spans the devices of all processes. Everything else (decoding, scoring, encoding) stays within a process, which
holds the language model on its own devices and computes rows of its own. A layout changes time, memory and
the last digits of sums only, so it is no part of what identifies an artifact.

A session has a layout, and `ctg_jax.run.stage.stage` puts it in force while a stage runs (`laid_out`).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ctg_jax.mesh import processes
from ctg_jax.mesh.plan import Plan
from ctg_jax.mesh.rules import ENCODER, NETWORKS, whole_over_data
from ctg_jax.types import InputError, PyTree

PRECISIONS = ("default", "high", "highest")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices, memory savings and matrix precision that a run asks for.

    Attributes:
      data, tensor: sizes of the mesh axes; data -1 takes the devices that are left. tensor splits every matrix of the
        language model, within one process.
      sharded: weights and optimizer states are split over `data` too (fully sharded data parallel).
      remat: compute each block of the language model again in the backward pass in place of keeping what it made.
      mesh: whether devices were asked for at all.
      precision: of float32 products on accelerators, as `jax.default_matmul_precision` names it: "high" (TensorFloat-32
        on GPUs, three passes in bfloat16 on TPUs), "highest" (float32) or "default" (what is fastest). None: "high",
        unless the configuration of JAX has a choice already. A CPU always computes in float32.
      mode: how train steps are compiled: "jit", or "pmap", one program per device with the state replicated.
    """

    data: int = -1
    tensor: int = 1
    sharded: bool = False
    remat: bool = False
    mesh: bool = True
    mode: str = "jit"
    precision: str | None = None

    def __post_init__(self):
        if self.precision not in (None, *PRECISIONS):
            raise InputError(f"--precision={self.precision}: expected one of {', '.join(PRECISIONS)}")

    def plan(self, devices: int, data: int, local: bool = False) -> Plan:
        """The plan over that number of devices; InputError where the axes do not fit them."""
        if devices % self.tensor or (data != -1 and data * self.tensor > devices):
            where = "of a process" if local else "in all"
            raise InputError(f"--mesh: data={data}, tensor={self.tensor} do not fit the {devices} devices {where}")
        if not local and processes.count() > 1 and data != -1 and data * self.tensor < devices:
            raise InputError(
                f"--mesh: data={data}, tensor={self.tensor} leave out some of the {devices} devices of "
                f"{processes.count()} processes: use all of them (data=-1)"
            )
        axes = {"data": devices // self.tensor if data == -1 else data, "tensor": self.tensor}
        rules = ENCODER + NETWORKS if self.sharded else whole_over_data(ENCODER + NETWORKS)
        return Plan(axes={k: v for k, v in axes.items() if k == "data" or v > 1}, rules=rules, local=local)

    def _replicas(self, rows: int | None) -> int:
        """Devices of a `pmap`, one replica of the state on each."""
        if self.mesh and self.data != -1:
            return dict(self.plan(jax.device_count(), self.data).axes)["data"]
        return jax.device_count() if rows is None or processes.count() > 1 else math.gcd(rows, jax.device_count())


_NONE = Layout(mesh=False)
_current: contextvars.ContextVar[Layout] = contextvars.ContextVar("layout", default=_NONE)


def read(text: str | None, remat: bool = False, mode: str = "jit", precision: str | None = None) -> Layout:
    """The layout that the text `fsdp=4,tensor=2` or `data=8` describes; "fsdp" is "data" with the weights split too.
    None asks for no mesh.

    Raises:
      InputError: another axis, both of these, a size that is no positive number (or -1 for data and fsdp); another mode
        than "jit" and "pmap"; fsdp or tensor with "pmap", which replicates the state.
    """
    if mode not in ("jit", "pmap"):
        raise InputError(f"--plan={mode}: expected jit or pmap")
    if text is None:
        return Layout(remat=remat, mesh=False, mode=mode, precision=precision)
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(data|fsdp|tensor)=(-1|[1-9]\d*)\s*", part)
        if not match or match[1] in sizes or (match[1] == "tensor" and match[2] == "-1"):
            raise InputError(f"--mesh={text}: expected data=N or fsdp=N (-1: the devices that are left), and tensor=N")
        sizes[match[1]] = int(match[2])
    if {"data", "fsdp"} <= set(sizes):
        raise InputError(f"--mesh={text}: give data (weights on every device) or fsdp (weights split), not both")
    sharded = "fsdp" in sizes
    if mode == "pmap" and set(sizes) != {"data"}:
        raise InputError(
            f"--plan=pmap replicates the state, but --mesh={text} splits it: give --mesh=data=N, or no mesh"
        )
    data, tensor = sizes.get("fsdp", sizes.get("data", -1)), sizes.get("tensor", 1)
    return Layout(data, tensor, sharded, remat, mode=mode, precision=precision)


@contextlib.contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Runs the body of the `with` block in a layout and with its matrix precision."""
    token = _current.set(layout)
    try:
        with _products(layout.precision):
            yield
    finally:
        _current.reset(token)


def _products(precision: str | None) -> contextlib.AbstractContextManager:
    """See `Layout.precision`."""
    chosen = precision is None and jax.config.jax_default_matmul_precision is not None
    if chosen or jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision or "high")


def current() -> Layout:
    """The layout in force."""
    return _current.get()


def remat() -> bool:
    """Whether blocks are computed again in the backward pass."""
    return _current.get().remat


def training(rows: int | None = None) -> Plan:
    """The plan of a training loop, over the devices of all processes. Where no mesh was asked for, rows are split over
    all devices if there are several processes, and over as many accelerators as divide the rows of a batch if not.
    `pmap` without a mesh takes all devices, or in a single process as many as divide the rows."""
    layout = _current.get()
    if layout.mode == "pmap":
        return Plan(mode="pmap", axes={"data": layout._replicas(rows)})
    if layout.mesh:
        return layout.plan(jax.device_count(), layout.data)
    if processes.count() > 1:
        return Plan(axes={"data": jax.device_count()})
    several = rows and jax.default_backend() != "cpu"  # the devices of a CPU share its cores
    return Plan(axes={"data": math.gcd(rows, jax.local_device_count()) if several else 1})


def local_plan() -> Plan | None:
    """The plan of what stays within a process; None where no mesh was asked for."""
    layout = _current.get()
    if not layout.mesh:
        return None
    here = jax.local_device_count()
    data = layout.data if processes.count() == 1 else -1
    return layout.plan(here, data, local=True)


def default_sharding() -> Sharding:
    """Where the arrays of a process are placed by default: replicated over its `local_plan`, or on its first device."""
    plan = local_plan()
    if plan is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(plan.mesh, PartitionSpec())


def to_local(state: PyTree, plan: Plan) -> PyTree:
    """A state that `plan` trained, moved to where the other arrays of this process are placed."""
    here = local_plan()
    if processes.count() > 1:
        state = processes.local(state)
        return state if here is None else here.place(state)
    return jax.device_put(state, default_sharding()) if here is None and plan.size > 1 else state


def accelerators() -> tuple[jax.Device, ...]:
    """The accelerators of this machine, for rows of their own. None for a CPU, whose devices share its cores, and none
    where a mesh was asked for, over which `run_rows` splits rows itself."""
    return () if jax.default_backend() == "cpu" or local_plan() else tuple(jax.local_devices())


def run_rows(
    fn: Callable[[Any, PyTree, PyTree], PyTree],
    static: Any,
    whole: PyTree,
    rows: PyTree,
    *,
    devices: Sequence[jax.Device] = (),
    split: bool = True,
) -> PyTree:
    """`fn(static, whole, rows)`: the one way in which the rows of a batch are split over what the run has.

    Several processes take equal parts where their number divides the batch, and each gets the whole result; otherwise
    all of them compute all rows. Within a process rows are split over as many of `devices` as divide them, each of
    which runs a program of its own and waits for no other; or over the mesh on which `whole` is placed, if it divides
    them.

    Args:
      fn: pure and hashable; leaves of `rows` and of the result are [B, …], and rows do not read each other.
      static: hashable. whole: what every row reads.
      split: False keeps the batch together, for a `whole` with numbers for each row.
    """
    leaves = jax.tree.leaves(rows)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return fn(static, whole, rows)
    size = leaves[0].shape[0]
    parts = processes.count() if split and size % processes.count() == 0 else 1
    rows = processes.rows(rows) if parts > 1 else rows
    used = tuple(devices[: math.gcd(size // parts, len(devices))]) if split else ()
    if len(used) > 1:
        out = _over_devices(fn, static, used, replicated(whole, used), rows)
    else:
        out = fn(static, whole, split_rows(rows, mesh_of(whole)))
    return processes.gather(out) if parts > 1 else out


def replicated(values: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Values on every one of several devices; as they are for fewer than two."""
    if len(devices) < 2:
        return values
    return jax.device_put(values, NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec()))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _over_devices(fn, static, devices, whole, rows):
    """`fn` as one program over devices, in which rows never meet: no device waits for the longest row of another."""
    mesh, data = Mesh(np.asarray(devices), ("data",)), PartitionSpec("data")
    specs = dict(in_specs=(PartitionSpec(), data), out_specs=data)
    return jax.shard_map(partial(fn, static), mesh=mesh, check_vma=False, **specs)(whole, rows)


def mesh_of(values: PyTree) -> Mesh | None:
    """The mesh, with an axis `data`, on which arrays are placed; None where they are on none, or while tracing."""
    for x in jax.tree.leaves(values):
        where = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
        if isinstance(where, NamedSharding) and "data" in where.mesh.axis_names:
            return where.mesh
    return None


def split_rows(values: PyTree, mesh: Mesh | None) -> PyTree:
    """Leaves [B, …] with their rows split over the axis `data` of a mesh, or replicated over it where that does not
    divide their rows; unchanged without a mesh and while tracing."""
    leaves = jax.tree.leaves(values)
    if mesh is None or any(isinstance(x, jax.core.Tracer) for x in leaves):
        return values
    even = all(x.shape and x.shape[0] % mesh.shape["data"] == 0 for x in leaves)
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec("data") if even else PartitionSpec()))


def split_activations(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Inside the `with` block, models place their activations on a mesh; see `ctg_jax.mesh.plan.split`."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
