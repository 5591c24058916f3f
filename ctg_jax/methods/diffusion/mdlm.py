"""MDLM: a masked diffusion language model (Sahoo et al. 2024) in place of the decode loop.

A bidirectional transformer is trained on the tokens of another LM's tokenizer, of which it uses nothing else. The
strategy `MaskedDiffusion` completes prompts by writing over masks, and `infill` rows in which any tokens are given.
Rows have one length, that of training: what follows the end of a text is end tokens, so that the length of a text is
part of what is modelled, and a prompt is continued as the beginning of such a row. A linear classifier of partly masked
rows, on the network's own states, guides it, with strength `scale`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import methods, rng
from ctg_jax.control import IDENTITY
from ctg_jax.controls import constraints
from ctg_jax.data.labels import is_label, labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.decode import loop, strategies
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training, keep, matching
from ctg_jax.models import masked
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.lm import LM
from ctg_jax.run import stage
from ctg_jax.run.stage import Artifact, Run, open_lm
from ctg_jax.stages import sources
from ctg_jax.support import remove
from ctg_jax.types import InputError, Params, Prompts, Samples, Sum


@dataclasses.dataclass(frozen=True)
class MaskedDiffusion(strategies.Strategy):
    """Writes completions over masks; the language model and its parameters are not read.

    A row ends with its first end token or stop sequence. `Samples.logp` is 0, because the probability of a text is a
    sum over all orders of writing it; `generated` is the number of calls of the network.
    """

    likelihood = False

    def check(self, lm, prompts, control, sampling):
        """
        Raises:
          InputError: prompts and `max_new` that do not fit a row of training, a strength without a classifier, a
            control of another vocabulary.
        """
        control = constraints.apart(control)[1]
        if lm.vocab != control.mask:
            raise InputError(
                f"control has {control.mask} tokens and the model {lm.vocab}: use the one it was fitted with."
            )
        if not control.guide["bias"].size and np.any(np.asarray(control.scale) != 0):
            raise InputError(
                "scale is not 0, but no classifier was fitted that could guide: fit on records with labels."
            )
        strategies.check_row(prompts, sampling.max_new, control.net.context)

    def __call__(self, lm, params, prompts, control, sampling):
        banned, control = constraints.apart(control)
        return _write(prompts, control, sampling, banned)


@struct.dataclass
class Masked:
    """A masked diffusion model, how it samples, and what guides it.

    Attributes:
      params: of `net`, whose last token V is the mask.
      guide: the classifier, {"kernel": [C, (L + 2) D], "bias": [C]}; C = 0 where none was fitted.
      scale: float32 [] or, per row, [B]; the probability of `target` counts to this power. At 0 nothing is guided.
      net: the denoiser, with `context` = S, the length of its rows.
      eos: what fills a row after its text.
      target: the class to guide to.
      steps, block, schedule: see `masked.order`. final: "draw" or "argmax", in the last of `steps` (`masked.unmask`).
    """

    strategy: ClassVar = MaskedDiffusion()

    params: Params
    guide: Params
    scale: jax.Array
    net: Transformer = struct.field(pytree_node=False)
    eos: int = struct.field(pytree_node=False)
    target: int = struct.field(pytree_node=False, default=1)
    steps: int = struct.field(pytree_node=False, default=0)
    block: int = struct.field(pytree_node=False, default=0)
    schedule: str = struct.field(pytree_node=False, default="loglinear")
    final: str = struct.field(pytree_node=False, default="draw")

    @property
    def mask(self) -> int:
        """The token that stands for one that is not written yet."""
        return self.net.vocab - 1


def init(
    lm: LM,
    key: jax.Array,
    *,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    length: int = 32,
    eos: int = 0,
    classes: int = 0,
    target: int = 1,
    reveal: int = 0,
    block: int = 0,
    schedule: str = "loglinear",
    final: str = "draw",
) -> Masked:
    """A model that has learned nothing.

    Args:
      lm: gives the vocabulary.
      width, depth, heads: of the network. length: tokens of a row. eos: fills a row after its text.
      classes: C of the classifier, 0 for none. target: the class that is guided to.
      reveal, block, schedule, final: `steps` and the rest of `Masked`.

    Raises:
      InputError: sizes that do not fit each other, a schedule or `final` that there is not.
    """
    masked.check(schedule)
    if final not in masked.FINALS:
        raise InputError(f"final is {final!r}, expected one of {', '.join(masked.FINALS)}.")
    if width % heads:
        raise InputError(f"width is {width}, which heads={heads} does not divide: choose a multiple of it.")
    if min(reveal, block) < 0 or length < 2:
        raise InputError(f"reveal={reveal}, block={block}, length={length}: expected 0 or more, and a length from 2.")
    if classes and not 0 <= target < classes:
        raise InputError(f"target is {target}, expected a class from 0 to {classes - 1}.")
    net = Transformer.gpt2(vocab=lm.vocab + 1, width=width, depth=depth, heads=heads, context=length, causal=False)
    guide = {"kernel": jnp.zeros((classes, (depth + 2) * width)), "bias": jnp.zeros(classes)}
    how = dict(target=target, steps=reveal, block=block, schedule=schedule, final=final)
    return Masked(net.init(key), guide, jnp.zeros(()), net, eos, **how)


def guided(control: Masked, x: jax.Array) -> jax.Array:
    """`masked.denoise` with `scale` times the log-ratio of the target's probability, to first order, added to it."""
    net, table = control.net, control.params["embed"]["tokens"].astype(jnp.float32)

    def target(e):
        logp, logits = masked.classify(net, control.params, control.guide, e)
        return jnp.sum(logp[:, control.target]), logits  # rows are independent: each gets its own gradient

    gradient, logits = jax.grad(target, has_aux=True)(net.embed(control.params, x))
    scale = jnp.broadcast_to(control.scale, x.shape[:1])[:, None, None]
    return logits + scale * masked.first_order(gradient, table, control.mask)


