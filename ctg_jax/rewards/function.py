"""A reward that calls a web service or a slow function of the user: concurrent calls, retries, and answers that are
kept on disk under the identity of the function."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ctg_jax.io import dumps, sha256_of
from ctg_jax.rewards.check import checked, readable
from ctg_jax.rewards.code import code_of, named
from ctg_jax.types import InputError


class FunctionReward:
    """Scores from a function of one prompt and one text.

    Args:
      fn: (prompt, text) -> a finite number; called from several threads. It may have a function `explain` of the same
        arguments as an attribute, which says in words what is wrong with a text.
      name: what it measures.
      version: changes when the answers change although the file does not, for example with another model behind a
        service or another version of what the file imports.
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
        if hasattr(fn, "explain"):
            self.explain = self._explain

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

    def _explain(self, prompts: Sequence[str], texts: Sequence[str]) -> list[str]:
        found = []
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            try:
                words = self.fn.explain(prompt, text)
            except Exception as e:  # whatever a function of the user raises
                raise InputError(
                    f"explain of the reward {self.name!r} failed for text {i} with {type(e).__name__}: {e}"
                ) from e
            if not isinstance(words, str):
                raise InputError(
                    f"explain of the reward {self.name!r} returned {words!r:.60} for text {i}; expected a string"
                )
            found.append(words)
        return found

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


SETTINGS = ("function", "version")


def load(folder: Path, settings: Mapping[str, Any]) -> FunctionReward:
    """The judge of kind "function"; see `ctg_jax.rewards`. Its scores are cached in .scores, beside all artifacts."""
    fn, code = named(settings["function"])
    cache = folder.parents[1] / ".scores" / f"{code}.sqlite"
    return FunctionReward(fn, name=settings["name"], version=settings["version"], code=code, cache=cache)
