"""What fine-tuning added: texts that a tuned model finds likely and the model before it does not.

Source: Isonuma & Titov 2024, "What's New in My Data?" (contrastive generative exploration).

    z' = z - alpha log p_pre      on the tokens with p(v) ≥ plausible · max p

p is the tuned model, which decodes, and p_pre the model before it was tuned. Where the tuned model has learned what the
other knew already, the scores are alike; a token of a novel text, to which p_pre gives little, rises without bound, and
`plausible` keeps out what the tuned model does not believe either.

    fitted = explore_data.fit(root, lm=lm, data=data, rounds=3)

Each of the `rounds` of the iterative version writes texts, and trains the contrast on all texts so far, so that the
next round shows something else. alpha 1 is the paper's rule; at 0 it is the tuned model. The authors' code updates the
contrast after each text and draws with four beams; here a round is many texts, drawn by sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import methods, rng
from ctg_jax.control import IDENTITY, Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.delta import Delta
from ctg_jax.controls.streams import Stream, log_probabilities
from ctg_jax.data.ids import check_shared
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.data.tokenizer import Tokenizer, load_tokenizer
from ctg_jax.learn import fitting
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.models import hf
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function, write_jsonl
from ctg_jax.stages import sampling
from ctg_jax.support import remove
from ctg_jax.types import InputError


@struct.dataclass
class Explore(Control):
    """The tuned model, with z - alpha log p_pre on its plausible tokens.

    Attributes:
      tuned: the change of weights that tuning made; the identity where the model that decodes is the tuned one.
      contrast: the model before it was tuned, or after it has seen what was written.
      alpha: float32 [] or, per row, [B]; 0 is the tuned model with all its tokens.
      plausible: float32 [], the least share of the likeliest token's probability that a token must have.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    selects = True

    tuned: Control
    contrast: Stream
    alpha: jax.Array
    plausible: jax.Array
    cond: str | None = struct.field(pytree_node=False, default=None)

    def check(self, prompts):
        self.contrast.check(prompts)

    def weights(self, params):
        return self.tuned.weights(params)

    def init(self, prompts, length):
        return per_row(self.alpha, prompts, self.cond), self.contrast.init(prompts, length)

    def readers(self):
        return self.contrast.readers("model before it was tuned")

    def logits(self, z, h, tokens, mask, state):
        strength, reading = state
        if self.contrast.lm.vocab != z.shape[-1]:
            raise InputError(
                f"The model before it was tuned has a vocabulary of {self.contrast.lm.vocab} tokens and the tuned one "
                f"of {z.shape[-1]}: use models that share one tokenizer."
            )
        before, _, reading = self.contrast.read(tokens, mask, z.shape[1], reading)
        least = jnp.max(z, axis=-1, keepdims=True) + jnp.log(jnp.maximum(self.plausible, 1e-30))
        out = remove(z - strength * log_probabilities(before), (z < least) & (strength != 0))
        return out, (strength, reading)


def init(
    lm: LM,
    key: jax.Array,
    *,
    adapter: Mapping[str, Any] | None = None,
    contrast: Mapping[str, Any] | None = None,
    pretrained: str | None = None,
    alpha: float = 1.0,
    plausible: float = 0.1,
    cond: str | None = None,
) -> Explore:
    """A control whose changes of weights have learned nothing.

    Args:
      adapter: settings of `fitting.delta` for what tuning changes in `lm`; by default a LoRA.
      contrast: the same for what the contrast learned from texts that were written; None: it is the model as it was.
      pretrained: folder or hub id of the model before it was tuned, where `lm` is the tuned one.
      alpha, plausible, cond: see `Explore`.

    Raises:
      InputError: alpha that is not finite, plausible outside 0 … 1, and what `fitting.delta` and `hf.shape` raise.
    """
    if not isinstance(alpha, jax.Array) and not np.all(np.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}, expected a finite number.")
    if not 0 <= plausible <= 1:
        raise InputError(f"plausible is {plausible}, expected a share from 0 to 1.")
    a, b, c = jax.random.split(key, 3)
    numbers = jnp.asarray(alpha, jnp.float32), jnp.float32(plausible)
    if pretrained is not None:
        other = hf.shape(pretrained)
        return Explore(IDENTITY, Stream(other.init(a), lm=other), *numbers, cond)
    seen = IDENTITY if contrast is None else fitting.delta(lm, b, **contrast)
    return Explore(fitting.delta(lm, c, **(adapter or {})), Stream(control=seen, lm=lm), *numbers, cond)


def make(lm: LM, key: jax.Array, *, tokenizer: Tokenizer, **settings: Any) -> Explore:
    """A control for a tuned model and the model `pretrained` before it, neither of which has to be fitted.

    Args:
      tokenizer: that of the tuned model, which both must share.

    Raises:
      InputError: no `pretrained`, one of another vocabulary, and what `init` raises.
    """
    source = settings.get("pretrained")
    if source is None:
        raise InputError("explore_data needs pretrained, the model before it was tuned, or a fit, which tunes one.")
    control = init(lm, key, **settings)
    check_shared(tokenizer, load_tokenizer(source), control.contrast.lm.vocab, source)
    return control.replace(contrast=control.contrast.replace(params=hf.load(source)[1]))


