"""RankGen's scorer: how well a text continues its prompt, learned from true continuations among others (Krishna et al.
2022).

s(x, y) = <A e(x), B e(y)> exp(sharpness), with e a frozen sentence encoder and A, B [Z, D] learned by

    -log exp s(x_i, y_i) / (Σ_j exp s(x_i, y_j) + exp s(x_i, g_i)),

where the y_j are the true continuations of the other prompts of the batch, which come from the same document, and g_i
is what a language model wrote after x_i, where the records have that. Over all pairs the best s is log p(y | x) / p(y)
plus a number for each prompt, so that specific continuations are ranked above those that are likely after anything.

Differences from the paper: there the whole encoder, a T5, is trained, here two matrices on a frozen one; the sharpness
is learned, and is 1 in the authors' code; of prompts that are too long the encoder reads the beginning, as theirs does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ctg_jax.io import digest
from ctg_jax.rewards.check import checked, readable
from ctg_jax.rewards.embed import Embedder
from ctg_jax.rewards.logistic import read_model, write_model
from ctg_jax.types import InputError

AMONG = 10  # continuations of a document among which `accuracy` looks for the true one


def info_nce(scores: jax.Array, generated: jax.Array | None = None) -> jax.Array:
    """float32 [B], the loss above, of scores [B, B] of every prompt with every continuation, of which those of the
    diagonal are true, and of `generated` [B, G] of every prompt with what was written after it."""
    every = scores if generated is None else jnp.concatenate([scores, generated], axis=1)
    return jax.nn.logsumexp(every, axis=1) - jnp.diagonal(scores)


class RankScorer:
    """s(x, y), higher where text y continues prompt x better.

    Args:
      embedder: texts -> float32 [n, D].
      left, right: A and B float32 [Z, D]. sharpness: float.
    """

    threshold = 0.0

    def __init__(
        self, embedder: Embedder, left: np.ndarray, right: np.ndarray, sharpness: float = 0.0, *, name: str = "rank"
    ):
        self.embedder, self.name, self.sharpness = embedder, name, float(sharpness)
        self.left, self.right = np.asarray(left, np.float32), np.asarray(right, np.float32)
        self.version = f"rank@{digest(embedder.version, self.left, self.right, self.sharpness)}"

    @classmethod
    def fit(
        cls,
        embedder: Embedder,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        documents: Sequence[Any],
        *,
        generated: Sequence[str] | None = None,
        width: int = 128,
        steps: int = 500,
        batch: int = 64,
        rate: float = 1e-3,
        seed: int = 0,
        name: str = "rank",
    ) -> RankScorer:
        """By Adam on batches of pairs of one document each.

        Args:
          documents: what each pair comes from; a document with one pair has no negatives and is left out, unless there
            are generated ones.
          generated: what a language model wrote after each prefix.
          width: Z. steps, batch, rate, seed: of the training.

        Raises:
          InputError: no document has two pairs and nothing was generated.
        """
        x, y = np.asarray(embedder(list(prefixes))), np.asarray(embedder(list(suffixes)))
        g = None if generated is None else np.asarray(embedder(list(generated)))
        generator = np.random.default_rng(seed)
        batches = _batches(documents, batch, 1 if g is not None else 2, generator)
        params = started(generator, width, x.shape[1])
        tx = optax.adam(rate)
        state = tx.init(params)
        for _ in range(steps):
            at = next(batches)
            params, state = _update(tx, params, state, x[at], y[at], None if g is None else g[at])
        return cls(embedder, params["left"], params["right"], float(params["sharpness"]), name=name)

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        readable(self.name, prompts, texts, "text")
        if not len(texts):
            return np.zeros(0, np.float32)
        own = {p: i for i, p in enumerate(dict.fromkeys(prompts))}  # a search asks for few prompts and many texts
        x = np.asarray(self.embedder(list(own)))[[own[p] for p in prompts]] @ self.left.T
        scores = np.sum(x * (np.asarray(self.embedder(list(texts))) @ self.right.T), axis=1)
        return checked(self.name, scores * np.exp(self.sharpness), len(texts))

    def save(self, directory: str | Path) -> None:
        """Writes the matrices; the embedder is not copied."""
        meta = {"kind": "rank", "name": self.name, "sharpness": self.sharpness, "version": self.version}
        write_model(directory, meta, left=self.left, right=self.right)

    @classmethod
    def load(cls, directory: str | Path, embedder: Embedder) -> RankScorer:
        """What `save` wrote; InputError where it is damaged or was fitted on another encoder."""
        meta, arrays = read_model(directory, "rank")
        out = cls(embedder, arrays["left"], arrays["right"], meta["sharpness"], name=meta["name"])
        if out.version != meta["version"]:
            raise InputError(
                f"the scorer in {directory} is of version {meta['version']}, with this encoder {out.version}"
            )
        return out


def started(generator: np.random.Generator, width: int, features: int) -> dict[str, jax.Array]:
    """Random matrices of variance 1 / D, equal for prompts and continuations, so that a text begins near itself."""
    both = jnp.asarray(generator.normal(size=(width, features)) / features**0.5, jnp.float32)
    return {"left": both, "right": both, "sharpness": jnp.zeros(())}


def loss(params: Mapping[str, jax.Array], x: jax.Array, y: jax.Array, g: jax.Array | None = None) -> jax.Array:
    """The mean of `info_nce` over pairs of embeddings x, y [B, D], and g [B, D] of what was generated."""
    left, sharp = x @ params["left"].T, jnp.exp(params["sharpness"])
    own = None if g is None else jnp.sum(left * (g @ params["right"].T), axis=1, keepdims=True) * sharp
    return jnp.mean(info_nce(left @ (y @ params["right"].T).T * sharp, own))


@partial(jax.jit, static_argnums=0)
def _update(tx, params, state, x, y, g):
    updates, state = tx.update(jax.grad(loss)(params, x, y, g), state)
    return optax.apply_updates(params, updates), state


def _batches(documents: Sequence[Any], batch: int, least: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless places of pairs: each time `batch` of one document, or as many as it has, in proportion to its size."""
    groups: dict[Any, list[int]] = {}
    for i, document in enumerate(documents):
        groups.setdefault(document, []).append(i)
    usable = [np.asarray(places) for places in groups.values() if len(places) >= least]
    if not usable:
        raise InputError(
            "no document has two pairs of a prompt and its continuation, so there is nothing to tell the true one from"
        )
    sizes = np.asarray([len(places) for places in usable], float)

    def endless():
        while True:
            places = usable[generator.choice(len(usable), p=sizes / sizes.sum())]
            yield generator.choice(places, min(batch, len(places)), replace=False)

    return endless()


