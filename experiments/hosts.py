"""Several processes, on one machine or many, as one run: the flag --hosts of every script.

    --hosts=auto                     as JAX finds them: a TPU pod, SLURM (srun), Open MPI (mpirun), Kubernetes
    --hosts=ADDRESS:PORT,INDEX/N     process INDEX (from 0) of N; ADDRESS:PORT is of process 0

Every process is started with the same command line (but for INDEX) and the same --root, on a disk they share. The first
one writes artifacts, reports and the last line; the others keep their logs in ROOT/logs/host-INDEX.log.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from ctg_jax import hosts
from ctg_jax.types import InputError
from experiments import roots

LOST = "another process of this run has ended: the same command on all of them goes on from the last checkpoint"
_GONE = re.compile("gloo|nccl|coordination|heartbeat|connection reset|socket closed|unavailable", re.IGNORECASE)


def flag(values: flags.FlagValues) -> None:
    """Defines --hosts."""
    flags.DEFINE_string("hosts", None, "auto, or ADDRESS:PORT,INDEX/N: one run of N processes", flag_values=values)


def start(argv: Sequence[str]) -> None:
    """Joins the processes that --hosts names, where it is given; before anything runs on a device.

    Raises:
      InputError: a value that cannot be read; no cluster that JAX knows; the others did not come.
    """
    import jax

    text = _value(argv, "--hosts")
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
    if not hosts.first():
        folder = Path(roots.opened(_value(argv, "--root") or "runs")) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        sys.stderr = open(folder / f"host-{jax.process_index():03d}.log", "a", encoding="utf-8")  # noqa: SIM115
        for handler in logging.getLogger("ctg_jax").handlers:
            handler.setStream(sys.stderr)


def lost(error: BaseException) -> bool:
    """Whether an error is that another process of this run has ended, which JAX says in several types and words."""
    return hosts.count() > 1 and bool(_GONE.search(str(error)))


def _value(argv: Sequence[str], name: str) -> str | None:
    given = [a.partition("=")[2] for a in argv if a.startswith(f"{name}=")]
    return given[-1] if given else None
