"""Latent steering vectors: for each sentence a z that makes the frozen LM, with z added to its hidden states, say it.

Subramani, Suresh & Peters 2022 ("Extracting Latent Steering Vectors from Pretrained Language Models"). The same search
serves its predecessors: a z that is projected to the width of the model or mixed from parts by attention (Subramani,
Bowman & Cho 2019, a recurrent LM there), and one that stands in the attention's memory (Subramani & Suresh 2020).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctg_jax import rng
from ctg_jax.control import Control
from ctg_jax.controls import bricks
from ctg_jax.data.tokenizer import pad_rows
from ctg_jax.learn import slot_search
from ctg_jax.mesh import processes
from ctg_jax.models.lengths import check_reads
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, Params

STEPS = ("all", "first", "prompt")
STARTS = ("zero", "normal", "uniform")
_ITERATIONS = 16  # updates between two looks of the host at the search


@struct.dataclass
class LatentSteer(Control):
    """h + scale · z at the chosen sites and time steps, or z as keys and values that every token attends to.

    Attributes:
      z: float32 [d], or [N, d], of which each row takes the one that `prompts.cond[choice]` (int [B]) names.
      scale: float32 [] or [B].
      basis: float32 [d, width], fixed orthonormal rows that z goes through, or None where d is the width.
      sites: where it is added, see `sites`; none for the memory.
      steps: "all" tokens, the "first" one of the prompt, or those of the "prompt": as many as it has, which end where
        the completion begins, and none that a control put before them.
      parts: z is so many vectors, of which every token gets the mixture that its own state attends to.
      memory: (L, K, P, H) of the keys and values, or None.
    """

    z: jax.Array
    scale: jax.Array
    basis: jax.Array | None = None
    sites: tuple[int, ...] = struct.field(pytree_node=False, default=())
    steps: str = struct.field(pytree_node=False, default="all")
    parts: int = struct.field(pytree_node=False, default=1)
    memory: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    choice: str | None = struct.field(pytree_node=False, default=None)

    def init(self, prompts, length):
        if self.choice is None:
            z = jnp.broadcast_to(self.z[None], (prompts.tokens.shape[0], *self.z.shape))
        else:
            z = bricks.gathered(self.z, prompts, self.choice)
        size = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)
        return self.spread(z, size), bricks.per_row(self.scale, prompts, None)[:, 0]

    def check(self, prompts):
        if self.choice is not None:
            bricks.check_choice(prompts, self.choice, self.z.shape[0], "vector")

    def spread(self, z: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(float32 [B, parts, D], or [B, width of the memory]; int32 [B] each, where the prompt begins and ends) of z
        [B, d] and the number of tokens of each prompt, int32 [B], where nothing is before it."""
        full = z if self.basis is None else z @ self.basis
        return (full if self.memory else full.reshape(len(z), self.parts, -1)), jnp.zeros_like(size), size

    def began(self, state, start):
        (full, _, size), scale = state
        return (full, jnp.maximum(start - size, 0), start), scale

    def prefix(self, state):
        if self.memory is None:
            return None
        (full, *_), scale = state
        layers, heads, slots, width = self.memory
        both = (full * scale).reshape(-1, 2, layers, heads, slots, width)
        return both[:, 0].swapaxes(0, 1), both[:, 1].swapaxes(0, 1)

    def hidden(self, h, site, pos, state):
        if not self.sites or (isinstance(site, int) and site not in self.sites):
            return h
        (full, first, end), scale = state
        if (width := full.shape[-1]) != h.shape[-1]:
            raise InputError(
                f"The latent vector has width {width}, and the model {h.shape[-1]}: it was learned on another model."
            )
        push = full
        if self.parts > 1:
            weight = jax.nn.softmax(jnp.einsum("btd,bpd->btp", h.astype(jnp.float32), full), axis=-1)
            push = jnp.einsum("btp,bpd->btd", weight, full)
        if self.steps == "first":
            push = jnp.where((pos == first[:, None])[:, :, None], push, 0.0)
        elif self.steps == "prompt":
            push = jnp.where(((pos >= first[:, None]) & (pos < end[:, None]))[:, :, None], push, 0.0)
        if not isinstance(site, int):
            push = jnp.where(jnp.isin(site, jnp.asarray(self.sites)), push, 0.0)
        return h + (scale[:, :, None] * push).astype(h.dtype)


