"""Settings of a configuration that the command line or a sweep changes: `--config.KEY=TEXT` and dotted dictionaries.

A key that the configuration holds keeps its type: a text stays a text, a number must be a number, and None is taken
where it is written. Settings of `fit` and `init` may have several types (`sites="all"` or `sites=3`), so there a text
that is a Python literal is that value. A key that the configuration does not hold is checked against the parameters of
the stage that reads its section.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from ctg_jax.controls import truncate
from ctg_jax.learn.classifier import classifier
from ctg_jax.learn.pretrain import pretrain
from ctg_jax.run.identity import is_section
from ctg_jax.run.stage import nearest
from ctg_jax.stages import judges, sampling, sources
from ctg_jax.types import InputError
from experiments import arms

FREE = ("fit", "init")  # sections whose settings belong to a method, which checks them
_READERS = {  # section -> what reads its settings
    **dict.fromkeys(("prompts", "data", "heldout", "references", "human"), sources.load_data),
    "sample": sampling.sample,
    "filter": truncate.rules,
    "evaluate": judges.evaluate,
    "pretrain": pretrain,
    "train": classifier,
}
_WORDS = {"true": True, "false": False}  # "none" is the name of a choice in some methods


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of a configuration with dotted keys replaced.

    Raises:
      InputError: a key that neither the configuration nor the stage that reads it knows, with the nearest name; a value
        of another type.
    """
    config = apart(config)
    for key, value in changes.items():
        path = key.split(".")
        if _free(path):
            where = _made(config, path[:-1])
            with where.unlocked(), where.ignore_type():
                where[path[-1]] = value
        elif known := _unheld(config, path):
            if path[-1] not in known:
                raise _unknown(path, known)
            with (where := _at(config, path[:-1])).unlocked():
                where[path[-1]] = value
        else:
            _check(config, path)
            try:
                config.update_from_flattened_dict({key: value})
            except TypeError as e:
                raise InputError(f"{key}={value!r}: {e}") from None
    return config


def apart(config: ConfigDict) -> ConfigDict:
    """A copy in which sections that were one object, such as the settings of training that two arms were given, are
    changed one by one."""

    def copied(value):
        return {k: copied(v) for k, v in value.items()} if isinstance(value, dict) else value

    return ConfigDict(copied(config.to_dict()))


def given(config: ConfigDict, argv: Sequence[str]) -> dict[str, Any]:
    """The settings of a command line, key -> value: `--config.KEY=TEXT`, `--config.KEY` and `--noconfig.KEY`.

    Raises:
      InputError: an unknown key, one without a value, a text that is no value for it.
    """
    found = {}
    for a in argv:
        flag, equals, text = a.partition("=")
        for start, switch in (("--config.", True), ("--noconfig.", False)):
            if flag.startswith(start):
                key = flag.removeprefix(start)
                path = key.split(".")
                held = _held(config, path)
                if equals and switch:
                    found[key] = _value(config, path, text)
                elif isinstance(held, bool) and not equals:
                    found[key] = switch
                else:
                    raise InputError(f"{start}{key} has no value: write --config.{key}=VALUE")
    return found


def literal(text: str) -> Any:
    """The Python value that a text is; true and false are values too, and anything else is itself."""
    try:
        return _WORDS[text.lower()] if text.lower() in _WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError):
        return text


def _value(config: ConfigDict, path: Sequence[str], text: str) -> Any:
    """The value that a text stands for, by what the configuration holds."""
    held, name, value = _held(config, path), f"--config.{'.'.join(path)}={text}", literal(text)
    if text.lower() in ("none", "null") and not _free(path):
        return None
    if value is None or held is None:
        return value
    if isinstance(held, bool):
        if value in (True, False):
            return bool(value)
        raise InputError(f"{name}: expected true or false")
    if isinstance(held, tuple | list):
        if isinstance(value, tuple | list) or (_free(path) and not isinstance(value, dict)):
            return value
        raise InputError(f"{name}: expected a tuple such as '(1, 2)'")
    if isinstance(held, int | float):
        if (isinstance(value, int | float) and not isinstance(value, bool)) or (_free(path) and value != text):
            return value
        raise InputError(f"{name}: expected a number, such as {held}")
    if isinstance(held, ConfigDict) and not isinstance(value, dict):
        raise InputError(f"{name}: this is a section, which has {', '.join(held)}: give one of its settings")
    return text if isinstance(held, str) and not _free(path) else value


