"""`Artifact`: what a finished stage left. `open_artifact`: one from its path. `open_lm`: the language model in one."""

from __future__ import annotations

import dataclasses
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from ctg_jax.io import read_json, read_jsonl
from ctg_jax.mesh import layout
from ctg_jax.run.identity import digest_model
from ctg_jax.run.seal import verify
from ctg_jax.run.session import Session
from ctg_jax.types import InputError


class UnfinishedError(InputError):
    """In a dry run (`Session.dry_run`), something asked for the contents of a stage that has not run."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A finished stage: its directory and its id (12 hexadecimal digits). Two are equal where these are.

    opened_in: the session that made or found it; None gives it a session of its own.
    """

    path: Path
    id: str
    opened_in: Session | None = dataclasses.field(default=None, compare=False, repr=False)

    @cached_property
    def session(self) -> Session:
        """The session that keeps what is opened from this artifact."""
        return self.opened_in or Session(self.path.parent)

    @property
    def spec(self) -> dict[str, Any]:
        """The contents of spec.json: stage, revision, config, contents, inputs, and what `Run.record` added."""
        return (self.session.pending or {}).get(self.path.name) or read_json(self.path / "spec.json")

    @property
    def fingerprint(self) -> str:
        """What identifies the contents: a digest the stage recorded, such as that of imported weights, or the id."""
        return self.spec.get("fingerprint", self.id)

    def given(self, name: str) -> Any:
        """A setting that names a local file or a model: its path in the last call that had the same content, which may
        have moved since the artifact was made. Other settings: as in spec.json."""
        spec = self.spec
        paths = spec.get("paths", {}) | (read_json(file) if (file := paths_file(self.path)).exists() else {})
        return paths.get(name, spec["config"].get(name))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of one of its JSONL files; InputError naming the file and the line where one cannot be read."""
        self.check_finished()
        return read_jsonl(self.path / name)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; empty where the stage logged nothing."""
        self.check_finished()
        return self.rows("metrics.jsonl") if (self.path / "metrics.jsonl").exists() else []

    def load(self, like: Any = None) -> Any:
        """The pytree in state/, in the structure, types and shardings of `like` where given."""
        from ctg_jax.run import checkpoint

        self.check_finished()
        return checkpoint.load(self.path / "state", like)

    def check_finished(self) -> None:
        """UnfinishedError in a dry run where the stage has not run."""
        if self.path.name in (self.session.pending or {}):
            raise UnfinishedError(f"{self.path} has not run yet, and what follows depends on what is in it")


def paths_file(path: Path) -> Path:
    """The file, outside of an artifact's directory, with the paths of the last call: setting -> path."""
    return path.parent / ".paths" / f"{path.name}.json"


def open_artifact(path: str | os.PathLike, session: Session | None = None) -> Artifact:
    """The finished artifact at a path, verified; InputError where there is none.

    Args:
      session: keeps what is opened from it, and may be a dry run; None gives the artifact a session of its own.
    """
    path, session = Path(path).absolute(), session or Session(Path(path).absolute().parent)
    if path.name in (session.pending or {}):
        return Artifact(path, path.name.rpartition("-")[2], session)
    if not (path / "DONE").exists():
        found = "is unfinished" if (path / "spec.json").exists() else "holds no artifact"
        raise InputError(f"{path} {found}: expected a directory that a finished stage wrote (spec.json and DONE)")
    verify(path, session.sha256)
    return Artifact(path, path.name.rpartition("-")[2], session)


def open_lm(artifact: Artifact, unstacked: bool = False) -> tuple[Any, Any, Any]:
    """(lm, params, tokenizer) of an LM artifact, one that `stages.sources.load_lm` or `pretrain` made, in the
    dtype of its configuration, its weights where the layout of the run has them. The artifact's session keeps it.

    Args:
      unstacked: the layers of `params` as a tuple, for decoding; see `Session.open_lm`.

    Raises:
      InputError: the artifact is not an LM, the imported files have changed since or are gone, or its tokenizer has
        more ids than the model has tokens.
    """
    spec = artifact.spec
    artifact.check_finished()
    if "lm" not in spec:
        raise InputError(
            f"{artifact.path} was made by {spec['stage']} and is no language model: expected an artifact of load_lm or "
            "pretrain"
        )
    path, dtype = _model_folder(artifact), spec["config"].get("dtype", "float32")
    return artifact.session.open_lm((artifact.fingerprint, dtype), lambda: _read_lm(path, dtype), unstacked)


def _read_lm(path: Path, dtype: str) -> tuple[Any, Any, Any]:
    from ctg_jax.data.ids import check_sizes
    from ctg_jax.data.tokenizer import load_tokenizer
    from ctg_jax.models import hf

    here = layout.local_plan()
    lm, params = hf.load(str(path), dtype=dtype, shardings=here and here.shardings)
    lm = dataclasses.replace(lm, remat=layout.remat())
    tokenizer = load_tokenizer(str(path))
    check_sizes(tokenizer, lm, str(path))
    return lm, params, tokenizer


def _model_folder(artifact: Artifact) -> Path:
    """The folder of an LM artifact that holds what was imported: the one of then, or of the last call that named it."""
    first = artifact.spec["lm"]
    if first is None:
        folders = [artifact.path / "state"]
    else:
        folders = list(dict.fromkeys([Path(first), Path(artifact.given("source")).expanduser()]))
    for folder in folders:
        if folder.is_dir() and digest_model(folder, artifact.session.sha256) == artifact.fingerprint:
            return folder
    how = "have changed since" if folders[0].is_dir() else "are not there, as they were when"
    raise InputError(
        f"the model files in {folders[0]} {how} {artifact.path.name} was made: bring them back, or import the model "
        "again from the folder where it is now"
    )
