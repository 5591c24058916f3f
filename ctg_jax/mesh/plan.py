"""`Plan`: where arrays are placed and how a train step is compiled, as data: a mode, mesh axes and sharding rules.

The same step, state and checkpoint serve every plan. `jit` partitions one program over a mesh (data parallel, FSDP,
tensor parallel, or several at once, by the rules); `pmap` runs one program per device with the state replicated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ctg_jax import tree
from ctg_jax.control import Control
from ctg_jax.mesh.rules import REPLICATED, Rules
from ctg_jax.types import InputError, PyTree

P = PartitionSpec
Step = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to lay out and compile a train step.

    Attributes:
      mode: "jit" or "pmap".
      axes: mesh axis names and sizes, such as {"data": 4, "tensor": 2}; a size of -1 takes the devices that are
        left. The batch is split over "data". One device by default; `pmap` has the axis "data" alone.
      rules: (path regex, PartitionSpec) pairs; the first whose regex matches a leaf's whole path, or the end of it
        after a "/", decides. So a rule for parameters also serves their optimizer moments. A spec describes the
        *last* dimensions of a leaf, so one rule serves stacked [L, out, in] and unstacked [out, in] kernels. Axis
        names the mesh lacks, and axes that do not divide a dimension (GPT-2's vocabulary is 50257), are left out
        of the spec: the leaf is replicated there. Scalars and random keys are replicated without a rule.
      local: of the devices of this process alone.
    """

    mode: str = "jit"
    axes: Mapping[str, int] | tuple[tuple[str, int], ...] = (("data", 1),)
    rules: Rules = REPLICATED
    local: bool = False

    def __post_init__(self):
        axes = dict(self.axes)
        if self.mode not in ("jit", "pmap"):
            raise InputError(f"Plan: mode is {self.mode!r}, expected 'jit' or 'pmap'")
        if "data" not in axes or (self.mode == "pmap" and len(axes) > 1):
            need = "the axis 'data' alone for pmap" if self.mode == "pmap" else "an axis 'data'"
            raise InputError(f"Plan: axes are {axes}, expected {need}")
        open_axes = [name for name, size in axes.items() if size == -1]
        if len(open_axes) > 1 or any(size < 1 and size != -1 for size in axes.values()):
            raise InputError(f"Plan: axes are {axes}, expected positive sizes and at most one -1")
        if open_axes:
            rest = math.prod(size for size in axes.values() if size != -1)
            axes[open_axes[0]] = max(len(self._devices()) // rest, 1)
        object.__setattr__(self, "axes", tuple(axes.items()))
        object.__setattr__(self, "rules", tuple((pattern, spec) for pattern, spec in self.rules))

    def _devices(self) -> list[jax.Device]:
        return jax.local_devices() if self.local else jax.devices()

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(size for _, size in self.axes)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The device mesh; InputError where there are too few devices."""
        devices = self._devices()
        if self.size > len(devices):
            raise InputError(
                f"Plan: axes {dict(self.axes)} need {self.size} devices and {len(devices)} are there; use smaller axes"
            )
        names, sizes = zip(*self.axes)
        if self.mode == "pmap":
            names = ("batch",)  # as pmap names it in its outputs: other names would compile a second time
        # Automatic axes: under the default, explicit ones, indexing an embedding by sharded tokens raises.
        return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices[: self.size])

    def specs(self, values: PyTree) -> PyTree:
        """PartitionSpec of every leaf (arrays or `ShapeDtypeStruct`s): controls declare how their leaves are
        split (`Control.layout`), and the rules decide for all others.

        Raises:
          InputError: no rule matches a leaf outside controls; the message names it.
        """
        if isinstance(values, Control):
            return self._control_specs(values)

        def spec(path, x):
            return self._control_specs(x) if isinstance(x, Control) else self._spec(path, x)

        return _map_to_controls(spec, values)

    def _control_specs(self, control: Control) -> PyTree:
        declared = control.layout(lambda path: next(iter(self._found(path)), P()))

        def spec(path, x):
            if isinstance(x, Control):
                return self._control_specs(x)
            wanted = next((s for s in (declared.get(path), *self._found(path)) if s is not None), P())
            return self._fitted(wanted if len(wanted) <= len(np.shape(x)) else P(), x)

        return _map_to_controls(spec, control)

    def shardings(self, values: PyTree) -> PyTree:
        """NamedSharding of every leaf; see `specs`."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs(values), is_leaf=_is_spec)

    def place(self, values: PyTree) -> PyTree:
        """The leaves on their devices."""
        return jax.device_put(values, self.shardings(values))

    def put(self, batch: PyTree) -> PyTree:
        """A host's numpy batch, leaves [B, …], on its devices: split over "data" in row order.

        Raises:
          InputError: B is not a multiple of the data axis.
        """
        ways = dict(self.axes)["data"]
        local = max(ways // jax.process_count(), 1)
        for path, x in tree.flatten(batch).items():
            if np.ndim(x) == 0 or np.shape(x)[0] % local:
                raise InputError(
                    f"the batch field {path!r} has shape {np.shape(x)}, expected a first dimension that is a multiple "
                    f"of {local}, the data axis of the plan; change the batch size or the plan"
                )
        if self.mode == "pmap":
            return jax.tree.map(lambda x: np.reshape(x, (local, -1, *np.shape(x)[1:])), batch)
        rows = NamedSharding(self.mesh, P("data"))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), batch)

    def compile(self, make: Callable[..., Step], state: PyTree, frozen: PyTree) -> Step:
        """Compiles `make(axis=…)`, a train step, for this plan.

        Args:
          make: gives the step; called with axis=None where the compiler divides the work, else with the name of the
            axis to sum over: "batch" for `pmap`, "data" for `jit` where the batch alone is split. There each device
            adds up the gradients of its rows before they meet; the compiler would bring together the gradient of a
            weight that a low-rank change is merged into, which is many times larger than that of the change.
          state: the training state, or its shapes. `jit` donates it: use what the step returns.
          frozen: what the step only reads, or its shapes.
        """
        if self.mode == "pmap":
            devices = list(self.mesh.devices.flat)
            return jax.pmap(
                make(axis="batch"), axis_name="batch", in_axes=(None, None, 0), out_axes=(None, None), devices=devices
            )
        whole, rows = NamedSharding(self.mesh, P()), NamedSharding(self.mesh, P("data"))
        here = self.shardings(state)
        alone = self.size > 1 and dict(self.axes)["data"] == self.size
        used = jax.tree.leaves(self.specs((state, frozen)), is_leaf=_is_spec)
        if alone and not any(_names(part) for spec in used for part in spec):
            each = make(axis="data")
            specs = dict(in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
            train_step = jax.shard_map(each, mesh=self.mesh, check_vma=False, **specs)
        else:
            step = make(axis=None)

            def train_step(state, frozen, batch):
                with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # for `split`
                    return step(state, frozen, batch)

        return jax.jit(
            train_step,
            in_shardings=(here, self.shardings(frozen), rows),
            out_shardings=(here, whole),
            donate_argnums=0,
        )

    def bytes_per_device(self, values: PyTree) -> int:
        """Bytes each device holds of a tree of arrays or shapes. Needs no devices, so any mesh can be asked about."""
        sizes = dict(self.axes)
        total = 0
        for x, spec in zip(jax.tree.leaves(values), jax.tree.leaves(self.specs(values), is_leaf=_is_spec)):
            ways = math.prod(sizes[name] for part in spec if part for name in _names(part))
            total += math.prod(x.shape) * x.dtype.itemsize // ways
        return total

    def _spec(self, path: str, x: Any) -> PartitionSpec:
        shape = np.shape(x)
        if self._whole(x):
            return P()
        spec = next(iter(self._found(path)), None)
        if spec is None:
            raise InputError(
                f"no sharding rule of the plan matches {path!r} of shape {shape}; add a rule for it, or "
                f"{REPLICATED[0]!r} as the last one"
            )
        if len(spec) > len(shape):
            raise InputError(
                f"the sharding rule that matches names {len(spec)} dimensions and {path!r} has shape {shape}; put a "
                "rule of its own before it"
            )
        return self._fitted(spec, x)

    def _found(self, path: str) -> list[PartitionSpec]:
        """The spec of the first rule that matches a path, or none."""
        return [spec for pattern, spec in self.rules if re.fullmatch(f"(.*/)?({pattern})", path)][:1]

    def _whole(self, x: Any) -> bool:
        """Whether a leaf is replicated regardless of the rules: scalars, random keys, and everything under `pmap`."""
        return self.mode == "pmap" or not np.shape(x) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

    def _fitted(self, spec: PartitionSpec, x: Any) -> PartitionSpec:
        """The spec of the last dimensions extended to all dimensions, without axes that the mesh lacks or that do not
        divide."""
        if self._whole(x):
            return P()
        shape = np.shape(x)
        sizes = dict(self.axes)
        full = (None,) * (len(shape) - len(spec)) + tuple(spec)
        kept = []
        for size, part in zip(shape, full):
            names = tuple(n for n in _names(part) if sizes.get(n, 1) > 1)
            ways = math.prod(sizes[n] for n in names)
            kept.append((names if len(names) > 1 else names[0]) if names and size % ways == 0 else None)
        return P(*kept)


def split(x: jax.Array, *parts: str | None) -> jax.Array:
    """x, its last dimensions split over the named axes of the mesh it is computed on, and whole where None is given;
    x itself where there is no mesh, or one without these axes.

    Activations need it: from the weights alone the compiler takes fully sharded weights for a split of the features and
    moves activations in place of weights. A dimension that its axis does not divide is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {n: mesh.shape[n] for n in mesh.auto_axes if mesh.shape[n] > 1}
    if not sizes:
        return x
    free = P.UNCONSTRAINED
    dims = x.shape[x.ndim - len(parts) :]
    wanted = [
        None if part is None else part if part in sizes and size % sizes[part] == 0 else free
        for size, part in zip(dims, parts)
    ]
    return jax.lax.with_sharding_constraint(x, P(*(free,) * (x.ndim - len(parts)), *wanted))


def _names(part: Any) -> tuple[str, ...]:
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)


def _map_to_controls(fn: Callable[[str, Any], Any], values: PyTree) -> PyTree:
    """`tree.map_with_path` that hands the controls inside `values` to `fn` whole."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: fn(tree.path_str(path), x), values, is_leaf=lambda x: x is not values and isinstance(x, Control)
    )


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
