"""SoftSRV: a soft prompt for each example, made from an embedding of it (DeSalvo et al. 2024).

A sentence encoder embeds an example as e. Its soft prompt is a mixture Σ_j w_j B_j of k learned prompts, with the
weights w = softmax(G e + b), and the frozen language model learns to write the example behind it (the paper's mixture
of prompts, MP_k). Behind the embeddings of other examples it writes texts like these, which is training data made
without instructions. With k = 1 all texts have one prompt (the paper's NSP), and the method is prompt tuning. The
paper's third kind, a network that writes the prompt (MC), is the prompter of `dglm`.

The strength `scale` multiplies what the softmax reads: at 1 the weights are as they were learned, at 0 every example
gets the mean of the k prompts, above 1 the largest weight grows. No strength gives the base model.

A mixture that was trained on the embeddings of its own texts and writes behind these may copy them: use the embeddings
of other texts, and measure the share of copied n-grams.

Differences from the paper: the sentence encoder is one that is not trained further, and the gate is linear in its
embedding. No public code of the authors was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import rng
from ctg_jax.control import Control
from ctg_jax.controls.conditions import condition, per_row
from ctg_jax.controls.vectors import joined
from ctg_jax.data.messages import shown
from ctg_jax.data.pipeline import pipeline
from ctg_jax.learn import embeddings, fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.models.lm import LM
from ctg_jax.run.identity import model_content
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError

EXAMPLE = "example"  # the entry of `prompts.cond` that holds the embeddings


@struct.dataclass
class Mixture(Control):
    """k prompts of P vectors, mixed for each row by an embedding, before the tokens of the row.

    Attributes:
      basis: float32 [k, P, D].
      gate: {"kernel": float32 [k, Z], "bias": float32 [k]}.
      scale: float32 [] or [B]; see above.
      reads: the entry float32 [B, Z] of `prompts.cond` that holds the embeddings; None: the gate has its bias alone.
    """

    basis: jax.Array
    gate: dict[str, jax.Array]
    scale: jax.Array
    reads: str | None = struct.field(pytree_node=False, default=EXAMPLE)

    def init(self, prompts, length):
        score = self.gate["bias"][None]
        if self.reads is not None:
            score = score + condition(prompts, self.reads).astype(jnp.float32) @ self.gate["kernel"].T
        weights = jax.nn.softmax(per_row(self.scale, prompts, None)[:, :, 0] * score, axis=1)
        rows = jnp.einsum("bk,kpd->bpd", weights, self.basis)
        return jnp.broadcast_to(rows, (prompts.tokens.shape[0], *rows.shape[1:]))

    def check(self, prompts):
        if self.reads is None:
            return
        found, width = np.shape(condition(prompts, self.reads)), self.gate["kernel"].shape[1]
        if found != (len(prompts.tokens), width):
            raise InputError(
                f"prompts.cond[{self.reads!r}] has shape {found}, expected {(len(prompts.tokens), width)}: the "
                "embedding of an example for each row."
            )

    def added(self):
        return self.basis.shape[1]

    def prompt(self, x, mask, state):
        return joined(x, mask, state)


def init(lm: LM, key: jax.Array, *, embedding: int, prompts: int = 8, length: int = 20) -> Mixture:
    """A mixture of random prompts.

    Args:
      embedding: Z, the width of the embeddings. prompts: k. length: P, the vectors of each prompt.

    Raises:
      InputError: one of these below 1.
    """
    if min(embedding, prompts, length) < 1:
        raise InputError(f"embedding, prompts and length are {embedding}, {prompts}, {length}: expected at least 1.")
    basis, kernel = jax.random.split(key)
    gate = {"kernel": jax.random.normal(kernel, (prompts, embedding)), "bias": jnp.zeros(prompts)}
    return Mixture(0.02 * jax.random.normal(basis, (prompts, length, lm.width)), gate, jnp.ones(()))


def example(lm: LM, key: jax.Array) -> Mixture:
    """Two prompts of two vectors without embeddings, large enough to change what the model writes, for the laws."""
    control = init(lm, key, embedding=3, prompts=2, length=2)
    gate = control.gate | {"bias": jnp.array([1.0, 0.0])}
    return control.replace(basis=50 * control.basis, gate=gate, reads=None)


def neutral(control: Mixture) -> None:
    """There is no neutral element: vectors of zeros are still attended to."""


def loss(lm: LM) -> losses.LossFn:
    """-log p(x_i | prompt of e, x_<i) per token of the frozen model, e the field `example` float32 [B, Z] of the batch.
    params is the control, frozen = {"params": those of the LM}."""
    plain = losses.control_loss(lm)

    def behind(params, frozen, batch, keys):
        return plain(params, frozen, batch | {"cond": {params.reads: batch["example"]}}, keys)

    return behind


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """Learns the prompts on the texts of `data`; `settings` are those of the stage `softsrv`."""
    return stage(root, softsrv, settings, lm=lm, data=data)


@stage_function("softsrv", revision=1, contents={"encoder": model_content})
def softsrv(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    where: Mapping[str, Any] | None = None,
    encoder: str | None = None,
    prompts: int = 8,
    length: int = 20,
    training: Training = Training(steps=300, batch=16, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: learns the prompts and their gate, each text behind the prompt of its own embedding.

    Args:
      lm, data: an LM artifact, and texts. where: keep records whose fields have these values.
      encoder: directory or hub id of a sentence encoder; None: the mean of the language model's final states.
      prompts, length: see `init`. The prompts begin as the embeddings of tokens of the texts.
      training: how they are trained, at a rate of 0.1 by default, of 0.3 with Adafactor.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: no record matches, and what `init` and training raise.
    """
    records = fitting.matching(data, where)
    model, params, tokenizer = open_lm(lm)
    texts = [r["text"] for r in records]
    embed = embeddings.embedder(lm, encoder)
    vectors = embed(texts)
    made = {"embedding": vectors.shape[1], "prompts": prompts, "length": length}
    control = init(model, rng.stream(jax.random.key(seed), "init"), **made)
    drawn = np.random.default_rng(rng.derived_seed(seed, "start"))
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids in tokenizer.encode(texts)])
    ids = jnp.asarray(drawn.choice(tokens, (prompts, length)))
    control = control.replace(basis=model.embed(params, ids).astype(jnp.float32))
    source = embeddings.with_rows(str(data.path), records, EXAMPLE, vectors)
    batches = pipeline(
        source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=(EXAMPLE,)
    )  # fmt: skip
    training = training.at(0.3 if training.algorithm == "adafactor" else 0.1)
    tx = training.optimizer(r"(basis|gate).*", slow=r"gate.*")
    control = fitting.train(run, control, loss(model), {"params": params}, batches, training, seed=seed, tx=tx)
    fitting.keep(run, control, "softsrv", made)
    run.record(encoder=encoder, version=embed.version)


def conditions(
    artifact: Artifact, lm: Artifact, texts: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """The embeddings of the examples: of the field `source` of a prompt's record, or of the prompt where it has none.

    Raises:
      InputError: a `source` that is no text; the encoder that the control was made with has changed since.
    """
    examples = [shown(text) if r.get("source") is None else r["source"] for text, r in zip(texts, records)]
    for i, found in enumerate(examples):
        if not isinstance(found, str):
            raise InputError(f"prompt {i + 1} has {found!r:.60} as its source, expected the text of an example")
    embed = embeddings.embedder(lm, artifact.given("encoder"))
    if embed.version != artifact.spec["version"]:
        raise InputError(
            f"{artifact.path.name} was made with the encoder {artifact.spec['version']}, but "
            f"{artifact.spec['encoder']} now holds {embed.version}: restore that encoder, or fit the control again"
        )
    return {EXAMPLE: embed(examples)}
