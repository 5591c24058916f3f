"""Time Control: a plan of latents, one for each sentence, that the language model writes along (Wang et al. 2022,
"Language modeling via stochastic processes").

An encoder is trained so that the latents of the sentences of a document form a Brownian bridge
(`learn.sentence_bridge`), and the language model is tuned to write along them: the latent of its sentence is added to
the embedding of every token. To write, a bridge is drawn from a first latent to a last one, both of them like those of
real documents, and its K latents are held for `span` tokens each.

The latent is a function of the place in the text and not of the sentence that is being written: sentences of a text may
be longer or shorter than planned. The authors' generator does the same with a list of sentence lengths, and also goes
on to the next latent at a full stop.

Differences from the authors' code: a frozen sentence encoder takes the place of their GPT-2; the bridge is exact for
every number of sentences, where they step by .05 whatever K, which is right for K = 20 alone; its variance is that of
the latents of the data unless `variance` is "unit"; and the density of last latents is that of all documents.
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
from ctg_jax.controls.conditions import condition
from ctg_jax.controls.delta import Delta
from ctg_jax.data.completions import completions
from ctg_jax.data.sources import Source
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.learn import fitting, losses, sentence_bridge
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pool import read
from ctg_jax.models import bridge
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, Sum

VARIANCES = ("fitted", "unit")


@struct.dataclass
class Plan(Control):
    """h + scale · W z at the embeddings, with z the latent that the plan of the row has for the place of the token.

    Attributes:
      project: float32 [D, Z], W.
      first, first_deviation, last, last_deviation: float32 [Z], the normal densities of latents of first and of last
        sentences.
      variance: float32 [Z], of the Brownian motion over the whole bridge, see `bridge.sample`.
      scale: float32 [] or [B], the strength of the plan; the change of weights stays.
      delta: a change of the weights of the language model, or None.
      sentences, span: K, and the tokens for which each latent is held; the last one is held to the end.
      reads: None, or the name of an entry float [B, K, Z] of `prompts.cond` that holds the plan in place of one drawn.
    """

    project: jax.Array
    first: jax.Array
    first_deviation: jax.Array
    last: jax.Array
    last_deviation: jax.Array
    variance: jax.Array
    scale: jax.Array
    delta: Delta | None = None
    sentences: int = struct.field(pytree_node=False, default=8)
    span: int = struct.field(pytree_node=False, default=12)
    reads: str | None = struct.field(pytree_node=False, default=None)

    def weights(self, params):
        return params if self.delta is None else self.delta.weights(params)

    def plan(self, prompts) -> jax.Array:
        """The latents float32 [B, K, Z] of the sentences of each row.

        Raises:
          InputError: `prompts.cond` lacks the plan, or holds one of another width.
        """
        if self.reads is not None:
            plan = condition(prompts, self.reads)
            if plan.ndim != 3 or plan.shape[2] != self.project.shape[1]:
                raise InputError(
                    f"prompts.cond[{self.reads!r}] has shape {plan.shape}, expected [rows, sentences, "
                    f"{self.project.shape[1]}]: a latent for each sentence."
                )
            return plan
        keys = rng.named(prompts.keys, "plan")

        def end(name, mean, deviation):
            draw = jax.vmap(lambda key: jax.random.normal(rng.stream(key, name), mean.shape))(keys)
            return mean[None] + deviation[None] * draw

        first, last = end("first", self.first, self.first_deviation), end("last", self.last, self.last_deviation)
        return bridge.sample(rng.named(keys, "bridge"), first, last, self.sentences, self.variance)

    def init(self, prompts, length):
        pushes = self.plan(prompts) @ self.project.T
        scale = jnp.broadcast_to(jnp.asarray(self.scale, jnp.float32), pushes.shape[:1])
        return scale[:, None, None] * pushes, jnp.int32(0)

    def began(self, state, start, first):
        return state[0], first  # what other controls put before the prompt is no part of the text

    def hidden(self, h, site, pos, state):
        if isinstance(site, int) and site != 0:
            return h
        pushes, first = state
        if pushes.shape[2] != h.shape[2]:
            raise InputError(
                f"The plan has width {pushes.shape[2]}, and the model {h.shape[2]}: it was learned on another model."
            )
        place = pos - jnp.reshape(first, (-1, 1))
        which = jnp.clip(place // self.span, 0, pushes.shape[1] - 1)
        push = jnp.where(place[:, :, None] < 0, 0.0, jnp.take_along_axis(pushes, which[:, :, None], axis=1))
        return h + jnp.where(site == 0, push, 0.0).astype(h.dtype)


def init(
    lm: LM,
    key: jax.Array,
    *,
    latent: int = 16,
    sentences: int = 8,
    span: int = 12,
    kind: str = "lora",
    rank: int = 8,
    targets: str | None = None,
    reads: str | None = None,
) -> Plan:
    """A plan whose latents are those of a standard bridge and change nothing: `project` is zero.

    Args:
      latent: Z. sentences, span, reads: see `Plan`.
      kind: what is trained of the language model: nothing ("frozen"), a change of low rank ("lora", with `rank`) or a
        change of whole weights ("full"). targets: of the change, see `Adapter`.

    Raises:
      InputError: fewer than two sentences, a span or a latent below 1, an unknown kind.
    """
    if sentences < 2 or span < 1 or latent < 1:
        raise InputError(f"sentences is {sentences}, span {span} and latent {latent}, expected at least 2, 1 and 1.")
    zero, one = jnp.zeros(latent), jnp.ones(latent)
    change = dict(kind=kind, rank=rank, targets=targets)
    delta = None if kind == "frozen" else fitting.delta(lm, rng.stream(key, "delta"), **change)
    return Plan(
        jnp.zeros((lm.width, latent)), zero, one, one, one, one, jnp.ones(()), delta,
        sentences=sentences, span=span, reads=reads,
    )  # fmt: skip


def example(lm: LM, key: jax.Array) -> Plan:
    """Plans of three latents held for two tokens, through a random projection, for the laws."""
    control = init(lm, key, latent=3, sentences=3, span=2, kind="frozen")
    return control.replace(project=2 * jax.random.normal(key, control.project.shape))


def neutral(control: Plan) -> Plan:
    """No push and no change of weights."""
    delta = None if control.delta is None else fitting.neutral_delta(control.delta)
    return control.replace(scale=jnp.zeros_like(control.scale), delta=delta)


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    sentences: Mapping[str, Any] | None = None,
    encoder: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Artifact:
    """Embeds the sentences of documents, trains their latents, and tunes the language model to write along them.

    Args:
      data: documents: records with `text` of several sentences, or with a list `sentences`.
      sentences: settings of `sentence_bridge.embed_sentences`. encoder: of `sentence_bridge.train_encoder`.
      settings: of the stage `time_control`.
    """
    found = stage(root, sentence_bridge.embed_sentences, sentences or {}, lm=lm, data=data)
    latents = stage(root, sentence_bridge.train_encoder, encoder or {}, sentences=found)
    return stage(root, time_control, settings, lm=lm, documents=found, latents=latents)


@stage_function("time_control", revision=1)
def time_control(
    run: Run,
    *,
    lm: Artifact,
    documents: Artifact,
    latents: Artifact,
    sentences: int | None = None,
    span: int | None = None,
    variance: str = "fitted",
    adapter: Adapter = Adapter(),
    training: Training = Training(steps=1000, batch=16, tokens=96, rate=1e-3, warmup=50, schedule="cosine"),
    seed: int = 0,
) -> None:
    """Stage: trains the projection and the change of weights on the next-token loss of documents, given the latent of
    the sentence that holds each token.

    Args:
      documents, latents: artifacts of `sentence_bridge`.
      sentences, span: see `Plan`; None: the rounded mean of the documents.
      variance: "fitted": that of drawn plans is that of the latents of the documents (`sentence_bridge.diffusion`);
        "unit": it is 1 over the whole bridge, as in the paper.
      adapter: what learns of the language model besides the projection; of kind "lora", "full" or "frozen".
      training: how it is trained; documents are cut at `tokens`. seed: of initial values and of the order of texts.

    Raises:
      InputError: an unknown `variance`, and what `init` and training raise.
    """
    if variance not in VARIANCES:
        raise InputError(f"variance is {variance!r}, expected one of {', '.join(VARIANCES)}.")
    model, params, tokenizer = open_lm(lm)
    records, z = documents.rows("documents.jsonl"), np.load(latents.path / "latents.npy", allow_pickle=False)
    rows = Written(records, z, tokenizer, training.tokens)
    sizes = [len(r["sentences"]) for r in records]
    made = dict(
        latent=int(z.shape[1]),
        sentences=sentences or max(2, round(float(np.mean(sizes)))),
        span=span or max(1, round(rows.tokens / sum(sizes))),
        kind=adapter.kind,
        rank=adapter.rank,
        targets=adapter.targets,
    )
    key = jax.random.key(seed)
    control = init(model, rng.stream(key, "init"), **made)
    begins = np.asarray([r["start"] for r in records])
    ends = begins + np.asarray(sizes) - 1
    unit = np.ones(z.shape[1], np.float32)
    fitted = unit if variance == "unit" else sentence_bridge.diffusion(records, z) * (made["sentences"] - 1)
    small = 0.02 * jax.random.normal(rng.stream(key, "project"), control.project.shape)
    control = control.replace(
        project=small, variance=jnp.asarray(fitted),
        first=jnp.asarray(z[begins].mean(0)), first_deviation=jnp.asarray(z[begins].std(0)),
        last=jnp.asarray(z[ends].mean(0)), last_deviation=jnp.asarray(z[ends].std(0)),
    )  # fmt: skip
    source = Source(str(documents.path), "all", rows)
    batches = completions(
        source, tokenizer, batch=training.batch, prompt=1, new=training.tokens, seed=seed, fields=("plan",)
    )  # fmt: skip
    planned = control.replace(reads="plan", span=1)
    planned = fitting.train(
        run, planned, loss(model), {"params": params}, batches, training.at(adapter.rate),
        trained=r"project|delta/changes/.*", seed=seed,
    )  # fmt: skip
    fitting.keep(run, planned.replace(reads=None, span=made["span"]), "time_control", made)


def loss(lm: LM) -> losses.LossFn:
    """Cross-entropy per token of a document, given `batch["plan"]`, the latent of the sentence of each token, float
    [B, T, Z]. params is a `Plan` of span 1 that reads "plan"; frozen = {"params": those of the language model}."""

    def total(params, frozen, batch, keys):
        text = read(lm, frozen["params"], batch, keys, params, {"plan": batch["plan"]})
        nll = reduced(text, losses.next_token, batch["completion"])
        return Sum(*losses.masked_sum(nll, batch["written"]))

    return total


class Written(Sequence):
    """Documents as records for `ctg_jax.data.completions`: an empty prompt, the tokens of the document, cut at
    `length`, and `plan`, float32 [n + length, Z], the latent of the sentence that holds each token, behind that of the
    n tokens that stand for an empty prompt; the last one goes on to the end of the row.

    `tokens` is the number of tokens of all documents before they are cut."""

    def __init__(self, records: Sequence[Mapping[str, Any]], latents: np.ndarray, tokenizer: Tokenizer, length: int):
        self.records, self.latents, self.length = records, latents, length
        self.before = len(tokenizer.encode_prompts([""])[0])
        heads, tails = [], []
        for record in records:
            text = ""
            for sentence in record["sentences"]:
                heads.append(text)
                tails.append(f" {sentence}" if text else sentence)
                text += tails[-1]
        pieces = iter(tokenizer.encode_after(heads, tails))
        end = [] if tokenizer.eos is None else [tokenizer.eos]
        self.pieces = [[next(pieces) for _ in record["sentences"]] for record in records]
        self.tokens = sum(len(piece) for pieces in self.pieces for piece in pieces)
        for pieces in self.pieces:
            pieces[-1] = pieces[-1] + end

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = [token for piece in self.pieces[i] for token in piece][: self.length]
        which = np.repeat(np.arange(len(self.pieces[i])), [len(piece) for piece in self.pieces[i]])[: self.length]
        which = np.concatenate([np.zeros(self.before, int), which, np.full(self.length - len(which), which[-1])])
        plan = self.latents[self.records[i]["start"] + which]
        return {"prompt": "", "text": " ".join(self.records[i]["sentences"]), "tokens": ids, "plan": plan.tolist()}
