"""Texts as latents: each cut into a prefix and a continuation, both embedded by one sentence encoder, kept as an
artifact; and linear classifiers of those latents, which guide diffusion (Lovelace et al. 2024)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax.data.completions import continuations
from ctg_jax.data.labels import known
from ctg_jax.data.pipeline import Batches
from ctg_jax.data.sources import Source
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.io import atomic
from ctg_jax.rewards.probe import check_training, fit_logistic
from ctg_jax.run.identity import model_content
from ctg_jax.run.stage import Artifact, Run, open_lm, stage_function, write_jsonl
from ctg_jax.types import InputError

_PART = 2048  # texts encoded between two saves


@stage_function("embeddings.encode", contents={"encoder": model_content})
def encode(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    encoder: str | None = None,
    words: int | None = None,
    new: int = 32,
    seed: int = 0,
) -> None:
    """Stage: pieces.jsonl, the records with `prompt` (the prefix), `continuation` and its tokens; latents.npy and
    contexts.npy, float32 [n, Z], the embeddings of continuation and prefix, of length one. Goes on where it stopped.

    Args:
      lm: tokenizes the continuations, and embeds where there is no encoder.
      data: texts; those of one word are left out.
      encoder: directory or hub id of a sentence encoder; None: the mean of the language model's final states.
      words: of a prefix; None: a place between two words, uniform over the text.
      new: tokens of a continuation at most.
      seed: of the places.

    Raises:
      InputError: no text of two words.
    """
    from tqdm import tqdm

    pieces = []
    for i, record in enumerate(data.rows("data.jsonl")):
        parts = record["text"].split()
        if len(parts) < 2 or (words is not None and len(parts) <= words):
            continue
        at = words or int(np.random.default_rng([seed, i]).integers(1, len(parts)))
        kept = {key: value for key, value in record.items() if key not in ("text", "prompt", "reference")}
        prompt, rest = " ".join(parts[:at]), " ".join(parts[at:])
        pieces.append({**kept, "prompt": prompt, "text": f"{prompt} {rest}", "continuation": rest})
    if not pieces:
        raise InputError(f"{data.path} holds no text long enough to be cut into a prefix and a continuation")
    tokens = continuations(pieces, open_lm(lm)[2], new)
    write_jsonl(run.path / "pieces.jsonl", [{**p, "tokens": ids} for p, ids in zip(pieces, tokens)])
    embed = embedder(lm, encoder)
    parts = [slice(at, at + _PART) for at in range(0, len(pieces), _PART)]
    for field, name in (("continuation", "latents"), ("prompt", "contexts")):
        if (run.path / f"{name}.npy").exists():
            continue
        files = [run.path / f"{name}-{i}.npy" for i in range(len(parts))]
        for part, file in tqdm([*zip(parts, files)], desc=f"{run.path.name} {name}", disable=None, leave=False):
            if not file.exists():
                _write(file, embed([p[field] for p in pieces[part]]))
        _write(run.path / f"{name}.npy", np.concatenate([np.load(f) for f in files]))
        for file in files:
            file.unlink()
    run.record(encoder=encoder, version=embed.version)


def embedder(lm: Artifact, encoder: str | None) -> Callable[[Sequence[str]], np.ndarray]:
    """n texts -> float32 [n, Z], rows of length one; see `encode`. Its `version` names the weights."""
    content = None if encoder is None else model_content(encoder, None, lm.session.sha256)
    return lm.session.keep("embedder", (lm, encoder, content), lambda: _embedder(lm, encoder), most=2)


def _embedder(lm: Artifact, encoder: str | None) -> Unit:
    from ctg_jax.rewards.embed import lm_embedder, sentence_embedder

    return Unit(lm_embedder(*open_lm(lm)) if encoder is None else sentence_embedder(encoder, batch=64))


def encoder_of(made: Artifact) -> str | None:
    """The encoder of the latents that an artifact was made from, where it is now; see `encode`."""
    path = made.path.with_name(f"embeddings.encode-{made.spec['inputs']['latents']}")
    return Artifact(path, "", made.session).given("encoder")


class Unit:
    """An embedder whose rows have length one."""

    def __init__(self, embed):
        self.embed, self.version = embed, embed.version

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        x = self.embed(list(texts))
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def arrays(latents: Artifact) -> tuple[np.ndarray, np.ndarray]:
    """(latents, contexts), float32 [n, Z] each."""
    return tuple(np.load(latents.path / f"{name}.npy", allow_pickle=False) for name in ("latents", "contexts"))


def pieces(latents: Artifact, tokenizer: Tokenizer, longest: int) -> Source:
    """Records with prompt, tokens, and the latent of the continuation, for `ctg_jax.data.completions`; without those
    whose prefix has more than `longest` tokens."""
    records, x = latents.rows("pieces.jsonl"), arrays(latents)[0]
    lengths = [len(ids) for ids in tokenizer.encode_prompts([r["prompt"] for r in records])]
    kept = [i for i, n in enumerate(lengths) if n <= longest]
    if not kept:
        raise InputError(f"prefix is {longest}, but no prefix of {latents.path} has so few tokens: allow longer ones")
    return Source(str(latents.path), "all", _Pieces([records[i] for i in kept], x[kept]))


class _Pieces(Sequence):
    def __init__(self, records: list[dict[str, Any]], latents: np.ndarray):
        self.records, self.latents = records, latents

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.records[i], "latent": self.latents[i].tolist()}


def batches(latents: Artifact, *, batch: int, seed: int) -> Batches:
    """An endless, shuffled, resumable stream of {"latent", "context": float32 [B, Z], "ids": uint32 [B]}."""
    import grain

    x, contexts = arrays(latents)
    rows = grain.MapDataset.range(len(x)).seed(seed).shuffle().repeat().batch(batch, drop_remainder=True)
    found = rows.map(lambda i: {"latent": x[i], "context": contexts[i], "ids": np.asarray(i, np.uint32)})
    signature = {"data": latents.id, "records": len(x), "seed": seed, "batch": batch, "epochs": None}
    return Batches(found, signature, 1, 4)


@stage_function("embeddings.probe")
def probe(
    run: Run,
    *,
    latents: Artifact,
    name: str,
    field: str = "label",
    pattern: str | None = None,
    words: int | None = None,
    strength: float = 100.0,
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
      strength: inverse regularisation, scikit-learn's C.
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
    coef, intercept, _ = fit_logistic(x[~held], labels[~held], strength, seed)
    _write(run.path / "probe.npy", np.concatenate([coef[0], intercept]))
    run.record(attribute=name, version=latents.spec["version"])
    seen = held if held.any() else ~held
    right = (x[seen] @ coef[0] + intercept[0] > 0) == labels[seen]
    run.log(name=name, accuracy=float(np.mean(right)), share=float(labels.mean()), heldout=int(held.sum()))


def coefficients(probe: Artifact, encoder: str) -> tuple[np.ndarray, float]:
    """(w float32 [Z], b) of a `probe`, which must have been fitted on latents of that version of an encoder."""
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


def _write(file, values: np.ndarray) -> None:
    with atomic(file) as f:
        np.save(f, np.asarray(values, np.float32))
