"""What identifies a call of a stage: a stable name, settings in one canonical form, contents of local files, arrays.

The id of a call is a hash of

    the name and the revision of the stage, as `stage_function` declares them; no module and no path;
    the settings that differ from their defaults, so that a new setting with a default keeps what was made before;
      1 and 1.0 are one number, and settings that only determine how the work is done (`how`) are left out. The same
      holds for each setting inside a section, which is a setting whose default is a record (see `is_section`);
    for a setting that names a local file or folder, the SHA-256 of what is in it in place of its path (`contents`);
    the ids of the input artifacts, and a digest of inputs that are arrays.

A default is part of what a stage does: change one only together with `revision`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import tree
from ctg_jax.io import dumps, read_json, sha256, sha256_all, sha256_of
from ctg_jax.types import InputError

Sha256 = Callable[[Path], str]
Content = Callable[[Any, Mapping[str, Any], Sha256], str | None]  # (value, all settings, digest of a file) -> identity


@dataclasses.dataclass(frozen=True)
class StageFunction:
    """What `stage_function` declares.

    Attributes:
      name: the name of the stage in ids, spec.json and directory names. It outlives moves and renames of the function.
      revision: raised when the same call would now give another result.
      how: settings that cannot change the result, such as the batch size of sampling or steps between checkpoints.
      contents: settings that name local files -> what identifies their content, or None for a value that is no local
        file, such as a hub id, which is then identified by itself.
    """

    name: str
    revision: int = 0
    how: tuple[str, ...] = ()
    contents: Mapping[str, Content] = dataclasses.field(default_factory=dict)


def stage_function(
    name: str, *, revision: int = 0, how: Sequence[str] = (), contents: Mapping[str, Content] | None = None
) -> Callable[[Callable], Callable]:
    """Declares a function `(run, *, …) -> None` as a stage; see `StageFunction` for the arguments.

    Raises:
      InputError: the name is not made of lower-case letters, digits, "_" and "."; `how` or `contents` name a parameter
        that the function does not have.
    """
    declared = StageFunction(name, revision, tuple(how), dict(contents or {}))
    if not name.replace("_", "").replace(".", "").isalnum() or name != name.lower():
        raise InputError(f"stage name {name!r}: expected lower-case letters, digits, '_' and '.'")

    def declare(fn: Callable) -> Callable:
        for parameter in (*declared.how, *declared.contents):
            if parameter not in inspect.signature(fn).parameters:
                raise InputError(f"stage {name!r} declares {parameter!r}, which is no parameter of {fn.__name__}")
        fn.stage_function = declared
        return fn

    return declare


def how(default: Any) -> Any:
    """A field of a record that cannot change the result, such as the steps between checkpoints: no part of any id."""
    return dataclasses.field(default=default, metadata={"how": True})


def is_section(default: Any) -> bool:
    """Whether the default of a setting is a record, a frozen dataclass. Configurations and spec.json then hold a
    dictionary of its fields, of which those that are left out keep their defaults; the stage is given the record."""
    return dataclasses.is_dataclass(default) and not isinstance(default, type)


def section(default: Any, given: Any, where: str) -> Any:
    """The record `default` with the fields that a dictionary or a record of its class gives; None: as it is.

    Args:
      where: what it is called in messages.

    Raises:
      InputError: `given` is no dictionary, or has a key that is no field.
    """
    if isinstance(given, type(default)):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"{where} is {given!r}, expected a dictionary of settings")
    known = [f.name for f in dataclasses.fields(default)]
    for key in given or {}:
        if key not in known:
            raise InputError(f"{where} has no setting {key!r}{nearest(key, known)}")
    return dataclasses.replace(default, **(given or {}))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of what there is."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(known))}"


def identifying(default: Any, value: Any) -> Any:
    """The part of a JSON value that identifies a call, in canonical form; of a section, the fields that differ from
    their defaults and are not declared with `how`. It comes in a list; None where nothing is left."""
    value = canonical(value)
    if not is_section(default):
        return None if default is not inspect.Parameter.empty and _same(value, default) else [value]
    fields = [f for f in dataclasses.fields(default) if not f.metadata.get("how")]
    told = {f.name: value[f.name] for f in fields if not _same(value[f.name], getattr(default, f.name))}
    return [told] if told else None


def _same(value: Any, default: Any) -> bool:
    return dumps(value) == dumps(canonical(default))


def declaration(fn: Callable) -> StageFunction:
    """What a function was declared as. A function without a declaration is identified by its name, module and compiled
    code, so that an edited one is another stage.

    Raises:
      InputError: such a function uses variables of a function around it, which nothing would identify.
    """
    found = getattr(fn, "stage_function", None)
    if found is not None:
        return found
    if fn.__closure__:
        names = ", ".join(fn.__code__.co_freevars)
        raise InputError(
            f"{fn.__name__} reads {names} of the function around it, which cannot be part of its id: pass them as "
            "settings or inputs, or declare it with stage_function"
        )
    return StageFunction(f"{fn.__module__}.{fn.__qualname__}@{_code_digest(fn.__code__)}")


def _code_digest(code: CodeType) -> str:
    constants = [_code_digest(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    parts = [code.co_code.hex(), constants, code.co_names, code.co_varnames]
    return sha256_of(repr(parts))[:12]


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def canonical(value: Any) -> Any:
    """A JSON value in which equal numbers are equal: whole floats are integers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: canonical(inner) for key, inner in value.items()}
    return [canonical(inner) for inner in value] if isinstance(value, list | tuple) else value


