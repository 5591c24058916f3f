"""Texts as latents: each text is cut into a prefix and a continuation, and one sentence encoder embeds both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ctg_jax.data.completions import continuations
from ctg_jax.data.pipeline import Batches
from ctg_jax.data.sources import Source
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.io import atomic
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
      data: texts; those of one word are left out. Or samples, an artifact of `stages.sampling.sample`: their prompts
        are the prefixes and what was written the continuations; those without a word are left out.
      encoder: directory or hub id of a sentence encoder; None: the mean of the language model's final states.
      words: of a prefix; None: a place between two words, uniform over the text, or samples, which have prefixes.
      new: tokens of a continuation at most.
      seed: of the places.

    Raises:
      InputError: no text of two words, or no sample of one; `words` for samples.
    """
    from tqdm import tqdm

    if (data.path / "samples.jsonl").exists():
        if words is not None:
            raise InputError(f"words is {words}, but {data.path.name} holds samples, which have prefixes: leave it out")
        pieces = _written(data)
        tokens = [p.pop("tokens")[:new] for p in pieces]
    else:
        pieces = _cut(data, words, seed)
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
                write_array(file, embed([p[field] for p in pieces[part]]))
        write_array(run.path / f"{name}.npy", np.concatenate([np.load(f) for f in files]))
        for file in files:
            file.unlink()
    run.record(encoder=encoder, version=embed.version)


@stage_function("embeddings.prefixes")
def prefixes(run: Run, *, latents: Artifact) -> None:
    """Stage: data.jsonl, the prefixes of encoded texts as prompts, for the language model to write continuations of.

    Args:
      latents: an artifact of `encode`, which has cut the texts.
    """
    write_jsonl(run.path / "data.jsonl", [{"text": p["prompt"]} for p in latents.rows("pieces.jsonl")])


def _cut(data: Artifact, words: int | None, seed: int) -> list[dict[str, Any]]:
    """The records of texts with prompt, text and continuation; see `encode`."""
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
    return pieces


def _written(samples: Artifact) -> list[dict[str, Any]]:
    """Samples as records with prompt, text, continuation and its tokens; see `encode`."""
    pieces = [
        {"prompt": row["prompt"], "text": row["prompt"] + row["text"], "continuation": row["text"].strip(),
         "tokens": row["tokens"]}
        for row in samples.rows("samples.jsonl")
        if row["text"].strip()
    ]  # fmt: skip
    if not pieces:
        raise InputError(f"no sample of {samples.path} has a word: let the language model write longer ones")
    return pieces


def embedder(lm: Artifact, encoder: str | None) -> Callable[[Sequence[str]], np.ndarray]:
    """n texts -> float32 [n, Z], rows of length one; see `encode`. Its `version` names the weights."""
    from ctg_jax.rewards.embed import lm_embedder, open_embedder

    if encoder is not None:
        return Unit(open_embedder(lm.session, encoder, batch=64))
    return lm.session.keep("embedder", lm, lambda: Unit(lm_embedder(*open_lm(lm))), most=2)


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
    return with_rows(str(latents.path), [records[i] for i in kept], "latent", x[kept])


def with_rows(spec: str, records: Sequence[dict[str, Any]], field: str, rows: np.ndarray) -> Source:
    """The records with one more field, whose value is the row of an array [n, …]. `spec` is what messages call them."""
    return Source(spec, "all", _WithRows(records, field, rows))


class _WithRows(Sequence):
    """Makes a list of a row when its record is read, since lists take several times the memory of the array."""

    def __init__(self, records: Sequence[dict[str, Any]], field: str, rows: np.ndarray):
        self.records, self.field, self.rows = records, field, rows

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.records[i], self.field: self.rows[i].tolist()}


def batches(latents: Artifact, *, batch: int, seed: int) -> Batches:
    """An endless, shuffled, resumable stream of {"latent", "context": float32 [B, Z], "ids": uint32 [B]}."""
    import grain

    x, contexts = arrays(latents)
    rows = grain.MapDataset.range(len(x)).seed(seed).shuffle().repeat().batch(batch, drop_remainder=True)
    found = rows.map(lambda i: {"latent": x[i], "context": contexts[i], "ids": np.asarray(i, np.uint32)})
    signature = {"data": latents.id, "records": len(x), "seed": seed, "batch": batch, "epochs": None}
    return Batches(found, signature, threads=1)


def write_array(file, values: np.ndarray) -> None:
    """Writes a float32 .npy file, which appears whole or not at all."""
    with atomic(file) as f:
        np.save(f, np.asarray(values, np.float32))
