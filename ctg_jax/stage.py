"""`stage`: a function call memoised on disk. `Artifact`: what a finished one left. `open_lm`: an LM from one.

    root/<function>-<id>/spec.json       function, revision, configuration with defaults, ids of the inputs
                         state/          what it learned or imported
                         metrics.jsonl   one row of figures per line
                         samples.jsonl   texts, where there are any
                         DONE            size and SHA-256 of every file above and of these; written last

An experiment is a Python function and its data flow is its arguments: a call whose directory holds DONE is not
run again; one that was interrupted runs again in its own directory and may go on from what it finds there.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import hashlib
import inspect
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ctg_jax import hosts, layout
from ctg_jax.files import drop_half_written, locked, read_json, seal, sha256, verify, writable, write_text
from ctg_jax.store import Store, active
from ctg_jax.types import InputError

log = logging.getLogger(__name__)

_tally: contextvars.ContextVar[Tally | None] = contextvars.ContextVar("tally", default=None)
_planned: contextvars.ContextVar[dict[str, dict] | None] = contextvars.ContextVar("planned", default=None)


class UnfinishedError(InputError):
    """Inside `plan`, what a stage that has not run will write was asked for."""


class _Planned(dict):
    """The spec of a stage that has not run: what `Run.record` will add is not known."""

    def __missing__(self, key):
        raise UnfinishedError(f"what follows depends on {key!r} of a stage that has not run yet")


@dataclasses.dataclass
class Tally:
    """Directory names of the stages that were executed and of those that were found finished."""

    executed: list[str] = dataclasses.field(default_factory=list)
    reused: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def tally() -> Iterator[Tally]:
    """Counts what `stage` does inside the `with` block."""
    count = Tally()
    token = _tally.set(count)
    try:
        yield count
    finally:
        _tally.reset(token)


@contextlib.contextmanager
def plan() -> Iterator[dict[str, dict[str, Any]]]:
    """Inside the `with` block no stage is executed. What has run is found as ever; of the others an `Artifact` that can
    be the input of others is given, and they are collected: directory name -> spec.

    Raises:
      UnfinishedError: inside, where what follows depends on the contents of a stage that has not run.
    """
    planned: dict[str, dict[str, Any]] = {}
    token = _planned.set(planned)
    try:
        yield planned
    finally:
        _planned.reset(token)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A finished stage: its directory and its id (12 hexadecimal digits)."""

    path: Path
    id: str

    @property
    def spec(self) -> dict[str, Any]:
        """The contents of spec.json: function, revision, config, inputs, and what `Run.record` added."""
        return (_planned.get() or {}).get(self.path.name) or read_json(self.path / "spec.json")

    @property
    def fingerprint(self) -> str:
        """What identifies the contents: a digest the stage recorded, such as that of imported weights, or the id."""
        return self.spec.get("fingerprint", self.id)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of one of its JSONL files; InputError naming the file and the line where one cannot be read."""
        self._finished()
        return read_jsonl(self.path / name)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; empty where the stage logged nothing."""
        self._finished()
        return self.rows("metrics.jsonl") if (self.path / "metrics.jsonl").exists() else []

    def load(self, like: Any = None) -> Any:
        """The pytree in state/, in the structure, types and shardings of `like` where given."""
        from ctg_jax import checkpoint

        self._finished()
        return checkpoint.load(self.path / "state", like)

    def _finished(self) -> None:
        if self.path.name in (_planned.get() or {}):
            raise UnfinishedError(f"{self.path} has not run yet, and what follows depends on what is in it")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a stage function is given first: the directory it writes in."""

    path: Path

    def log(self, **metrics: Any) -> None:
        """Appends one row to metrics.jsonl. An attempt that was cut short leaves no rows behind, except those with
        a `step`, which the training loop winds back itself."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(metrics, default=_plain) + "\n")

    def record(self, **facts: Any) -> None:
        """Adds facts to spec.json, such as `method` and `init` of a control; they are no part of the id."""
        spec = read_json(self.path / "spec.json")
        write_text(self.path / "spec.json", _dumps({**spec, **facts}, indent=1))