@partial(jax.jit, static_argnames=("greedy", "cache"))
def infill(
    control: Masked, tokens: jax.Array, given: jax.Array, keys: jax.Array, banned: jax.Array | None = None, *,
    greedy: bool = False, cache: bool = True,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Rows int32 [B, S] with the tokens where given bool [B, S], written elsewhere; and the calls of the network.

    Args:
      keys: of the rows, [B]; a row depends on its own key and tokens only.
      banned: tokens that are never written, bool [V], whatever the guide says; None: none.
      greedy, cache: see `masked.unmask`.
    """
    control = control.replace(params=control.net.unstack(control.params))
    of = {name: jax.vmap(partial(rng.stream, name=name))(keys) for name in ("order", "tokens")}
    plan = dict(steps=control.steps, block=control.block)
    when = masked.order(of["order"], ~given, schedule=control.schedule, **plan)
    x = jnp.where(given, tokens, control.mask).astype(jnp.int32)

    bare = partial(masked.denoise, control.net, control.params)

    def model(x):
        push = control.guide["bias"].size
        z = jax.lax.cond(jnp.any(control.scale != 0), partial(guided, control), bare, x) if push else bare(x)
        return z if banned is None else remove(z, jnp.append(banned, False)[None, None])

    return masked.unmask(
        model, x, when, of["tokens"], steps=masked.length(x.shape[1], **plan),
        final=control.steps if control.final == "argmax" else 0, greedy=greedy, cache=cache,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("sampling",))
def _write(prompts, control, sampling, banned):
    size = jnp.sum(prompts.mask, axis=1)[:, None]
    blank = prompts.mask.shape[1] - size  # columns of padding before a prompt
    at = jnp.arange(control.net.context)[None, :]
    last = prompts.tokens.shape[1] - 1
    tokens = jnp.take_along_axis(prompts.tokens, jnp.minimum(at + blank, last), axis=1)
    rows, calls = infill(control, tokens, at < size, prompts.keys, banned, greedy=sampling.greedy)
    text = jnp.take_along_axis(rows, size + jnp.arange(sampling.max_new)[None, :], axis=1)
    shown, mask = strategies.cut(text, sampling)
    right = text != control.mask
    return Samples(jnp.where(right, shown, sampling.pad), mask, jnp.where(right, 0.0, jnp.nan), calls)


def loss(net: Transformer, eos: int, *, schedule: str = "cosine", draws: int = 4) -> losses.LossFn:
    """The bound in nats per token of the text, its end included; params are those of the network.

    The nats are those of whole rows, the end tokens that fill them included, so they bound the text's own."""

    def total(params, frozen, batch, keys):
        tokens = jnp.where(batch["mask"], batch["tokens"], eos)
        denoise = partial(masked.denoise, net, params)
        each = masked.nelbo(denoise, tokens, keys, net.vocab - 1, schedule=schedule, draws=draws)
        some = jnp.any(batch["mask"], axis=1)
        return Sum(jnp.sum(jnp.where(some, each, 0.0)), jnp.sum(batch["mask"], dtype=jnp.float32))

    return total


def guide_loss(net: Transformer, eos: int) -> losses.LossFn:
    """Cross-entropy of the classifier on rows masked at a uniform time; params is `Masked.guide`, frozen = {"params":
    those of the network}."""

    def total(params, frozen, batch, keys):
        tokens = jnp.where(batch["mask"], batch["tokens"], eos)
        u = jax.vmap(lambda k: jax.random.uniform(k, (1 + tokens.shape[1],)))(keys)
        x = jnp.where(u[:, 1:] < u[:, :1], net.vocab - 1, tokens)
        logp, _ = masked.classify(net, frozen["params"], params, net.embed(frozen["params"], x))
        label = batch["label"][:, None]
        right = jnp.sum(jnp.argmax(logp, axis=-1)[:, None] == label, dtype=jnp.float32)
        count = jnp.float32(len(tokens))
        return Sum(-jnp.sum(jnp.take_along_axis(logp, label, axis=1)), count, {"accuracy": (right, count)})

    return total


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    heldout: Mapping[str, Any] | None = None,
    guide: Mapping[str, Any] | None = None,
    **hp: Any,
) -> Artifact:
    """Trains the network, measures its bound, and fits what guides it; three stages.

    Args:
      heldout: settings of `load_data`: texts for `bound`; None: it is not measured.
      guide: settings of `guide`, with which sampling may be changed without training the network again.
      hp: of `mdlm`.
    """
    network = stage.stage(root, mdlm, hp, lm=lm, data=data)
    if heldout:
        stage.stage(root, bound, {}, lm=lm, control=network, data=stage.stage(root, sources.load_data, heldout))
    return stage.stage(root, classifier, guide or {}, lm=lm, data=data, network=network)