def call_id(fn: Callable, settings: Mapping[str, Any], contents: Mapping[str, str], ids: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that identify a call.

    Args:
      settings: JSON values, with the defaults filled in. contents: of settings that name local files.
      ids: input -> the id of an artifact, a list of ids, or None.
    """
    declared, parameters = declaration(fn), inspect.signature(fn).parameters
    told = {}
    for name, value in (dict(settings) | dict(ids)).items():
        found = identifying(parameters[name].default, value)
        if found is not None and name not in declared.how:
            told[name] = {"content": contents[name]} if name in contents else found[0]
    text = dumps([declared.name, declared.revision, told], sort_keys=True)
    return sha256_of(text)[:12]


def contents_of(fn: Callable, settings: Mapping[str, Any], sha256: Sha256 = sha256) -> dict[str, str]:
    """Setting -> what identifies the content of the local file that it names; InputError where that cannot be read."""
    found = {}
    for name, content in declaration(fn).contents.items():
        value = settings.get(name)
        try:
            identity = None if value is None else content(value, settings, sha256)
        except OSError as e:
            raise InputError(f"{name} is {value!r}, which cannot be read ({e.strerror or e})") from None
        if identity is not None:
            found[name] = identity
    return found


def file_content(value: Any, settings: Mapping[str, Any] | None = None, sha256: Sha256 = sha256) -> str | None:
    """What identifies a file; None where there is no such file."""
    path = Path(value).expanduser()
    return sha256(path) if path.is_file() else None


def model_content(value: Any, settings: Mapping[str, Any] | None = None, sha256: Sha256 = sha256) -> str | None:
    """What identifies a folder with a model; None where there is no such folder, as for a hub id."""
    path = Path(value).expanduser()
    return digest_model(path, sha256) if path.is_dir() else None


def local_models(value: Any, settings: Mapping[str, Any] | None = None, sha256: Sha256 = sha256) -> str | None:
    """What identifies a JSON value in which strings may name folders with models, by the content of the folders; None
    where none does."""
    found: list[str] = []

    def told(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {key: told(inner) for key, inner in x.items()}
        if isinstance(x, list | tuple):
            return [told(inner) for inner in x]
        if not isinstance(x, str) or not os.path.isdir(os.path.expanduser(x)):
            return x
        found.append(digest_model(Path(x).expanduser(), sha256))
        return found[-1]

    text = dumps(canonical(told(value)), sort_keys=True)
    return sha256_of(text) if found else None


def digest_model(folder: Path, sha256: Sha256 = sha256) -> str:
    """SHA-256 over the configuration, tokenizer and weights of a model in Hugging Face layout: of the folder itself and
    of those that its modules.json names."""
    folder = Path(folder)
    modules = read_json(folder / "modules.json") if (folder / "modules.json").is_file() else []
    places = {folder, *(folder / m["path"] for m in modules)}
    files = {p for place in places if place.is_dir() for p in place.iterdir()}
    kinds = (".json", ".jinja", ".safetensors", ".txt", ".model")
    return sha256_all(folder, [p for p in files if p.suffix in kinds], sha256)


def array_digest(values: Any) -> str:
    """12 hexadecimal digits of the paths, shapes, types and values of the leaves of a pytree of arrays."""
    parts = []
    for name, x in sorted(tree.flatten(values).items()):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        x = np.asarray(x)
        parts += [f"{name} {x.dtype} {x.shape} ", np.ascontiguousarray(x).tobytes()]
    return sha256_of(*parts)[:12]