def pairs(records: Sequence[Mapping[str, Any]], where: str) -> tuple[list[str], list[str], list[Any]]:
    """(prefixes, continuations, documents): of a record with a prompt that its text begins with, the prompt and the
    rest; of other records each text and the one after it, where both have the same `document`. Records without a
    `document` are all of one.

    Raises:
      InputError: no pair.
    """
    found = []
    for i, record in enumerate(records):
        document = record.get("document")
        text = record.get("reference", record["text"])
        head = record.get("prompt", record["text"] if "reference" in record else None)
        if isinstance(head, str) and text.startswith(head) and text[len(head) :].strip():
            found.append((head, text[len(head) :], document))
        elif head is None and i + 1 < len(records) and records[i + 1].get("document") == document is not None:
            found.append((text, records[i + 1]["text"], document))
    if not found:
        raise InputError(
            f"{where} has no pair of a prompt and its continuation: give records with a prompt that their text begins "
            "with, texts cut to words, or texts in order with the document that they are from"
        )
    prefixes, suffixes, documents = zip(*found)
    return list(prefixes), list(suffixes), list(documents)


SETTINGS = ("data", "encoder")


def fit(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], where: str) -> RankScorer:
    """The judge of kind "rank"; see `ctg_jax.rewards`. Where every record has text under `generated`, that is what a
    language model wrote after its prompt."""
    found = pairs(records, where)
    written = [r["generated"] for r in records if isinstance(r.get("generated"), str)]
    more = {"generated": written} if len(written) == len(records) == len(found[0]) else {}
    return RankScorer.fit(settings["embedder"](), *found, **more, name=settings["name"])


def load(folder: Path, settings: Mapping[str, Any]) -> RankScorer:
    """The judge of kind "rank" that was saved in a folder."""
    return RankScorer.load(folder, settings["embedder"]())


def accuracy(judge: RankScorer, records: Sequence[Mapping[str, Any]], where: str) -> float:
    """The share of prompts whose true continuation has the highest score among `AMONG` of its document, or as many as
    there are; those of other prompts are the next ones. Documents with one pair do not count.

    Raises:
      InputError: no document has two pairs.
    """
    prefixes, suffixes, documents = pairs(records, where)
    groups: dict[Any, list[int]] = {}
    for i, document in enumerate(documents):
        groups.setdefault(document, []).append(i)
    asked = [
        [(i, places[(at + k) % len(places)]) for k in range(min(AMONG, len(places)))]
        for places in groups.values()
        if len(places) > 1
        for at, i in enumerate(places)
    ]
    if not asked:
        raise InputError(f"{where} has no document with two pairs, so there is nothing to tell the true one from")
    flat = [pair for row in asked for pair in row]
    scores = iter(judge([prefixes[i] for i, _ in flat], [suffixes[j] for _, j in flat]).tolist())
    rows = [[next(scores) for _ in row] for row in asked]
    return float(np.mean([row[0] > max(row[1:]) for row in rows]))
