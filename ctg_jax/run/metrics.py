"""Figures of a run: one JSON object per line, and TensorBoard where wanted."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctg_jax.io import json_line, whole_rows, write_text
from ctg_jax.types import optional


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


class Writer:
    """Appends rows to a JSONL file, each flushed when written.

    Args:
      path: the file; made where it is missing.
      step: the step the run goes on from; rows of later steps, which will be computed again, are dropped.
      tensorboard: a directory for TensorBoard event files (needs the package tensorboardX), or None.
    """

    def __init__(self, path: str | os.PathLike, step: int = 0, tensorboard: str | os.PathLike | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rewind(self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._board = None
        if tensorboard is not None:
            board = optional("tensorboardX", "tensorboard")
            self._board = board.SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends {"step": step, **metrics}; values that are not finite are written as null, as JSON has no NaN."""
        row = {name: float(x) for name, x in metrics.items()}
        self._file.write(json_line({"step": step} | {k: x if math.isfinite(x) else None for k, x in row.items()}))
        self._file.flush()
        if self._board is not None:
            for name, x in row.items():
                self._board.add_scalar(name, x, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
