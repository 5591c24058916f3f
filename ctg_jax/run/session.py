"""`Session`: what the stages of one run share. A script makes one from its command line and passes it on."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax

from ctg_jax.io import Digests
from ctg_jax.mesh.layout import Layout, current
from ctg_jax.run.metrics import check_boards
from ctg_jax.run.store import Store


@dataclasses.dataclass
class Tally:
    """Directory names of the stages that were executed and of those that were found finished."""

    executed: list[str] = dataclasses.field(default_factory=list)
    reused: list[str] = dataclasses.field(default_factory=list)


class Session(os.PathLike):
    """The root of all artifacts, the layout, and what was opened there.

    Everything that `ctg_jax.run.stage.stage` returns knows its session (`Artifact.session`), so models, encoders and
    judges that several stages read are opened once. As a path, a session is its local root.

    Args:
      root: a directory, made where it is missing; or a `Store`.
      layout: on which devices stages compute; None: the layout in force (`ctg_jax.mesh.layout`).
      boards: where the figures of trainings are drawn while they run: "tensorboard", "wandb" or both.

    Attributes:
      root: the local directory, absolute.
      store: the `Store`, or None.
      tally: the stages that were executed and reused so far.
      pending: None, or in a dry run (`dry_run`) the stages that would be executed: directory name -> spec.
      sha256: SHA-256 of a file; a file that has not changed is read once.
    """

    def __init__(self, root: str | os.PathLike, *, layout: Layout | None = None, boards: Sequence[str] = ()):
        self.store = root if isinstance(root, Store) else None
        self.root = Path(root).absolute()
        self.layout = current() if layout is None else layout
        self.boards = check_boards(boards)
        self.tally = Tally()
        self.pending: dict[str, dict[str, Any]] | None = None
        self.sha256 = Digests()
        self._kept: dict[str, OrderedDict[Hashable, Any]] = {}

    @classmethod
    def of(cls, root: str | os.PathLike) -> Session:
        """The session itself, or a new one for a path or a `Store`."""
        return root if isinstance(root, Session) else cls(root)

    def __fspath__(self) -> str:
        return str(self.root)

    def __str__(self) -> str:
        return str(self.store or self.root)

    def dry_run(self) -> Session:
        """A session with the same root in which no stage is executed. Finished stages are found as usual; for the
        others `stage` returns an `Artifact` that can be the input of further stages, and `pending` collects them.

        Reading the contents of a stage that has not run raises `UnfinishedError`.
        """
        found = copy.copy(self)
        found.pending, found.tally = {}, Tally()
        return found

    def keep(self, kind: str, key: Hashable, make: Callable[[], Any], most: int = 4) -> Any:
        """What `make` returned for this key, in this layout; of each kind the `most` that were asked for last are
        kept."""
        kept, key = self._kept.setdefault(kind, OrderedDict()), (key, current())
        if key not in kept:
            while len(kept) >= most:  # before the new one is made, so that both are never in memory
                kept.popitem(last=False)
            kept[key] = make()
        kept.move_to_end(key)
        return kept[key]

    def open_lm(self, key: Hashable, read: Callable[[], tuple], unstacked: bool = False) -> tuple[Any, Any, Any]:
        """(lm, params, tokenizer), kept for two language models, with one copy of the parameters of each: in the form
        that was asked for last. See `ctg_jax.run.artifact.open_lm`.

        Args:
          key: identifies the files and the dtype.
          read: reads the model, its layers stacked.
          unstacked: with a tuple of layers, which decodes without a second copy of the weights.
        """
        found = self.keep("lm", key, read, most=2)
        if isinstance(found[1]["layers"], tuple) and not unstacked:
            self._kept["lm"].pop((key, current()))
            del found
            found = self.keep("lm", key, read, most=2)
        elif unstacked and not isinstance(found[1]["layers"], tuple):
            model, params, tokenizer = found
            found = model, jax.jit(model.unstack)(params), tokenizer
            self._kept["lm"][key, current()] = found
        return found


def keep_compiled(folder: str | os.PathLike) -> None:
    """Keeps compiled programs in a folder between runs, so that a second start compiles nothing. Where the user chose a
    folder already (`jax_compilation_cache_dir`), that choice and what belongs to it stay."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
