"""The records of local files: JSON lines, lines of text, comma-separated values, and files of as many lines each.

`split` is a name without a slice: a single file has the split `all`, which may also be called `train`; a folder of JSON
lines has one file for each split.
"""

from __future__ import annotations

import csv
import io
import lzma
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctg_jax.data.messages import malformed
from ctg_jax.io import PACKED, read_jsonl, sha256_unpacked, unpacked
from ctg_jax.types import InputError

Record = dict[str, Any]
CHATS = ("messages", "positive", "negative")  # fields that may hold messages


def content(kind: str, name: str, split: str, sha256: Callable[[Path], str]) -> str:
    """What identifies the records of a file, wherever it is; see `ctg_jax.data.sources.content`.

    Args:
      kind: a key of `READERS`. name: what follows the kind and a colon.

    Raises:
      InputError: a file that is missing or cannot be unpacked, a malformed name.
    """
    if kind == "lines":
        found = _fields(name, split).items()
        return f"{kind}:" + "|".join(f"{field}={_digest(path, sha256)}" for field, path in found)
    if kind == "csv":
        names, path = _columns(name, split)
        return f"{kind}:{'|'.join(names) + '=' if names else ''}{_digest(path, sha256)}"
    return f"{kind}:{_digest(_file(kind, name, split), sha256)}"


def check_messages(record: Record) -> str | None:
    """What is wrong with the messages of a record, or None. A pair may hold texts or token ids in their place."""
    found = [record[name] for name in CHATS if record.get(name) is not None]
    found = [x for x in found if x is record.get("messages") or not (isinstance(x, str) or _are_ids(x))]
    return next((wrong for messages in found if (wrong := malformed(messages))), None)


def _are_ids(x: Any) -> bool:
    """Whether a value is a row of token ids, such as a pool keeps of a sample."""
    return isinstance(x, Sequence) and len(x) > 0 and all(isinstance(i, int) for i in x)


def _check_record(record: Record) -> str | None:
    text = record.get("text", "")
    if not isinstance(text, str):
        return f'"text" is {text!r}, expected a string'
    return check_messages(record)


def _file(kind: str, name: str, split: str) -> Path:
    """The file of a split; InputError where there is none."""
    path = Path(name)
    if kind == "jsonl" and path.is_dir():
        found = [path / f"{split}.jsonl{end}" for end in ("", ".gz", ".xz")]
        path = next((p for p in found if p.is_file()), None)
        if path is None:
            raise InputError(f"split {split!r} of jsonl:{name} is missing: expected a file {found[0]}[.gz|.xz]")
        return path
    if not path.is_file():
        raise InputError(f"{kind}:{name}: there is no such file{' or folder' if kind == 'jsonl' else ''}")
    if split not in ("all", "train"):
        raise InputError(f"split {split!r} of {kind}:{name} is unknown: a single file has the split 'all'")
    return path


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """A file of text, unpacked; InputError where it cannot be read."""
    try:
        with unpacked(path) as file:
            yield io.TextIOWrapper(file, encoding="utf-8", newline=newline)
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, csv.Error) as e:
        raise InputError(f"{path} cannot be read ({e})") from e


def _digest(path: Path, sha256: Callable[[Path], str]) -> str:
    try:
        return sha256_unpacked(path) if path.suffix in PACKED else sha256(path)
    except (EOFError, lzma.LZMAError) as e:
        raise InputError(f"{path} cannot be read ({e})") from e


def _jsonl(name: str, split: str) -> list[Record]:
    return read_jsonl(_file("jsonl", name, split), _check_record)


def _text(name: str, split: str) -> list[Record]:
    with _opened(_file("text", name, split)) as file:
        return [{"text": line.strip()} for line in file if line.strip()]


def _fields(name: str, split: str) -> dict[str, Path]:
    """Field -> file of `lines:FIELD=PATH|FIELD=PATH`."""
    pairs = [part.partition("=") for part in name.split("|")]
    if not all(field and path for field, _, path in pairs):
        raise InputError(f"lines:{name} is malformed: write lines:FIELD=PATH|FIELD=PATH")
    return {field: _file("lines", path, split) for field, _, path in pairs}


def _lines(name: str, split: str) -> list[Record]:
    columns = {}
    for field, path in _fields(name, split).items():
        with _opened(path) as file:
            columns[field] = [line.strip() for line in file]
    if len({len(lines) for lines in columns.values()}) > 1:
        counts = ", ".join(f"{field} {len(lines)}" for field, lines in columns.items())
        raise InputError(f"lines:{name}: the files have different numbers of lines ({counts})")
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _columns(name: str, split: str) -> tuple[list[str] | None, Path]:
    """The names of the fields that `csv:FIELD|FIELD=PATH` gives, None where the first line does, and the file."""
    fields, named, path = name.partition("=")
    if not named or "/" in fields or Path(name).exists():
        return None, _file("csv", name, split)
    names = fields.split("|")
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"csv:{name} is malformed: write csv:FIELD|FIELD=PATH, with a different name for each field")
    return names, _file("csv", path, split)


def _csv(name: str, split: str) -> list[Record]:
    names, path = _columns(name, split)
    with _opened(path, newline="") as file:
        reader = csv.DictReader(file, names, strict=True)
        records = list(reader)
    fields, where = set(reader.fieldnames or ()), "given" if names else "of line 1"
    for i, record in enumerate(records):
        if record.keys() != fields or None in record.values():
            raise InputError(f"{path}: record {i} has another number of values than the {len(fields)} names {where}")
    return records


READERS = {"jsonl": _jsonl, "csv": _csv, "text": _text, "lines": _lines}
