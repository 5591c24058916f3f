"""Files: locks, atomic writes, JSON and JSON lines, digests, and errors of the disk as bad input.

The rest of the package reads and writes JSON, replaces files and computes SHA-256 through this module only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import logging
import lzma
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ctg_jax.types import InputError

log = logging.getLogger(__name__)
_BAD_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO}
_SETTLED = 2_000_000_000  # nanoseconds after which a change of a file is sure to show in its times
PACKED = {".xz": lzma.open, ".gz": gzip.open}
_DAMAGED = "the artifact is damaged; delete it and run again"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process at a time work on a path, through a file in `.locks` beside it. The kernel releases the lock of
    a process that ends, so a killed one blocks nobody; file times are not used, so clocks may differ."""
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
    """Reports a full or unwritable output directory, the parent of `path`, as an InputError."""
    try:
        yield
    except OSError as e:
        place = Path(e.filename) if e.filename else path
        if e.errno in _BAD_DISK and (e.errno == errno.ENOSPC or path.parent in (place, *place.parents, place.parent)):
            raise InputError(f"the output directory {path.parent} cannot be written ({e.strerror}: {place})") from e
        if isinstance(e, FileExistsError | NotADirectoryError):
            raise InputError(f"the output directory {path.parent} is not a directory ({place})") from e
        raise


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which replaces `path` when the `with` block ends without an error. Readers see the old
    contents or the new ones, never a part, and the new ones have reached the disk."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(new, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically."""
    with atomic(Path(path)) as f:
        f.write(data)


def drop_half_written(path: Path) -> None:
    """Removes the temporary files that `atomic` left below a directory when its process was killed."""
    for left in path.rglob(".*"):
        if re.fullmatch(r"\..+\.\d+", left.name) and left.is_file():
            left.unlink(missing_ok=True)


def dumps(value: Any, **kw) -> str:
    """JSON without NaN; NumPy and JAX scalars and arrays, paths, and mappings such as ConfigDict become JSON values."""
    return json.dumps(value, **{"allow_nan": False, "ensure_ascii": False, "default": _plain, **kw})


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "to_dict"):
        return value.to_dict()
    raise TypeError(f"a {type(value).__name__} is not JSON")


def loads(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError where it is none."""
    return json.loads(text)


def as_json(value: Any) -> Any:
    """The value that a reader of `dumps(value)` gets: dicts, lists, strings, finite numbers, booleans and None."""
    return json.loads(dumps(value))


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """Writes a JSON file atomically; see `dumps`."""
    write_text(path, dumps(value, indent=indent) + "\n")


def read_json(path: Path, advice: str = _DAMAGED) -> Any:
    """The value in a JSON file.

    Raises:
      InputError: naming the file, the problem and the `advice`, where it is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as e:
        raise InputError(f"{path} is missing: {advice}") from e
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read as JSON ({e}): {advice}") from e


def json_line(row: Any) -> str:
    """A row of a JSONL file with its line break. Numbers that are not finite are written as NaN and Infinity."""
    return dumps(row, allow_nan=True) + "\n"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, atomically."""
    write_text(path, "".join(map(json_line, rows)))


def read_jsonl(path: Path, check: Callable[[dict[str, Any]], str | None] = lambda row: None) -> list[dict[str, Any]]:
    """Rows of a JSONL file, plain or packed as `.gz` or `.xz`.

    Args:
      check: returns what is wrong with a row, or None.

    Raises:
      InputError: naming the file, and the line that is not a JSON object or that `check` rejects.
    """
    rows: list[dict[str, Any]] = []
    number = 0
    try:
        with unpacked(path) as lines:
            for number, text in enumerate(lines, 1):  # noqa: B007 (the errors name it)
                if not text.strip():
                    continue
                row = json.loads(text)
                wrong = check(row) if isinstance(row, dict) else f"a {type(row).__name__} where an object is expected"
                if wrong:
                    raise ValueError(wrong)
                rows.append(row)
    except json.JSONDecodeError as e:
        raise InputError(f"{path} line {number} is not a valid JSON object: {e.msg} at column {e.colno}") from None
    except ValueError as e:  # UnicodeDecodeError is among them
        raise InputError(f"{path} line {number} is not a valid JSON object: {e}") from None
    except (OSError, EOFError, lzma.LZMAError) as e:
        raise InputError(f"{path} cannot be read after line {number} ({e}): expected a file of JSON lines") from None
    return rows


def whole_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, row) of a JSONL file that another attempt appended to: lines cut short or damaged are left out."""
    for text in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            row = json.loads(text)
            if text.endswith(b"\n") and isinstance(row, dict):
                yield text.decode("utf-8"), row


def whole_batches(partial: Path, batch: int, total: int) -> list[dict[str, Any]]:
    """The rows of an interrupted attempt, of `total` rows, cut back to whole batches, in the file as well."""
    if not partial.exists():
        return []
    text = partial.read_text("utf-8")
    partial.write_text(text[: text.rfind("\n") + 1], "utf-8")  # the last row may be half a row
    rows = read_jsonl(partial)
    rows = rows if len(rows) == total else rows[: len(rows) // batch * batch]
    write_jsonl(partial, rows)
    return rows


def unpacked(path: str | os.PathLike) -> BinaryIO:
    """A file opened for reading bytes; `.gz` and `.xz` are unpacked."""
    path = Path(path)
    return PACKED.get(path.suffix, open)(path, "rb")


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_unpacked(file: Path) -> str:
    """SHA-256 of what is in a file that `unpacked` reads."""
    with unpacked(file) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of(*parts: str | bytes) -> str:
    """SHA-256 of strings (in UTF-8) and bytes, one after another, in hexadecimal."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return h.hexdigest()


def digest(*parts: Any) -> str:
    """First 12 hexadecimal digits of the SHA-256 of strings, JSON values and arrays, in order."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            h.update(f"{part.dtype}{part.shape}".encode())
            h.update(np.ascontiguousarray(part).tobytes())
        else:
            h.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode())
        h.update(b"\0")
    return h.hexdigest()[:12]


def sha256_all(folder: Path, files: Iterable[Path], sha256: Callable[[Path], str] = sha256) -> str:
    """SHA-256 over the relative paths and the contents of files, whatever the path of their folder."""
    return sha256_of("\n".join(sorted(f"{p.relative_to(folder).as_posix()} {sha256(p)}" for p in files)))


class Digests:
    """`sha256` that reads a file only once, as long as its size, times and inode stay the same."""

    def __init__(self):
        self._known: dict[tuple, str] = {}

    def __call__(self, file: Path) -> str:
        s = os.stat(file)
        stamp = (os.path.abspath(file), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        if time.time_ns() - max(s.st_mtime_ns, s.st_ctime_ns) < _SETTLED:  # another change may leave the same times
            return sha256(file)
        if stamp not in self._known:
            self._known[stamp] = sha256(file)
        return self._known[stamp]
