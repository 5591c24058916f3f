"""Residual memory transformer (RMT): a plug-in reads a control text and the base's states (Zhang et al. 2023).

    z' = (1 - alpha) z + alpha r

r are the logits of the plug-in, a small language model with an output layer of its own. It reads the control text, such
as "Include: sun, beach; Words: 12", in front of the prompt, and then every token with the base's last state, projected
and added to the token's embedding. alpha 0 is the base model to the last bit, alpha 1 the plug-in alone, and ½ the
authors' value. The base stays frozen, so one copy of it serves many plug-ins.

    fitted = residual.fit(root, lm=lm, data=data, template="Words: {length}", wanted="Words: 12")
    control = methods.load(fitted, model)
    cond = {"control": residual.controls(tokenizer, ["Words: 12", "Words: 5"])}  # another control text for each row

Training has two stages: first the plug-in alone on plain text, then the mixture on texts with their control texts. The
authors' third stage, which distils re-ranked candidates for attributes, is left out: control texts that name a class
take its place. The authors' plug-in has an encoder for the control text and decoder blocks with three attentions (to
itself, to the base's states, to the encoder), frozen embeddings of the base and post-norm blocks. Here one causal
attention of pre-norm blocks reads all of it, with embeddings of its own. In the authors' code later tokens are visible
to earlier ones while decoding, and every token reads the whole text again; here decoding computes what training does.
Their constraint to the base's top-p of .98 is `truncate` before this control in a chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import methods, rng
from ctg_jax.control import Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.streams import Stream, check_vocabulary
from ctg_jax.data.instructions import instructed
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.stages.sources import load_data
from ctg_jax.support import removed
from ctg_jax.types import InputError

LEARNED = r"plugin/params/.*|project"


@struct.dataclass
class Residual(Control):
    """(1 - alpha) z + alpha r.

    Attributes:
      plugin: the small language model, which reads the control text before the prompt.
      project: float32 [D', D], makes inputs of the plug-in of the base's states.
      alpha: float32 [] or, per row, [B]; 0 is the base model, 1 the plug-in alone.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    plugin: Stream
    project: jax.Array
    alpha: jax.Array
    cond: str | None = struct.field(pytree_node=False, default=None)

    def check(self, prompts):
        self.plugin.check(prompts)

    def init(self, prompts, length):
        return per_row(self.alpha, prompts, self.cond), self.plugin.init(prompts, length)

    def readers(self):
        return self.plugin.readers("plug-in")

    def logits(self, z, h, tokens, mask, state):
        strength, reading = state
        check_vocabulary("The plug-in", self.plugin.lm.vocab, z.shape[-1])
        extra = h.astype(jnp.float32) @ self.project.T
        r, _, reading = self.plugin.read(tokens, mask, z.shape[1], reading, extra=extra)
        return jnp.where(removed(z), z, (1 - strength) * z + strength * r), (strength, reading)


def init(
    lm: LM,
    key: jax.Array,
    *,
    shape: Mapping[str, int] | None = None,
    alpha: float = 0.5,
    control: str | None = "control",
    cond: str | None = None,
) -> Residual:
    """A plug-in with random weights.

    Args:
      shape: width, depth and heads of the plug-in; by default the width of the base, 3 and 8.
      alpha, cond: see `Residual`.
      control: the name of the entry of `prompts.cond` that holds the control texts, int32 [B, T'] with -1 for padding
        on the left (`controls`), or None for a plug-in that reads the text alone.

    Raises:
      InputError: a shape with other names or with a width that the heads do not divide, alpha that is not finite.
    """
    if not isinstance(alpha, jax.Array) and not np.all(np.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}, expected a finite number.")
    sizes = dict(width=lm.width, depth=3, heads=8) | dict(shape or {})
    if unknown := sizes.keys() - {"width", "depth", "heads"}:
        raise InputError(f"shape has {sorted(unknown)[0]!r}, expected width, depth and heads.")
    if sizes["width"] % sizes["heads"]:
        raise InputError(f"shape has the width {sizes['width']}, which heads={sizes['heads']} does not divide.")
    small = Transformer.gpt2(vocab=lm.vocab, context=lm.context, tied=False, **sizes)
    a, b = jax.random.split(key)
    plugin = Stream(small.init(a), lm=small, own=control, before=control is not None)
    project = 0.02 * jax.random.normal(b, (small.width, lm.width))
    return Residual(plugin, project, jnp.asarray(alpha, jnp.float32), cond)


def example(lm: LM, key: jax.Array) -> Residual:
    """A random plug-in without a control text, for the laws."""
    control = init(lm, key, shape=dict(width=8, depth=1, heads=2), control=None)
    plugin = control.plugin.replace(params=jax.tree.map(lambda x: 4 * x, control.plugin.params))
    return control.replace(plugin=plugin, project=20 * control.project)


def neutral(control: Residual) -> Residual:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))


def loss(lm: LM, *, alone: bool = False) -> losses.LossFn:
    """Next-token loss of the mixture, or of the plug-in alone.

    params is the control, frozen = {"params": those of the LM}; the batch has `control` int32 [B, T'], the control text
    of each row.
    """
    mixture = losses.control_loss(lm)

    def total(params, frozen, batch, keys):
        if alone:
            params = params.replace(alpha=jnp.ones_like(params.alpha))
        return mixture(params, frozen, {**batch, "cond": {params.plugin.own: batch["control"]}}, keys)

    return total


