"""`load`: one interface to bundled, local, Hugging Face and TensorFlow Datasets text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ctg_jax.data import files, requests
from ctg_jax.data.files import Record
from ctg_jax.data.recast import recast
from ctg_jax.io import dumps, sha256, sha256_all
from ctg_jax.types import InputError, optional

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
        if wrong := files.check_messages(record):
            raise InputError(f"{self.spec} has a record with malformed messages: {wrong}")
        if self._text == "text" and "text" not in record:
            whole = next((record[name] for name in files.CHATS if record.get(name) is not None), None)
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
                             `.xz`; every value is a string. `csv:FIELD|FIELD=PATH` names them for a file without such
                             a line
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
    if kind in files.READERS:
        return Source(spec, split, _sliced(files.READERS[kind](name, match["name"]), match), text)
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
    if kind in files.READERS:
        return files.content(kind, name, match["name"], sha256)
    folder, _, config = name.partition(":") if kind == "hf" else (name, "", "")
    if not Path(folder).is_dir():
        return None
    return f"{kind}:{sha256_all(Path(folder), [p for p in Path(folder).rglob('*') if p.is_file()], sha256)}:{config}"


def _parsed(spec: str, split: str) -> tuple[str, str, re.Match]:
    kind, _, name = spec.partition(":")
    if kind not in (*_LOADERS, *files.READERS) or not name:
        raise InputError(
            f"data spec {spec!r} is unknown: use bundled:reviews, jsonl:PATH, csv:PATH, text:PATH, lines:FIELD=PATH|…, "
            "hf:NAME or tfds:NAME"
        )
    match = _SLICE.fullmatch(split)
    if match is None:
        raise InputError(f"split {split!r} of {spec} is malformed: write NAME, NAME[:10%] or NAME[100:200]")
    return kind, name, match


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


_LOADERS = {"bundled": _bundled, "hf": _hf, "tfds": _tfds}
