"""A linear probe on sentence embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctg_jax.io import digest
from ctg_jax.rewards.check import check_reads, checked, readable, texts_and_labels
from ctg_jax.rewards.logistic import (
    check_training,
    class_probabilities,
    fit_logistic,
    read_model,
    same_version,
    write_model,
)
from ctg_jax.types import InputError

EmbedFn = Callable[[Sequence[str]], np.ndarray]  # n texts -> float [n, D]


class LinearProbe:
    """Probability of one class under a multinomial (or binary) logistic regression on embeddings.

    Attributes:
      embed: n texts -> float [n, D]; its `.version`, if it has one, is part of the probe's version.
      coef, intercept: float32 [C, D], [C]; C = 1 for two classes (scores of the second against the first).
      classes: labels in the order of the columns.
      target: the label whose probability is the reward.
    """

    threshold = 0.5

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
        self.embed, self.name, self.reads, self.trained_on = embed, name, check_reads(reads), trained_on
        self.coef, self.intercept = np.asarray(coef, np.float32), np.asarray(intercept, np.float32)
        self.classes, self.target = [int(c) for c in classes], int(target)
        if self.target not in self.classes:
            raise InputError(f"target is {target}; this probe knows the labels {self.classes}")
        self.embedder = getattr(embed, "version", "unnamed")
        weights = digest(self.coef, self.intercept, self.classes, self.embedder, trained_on)
        self.version = f"linear-probe[{self.target}]:{reads}@{weights}"

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

    def of_class(self, target: int, *, name: str | None = None) -> LinearProbe:
        """The same probe as the probability of another label."""
        return LinearProbe(
            self.embed,
            self.coef,
            self.intercept,
            self.classes,
            name=name or self.name,
            target=target,
            reads=self.reads,
            trained_on=self.trained_on,
        )

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, number of classes], columns in the order of `classes`."""
        x = _embedding(self.embed(list(texts)), len(texts))
        if x.shape[1] != self.coef.shape[1]:
            raise InputError(
                f"embed gave vectors of width {x.shape[1]}; this probe was fitted on width {self.coef.shape[1]}"
            )
        return class_probabilities(x @ self.coef.T + self.intercept[None])

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        rows = readable(self.name, prompts, texts, self.reads)
        if not rows:
            return np.zeros((0,), np.float32)
        return checked(self.name, self.probabilities(rows)[:, self.classes.index(self.target)], len(texts))

    def save(self, directory: str | Path) -> None:
        """Writes probe.npz (weights) and probe.json (everything else); the embedder itself is not copied."""
        meta = {
            "kind": "linear-probe",
            "name": self.name,
            "classes": self.classes,
            "target": self.target,
            "reads": self.reads,
            "trained_on": self.trained_on,
            "embedder": self.embedder,
            "version": self.version,
        }
        write_model(directory, meta, coef=self.coef, intercept=self.intercept)

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
