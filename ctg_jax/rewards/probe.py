"""A linear probe on sentence embeddings: logistic regression, kept as arrays, never pickled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ctg_jax.data.labels import known
from ctg_jax.io import atomic, digest, read_json, write_json
from ctg_jax.rewards.check import check_reads, checked, readable
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
        strength: float = 1.0,
        seed: int = 0,
    ) -> LinearProbe:
        """Fits a probe; `strength` is scikit-learn's C (inverse regularisation). Texts without a label (None or -1) are
        left out and counted in a warning.

        Raises:
          InputError: unequal lengths, fewer than two labels, or embeddings of a wrong shape.
        """
        texts, labels = check_training(texts, labels, name)
        x = embed(texts)
        coef, intercept, classes = fit_logistic(_embedding(x, len(texts)), labels, strength, seed)
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


def check_training(texts: Sequence[str], labels: Sequence[int | None], name: str) -> tuple[list[str], np.ndarray]:
    """The texts that have a label, and their labels as int64 [n]; `InputError` where there is nothing to learn from.

    name: of what is fitted, for messages.
    """
    if np.shape(labels) != (len(texts),):
        raise InputError(f"labels has shape {list(np.shape(labels))} for {len(texts)} texts; give one for each text")
    kept = known(labels, f"the texts for {name!r}")
    texts, labels = [texts[i] for i in kept], np.asarray([labels[i] for i in kept])
    if len(np.unique(labels)) < 2:
        raise InputError(f"labels holds {len(np.unique(labels))} distinct value(s); a classifier needs at least two")
    return texts, labels.astype(np.int64)


def fit_logistic(x, labels: np.ndarray, strength: float, seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(coef, intercept, classes) of scikit-learn's logistic regression (L2, L-BFGS)."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=2000, random_state=seed).fit(x, labels)
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
            f"the weights in {directory} have version {model.version!r}, but probe.json says {meta['version']!r}; "
            "the files do not belong together or are damaged: save the probe again"
        )
    return model


def _embedding(x, n: int) -> np.ndarray:
    x = np.asarray(x, np.float32)
    if x.ndim != 2 or x.shape[0] != n:
        raise InputError(f"embed returned shape {list(x.shape)} for {n} texts; expected [{n}, D]")
    return x
