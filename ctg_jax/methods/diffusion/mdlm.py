"""MDLM: a masked diffusion language model (Sahoo et al. 2024) in place of the decode loop.

A bidirectional transformer is trained on the tokens of another language model's tokenizer, the only part of that model
that is used. It completes prompts by filling in masks (`MaskedDiffusion`), and rows in which any tokens are given
(`infill`); see `ctg_jax.learn.whole_rows`. A linear classifier of partly masked rows, on the network's own states,
guides it with strength `scale`. With an `objective` of kind "film" and another `order` it is FiLM (Shen et al. 2023);
with `objective.block` it is block diffusion, which writes a row from left to right (BD3LM, Arriola et al. 2025). A
`source` reads a published network, of MDLM or LLaDA, in place of training one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import methods, rng
from ctg_jax.controls import constraints
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import fitting, masked_classifier
from ctg_jax.learn.diffusion_losses import Objective, masked_loss
from ctg_jax.learn.fitting import Training, keep, matching
from ctg_jax.learn.masked_bound import bound
from ctg_jax.learn.masked_classifier import Regression
from ctg_jax.learn.whole_rows import WORDS, WholeRows, completed, end_token, placed, start_token, with_words
from ctg_jax.learn.word_targets import check_requested
from ctg_jax.models import masked, unmasking
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.heads import linear_head
from ctg_jax.models.hf.masked import load_masked
from ctg_jax.models.lm import LM
from ctg_jax.models.unmasking import Order, first_order
from ctg_jax.run import stage
from ctg_jax.run.identity import model_content
from ctg_jax.run.stage import Artifact, Run, open_lm
from ctg_jax.stages import sources
from ctg_jax.support import remove
from ctg_jax.types import InputError, Params


@dataclasses.dataclass(frozen=True)
class MaskedDiffusion(WholeRows):
    """Completes prompts by filling in masks; see `WholeRows`. An entry `words` of `prompts.cond`, int [B, n], gives
    tokens behind the prompt; -1 where one is to be written."""

    def shape(self, control):
        return control.mask, control.net.context

    def write(self, prompts, control, sampling, banned):
        return _write(prompts, control, sampling, banned)

    def check(self, lm, prompts, control, sampling):
        """
        Raises:
          InputError: a strength without a classifier, words that do not fit or that a network of blocks would not see,
            and what `WholeRows.check` raises.
        """
        super().check(lm, prompts, control, sampling)
        model = constraints.apart(control)[1]
        if words := {name: x for name, x in (prompts.cond or {}).items() if name == WORDS}:
            check_requested(words, prompts, sampling.max_new, {}, *self.shape(model))
            if block := model.net.block:
                raise InputError(
                    f"words behind the prompt are given, but the network writes blocks of {block} tokens and does not "
                    "see what is behind them: use a model without objective.block."
                )
        if not model.guide["bias"].size and np.any(np.asarray(model.scale) != 0):
            raise InputError(
                "scale is not 0, but no classifier was fitted that could guide: fit on records with labels."
            )


@struct.dataclass
class Masked:
    """A masked diffusion model, how it samples, and what guides it.

    Attributes:
      params: of `net`, whose last token V is the mask.
      guide: the classifier, {"kernel": [C, (L + 2) D], "bias": [C]}; C = 0 where none was fitted.
      scale: float32 [] or, per row, [B]: the exponent of the probability of `target`. At 0 there is no guidance.
      net: the denoiser, whose `context` is S, the length of a row.
      eos: the token that fills a row behind its text.
      target: the class to guide towards. order: in which order tokens are written.
      start: the token of an empty prompt, which rows do not begin with; None: they do, see `whole_rows.start_token`.
    """

    strategy: ClassVar = MaskedDiffusion()

    params: Params
    guide: Params
    scale: jax.Array
    net: Transformer = struct.field(pytree_node=False)
    eos: int = struct.field(pytree_node=False)
    target: int = struct.field(pytree_node=False, default=1)
    order: Order = struct.field(pytree_node=False, default=Order())
    start: int | None = struct.field(pytree_node=False, default=None)

    @property
    def mask(self) -> int:
        """The id of the mask, V."""
        return self.net.vocab - 1


def init(
    lm: LM, key: jax.Array, *, width: int = 128, depth: int = 4, heads: int = 4, length: int = 32,
    net: Mapping[str, Any] | None = None, eos: int = 0, classes: int = 0, target: int = 1, start: int | None = None,
    **order: Any,
) -> Masked:  # fmt: skip
    """An untrained model.

    Args:
      lm: gives the vocabulary.
      width, depth, heads: of the network. length: S. eos: fills a row behind its text.
      net: fields of `Transformer` in place of those of GPT-2 of this size, such as `block`.
      classes: C of the classifier; 0: no classifier. target: the class to guide towards.
      start: see `Masked`. order: settings of `Order`.

    Raises:
      InputError: sizes that do not fit each other, or an invalid target or order.
    """
    if width % heads:
        raise InputError(f"width is {width}, which heads={heads} does not divide: choose a multiple of it.")
    if length < 2:
        raise InputError(f"length is {length}, expected at least 2.")
    if classes and not 0 <= target < classes:
        raise InputError(f"target is {target}, expected a class from 0 to {classes - 1}.")
    sizes = dict(vocab=lm.vocab + 1, width=width, depth=depth, heads=heads, context=length, causal=False)
    made = Transformer.gpt2(**sizes | dict(net or {}))
    guide, order = linear_head(classes, (made.depth + 2) * made.width), Order(**order)
    if made.block and order.block not in (0, made.block):
        raise InputError(f"order.block is {order.block}, but the network writes blocks of {made.block}: leave it at 0.")
    return Masked(made.init(key), guide, jnp.zeros(()), made, eos, target, order, start)


@stage.stage_function("mdlm.imported", revision=1, contents={"source": model_content})
def imported(run: Run, *, lm: Artifact, source: str, length: int | None = None) -> None:
    """Stage: a published masked diffusion model, without a classifier; see `models.hf.masked`. Most were trained on
    packed texts, whose rows begin with an end token and are not filled with end tokens. So an empty prompt is this
    token, and they do not know where a row ends: choose the `length` by the texts.

    Args:
      lm: the language model whose tokenizer it was trained with. source: directory or hub id.
      length: S, the length of a row; None: as long as the model reads.

    Raises:
      InputError: another vocabulary, rows that the model cannot read, and what `load_masked` raises.
    """
    model, _, tokenizer = open_lm(lm)
    net, params = load_masked(source)
    if net.vocab != model.vocab + 1:
        raise InputError(
            f"{source} has {net.vocab - 1} tokens beside its mask and {lm.path.name} has {model.vocab}: give the "
            "language model whose tokenizer it was trained with."
        )
    if length is not None and not 2 <= length <= net.context:
        raise InputError(f"length is {length}, expected from 2 to {net.context}, the tokens that the model reads.")
    fields = dataclasses.asdict(dataclasses.replace(net, context=length or net.context))
    del fields["pattern"]  # that of all its layers is the default
    hp = dict(net=fields, eos=end_token(tokenizer, lm.path.name), start=None)
    control = init(model, jax.random.key(0), **hp)
    keep(run, control.replace(params=params), "mdlm", hp)


def guided(control: Masked, x: jax.Array) -> jax.Array:
    """The logits of `masked.denoise` plus `scale` times the log-ratio of the target's probability, to first order."""
    net, table = control.net, control.params["embed"]["tokens"].astype(jnp.float32)

    def target(e):
        logp, logits = masked.classify(net, control.params, control.guide, e)
        return jnp.sum(logp[:, control.target]), logits  # rows are independent: each gets its own gradient

    gradient, logits = jax.grad(target, has_aux=True)(net.embed(control.params, x))
    scale = jnp.broadcast_to(control.scale, x.shape[:1])[:, None, None]
    return logits + scale * first_order(gradient, table, control.mask)


