"""Linear classifiers of attributes on the latents of texts, which guide diffusion (Lovelace et al. 2024)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ctg_jax.data.labels import known
from ctg_jax.learn.embeddings import arrays, write_array
from ctg_jax.rewards.logistic import check_training, fit_logistic
from ctg_jax.run.stage import Artifact, Run, stage_function
from ctg_jax.types import InputError


@stage_function("embeddings.probe", revision=1)
def fit_attribute(
    run: Run,
    *,
    latents: Artifact,
    name: str,
    field: str = "label",
    pattern: str | None = None,
    words: int | None = None,
    inverse_l2: float = 100.0,
    limit: int | None = None,
    seed: int = 0,
) -> None:
    """Stage: a logistic regression of one attribute on latents, probe.npz, with its accuracy on a tenth of the texts
    that it did not see in metrics.jsonl.

    Args:
      name: of the attribute.
      field: the field of the records that holds its label, 0 or 1 (records without one are left out and counted in a
        warning); where neither of these decides:
      pattern: a regular expression, the label being whether the continuation matches it; or
      words: the label being whether the continuation has more words.
      inverse_l2: the inverse weight of the L2 penalty, C in scikit-learn.
      limit: texts to fit on.

    Raises:
      InputError: no record with the label, or all of one class; an invalid pattern.
    """
    records = latents.rows("pieces.jsonl")[:limit]
    labels = [_label(r, name, field, pattern, words) for r in records]
    kept = known(labels, f"the attribute {name!r} of {latents.path}")
    _, labels = check_training([records[i]["text"] for i in kept], [labels[i] for i in kept], name)
    if not set(labels) <= {0, 1}:
        raise InputError(f"the attribute {name!r} has the labels {sorted(set(labels))}, expected 0 and 1")
    x = arrays(latents)[0][kept]
    held = np.random.default_rng(seed).permutation(len(x)) < len(x) // 10
    if len(set(labels[~held])) < 2:
        held[:] = False
    coef, intercept, _ = fit_logistic(x[~held], labels[~held], inverse_l2, seed)
    write_array(run.path / "probe.npy", np.concatenate([coef[0], intercept]))
    run.record(attribute=name, version=latents.spec["version"])
    seen = held if held.any() else ~held
    predicted = x[seen] @ coef[0] + intercept[0] > 0
    accuracy, share = float(np.mean(predicted == labels[seen])), float(labels.mean())
    run.log(name=name, accuracy=accuracy, share=share, heldout=int(held.sum()))


def coefficients(probe: Artifact, encoder: str) -> tuple[np.ndarray, float]:
    """(w float32 [Z], b) of a probe, which must have been fitted on latents of that version of an encoder."""
    if probe.spec["version"] != encoder:
        raise InputError(
            f"{probe.path.name} was fitted on latents of {probe.spec['version']}, but these are of {encoder}: fit the "
            "probe on latents of the same encoder"
        )
    values = np.load(probe.path / "probe.npy", allow_pickle=False)
    return values[:-1], float(values[-1])


def _label(record: Mapping[str, Any], name: str, field: str, pattern: str | None, words: int | None) -> int | None:
    if words is not None:
        return int(len(record["continuation"].split()) > words)
    if pattern is not None:
        try:
            return int(re.search(pattern, record["continuation"], re.IGNORECASE) is not None)
        except re.error as e:
            raise InputError(f"pattern is {pattern!r}, which is no regular expression ({e})") from None
    return record.get(field)
