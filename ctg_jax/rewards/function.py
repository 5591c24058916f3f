"""A reward that calls out, such as a web service or a user's own slow function: many calls at once, tried again,
answers kept on disk under what the function is."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np

from ctg_jax.io import dumps, sha256_of
from ctg_jax.rewards.check import checked, readable
from ctg_jax.types import InputError


class FunctionReward:
    """Scores from a function of one prompt and one text.

    Args:
      fn: (prompt, text) -> a finite number; called from several threads.
      name: what it measures.
      version: what would change if its answers changed although its file did not: another model behind a service, say,
        or another version of what the file imports.
      code: digest of the code of `fn`, as `named` gives it; by default `code_of(fn)`.
      workers: calls at a time.
      retries: further tries of a call that raises, after waits of `wait` seconds that double.
      cache: a file of answers (SQLite) that outlives the process, or None. Answers are kept under code and version;
        those of a function whose code cannot be identified are not kept.
      threshold: the score from which a text counts as having the attribute.
    """

    def __init__(
        self,
        fn: Callable[[str, str], float],
        *,
        name: str,
        version: str,
        code: str | None = None,
        workers: int = 8,
        retries: int = 3,
        wait: float = 1.0,
        cache: str | Path | None = None,
        threshold: float = 0.5,
    ):
        if not version:
            raise InputError(f"version of the reward {name!r} is empty: its answers are kept under it, so give one")
        if workers < 1 or retries < 0:
            raise InputError(f"workers is {workers} and retries is {retries}: expected at least 1 and 0")
        self.fn, self.name, self.threshold = fn, name, threshold
        self.code = code or code_of(fn)
        self.version = version if self.code is None else f"{version}@{self.code}"
        self.workers, self.retries, self.wait = workers, retries, wait
        self.cache = None if cache is None or self.code is None else Path(cache)

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Scores float32 [n]. Every answer is on disk before the next is waited for.

        Raises:
          InputError: a call failed `retries` + 1 times (the answers so far are kept), or gave no finite number.
        """
        readable(self.name, prompts, texts, "text")
        keys = [self._key(p, t) for p, t in zip(prompts, texts)]
        known = self._known(keys)
        open_ = {k: (p, t) for k, p, t in zip(keys, prompts, texts) if k not in known}
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix=self.name)
        try:
            calls = {pool.submit(self._call, p, t): key for key, (p, t) in open_.items()}
            for call in as_completed(calls):
                known[calls[call]] = value = call.result()
                self._keep(calls[call], value)
        finally:
            pool.shutdown(cancel_futures=True)
        return checked(self.name, [known[k] for k in keys], len(texts))

    def _call(self, prompt: str, text: str) -> float:
        for attempt in range(self.retries + 1):
            try:
                value = self.fn(prompt, text)
                break
            except Exception as e:  # whatever a service raises
                if attempt == self.retries:
                    raise InputError(
                        f"reward {self.name!r} failed {attempt + 1} times, last with {type(e).__name__}: {e}; what was "
                        "scored is kept, so start again when it answers"
                    ) from e
                time.sleep(self.wait * 2**attempt)
        if np.ndim(value) or np.asarray(value).dtype.kind not in "biuf" or not np.isfinite(value):
            raise InputError(
                f"reward {self.name!r} returned {value!r:.60} for {text[:60]!r}; expected a finite number for each text"
            )
        return float(value)

    def _key(self, prompt: str, text: str) -> str:
        return sha256_of(dumps([self.version, prompt, text], ensure_ascii=True))

    def _open(self) -> sqlite3.Connection:
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.cache, timeout=60)
        db.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL)")
        return db

    def _known(self, keys: Sequence[str]) -> dict[str, float]:
        if self.cache is None:
            return {}
        with closing(self._open()) as db:
            ask = "SELECT key, score FROM scores WHERE key = ?"
            found = (db.execute(ask, (k,)).fetchone() for k in dict.fromkeys(keys))
            return dict(row for row in found if row)

    def _keep(self, key: str, score: float) -> None:
        if self.cache is not None:
            with closing(self._open()) as db, db:
                db.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, score))


def named(path: str) -> tuple[Callable[[str, str], float], str | None]:
    """The function that "package.module:function" names, from this Python's own path, and the digest of its code.

    A source file is read and executed now, apart from any copy of the module that was imported before, so that the
    digest is that of the code that runs, also after the file was edited. The digest is None for a module without a
    file, and covers nothing that the file imports.

    Raises:
      InputError: the path is written otherwise, or names nothing, or what is only imported there.
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
