"""Whether latent vectors measure the similarity of sentences: their cosine against human scores of sentence pairs."""

from __future__ import annotations

import csv

import jax
import numpy as np

from ctg_jax import evaluation
from ctg_jax.models.lengths import check_reads
from ctg_jax.run.identity import file_content, model_content
from ctg_jax.run.stage import Artifact, Run, stage_function, write_jsonl
from ctg_jax.stages.sampling import opened
from ctg_jax.studies.vectors import open_vectors
from ctg_jax.types import InputError


@stage_function("latents.similarity", revision=1, how=("batch",), contents={"encoder": model_content})
def similarity(
    run: Run,
    *,
    lm: Artifact,
    pairs: Artifact,
    vectors: Artifact,
    encoder: str | None = None,
    batch: int = 64,
    resamples: int = 1000,
) -> None:
    """Stage: Spearman's rank correlation, 100 ρ, of human scores with the cosine of several representations.

    The representations are the vectors z; the same less their mean over all sentences of the pairs ("z centred"), since
    vectors that share a large part, such as those in the attention's memory, have cosines near 1 whatever they differ
    in; the mean and the last of the language model's hidden states, at every site; and the embeddings of a sentence
    encoder, as an upper reference.

    Args:
      pairs: an artifact of `sentences_of_pairs`. vectors: the latent vectors of its records.
      encoder: directory or hub id of a sentence encoder, or None to leave it out.
    """
    from ctg_jax.data.tokenizer import pad_rows
    from ctg_jax.learn.activations import pool
    from ctg_jax.rewards import open_embedder

    control, _, index = open_vectors(lm, vectors)
    records = pairs.rows("data.jsonl")
    model, params, tokenizer = opened(lm)
    has = set(index)
    both = [i for i in range(0, len(records), 2) if i in has and i + 1 in has]
    score = np.asarray([records[i]["score"] for i in both])
    texts = [records[i]["text"] for i in both] + [records[i + 1]["text"] for i in both]
    (first,) = tokenizer.encode_prompts([""])
    tokens = [first + row for row in tokenizer.encode_after([""] * len(texts), texts)]
    length = max(map(len, tokens))
    check_reads(model, length, f"The longest sentence has {length} tokens")

    def states(t, m):
        def tap(h):
            return pool(h, m, "mean"), pool(h, m, "last")

        return model.apply(params, model.embed(params, t), m, tap=tap, last=1).taps

    states, found = jax.jit(states), []
    for at in range(0, len(tokens), batch):
        rows = tokens[at : at + batch]
        t, m = pad_rows(rows + [first] * (batch - len(rows)), length, 0, left=False)
        found.append([np.asarray(x)[:, : len(rows)] for x in states(t, m)])
    mean, last = (np.concatenate(x, axis=1) for x in zip(*found))
    z = np.asarray(control.z)
    ours = z[both], z[[i + 1 for i in both]]
    middle = np.concatenate(ours).mean(0)
    candidates = {"z": ours, "z centred": tuple(side - middle for side in ours)}
    for name, x in (("mean of states", mean), ("last state", last)):
        candidates |= {f"{name}, site {s}": np.split(x[s], 2) for s in range(len(x))}
    if encoder is not None:
        candidates["encoder"] = np.split(np.asarray(open_embedder(run.session, encoder)(texts)), 2)
    for name, (a, b) in candidates.items():
        run.log(name=name, **evaluation.spearman(evaluation.cosine(a, b), score, resamples).as_json())
    run.record(pairs=len(both))


@stage_function("latents.pairs", revision=1, contents={"file": file_content})
def sentences_of_pairs(run: Run, *, file: str, limit: int | None = None) -> None:
    """Stage: reads scored sentence pairs; each pair gives two consecutive records, both with the score of the pair.

    Args:
      file: a CSV file without a header whose columns are first sentence, second sentence and score, as in STS-B.
      limit: pairs to keep, evenly spread over the file, since those of one source lie together in STS-B; None: all.

    Raises:
      InputError: the file cannot be read, a line has other columns, or limit is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1 pair, or None for all.")
    try:
        with open(file, encoding="utf-8", newline="") as f:
            rows = list(csv.reader(f))
        kept = len(rows) if limit is None else min(limit, len(rows))
        rows = [rows[i * len(rows) // kept] for i in range(kept)]
        records = [dict(text=r[side], pair=i, score=float(r[2])) for i, r in enumerate(rows) for side in (0, 1)]
    except OSError as e:
        raise InputError(f"file is {file}, which cannot be read ({e.strerror}): expected CSV of pairs") from None
    except (IndexError, ValueError):
        raise InputError(f"{file} is no CSV of first sentence, second sentence and score") from None
    write_jsonl(run.path / "data.jsonl", records)
