"""What latent steering vectors are for (Subramani, Suresh & Peters 2022).

`recover`, `transfer`, `direction`, `similarity` and `analyse`: each is a stage over the vectors that
`methods.latent_steer.fit` learned, one for each record of a data artifact.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import evaluation, methods
from ctg_jax.controls import constraints
from ctg_jax.data.labels import known
from ctg_jax.decode.loop import generate
from ctg_jax.methods.hidden.latent_steer import LatentSteer
from ctg_jax.models.lengths import check_reads
from ctg_jax.run import checkpoint
from ctg_jax.run.identity import file_content, model_content
from ctg_jax.run.stage import Artifact, Run, stage_function, write_jsonl
from ctg_jax.stages.sampling import opened
from ctg_jax.types import InputError, Sampling, optional


def say(lm: Artifact, control: LatentSteer, z: np.ndarray, prompts: Sequence[str], max_new: int, batch: int = 64):
    """(texts, token ids) of greedy decoding, row i under the vector z[i] (float32 [N, d]) after prompts[i] (often
    ""). All batches have one shape."""
    from ctg_jax.data.tokenizer import to_prompts

    model, params, tokenizer = opened(lm)
    sampling = Sampling(max_new=max_new, eos=tokenizer.ends, pad=tokenizer.pad or 0, greedy=True)
    heads = tokenizer.encode_prompts(prompts)
    length = max(map(len, heads))
    batch, tokens = min(batch, len(z)), []
    for at in range(0, len(z), batch):
        rows = np.minimum(np.arange(at, at + batch), len(z) - 1)
        cond = {control.choice: jnp.arange(batch)}
        ask = to_prompts(tokenizer, [prompts[i] for i in rows], 0, ids=rows, length=length, cond=cond)
        limited = constraints.only(tokenizer.known(model.vocab), control.replace(z=jnp.asarray(z[rows])))
        out = generate(model, params, ask, limited, sampling)
        written = zip(np.asarray(out.tokens), np.asarray(out.mask), strict=True)
        tokens += [t[m].tolist() for t, m in written][: len(z) - at]
    return tokenizer.decode_after(heads, [tokenizer.before_end(row) for row in tokens]), tokens


def bleu(texts: Sequence[str], references: Sequence[str], resamples: int = 1000, seed: int = 0) -> evaluation.Figure:
    """Corpus BLEU-4 of sacrebleu (its default tokenizer), 0 … 100, with a bootstrap interval over sentences."""
    metric = optional("sacrebleu.metrics", "metrics").BLEU(effective_order=False)
    stats = np.asarray([_counts(metric, t, r) for t, r in zip(texts, references, strict=True)], np.float64)
    draws = np.random.default_rng(seed).integers(0, len(stats), (resamples, len(stats)))

    def score(total):
        correct, possible = total[2:6], total[6:10]
        return metric.compute_bleu(correct.tolist(), possible.tolist(), int(total[0]), int(total[1])).score

    low, high = np.percentile([score(stats[d].sum(0)) for d in draws], [2.5, 97.5])
    return evaluation.Figure(score(stats.sum(0)), float(low), float(high), len(stats))


def _counts(metric: Any, text: str, reference: str) -> list[int]:
    found = metric.corpus_score([text], [[reference]])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


@stage_function("latents.recover", how=("batch",))
def recover(
    run: Run, *, lm: Artifact, data: Artifact, vectors: Artifact, batch: int = 64, resamples: int = 1000
) -> None:
    """Decodes every sentence from its vector: samples.jsonl with what was said, and the figures of recovery.

    BLEU-4, exact match, the share of tokens that are the most likely ones while the sentence is read (`token
    accuracy`), the share that the search itself found recovered, and its updates, over the sentences that had a vector.
    """
    control, rows, index = _bank(lm, vectors)
    records = data.rows("data.jsonl")
    longest = max(rows[i]["tokens"] for i in index)
    prompts = [records[i].get("prompt", "") for i in index]
    texts, _ = say(lm, control, np.asarray(control.z)[index], prompts, longest, batch)
    wanted = [records[i]["text"].strip() for i in index]
    said = [t.strip() for t in texts]
    write_jsonl(
        run.path / "samples.jsonl",
        [
            dict(prompt_id=int(i), prompt=w, text=t, recovered=rows[i]["recovered"])
            for i, w, t in zip(index, wanted, said)
        ],
    )
    boot = evaluation.Bootstrap(index, resamples=resamples)
    figures = {
        "BLEU-4": bleu(said, wanted, resamples),
        "exact match": boot.mean([float(a == b) for a, b in zip(said, wanted)]),
        "token accuracy": boot.mean([rows[i]["right"] for i in index]),
        "recovered": boot.mean([float(rows[i]["recovered"]) for i in index]),
        "updates": boot.mean([float(rows[i]["updates"]) for i in index]),
        "norm": boot.mean(np.linalg.norm(np.asarray(control.z)[index], axis=1)),
    }
    for name, figure in figures.items():
        run.log(name=name, **figure.as_json())
    run.record(left_out=len(rows) - len(index))


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
    """Unsupervised transfer: each sentence of `data` is decoded from z + strength · (mean of the vectors of the other
    label − mean of those of its own), the means over `count` recovered sentences of each label of `train`.

    Figures: transfer accuracy (the judge gives the other label), in all and for each direction; self-BLEU of what is
    said with what went in; and BLEU with the first of `references`, where every record has them.

    Raises:
      InputError: a label that is not 0 or 1 (sentences without one are left out and counted in a warning); too few
        recovered sentences of a label.
    """
    from ctg_jax.stages.judges import open_judge

    control, rows, index = _bank(lm, vectors)
    records = data.rows("data.jsonl")
    labels = _labels(records, data)
    index = [i for i in index if labels[i] is not None]
    away = offset(lm, train, train_vectors, count)
    sign = np.asarray([1.0 if labels[i] == 0 else -1.0 for i in index])[:, None]
    z = np.asarray(control.z)[index] + strength * sign * away[None]
    longest = max(rows[i]["tokens"] for i in index) + 8
    texts, _ = say(lm, control, z.astype(np.float32), [""] * len(index), longest, batch)
    reward = open_judge(judge)
    scores = np.asarray(reward([""] * len(texts), texts), np.float64)
    hit = np.where(sign[:, 0] > 0, scores >= reward.threshold, scores < reward.threshold).astype(float)
    source = [records[i]["text"].strip() for i in index]
    way = ["to positive" if s > 0 else "to negative" for s in sign[:, 0]]
    write_jsonl(
        run.path / "samples.jsonl",
        [
            dict(prompt_id=int(i), prompt=s, text=t, direction=w, score=float(c))
            for i, s, t, w, c in zip(index, source, texts, way, scores)
        ],
    )
    boot = evaluation.Bootstrap(index, resamples=resamples)
    figures = {"transfer accuracy": boot.mean(hit)}
    for name in ("to positive", "to negative"):
        figures[f"accuracy {name}"] = boot.mean(np.where(np.asarray(way) == name, hit, np.nan))
    figures["self-BLEU"] = bleu(texts, source, resamples)
    if all(records[i].get("references") for i in index):
        figures["reference BLEU"] = bleu(texts, [records[i]["references"][0] for i in index], resamples)
    for name, figure in figures.items():
        run.log(name=name, **figure.as_json())
    run.record(judges={reward.name: reward.version})


def offset(lm: Artifact, train: Artifact, vectors: Artifact, count: int | None) -> np.ndarray:
    """Mean vector of `count` recovered sentences of label 1 minus that of label 0, float32 [d]; None takes every
    vector, recovered or not."""
    control, rows, index = _bank(lm, vectors)
    labels = _labels(train.rows("data.jsonl"), train)
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
    """Stage: `offset` as a control of its own, which steers from label 0 to label 1 in any chain."""
    away = offset(lm, train, vectors, count)
    hp = {k: v for k, v in vectors.spec["init"].items() if k not in ("count", "choice")}
    control = methods.load(vectors, opened(lm)[0]).replace(z=jnp.asarray(away, jnp.float32), choice=None)
    checkpoint.save(run.path / "state", control)
    run.record(method="latent_steer", init=hp)


@stage_function("latents.similarity", how=("batch",), contents={"encoder": model_content})
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
    """Spearman's rank correlation, 100 ρ, of human scores with the cosine of: the vectors z, the mean and the last of
    the hidden states at every site of the LM, and a sentence encoder as the ceiling.

    pairs: what `sentences_of_pairs` left; vectors: those of its records.
    """
    from ctg_jax.data.tokenizer import pad_rows
    from ctg_jax.learn.activations import pool
    from ctg_jax.rewards import sentence_embedder

    control, _, index = _bank(lm, vectors)
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
    candidates = {"z": (z[both], z[[i + 1 for i in both]])}
    for name, x in (("mean of states", mean), ("last state", last)):
        candidates |= {f"{name}, site {s}": np.split(x[s], 2) for s in range(len(x))}
    if encoder is not None:
        candidates["encoder"] = np.split(np.asarray(sentence_embedder(encoder)(texts)), 2)
    for name, (a, b) in candidates.items():
        run.log(name=name, **spearman(_cosine(a, b), score, resamples).as_json())
    run.record(pairs=len(both))


@stage_function("latents.pairs", contents={"file": file_content})
def sentences_of_pairs(run: Run, *, file: str, limit: int | None = None) -> None:
    """The sentences of pairs, two records after each other for each pair, with the score of the pair.

    file: CSV without a header, of first sentence, second sentence, score: the layout of STS-B.

    Raises:
      InputError: no such file, or a line that is none of these.
    """
    try:
        with open(file, encoding="utf-8", newline="") as f:
            rows = list(csv.reader(f))[:limit]
        records = [dict(text=r[side], pair=i, score=float(r[2])) for i, r in enumerate(rows) for side in (0, 1)]
    except OSError as e:
        raise InputError(f"file is {file}, which cannot be read ({e.strerror}): expected CSV of pairs") from None
    except (IndexError, ValueError):
        raise InputError(f"{file} is no CSV of first sentence, second sentence and score") from None
    write_jsonl(run.path / "data.jsonl", records)


@stage_function("latents.random_words")
def random_words(run: Run, *, data: Artifact, seed: int = 0) -> None:
    """Stage: the texts of `data` with every word replaced by one drawn from all their words: sentences of the same
    lengths that no language model has learned."""
    records = data.rows("data.jsonl")
    words = np.asarray([w for r in records for w in r["text"].split()])
    draw = np.random.default_rng(seed)
    write_jsonl(
        run.path / "data.jsonl",
        [{**r, "text": " ".join(draw.choice(words, len(r["text"].split())).tolist())} for r in records],
    )


def spearman(a: np.ndarray, b: np.ndarray, resamples: int = 1000, seed: int = 0) -> evaluation.Figure:
    """100 ρ with a bootstrap interval over pairs."""
    from scipy.stats import spearmanr

    draws = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    low, high = np.percentile([spearmanr(a[d], b[d]).statistic for d in draws], [2.5, 97.5])
    return evaluation.Figure(100 * float(spearmanr(a, b).statistic), 100 * float(low), 100 * float(high), len(a))


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
    """Looks at vectors: samples.jsonl with what is said on straight lines between sentences (`kind` "between"), from
    random vectors of the usual norm ("random"), and the nearest sentences of some ("nearest"); the figure `norm`; and
    principal.jsonl: each vector's first two principal components with its label.
    """
    control, rows, index = _bank(lm, vectors)
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
    said, _ = say(lm, control, np.concatenate([made, noise]).astype(np.float32), [""] * (len(made) + draws), longest)
    out = [
        dict(
            kind="between", prompt=f"{texts[a]} … {texts[b]}", prompt_id=n, weight=float(w), text=said[n * between + k]
        )
        for n, (a, b) in enumerate(ends)
        for k, w in enumerate(weights)
    ]
    out += [dict(kind="random", prompt="", prompt_id=pairs, text=t) for t in said[len(made) :]]
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
    centred = z - z.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    flat = centred @ directions[:2].T
    write_jsonl(
        run.path / "principal.jsonl",
        [dict(record=int(i), x=float(x), y=float(y), label=records[i].get("label")) for i, (x, y) in zip(index, flat)],
    )
    boot = evaluation.Bootstrap(index)
    run.log(name="norm", **boot.mean(norms).as_json())
    share = sizes**2 / np.sum(sizes**2)
    run.record(variance_of_components=[float(s) for s in share[:10]])


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


def _labels(records: Sequence[dict], where: Artifact) -> list[int | None]:
    """The label of each record, 0 or 1, or None where it has none."""
    labels = [r.get("label") for r in records]
    kept = set(known(labels, str(where.path)))
    if not {labels[i] for i in kept} <= {0, 1}:
        raise InputError(f"{where.path} holds labels {sorted({labels[i] for i in kept})}: transfer needs 0 and 1")
    return [label if i in kept else None for i, label in enumerate(labels)]


def _bank(lm: Artifact, vectors: Artifact) -> tuple[LatentSteer, list[dict], list[int]]:
    """(control with its bank, its row for every record, the records that have a vector)."""
    from ctg_jax.stages.sampling import same_lm

    same_lm(vectors, lm)
    control = methods.load(vectors, opened(lm)[0])
    if not isinstance(control, LatentSteer):
        raise InputError(f"{vectors.path.name} holds no latent vectors, but a control of {vectors.spec['method']}")
    rows = vectors.metrics()
    index = [i for i, r in enumerate(rows) if not r.get("left_out")]
    if not index:
        raise InputError(f"{vectors.path.name} holds no vector: every sentence was longer than tokens")
    return control, rows, index
