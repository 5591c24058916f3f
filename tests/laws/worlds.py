"""Language models small enough to enumerate, and what can then be said exactly about any control."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import tree
from ctg_jax.control import IDENTITY, Chain, Control, enter
from ctg_jax.decode import loop
from ctg_jax.learn import train
from ctg_jax.learn.optimizer import optimizer, schedule
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.lm import Cache, Out
from ctg_jax.types import Prompts, Sampling


@dataclasses.dataclass(frozen=True)
class Bigram:
    """An LM whose next-token logits depend on the last token only: z = W h with h = one-hot + what controls add.

    One block that does nothing, so the sites are 0, 1, 2 (and 3 inside the block); width = vocab; parameters
    {"layers": {"none": [1, 1]}, "head": {"kernel": [V, V]}} where kernel[v, u] is the logit of v after u.
    """

    vocab: int = 3
    context: int = 32
    depth: int = 1
    kv_heads: int = 1
    head_dim: int = 1

    @property
    def width(self):
        return self.vocab

    def init(self, key):
        kernel = jax.random.normal(key, (self.vocab, self.vocab))
        return {"layers": {"none": jnp.zeros((1, 1))}, "head": {"kernel": kernel}}

    def unstack(self, params):
        if isinstance(params["layers"], tuple):
            return params
        return {**params, "layers": tree.unstack(params["layers"])}

    def init_cache(self, params, batch, length):
        empty = (jnp.zeros((batch, 1, length, 1)),)
        mask = jnp.zeros((batch, length), bool)
        return Cache(empty, empty, mask, jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))

    def embed(self, params, tokens):
        return jax.nn.one_hot(tokens, self.vocab)

    def unembed(self, params, h):
        return jnp.einsum("btu,vu->btv", h, params["head"]["kernel"])

    def apply(self, params, x, mask, cache=None, control=IDENTITY, state=(), tap=None, last=None, beside=False):
        pos = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        taps = []
        for site in (0, 3, 1, 2):
            x = control.hidden(x, site, pos, state)
            if tap and site != 3:
                taps.append(tap(x))
        seen = x if last is None else x[:, x.shape[1] - last :]
        return Out(self.unembed(params, seen), x, cache, tree.stack(taps) if tap else None)


def table(probabilities) -> dict:
    """Parameters of a `Bigram` with the given p[u][v], the probability of v after u."""
    kernel = jnp.log(jnp.asarray(probabilities, jnp.float32)).T
    return {"layers": {"none": jnp.zeros((1, 1))}, "head": {"kernel": kernel}}


def tiny(vocab: int = 11, depth: int = 2, **more) -> Transformer:
    """A GPT-2 of two blocks and width 16."""
    return Transformer.gpt2(vocab=vocab, width=16, depth=depth, heads=2, context=48, **more)


@functools.cache
def lively(lm: Transformer, seed: int = 0, factor: float = 12) -> dict:
    """Random parameters large enough that predictions differ between tokens and contexts."""

    def louder(x):
        return jnp.where(jnp.all(x == 1), x, x * factor) if x.ndim > 1 and x.shape[-1] > 1 else x

    return jax.jit(lambda key: jax.tree.map(louder, lm.init(key)))(jax.random.key(seed))


def prompts(rows: list[list[int]], length: int | None = None, seed: int = 0, cond=None) -> Prompts:
    """Left-padded prompts; row i has example id i."""
    length = length or max(map(len, rows))
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(len(rows)))
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask), keys, cond)


def enumerate_all(lm, params, prompt: list[int], n: int, control=IDENTITY) -> dict[tuple[int, ...], float]:
    """Every completion of n tokens -> its probability under the control, by `decode.score`."""
    every = np.array(list(itertools.product(range(lm.vocab), repeat=n)), np.int32)
    batch = prompts([prompt] * len(every))
    logp = loop.score(lm, params, batch, jnp.asarray(every), control)
    return dict(zip(map(tuple, every.tolist()), np.exp(np.asarray(logp, np.float64).sum(1)).tolist()))


def where_it_acts(lm, batch: Prompts, new: int, control: Control, before: Control | None = None) -> np.ndarray:
    """bool [2 L + 2, B, T + new]: the sites and tokens, of the prompt and a completion, whose state `control` changes,
    alone or behind another control that adds vectors before the prompt; never where the prompt is padded."""
    size, acts = batch.tokens.shape[1], []
    params = lm.init(jax.random.key(0))
    control = control.bind(params, params)
    x = jnp.zeros((*batch.tokens.shape, lm.width))
    state, more = control.init(batch, size + new), 0
    if before is None:
        x, mask, state = enter(control, x, batch.mask, state)
    else:
        both = Chain((before, control))
        x, mask, (_, state) = enter(both, x, batch.mask, (before.init(batch, size + new), state))
        more = before.added()
    mask = jnp.concatenate([mask, jnp.ones((len(mask), new), bool)], axis=1)
    h = jax.random.normal(jax.random.key(0), (*batch.tokens.shape, lm.width))
    h = jnp.concatenate([jnp.ones((len(h), more, lm.width)), h, jnp.flip(h, 1)[:, :new]], axis=1)
    pos = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    for site in range(2 * lm.depth + 2):
        acts.append(jnp.any(control.hidden(h, site, pos, state) != h, axis=-1)[:, more:] & mask[:, more:])
    return np.asarray(jnp.stack(acts))


def sequences(lm, n: int) -> np.ndarray:
    """Every completion of n tokens, int32 [V^n, n], in the order of `probabilities`."""
    return np.array(list(itertools.product(range(lm.vocab), repeat=n)), np.int32)


def probabilities(lm, params, prompt: list[int], n: int, control=IDENTITY) -> np.ndarray:
    """float64 [V^n], the probability of each of `sequences` under the control."""
    return np.array(list(enumerate_all(lm, params, prompt, n, control).values()))


def masked_bound(recover, rows: np.ndarray, mask: int, block: int = 0) -> np.ndarray:
    """float64 [N]: what `masked.nelbo` estimates for rows int [N, S], without a draw: over all sets of k of the n
    tokens of a block, the nats of these while they are masked, times ∫ t^(k-1) (1-t)^(n-k) dt = (k-1)! (n-k)! / n!.

    recover: (rows with masks, rows) -> the nats of what is masked, [N, S]. block: tokens of a block; 0: the whole row.
    """
    total, size = np.zeros(len(rows)), block or rows.shape[1]
    for start in range(0, rows.shape[1], size):
        places = range(start, min(start + size, rows.shape[1]))
        for k in range(1, len(places) + 1):
            share = math.factorial(k - 1) * math.factorial(len(places) - k) / math.factorial(len(places))
            for gone in itertools.combinations(places, k):
                x = np.array(rows)
                x[:, gone] = mask
                total += share * np.asarray(recover(x, rows), np.float64)[:, gone].sum(1)
    return total


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p ‖ q) in nats."""
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))


