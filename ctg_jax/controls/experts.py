"""`Experts`: the difference of two language models, added to the logits of the one that decodes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax.control import Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.copies import joined
from ctg_jax.controls.streams import Stream, check_vocabulary
from ctg_jax.support import removed
from ctg_jax.types import InputError


@struct.dataclass
class Experts(Control):
    """z + alpha (z⁺ − z⁻), with the logits of the model that decodes for a side that is None. Where the control of a
    stream removed a token, that token keeps the logit it has.

    Attributes:
      expert, anti: a `Stream` each, or None.
      alpha: float32 [] or, per row, [B]; 0 is the base model.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
      trim: whether a side may have more tokens than the base model, which are left out: rows at the end of its
        vocabulary.
      rule: "linear", as above; "forget", z − alpha max(0, z⁻ − z) (Eldan & Russinovich 2023): only what the anti-expert
        likes more than the base becomes less likely, and nothing that it likes less becomes likelier.
      paired: whether `expert` holds both sides, as two copies; see `bind`.
    """

    expert: Stream | None
    anti: Stream | None
    alpha: jax.Array
    cond: str | None = struct.field(pytree_node=False, default=None)
    trim: bool = struct.field(pytree_node=False, default=False)
    rule: str = struct.field(pytree_node=False, default="linear")
    paired: bool = struct.field(pytree_node=False, default=False)

    def bind(self, frozen, params):
        """See `Control.bind`. Two low-rank changes of one model are read in one pass (`controls.copies`)."""
        streams = joined(self.sides().values())
        if len(streams) < len(self.sides()):
            return self.replace(expert=streams[0].bind(frozen, params), anti=None, paired=True)
        return super().bind(frozen, params)

    def sides(self) -> dict[str, Stream]:
        """The streams by the names of their sides."""
        return {name: s for name, s in (("expert", self.expert), ("anti", self.anti)) if s is not None}

    def check(self, prompts):
        for stream in self.sides().values():
            stream.check(prompts)

    def init(self, prompts, length):
        readings = {name: stream.init(prompts, length) for name, stream in self.sides().items()}
        return per_row(self.alpha, prompts, self.cond), readings

    def readers(self):
        return tuple(reader for name, stream in self.sides().items() for reader in stream.readers(name))

    def logits(self, z, h, tokens, mask, state):
        strength, readings = state
        size, found, after = z.shape[-1], {"expert": z, "anti": z}, {}
        for name, stream in self.sides().items():
            check_vocabulary(f"The {name}", stream.lm.vocab, size, larger=self.trim)
            read, _, after[name] = stream.read(tokens, mask, z.shape[1], readings[name])
            read = read[..., :size]
            found |= {"expert": read[:, 0], "anti": read[:, 1]} if self.paired else {name: read}
        known = ~(removed(found["expert"]) | removed(found["anti"]))
        push = jnp.where(known, found["expert"] - found["anti"], 0.0)
        push = jnp.minimum(push, 0.0) if self.rule == "forget" else push
        return z + strength * push, (strength, after)


def experts(
    expert: Stream | None = None,
    anti: Stream | None = None,
    alpha: float = 2.0,
    cond: str | None = None,
    trim: bool = False,
    rule: str = "linear",
) -> Experts:
    """DExperts; without an anti-expert z + alpha (z⁺ − z), and without an expert z + alpha (z − z⁻).

    Raises:
      InputError: alpha is not finite; an unknown rule, or "forget" with an expert.
    """
    if rule not in ("linear", "forget") or (rule == "forget" and (expert is not None or anti is None)):
        raise InputError(f"rule is {rule!r}, expected 'linear', or 'forget' with an anti-expert alone.")
    if not isinstance(alpha, jax.Array) and not np.all(np.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}, expected a finite number.")
    return Experts(expert, anti, jnp.asarray(alpha, jnp.float32), cond, trim, rule)