@partial(jax.jit, static_argnames=("greedy", "cache"))
def infill(
    control: Masked, tokens: jax.Array, given: jax.Array, keys: jax.Array, banned: jax.Array | None = None, *,
    greedy: bool = False, cache: bool = True,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Writes the tokens of rows that are not given.

    Args:
      tokens: int32 [B, S]. given: bool [B, S], which of them are kept.
      keys: of the rows, [B]; a row depends on its own key and tokens only.
      banned: bool [V], tokens that are never written, whatever the guidance is; None: none.
      greedy, cache: see `unmasking.unmask`.

    Returns:
      The rows, int32 [B, S], and the number of calls of the network, int32 [].
    """
    control = control.replace(params=control.net.unstack(control.params))
    keys_of = {name: jax.vmap(partial(rng.stream, name=name))(keys) for name in ("order", "tokens")}
    order, block = control.order, control.net.block or control.order.block
    part = unmasking.blocks(~given, block, whole=control.net.block > 0)
    when = unmasking.order(keys_of["order"], ~given, part, steps=order.reveal, schedule=order.schedule)
    x = jnp.where(given, tokens, control.mask).astype(jnp.int32)

    plain = partial(masked.denoise, control.net, control.params)

    def model(x):
        has_guide = control.guide["bias"].size
        z = jax.lax.cond(jnp.any(control.scale != 0), partial(guided, control), plain, x) if has_guide else plain(x)
        return z if banned is None else remove(z, jnp.append(banned, False)[None, None])

    return unmasking.unmask(
        model, x, when, keys_of["tokens"], steps=unmasking.step_count(x.shape[1], steps=order.reveal, block=block),
        final=order.reveal if order.final == "argmax" else 0, greedy=greedy, cache=cache, by=order.by, part=part,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("sampling",))
def _write(prompts, control, sampling, banned):
    tokens, given, size = placed(prompts, control.net.context, control.start)
    if WORDS in (prompts.cond or {}):
        tokens, given = with_words(tokens, given, size, prompts.cond[WORDS])
    rows, calls = infill(control, tokens, given, prompts.keys, banned, greedy=sampling.greedy)
    return completed(jnp.where(rows == control.mask, -1, rows), size, sampling, calls)


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    source: str | None = None,
    heldout: Mapping[str, Any] | None = None,
    guide: Mapping[str, Any] | None = None,
    **hp: Any,
) -> Artifact:
    """Trains the network, measures its bound, and fits the classifier that guides it, in three stages.

    Args:
      source: a published network, which `imported` reads, in place of one that is trained.
      heldout: settings of `load_data` for the texts of `bound`; None: the bound is not measured.
      guide: settings of `classifier`, which also sets how tokens are sampled; the network is not trained again.
      hp: settings of `mdlm`, or of `imported`.

    Raises:
      InputError: what the stages raise; labels that no classifier can learn from, before any network is trained.
    """
    with suppress(stage.UnfinishedError):  # a dry run may have no data to read yet
        masked_classifier.texts(matching(data, None), str(data.path), (guide or {}).get("classes"))
    if source is None:
        network = stage.stage(root, mdlm, hp, lm=lm, data=data)
    else:
        network = stage.stage(root, imported, {"source": source, **hp}, lm=lm)
    if heldout:
        stage.stage(root, bound, {}, lm=lm, control=network, data=stage.stage(root, sources.load_data, heldout))
    return stage.stage(root, classifier, guide or {}, lm=lm, data=data, network=network)


@stage.stage_function("mdlm", revision=2)
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
    objective: Objective = Objective(),
    training: Training = Training(steps=2000, rate=2e-3, warmup=50, schedule="cosine", decay=0.01, save_every=200),
    seed: int = 0,
) -> None:
    """Stage: trains the network on the texts of records that match `where`.

    Args:
      lm: gives the tokenizer and the size of the vocabulary.
      width, depth, heads, length: see `init`; longer texts are cut.
      objective: what is minimised.
      training: how it is trained. seed: of initial values, of the order of texts, and of the noise.

    Raises:
      InputError: no record matches, a tokenizer without an end token, and what `init` and training raise.
    """
    records = matching(data, where)
    model, _, tokenizer = open_lm(lm)
    key = jax.random.key(seed)
    hp = dict(width=width, depth=depth, heads=heads, length=length, eos=end_token(tokenizer, lm.path.name))
    hp |= dict(net=dict(block=objective.block)) if objective.block else {}
    control = init(model, rng.stream(key, "init"), **hp)
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=length, seed=seed)
    loss = masked_loss(control.net, control.eos, objective)
    params = fitting.train(run, control.params, loss, {}, batches, training, seed=seed)
    keep(run, control.replace(params=params), "mdlm", hp)


@stage.stage_function("mdlm.classifier", revision=3)
def classifier(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    network: Artifact,
    classes: int | None = None,
    target: int = 1,
    order: Order = Order(),
    regression: Regression = Regression(),
    seed: int = 0,
) -> None:
    """Stage: sets how a trained network samples and, where records have a `label`, fits a classifier of partly masked
    rows that guides it. metrics.jsonl holds its accuracy on held-out texts.

    Args:
      network: an artifact of the stage `mdlm` or `mdlm.imported`.
      classes: the number of classes, whose labels are 0 to classes - 1; None: the number found; 0: no classifier.
        Records without a label are left out and counted in a warning.
      target: see `init`. order: in which order tokens are written.
      regression: how the classifier is fitted. seed: of the masks and of the held-out texts.

    Raises:
      InputError: a label that is not a class, fewer than two classes, a class without a text, a classifier that is no
        better than chance, and what `init` raises.
    """
    records, classes = masked_classifier.texts(matching(data, None), str(data.path), classes)
    model, _, tokenizer = open_lm(lm)
    old = methods.load(network, model)
    hp = dict(start=start_token(tokenizer)) | network.spec["init"]
    hp |= dict(target=target, classes=classes, **dataclasses.asdict(order))
    control = init(model, jax.random.key(seed), **hp).replace(params=old.params)
    if classes:
        source, length = Source(str(data.path), "all", regression.chosen(records, seed)), control.net.context
        once = dict(epochs=1, shuffle=False, drop_last=False, fields=("label",))
        batches = pipeline(source, tokenizer, batch=regression.batch, length=length, seed=seed, **once)
        read = masked_classifier.read(control.net, old.params, batches, control.eos, regression, seed)
        guide, figures = masked_classifier.fit(*read, regression, seed)
        run.log(name="classifier", **figures)
        control = control.replace(guide=guide)
    keep(run, control, "mdlm", hp)
