"""What a finished artifact's files are checked against: `seal` writes DONE, `verify` compares the files with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ctg_jax.io import dumps, read_json, sha256, sha256_of, write_json
from ctg_jax.types import InputError


def seal(path: Path, without: Collection[str] = (), sha256: Callable[[Path], str] = sha256) -> None:
    """Writes DONE: size and SHA-256 of every file of a directory, and of this list itself.

    Args:
      without: names in the directory that are not part of what is finished.
    """
    names = {p: p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file() and p.name != "DONE"}
    kept = {p: name.as_posix() for p, name in names.items() if name.parts[0] not in without}
    sums = {name: [p.stat().st_size, sha256(p)] for p, name in kept.items()}
    write_json(path / "DONE", {**sums, "DONE": _own(sums)})


def verify(path: Path, sha256: Callable[[Path], str] = sha256) -> None:
    """Compares every file of a finished stage with DONE; InputError naming the first that is missing or differs."""
    sums = read_json(path / "DONE")
    own = sums.pop("DONE", None)
    if own is not None and own != _own(sums):
        raise InputError(f"{path / 'DONE'} has other contents than were written: delete {path} and run again")
    for name, (size, expected) in sums.items():
        file = path / name
        how = None
        if not file.is_file():
            how = "is missing"
        elif file.stat().st_size != size:
            how = f"has {file.stat().st_size} bytes where {size} were written"
        elif sha256(file) != expected:
            how = "has other contents than were written"
        if how:
            raise InputError(f"{file} {how}: the artifact is damaged; delete {path} and run again")


def _own(sums: dict) -> list:
    """What DONE records about itself: [size, SHA-256] of the rest."""
    text = dumps(sums, sort_keys=True, ensure_ascii=True)
    return [len(text.encode()), sha256_of(text)]


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
