"""Proxy-tuning: what tuning did to a small model, added to the logits of a large one (Liu et al. 2024).

    z' = z + alpha (z⁺ - z⁻)

z⁺ is a small tuned model and z⁻ the same small model before it was tuned; both share the large one's tokenizer, and
neither its weights nor its size. The rule is that of DExperts, whose experts are tuned copies of the base itself; with
`anti` as well, both sides are tuned, which is DExperts with experts of another size.

    tuned, untuned = "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    control = proxy.make(lm, key, tokenizer=tokenizer, expert=tuned, anti=untuned)

alpha 1 is the paper's rule, 0 the base model. As in the authors' code, the base is not filtered before the models are
combined, so truncation comes after this control in a chain; tokens beyond the base's vocabulary at the end of a small
model's are left out; and only the tuned model reads the chat template, `before` and `after` the prompt. The authors'
code finds out by the word "chat" in a path whether there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import methods, rng
from ctg_jax.control import IDENTITY
from ctg_jax.controls.experts import Experts, experts
from ctg_jax.controls.streams import Stream, check_vocabulary
from ctg_jax.data.ids import check_shared
from ctg_jax.data.instructions import instructed
from ctg_jax.data.tokenizer import Tokenizer, load_tokenizer
from ctg_jax.io import dumps, sha256_of
from ctg_jax.learn.fitting import example_delta
from ctg_jax.learn.pretrain import small_lm
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.lm import LM
from ctg_jax.models.record import of_record, record
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError

Model = str | Mapping[str, Any]  # a folder or hub id, or the fields of a decoder


def init(
    lm: LM,
    key: jax.Array,
    *,
    expert: Model,
    anti: Model,
    adapter: Mapping[str, Any] | None = None,
    anti_adapter: Mapping[str, Any] | None = None,
    before: str = "",
    after: str = "",
    alpha: float = 1.0,
    cond: str | None = None,
) -> Experts:
    """Proxies with random weights.

    Args:
      expert, anti: the tuned and the untuned small model: a folder, a hub id, or the fields of a decoder.
      adapter, anti_adapter: settings of `finetune.init`, where a side is a small model with a change of its weights.
      before, after: text around the prompt that the expert alone reads, such as a chat template.
      alpha, cond: see `controls.experts.Experts`.

    Raises:
      InputError: alpha that is not finite, a small model with fewer tokens than the base, and what `hf.shape` raises.
    """
    plus, minus = (hf.shape(m) if isinstance(m, str) else of_record(m) for m in (expert, anti))
    for name, small in (("expert", plus), ("anti", minus)):
        check_vocabulary(f"The {name}", small.vocab, lm.vocab, larger=True)
    a, b, c = jax.random.split(key, 3)
    tuned = methods.get("finetune").init
    change = IDENTITY if adapter is None else tuned(plus, c, **adapter)
    other = IDENTITY if anti_adapter is None else tuned(minus, rng.stream(key, "anti"), **anti_adapter)
    own = own_entry(before, after) if before or after else None
    return experts(
        Stream(plus.init(a), change, lm=plus, own=own), Stream(minus.init(b), other, lm=minus), alpha, cond, trim=True
    )


def own_entry(before: str, after: str) -> str:
    """The entry of `prompts.cond` with the prompt inside its template, int32 [B, T'], -1 for padding."""
    return f"proxy {sha256_of(dumps([before, after]))[:8]}"


def make(lm: LM, key: jax.Array, *, tokenizer: Tokenizer, **settings: Any) -> Experts:
    """The control of two small models that exist, of which the settings `expert` and `anti` name a folder or hub id.

    Args:
      tokenizer: that of the base model, which the small models must share.

    Raises:
      InputError: a model that is not named, one of another vocabulary, and what `init` raises.
    """
    control = init(lm, key, **settings)
    sides = {}
    for name, stream in control.sides().items():
        source = settings[name]
        if not isinstance(source, str):
            raise InputError(f"{name} is {source!r}, expected the folder or hub id of a model.")
        check_shared(tokenizer, load_tokenizer(source), stream.lm.vocab, source)
        sides[name] = stream.replace(params=hf.load(source)[1])
    return control.replace(**sides)


def conditions(artifact: Artifact, lm: Artifact, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The tokens of each prompt inside the template of the expert."""
    settings = artifact.spec["init"]
    before, after = (settings.get(name, "") for name in ("before", "after"))
    if not before and not after:
        return {}
    return {own_entry(before, after): instructed(open_lm(lm)[2], texts, [before], [after])[:, 0]}


def example(lm: LM, key: jax.Array) -> Experts:
    """A small random model, and the same with a random change of its weights, for the laws."""
    small = Transformer.gpt2(vocab=lm.vocab, width=8, depth=1, heads=2, context=lm.context)
    a, b = jax.random.split(key)
    params = jax.tree.map(lambda x: 4 * x, small.init(a))
    return experts(Stream(params, example_delta(small, b), lm=small), Stream(params, lm=small), 1.0, trim=True)


def neutral(control: Experts) -> Experts:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    small: Mapping[str, Any],
    where: Mapping[str, Any] | None = None,
    anti: Mapping[str, Any] | None = None,
    before: str = "",
    after: str = "",
    alpha: float = 1.0,
    cond: str | None = None,
    **settings: Any,
) -> Artifact:
    """A small model, a stage of fine-tuning on it, and their combination with the base.

    Args:
      lm, data: an LM artifact, and records with `text` and a field to choose by.
      small: see `ctg_jax.learn.pretrain.small_lm`.
      where: the fields of the records that the small model is tuned on; by default {"label": 1}.
      anti: those of the records that the other side is tuned on; None: it stays as it is.
      before, after, alpha, cond: see `init`.
      settings: the other settings of `finetune`.

    Raises:
      InputError: what these stages raise, and a small model of another vocabulary.
    """
    made = small_lm(root, small, lm=lm, data=data)
    tune = methods.get("finetune").fit
    chosen = {"tuned": where or {"label": 1}} | ({} if anti is None else {"anti": anti})
    sides = {k: tune(root, lm=made, data=data, **{**settings, "where": dict(v)}) for k, v in chosen.items()}
    hp = dict(before=before, after=after, alpha=alpha, cond=cond)
    return stage(root, proxy, hp, lm=lm, small=made, **sides)


@stage_function("proxy")
def proxy(
    run: Run,
    *,
    lm: Artifact,
    small: Artifact,
    tuned: Artifact,
    anti: Artifact | None = None,
    before: str = "",
    after: str = "",
    alpha: float = 1.0,
    cond: str | None = None,
) -> None:
    """Stage: a small model, and the same with the change that was fitted on it, become the two sides of one control;
    `anti` is a change of the other side. It holds the weights of the small model, and none of the base."""
    model, _, tokenizer = open_lm(lm)
    other, params, theirs = open_lm(small)
    check_shared(tokenizer, theirs, other.vocab, small.path.name)
    hp = dict(expert=record(other), anti=record(other), adapter=tuned.spec["init"])
    hp |= {} if anti is None else dict(anti_adapter=anti.spec["init"])
    hp |= dict(before=before, after=after, alpha=alpha, cond=cond)
    like = jax.eval_shape(lambda key: init(model, key, **hp), jax.random.key(0))
    changes = [IDENTITY if side is None else methods.load(side, other) for side in (tuned, anti)]
    both = zip((like.expert, like.anti), changes)
    sides = dict(zip(("expert", "anti"), (side.replace(params=params, control=change) for side, change in both)))
    checkpoint.save(run.path / "state", like.replace(**sides, alpha=jnp.float32(alpha)))
    run.record(method="proxy", init=hp)
