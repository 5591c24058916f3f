"""How well latent vectors hold the sentences they were learned from, and the geometry of their space
(Subramani et al. 2022).

The stages read what `methods.latent_steer.fit` learned: one vector for each record of a data artifact.
"""

from __future__ import annotations

import numpy as np

from ctg_jax import evaluation
from ctg_jax.run.stage import Artifact, Run, stage_function, write_jsonl
from ctg_jax.studies.vectors import decode_vectors, open_vectors


@stage_function("latents.recover", how=("batch",))
def recover(
    run: Run, *, lm: Artifact, data: Artifact, vectors: Artifact, batch: int = 64, resamples: int = 1000
) -> None:
    """Stage: decodes every sentence from its vector and measures how much of it comes back.

    Writes samples.jsonl, and these figures over the sentences that have a vector: BLEU-4; exact match; the share of
    tokens that are the most likely ones under teacher forcing (`token accuracy`); the share of sentences that the
    search itself reported as recovered; its number of updates; and the norm of the vectors.
    """
    control, rows, index = open_vectors(lm, vectors)
    records = data.rows("data.jsonl")
    longest = max(rows[i]["tokens"] for i in index)
    prompts = [records[i].get("prompt", "") for i in index]
    texts, _ = decode_vectors(lm, control, np.asarray(control.z)[index], prompts, longest, batch)
    wanted = [records[i]["text"].strip() for i in index]
    decoded = [t.strip() for t in texts]
    write_jsonl(
        run.path / "samples.jsonl",
        [
            dict(prompt_id=int(i), prompt=w, text=t, recovered=rows[i]["recovered"])
            for i, w, t in zip(index, wanted, decoded)
        ],
    )
    boot = evaluation.Bootstrap(index, resamples=resamples)
    figures = {
        "BLEU-4": evaluation.bleu(decoded, wanted, resamples),
        "exact match": boot.mean([float(a == b) for a, b in zip(decoded, wanted)]),
        "token accuracy": boot.mean([rows[i]["right"] for i in index]),
        "recovered": boot.mean([float(rows[i]["recovered"]) for i in index]),
        "updates": boot.mean([float(rows[i]["updates"]) for i in index]),
        "norm": boot.mean(np.linalg.norm(np.asarray(control.z)[index], axis=1)),
    }
    for name, figure in figures.items():
        run.log(name=name, **figure.as_json())
    run.record(left_out=len(rows) - len(index))


@stage_function("latents.random_words")
def random_words(run: Run, *, data: Artifact, seed: int = 0) -> None:
    """Stage: replaces every word of the texts by a word drawn from all of them, which gives texts of the same lengths
    that no language model has learned."""
    records = data.rows("data.jsonl")
    words = np.asarray([w for r in records for w in r["text"].split()])
    draw = np.random.default_rng(seed)
    write_jsonl(
        run.path / "data.jsonl",
        [{**r, "text": " ".join(draw.choice(words, len(r["text"].split())).tolist())} for r in records],
    )


@stage_function("latents.analyse")
def analyse(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    vectors: Artifact,
    between: int = 5,
    pairs: int = 4,
    draws: int = 8,
    seed: int = 0,
) -> None:
    """Stage: describes the space of the vectors by interpolation, random vectors, neighbours and principal components.

    Writes samples.jsonl, whose records have the `kind` "between" (decoded from points on straight lines between the
    vectors of two sentences), "random" (decoded from random vectors of the median norm) or "nearest" (the sentences
    whose vectors are nearest to that of a given sentence); principal.jsonl, the first two principal components of each
    vector with its label; and the figure `norm`.

    Args:
      between: points on each line. pairs: number of lines, and of sentences with their nearest ones.
      draws: number of random vectors.
    """
    control, rows, index = open_vectors(lm, vectors)
    records = data.rows("data.jsonl")
    z = np.asarray(control.z)[index]
    texts = [records[i]["text"] for i in index]
    rng = np.random.default_rng(seed)
    norms = np.linalg.norm(z, axis=1)
    longest = max(rows[i]["tokens"] for i in index)
    ends = rng.permutation(len(z))[: 2 * pairs].reshape(-1, 2)
    weights = np.linspace(0, 1, between)
    made = np.concatenate([(1 - weights)[:, None] * z[a] + weights[:, None] * z[b] for a, b in ends])
    noise = rng.normal(size=(draws, z.shape[1]))
    noise *= np.median(norms) / np.linalg.norm(noise, axis=1, keepdims=True)
    points = np.concatenate([made, noise]).astype(np.float32)
    decoded, _ = decode_vectors(lm, control, points, [""] * len(points), longest)
    out = []
    for n, (a, b) in enumerate(ends):
        prompt = f"{texts[a]} … {texts[b]}"
        line = zip(weights, decoded[n * between : (n + 1) * between])
        out += [dict(kind="between", prompt=prompt, prompt_id=n, weight=float(w), text=t) for w, t in line]
    out += [dict(kind="random", prompt="", prompt_id=pairs, text=t) for t in decoded[len(made) :]]
    unit = z / np.maximum(norms[:, None], 1e-9)
    for n, i in enumerate(rng.permutation(len(z))[:pairs]):
        order = np.argsort(-(unit @ unit[i]))[1:4]
        out += [
            dict(
                kind="nearest", prompt=texts[i], prompt_id=pairs + 1 + n, text=texts[j], cosine=float(unit[j] @ unit[i])
            )
            for j in order
        ]
    write_jsonl(run.path / "samples.jsonl", out)
    centered = z - z.mean(0)
    _, sizes, directions = np.linalg.svd(centered, full_matrices=False)
    components = centered @ directions[:2].T
    places = [
        dict(record=int(i), x=float(x), y=float(y), label=records[i].get("label"))
        for i, (x, y) in zip(index, components)
    ]
    write_jsonl(run.path / "principal.jsonl", places)
    boot = evaluation.Bootstrap(index)
    run.log(name="norm", **boot.mean(norms).as_json())
    share = sizes**2 / np.sum(sizes**2)
    run.record(variance_of_components=[float(s) for s in share[:10]])