@stage.stage_function("mdlm")
def mdlm(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    where: Mapping[str, Any] | None = None,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    length: int = 32,
    schedule: str = "cosine",
    draws: int = 4,
    training: Training = Training(steps=2000, rate=2e-3, warmup=50, schedule="cosine", decay=0.01, save_every=200),
    seed: int = 0,
) -> None:
    """Stage: the network, trained on the texts of records that match `where`.

    Args:
      lm: gives the tokenizer and the size of the vocabulary.
      width, depth, heads, length: see `init`; longer texts are cut.
      schedule, draws: of the bound that is minimised, see `masked.nelbo`.
      training: how it is trained. seed: of initial values, of the order of texts, and of the noise.

    Raises:
      InputError: no record matches, a tokenizer without an end token, and what `init` and training raise.
    """
    records = matching(data, where)
    model, _, tokenizer = open_lm(lm)
    if tokenizer.eos is None:
        raise InputError(f"the tokenizer of {lm.path.name} has no end token, with which rows are filled: use another.")
    key = jax.random.key(seed)
    hp = dict(width=width, depth=depth, heads=heads, length=length, eos=tokenizer.eos)
    control = init(model, rng.stream(key, "init"), **hp)
    batches = pipeline(
        Source(str(data.path), str(where), records), tokenizer, batch=training.batch, length=length, seed=seed
    )
    objective = loss(control.net, control.eos, schedule=schedule, draws=draws)
    params = fitting.train(run, control.params, objective, {}, batches, training, seed=seed)
    keep(run, control.replace(params=params), "mdlm", hp)


