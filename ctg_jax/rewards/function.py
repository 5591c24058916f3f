"""A reward that calls out, such as a web service or a user's own slow function: many calls at once, tried again,
answers kept on disk."""

from __future__ import annotations

import hashlib
import importlib
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path

import numpy as np

from ctg_jax.rewards.check import checked, readable
from ctg_jax.types import InputError


class FunctionReward:
    """Scores from a function of one prompt and one text.

    Args:
      fn: (prompt, text) -> a finite number; called from several threads.
      name: what it measures. version: what would change if its answers changed; answers are kept under it.
      workers: calls at a time.
      retries: further tries of a call that raises, after waits of `wait` seconds that double.
      cache: a file of answers (SQLite) that outlives the process, or None.
      threshold: the score from which a text counts as having the attribute.
    """

    def __init__(
        self,
        fn: Callable[[str, str], float],
        *,
        name: str,
        version: str,
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
        self.fn, self.name, self.version, self.threshold = fn, name, version, threshold
        self.workers, self.retries, self.wait = workers, retries, wait
        self.cache = None if cache is None else Path(cache)

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
                value = float(self.fn(prompt, text))
                break
            except Exception as e:  # whatever a service raises
                if attempt == self.retries:
                    raise InputError(
                        f"reward {self.name!r} failed {attempt + 1} times, last with {type(e).__name__}: {e}; what was "
                        "scored is kept, so start again when it answers"
                    ) from e
                time.sleep(self.wait * 2**attempt)
        if not np.isfinite(value):
            raise InputError(f"reward {self.name!r} returned {value} for {text[:60]!r}; expected a finite number")
        return value

    def _key(self, prompt: str, text: str) -> str:
        return hashlib.sha256(json.dumps([self.name, self.version, prompt, text]).encode()).hexdigest()

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


def named(path: str) -> Callable[[str, str], float]:
    """The function that "package.module:function" names, from this Python's own path.

    Raises:
      InputError: it is written otherwise, or is not there.
    """
    module, colon, function = path.partition(":")
    try:
        if not colon:
            raise ImportError("there is no colon in it")
        fn = importlib.import_module(module)
        for part in function.split("."):
            fn = getattr(fn, part)
    except (ImportError, AttributeError, ValueError) as e:
        raise InputError(f"function is {path!r}, expected module:function of an importable module ({e})") from None
    if not callable(fn):
        raise InputError(f"function is {path!r}, which is a {type(fn).__name__} and cannot be called")
    return fn
