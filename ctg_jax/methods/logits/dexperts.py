"""Decoding-time experts: combine the logits of several language models (Liu et al. 2021, eq. 2).

    z' = z + alpha (z⁺ − z⁻)

The base's own logits may stand for either side, which gives contrastive decoding (Li et al. 2023; O'Brien & Lewis
2023) and classifier-free guidance (Sanchez et al. 2023). What filters before them in a `Chain` filters the base, as in
the DExperts paper: `Chain((top_p, experts))`; the other order filters the combination.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import methods
from ctg_jax.control import IDENTITY, Control, edit_logits, enter
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.delta import Delta
from ctg_jax.controls.vectors import SoftPrompt
from ctg_jax.methods.weights import finetune
from ctg_jax.models.lm import LM, Cache, write_prefix
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.support import removed
from ctg_jax.types import InputError, Params, Prompts


@struct.dataclass
class Memory:
    """What one member has read: its cache, its control's state, and whether the prompt is in the cache."""

    cache: Cache
    state: Any
    started: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Member:
    """A language model that reads along: `control.weights` has been applied to `params`.

    Attributes:
      params: parameters of `lm`, in the layout for decoding (`lm.unstack`); the stacked one works, slowly.
      control: acts on this member only, such as a `SoftPrompt` or `LastTokens`.
      lm: the model, with the base's vocabulary.
    """

    params: Params
    control: Control = IDENTITY
    lm: LM = struct.field(pytree_node=False, kw_only=True)

    def init(self, prompts: Prompts, length: int) -> Memory:
        batch = prompts.tokens.shape[0]
        state = self.control.init(prompts, length)
        prefix = self.control.prefix(state)
        p = 0 if prefix is None else prefix[0].shape[3]
        cache = self.lm.init_cache(self.params, batch, p + self.control.added() + length)
        return Memory(cache if prefix is None else write_prefix(cache, prefix), state)

    def read(self, tokens: jax.Array, mask: jax.Array, last: int, m: Memory) -> tuple[jax.Array, Memory]:
        """Logits float32 [B, last, V] after the last tokens of those just read, int [B, T] with mask bool [B, T]."""
        x, seen, state = self.lm.embed(self.params, tokens), mask, m.state
        if not m.started:  # the prompt comes first, and with it all but the last M - 1 tokens of a forward pass
            t = tokens.shape[1] - last + 1
            head, head_mask, state = enter(self.control, x[:, :t], mask[:, :t], state)
            x = jnp.concatenate([head.astype(x.dtype), x[:, t:]], axis=1)
            seen = jnp.concatenate([head_mask, mask[:, t:]], axis=1)
        out = self.lm.apply(self.params, x, seen, m.cache, self.control, state, last=last)
        z, state = edit_logits(self.control, out.logits, out.hidden, tokens, mask, state)
        return z, Memory(out.cache, state, True)