def written(prompt: list[int], completions: np.ndarray, **fields) -> dict:
    """A batch of completions [B, n] of one prompt, as `ctg_jax.data.completions` gives it."""
    rows = len(completions)
    tokens = np.tile(np.asarray(prompt, np.int32), (rows, 1))
    batch = {"tokens": tokens, "mask": np.ones_like(tokens, bool), "ids": np.arange(rows, dtype=np.int32)}
    batch |= {"completion": np.asarray(completions, np.int32), "written": np.ones(completions.shape, bool)}
    return {k: jnp.asarray(v) for k, v in (batch | fields).items()}


def trained(loss, control, frozen, batches: list, *, rate: float = 1e-2, trained: str = ".*"):
    """The control after one Adam update on each of the batches, at a rate that falls to 0, and the last metrics."""
    tx = optimizer(schedule(rate, "linear", steps=len(batches)), trained=trained)
    state, step = train.init_state(control, tx, jax.random.key(0)), jax.jit(train.make_step(loss, tx))
    metrics = {}
    for batch in batches:
        state, metrics = step(state, frozen, batch)
    assert bool(state.ok)
    return state.params, metrics


def written_on_paper(lm, make, prompt: int = 4, cond=None):
    """The shapes that the decode loop gives for one row under the control that `make(key)` gives, with no array made.

    cond: entries of `prompts.cond`, `jax.ShapeDtypeStruct`s [1, …].
    """
    batch = jax.eval_shape(lambda: prompts([[0] * prompt]))
    if cond is not None:
        batch = batch.replace(cond=cond)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    control = jax.eval_shape(make, jax.random.key(0))
    return jax.eval_shape(lambda p, b, c: loop.loop(lm, p, b, c, Sampling(max_new=2)), params, batch, control)