def sites(depth: int, site: str | int | Sequence) -> tuple[int, ...]:
    """Sites by name: "embeddings", "attention:l" and "block:l" (after the attention and after the MLP of block l =
    1 … L), "blocks" (after every block), "middle" (block ⌈L/2⌉), "final" (after the last norm), a number as in
    `ctg_jax.models.lm`, or several of them. "memory" has none.

    Raises:
      InputError: a name or number that is none of these.
    """
    if isinstance(site, (list, tuple)):
        return tuple(sorted({s for part in site for s in sites(depth, part)}))
    named = {"embeddings": (0,), "blocks": tuple(range(1, depth + 1)), "middle": (math.ceil(depth / 2),)}
    named |= {"final": (depth + 1,), "memory": ()}
    if site in named:
        return named[site]
    kind, _, block = str(site).partition(":")
    if kind in ("attention", "block") and block.isdigit() and 1 <= int(block) <= depth:
        return (int(block) + (depth + 1) * (kind == "attention"),)
    if isinstance(site, int) and 0 <= site <= 2 * depth + 1:
        return (site,)
    raise InputError(
        f"site is {site!r}, expected one of {', '.join(named)}, 'attention:l' or 'block:l' with l from 1 to {depth}, "
        f"or a number from 0 to {2 * depth + 1}."
    )


