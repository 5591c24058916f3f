"""A linear probe on sentence embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctg_jax.io import digest
from ctg_jax.rewards.check import texts_and_labels
from ctg_jax.rewards.logistic import (
    LinearClassifier,
    check_training,
    fit_logistic,
    read_model,
    same_version,
    write_model,
)
from ctg_jax.types import InputError

EmbedFn = Callable[[Sequence[str]], np.ndarray]  # n texts -> float [n, D]


class LinearProbe(LinearClassifier):
    """Probability of one class under a multinomial (or binary) logistic regression on embeddings.

    Attributes:
      embed: n texts -> float [n, D]; its `.version`, if it has one, is part of the probe's version.
    """

    kind = "linear-probe"

    def __init__(
        self,
        embed: EmbedFn,
        coef: np.ndarray,
        intercept: np.ndarray,
        classes: Sequence[int],
        *,
        name: str = "linear-probe",
        target: int = 1,
        reads: str = "text",
        trained_on: str = "",
    ):
        super().__init__(coef, intercept, classes, name=name, target=target, reads=reads, trained_on=trained_on)
        self.embed, self.embedder = embed, getattr(embed, "version", "unnamed")

    @functools.cached_property
    def weights(self) -> str:
        return digest(self.coef, self.intercept, self.classes, self.embedder, self.trained_on)

    def features(self, texts: Sequence[str]) -> np.ndarray:
        x = _embedding(self.embed(texts), len(texts))
        if x.shape[1] != self.coef.shape[1]:
            raise InputError(
                f"embed gave vectors of width {x.shape[1]}; this probe was fitted on width {self.coef.shape[1]}"
            )
        return x

    @classmethod
    def fit(
        cls,
        embed: EmbedFn,
        texts: Sequence[str],
        labels: Sequence[int],
        *,
        name: str = "linear-probe",
        target: int = 1,
        reads: str = "text",
        inverse_l2: float = 1.0,
        seed: int = 0,
    ) -> LinearProbe:
        """Fits a probe; `inverse_l2` is the inverse weight of the L2 penalty. Texts without a label (None or -1) are
        left out and counted in a warning.

        Raises:
          InputError: unequal lengths, fewer than two labels, or embeddings of a wrong shape.
        """
        texts, labels = check_training(texts, labels, name)
        x = embed(texts)
        coef, intercept, classes = fit_logistic(_embedding(x, len(texts)), labels, inverse_l2, seed)
        trained_on = digest(texts, labels.tolist())
        return cls(embed, coef, intercept, classes, name=name, target=target, reads=reads, trained_on=trained_on)

    def save(self, directory: str | Path) -> None:
        """Writes probe.npz (weights) and probe.json (everything else); the embedder itself is not copied."""
        write_model(directory, self._meta() | {"embedder": self.embedder}, coef=self.coef, intercept=self.intercept)

    @classmethod
    def load(cls, directory: str | Path, embed: EmbedFn) -> LinearProbe:
        """Reads what `save` wrote.

        Raises:
          InputError: missing or damaged files, or an embedder of another version than the probe was fitted on.
        """
        meta, arrays = read_model(directory, "linear-probe")
        found = getattr(embed, "version", "unnamed")
        if found != meta["embedder"]:
            raise InputError(
                f"embed has version {found!r}, but the probe in {directory} was fitted on {meta['embedder']!r}; "
                "load it with that encoder or fit it again"
            )
        probe = cls(
            embed,
            arrays["coef"],
            arrays["intercept"],
            meta["classes"],
            name=meta["name"],
            target=meta["target"],
            reads=meta["reads"],
            trained_on=meta["trained_on"],
        )
        return same_version(probe, meta, directory)


def _embedding(x, n: int) -> np.ndarray:
    x = np.asarray(x, np.float32)
    if x.ndim != 2 or x.shape[0] != n:
        raise InputError(f"embed returned shape {list(x.shape)} for {n} texts; expected [{n}, D]")
    return x


SETTINGS = ("data", "target", "reads", "encoder")


def fit(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], where: str) -> LinearProbe:
    """The judge of kind "probe", fitted on the embeddings of labelled texts; see `ctg_jax.rewards`."""
    options = {key: settings[key] for key in ("name", "target", "reads")}
    return LinearProbe.fit(settings["embedder"](), *texts_and_labels(records, where), **options)


def load(folder: Path, settings: Mapping[str, Any]) -> LinearProbe:
    """The judge of kind "probe" that was saved in a folder."""
    return LinearProbe.load(folder, settings["embedder"]())
