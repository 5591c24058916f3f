"""Latent steering vectors: for each sentence a z that makes the frozen LM, with z added to its hidden states, write it.

Subramani, Suresh & Peters 2022 ("Extracting Latent Steering Vectors from Pretrained Language Models"). The same search
serves its predecessors: a z that is projected to the width of the model or mixed from parts by attention (Subramani,
Bowman & Cho 2019, a recurrent LM there), and one that is put in the attention's memory (Subramani & Suresh 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctg_jax import rng
from ctg_jax.controls.conditions import check_choice, gathered, per_row
from ctg_jax.controls.selection import AtPositions, Placed, Positions, replaced
from ctg_jax.controls.selection import positions as selected
from ctg_jax.data.tokenizer import pad_rows
from ctg_jax.learn import slot_search
from ctg_jax.learn.activations import sites
from ctg_jax.learn.vector_search import Search, solve_by_length
from ctg_jax.mesh import processes
from ctg_jax.models.lengths import check_reads
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import Read, reduced
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.support import likeliest
from ctg_jax.types import InputError, Params

_ITERATIONS = 16  # updates between two looks of the host at the search


@struct.dataclass
class LatentSteer(AtPositions):
    """h + scale · z at the chosen sites and positions, or z as keys and values that every token attends to.

    Attributes:
      z: float32 [d], or [N, d], of which each row takes the one that `prompts.cond[choice]` (int [B]) names.
      scale: float32 [] or [B].
      basis: float32 [d, width], fixed orthonormal rows that z goes through, or None where d is the width.
      sites: where it is added, see `sites`; none for the memory.
      positions: the tokens where it is added, see `ctg_jax.controls.selection`.
      parts: the number of vectors in z, of which every token gets the mixture that its own state attends to.
      memory: (L, K, P, H) of the keys and values, or None.
    """

    z: jax.Array
    scale: jax.Array
    basis: jax.Array | None = None
    sites: tuple[int, ...] = struct.field(pytree_node=False, default=())
    positions: Positions = struct.field(pytree_node=False, default=Positions())
    parts: int = struct.field(pytree_node=False, default=1)
    memory: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    choice: str | None = struct.field(pytree_node=False, default=None)

    def init(self, prompts, length):
        if self.choice is None:
            z = jnp.broadcast_to(self.z[None], (prompts.tokens.shape[0], *self.z.shape))
        else:
            z = gathered(self.z, prompts, self.choice)
        return self.spread(z), per_row(self.scale, prompts, None)[:, 0], self.positions.begin(prompts)

    def check(self, prompts):
        super().check(prompts)
        if self.choice is not None:
            check_choice(prompts, self.choice, self.z.shape[0], "vector")

    def spread(self, z: jax.Array) -> jax.Array:
        """float32 [B, parts, D], or [B, width of the memory], of z [B, d]."""
        full = z if self.basis is None else z @ self.basis
        return full if self.memory else full.reshape(len(z), self.parts, -1)

    def prefix(self, state):
        if self.memory is None:
            return None
        full, scale, _ = state
        layers, heads, slots, width = self.memory
        both = (full * scale).reshape(-1, 2, layers, heads, slots, width)
        return both[:, 0].swapaxes(0, 1), both[:, 1].swapaxes(0, 1)

    def hidden(self, h, site, pos, state):
        if not self.sites or (isinstance(site, int) and site not in self.sites):
            return h
        full, scale, placed = state
        if (width := full.shape[-1]) != h.shape[-1]:
            raise InputError(
                f"The latent vector has width {width}, and the model {h.shape[-1]}: it was learned on another model."
            )
        push = full
        if self.parts > 1:
            weight = jax.nn.softmax(jnp.einsum("btd,bpd->btp", h.astype(jnp.float32), full), axis=-1)
            push = jnp.einsum("btp,bpd->btd", weight, full)
        push = self.positions.within(push, pos, placed)
        if not isinstance(site, int):
            push = jnp.where(jnp.isin(site, jnp.asarray(self.sites)), push, 0.0)
        return h + (scale[:, :, None] * push).astype(h.dtype)


def init(
    lm: LM,
    key: jax.Array,
    *,
    count: int | None = None,
    site: str | int | Sequence = "middle",
    positions: Any = "all",
    dim: int | None = None,
    parts: int = 1,
    slots: int = 1,
    choice: str | None = None,
) -> LatentSteer:
    """A neutral control: z is zero; the basis, where d needs one, is drawn from `key`.

    Args:
      count: None for one vector, or N of them, which needs `choice`, the name of an entry of `prompts.cond`.
      dim: d; the width by default. For the memory, d may be anything up to 2 · L · K · slots · H.
      parts: vectors that are mixed by attention; d is then their number times the width, or less.
      slots: places in the memory.

    Raises:
      InputError: a site or positions that do not exist, or a dimension that is too large.
    """
    positions = selected(positions)
    memory = (lm.depth, lm.kv_heads, slots, lm.head_dim) if site == "memory" else None
    width = 2 * math.prod(memory) if memory else parts * lm.width
    dim = width if dim is None else dim
    if not 1 <= dim <= width:
        raise InputError(f"dim is {dim}, expected a number from 1 to {width}, the width at this site.")
    return LatentSteer(
        jnp.zeros((dim,) if count is None else (count, dim), jnp.float32),
        jnp.ones((), jnp.float32),
        None if dim == width else _orthonormal(rng.stream(key, "basis"), dim, width),
        sites=sites(lm.depth, site),
        positions=positions,
        parts=parts,
        memory=memory,
        choice=choice,
    )


def _orthonormal(key: jax.Array, dim: int, width: int) -> jax.Array:
    """Random orthonormal rows, float32 [dim, width]."""
    return jnp.linalg.qr(jax.random.normal(key, (width, dim), jnp.float32))[0].T


def example(lm: LM, key: jax.Array) -> LatentSteer:
    """One random vector through a basis, after the attention of the first block and in the middle, for the laws."""
    control = init(lm, key, site=("attention:1", "middle"), dim=max(1, lm.width // 2))
    return control.replace(z=jax.random.normal(key, control.z.shape))


def neutral(control: LatentSteer) -> LatentSteer | None:
    """Strength 0; None for the memory, whose slots are attended to even when they hold zeros."""
    return None if control.memory else control.replace(scale=jnp.zeros_like(control.scale))


def split(control: LatentSteer, depth: int) -> tuple[int, LatentSteer]:
    """(k, control'): the block below which z is not felt, and the control for the blocks above it (`LM.above`)."""
    if not control.sites:
        return 0, control
    inner = [s - depth - 1 for s in control.sites if s > depth + 1]
    k = min([min(s, depth) for s in control.sites if s <= depth + 1] + [block - 1 for block in inner])
    moved = tuple(s - k if s <= depth + 1 else s - 2 * k for s in control.sites)
    return k, control.replace(sites=moved)


def objective(lm: LM, control: LatentSteer) -> slot_search.Objective:
    """Mean negative log-likelihood of the own tokens of each row, in nats; the share of them that are the most likely;
    and whether all are, in which case greedy decoding writes them. The rows hold stream [B, T, D] at the lowest site,
    mask and counted bool [B, T], target int [B, T], start int [B]; frozen is (params of `lm`, basis)."""

    def terms(logits, target):
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, likeliest(jax.lax.stop_gradient(logits))

    def f(z, rows, frozen):
        params, basis = frozen
        c = control.replace(basis=basis)
        state = (c.spread(z), jnp.ones((len(z), 1), jnp.float32), Placed.behind(rows["start"]))
        hidden = lm.apply(params, rows["stream"], rows["mask"], control=c, state=state, last=0).hidden
        nll, likeliest = reduced(Read(params, hidden, lm=lm), terms, rows["target"])
        count = jnp.sum(rows["counted"], axis=1)
        nll = jnp.where(rows["counted"], nll, 0.0)
        right = (likeliest == rows["target"]) | ~rows["counted"]
        size = jnp.maximum(count, 1)
        return jnp.sum(nll, axis=1) / size, 1 - jnp.sum(~right, axis=1) / size, jnp.all(right, axis=1)

    return f


def fit(root, *, lm: Artifact, data: Artifact, **config: Any) -> Artifact:
    """One latent vector for every sentence of the data; see `latent_steer` for the settings."""
    return stage(root, latent_steer, config, lm=lm, data=data)


@stage_function("latent_steer")
def latent_steer(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    site: Any = "middle",
    positions: Any = "all",
    dim: int | None = None,
    parts: int = 1,
    slots: int = 1,
    tokens: int | None = None,
    end: bool = True,
    search: Search = Search(),
    seed: int = 0,
) -> None:
    """Stage: a `LatentSteer` with a bank z [N, d], of which row i belongs to record i of the data and is chosen by
    `prompts.cond["vector"]`; metrics.jsonl holds for every record its loss, updates, the share of its tokens that are
    the most likely ones (`right`) and whether all are (`recovered`).

    Args:
      data: records with `text`, and `prompt` where the text follows one.
      site, positions, dim, parts, slots: see `init`.
      tokens: sentences with more are left out (their z stays zero, and their row is marked); by default a sentence
        that does not fit into the model's context is an error.
      end: whether the end-of-text token is learned too, so that decoding ends by itself.
      search: how each vector is searched.
      seed: of the basis and of the vectors at first.

    Raises:
      InputError: an empty or overlong sentence, and what `init` raises.
    """
    model, params, tokenizer = open_lm(lm)
    records = data.rows("data.jsonl")
    sentences = [_sentence(tokenizer, r, i, end) for i, r in enumerate(records)]
    for i, (row, _) in enumerate(sentences if tokens is None else ()):  # else long ones are left out
        check_reads(model, len(row), f"sentence {i + 1} of {data.path} has {len(row)} tokens")
    limit = min(tokens or model.context, model.context)
    kept = [i for i, (row, first) in enumerate(sentences) if len(row) - first <= limit and len(row) <= model.context]
    if selected(positions) != replaced(selected(positions)):
        raise InputError(f"positions is {positions!r}, but a search reads no tokens, roles or rows: select by place.")
    hp = dict(site=site, positions=positions, dim=dim, parts=parts, slots=slots)
    control = init(model, jax.random.key(seed), **hp)
    z0 = search.starts(jax.random.key(seed), np.arange(len(records)), control.z.shape[-1])
    kept_sentences, begun = [sentences[i] for i in kept], z0[np.asarray(kept, int)]
    found = find(model, params, control, kept_sentences, begun, search, keep=run.path / "partial")
    run.discard("partial")
    bank = np.zeros((len(records), control.z.shape[-1]), np.float32)
    bank[kept] = found["z"]
    fitted = control.replace(z=jnp.asarray(bank), choice="vector")
    checkpoint.save(run.path / "state", fitted)
    place = {i: k for k, i in enumerate(kept)}
    for i, (row, first) in enumerate(sentences):
        facts = {"record": i, "tokens": len(row) - first}
        if (k := place.get(i)) is None:
            run.log(**facts, left_out=True)
            continue
        run.log(**facts, loss=float(found["loss"][k]), updates=int(found["steps"][k]), right=float(found["score"][k]),
                recovered=bool(found["solved"][k]))  # fmt: skip
    run.record(method="latent_steer", init=dict(count=len(records), choice="vector", **hp))


def _sentence(tokenizer, record: dict, i: int, end: bool) -> tuple[list[int], int]:
    """(tokens from the first that the model reads to the last that it should write, number of them in the prompt)."""
    if not str(record.get("text", "")).strip():
        raise InputError(f"sentence {i + 1} is empty: give at least one word")
    prompt = record.get("prompt", "")
    (before,), (text,) = tokenizer.encode_prompts([prompt]), tokenizer.encode_after([prompt], [record["text"]])
    return before + text + ([tokenizer.eos] if end and tokenizer.eos is not None else []), len(before)


def find(
    model: LM,
    params: Params,
    control: LatentSteer,
    sentences: Sequence[tuple[Sequence[int], int]],
    z0: np.ndarray,
    how: Search,
    *,
    devices: Sequence[jax.Device] | None = None,
    keep: Path | None = None,
    save_every: float = 60.0,
) -> dict[str, np.ndarray]:
    """The vectors of sentences under `control`, with their loss, score, steps and solved, arrays [N, …] in order.

    Sentences of like length are searched together, and the blocks below the lowest site run once, since z does not
    reach them. Every device has sentences of its own.

    Args:
      sentences: (tokens, how many of them are the prompt). z0: float32 [N, d].
      how: the search. devices: all by default.
      keep: a directory in which an interrupted search is continued, with a checkpoint every `save_every` seconds.

    Raises:
      InputError: a sentence that does not fit into the model's context.
    """
    mesh = Mesh(np.asarray(list(devices or jax.devices())), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = control.replace(z=None, scale=None, basis=None, choice=None)
    params = processes.everywhere(model.unstack(params), everywhere)
    above, upper = model.above(params, split(shape, model.depth)[0])
    frozen = (upper, None if control.basis is None else processes.everywhere(control.basis, everywhere))
    longest = max((len(row) for row, _ in sentences), default=1)
    check_reads(model, longest - 1, f"The longest sentence has {longest} tokens")  # the last is a target only

    def rows_of(length, index, slots):
        tokens, mask = pad_rows([sentences[i][0] for i in index], length + 1, 0, left=False)
        first = np.asarray([sentences[i][1] for i in index], np.int32)
        counted = mask[:, 1:] & (np.arange(length)[None] >= first[:, None] - 1)
        parts = [slice(a, a + slots) for a in range(0, len(index), slots)]
        stream = [_lower(model, shape, params, tokens[part, :-1], mask[part, 1:]) for part in parts]
        return dict(stream=np.concatenate(stream), mask=mask[:, 1:], counted=counted, target=tokens[:, 1:], start=first)

    run, inputs = partial(_advance, model, shape, mesh, how), [len(row) - 1 for row, _ in sentences]
    return solve_by_length(run, z0, inputs, rows_of, frozen, how, above, mesh, keep=keep, save_every=save_every)


# Models, shapes (controls without arrays), meshes and searches are compared by value, so searches of one kind compile
# once.
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _advance(model: LM, shape: LatentSteer, mesh: Mesh, how: Search, search, start, rows, frozen):
    """`slot_search.advance` for the blocks above the lowest site."""
    k, moved = split(shape, model.depth)
    run = slot_search.over_mesh(
        mesh, objective=objective(model.above(None, k)[0], moved), tx=how.optimizer(), steps=how.updates,
        iterations=_ITERATIONS,
    )  # fmt: skip
    return run(search, start, rows, frozen)


@partial(jax.jit, static_argnums=(0, 1))
def _lower(model: LM, shape: LatentSteer, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The residual stream [B, T, D] at the lowest site."""
    k, _ = split(shape, model.depth)
    return model.apply(params, model.embed(params, tokens), mask, tap=lambda h: h, last=1).taps[k]
