"""`load`: one interface to bundled, local, Hugging Face and TensorFlow Datasets text."""

from __future__ import annotations

import csv
import hashlib
import io
import lzma
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ctg_jax.data import requests
from ctg_jax.data.messages import malformed
from ctg_jax.data.recast import recast
from ctg_jax.io import PACKED, dumps, read_jsonl, sha256, sha256_all, sha256_unpacked, unpacked
from ctg_jax.types import InputError, optional

Record = dict[str, Any]
_CHATS = ("messages", "positive", "negative")  # fields that may hold messages
_SLICE = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class Source(Sequence):
    """Random access to records `{"text": str, …}`; values are str, int, float, bool, or lists of them.

    A record may be a conversation, `{"messages": [{"role": …, "content": …}, …]}` (see `ctg_jax.data.messages`), or a
    pair with `positive` and `negative`, each a text or messages. Where it has no `text`, that is the text of its last
    message, or of `positive`.

    Attributes:
      spec, split: what was asked for.
    """

    def __init__(
        self, spec: str, split: str, records: Sequence[Mapping[str, Any]], text: str | Mapping[str, str] = "text"
    ):
        self.spec, self.split = spec, split
        self._records, self._text = records, text
        if len(records):
            self._check(self[0])

    def _check(self, record: Record) -> None:
        if not isinstance(record.get("text"), str):
            raise InputError(
                f"{self.spec}: records have no text under {self._text!r}, only {', '.join(sorted(record))}; "
                "name the field that holds the text with text=…"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Record:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self._record(self._records[int(i) % len(self)], int(i) % len(self))

    def __iter__(self) -> Iterator[Record]:
        many = getattr(self._records, "__getitems__", None)  # several at once: half the time of one by one
        for start in range(0, len(self), 512):
            block = range(start, min(start + 512, len(self)))
            yield from map(self._record, many(list(block)) if many else (self._records[i] for i in block), block)

    def _record(self, raw: Mapping[str, Any], i: int) -> Record:
        record = {name: _plain(value) for name, value in raw.items()}
        if not isinstance(self._text, str):
            return recast(record, self._text, f"record {i} of {self.spec}")
        if wrong := _check_messages(record):
            raise InputError(f"{self.spec} has a record with malformed messages: {wrong}")
        if self._text == "text" and "text" not in record:
            whole = next((record[name] for name in _CHATS if record.get(name) is not None), None)
            record |= {} if whole is None else {"text": whole if isinstance(whole, str) else whole[-1]["content"]}
        return record if self._text == "text" else {**record, "text": _field(record, self._text)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all records in order, as canonical JSON: the same data has the same digest in every format.
        Reads everything once, when first asked for."""
        h = hashlib.sha256()
        for record in self:
            line = dumps(record, sort_keys=True, allow_nan=True, separators=(",", ":"))
            h.update(line.encode("utf-8", "surrogatepass") + b"\n")
        return h.hexdigest()

    def __repr__(self) -> str:
        return f"Source({self.spec!r}, {self.split!r}, {len(self)} records)"


def load(
    spec: str,
    split: str = "train",
    *,
    text: str | Mapping[str, str] = "text",
    cache_dir: str | Path | None = None,
) -> Source:  # fmt: skip
    """Opens a data set.

    Args:
      spec: one of
        `bundled:reviews`    the corpus of `ctg_jax.data.reviews`; splits train, validation, test
        `bundled:instructions`  prompts with instructions that code verifies (`ctg_jax.data.requests`); the same splits
        `text:PATH`          a file of text, a record for each line that is not empty, plain or `.gz` or `.xz`
        `jsonl:PATH`         a file of JSON objects, one a line, plain or `.gz` or `.xz`; its one split is `all` (or
                             `train`). If PATH is a folder, split NAME is its file NAME.jsonl (or .jsonl.gz, .jsonl.xz)
        `csv:PATH`           a file of comma-separated values whose first line names the fields, plain or `.gz` or
                             `.xz`; every value is a string
        `lines:FIELD=PATH|…` files of as many lines each, line i of them the fields of record i
        `hf:NAME[:CONFIG]`   a data set of the Hugging Face hub, or a local folder that `datasets` can read
        `tfds:NAME`          a data set of TensorFlow Datasets, by name or by the folder of a prepared one
      split: the split, with an optional slice: `train`, `train[:10%]`, `train[100:200]`.
      text: the field that holds the text; "prompt.text" is the field text inside the field prompt. Or name of a field
        -> template, to make the text, its prompt and other fields of those that records have; see
        `ctg_jax.data.recast`.
      cache_dir: where prepared data sets are kept; by default `~/.cache/ctg_jax` for the bundled one and each
        library's own place for the others.

    Raises:
      InputError: unknown spec, split or field, a file that is missing or malformed (with the line), or no network.
    """
    kind, name, match = _parsed(spec, split)
    cache = None if cache_dir is None else Path(cache_dir)
    return Source(spec, split, _LOADERS[kind](name, split, match, cache), text)


def content(spec: str, split: str = "train", sha256: Callable[[Path], str] = sha256) -> str | None:
    """What identifies the records of a data set that is on this machine, wherever its files are: the kind, and the
    SHA-256 of the (unpacked) file that the split is read from, of all files of a folder, or of the bundled corpus. None
    where the name is all that is known, as for a data set of the hub.

    Raises:
      InputError: as of `load`, where the file is missing or cannot be unpacked.
    """
    kind, name, match = _parsed(spec, split)
    if spec == "bundled:reviews":
        from ctg_jax.data import reviews

        return f"{spec}:{reviews.digest()}"
    if spec == "bundled:instructions":
        return f"{spec}:{requests.digest_of()}"
    if kind in ("jsonl", "text", "csv"):
        return f"{kind}:{_digest(_file(kind, name, match), sha256)}"
    if kind == "lines":
        return f"{kind}:" + "|".join(f"{field}={_digest(path, sha256)}" for field, path in _fields(name, match).items())
    folder, _, config = name.partition(":") if kind == "hf" else (name, "", "")
    if not Path(folder).is_dir():
        return None
    return f"{kind}:{sha256_all(Path(folder), [p for p in Path(folder).rglob('*') if p.is_file()], sha256)}:{config}"


def _digest(path: Path, sha256: Callable[[Path], str]) -> str:
    try:
        return sha256_unpacked(path) if path.suffix in PACKED else sha256(path)
    except (EOFError, lzma.LZMAError) as e:
        raise InputError(f"{path} cannot be read ({e})") from e


def _parsed(spec: str, split: str) -> tuple[str, str, re.Match]:
    kind, _, name = spec.partition(":")
    if kind not in _LOADERS or not name:
        raise InputError(
            f"data spec {spec!r} is unknown: use bundled:reviews, jsonl:PATH, csv:PATH, text:PATH, lines:FIELD=PATH|…, "
            "hf:NAME or tfds:NAME"
        )
    match = _SLICE.fullmatch(split)
    if match is None:
        raise InputError(f"split {split!r} of {spec} is malformed: write NAME, NAME[:10%] or NAME[100:200]")
    return kind, name, match


def _file(kind: str, name: str, match: re.Match) -> Path:
    """The file of a split; InputError where there is none."""
    path = Path(name)
    if kind == "jsonl" and path.is_dir():
        found = [path / f"{match['name']}.jsonl{end}" for end in ("", ".gz", ".xz")]
        path = next((p for p in found if p.is_file()), None)
        if path is None:
            raise InputError(f"split {match['name']!r} of jsonl:{name} is missing: expected a file {found[0]}[.gz|.xz]")
        return path
    if not path.is_file():
        raise InputError(f"{kind}:{name}: there is no such file{' or folder' if kind == 'jsonl' else ''}")
    if match["name"] not in ("all", "train"):
        raise InputError(f"split {match['name']!r} of {kind}:{name} is unknown: a single file has the split 'all'")
    return path


def _bundled(name: str, split: str, match: re.Match, cache: Path | None) -> Sequence:
    if name not in ("reviews", "instructions"):
        raise InputError(f"data spec 'bundled:{name}' is unknown: there are bundled:reviews and bundled:instructions")
    from ctg_jax.data import builder

    if match["name"] not in (splits := builder.SPLITS if name == "reviews" else requests.SPLITS):
        raise InputError(f"split {match['name']!r} of bundled:{name} is unknown: use one of {', '.join(splits)}")
    if name == "instructions":
        return _sliced(requests.records(match["name"]), match)
    folder = builder.prepare(cache or Path.home() / ".cache" / "ctg_jax")
    return _tfds(str(folder), split, match, cache)


def _sliced(records: list[Record], match: re.Match) -> list[Record]:
    start, stop = (_bound(match[side], len(records)) for side in ("start", "stop"))
    return records[start:stop]


def _jsonl(name: str, split: str, match: re.Match, cache: Path | None) -> Sequence:
    path = _file("jsonl", name, match)
    records = read_jsonl(path, _check_record)
    return _sliced(records, match)


def _text(name: str, split: str, match: re.Match, cache: Path | None) -> Sequence:
    path = _file("text", name, match)
    try:
        with unpacked(path) as file:
            records = [{"text": line.strip()} for line in io.TextIOWrapper(file, encoding="utf-8") if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as e:
        raise InputError(f"{path} cannot be read ({e})") from e
    return _sliced(records, match)


def _fields(name: str, match: re.Match) -> dict[str, Path]:
    """Field -> file of `lines:FIELD=PATH|FIELD=PATH`."""
    pairs = [part.partition("=") for part in name.split("|")]
    if not all(field and path for field, _, path in pairs):
        raise InputError(f"lines:{name} is malformed: write lines:FIELD=PATH|FIELD=PATH")
    return {field: _file("lines", path, match) for field, _, path in pairs}


def _lines(name: str, split: str, match: re.Match, cache: Path | None) -> Sequence:
    columns = {}
    for field, path in _fields(name, match).items():
        try:
            with unpacked(path) as file:
                columns[field] = [line.strip() for line in io.TextIOWrapper(file, encoding="utf-8")]
        except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as e:
            raise InputError(f"{path} cannot be read ({e})") from e
    if len({len(lines) for lines in columns.values()}) > 1:
        counts = ", ".join(f"{field} {len(lines)}" for field, lines in columns.items())
        raise InputError(f"lines:{name}: the files have different numbers of lines ({counts})")
    records = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return _sliced(records, match)


def _csv(name: str, split: str, match: re.Match, cache: Path | None) -> Sequence:
    path = _file("csv", name, match)
    try:
        with unpacked(path) as file:
            reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""), strict=True)
            records = list(reader)
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, csv.Error) as e:
        raise InputError(f"{path} cannot be read ({e})") from e
    fields = set(reader.fieldnames or ())
    for i, record in enumerate(records):
        if record.keys() != fields or None in record.values():
            raise InputError(f"{path}: record {i} has another number of values than the {len(fields)} names of line 1")
    return _sliced(records, match)


def _check_record(record: Record) -> str | None:
    text = record.get("text", "")
    if not isinstance(text, str):
        return f'"text" is {text!r}, expected a string'
    return _check_messages(record)


def _check_messages(record: Record) -> str | None:
    """What is wrong with the messages of a record, or None. A pair may hold texts or token ids in their place."""
    found = [record[name] for name in _CHATS if record.get(name) is not None]
    found = [x for x in found if x is record.get("messages") or not (isinstance(x, str) or _are_ids(x))]
    return next((wrong for messages in found if (wrong := malformed(messages))), None)


def _are_ids(x: Any) -> bool:
    """Whether a value is a row of token ids, such as a pool keeps of a sample."""
    return isinstance(x, Sequence) and len(x) > 0 and all(isinstance(i, int) for i in x)


def _bound(text: str | None, size: int) -> int | None:
    if text is None:
        return None
    return round(size * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def _hf(name: str, split: str, match: re.Match, cache: Path | None) -> Sequence:
    datasets = optional("datasets", "data")
    path, _, config = name.partition(":")
    place = None if cache is None else str(cache / "huggingface")
    try:
        return datasets.load_dataset(path, config or None, split=split, cache_dir=place)
    except (OSError, ValueError, RuntimeError) as e:  # the library's own errors are kinds of these
        raise InputError(
            f"hf:{name} split {split!r} cannot be loaded ({_first_line(e)}): check the name, the split and the network"
        ) from e


def _tfds(name: str, split: str, match: re.Match, cache: Path | None) -> Sequence:
    import tensorflow_datasets as tfds

    folder = Path(name)
    try:
        if folder.is_dir():
            builder = tfds.builder_from_directory(folder)
        else:
            builder = tfds.builder(name, data_dir=cache and cache / "tfds", file_format="array_record")
            builder.download_and_prepare()
        return builder.as_data_source(split=split)
    except (OSError, ValueError, AssertionError, ImportError, LookupError, NotImplementedError, RuntimeError) as e:
        raise InputError(
            f"tfds:{name} split {split!r} cannot be loaded ({_first_line(e)}): "
            "check the name, the split and the network"
        ) from e


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def _field(record: Record, path: str) -> Any:
    """The value under a name, or under dotted names inside one another; None where there is none."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _plain(value: Any) -> Any:
    """Bytes as text, numpy values as Python ones."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


_LOADERS = {"bundled": _bundled, "jsonl": _jsonl, "csv": _csv, "text": _text, "lines": _lines, "hf": _hf, "tfds": _tfds}
