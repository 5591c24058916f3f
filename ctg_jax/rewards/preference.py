"""A reward model from comparisons (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1), linear in sentence embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctg_jax.io import digest
from ctg_jax.rewards.check import check_reads, checked, readable
from ctg_jax.rewards.embed import Embedder
from ctg_jax.rewards.logistic import fit_logistic, read_model, write_model
from ctg_jax.types import InputError


class PreferenceModel:
    """Reward w · e(x), for which σ(w · (e(chosen) - e(rejected))) is the probability of the human's choice.

    Args:
      embedder: texts -> float32 [n, D].
      weights: float32 [D]. There is no intercept, because it would cancel; `threshold` is 0, where neither text is
        preferred.
      reads: "text" for the continuation, "both" for prompt and continuation.
    """

    threshold = 0.0

    def __init__(self, embedder: Embedder, weights: np.ndarray, *, name: str = "preference", reads: str = "text"):
        self.embedder, self.weights = embedder, np.asarray(weights, np.float32)
        self.name, self.reads = name, check_reads(reads)
        self.version = f"preference:{reads}@{digest(embedder.version, self.weights)}"

    @classmethod
    def fit(
        cls,
        embedder: Embedder,
        prompts: Sequence[str],
        chosen: Sequence[str],
        rejected: Sequence[str],
        *,
        inverse_l2: float = 1.0,
        reads: str = "text",
        name: str = "preference",
    ) -> PreferenceModel:
        """By logistic regression without intercept on differences of embeddings, each in both orders.

        Args:
          inverse_l2: the inverse weight of the L2 penalty, C in scikit-learn.

        Raises:
          InputError: no comparison, or unequal numbers of texts.
        """
        if not len(chosen):
            raise InputError("there are no comparisons: a preference model needs records with text and rejected")
        better = embedder(readable(name, prompts, chosen, reads))
        gap = better - embedder(readable(name, prompts, rejected, reads))
        labels = np.r_[np.ones(len(gap)), np.zeros(len(gap))]
        coef, _, _ = fit_logistic(np.r_[gap, -gap], labels, inverse_l2, 0, intercept=False)
        return cls(embedder, coef[0], name=name, reads=reads)

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        rows = readable(self.name, prompts, texts, self.reads)
        return checked(self.name, self.embedder(rows) @ self.weights if rows else np.zeros(0), len(texts))

    def accuracy(self, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> float:
        """Share of comparisons in which the chosen text has the higher reward."""
        return float(np.mean(self(prompts, chosen) > self(prompts, rejected)))

    def save(self, directory: str | Path) -> None:
        """Writes the weights and what they were fitted on; the embedder itself is not copied."""
        meta = {"kind": "preference", "name": self.name, "reads": self.reads, "version": self.version}
        write_model(directory, meta, weights=self.weights)

    @classmethod
    def load(cls, directory: str | Path, embedder: Embedder) -> PreferenceModel:
        """What `save` wrote; InputError where it is damaged or was fitted on another encoder."""
        meta, arrays = read_model(directory, "preference")
        out = cls(embedder, arrays["weights"], name=meta["name"], reads=meta["reads"])
        if out.version != meta["version"]:
            raise InputError(
                f"the model in {directory} is of version {meta['version']}, with this encoder {out.version}"
            )
        return out


SETTINGS = ("data", "reads", "encoder")


def fit(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], where: str) -> PreferenceModel:
    """The judge of kind "preference", fitted on comparisons; see `ctg_jax.rewards`."""
    options = {key: settings[key] for key in ("name", "reads")}
    found = comparisons(records, where)  # records are checked before the encoder is opened
    return PreferenceModel.fit(settings["embedder"](), *found, **options)


def load(folder: Path, settings: Mapping[str, Any]) -> PreferenceModel:
    """The judge of kind "preference" that was saved in a folder."""
    return PreferenceModel.load(folder, settings["embedder"]())


def accuracy(judge: PreferenceModel, records: Sequence[Mapping[str, Any]], where: str) -> float:
    """The share of held-out comparisons in which the chosen text has the higher reward."""
    return judge.accuracy(*comparisons(records, where))


def comparisons(records: Sequence[Mapping[str, Any]], where: str) -> tuple[list[str], list[str], list[str]]:
    """(prompts, chosen texts, rejected texts) of records; InputError where one has no text under `rejected`."""
    if any(not isinstance(r.get("rejected"), str) for r in records):
        raise InputError(f"{where} has records without a text under rejected: comparisons have text and rejected")
    return [r.get("prompt", "") for r in records], [r["text"] for r in records], [r["rejected"] for r in records]
