"""Block diffusion: one reading of a text twice over is its blocks one by one; the bound is exact for exact conditionals
and lies between an autoregressive model and masked diffusion; samples of a small network have the distribution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax.decode import strategies
from ctg_jax.learn import masked_classifier
from ctg_jax.learn.diffusion_losses import Objective, masked_loss
from ctg_jax.methods import mdlm
from ctg_jax.models import masked
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError, Sampling

V, N = 3, 4
LM = worlds.Bigram(V)
PARAMS = worlds.table([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.1, 0.4]])
EVERY = worlds.sequences(LM, N)
TRUTH = worlds.probabilities(LM, PARAMS, [0], N)
TRUTH = TRUTH / TRUTH.sum()


def network(block, context=5):
    return Transformer.gpt2(vocab=V + 1, width=8, depth=2, heads=2, context=context, causal=False, block=block)


def recover(block, joint=True):
    """The nats of the true conditionals of each block, given those before it: of each token given the others of its
    block too, or as if its block had no other."""
    part = np.arange(N) // (block or N)
    rows = worlds.sequences(worlds.Bigram(V + 1), N)
    agree = EVERY[:, None] == EVERY[None]  # [texts, other texts, N]
    fits_x = (rows[:, None] == V) | (rows[:, None] == EVERY[None])  # [rows, texts, N]
    table = np.zeros((len(rows), len(EVERY), N), np.float32)
    for n in range(N):
        fits = np.all(agree | (part >= part[n]), axis=2)[None]
        if joint:
            fits = fits & np.all(fits_x | (part != part[n]), axis=2)[:, None]
        right = fits * (EVERY[:, n][:, None] == EVERY[:, n])
        with np.errstate(divide="ignore", invalid="ignore"):  # a row that is no partly masked version of the text
            nats = np.log(fits @ TRUTH) - np.log(right @ TRUTH)
        table[:, :, n] = np.where((rows[:, n] == V)[:, None], nats, 0)
    table = jnp.asarray(table)
    return lambda x, truth: table[x @ (V + 1) ** np.arange(N)[::-1], truth @ V ** np.arange(N)[::-1]]


@pytest.mark.parametrize("block", [1, 3])
def test_one_reading_is_every_block_read_after_those_before_it(block):
    """Blocks of 3 leave two tokens for the last."""
    net = network(block)
    params = worlds.lively(net)
    r = np.random.default_rng(0)
    truth = r.integers(0, V, (6, 5))
    x = np.where(r.uniform(size=(6, 5)) < 0.6, V, truth)
    twice = jax.jit(lambda x, truth: masked.recovery(net, params, x, truth))
    alone = jax.jit(lambda x, truth: masked.nats(masked.denoise(net, params, x), x, truth))
    found = np.asarray(twice(x, truth))
    part = np.arange(5) // block
    for b in range(part.max() + 1):
        row = np.where(part < b, truth, np.where(part == b, x, V))
        nats = np.asarray(alone(row, truth))
        np.testing.assert_allclose(found[:, part == b], nats[:, part == b], rtol=1e-4, atol=1e-5)
    other = np.where(part > 0, (truth + 1) % V, truth)  # what comes later is not seen
    again = np.asarray(twice(np.where(x == V, V, other), other))
    np.testing.assert_allclose(again[:, part == 0], found[:, part == 0], rtol=1e-4, atol=1e-5)


def test_a_single_block_is_masked_diffusion():
    whole, blocks = network(0), network(8)
    params = worlds.lively(whole)
    truth = jnp.asarray(np.random.default_rng(1).integers(0, V, (4, 5)))
    x = jnp.where(jnp.arange(5)[None] % 2 == 0, V, truth)
    a, b = (jax.jit(functools.partial(masked.recovery, net))(params, x, truth) for net in (blocks, whole))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_the_bound_is_tight_for_exact_conditionals(block):
    keys = jax.random.split(jax.random.key(1), 4096)
    rows = jnp.broadcast_to(jnp.asarray(EVERY[37])[None], (len(keys), N))
    nats = np.asarray(masked.nelbo(recover(block), rows, keys, V, draws=16, block=block), np.float64)
    assert abs(nats.mean() + np.log(TRUTH[37])) < 4 * nats.std() / len(keys) ** 0.5 < 0.15


def test_smaller_blocks_are_nearer_to_an_autoregressive_model():
    """Of a denoiser that takes the tokens of a block for independent."""
    keys = jax.random.split(jax.random.key(2), 8192)
    rows = jnp.asarray(EVERY[np.random.default_rng(3).choice(len(EVERY), len(keys), p=TRUTH)])
    bound = {}
    for block in (1, 2, 4):
        bound[block] = float(jnp.mean(masked.nelbo(recover(block, joint=False), rows, keys, V, draws=4, block=block)))
    entropy = -float(TRUTH @ np.log(TRUTH))
    assert bound[1] == pytest.approx(entropy, abs=0.05) and bound[1] + 0.1 < bound[2] < bound[4] - 0.1


def test_times_of_an_interval_mask_that_share_and_blocks_have_times_of_their_own():
    keys, tokens = jax.random.split(jax.random.key(3), 2000), jnp.zeros((2000, N), jnp.int32)
    seen = []

    def record(x, truth):
        seen.append(np.asarray(x == V))
        return jnp.zeros(x.shape)

    masked.nelbo(record, tokens, keys, V, schedule="loglinear", block=1, interval=(0.6, 0.8))
    assert seen[0].mean() == pytest.approx(0.7, abs=0.02)
    masked.nelbo(record, tokens, keys, V, schedule="loglinear", block=2)
    assert seen[1].mean() == pytest.approx(0.5, abs=0.02)
    first, second = seen[1][:, :2].mean(1), seen[1][:, 2:].mean(1)
    assert np.corrcoef(first, second)[0, 1] < -0.2  # their times are half of the interval apart


def test_a_small_network_of_blocks_learns_a_distribution():
    """Rows of three tokens in blocks of two; with the first given, the others have the conditional distribution."""
    n = 3
    every, truth = worlds.sequences(LM, n), worlds.probabilities(LM, PARAMS, [0], n)
    truth = truth / truth.sum()
    control = mdlm.init(LM, jax.random.key(0), width=16, depth=1, heads=2, length=n, net=dict(block=2))
    r, batches = np.random.default_rng(0), []
    for _ in range(600):
        tokens = jnp.asarray(every[r.choice(len(every), 64, p=truth)])
        batches.append({"tokens": tokens, "mask": tokens >= 0, "ids": jnp.arange(64, dtype=jnp.int32)})
    objective = Objective(block=2)
    params, _ = worlds.trained(masked_loss(control.net, 0, objective), control.params, {}, batches)
    control = control.replace(params=params)
    of_net = jax.jit(functools.partial(masked.recovery, control.net, params))
    entropy = -truth @ np.log(truth)
    bound, keys = worlds.masked_bound(of_net, every, V, block=2), jax.random.split(jax.random.key(2), 4096)
    assert entropy - 1e-5 < truth @ bound < entropy + 0.05
    some = r.choice(len(every), 4096, p=truth)
    off = jax.jit(lambda: masked.nelbo(of_net, jnp.asarray(every[some]), keys, V, draws=16, block=2))() - bound[some]
    assert abs(off.mean()) < 4 * off.std() / 64 < 0.06
    for given, fits in ((0, np.ones(len(every), bool)), (1, every[:, 0] == 1)):
        first = jnp.full((4096, n), 1)
        found, _ = mdlm.infill(control, first, jnp.broadcast_to(jnp.arange(n)[None] < given, first.shape), keys)
        share = np.bincount(np.asarray(found) @ V ** np.arange(n)[::-1], minlength=27) / 4096
        assert np.abs(share - truth * fits / truth[fits].sum()).sum() / 2 < 0.08


def test_its_classifier_reads_rows_as_they_are_while_they_are_written(monkeypatch):
    """Blocks before one are written, those after it are not."""
    net, seen = network(2, context=6), []
    monkeypatch.setattr(masked, "features", lambda net, params, x: (jnp.zeros((len(x), 1)), None))
    monkeypatch.setattr(Transformer, "embed", lambda self, params, x: jax.debug.callback(seen.append, x) or x)
    tokens = np.ones((400, 6), np.int32)
    batch = {"tokens": tokens, "mask": tokens > 0, "label": tokens[:, 0], "ids": np.arange(400, dtype=np.uint32)}
    masked_classifier.read(net, {}, [batch], 0, masked_classifier.Regression(views=1), 0)
    jax.effects_barrier()
    gone = np.asarray(seen[0]) == V
    share = gone.reshape(400, 3, 2).mean(2)
    assert np.all(share[:, 1:] >= np.ceil(share[:, :-1]))
    np.testing.assert_allclose(share.mean(0), [1 / 6, 1 / 2, 5 / 6], atol=0.06)


def test_bad_input():
    with pytest.raises(InputError, match=r"objective\.block is 2, which the kind 'film' does not have"):
        Objective(kind="film", block=2)
    with pytest.raises(InputError, match=r"objective\.interval is \(0.3, 0.8\), which the kind 'film'"):
        Objective(kind="film", interval=(0.3, 0.8))
    with pytest.raises(InputError, match=r"objective\.block is 0, but the network has blocks of 2"):
        masked_loss(network(2), 0)
    with pytest.raises(InputError, match="block is 2, expected 0, or with causal=False"):
        dataclasses.replace(network(2), causal=True)
    with pytest.raises(InputError, match=r"order\.block is 3, but the network writes blocks of 2: leave it at 0"):
        mdlm.init(LM, jax.random.key(0), net=dict(block=2), block=3)
    row, keys = jnp.zeros((1, N), jnp.int32), jax.random.split(jax.random.key(0), 1)
    with pytest.raises(InputError, match=r"interval is \(0.8, 0.6\)"):
        masked.nelbo(recover(1), row, keys, V, interval=(0.8, 0.6))
    control = mdlm.init(LM, jax.random.key(0), width=8, depth=1, heads=2, length=6, net=dict(block=2))
    prompts = worlds.prompts([[1, 2]]).replace(cond={"words": jnp.array([[-1, 1]])})
    with pytest.raises(InputError, match="the network writes blocks of 2 tokens and does not see what is behind"):
        strategies.run(LM, {}, prompts, control, Sampling(max_new=4))
