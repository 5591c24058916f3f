"""Figures of a run: one JSON object per line, and curves on TensorBoard or Weights & Biases where wanted."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctg_jax.io import json_line, read_json, whole_rows, write_text
from ctg_jax.mesh import processes
from ctg_jax.types import InputError, optional

BOARDS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # name, which is also that of the extra -> module


def rewind(path: Path, step: int) -> None:
    """Drops from a JSONL file, atomically, the rows of steps after `step` and lines that were cut short. Rows without
    a step stay."""
    if path.exists():
        write_text(path, "".join(text for text, row in whole_rows(path) if row.get("step", step) <= step))


def drop_figures(path: Path) -> None:
    """Drops from a JSONL file, atomically, the rows without a step, which a stage that starts again writes again, and
    lines that were cut short. Rows with a step belong to the training loop, which calls `rewind`."""
    if path.exists():
        write_text(path, "".join(text for text, row in whole_rows(path) if "step" in row))


def check_boards(names: Sequence[str]) -> tuple[str, ...]:
    """The names of boards, each of which can be used here.

    Raises:
      InputError: an unknown name; a library that is not installed.
    """
    for name in names:
        if name not in BOARDS:
            raise InputError(f"boards names {name!r}, expected some of {', '.join(BOARDS)}")
        optional(BOARDS[name], name)
    return tuple(names)


class Writer:
    """Appends rows to a JSONL file, each flushed when written, and draws them on boards. With several processes, the
    first one draws.

    Args:
      path: the file; made where it is missing. The folder that holds it is the run: TensorBoard's event files are in
        its folder `tensorboard`, and on Weights & Biases its name is that of the run, in the project ctg_jax.
      step: the step the run goes on from; rows of later steps, which will be computed again, are dropped.
      boards: some of `BOARDS`.

    Raises:
      InputError: as `check_boards`.
    """

    def __init__(self, path: str | os.PathLike, step: int = 0, boards: Sequence[str] = ()):
        boards = check_boards(boards)
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rewind(self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._board, self._run = None, None
        if "tensorboard" in boards and processes.first():
            board = optional(BOARDS["tensorboard"], "tensorboard")
            self._board = board.SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)
        if "wandb" in boards and processes.first():
            self._run = _wandb_run(self.path.parent)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends {"step": step, **metrics}; values that are not finite are written as null, as JSON has no NaN."""
        row = {name: float(x) for name, x in metrics.items()}
        self._file.write(json_line({"step": step} | {k: x if math.isfinite(x) else None for k, x in row.items()}))
        self._file.flush()
        if self._board is not None:
            for name, x in row.items():
                self._board.add_scalar(name, x, step)
        if self._run is not None:
            self._run.log(row, step=step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def _wandb_run(folder: Path) -> Any:
    """A run of Weights & Biases for the run in a folder, which goes on where it was interrupted. Its own files are
    beside the folder, since those inside it belong to an artifact."""
    spec = folder / "spec.json"
    return optional(BOARDS["wandb"], "wandb").init(
        project="ctg_jax", id=folder.name, name=folder.name, group=folder.name.rpartition("-")[0], resume="allow",
        dir=str(folder.parent), config=read_json(spec)["config"] if spec.exists() else {},
    )  # fmt: skip