def init(
    lm: LM,
    key: jax.Array,
    *,
    count: int | None = None,
    site: str | int | Sequence = "middle",
    steps: str = "all",
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
      InputError: a site or a time step that does not exist, or a dimension that is too large.
    """
    if steps not in STEPS:
        raise InputError(f"steps is {steps!r}, expected one of {', '.join(STEPS)}.")
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
        steps=steps,
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
    """Mean negative log-likelihood of each row's own tokens, in nats; the share of them that is the most likely token;
    and whether all are, in which case greedy decoding says them. The rows hold stream [B, T, D] at the lowest site,
    mask and counted bool [B, T], target int [B, T], start int [B]; frozen is (params of `lm`, basis)."""

    def f(z, rows, frozen):
        params, basis = frozen
        c = control.replace(basis=basis)
        state = (c.spread(z, rows["start"]), jnp.ones((len(z), 1), jnp.float32))
        logits = lm.apply(params, rows["stream"], rows["mask"], control=c, state=state).logits
        chosen = jnp.take_along_axis(logits, rows["target"][..., None], axis=-1)[..., 0]
        count = jnp.sum(rows["counted"], axis=1)
        nll = jnp.where(rows["counted"], jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
        right = (jnp.argmax(logits, axis=-1) == rows["target"]) | ~rows["counted"]
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
    steps: str = "all",
    dim: int | None = None,
    parts: int = 1,
    slots: int = 1,
    start: str = "zero",
    rate: float = 0.1,
    decay: float = 0.9,
    patience: int = 20,
    updates: int = 500,
    tokens: int | None = None,
    end: bool = True,
    batch: int | None = None,
    memory: float = 1.0,
    seed: int = 0,
) -> None:
    """Stage: a `LatentSteer` with a bank z [N, d], of which row i belongs to record i of the data and is chosen by
    `prompts.cond["vector"]`; metrics.jsonl holds for every record its loss, updates, the share of its tokens that are
    the most likely ones (`right`) and whether all are (`recovered`).

    Args:
      data: records with `text`, and `prompt` where the text is said after one.
      site, steps, dim, parts, slots: see `init`.
      start: z at first: "zero", "normal" (variance 2 / (d + 1): Glorot & Bengio 2010) or "uniform" (of the same).
      rate, decay, patience: of Adam, its factor whenever the loss has not fallen for so many updates.
      updates: at most so many for a sentence; it stops earlier when it is recovered.
      tokens: sentences with more are left out (their z stays zero, their record says so); by default one that does not
        fit into the model's context is an error.
      end: whether the end-of-text token is learned too, so that decoding ends by itself.
      batch: sentences at work at once; by default as many as fit into `memory`, in GiB.

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
    hp = dict(site=site, steps=steps, dim=dim, parts=parts, slots=slots)
    control = init(model, jax.random.key(seed), **hp)
    z0 = starts(jax.random.key(seed), np.arange(len(records)), control.z.shape[-1], start)
    found = search(model, params, control, [sentences[i] for i in kept], z0[np.asarray(kept, int)],
                   rate=rate, decay=decay, patience=patience, updates=updates, batch=batch, memory=memory,
                   keep=run.path / "partial")  # fmt: skip
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
    """(tokens from the first that the model reads to the last that it shall say, how many of them are the prompt)."""
    if not str(record.get("text", "")).strip():
        raise InputError(f"sentence {i + 1} is empty: give at least one word")
    prompt = record.get("prompt", "")
    (before,), (text,) = tokenizer.encode_prompts([prompt]), tokenizer.encode_after([prompt], [record["text"]])
    return before + text + ([tokenizer.eos] if end and tokenizer.eos is not None else []), len(before)


def starts(key: jax.Array, ids: np.ndarray, dim: int, how: str) -> np.ndarray:
    """Where each z begins, float32 [N, d]: a function of the key and the example's id alone; see `latent_steer`."""
    if how not in STARTS:
        raise InputError(f"start is {how!r}, expected one of {', '.join(STARTS)}.")
    if how == "zero" or not len(ids):
        return np.zeros((len(ids), dim), np.float32)
    draw = jax.random.normal if how == "normal" else lambda k, shape: jax.random.uniform(k, shape, minval=-1) * 3**0.5
    keys = rng.per_example(rng.stream(key, "start"), ids)
    return np.asarray(jax.vmap(lambda k: draw(k, (dim,)))(keys)) * (2 / (dim + 1)) ** 0.5


def search(
    model: LM,
    params: Params,
    control: LatentSteer,
    sentences: Sequence[tuple[Sequence[int], int]],
    z0: np.ndarray,
    *,
    rate: float = 0.1,
    decay: float = 0.9,
    patience: int = 20,
    updates: int = 500,
    batch: int | None = None,
    memory: float = 1.0,
    devices: Sequence[jax.Device] | None = None,
    keep: Path | None = None,
    save_every: float = 60.0,
) -> dict[str, np.ndarray]:
    """The vectors of sentences under `control`, with their loss, score, steps and solved, arrays [N, …] in order.

    Sentences of like length are searched together, and the blocks below the lowest site run once, since z does not
    reach them. Every device has sentences of its own.

    Args:
      sentences: (tokens, how many of them are the prompt). z0: float32 [N, d].
      devices: all by default. keep: a directory; a search that was cut short goes on from there, in mid-chunk.
      the others: see `latent_steer`.
    """
    from tqdm import tqdm

    mesh = Mesh(np.asarray(list(devices or jax.devices())), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = control.replace(z=None, scale=None, basis=None, choice=None)
    tx, run, lower = _programs(model, shape, mesh, rate, decay, patience, updates)
    params = processes.everywhere(model.unstack(params), everywhere)
    above, upper = model.above(params, split(shape, model.depth)[0])
    frozen = (upper, None if control.basis is None else processes.everywhere(control.basis, everywhere))

    longest = max((len(row) for row, _ in sentences), default=1)
    check_reads(model, longest - 1, f"The longest sentence has {longest} tokens")  # the last is a target only
    n, d = z0.shape
    out = {"z": np.zeros((n, d), np.float32), "loss": np.zeros(n, np.float32), "score": np.zeros(n, np.float32)}
    out |= {"steps": np.zeros(n, np.int32), "solved": np.zeros(n, bool)}
    done = 0
    with tqdm(total=n, desc="latent vectors", unit="sentence", disable=None, leave=False) as bar:
        for length, index in slot_search.chunks(above.width, [len(row) - 1 for row, _ in sentences], memory):
            finished = None if keep is None else keep / f"chunk-{length}-{index[0]}"
            if finished is not None and (finished / checkpoint.MANIFEST).exists():
                part = checkpoint.load(finished)
            else:
                tokens, mask = pad_rows([sentences[i][0] for i in index], length + 1, 0, left=False)
                first = np.asarray([sentences[i][1] for i in index], np.int32)
                counted = mask[:, 1:] & (np.arange(length)[None] >= first[:, None] - 1)
                slots = batch or slot_search.fitting(above, length, memory)
                stream = [lower(params, tokens[a : a + slots, :-1], mask[a : a + slots, 1:])
                          for a in range(0, len(index), slots)]  # fmt: skip
                rows = dict(stream=np.concatenate(stream), mask=mask[:, 1:], counted=counted, target=tokens[:, 1:],
                            start=first)  # fmt: skip
                part = slot_search.solve(
                    run, z0[index], rows, frozen, tx, slots, mesh,
                    keep=None if keep is None else keep / "search", save_every=save_every,
                    progress=lambda m, done=done: bar.update(done + m - bar.n),
                )  # fmt: skip
                if finished is not None:
                    checkpoint.save(finished, part)
                    shutil.rmtree(keep / "search", ignore_errors=True)
            for name, values in out.items():
                values[index] = part[name]
            done += len(index)
            bar.update(done - bar.n)
    return out


@lru_cache(maxsize=32)
def _programs(model: LM, shape: LatentSteer, mesh: Mesh, rate: float, decay: float, patience: int, updates: int):
    """(optimizer, `invert.advance` for the blocks above the lowest site, the stream there); kept, so that searches of
    the same kind compile once. `shape` is a control without arrays."""
    k, moved = split(shape, model.depth)
    tx = optax.chain(
        optax.scale_by_adam(),
        optax.contrib.reduce_on_plateau(factor=decay, patience=patience, min_scale=1e-2),
        optax.scale(-rate),
    )
    find = objective(model.above(None, k)[0], moved)
    run = slot_search.compile_advance(mesh, objective=find, tx=tx, steps=updates, iterations=_ITERATIONS)
    lower = jax.jit(lambda p, t, m: model.apply(p, model.embed(p, t), m, tap=lambda h: h, last=1).taps[k])
    return tx, run, lower