def controls(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Control texts as the plug-in reads them, int32 [n, T'] with -1 for padding on the left."""
    return instructed(tokenizer, texts, [""])[:, 0]


def conditions(artifact: Artifact, lm: Artifact, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The control text `wanted` for every prompt; none where it was not given."""
    wanted = artifact.spec.get("wanted")
    name = artifact.spec["init"].get("control", "control")
    return {} if wanted is None else {name: np.repeat(controls(open_lm(lm)[2], [wanted]), len(texts), axis=0)}


def described(
    records: Sequence[Mapping[str, Any]],
    template: str,
    labels: Sequence[str] | None = None,
    words: int = 3,
    seed: int = 0,
) -> list[str]:
    """The control text of every record.

    Args:
      records: with a `text`.
      template: with names of fields in braces: those of the records, `length` (the number of words of the text) and
        `words` (some words of the text, in their order).
      labels: None, or a name for each class, which takes the place of the field `label`.
      words: how many words, at most. seed: of their choice.

    Raises:
      InputError: a name that is no field of a record, or braces that are not closed.
    """
    out = []
    for i, record in enumerate(records):
        own = record["text"].split()
        distinct = list(dict.fromkeys(own))
        draw = np.random.default_rng(rng.derived_seed(seed, "words", i))
        chosen = sorted(draw.choice(len(distinct), min(words, len(distinct)), replace=False)) if distinct else []
        fields = {**record, "length": len(own), "words": ", ".join(distinct[j] for j in chosen)}
        if labels is not None:
            fields["label"] = labels[record["label"]]
        try:
            out.append(template.format_map(fields))
        except (AttributeError, LookupError, TypeError, ValueError) as e:
            raise InputError(
                f"template is {template!r}, which record {i} cannot fill ({e}): expected names in braces among "
                f"{', '.join(sorted(fields))}."
            ) from None
    return out


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    corpus: Mapping[str, Any] | None = None,
    pretrain: Mapping[str, Any] | None = None,
    shape: Mapping[str, int] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """The plug-in alone on plain text, then the mixture on texts with control texts.

    Args:
      lm: the language model. data: texts of the second stage, with the fields that `template` names.
      corpus: settings of `load_data` for the texts of the first stage; None: those of `data`.
      pretrain: settings of the section `training` of the stage `residual_pretrain`.
      shape: see `init`. seed: of both stages. settings: of the stage `residual`.
    """
    plain = data if corpus is None else stage(root, load_data, corpus)
    first = dict(shape=shape, seed=seed) | ({} if pretrain is None else {"training": pretrain})
    begun = stage(root, residual_pretrain, first, lm=lm, data=plain)
    return stage(root, residual, settings | {"seed": seed}, lm=lm, data=data, start_from=begun)


@stage_function("residual_pretrain")
def residual_pretrain(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    shape: Mapping[str, int] | None = None,
    training: Training = Training(steps=1000, rate=1e-3, warmup=50, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: trains the plug-in alone on texts without a control text; see `init` for `shape`."""
    model, params, tokenizer = open_lm(lm)
    made = dict(shape=shape)
    control = init(model, rng.stream(jax.random.key(seed), "init"), **made)
    records = [{**r, "control": [-1]} for r in data.rows("data.jsonl")]
    control = _trained(run, model, params, tokenizer, control, records, training, seed, alone=True)
    fitting.keep(run, control, "residual", made)


@stage_function("residual")
def residual(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    start_from: Artifact,
    template: str,
    labels: Sequence[str] | None = None,
    words: int = 3,
    wanted: str | None = None,
    alpha: float = 0.5,
    training: Training = Training(steps=300, rate=1e-3, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: trains the mixture on texts with control texts.

    Args:
      data: texts; with `labels` those that have a `label`, the others are left out and counted in a warning.
      start_from: what `residual_pretrain` made.
      template, labels, words: see `described`.
      wanted: the control text of every prompt while decoding; None: each is given in `prompts.cond`.
      alpha: of the mixture. training: how it is trained. seed: of the words that are drawn, of batches and of training.

    Raises:
      InputError: a label that no name is for, and what `described` and training raise.
    """
    records = data.rows("data.jsonl")
    if labels is not None:
        records = labelled(records, str(data.path), classes=len(labels))
    texts = described(records, template, labels, words, seed)
    model, params, tokenizer = open_lm(lm)
    rows = controls(tokenizer, texts).tolist()
    records = [{**r, "control": row} for r, row in zip(records, rows, strict=True)]
    control = methods.load(start_from, model).replace(alpha=jnp.float32(alpha))
    control = _trained(run, model, params, tokenizer, control, records, training, seed)
    run.record(wanted=wanted)
    fitting.keep(run, control, "residual", start_from.spec["init"] | {"alpha": alpha})


def _trained(run, model, params, tokenizer, control, records, training, seed, alone=False) -> Residual:
    """The control after training on texts with the tokens of their control texts."""
    source = Source("the texts with their control texts", "", records)
    options = dict(batch=training.batch, length=training.tokens, seed=seed, fields=("control",))
    return fitting.train(
        run, control, loss(model, alone=alone), {"params": params}, pipeline(source, tokenizer, **options),
        training, trained=LEARNED, seed=seed,
    )  # fmt: skip
