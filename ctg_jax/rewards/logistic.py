"""Logistic regression: fitting, the reward that reads it, and the files that hold it, which are arrays and JSON."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctg_jax.data.labels import known
from ctg_jax.io import atomic, read_json, write_json
from ctg_jax.rewards.check import check_reads, checked, readable
from ctg_jax.types import InputError


class LinearClassifier:
    """The probability of one class under a binary or multinomial logistic regression; what its features are, a
    subclass decides.

    Attributes:
      kind: the first part of the version and the kind of its files.
      coef, intercept: float32 [C, D], [C]; C = 1 for two classes (scores of the second against the first).
      classes: labels in the order of the columns.
      target: the label whose probability is the reward.
      reads: "text" for the continuation, "both" for prompt and continuation.
      trained_on: digest of the texts and labels that it was fitted on.
    """

    kind = "linear"
    threshold = 0.5

    def __init__(
        self,
        coef: np.ndarray,
        intercept: np.ndarray,
        classes: Sequence[int],
        *,
        name: str,
        target: int,
        reads: str,
        trained_on: str,
    ):
        self.name, self.reads, self.trained_on = name, check_reads(reads), trained_on
        self.coef, self.intercept = np.asarray(coef, np.float32), np.asarray(intercept, np.float32)
        self.classes, self.target = [int(c) for c in classes], self._known(target, classes)

    def _known(self, target: int, classes: Sequence[int]) -> int:
        if int(target) not in map(int, classes):
            raise InputError(f"target is {target}; this {self.kind} knows the labels {list(map(int, classes))}")
        return int(target)

    @property
    def version(self) -> str:
        """Names the weights, the class and what is read."""
        return f"{self.kind}[{self.target}]:{self.reads}@{self.weights}"

    @property
    def weights(self) -> str:
        """A digest of everything that the probabilities depend on."""
        raise NotImplementedError

    def features(self, texts: Sequence[str]):
        """The features of texts, [n, D]."""
        raise NotImplementedError

    def of_class(self, target: int, *, name: str | None = None):
        """The same classifier as the probability of another label."""
        other = copy.copy(self)
        other.target, other.name = self._known(target, self.classes), name or self.name
        return other

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, number of classes], columns in the order of `classes`."""
        return class_probabilities(self.features(list(texts)) @ self.coef.T + self.intercept[None])

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        rows = readable(self.name, prompts, texts, self.reads)
        if not rows:
            return np.zeros((0,), np.float32)
        return checked(self.name, self.probabilities(rows)[:, self.classes.index(self.target)], len(texts))

    def _meta(self) -> dict[str, Any]:
        """What probe.json holds of every linear classifier."""
        names = ("kind", "name", "classes", "target", "reads", "trained_on", "version")
        return {name: getattr(self, name) for name in names}


def check_training(texts: Sequence[str], labels: Sequence[int | None], name: str) -> tuple[list[str], np.ndarray]:
    """The texts that have a label, and their labels as int64 [n]; `InputError` where fewer than two labels occur.

    name: of what is fitted, for messages.
    """
    if np.shape(labels) != (len(texts),):
        raise InputError(f"labels has shape {list(np.shape(labels))} for {len(texts)} texts; give one for each text")
    kept = known(labels, f"the texts for {name!r}")
    texts, labels = [texts[i] for i in kept], np.asarray([labels[i] for i in kept])
    if len(np.unique(labels)) < 2:
        raise InputError(f"labels holds {len(np.unique(labels))} distinct value(s); a classifier needs at least two")
    return texts, labels.astype(np.int64)


def fit_logistic(
    x, labels: np.ndarray, inverse_l2: float, seed: int, intercept: bool = True
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """scikit-learn's logistic regression (L2, L-BFGS) at its optimum: at the solver's own tolerance of 1e-4 it stops
    where the third digit of a weight still depends on how the features were rounded.

    Args:
      x: features [n, D], an array or a sparse matrix. labels: int [n].
      inverse_l2: the inverse weight of the L2 penalty, C in scikit-learn. seed: of the solver.
      intercept: whether one is fitted, which is not penalised; otherwise it is 0.

    Returns:
      (coef float32 [C, D], intercept float32 [C], the labels in the order of the rows); C = 1 for two labels.
    """
    from sklearn.linear_model import LogisticRegression

    how = dict(fit_intercept=intercept, tol=1e-8, max_iter=10_000, random_state=seed)
    model = LogisticRegression(C=inverse_l2, **how).fit(x.astype(np.float64), labels)
    return model.coef_.astype(np.float32), model.intercept_.astype(np.float32), [int(c) for c in model.classes_]


def class_probabilities(z: np.ndarray) -> np.ndarray:
    """Scores [n, C] as probabilities: softmax, or for C = 1 the two columns of the logistic function."""
    z = np.asarray(z, np.float64)
    if z.shape[1] == 1:
        z = np.concatenate([np.zeros_like(z), z], axis=1)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)


def write_model(directory: str | Path, meta: dict, **arrays: np.ndarray) -> None:
    """probe.npz and probe.json, each written atomically, the JSON last: a reader that finds it finds the arrays too."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with atomic(directory / "probe.npz") as f:
        np.savez(f, **arrays)
    write_json(directory / "probe.json", meta)


def read_model(directory: str | Path, kind: str) -> tuple[dict, dict[str, np.ndarray]]:
    """What `write_model` wrote; `InputError` names the file that is missing, damaged or of another kind."""
    directory = Path(directory)
    meta = read_json(directory / "probe.json", "expected a file that save() wrote")
    if not isinstance(meta, dict):
        raise InputError(f"{directory / 'probe.json'} holds a JSON {type(meta).__name__}; expected an object")
    if meta.get("kind") != kind:
        raise InputError(f"{directory / 'probe.json'} is of kind {meta.get('kind')!r}; expected {kind!r}")
    path = directory / "probe.npz"
    try:
        with np.load(path, allow_pickle=False) as f:
            return meta, {name: f[name] for name in f.files}
    except Exception as e:  # numpy raises zipfile, value, key and OS errors for damaged archives
        raise InputError(f"cannot read {path}: {e}; expected the arrays that save() wrote") from None


def same_version(model, meta: dict, directory):
    """The model itself if its digest is the saved one, else an `InputError`."""
    if model.version != meta["version"]:
        raise InputError(
            f"the weights in {directory} have version {model.version!r}, but probe.json records {meta['version']!r}; "
            "the files do not belong together or are damaged: save the probe again"
        )
    return model
