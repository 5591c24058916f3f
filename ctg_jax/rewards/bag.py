"""Logistic regression on tf-idf weighted n-grams: the classifier for worlds with no encoder."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
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


class BagOfWords(LinearClassifier):
    """Probability of one class from the words (and word pairs) of a text.

    Attributes:
      terms: the vocabulary, in the order of the columns.
      idf: float32 [F]; coef, intercept: float32 [C, F], [C].
    """

    kind = "bag-of-words"

    def __init__(
        self,
        terms: Sequence[str],
        idf: np.ndarray,
        coef: np.ndarray,
        intercept: np.ndarray,
        classes: Sequence[int],
        *,
        ngrams: int = 2,
        name: str = "bag-of-words",
        target: int = 1,
        reads: str = "text",
        trained_on: str = "",
    ):
        super().__init__(coef, intercept, classes, name=name, target=target, reads=reads, trained_on=trained_on)
        self.terms, self.ngrams, self.idf = list(terms), int(ngrams), np.asarray(idf, np.float32)
        self._vectorizer = _vectorizer(self.ngrams, vocabulary={t: i for i, t in enumerate(self.terms)})
        self._vectorizer.idf_ = self.idf.astype(np.float64)

    @functools.cached_property
    def weights(self) -> str:
        parts = (self.terms, self.idf, self.coef, self.intercept, self.classes, self.ngrams, self.trained_on)
        return digest(*parts)

    def features(self, texts: Sequence[str]):
        return self._vectorizer.transform(texts)

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        labels: Sequence[int],
        *,
        ngrams: int = 2,
        features: int = 50_000,
        min_count: int = 2,
        name: str = "bag-of-words",
        target: int = 1,
        reads: str = "text",
        inverse_l2: float = 10.0,
        seed: int = 0,
    ) -> BagOfWords:
        """Fits on texts and labels (texts without one are left out, see `LinearProbe.fit`); keeps the `features` most
        frequent n-grams seen in `min_count` texts.

        Raises:
          InputError: unequal lengths, fewer than two labels, or no n-gram that is frequent enough.
        """
        texts, labels = check_training(texts, labels, name)
        vectorizer = _vectorizer(ngrams, max_features=features, min_df=min(min_count, len(texts)))
        try:
            x = vectorizer.fit_transform(texts)
        except ValueError as e:  # scikit-learn's word for an empty vocabulary
            raise InputError(f"texts give no features ({e}); give longer texts or a smaller min_count") from None
        coef, intercept, classes = fit_logistic(x, labels, inverse_l2, seed)
        terms = vectorizer.get_feature_names_out().tolist()
        return cls(
            terms,
            vectorizer.idf_,
            coef,
            intercept,
            classes,
            ngrams=ngrams,
            name=name,
            target=target,
            reads=reads,
            trained_on=digest(texts, labels.tolist()),
        )

    def save(self, directory: str | Path) -> None:
        """Writes probe.npz (weights) and probe.json (vocabulary and settings)."""
        meta = self._meta() | {"ngrams": self.ngrams, "terms": self.terms}
        write_model(directory, meta, coef=self.coef, intercept=self.intercept, idf=self.idf)

    @classmethod
    def load(cls, directory: str | Path) -> BagOfWords:
        """Reads what `save` wrote; `InputError` names a missing or damaged file."""
        meta, arrays = read_model(directory, "bag-of-words")
        model = cls(
            meta["terms"],
            arrays["idf"],
            arrays["coef"],
            arrays["intercept"],
            meta["classes"],
            ngrams=meta["ngrams"],
            name=meta["name"],
            target=meta["target"],
            reads=meta["reads"],
            trained_on=meta["trained_on"],
        )
        return same_version(model, meta, directory)


def _vectorizer(ngrams: int, **more):
    from sklearn.feature_extraction.text import TfidfVectorizer

    # One-letter words and apostrophes carry sentiment ("don't"), so the pattern keeps them.
    pattern = r"(?u)\b\w+(?:['’]\w+)?"
    return TfidfVectorizer(
        lowercase=True, ngram_range=(1, ngrams), sublinear_tf=True, token_pattern=pattern, dtype=np.float64, **more
    )


SETTINGS = ("data", "target", "reads")


def fit(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], where: str) -> BagOfWords:
    """The judge of kind "bag", fitted on labelled texts; see `ctg_jax.rewards`."""
    options = {key: settings[key] for key in ("name", "target", "reads")}
    return BagOfWords.fit(*texts_and_labels(records, where), **options)


def load(folder: Path, settings: Mapping[str, Any]) -> BagOfWords:
    """The judge of kind "bag" that was saved in a folder."""
    return BagOfWords.load(folder)
