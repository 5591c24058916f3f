"""Roots in an object store (gs://, s3://, az://), through `etils.epath`, the path library of Orbax.

Stages work in a local directory. A finished artifact is copied to the store and fetched from it by machines that lack
it; of an unfinished training only the last checkpoint is copied. An object store has neither renames nor locks, so the
object that makes the others valid is written last: DONE of an artifact and manifest.json of a checkpoint. Two machines
that run one stage at the same time write the same objects.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctg_jax.io import atomic, loads, locked, read_json, write_text
from ctg_jax.mesh import processes
from ctg_jax.run.seal import check_inside
from ctg_jax.types import InputError

STEPS, MANIFEST, ORIGIN = "steps", "manifest.json", ".store"


class Store(os.PathLike):
    """A root for `ctg_jax.run.stage.stage`: a location in an object store, and the local directory where stages work.

    Args:
      url: such as gs://bucket/folder; anything that `epath.Path` opens, with gcsfs, s3fs or adlfs installed.
      local: made if it is missing; on a disk that all processes of a run share. It may be lost at any time.
    """

    def __init__(self, url: str, local: str | os.PathLike):
        from etils import epath

        self.url, self.local = url.rstrip("/"), Path(local).absolute()
        with self._reached():
            self.far = epath.Path(self.url)

    def __fspath__(self) -> str:
        return str(self.local)

    def __str__(self) -> str:
        return self.url

    def begin(self) -> None:
        """Makes the local directory and records in it what it is a copy of, for `step_saved`."""
        self.local.mkdir(parents=True, exist_ok=True)
        if not (self.local / ORIGIN).exists():
            write_text(self.local / ORIGIN, self.url)

    def fetch(self, path: Path) -> None:
        """Copies a finished artifact from the store into its local directory, unless it is there already."""
        far = self._far(path)
        if (path / "DONE").exists():
            return
        with self._reached():
            if not (far / "DONE").exists():
                return
            with locked(path):
                if (path / "DONE").exists():
                    return
                names = check_inside(path, _named(_json(far / "DONE")), self.local, far / "DONE")
                shutil.rmtree(path, ignore_errors=True)
                for name in names:
                    _copy(far / name, path / name)
                _copy(far / "DONE", path / "DONE")

    def keep(self, path: Path) -> None:
        """Copies a finished artifact to the store, unless it is there already."""
        far = self._far(path)
        with self._reached():
            if (far / "DONE").exists():
                return
            names = check_inside(path, _named(read_json(path / "DONE")), self.local, path / "DONE")
            for name in names:
                _copy(path / name, far / name)
            _copy(path / "DONE", far / "DONE")
            for folder in _steps(
                far
            ):  # checkpoints from before it was finished; removed last, so that a kill loses none
                if not any((far / name).is_relative_to(folder) for name in names):
                    folder.rmtree()

    def keep_files(self, folder: Path) -> None:
        """Copies every file of a local directory that is not an artifact, such as a report."""
        with self._reached():
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                _copy(file, self._far(file))

    def fetch_steps(self, path: Path) -> None:
        """Fetches the last checkpoint of each training of an unfinished stage, with the metrics up to it, if it is
        later than the local one."""
        with self._reached():
            for far in _steps(self._far(path)):
                here = self.local / far.relative_to(self.far)
                found = sorted(int(p.name) for p in far.iterdir() if (p / MANIFEST).exists())
                mine = [int(p.name) for p in here.glob("[0-9]*")] if here.is_dir() else []
                if not found or found[-1] <= max(mine, default=-1):
                    continue
                last = far / f"{found[-1]:08d}"
                new = here / f".{last.name}.new"
                named = _json(last / MANIFEST)["body"]["files"]
                names = check_inside(new, named, self.local, last / MANIFEST)
                shutil.rmtree(new, ignore_errors=True)  # what an interrupted fetch left
                for name in names:
                    _copy(last / name, new / name)
                _copy(last / MANIFEST, new / MANIFEST)
                if (last / "metrics.jsonl").exists():
                    _copy(last / "metrics.jsonl", here.parent / "metrics.jsonl")
                os.replace(new, here / last.name)

    def _far(self, path: Path) -> Any:
        return self.far / path.relative_to(self.local).as_posix()

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as e:  # every backend has errors of its own
            why = " ".join(f"{type(e).__name__}: {e}".split())
            raise InputError(
                f"root {self.url} cannot be reached ({why}): check address, credentials and that gcsfs, s3fs or "
                f"adlfs is installed; what was made is in {self.local}, and the same command continues"
            ) from e


def step_saved(step: Path) -> None:
    """Copies a checkpoint …/steps/N of a stage, and the metrics beside it, to the store, and removes earlier ones
    there; does nothing where the root is not the local directory of a store."""
    step = processes.real(Path(step).absolute())
    local = next((folder for folder in step.parents if (folder / ORIGIN).is_file()), None)
    if local is None or not processes.first():
        return
    store = Store((local / ORIGIN).read_text("utf-8"), local)
    far = store._far(step)
    with store._reached():
        for name in read_json(step / MANIFEST)["body"]["files"]:
            _copy(step / name, far / name)
        metrics = step.parent.parent / "metrics.jsonl"
        if metrics.exists():
            _copy(metrics, far / "metrics.jsonl")
        _copy(step / MANIFEST, far / MANIFEST)
        for other in far.parent.iterdir():
            if other.name != step.name:
                other.rmtree()


def _json(far: Any) -> Any:
    """The value in a JSON file of the store."""
    return loads(far.read_text())


def _named(sums: dict) -> list[str]:
    """The files that DONE lists, without itself."""
    return [name for name in sums if name != "DONE"]


def _steps(far: Any) -> Iterator[Any]:
    """The folders `steps` below a directory of the store."""
    if not far.exists():
        return
    for p in far.iterdir():
        if p.name == STEPS:
            yield p
        elif p.is_dir():
            yield from _steps(p)


def _copy(source: Any, target: Any) -> None:
    """Copies one file; to a local disk atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    local = isinstance(target, Path) and not str(target).startswith(("gs:", "s3:", "az:"))
    with source.open("rb") as a, atomic(target) if local else target.open("wb") as b:
        shutil.copyfileobj(a, b, 1 << 20)