def stage(
    root: str | os.PathLike, fn: Callable[..., Any], config: Mapping[str, Any] | None = None, **inputs: Any
) -> Artifact:
    """Runs `fn(run, **config, **inputs)` once for each distinct call and returns its artifact.

    Args:
      root: the directory of all artifacts, made where it is missing; or a `ctg_jax.store.Store`.
      fn: the stage; its keyword parameters are the schema of the configuration. An integer attribute
        `fn.revision` (0 by default) is raised when the same call would now give something else.
      config: JSON values. Defaults of `fn` are filled in before the id is taken.
      **inputs: artifacts, sequences of artifacts, or None.

    Raises:
      InputError: an unknown or missing key, a value that is not JSON or not finite, a finished artifact whose files
        have changed, an output directory that cannot be written.
    """
    filled = _fill(fn, dict(config or {}), inputs)
    ids = {name: _ids(fn, name, value) for name, value in sorted(inputs.items())}
    revision = getattr(fn, "revision", 0)
    what = [f"{fn.__module__}.{fn.__qualname__}", revision, filled, ids]
    id = hashlib.sha256(_dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(root).absolute() / f"{fn.__name__.strip('_')}-{id}"
    spec = {"function": what[0], "revision": revision, "config": filled, "inputs": ids}
    spec["fingerprints"] = {k: v.fingerprint for k, v in inputs.items() if isinstance(v, Artifact)}
    count, planned, store = _tally.get(), _planned.get(), root if isinstance(root, Store) else None
    if store is not None:
        hosts.once(lambda: store.fetch(path))
    done = (path / "DONE").exists()
    if done if planned is not None else hosts.agree(done):
        hosts.once(lambda: _verified(path, store))
        if count is not None and path.name not in count.executed + count.reused:
            count.reused.append(path.name)
        return Artifact(path, id)
    if planned is not None:
        planned[path.name] = _Planned(spec)
        return Artifact(path, id)
    with contextlib.ExitStack() as held:
        hosts.once(lambda: _begin(held, path, spec, store))
        if hosts.agree((path / "DONE").exists()):  # somebody else finished it while this process waited
            hosts.once(lambda: verify(path))
        else:
            log.info("running %s", path.name)
            with hosts.aside(path) as mine, active(store):
                fn(Run(mine), **filled, **inputs)
            hosts.once(lambda: _sealed(path, store))
            if count is not None:
                count.executed.append(path.name)
    return Artifact(path, id)


def open_artifact(path: str | os.PathLike) -> Artifact:
    """The finished artifact at a path, verified; InputError where there is none."""
    path = Path(path).absolute()
    if path.name in (_planned.get() or {}):
        return Artifact(path, path.name.rpartition("-")[2])
    if not (path / "DONE").exists():
        found = "is unfinished" if (path / "spec.json").exists() else "holds no artifact"
        raise InputError(f"{path} {found}: expected a directory that a finished stage wrote (spec.json and DONE)")
    verify(path)
    return Artifact(path, path.name.rpartition("-")[2])


def open_lm(artifact: Artifact) -> tuple[Any, Any, Any]:
    """(lm, params, tokenizer) of an LM artifact: one that `load_lm` or `pretrain` of `ctg_jax.sources` made, in the
    dtype of its configuration, its weights where the layout of the run has them.

    Raises:
      InputError: the artifact is not an LM, the imported files have changed since, or the tokenizer has more ids than
        the model has tokens.
    """
    from ctg_jax.data.ids import check_sizes
    from ctg_jax.data.tokenizer import load_tokenizer
    from ctg_jax.models import hf

    spec = artifact.spec
    artifact._finished()
    if "lm" not in spec:
        raise InputError(
            f"{artifact.path} was made by {spec['function']} and is no language model: expected an artifact of "
            "load_lm or pretrain"
        )
    path = artifact.path / "state" if spec["lm"] is None else Path(spec["lm"])
    if digest_lm(path) != artifact.fingerprint:
        raise InputError(
            f"the model files in {path} have changed since {artifact.path.name} was made; delete that artifact"
        )
    here = layout.island()
    dtype = spec["config"].get("dtype", "float32")
    lm, params = hf.load(str(path), dtype=dtype, shardings=here and here.shardings)
    lm = dataclasses.replace(lm, remat=layout.remat())
    tokenizer = load_tokenizer(str(path))
    check_sizes(tokenizer, lm, str(path))
    return lm, params, tokenizer


def digest_lm(path: Path) -> str:
    """SHA-256 over the configuration, tokenizer and weights of a model in Hugging Face layout."""
    files = sorted(p for p in Path(path).iterdir() if p.suffix in (".json", ".safetensors", ".txt", ".model"))
    return hashlib.sha256("\n".join(f"{p.name} {sha256(p)}" for p in files).encode()).hexdigest()


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; InputError naming the file, and the line that is not a JSON object."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as e:
        raise InputError(f"{path} cannot be read ({e.strerror}): expected a file of JSON lines") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise ValueError(f"a {type(rows[-1]).__name__} where an object is expected")
        except ValueError as e:  # JSONDecodeError and UnicodeDecodeError are among them
            raise InputError(f"{path} line {number} is not a JSON object: {e}") from None
    return rows


def _verified(path: Path, store: Store | None) -> None:
    verify(path)
    if store is not None and _planned.get() is None:
        store.keep(path)  # an earlier run may have ended before it could


def _sealed(path: Path, store: Store | None) -> None:
    seal(path)
    if store is not None:
        store.keep(path)


def _begin(held: contextlib.ExitStack, path: Path, spec: dict, store: Store | None) -> None:
    """Takes the lock and makes the directory ready, where another process has not finished the stage meanwhile."""
    held.enter_context(writable(path))
    held.enter_context(locked(path))
    if (path / "DONE").exists():
        return
    held.push(partial(_tidy, path, not path.exists()))
    path.mkdir(parents=True, exist_ok=True)
    drop_half_written(path)
    if store is not None:
        store.fetch_steps(path)
    write_text(path / "spec.json", _dumps(spec, indent=1))
    metrics = path / "metrics.jsonl"
    if metrics.exists():  # rows with a step are the training loop's, which winds them back to its checkpoint
        whole = [line for line in metrics.read_bytes().splitlines(keepends=True) if line.endswith(b"}\n")]
        write_text(metrics, "".join(line.decode() for line in whole if _has_step(line)))


def _tidy(path: Path, fresh: bool, kind: type | None, *_: Any) -> None:
    """Bad input must leave nothing half-written; what an earlier attempt or a checkpoint holds is kept."""
    if kind is not None and issubclass(kind, InputError) and fresh and not any(p.is_dir() for p in path.iterdir()):
        shutil.rmtree(path)


def _has_step(line: bytes) -> bool:
    try:
        return "step" in json.loads(line)
    except ValueError:  # damaged while nothing guarded it yet
        return False


def _fill(fn, config: dict, inputs: dict) -> dict:
    """The configuration as JSON values, with the function's defaults; unknown and missing keys are refused."""
    parameters = dict(list(inspect.signature(fn).parameters.items())[1:])
    for name in [*config, *inputs]:
        if name not in parameters:
            raise InputError(f"{fn.__name__} has no setting {name!r}{nearest(name, parameters)}")
    for name, p in parameters.items():
        if name not in inputs and name not in config:
            if p.default is p.empty:
                raise InputError(f"{fn.__name__} needs a value for {name!r} and none was given")
            config[name] = p.default
    filled = {}
    for name in sorted(set(config) - set(inputs)):
        try:
            filled[name] = json.loads(_dumps(config[name]))
        except (TypeError, ValueError) as e:
            raise InputError(
                f"{fn.__name__}: {name}={config[name]!r} cannot be recorded ({e}); expected finite numbers, strings, "
                "lists and dicts of them"
            ) from None
    return filled


def nearest(name: str, known) -> str:
    """`; did you mean 'x'?` or the list of what there is."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(known))}"


def _ids(fn, name, value):
    if value is None:
        return None
    if isinstance(value, Artifact):
        return value.id
    if isinstance(value, Sequence) and all(isinstance(v, Artifact) for v in value):
        return [v.id for v in value]
    raise InputError(f"{fn.__name__}: input {name!r} is a {type(value).__name__} where an Artifact is expected")


def _dumps(value: Any, **kw) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, default=_plain, **kw)


def _plain(value: Any) -> Any:
    """NumPy and JAX scalars and arrays, paths, and mappings such as ConfigDict, as JSON values."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "to_dict"):
        return value.to_dict()
    raise TypeError(f"a {type(value).__name__} is not JSON")