@stage.stage_function("mdlm.classifier")
def classifier(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    network: Artifact,
    classes: int | None = None,
    target: int = 1,
    reveal: int = 0,
    block: int = 0,
    schedule: str = "loglinear",
    final: str = "draw",
    training: Training = Training(steps=300, batch=64, rate=1e-2, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: a trained network with how it samples, and with a classifier of partly masked rows where records have a
    `label`.

    Args:
      network: of the stage `mdlm`.
      classes: labels are 0 to classes - 1; None: as many as there are; 0: no classifier. Records without a label are
        left out and counted in a warning.
      target, reveal, block, schedule, final: see `init`.
      training: how the classifier is trained. seed: of its training.

    Raises:
      InputError: a label that is no class, fewer than two of them, and what `init` and training raise.
    """
    records = matching(data, None)
    model, _, tokenizer = open_lm(lm)
    old = methods.load(network, model)
    if classes or (classes is None and any(is_label(r.get("label")) for r in records)):
        records = labelled(records, str(data.path))
        found = {r["label"] for r in records}
        classes = classes or 1 + max(found)
        if len(found) < 2 or not found <= set(range(classes)):
            raise InputError(
                f"labels of {data.path} are {sorted(map(str, found))}, expected two or more of 0 to {classes - 1}."
            )
    classes = classes or 0
    hp = dict(target=target, reveal=reveal, block=block, schedule=schedule, final=final, classes=classes)
    hp = network.spec["init"] | hp
    control = init(model, jax.random.key(seed), **hp).replace(params=old.params)
    if classes:
        source = Source(str(data.path), "all", records)
        length = control.net.context
        batches = pipeline(source, tokenizer, batch=training.batch, length=length, seed=seed, fields=("label",))
        objective, frozen = guide_loss(control.net, control.eos), {"params": old.params}
        learned = fitting.train(run, control.guide, objective, frozen, batches, training, seed=seed)
        control = control.replace(guide=learned)
    keep(run, control, "mdlm", hp)


@stage.stage_function("mdlm.bound", how=("batch",))
def bound(
    run: Run, *, lm: Artifact, data: Artifact, control: Artifact, draws: int = 16, batch: int = 32, seed: int = 0
) -> None:
    """Stage: logs nats per token of texts, their ends included, with the standard error and its exponential: an upper
    bound for the diffusion model, and the exact value for `lm`, which reads its end token first, or only the beginning
    token of the row where its sequences have one. The tokens are the same, cut at the length of a row.

    Args:
      draws: times for each text, see `masked.nelbo`.
    """
    model, params, tokenizer = open_lm(lm)
    given = int(tokenizer.adds_bos)  # tokens of a row that the language model does not have to predict
    tokens_only = constraints.only(tokenizer.known(model.vocab), IDENTITY)
    diffusion = methods.load(control, model)
    net, fill = diffusion.net, diffusion.eos
    source = Source(str(data.path), "all", matching(data, None))
    settings = dict(batch=batch, length=net.context, seed=seed, epochs=1, shuffle=False, drop_last=False)
    estimate = jax.jit(
        lambda tokens, keys: masked.nelbo(
            partial(masked.denoise, net, diffusion.params), tokens, keys, diffusion.mask, draws=draws
        )
    )
    nats, tokens = {"mdlm": [], "lm": []}, []
    for rows in pipeline(source, tokenizer, **settings):
        real = rows["mask"]
        keys = rng.per_example(jax.random.key(seed), rows["ids"])
        filled = np.where(real, rows["tokens"], fill)
        first = jnp.asarray(filled[:, :1] if given else np.full((batch, 1), fill))
        start = Prompts(first, jnp.ones((batch, 1), bool), keys)
        tails = jnp.asarray(filled[:, given:]), tokens_only, jnp.asarray(real[:, given:])
        logp = loop.score(model, params, start, *tails)
        some = real.any(axis=1)
        nats["mdlm"] += np.asarray(estimate(filled, keys), np.float64)[some].tolist()
        nats["lm"] += (-np.asarray(logp, np.float64)).sum(axis=1)[some].tolist()
        tokens += real.sum(axis=1)[some].tolist()
    tokens = np.asarray(tokens, np.float64)
    for name, values in nats.items():
        mean = np.sum(values) / tokens.sum()
        error = np.sqrt(np.sum((values - mean * tokens) ** 2)) / tokens.sum()
        run.log(
            name=name, nats_per_token=mean, standard_error=error, perplexity=np.exp(mean),
            bits_per_token=mean / np.log(2), exact=name == "lm", tokens=int(tokens.sum()), texts=len(tokens),
        )  # fmt: skip