def example(lm: LM, key: jax.Array) -> Explore:
    """A random change of weights against the frozen model, for the laws."""
    return Explore(fitting.example_delta(lm, key), Stream(lm=lm), jnp.float32(1.0), jnp.float32(0.02))


def neutral(control: Explore) -> Explore:
    """Strength 0 of the contrast and of the tuning."""
    tuned = fitting.neutral_delta(control.tuned) if isinstance(control.tuned, Delta) else control.tuned
    return control.replace(tuned=tuned, alpha=jnp.zeros_like(control.alpha))


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rounds: int = 0,
    opening: str = "the",
    explore: Mapping[str, Any] | None = None,
    contrast: Mapping[str, Any] | None = None,
    alpha: float = 1.0,
    plausible: float = 0.1,
    cond: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Tunes a copy of the model on `data` and explores what that added.

    Args:
      lm, data: an LM artifact, and records with `text`.
      rounds: how often texts are written and the contrast learns them; 0 is the static version.
      opening: what these texts begin with. explore: settings of `stages.sampling.sample` for them; by default 100 of 40
        tokens.
      contrast: settings of the stage `contrasted`, which learns them.
      alpha, plausible, cond: see `Explore`.
      seed: of what is drawn and learned in the rounds.
      settings: those of `finetune` for the tuning, without soft prompts.

    Raises:
      InputError: rounds below 0, and what the stages raise.
    """
    if rounds < 0:
        raise InputError(f"rounds is {rounds}, expected at least 0.")
    hp = dict(alpha=alpha, plausible=plausible, cond=cond)
    tuned = methods.get("finetune").fit(root, lm=lm, data=data, **settings)
    control = stage(root, explore_data, hp, lm=lm, tuned=tuned)
    start = stage(root, opened, {"text": opening}) if rounds else None
    written: list[Artifact] = []
    for turn in range(rounds):
        drawn = {"n": 100, "max_new": 40, **(explore or {}), "strengths": [None]}
        drawn["seed"] = rng.derived_seed(seed, "explore", turn)
        written = [*written, stage(root, sampling.sample, drawn, lm=lm, prompts=start, controls=[control])]
        learned = {**(contrast or {}), "seed": rng.derived_seed(seed, "learn", turn)}
        seen = stage(root, contrasted, learned, lm=lm, samples=written)
        control = stage(root, explore_data, hp, lm=lm, tuned=tuned, seen=seen)
    return control


@stage_function("opening")
def opened(run: Run, *, text: str) -> None:
    """Stage: one record with a text, to be completed many times."""
    write_jsonl(run.path / "data.jsonl", [{"text": text}])


@stage_function("contrasted")
def contrasted(
    run: Run,
    *,
    lm: Artifact,
    samples: Sequence[Artifact],
    adapter: Adapter = Adapter(),
    training: Training = Training(steps=100, batch=16, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: next-token training of a change of `lm` on samples.

    Args:
      lm: the model before it was tuned. samples: what was written, in all rounds.
      adapter: what learns. training: how. seed: of initial values and of the order of texts.

    Raises:
      InputError: what `fitting.delta` and training raise.
    """
    model, params, tokenizer = open_lm(lm)
    records = [{"text": r["prompt"] + r["text"]} for a in samples for r in a.rows("samples.jsonl")]
    control = fitting.delta(model, rng.stream(jax.random.key(seed), "init"), **vars(adapter))
    source = Source("samples", "", records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed)
    loss = methods.get("finetune").loss(model)
    control = fitting.train(
        run, control, loss, {"params": params}, batches, training.at(adapter.rate), trained="changes/.*", seed=seed
    )
    fitting.keep(run, control, "finetune", vars(adapter))


@stage_function("explore_data")
def explore_data(
    run: Run,
    *,
    lm: Artifact,
    tuned: Artifact,
    seen: Artifact | None = None,
    alpha: float = 1.0,
    plausible: float = 0.1,
    cond: str | None = None,
) -> None:
    """Stage: a tuning of `lm` and what the contrast has seen (None: nothing) become one control."""
    model = open_lm(lm)[0]
    known = ("kind", "rank", "targets")
    adapters = [None if a is None else {k: a.spec["init"].get(k) for k in known} for a in (tuned, seen)]
    hp = dict(adapter=adapters[0], contrast=adapters[1], alpha=alpha, plausible=plausible, cond=cond)
    control = jax.eval_shape(lambda key: init(model, key, **hp), jax.random.key(0))
    change = IDENTITY if seen is None else methods.load(seen, model)
    control = control.replace(tuned=methods.load(tuned, model), contrast=control.contrast.replace(control=change))
    control = control.replace(alpha=jnp.float32(alpha), plausible=jnp.float32(plausible))
    checkpoint.save(run.path / "state", control)
    run.record(method="explore_data", init=hp)
