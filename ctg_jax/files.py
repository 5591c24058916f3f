"""Files: locks, writing whole or not at all, digests of directories, and what a bad disk says."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctg_jax.types import InputError

log = logging.getLogger(__name__)
_BAD_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO}
_verified: dict[Path, tuple] = {}  # directory -> stamps of its files when they were last compared


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


def seal(path: Path) -> None:
    """Writes DONE: size and SHA-256 of every file of a directory, and of these."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "DONE")
    sums = {p.relative_to(path).as_posix(): [p.stat().st_size, sha256(p)] for p in files}
    write_text(path / "DONE", json.dumps({**sums, "DONE": _own(sums)}, indent=1, ensure_ascii=False))


def verify(path: Path) -> None:
    """Compares every file of a finished stage with DONE; InputError naming the first that is missing or differs.

    Files that have not changed since this process compared them last are not read again."""
    sums = read_json(path / "DONE")
    own = sums.pop("DONE", None)
    if own is not None and own != _own(sums):
        raise InputError(f"{path / 'DONE'} has other contents than were written: delete {path} and run again")
    now = tuple(_stamp(path / name) for name in ("DONE", *sums))
    if _verified.get(path) == now:
        return
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
    _verified[path] = now


def _own(sums: dict) -> list:
    """What DONE holds about itself."""
    text = json.dumps(sums, sort_keys=True).encode()
    return [len(text), hashlib.sha256(text).hexdigest()]


def _stamp(file: Path) -> tuple | None:
    """What changes with a file: its number, size and times; None where it is missing."""
    try:
        s = file.stat()
    except OSError:
        return None
    return s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
