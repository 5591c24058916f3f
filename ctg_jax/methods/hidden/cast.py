"""Conditional steering: a probe of the prompt's own state decides, row by row, whether a steering vector acts at all.

CAST (Lee et al. 2024, "Programming Refusal with Conditional Activation Steering"): texts that meet a condition are
steered and all others are left exactly as they are. The condition is read off the state of the prompt at one site,
before anything is steered, and holds for the whole completion. The paper compares the state with a condition vector by
cosine similarity; here a logistic probe takes its place, whose threshold is a probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import methods
from ctg_jax.control import Control
from ctg_jax.controls.streams import Stream
from ctg_jax.learn import activations
from ctg_jax.learn.activations import gates
from ctg_jax.learn.probes import fit_probes, split
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError

POOLS = ("mean", "last")


@struct.dataclass
class Cast(Control):
    """A control of the hidden state, for the rows whose prompts a probe calls positive, σ(w·s + b) ≥ p.

    Attributes:
      inner: what acts where the gate is open; its strength is that of the control.
      vector, bias: float32 [D] and [], the probe w and b.
      least: float32 [], p.
      reader: the frozen model, which reads the prompts once more.
      site: where s is read, 0 … L + 1. pool: the "mean" state of the prompt, or that of its "last" token.
    """

    inner: Control
    vector: jax.Array
    bias: jax.Array
    least: jax.Array
    reader: Stream
    site: int = struct.field(pytree_node=False, kw_only=True)
    pool: str = struct.field(pytree_node=False, default="mean")

    def check(self, prompts):
        self.inner.check(prompts)

    def init(self, prompts, length):
        lm, params = self.reader.lm, self.reader.params
        if not self.reader.bound:
            raise InputError("A condition is read before it has weights: call Control.bind first, as decoding does.")
        tokens, mask = prompts.tokens, prompts.mask
        state = activations.pooled(lm, params, tokens, mask, mask, how=self.pool)[self.site]
        if state.shape[1] != self.vector.shape[0]:
            raise InputError(
                f"The probe has width {self.vector.shape[0]}, but the model's is {state.shape[1]}: it was fitted on "
                "another model."
            )
        odds = jnp.einsum("bd,d->b", state, self.vector, precision="highest") + self.bias
        return jax.nn.sigmoid(odds) >= self.least, self.inner.init(prompts, length)

    def began(self, state, start, first):
        return state[0], self.inner.began(state[1], start, first)

    def seen(self, state, tokens):
        return state[0], self.inner.seen(state[1], tokens)

    def hidden(self, h, site, pos, state):
        return jnp.where(state[0][:, None, None], self.inner.hidden(h, site, pos, state[1]), h)


def init(
    lm: LM,
    key: jax.Array,
    *,
    site: int | None = None,
    pool: str = "mean",
    least: float = 0.5,
    steer: Mapping[str, Any] | None = None,
) -> Cast:
    """A neutral control: no vector, and a gate that is open for every prompt.

    Args:
      site: where the condition is read; None: in the middle, as where `steer` acts by default.
      pool: see `Cast`. least: the probability p. steer: settings of `steer.init`.

    Raises:
      InputError: an unknown pool, a probability that is none, and what `steer.init` raises.
    """
    if pool not in POOLS:
        raise InputError(f"pool is {pool!r}, expected one of {', '.join(POOLS)}.")
    if not 0 < least < 1:
        raise InputError(f"least is {least}, expected a probability between 0 and 1.")
    at = int(np.argmax(gates(lm.depth, "middle" if site is None else site)))
    inner = methods.get("steer").init(lm, key, **(steer or {}))
    probe = jnp.zeros((lm.width,), jnp.float32), jnp.zeros((), jnp.float32)
    return Cast(inner, *probe, jnp.float32(least), Stream(lm=lm, of="frozen"), site=at, pool=pool)


def example(lm: LM, key: jax.Array) -> Cast:
    """The example of steering, for about half of all prompts."""
    control = init(lm, key).replace(inner=methods.get("steer").example(lm, key))
    return control.replace(vector=jax.random.normal(jax.random.fold_in(key, 1), control.vector.shape))


def neutral(control: Cast) -> Cast:
    """Strength 0."""
    return control.replace(inner=methods.get("steer").neutral(control.inner))


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    field: str = "condition",
    values: Sequence[Any] = (1,),
    gate: Mapping[str, Any] | None = None,
    **steer: Any,
) -> Artifact:
    """A steering vector from the records with a `label`, and a gate from those with `field`.

    Args:
      data: records with `text` or `messages`; one record may teach the vector, the gate, or both.
      field, values: the gate opens for texts whose field has one of these values, and learns from all that have it.
      gate: settings of the stage `cast`: site, pool, least, and how the probe is fitted.
      steer: settings of `steer.fit`.

    Raises:
      InputError: a field that fewer than four records have, or that opens the gate for all or none of them.
    """
    pushed = methods.get("steer").fit(root, lm=lm, data=data, **steer)
    settings = {"field": field, "values": list(values), **(gate or {})}
    return stage(root, cast, settings, lm=lm, data=data, pushed=pushed)


@stage_function("cast", revision=1)
def cast(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    pushed: Artifact,
    field: str = "condition",
    values: Sequence[Any] = (1,),
    site: int | None = None,
    pool: str = "mean",
    least: float = 0.5,
    inverse_l2: float = 1e-3,
    tokens: int = 64,
) -> None:
    """Stage: fits the probe of the condition, and puts the steering control behind it; metrics.jsonl has the share of
    texts that the probe sorts correctly, of those it was fitted on and of a fifth that it was not.

    Args:
      pushed: what `steer.fit` made. field, values: see `fit`. site, pool, least: see `init`.
      inverse_l2: of the probe. tokens: read of a text.
    """
    records = [r for r in data.rows("data.jsonl") if r.get(field) is not None]
    sides = [[activations.whole(r) for r in records if (r[field] in values) == side] for side in (True, False)]
    if min(map(len, sides)) < 2:
        raise InputError(
            f"field is {field!r}: {len(sides[0])} records have one of the values {list(values)} and {len(sides[1])} "
            "another, expected at least two on each side."
        )
    model, params, tokenizer = open_lm(lm)
    options = dict(site=site, pool=pool, least=least, steer=pushed.spec["init"])
    control = init(model, jax.random.key(0), **options)

    @jax.jit
    def read(*batch):  # the state at one site, [B, 1, D]
        return activations.pooled(model, *batch, how=pool)[control.site][:, None]

    opened = (model, params, tokenizer)
    found = [activations.read_texts(read, *opened, side, batch=32, tokens=tokens, how=pool) for side in sides]
    x, y, held = split(found[0], found[1], 0.2)
    vector, bias, fitted, tested = (a[0] for a in fit_probes(x, y, held, inverse_l2))
    run.log(train_accuracy=float(fitted), heldout_accuracy=float(tested), texts=len(y))
    inner = methods.load(pushed, model)
    checkpoint.save(
        run.path / "state", control.replace(inner=inner, vector=jnp.asarray(vector), bias=jnp.asarray(bias))
    )
    run.record(method="cast", init=options)
