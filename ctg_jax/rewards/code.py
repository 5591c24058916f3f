"""Functions given by name, and what identifies the code of a function."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ctg_jax.io import sha256_of
from ctg_jax.types import InputError


def named(path: str) -> tuple[Callable[[str, str], float], str | None]:
    """The function that "package.module:function" names, from this Python's own path, and the digest of its code.

    The source file is read and executed again, independently of a copy of the module that was imported before, so that
    the digest is that of the code that runs, even after the file was edited. The digest is None for a module without a
    file, and covers nothing that the file imports.

    Raises:
      InputError: the path has another form, or names nothing, or something that is only imported there.
    """
    module, _, function = path.partition(":")
    try:
        spec, origin = _located(path)
        code = None if origin is None else _digest(source := origin.read_bytes(), function)
        if origin is None or origin.suffix != ".py":
            fn = importlib.import_module(module)
        else:
            fn = _executed(spec, compile(source, str(origin), "exec", dont_inherit=True))
        for part in function.split("."):
            fn = getattr(fn, part)
    except Exception as e:  # whatever the file raises
        raise InputError(f"function is {path!r}, expected module:function of an importable module ({e})") from e
    if not callable(fn):
        raise InputError(f"function is {path!r}, which is a {type(fn).__name__} and cannot be called")
    if inspect.isfunction(fn) and fn.__module__ != module:
        raise InputError(f"function is {path!r}, which only imports it: name it as {fn.__module__}:{fn.__qualname__}")
    return fn, code


def _executed(spec: Any, code: CodeType) -> ModuleType:
    """A fresh module from its code. It takes the place of one that was imported before only while it is executed."""
    fresh, before = importlib.util.module_from_spec(spec), sys.modules.get(spec.name)
    sys.modules[spec.name] = fresh  # dataclasses look their module up
    try:
        exec(code, fresh.__dict__)
    finally:
        if before is None:
            del sys.modules[spec.name]
        else:
            sys.modules[spec.name] = before
    return fresh


def function_content(path: str, settings: Any = None, sha256: Any = None) -> str | None:
    """The digest that `named` gives, without running anything; None for a module without a file."""
    try:
        origin = _located(path)[1]
    except (ImportError, AttributeError, ValueError) as e:
        raise InputError(f"function is {path!r}, expected module:function of an importable module ({e})") from None
    return None if origin is None else _digest(origin.read_bytes(), path.partition(":")[2])


def _located(path: str) -> tuple[Any, Path | None]:
    """(spec of the module, its file or None)."""
    module, colon, _ = path.partition(":")
    if not colon:
        raise ImportError("there is no colon in it")
    importlib.invalidate_caches()  # a file that was written a moment ago
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {module!r}")
    return spec, Path(spec.origin) if spec.has_location else None


def code_of(fn: Callable) -> str | None:
    """The digest of a function's source file and name; None where they do not identify it: a lambda, a function inside
    another, an object, one that was typed in, or one whose file has changed since it was imported."""
    if not inspect.isfunction(fn) or fn.__closure__ or "<" in fn.__qualname__:
        return None
    try:
        source = Path(fn.__code__.co_filename).read_bytes()
        whole = compile(source, fn.__code__.co_filename, "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError):
        return None
    return _digest(source, fn.__qualname__) if fn.__code__ in _codes(whole) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _digest(source: bytes, function: str) -> str:
    return sha256_of(source, b"\0", function)[:12]
