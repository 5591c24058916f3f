"""Files: locks, writing whole or not at all, JSON and JSON lines, digests, and what a bad disk says."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from ctg_jax.types import InputError

log = logging.getLogger(__name__)
_BAD_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO}
_SETTLED = 2_000_000_000  # nanoseconds after which a change of a file is sure to show in its times


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time for a path, by a file in `.locks` beside it. The kernel drops the lock with its holder, so
    a killed one blocks nobody; times of files play no part, so clocks may differ."""
    folder = path.parent / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / path.name, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for another process that is running %s", path.name)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Says a full or unwritable output directory, the parent of `path`, as bad input."""
    try:
        yield
    except OSError as e:
        place = Path(e.filename) if e.filename else path
        if e.errno in _BAD_DISK and (e.errno == errno.ENOSPC or path.parent in (place, *place.parents, place.parent)):
            raise InputError(f"the output directory {path.parent} cannot be written ({e.strerror}: {place})") from e
        if isinstance(e, FileExistsError | NotADirectoryError):
            raise InputError(f"the output directory {path.parent} is not a directory ({place})") from e
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(new, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def drop_half_written(path: Path) -> None:
    """Removes what `write_text` left in a directory and below it where its process was killed."""
    for left in path.rglob(".*"):
        if re.fullmatch(r"\..+\.\d+", left.name) and left.is_file():
            left.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of an artifact; InputError where there is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(
            f"{path} cannot be read as JSON ({e}): the artifact is damaged; delete it and run again"
        ) from e


def dumps(value: Any, **kw) -> str:
    """JSON without NaN; NumPy and JAX scalars and arrays, paths, and mappings such as ConfigDict become JSON values."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, default=_plain, **kw)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "to_dict"):
        return value.to_dict()
    raise TypeError(f"a {type(value).__name__} is not JSON")


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


def seal(path: Path, without: Collection[str] = ()) -> None:
    """Writes DONE: size and SHA-256 of every file of a directory, and of these.

    without: names in the directory that are not part of what is finished.
    """
    names = {p: p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file() and p.name != "DONE"}
    kept = {p: name.as_posix() for p, name in names.items() if name.parts[0] not in without}
    sums = {name: [p.stat().st_size, sha256(p)] for p, name in kept.items()}
    write_text(path / "DONE", json.dumps({**sums, "DONE": _own(sums)}, indent=1, ensure_ascii=False))


def verify(path: Path) -> None:
    """Compares every file of a finished stage with DONE; InputError naming the first that is missing or differs."""
    sums = read_json(path / "DONE")
    own = sums.pop("DONE", None)
    if own is not None and own != _own(sums):
        raise InputError(f"{path / 'DONE'} has other contents than were written: delete {path} and run again")
    for name, (size, digest) in sums.items():
        file = path / name
        how = None
        if not file.is_file():
            how = "is missing"
        elif file.stat().st_size != size:
            how = f"has {file.stat().st_size} bytes where {size} were written"
        elif sha256(file) != digest:
            how = "has other contents than were written"
        if how:
            raise InputError(f"{file} {how}: the artifact is damaged; delete {path} and run again")


def check_inside(folder: Path, names: Iterable[Any], root: Path, what: Any) -> list[str]:
    """The names, as a manifest gives them for files below `folder`, after a check of all of them.

    Raises:
      InputError: naming `what`, the manifest: a name that is not relative, that has "..", or that a symbolic link leads
        out of `root`.
    """
    names = list(names)
    for name in names:
        plain = isinstance(name, str) and name and "\\" not in name and "\0" not in name
        place = PurePosixPath(name) if plain else None
        if place is None or place.is_absolute() or ".." in place.parts or ":" in place.parts[0]:
            raise InputError(f"{what} names the file {name!r}, which is not inside its folder: nothing was copied")
        if not (folder / name).resolve().is_relative_to(root.resolve()):
            raise InputError(
                f"{what} names the file {name!r}, and {folder / name} leads out of {root} by a symbolic link: nothing "
                "was copied; remove the link"
            )
    return names


def _own(sums: dict) -> list:
    """What DONE holds about itself."""
    text = json.dumps(sums, sort_keys=True).encode()
    return [len(text), hashlib.sha256(text).hexdigest()]


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal. A file that has not changed since this process read it is not read again."""
    s = os.stat(file)
    stamp = (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
    if time.time_ns() - max(s.st_mtime_ns, s.st_ctime_ns) < _SETTLED:  # another change may leave the same times
        return _sha256.__wrapped__(os.path.abspath(file), stamp)
    return _sha256(os.path.abspath(file), stamp)


@lru_cache(maxsize=1 << 14)
def _sha256(file: str, stamp: tuple) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_all(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the relative paths and the contents of files, whatever the path of their folder."""
    lines = sorted(f"{p.relative_to(folder).as_posix()} {sha256(p)}" for p in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
