"""Any imported sequence classifier as a reward: the probability of one of its classes, or one of its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctg_jax.models.encoder import PROBLEMS
from ctg_jax.rewards.check import check_reads, checked, readable
from ctg_jax.rewards.embed import Embedder, sentence_embedder
from ctg_jax.rewards.logistic import class_probabilities
from ctg_jax.types import InputError


class SequenceClassifier:
    """One output of an encoder with a classification head, as a reward.

    Args:
      embedder: holds the encoder, its parameters and its tokenizer.
      target: index or name (of `id2label`) of the output. A head with one logit gives the log-odds of its only class:
        index 1 or its name is that class, index 0 its absence. A head with one value has nothing to choose.
      reads: "text" for the continuation, "both" for prompt and continuation.
      problem: what the outputs mean: "single_label_classification" (the probability by a softmax),
        "multi_label_classification" (by a logistic function of each logit), "regression" (the value itself). None:
        that of the model's config.json. A head with one logit is read by the logistic function in the first two.
      threshold: the score from which a text counts as having the attribute; by default 0.5, and 0 for values.

    Raises:
      InputError: an encoder without a head, or an unknown output or problem.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        name: str = "classifier",
        target: int | str = 1,
        reads: str = "text",
        problem: str | None = None,
        threshold: float | None = None,
    ):
        labels = tuple(embedder.encoder.labels)
        if not labels:
            raise InputError(
                "encoder has no classification head; load a …ForSequenceClassification model or fit a LinearProbe"
            )
        self.problem = problem or embedder.encoder.problem
        if self.problem not in PROBLEMS:
            raise InputError(f"problem is {problem!r}; expected one of {', '.join(PROBLEMS)}")
        if isinstance(target, str):
            if target not in labels:
                raise InputError(f"target is {target!r}; this classifier knows {', '.join(map(str, labels))}")
            target = 1 if len(labels) == 1 else labels.index(target)
        classes = 2 if len(labels) == 1 else len(labels)
        if not 0 <= target < classes:
            raise InputError(f"target is {target}; this classifier has classes 0 to {classes - 1}")
        self.values = self.problem == "regression"
        self.threshold = threshold if threshold is not None else 0.0 if self.values else 0.5
        self.embedder, self.name, self.target = embedder, name, int(target)
        self.reads, self.labels = check_reads(reads), labels
        self.version = f"{embedder.version}[{target}]:{reads}:{self.problem}"

    @classmethod
    def load(
        cls, path: str | Path, *, batch: int = 32, length: int | None = None, dtype: str = "float32", **options
    ) -> SequenceClassifier:
        """From a Hugging Face directory or hub id; `options` are those of the class."""
        options.setdefault("name", Path(path).name)
        return cls(sentence_embedder(path, batch=batch, length=length, dtype=dtype), **options)

    def outputs(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, C]: values, or probabilities of classes, C = 2 (absent, present) for a head with one logit."""
        z = self.embedder.run(self.embedder.encoder.classify, texts, len(self.labels))
        if self.values:
            return z
        if self.problem == "multi_label_classification" and z.shape[1] > 1:
            return np.stack([class_probabilities(c[:, None])[:, 1] for c in z.T], axis=1)
        return class_probabilities(z)

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        rows = readable(self.name, prompts, texts, self.reads)
        if not rows:
            return np.zeros((0,), np.float32)
        out = self.outputs(rows)
        return checked(self.name, out[:, min(self.target, out.shape[1] - 1)], len(texts))


SETTINGS = ("target", "reads", "encoder", "problem", "threshold")


def load(folder: Path, settings: Mapping[str, Any]) -> SequenceClassifier:
    """The judge of kind "classifier"; see `ctg_jax.rewards`."""
    options = {key: settings[key] for key in ("name", "target", "reads", "problem", "threshold")}
    return SequenceClassifier(settings["embedder"](), **options)
