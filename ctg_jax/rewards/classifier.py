"""Any imported sequence classifier as a reward: the probability of one of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ctg_jax.rewards.check import check_reads, checked, readable
from ctg_jax.rewards.embed import Embedder, load_text_encoder
from ctg_jax.rewards.probe import class_probabilities
from ctg_jax.types import InputError


class SequenceClassifier:
    """Probability of class `target` under an encoder with a classification head.

    Args:
      embedder: holds the encoder, its parameters and its tokenizer.
      target: index or label of the class.
      reads: "text" for the continuation, "both" for prompt and continuation.
      multilabel: independent classes (a logistic function of each logit), as in toxicity models; else a softmax. A
        head with one logit is always read by the logistic function.
    """

    threshold = 0.5

    def __init__(
        self,
        embedder: Embedder,
        *,
        name: str = "classifier",
        target: int | str = 1,
        reads: str = "text",
        multilabel: bool = False,
    ):
        labels = tuple(embedder.encoder.labels)
        if not labels:
            raise InputError(
                "encoder has no classification head; load a …ForSequenceClassification model or fit a LinearProbe"
            )
        if isinstance(target, str):
            if target not in labels:
                raise InputError(f"target is {target!r}; this classifier knows {', '.join(map(str, labels))}")
            target = labels.index(target)
        # One logit is the log-odds of a single class: index 1 is that class, index 0 its absence.
        classes = 2 if len(labels) == 1 else len(labels)
        if not 0 <= target < classes:
            raise InputError(f"target is {target}; this classifier has classes 0 to {classes - 1}")
        self.embedder, self.name, self.target = embedder, name, int(target)
        self.reads, self.multilabel, self.labels = check_reads(reads), multilabel, labels
        self.version = f"{embedder.version}[{target}]:{reads}{':multilabel' if multilabel else ''}"

    @classmethod
    def load(
        cls, path: str | Path, *, batch: int = 32, length: int | None = None, dtype: str = "float32", **options
    ) -> SequenceClassifier:
        """From a Hugging Face directory or hub id; `options` are those of the class."""
        encoder, params, encode = load_text_encoder(path, dtype=dtype, length=length)
        options.setdefault("name", Path(path).name)
        embedder = Embedder(encoder, params, encode, name=Path(path).name, batch=batch, length=length)
        return cls(embedder, **options)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, C]; C = 2 (absent, present) for a head with one logit."""
        z = self.embedder.run(self.embedder.encoder.classify, texts, len(self.labels))
        if self.multilabel and z.shape[1] > 1:
            return np.stack([class_probabilities(c[:, None])[:, 1] for c in z.T], axis=1)
        return class_probabilities(z)

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        rows = readable(self.name, prompts, texts, self.reads)
        if not rows:
            return np.zeros((0,), np.float32)
        return checked(self.name, self.probabilities(rows)[:, self.target], len(texts))
