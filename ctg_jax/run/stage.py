"""`stage`: a function call memoised on disk.

    root/<name>-<id>/spec.json       stage, revision, configuration with defaults, digests of local files, ids of inputs
                     state/          what it learned or imported
                     metrics.jsonl   one row of figures per line
                     samples.jsonl   texts, where there are any
                     DONE            size and SHA-256 of every file above and of these; written last

An experiment is a Python function and its data flow is its arguments: a call whose directory holds DONE is not
run again; one that was interrupted runs again in its own directory and may go on from what it finds there. What
identifies a call is in `ctg_jax.run.identity`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ctg_jax.control import Control
from ctg_jax.io import (
    as_json,
    drop_half_written,
    dumps,
    locked,
    read_json,
    read_jsonl,
    writable,
    write_json,
    write_jsonl,
    write_text,
)
from ctg_jax.mesh import layout, processes
from ctg_jax.run.artifact import Artifact, UnfinishedError, open_artifact, open_lm, paths_file
from ctg_jax.run.identity import (
    array_digest,
    call_id,
    contents_of,
    declaration,
    is_section,
    nearest,
    section,
    stage_function,
)
from ctg_jax.run.metrics import drop_figures
from ctg_jax.run.seal import seal, verify
from ctg_jax.run.session import Session, Tally
from ctg_jax.types import InputError

__all__ = [
    "Artifact",
    "Run",
    "Session",
    "Tally",
    "UnfinishedError",
    "check_settings",
    "nearest",
    "open_artifact",
    "open_lm",
    "read_jsonl",
    "stage",
    "stage_function",
    "write_jsonl",
    "write_text",
]
log = logging.getLogger(__name__)


class _Pending(dict):
    """The spec of a stage that has not run: what `Run.record` will add is not known."""

    def __missing__(self, key):
        raise UnfinishedError(f"what follows depends on {key!r} of a stage that has not run yet")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a stage function is given first: the directory it writes in, and the session that runs it."""

    path: Path
    within: Session | None = dataclasses.field(default=None, compare=False, repr=False)

    @cached_property
    def session(self) -> Session:
        """The session that runs the stage."""
        return self.within or Session(self.path.parent)

    def log(self, **metrics: Any) -> None:
        """Appends one row to metrics.jsonl. An attempt that was cut short leaves no rows behind, except those with
        a `step`, which the training loop winds back itself."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(dumps(metrics) + "\n")

    def record(self, **facts: Any) -> None:
        """Adds facts to spec.json, such as `method` and `init` of a control; they are no part of the id."""
        spec = read_json(self.path / "spec.json")
        write_json(self.path / "spec.json", {**spec, **facts})

    def discard(self, *names: str) -> None:
        """Names files and folders that only serve to continue an interrupted attempt, such as the checkpoints of a
        training. They are no part of the artifact, and are removed once it is finished, not before."""
        known = read_json(self.path / "spec.json").get("discarded", ())
        self.record(discarded=sorted({*known, *names}))


def stage(
    root: Session | str | os.PathLike, fn: Callable[..., Any], config: Mapping[str, Any] | None = None, **inputs: Any
) -> Artifact:
    """Runs `fn(run, **config, **inputs)` once for each distinct call and returns its artifact.

    Args:
      root: the session; or the directory of all artifacts, made where it is missing, or a `Store`, which get a session
        of their own.
      fn: the stage, declared with `stage_function`; its keyword parameters are the schema of the configuration.
      config: JSON values. Defaults of `fn` are filled in.
      **inputs: artifacts, sequences of artifacts, controls (identified by their arrays), or None.

    Raises:
      InputError: an unknown or missing key, a value that is not JSON or not finite, a local file that cannot be read, a
        finished artifact whose files have changed, an output directory that cannot be written.
    """
    session = Session.of(root)
    declared = declaration(fn)
    filled = _fill(fn, dict(config or {}), inputs)
    contents = contents_of(fn, filled, session.sha256)
    ids = {name: _ids(fn, name, value) for name, value in sorted(inputs.items())}
    id = call_id(fn, filled, contents, ids)
    name = declared.name if hasattr(fn, "stage_function") else fn.__name__.strip("_")
    path = session.root / f"{name}-{id}"
    spec = {"stage": name, "revision": declared.revision, "config": filled, "inputs": ids}
    local = [key for key in declared.contents if key in filled]  # an input may stand in for the path
    spec |= {"contents": contents, "paths": {key: _absolute(filled[key]) for key in local}}
    spec["fingerprints"] = {k: v.fingerprint for k, v in inputs.items() if isinstance(v, Artifact)}
    count, asked, store = session.tally, session.pending, session.store
    if asked is None and processes.agree(int(id[:7], 16)) != int(id[:7], 16):
        raise InputError(f"{name}: the processes were given different settings or files; give all of them the same")
    if store is not None:
        processes.once(lambda: store.fetch(path))
    done = (path / "DONE").exists()
    if done if asked is not None else processes.agree(done):
        processes.once(lambda: _verified(path, spec["paths"], session))
        if path.name not in count.executed + count.reused:
            count.reused.append(path.name)
        return Artifact(path, id, session)
    if asked is not None:
        asked[path.name] = _Pending(spec)
        return Artifact(path, id, session)
    with contextlib.ExitStack() as held:
        processes.once(lambda: _begin(held, path, spec, store))
        if processes.agree((path / "DONE").exists()):  # somebody else finished it while this process waited
            processes.once(lambda: verify(path, session.sha256))
        else:
            log.info("running %s", path.name)
            with processes.aside(path) as mine, layout.laid_out(session.layout):
                fn(Run(mine, session), **_sections(fn, filled), **inputs)
            processes.once(lambda: _sealed(path, session))
            count.executed.append(path.name)
    return Artifact(path, id, session)


def _verified(path: Path, paths: Mapping[str, Any], session: Session) -> None:
    verify(path, session.sha256)
    if session.pending is not None:
        return
    _drop_discarded(path)  # an earlier run may have ended before it could
    artifact = Artifact(path, "", session)
    if any(artifact.given(name) != value for name, value in paths.items()):
        with writable(path):
            paths_file(path).parent.mkdir(exist_ok=True)
            write_json(paths_file(path), dict(paths))
    if session.store is not None:
        session.store.keep(path)


def _sealed(path: Path, session: Session) -> None:
    seal(path, read_json(path / "spec.json").get("discarded", ()), session.sha256)
    if session.store is not None:
        session.store.keep(path)
    _drop_discarded(path)


def _drop_discarded(path: Path) -> None:
    """Removes what a finished stage needed only in order to go on; nothing that DONE vouches for, nothing elsewhere."""
    names = read_json(path / "spec.json").get("discarded", ())
    found = [path / name for name in names if Path(name).name == name and os.path.lexists(path / name)]
    if not found:
        return
    kept = {name.partition("/")[0] for name in read_json(path / "DONE")}
    for left in [place for place in found if place.name not in kept]:
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _absolute(value: Any) -> Any:
    """The absolute path of a setting that names something on this machine; anything else as it is."""
    place = Path(value).expanduser() if isinstance(value, str) and value else None
    return str(place.absolute()) if place is not None and place.exists() else value


def _begin(held: contextlib.ExitStack, path: Path, spec: dict, store: Any) -> None:
    """Takes the lock and makes the directory ready, where another process has not finished the stage meanwhile."""
    held.enter_context(writable(path))
    held.enter_context(locked(path))
    if (path / "DONE").exists():
        return
    held.push(partial(_tidy, path, not path.exists()))
    path.mkdir(parents=True, exist_ok=True)
    drop_half_written(path)
    if store is not None:
        store.begin()
        store.fetch_steps(path)
    write_json(path / "spec.json", spec)
    drop_figures(path / "metrics.jsonl")


def _tidy(path: Path, fresh: bool, kind: type | None, *_: Any) -> None:
    """Bad input must leave nothing half-written; what an earlier attempt or a checkpoint holds is kept."""
    if kind is not None and issubclass(kind, InputError) and fresh and not any(p.is_dir() for p in path.iterdir()):
        shutil.rmtree(path)


def check_settings(fn: Callable[..., None], settings: Iterable[str]) -> None:
    """Refuses settings that a stage function does not have. `stage` does so itself; this is for a `fit` that needs the
    results of other stages first.

    Raises:
      InputError: a setting that there is not, with the nearest name.
    """
    parameters = list(inspect.signature(fn).parameters)[1:]
    for name in settings:
        if name not in parameters:
            raise InputError(f"{fn.__name__} has no setting {name!r}{nearest(name, parameters)}")


def _fill(fn, config: dict, inputs: dict) -> dict:
    """The configuration as JSON values, with the function's defaults; unknown and missing keys are refused."""
    check_settings(fn, [*config, *inputs])
    parameters = dict(list(inspect.signature(fn).parameters.items())[1:])
    for name, p in parameters.items():
        if name not in inputs and name not in config:
            if p.default is p.empty:
                raise InputError(f"{fn.__name__} needs a value for {name!r} and none was given")
            config[name] = p.default
        if is_section(p.default) and name in config:
            record = section(p.default, config[name], f"{name} of {fn.__name__}")
            config[name] = dataclasses.asdict(record)
    filled = {}
    for name in sorted(set(config) - set(inputs)):
        try:
            filled[name] = as_json(config[name])
        except (TypeError, ValueError) as e:
            raise InputError(
                f"{fn.__name__}: {name}={config[name]!r} cannot be recorded ({e}); expected finite numbers, strings, "
                "lists and dicts of them"
            ) from None
    return filled


def _sections(fn, filled: dict) -> dict:
    """The settings with each section as the record that the function reads."""
    defaults = {name: p.default for name, p in inspect.signature(fn).parameters.items() if is_section(p.default)}
    return filled | {name: type(default)(**filled[name]) for name, default in defaults.items()}


def _ids(fn, name, value):
    if value is None:
        return None
    if isinstance(value, Artifact):
        return value.id
    if isinstance(value, Control):
        return f"arrays:{array_digest(value)}"
    if isinstance(value, Sequence) and all(isinstance(v, Artifact) for v in value):
        return [v.id for v in value]
    raise InputError(f"{fn.__name__}: input {name!r} is a {type(value).__name__} where an Artifact is expected")
