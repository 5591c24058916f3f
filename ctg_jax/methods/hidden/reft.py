"""LoReFT: representation fine-tuning of rank r, h → h + Rᵀ (W h + b − R h) with orthonormal rows R (Wu et al. 2024,
"ReFT: Representation Finetuning for Language Models", eq. 2).

In a subspace of r dimensions the state is set to what a linear map of it asks for; the rest of it stays. The paper acts
on the first and last tokens of a prompt; `positions` selects them, and by default every token is edited, which suits
texts that are continued.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import rng
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.selection import AtPositions, Positions
from ctg_jax.controls.selection import positions as selected
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import fitting, lists, losses
from ctg_jax.learn.activations import gates
from ctg_jax.learn.fitting import Training
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError


@struct.dataclass
class Reft(AtPositions):
    """h + scale · Rᵀ (W h + b − R h) at some sites; R are the orthonormal rows that span those of `basis`.

    Attributes:
      basis, map: float32 [S, r, D], of which R is made, and W, at each of S sites. bias: float32 [S, r].
      scale: float32 [] or, per row, [B]; 0 leaves the model's logits exactly as they are.
      sites: the S sites, 0 … L + 1.
      positions: the tokens that are edited, see `ctg_jax.controls.selection`.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `scale` row by row.
    """

    basis: jax.Array
    map: jax.Array
    bias: jax.Array
    scale: jax.Array
    sites: tuple[int, ...] = struct.field(pytree_node=False, kw_only=True)
    positions: Positions = struct.field(pytree_node=False, default=Positions())
    cond: str | None = struct.field(pytree_node=False, default=None)

    def init(self, prompts, length):
        rows = orthonormal(self.basis)[None]
        return per_row(self.scale, prompts, self.cond), rows, self.positions.begin(prompts)

    def hidden(self, h, site, pos, state):
        if isinstance(site, int) and site not in self.sites:
            return h
        scale, rows, placed = state
        if (width := rows.shape[-1]) != h.shape[-1]:
            raise InputError(
                f"The subspace is of width {width}, but the model's states are {h.shape[-1]}: it was fitted on another "
                "model."
            )
        if isinstance(site, int):
            at = self.sites.index(site)
        else:
            here = jnp.asarray(self.sites) == site
            at, scale = jnp.argmax(here), jnp.where(jnp.any(here), scale, 0.0)
        scale = self.positions.within(scale, pos, placed)
        r, x = rows[0, at], h.astype(jnp.float32)
        move = jnp.einsum("btd,rd->btr", x, self.map[at] - r, precision="highest") + self.bias[at][None, None]
        return h + (scale * jnp.einsum("btr,rd->btd", move, r, precision="highest")).astype(h.dtype)


def orthonormal(basis: jax.Array) -> jax.Array:
    """float32 [S, r, D]: orthonormal rows with the span of basis [S, r, D]; the same rows where they are such."""
    q, upper = jnp.linalg.qr(jnp.swapaxes(basis, 1, 2))
    sign = jnp.where(jnp.diagonal(upper, axis1=1, axis2=2) < 0, -1.0, 1.0)
    return jnp.swapaxes(q, 1, 2) * sign[:, :, None]


def init(
    lm: LM, key: jax.Array, *, rank: int = 4, sites: Any = "middle", positions: Any = "all", cond: str | None = None
) -> Reft:
    """A control that changes nothing: random R, W = R and b = 0.

    Args:
      rank: r. sites: see `ctg_jax.learn.activations.gates`. positions, cond: see `Reft`.

    Raises:
      InputError: a rank below 1 or above the width, and what `gates` and `positions` raise.
    """
    if not 1 <= rank <= lm.width:
        raise InputError(f"rank is {rank}, expected from 1 to {lm.width}, the width of the model.")
    at = tuple(np.flatnonzero(gates(lm.depth, sites)).tolist())
    basis = orthonormal(jax.random.normal(key, (len(at), rank, lm.width), jnp.float32))
    nothing = jnp.zeros((len(at), rank), jnp.float32)
    return Reft(basis, basis, nothing, jnp.ones(()), sites=at, positions=selected(positions), cond=cond)


def example(lm: LM, key: jax.Array) -> Reft:
    """Rank 2 after both the first block and the final norm, with another random map, for the laws."""
    control = init(lm, key, rank=2, sites=[1, lm.depth + 1])
    other = 0.5 * jax.random.normal(jax.random.fold_in(key, 1), control.map.shape)
    return control.replace(map=other, bias=1.0 + control.bias)


def neutral(control: Reft) -> Reft:
    """Strength 0."""
    return control.replace(scale=jnp.zeros_like(control.scale))


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """Trains the edit on the records of `data`; the settings are those of the stage `reft`."""
    return stage(root, reft, settings, lm=lm, data=data)


_, from_texts = lists.learners(fit)


@stage_function("reft")
def reft(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    where: Mapping[str, Any] | None = None,
    rank: int = 4,
    sites: Any = "middle",
    positions: Any = "all",
    cond: str | None = None,
    training: Training = Training(steps=300, batch=16, rate=2e-3, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: next-token training of the edit on records that match `where`. A batch's first token is its prompt.

    Args:
      where: keep records whose fields have these values, such as {"label": 1}.
      rank, sites, positions, cond: see `init`. training: how it is trained.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: no record matches, positions that need roles or numbers of rows, and what `init` raises.
    """
    records = fitting.matching(data, where)
    model, params, tokenizer = open_lm(lm)
    options = dict(rank=rank, sites=sites, positions=positions)
    control = init(model, rng.stream(jax.random.key(seed), "init"), **options)
    if control.positions.roles or control.positions.row:
        raise InputError(
            f"positions is {positions!r}, but texts have no roles and no rows of their own: select by place."
        )
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed)
    loss = losses.control_loss(model)
    control = fitting.train(
        run, control, loss, {"params": params}, batches, training, trained="basis|map|bias", seed=seed
    )  # fmt: skip
    fitting.keep(run, control.replace(cond=cond), "reft", options | {"cond": cond})
