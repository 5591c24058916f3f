"""`classifier`: a classifier of texts, trained from a sentence encoder whose weights all learn (Devlin et al. 2019,
section 4.1). A judge of kind "classifier" reads it (`ctg_jax.stages.judges.fit_judge`)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import rng
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.models import encoder as encoders
from ctg_jax.rewards.embed import text_ids
from ctg_jax.run.identity import model_content
from ctg_jax.run.stage import Artifact, Run, stage_function
from ctg_jax.types import InputError, Params, PyTree, Sum

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def loss(encoder: encoders.Encoder) -> losses.LossFn:
    """Cross-entropy, in nats per text, of the logits of `Encoder.classify` against the field `label` int [B] of the
    batch; params are those of the encoder. The metric `accuracy` is that of the batch."""

    def cross_entropy(params: Params, frozen: PyTree, batch: dict[str, Any], keys: jax.Array) -> Sum:
        z = encoder.classify(params, batch["tokens"], batch["mask"])
        weight = jnp.float32(len(z))
        right = jnp.sum(jnp.argmax(z, axis=-1) == batch["label"], dtype=jnp.float32)
        total = jnp.sum(losses.next_token(z, batch["label"]))
        return Sum(total=total, weight=weight, metrics={"accuracy": (right, weight)})

    return cross_entropy


@stage_function("classifier", contents={"encoder": model_content})
def classifier(
    run: Run,
    *,
    data: Sequence[Artifact],
    encoder: str,
    labels: Sequence[str] = ("no", "yes"),
    training: Training = Training(
        steps=400, batch=32, tokens=64, rate=5e-5, warmup=40, schedule="linear", decay=0.01, log_every=10
    ),
    seed: int = 0,
) -> None:
    """Stage: a sequence classifier and its tokenizer, in state/classifier in Hugging Face layout.

    Texts are read as they are: what sentence-transformers puts before texts, or does to their case beside the
    tokenizer, belongs to embeddings and has no place in the files of a classifier.

    Args:
      data: records with `text` and `label`, a class from 0 to C - 1, of one source or several; records without a label
        are left out and counted in a warning.
      encoder: a folder or hub id of a BERT, RoBERTa or DistilBERT.
      labels: the names of the C classes, which config.json keeps.
      training: how it is trained; longer texts than `training.tokens`, special tokens included, are cut.
      seed: of the last layer and of the order of the texts.

    Raises:
      InputError: no data, labels that are no class or all the same, a family without a classifier, more tokens than the
        encoder reads, and what `hf.load_encoder` raises.
    """
    from ctg_jax.models import hf

    if not data:
        raise InputError("data is empty: a classifier learns from texts with labels, give at least one source")
    records = [r for d in data for r in labelled(d.rows("data.jsonl"), str(d.path), classes=len(labels))]
    if len(found := {r["label"] for r in records}) < 2:
        raise InputError(f"every text of data has the label {found.pop()}: a classifier needs texts of two classes")
    model, params = hf.load_encoder(encoder)
    if not 2 < training.tokens <= model.context:
        raise InputError(
            f"training.tokens is {training.tokens}; the encoder reads at most {model.context} tokens, of which two are "
            "special: expected a number between these"
        )
    key = jax.random.key(seed)
    model, params = encoders.classifier(model, params, tuple(labels), rng.stream(key, "head"))
    folder, source = run.path / "state" / "classifier", hf.resolve(encoder)
    tokenizer = _Texts(text_ids(source, training.tokens), model.pad)
    texts = Source(", ".join(d.path.name for d in data), "all", records)
    batches = pipeline(
        texts, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=("label",)
    )  # fmt: skip
    params = fitting.train(run, params, loss(model), None, batches, training, seed=seed)
    hf.save(folder, model, params)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    run.record(texts=np.bincount([r["label"] for r in records], minlength=len(labels)).tolist())
    run.discard("steps")


class _Texts:
    """The tokenizer of an encoder as `pipeline` reads one: its ids begin and end a text themselves."""

    eos = None

    def __init__(self, ids: Any, pad: int):
        self.encode, self.pad = ids, pad

    def begun(self, ids: list[int]) -> list[int]:
        return ids

    def to_json(self) -> str:
        """What tells a stream of batches that it is of the same tokenizer: the ids of a text of many characters."""
        return repr(self.encode(["".join(map(chr, range(33, 600)))]))
