"""Unsupervised transfer between two labels by adding a difference of mean latent vectors (Subramani et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from ctg_jax import evaluation, methods
from ctg_jax.data.labels import known
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, stage_function, write_jsonl
from ctg_jax.stages.sampling import opened
from ctg_jax.studies.vectors import decode_vectors, open_vectors
from ctg_jax.types import InputError


@stage_function("latents.transfer", how=("batch",))
def transfer(
    run: Run,
    *,
    lm: Artifact,
    train: Artifact,
    train_vectors: Artifact,
    data: Artifact,
    vectors: Artifact,
    judge: Artifact,
    strength: float = 1.0,
    count: int = 100,
    batch: int = 64,
    resamples: int = 1000,
) -> None:
    """Stage: moves every sentence of `data` to the other label and measures how well that worked.

    Each sentence is decoded from z + strength · (mean vector of the other label − mean vector of its own). The means
    are taken over `count` recovered sentences of each label of `train`.

    Writes samples.jsonl, and the figures: transfer accuracy (the judge gives the other label), overall and in each
    direction; self-BLEU of the output with the input; and BLEU with the first of the `references`, where every record
    has them.

    Raises:
      InputError: a label is neither 0 nor 1 (sentences without a label are left out and counted in a warning), or too
        few sentences of a label were recovered.
    """
    from ctg_jax.stages.judges import open_judge

    control, rows, index = open_vectors(lm, vectors)
    records = data.rows("data.jsonl")
    labels = binary_labels(records, data)
    index = [i for i in index if labels[i] is not None]
    difference = offset(lm, train, train_vectors, count)
    sign = np.asarray([1.0 if labels[i] == 0 else -1.0 for i in index])[:, None]
    z = np.asarray(control.z)[index] + strength * sign * difference[None]
    longest = max(rows[i]["tokens"] for i in index) + 8
    texts, _ = decode_vectors(lm, control, z.astype(np.float32), [""] * len(index), longest, batch)
    reward = open_judge(judge)
    scores = np.asarray(reward([""] * len(texts), texts), np.float64)
    hit = np.where(sign[:, 0] > 0, scores >= reward.threshold, scores < reward.threshold).astype(float)
    source = [records[i]["text"].strip() for i in index]
    directions = ["to positive" if s > 0 else "to negative" for s in sign[:, 0]]
    write_jsonl(
        run.path / "samples.jsonl",
        [
            dict(prompt_id=int(i), prompt=s, text=t, direction=w, score=float(c))
            for i, s, t, w, c in zip(index, source, texts, directions, scores)
        ],
    )
    boot = evaluation.Bootstrap(index, resamples=resamples)
    figures = {"transfer accuracy": boot.mean(hit)}
    for name in ("to positive", "to negative"):
        figures[f"accuracy {name}"] = boot.mean(np.where(np.asarray(directions) == name, hit, np.nan))
    figures["self-BLEU"] = evaluation.bleu(texts, source, resamples)
    if all(records[i].get("references") for i in index):
        figures["reference BLEU"] = evaluation.bleu(texts, [records[i]["references"][0] for i in index], resamples)
    for name, figure in figures.items():
        run.log(name=name, **figure.as_json())
    run.record(judges={reward.name: reward.version})


def offset(lm: Artifact, train: Artifact, vectors: Artifact, count: int | None) -> np.ndarray:
    """The mean vector of label 1 minus that of label 0, float32 [d].

    Args:
      count: recovered sentences of each label to average over; None: every vector, whether recovered or not.

    Raises:
      InputError: too few sentences of a label were recovered.
    """
    control, rows, index = open_vectors(lm, vectors)
    labels = binary_labels(train.rows("data.jsonl"), train)
    means = []
    for label in (0, 1):
        chosen = [i for i in index if labels[i] == label and (count is None or rows[i]["recovered"])][:count]
        if len(chosen) < (count or 1):
            raise InputError(
                f"count is {count}, but only {len(chosen)} sentences of label {label} were recovered: lower it "
                "or learn vectors of more sentences"
            )
        means.append(np.asarray(control.z)[chosen].mean(0))
    return means[1] - means[0]


@stage_function("latents.direction")
def direction(run: Run, *, lm: Artifact, train: Artifact, vectors: Artifact, count: int | None = 100) -> None:
    """Stage: saves `offset` as a control that steers from label 0 to label 1 and can be part of any chain."""
    difference = offset(lm, train, vectors, count)
    hp = {k: v for k, v in vectors.spec["init"].items() if k not in ("count", "choice")}
    control = methods.load(vectors, opened(lm)[0]).replace(z=jnp.asarray(difference, jnp.float32), choice=None)
    checkpoint.save(run.path / "state", control)
    run.record(method="latent_steer", init=hp)


def binary_labels(records: Sequence[dict], source: Artifact) -> list[int | None]:
    """The label of each record, 0 or 1, or None for a record without a label; InputError for any other label."""
    labels = [r.get("label") for r in records]
    kept = set(known(labels, str(source.path)))
    if not {labels[i] for i in kept} <= {0, 1}:
        raise InputError(f"{source.path} holds the labels {sorted({labels[i] for i in kept})}, expected 0 and 1")
    return [label if i in kept else None for i, label in enumerate(labels)]
