"""Several processes and devices as one run: the flags of every script that describe what it runs on.

    --hosts=auto                     as JAX finds them: a TPU pod, SLURM (srun), Open MPI (mpirun), Kubernetes
    --hosts=ADDRESS:PORT,INDEX/N     process INDEX (from 0) of N; ADDRESS:PORT is of process 0

Every process is started with the same command line (but for INDEX) and the same --root, on a disk they share. The first
one writes artifacts, reports and the last line; the others keep their logs in ROOT/logs/host-INDEX.log.

    --mesh=data=8                    rows of a batch split over 8 devices, the weights on each of them
    --mesh=fsdp=-1,tensor=4          every matrix split 4 ways, rows, weights and optimizer states over what is left
    --plan=pmap                      training steps by pmap, the state replicated on each device of --mesh=data=N, or on
                                     all; by default jit
    --precision=highest              float32 products on accelerators in float32; by default "high", TensorFloat-32 or
                                     three passes in bfloat16, and for the last bit of speed "default"
    --remat                          compute blocks again in the backward pass: less memory, more time

Artifacts depend on none of these; see `ctg_jax.mesh.layout`.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from ctg_jax.mesh import layout, processes
from ctg_jax.types import InputError
from experiments import roots

LOST = "another process of this run has ended: the same command on all of them continues from the last checkpoint"
_GONE = re.compile("gloo|nccl|coordination|heartbeat|connection reset|socket closed|unavailable", re.IGNORECASE)


def flag(values: flags.FlagValues, devices: bool = True, mesh: bool = True) -> None:
    """Defines --hosts, --plan and --precision for scripts that run on devices, and --mesh and --remat for scripts that
    read a mesh."""
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    if devices:
        text("hosts", None, "auto, or ADDRESS:PORT,INDEX/N: one run of N processes")
        text("plan", "jit", "jit or pmap: how training steps are compiled")
        text("precision", None, "of float32 products on accelerators: default, high or highest")
    if mesh:
        text("mesh", None, "data=N or fsdp=N (weights split too), and tensor=N: devices")
        flags.DEFINE_boolean("remat", False, "compute blocks again in the backward pass", flag_values=values)


def chosen(argv: Sequence[str]) -> layout.Layout:
    """The layout that --mesh, --plan, --precision and --remat describe.

    Raises:
      InputError: a mesh that cannot be read, or that does not fit the devices.
    """
    text = value(argv, "--mesh")
    found = layout.read(text, switched(argv, "--remat"), value(argv, "--plan") or "jit", value(argv, "--precision"))
    with layout.laid_out(found):
        layout.training()
        layout.local_plan()
    return found


def start(argv: Sequence[str]) -> None:
    """Joins the processes that --hosts names, where it is given; before anything runs on a device.

    Raises:
      InputError: a value that cannot be read; no cluster that JAX knows; the others did not come.
    """
    import jax

    text = value(argv, "--hosts")
    if text is None or jax.distributed.is_initialized():
        return
    given = {}
    if text != "auto":
        match = re.fullmatch(r"([^,\s]+:\d+),(\d+)/(\d+)", text)
        if not match or int(match[2]) >= int(match[3]):
            raise InputError(f"--hosts={text}: expected auto, or ADDRESS:PORT,INDEX/N with INDEX below N")
        given = {"coordinator_address": match[1], "process_id": int(match[2]), "num_processes": int(match[3])}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=60, shutdown_timeout_seconds=60)
    except (ValueError, RuntimeError) as e:
        raise InputError(f"--hosts={text}: {' '.join(str(e).split())}") from None
    if not processes.first():
        folder = Path(roots.opened(value(argv, "--root") or "runs")) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        sys.stderr = open(folder / f"host-{jax.process_index():03d}.log", "a", encoding="utf-8")  # noqa: SIM115
        for handler in logging.getLogger("ctg_jax").handlers:
            handler.setStream(sys.stderr)


def lost(error: BaseException) -> bool:
    """Whether an error means that another process of this run has ended, which JAX reports in several ways."""
    return processes.count() > 1 and bool(_GONE.search(str(error)))


def switched(argv: Sequence[str], name: str) -> bool:
    """Whether the command line sets a flag that is true or false, in any spelling that absl reads."""
    return name in argv or (value(argv, name) or "").lower() in ("true", "t", "1")


def value(argv: Sequence[str], name: str) -> str | None:
    """The text of a flag as the command line gives it, or None."""
    given = [a.partition("=")[2] for a in argv if a.startswith(f"{name}=")]
    return given[-1] if given else None
