"""Locks of the operating system, and what a bad disk says."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from ctg_jax.types import InputError

log = logging.getLogger(__name__)
_BAD_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO}


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
