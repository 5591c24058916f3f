"""Latents of sentences whose path through a document is a Brownian bridge (the encoder of Wang et al. 2022)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import rng
from ctg_jax.data.pipeline import Batches
from ctg_jax.data.sentences import sentences_of
from ctg_jax.learn import embeddings, fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.learn.latent_diffusion import moments
from ctg_jax.models import bridge
from ctg_jax.run import checkpoint
from ctg_jax.run.identity import model_content
from ctg_jax.run.stage import Artifact, Run, stage_function, write_jsonl
from ctg_jax.types import InputError, Sum


@stage_function("bridge.sentences", contents={"encoder": model_content})
def embed_sentences(run: Run, *, lm: Artifact, data: Artifact, encoder: str | None = None, least: int = 3) -> None:
    """Stage: documents.jsonl, the `sentences` of every document and the number `start` of the first of them, and
    sentences.npy, float32 [n, E], the embeddings of all sentences, of length one.

    Args:
      lm: embeds where there is no encoder. data: documents, see `ctg_jax.data.sentences.sentences_of`.
      encoder: directory or hub id of a sentence encoder; None: the mean of the language model's final states.
      least: documents with fewer sentences are left out and counted in spec.json.

    Raises:
      InputError: `least` below 3, or no document has as many sentences.
    """
    if least < 3:
        raise InputError(f"least is {least}, expected at least 3: a first sentence, a last one and one between them.")
    records = data.rows("data.jsonl")
    found = [s for s in map(sentences_of, records) if len(s) >= least]
    if not found:
        raise InputError(
            f"no document of {data.path} has {least} sentences: give longer texts, or the list `sentences` of each"
        )
    starts = np.cumsum([0] + [len(s) for s in found[:-1]])
    write_jsonl(run.path / "documents.jsonl", [dict(sentences=s, start=int(at)) for s, at in zip(found, starts)])
    embed = embeddings.embedder(lm, encoder)
    embeddings.write_array(run.path / "sentences.npy", embed([s for document in found for s in document]))
    run.record(encoder=encoder, version=embed.version, left_out=len(records) - len(found))


@stage_function("bridge.encoder")
def train_encoder(
    run: Run,
    *,
    sentences: Artifact,
    latent: int = 16,
    width: int = 128,
    others: int = 31,
    ends: float = 1.0,
    training: Training = Training(steps=3000, batch=32, rate=1e-3, warmup=100, schedule="cosine", save_every=500),
    seed: int = 0,
) -> None:
    """Stage: trains a `bridge.encoder`; latents.npy, float32 [n, Z], holds the latents of all sentences.

    Args:
      sentences: an artifact of `embed_sentences`. latent: Z. width: of the two hidden layers.
      others, ends: see `loss`. training: how it is trained. seed: of initial values and of what is drawn.

    Raises:
      InputError: a size below 1, and what training raises.
    """
    documents, table = sentences.rows("documents.jsonl"), _table(sentences)
    mean, deviation = moments(table)
    frozen = {
        "sentences": (jnp.asarray(table) - mean[None]) / deviation[None],
        "start": jnp.asarray([d["start"] for d in documents]),
        "count": jnp.asarray([len(d["sentences"]) for d in documents]),
    }
    params = bridge.encoder(rng.stream(jax.random.key(seed), "init"), table.shape[1], latent, width)
    batches = _batches(sentences, len(documents), training.batch, seed)
    params = fitting.train(run, params, loss(others, ends), frozen, batches, training, seed=seed)
    checkpoint.save(run.path / "state", params)
    embeddings.write_array(run.path / "latents.npy", np.asarray(bridge.encode(params, frozen["sentences"])))
    run.discard("steps")
    run.record(latent=latent, width=width)


def loss(others: int = 31, ends: float = 1.0) -> losses.LossFn:
    """`bridge.contrast` of three sentences of a document, drawn at random, with the middle ones of random documents as
    the others, which keeps rows independent of their batch; and a term that keeps the latents in place.

    params are those of `bridge.encode`; frozen has the standardised embeddings "sentences" [n, E] and, for each
    document, the "start" and "count" int [d] of its sentences; a batch has "document" int [B].

    Differences from the authors' code: it takes the softmax over the ends of the other documents for a given middle,
    where the paper (section 3) and this function take it over the middles for given ends; and it pulls the absolute
    value of the last latent to 1, which leaves the sign of each dimension open.

    Args:
      others: n, the number of other sentences.
      ends: weight of the mean squared distance of latents of first sentences to 0 and of last sentences to 1, of the
        rows that drew one of them.

    Raises:
      InputError: no other sentences, or a negative weight.
    """
    if others < 1:
        raise InputError(f"others is {others}, expected at least 1.")
    if not ends >= 0:
        raise InputError(f"ends is {ends}, expected a weight of at least 0.")

    def total(params: Any, frozen: Any, batch: dict[str, Any], keys: jax.Array) -> Sum:
        times = jax.vmap(three)(rng.named(keys, "times"), frozen["count"][batch["document"]])
        place = frozen["start"][batch["document"]][:, None] + times
        z0, zt, zT = (bridge.encode(params, frozen["sentences"][place[:, i]]) for i in range(3))

        def middles(key):
            which = jax.random.randint(rng.stream(key, "which"), (others,), 0, frozen["count"].shape[0])
            at = jax.vmap(three)(jax.random.split(rng.stream(key, "at"), others), frozen["count"][which])[:, 1]
            return frozen["start"][which] + at

        drawn = bridge.encode(params, frozen["sentences"][jax.vmap(middles)(rng.named(keys, "others"))])
        mean, variance = bridge.moments(z0, zT, *(times[:, i] for i in range(3)))
        nats = bridge.contrast(mean, variance, zt, drawn)
        is_first = times[:, 0] == 0
        is_last = times[:, 2] == frozen["count"][batch["document"]] - 1
        pinned = is_first * jnp.mean(z0**2, axis=1) + is_last * jnp.mean((zT - 1) ** 2, axis=1)
        count = jnp.float32(nats.shape[0])
        parts = {"contrast": (jnp.sum(nats), count), "ends": (jnp.sum(pinned), count)}
        return Sum(jnp.sum(nats) + ends * jnp.sum(pinned), count, parts)

    return total


def three(key: jax.Array, count: jax.Array) -> jax.Array:
    """Three different numbers below `count`, at least 3, in rising order, int32 [3]; all are equally likely."""
    draws = [jax.random.randint(k, (), 0, count - i) for i, k in enumerate(jax.random.split(key, 3))]
    first, second, third = draws
    second += second >= first
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    third += third >= low
    third += third >= high
    return jnp.sort(jnp.stack([first, second, third])).astype(jnp.int32)


def diffusion(documents: list[dict], latents: np.ndarray) -> np.ndarray:
    """The variance float32 [Z] that the Brownian motion of the latents gains from one sentence to the next: the mean
    over all sentences between the ends of (z_t − mean)² / variance, with the moments of the bridge of unit variance
    through the ends of their document."""
    found = []
    for d in documents:
        z, n = latents[d["start"] :][: len(d["sentences"])], len(d["sentences"])
        t = np.arange(1, n - 1)
        share = (t / (n - 1))[:, None]
        gap = z[1:-1] - (1 - share) * z[0] - share * z[-1]
        found.append(gap**2 / (t * (n - 1 - t) / (n - 1))[:, None])
    return np.concatenate(found).mean(0).astype(np.float32)


def _table(sentences: Artifact) -> np.ndarray:
    return np.load(sentences.path / "sentences.npy", allow_pickle=False)


def _batches(sentences: Artifact, documents: int, batch: int, seed: int) -> Batches:
    """An endless, shuffled, resumable stream of {"document": int32 [B], "ids": uint32 [B]}."""
    import grain

    rows = grain.MapDataset.range(documents).seed(seed).shuffle().repeat().batch(batch, drop_remainder=True)
    found = rows.map(lambda i: {"document": np.asarray(i, np.int32), "ids": np.asarray(i, np.uint32)})
    signature = {"data": sentences.id, "records": documents, "seed": seed, "batch": batch, "epochs": None}
    return Batches(found, signature, threads=1)
