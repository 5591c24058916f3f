"""Where artifacts and reports are kept: the flag --root of every script.

    --root=runs                      a directory; of several machines, on a disk that they share
    --root=gs://BUCKET/FOLDER        an object store (s3://, az:// as well; needs gcsfs, s3fs or adlfs)

With an object store, the work is done in ~/.cache/ctg_jax/roots (XDG_CACHE_HOME); finished stages, reports and the last
checkpoint of an unfinished training are copied to the store, so that another machine can
continue with the same command.
"""

from __future__ import annotations

import os
from pathlib import Path

from ctg_jax.run.session import Session
from ctg_jax.run.store import Store


def opened(root: str) -> str | Store:
    """A root as `stage` takes it."""
    scheme, found, rest = str(root).partition("://")
    if isinstance(root, Store) or not found:
        return root
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Store(root, cache / "ctg_jax" / "roots" / scheme / rest.strip("/"))


def keep_files(session: Session, folder: Path) -> None:
    """Copies a report to the store, where the root is in one."""
    if session.store is not None:
        session.store.keep_files(folder.absolute())
