"""Searches of one vector for each sequence of tokens: how each is searched, and sequences of like length together."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ctg_jax import rng
from ctg_jax.learn.slot_search import SearchState, solve
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.types import InputError, PyTree

STARTS = ("zero", "normal", "uniform")


@dataclasses.dataclass(frozen=True)
class Search:
    """How vectors are searched: the section `search` of a configuration.

    Attributes:
      start: each vector at first: "zero", "normal" (variance 2 / (d + 1): Glorot & Bengio 2010) or "uniform" (of the
        same variance).
      rate: of Adam.
      decay: what the rate is multiplied by when the loss has not fallen for `patience` updates.
      patience: see `decay`.
      updates: of a vector at most; it stops earlier when it is solved.
      batch: vectors at work at once; None: as many as fit into `memory`.
      memory: GiB.
    """

    start: str = "zero"
    rate: float = 0.1
    decay: float = 0.9
    patience: int = 20
    updates: int = 500
    batch: int | None = None
    memory: float = 1.0

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Adam whose rate falls on plateaus of the loss."""
        return optax.chain(
            optax.scale_by_adam(),
            optax.contrib.reduce_on_plateau(factor=self.decay, patience=self.patience, min_scale=1e-2),
            optax.scale(-self.rate),
        )

    def starts(self, key: jax.Array, ids: np.ndarray, dim: int) -> np.ndarray:
        """Where each vector begins, float32 [N, d]: a function of the key and the example's id alone.

        Raises:
          InputError: an unknown `start`.
        """
        if self.start not in STARTS:
            raise InputError(f"start is {self.start!r}, expected one of {', '.join(STARTS)}.")
        if self.start == "zero" or not len(ids):
            return np.zeros((len(ids), dim), np.float32)
        keys = rng.per_example(rng.stream(key, "start"), ids)
        if self.start == "normal":
            draw = jax.random.normal
        else:
            draw = lambda k, shape: jax.random.uniform(k, shape, minval=-1) * 3**0.5  # noqa: E731
        return np.asarray(jax.vmap(lambda k: draw(k, (dim,)))(keys)) * (2 / (dim + 1)) ** 0.5


def solve_by_length(
    run: Callable[[SearchState, jax.Array, PyTree, PyTree], SearchState],
    start: np.ndarray,
    inputs: Sequence[int],
    rows_of: Callable[[int, np.ndarray, int], PyTree],
    frozen: PyTree,
    search: Search,
    lm: LM,
    mesh: Mesh,
    *,
    keep: Path | None = None,
    save_every: float = 60.0,
) -> dict[str, np.ndarray]:
    """`solve` for rows that hold sequences: those of like length are searched together.

    Args:
      start: float32 [N, d]. inputs: [N], how many tokens of each row the model reads.
      rows_of: (length, indices of rows, slots) -> what the objective reads of these rows, leaves [rows, …].
      lm: the part of the model that a search runs, for its sizes.
      keep: a directory in which an interrupted search is continued, even inside a chunk.
    """
    from tqdm import tqdm

    n = len(start)
    out = {"z": np.zeros_like(start), "loss": np.zeros(n, np.float32), "score": np.zeros(n, np.float32)}
    out |= {"steps": np.zeros(n, np.int32), "solved": np.zeros(n, bool)}
    done = 0
    with tqdm(total=n, desc="latent vectors", unit="sentence", disable=None, leave=False) as bar:
        for length, index in chunks(lm.width, inputs, search.memory):
            finished = None if keep is None else keep / f"chunk-{length}-{index[0]}"
            if finished is not None and (finished / checkpoint.MANIFEST).exists():
                part = checkpoint.load(finished)
            else:
                slots = search.batch or rows_that_fit(lm, length, search.memory)
                part = solve(
                    run, start[index], rows_of(length, index, slots), frozen, search.optimizer(), slots, mesh,
                    keep=None if keep is None else keep / "search", save_every=save_every,
                    progress=lambda m, done=done: bar.update(done + m - bar.n),
                )  # fmt: skip
                if finished is not None:
                    checkpoint.save(finished, part)
                    shutil.rmtree(keep / "search", ignore_errors=True)
            for name, values in out.items():
                values[index] = part[name]
            done += len(index)
            bar.update(done - bar.n)
    return out


def chunks(width: int, inputs: Sequence[int], memory: float) -> Iterator[tuple[int, np.ndarray]]:
    """(length, indices) of sequences of at most `length` inputs, a multiple of 8, whose hidden states [length, width]
    fit in half of `memory` GiB."""
    sizes = np.asarray([-(-n // 8) * 8 for n in inputs], int)
    for length in np.unique(sizes):
        index = np.flatnonzero(sizes == length)
        most = max(1, int(memory * 2**29 / (length * width * 4)))
        for a in range(0, len(index), most):
            yield int(length), index[a : a + most]


def rows_that_fit(lm: LM, length: int, memory: float) -> int:
    """How many sequences of `length` inputs may be at work at once in `memory` GiB: a power of 2 from 8 to 256. A row
    holds logits with their gradient and exponentials, and about 24 activations of the width for each block."""
    bytes_per_row = 4 * length * (3 * lm.vocab + lm.depth * 24 * lm.width)
    return int(2 ** np.clip(np.floor(np.log2(memory * 2**30 / bytes_per_row)), 3, 8))