@struct.dataclass
class Experts(Control):
    """z + alpha (z⁺ − z⁻), with the base's own logits for a side that is None. A token that a member's own control
    removed has no finite logit there, so that its logit here is the base's.

    Attributes:
      expert, anti: `Member`s, or None for the base.
      alpha: float32 [] or, per row, [B]; 0 is the base model.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    expert: Member | None
    anti: Member | None
    alpha: jax.Array
    cond: str | None = struct.field(pytree_node=False, default=None)

    def check(self, prompts):
        for member in (self.expert, self.anti):
            if member is not None:
                member.control.check(prompts)

    def init(self, prompts, length):
        members = {"expert": self.expert, "anti": self.anti}
        memory = {k: m.init(prompts, length) for k, m in members.items() if m is not None}
        return per_row(self.alpha, prompts, self.cond), memory

    def readers(self):
        found: tuple[tuple[str, int, int], ...] = ()
        for name in ("expert", "anti"):
            if (m := getattr(self, name)) is not None:
                found += ((name, m.lm.context, m.control.added()), *m.control.readers())
        return found

    def logits(self, z, h, tokens, mask, state):
        strength, memory = state
        sides, after = {"expert": z, "anti": z}, {}
        for name, m in memory.items():
            member = getattr(self, name)
            if member.lm.vocab != z.shape[-1]:
                raise InputError(
                    f"The {name} has a vocabulary of {member.lm.vocab} tokens and the base model one of "
                    f"{z.shape[-1]}: use models that share one tokenizer."
                )
            sides[name], after[name] = member.read(tokens, mask, z.shape[1], m)
        known = ~(removed(sides["expert"]) | removed(sides["anti"]))
        push = jnp.where(known, sides["expert"] - sides["anti"], 0.0)
        return z + strength * push, (strength, after)


@struct.dataclass
class LastTokens(Control):
    """Forgets all of the prompt but its last `keep` tokens (static): the unconditional side of guidance."""

    keep: int = struct.field(pytree_node=False, default=1)

    def prompt(self, x, mask, state):
        return x, mask & (jnp.arange(x.shape[1]) >= x.shape[1] - self.keep)[None, :]


def member(lm: LM, params: Params, control: Control = IDENTITY) -> Member:
    """A `Member` of `lm` under any control; a control that only changes weights is merged here and then gone."""
    merged = lm.unstack(control.weights(params))
    return Member(merged, IDENTITY if isinstance(control, Delta) else control, lm=lm)


def experts(expert: Member, anti: Member | None, alpha: float = 2.0, cond: str | None = None) -> Experts:
    """DExperts; without an anti-expert, z + alpha (z⁺ − z)."""
    return Experts(expert, anti, strength("alpha", alpha), cond)


def contrastive(amateur: Member, beta: float = 0.5, cond: str | None = None) -> Experts:
    """Contrastive decoding, (1 + beta) z − beta z_amateur (O'Brien & Lewis 2023, eq. 3), with the base as the expert.
    The plausibility mask of Li et al. (2023) is `MinP` before it: `Chain((MinP(0.1), contrastive(…)))`."""
    return Experts(None, amateur, strength("beta", beta), cond)


def guidance(lm: LM, params: Params, gamma: float = 1.5, keep: int = 1, cond: str | None = None) -> Experts:
    """Classifier-free guidance, z_∅ + gamma (z − z_∅) (Sanchez et al. 2023, eq. 7): z_∅ reads only the last `keep`
    tokens of the prompt."""
    return Experts(None, member(lm, params, LastTokens(keep)), strength("gamma", gamma) - 1.0, cond)


def prompted(lm: LM, params: Params, tokens: list[int], alpha: float = 1.0, *, against: bool = False) -> Experts:
    """The same model after an instruction, int [P], is the expert (or, `against` it, the anti-expert)."""
    if not len(tokens):
        raise InputError("tokens is empty, expected the token ids of an instruction.")
    ids = jnp.asarray(tokens, jnp.int32)[None, :]
    told = member(lm, params, SoftPrompt(lm.embed(params, ids)[0].astype(jnp.float32)))
    return Experts(None if against else told, told if against else None, strength("alpha", alpha))


def strength(name: str, value: float) -> jax.Array:
    """float32 [] or [B]; InputError for a value that is not finite."""
    if isinstance(value, jax.Array):
        return value.astype(jnp.float32)
    if not np.all(np.isfinite(value)):
        raise InputError(f"{name} is {value}, expected a finite number.")
    return jnp.asarray(value, jnp.float32)


def init(lm: LM, key: jax.Array, *, alpha: float = 2.0, cond: str | None = None) -> Experts:
    """Two random models of the base's shape: what a fitted control is restored into."""
    k_expert, k_anti = jax.random.split(key)
    return experts(member(lm, lm.init(k_expert)), member(lm, lm.init(k_anti)), alpha, cond)


def example(lm: LM, key: jax.Array) -> Experts:
    """Random experts, nearly alike and so at a large strength, for the laws."""
    return init(lm, key, alpha=20.0)


def neutral(control: Experts) -> Experts:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    expert: Mapping[str, Any] | None = None,
    anti: Mapping[str, Any] | None = None,
    alpha: float = 2.0,
    cond: str | None = None,
    **settings: Any,
) -> Artifact:
    """Two fine-tuning stages on the same model, and their combination.

    Args:
      lm, data: an LM artifact, and records with `text` and a field to choose by.
      expert, anti: `where` of each side; by default {"label": 1} and {"label": 0}.
      alpha: the strength at first. cond: see `Experts`.
      settings: the other settings of `finetune`, the same for both.

    Raises:
      InputError: kind is "prompt" (experts are merged into weights), or what `finetune` raises.
    """
    if settings.get("adapter", {}).get("kind") == "prompt":
        raise InputError("kind is 'prompt', but experts are merged into the weights: use 'lora' or 'full'.")
    chosen = (expert or {"label": 1}, anti or {"label": 0})
    tuned = [finetune.fit(root, lm=lm, data=data, **{**settings, "where": dict(where)}) for where in chosen]
    return stage(root, dexperts, dict(alpha=alpha, cond=cond), lm=lm, expert=tuned[0], anti=tuned[1])


@stage_function("dexperts")
def dexperts(
    run: Run, *, lm: Artifact, expert: Artifact, anti: Artifact, alpha: float = 2.0, cond: str | None = None
) -> None:
    """Stage: merges two controls that were fitted on `lm` into its weights and keeps both models."""
    model, params, _ = open_lm(lm)
    sides = [member(model, params, methods.load(a, model)) for a in (expert, anti)]
    checkpoint.save(run.path / "state", experts(*sides, alpha, cond))
    run.record(method="dexperts", init=dict(alpha=alpha, cond=cond))