def _free(path: Sequence[str]) -> bool:
    """Whether a key is in a section of `FREE`."""
    return bool(set(FREE) & set(path[:-1]))


def _held(config: ConfigDict, path: Sequence[str]) -> Any:
    """What the configuration holds under a key; None where it is a setting that it leaves out."""
    if not _free(path) and not _unheld(config, path):
        _check(config, path)
    where = config
    for name in path:
        if not isinstance(where, ConfigDict) or name not in where:
            return None
        where = where[name]
    return where


def _unheld(config: ConfigDict, path: Sequence[str]) -> list[str]:
    """What the reader of a section knows, where the section is there and does not hold the key; else nothing."""
    where = config
    for name in path[:-1]:
        if not isinstance(where, ConfigDict) or name not in where:
            return []
        where = where[name]
    if not isinstance(where, ConfigDict) or path[-1] in where:
        return []
    known = _reader(path[:-1])
    return sorted({*known, *where}) if known else []


def _reader(section: Sequence[str]) -> list[str]:
    """The settings that a section may have; empty where nothing says it."""
    if len(section) == 2 and section[0] == "methods":
        kinds = [arms.Plain, *(kind for _, kind in arms.KINDS)]
        return [f.name for kind in kinds for f in dataclasses.fields(kind)]
    if len(section) == 2 and section[0] == "judges":
        read = judges.fit_judge
    elif section and section[-1] in _READERS:
        read = _READERS[section[-1]]
    elif len(section) > 1 and section[-2] in _READERS:  # a section of settings, such as lm.pretrain.training
        default = inspect.signature(_READERS[section[-2]]).parameters.get(section[-1])
        record = default is not None and is_section(default.default)
        return [f.name for f in dataclasses.fields(default.default)] if record else []
    else:
        return []
    known = [p.name for p in inspect.signature(read).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return [*known, sampling.PROPOSED] if section[-1] == "filter" else known


def _at(config: ConfigDict, path: Sequence[str]) -> ConfigDict:
    for name in path:
        config = config[name]
    return config


def _made(config: ConfigDict, path: Sequence[str]) -> ConfigDict:
    """A section below the `fit` or `init` of an arm, made where it is missing; the arm is there."""
    first = next(i for i, name in enumerate(path) if name in FREE)
    _check(config, path[:first])
    where = _at(config, path[:first])
    for name in path[first:]:
        if name not in where or not isinstance(where[name], ConfigDict):
            with where.unlocked(), where.ignore_type():
                where[name] = ConfigDict()
        where = where[name]
    return where


def _check(config: ConfigDict, path: Sequence[str]) -> None:
    here, done = config, []
    for part in path:
        if not isinstance(here, ConfigDict) or part not in here:
            known = list(here) if isinstance(here, ConfigDict) else _flat(config)
            name = part if isinstance(here, ConfigDict) else ".".join(path)
            where = ".".join(done) or "the configuration"
            raise InputError(f"{where} has no setting {part!r} (in config.{'.'.join(path)}){nearest(name, known)}")
        here, done = here[part], [*done, part]


def _unknown(path: Sequence[str], known: Sequence[str]) -> InputError:
    where = ".".join(path[:-1]) or "the configuration"
    return InputError(f"{where} has no setting {path[-1]!r} (in config.{'.'.join(path)}){nearest(path[-1], known)}")


def _flat(config: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for k, v in config.items():
        keys += _flat(v, f"{prefix}{k}.") if isinstance(v, ConfigDict) else [prefix + k]
    return keys
