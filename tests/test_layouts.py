"""The same training on every layout: one device, 8-way data, FSDP × tensor, pmap, and half on each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ctg_jax import rng, tree
from ctg_jax.control import IDENTITY
from ctg_jax.decode import loop
from ctg_jax.learn import losses, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.mesh.plan import Plan
from ctg_jax.mesh.rules import DECODER
from ctg_jax.models.decoder import Transformer
from ctg_jax.run import checkpoint
from ctg_jax.types import Prompts, Sampling

LM = Transformer.gpt2(vocab=32, width=16, depth=2, heads=4, context=12)
ONE = Plan()
DATA = Plan("jit", {"data": 8})
FSDP = Plan("jit", {"data": 4, "tensor": 2}, DECODER)
PMAP = Plan("pmap", {"data": 8})
# A key's bias has a gradient of exactly zero (softmax does not see it); with eps=1e-8 Adam would turn its rounding
# noise of 1e-9 into steps of 1e-6 to 1e-5 that mean nothing and that differ between layouts.
TX = optimizer(1e-2, decay=0.01, eps=1e-6)


def batches(n=4):
    r = np.random.default_rng(0)
    for i in range(n):
        lengths = np.array([12, 2, 3, 2, 11, 4, 2, 9, 2, 2, 10, 3, 12, 5, 2, 2])  # unequal over devices, by design
        yield {
            "tokens": r.integers(0, LM.vocab, (16, 12), np.int32),
            "mask": np.arange(12)[None, :] < lengths[:, None],
            "ids": np.arange(16 * i, 16 * i + 16, dtype=np.int32),
        }


def noisy(params, frozen, batch, keys):
    """A loss that draws a random number for every example, as dropout and diffusion do."""
    s = losses.lm_loss(LM)(params, frozen, batch, keys)
    noise = jax.vmap(lambda k: jax.random.normal(k, (LM.width,)))(keys)
    extra = jnp.sum(noise @ params["norm"]["bias"])
    return s.replace(total=s.total + extra, metrics={"noise": (jnp.sum(noise), jnp.float32(len(keys)))})


@functools.cache
def fresh():
    return jax.jit(lambda key: train.init_state(LM.init(key), TX, jax.random.key(7), ema=True))(jax.random.key(0))


@functools.cache
def compiled(plan, accumulate=1):
    make = functools.partial(train.make_step, noisy, TX, ema=0.9, accumulate=accumulate)
    return plan.compile(make, fresh(), None)


def run(plan, data, state=None, step=None):
    """(state, rows of metrics) after one step on each batch of data."""
    state = plan.place(jax.tree.map(jnp.copy, fresh() if state is None else state))
    step, rows = step or compiled(plan), []
    for batch in data:
        state, metrics = step(state, None, plan.put(batch))
        rows.append({k: float(v) for k, v in metrics.items()})
    return jax.device_get(state.replace(key=jax.random.key_data(state.key))), rows


def apart(a, b):
    return max(float(np.max(np.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def alone():
    return run(ONE, list(batches(3)))


@pytest.mark.parametrize("plan", [DATA, FSDP, PMAP], ids=["data8", "fsdp4xtensor2", "pmap8"])
def test_three_steps_equal_one_device(alone, plan):
    state, rows = run(plan, list(batches(3)))
    far = apart((state.params, state.ema), (alone[0].params, alone[0].ema))
    print(f"largest parameter difference from one device: {far:.1e}")
    assert far < 1e-5
    for got, want in zip(rows, alone[1], strict=True):
        # Adam and clipping hide gradients that are n times too large; their norm does not.
        np.testing.assert_allclose([got[k] for k in sorted(want)], [want[k] for k in sorted(want)], rtol=1e-4)


def test_a_run_may_move_from_pmap_to_a_mesh(tmp_path):
    data = list(batches(4))
    want, _ = run(ONE, data)
    half, _ = run(PMAP, data[:2])
    checkpoint.save(tmp_path / "c", half.replace(key=jax.random.wrap_key_data(half.key)))
    like = jax.eval_shape(fresh)
    state = checkpoint.load(tmp_path / "c", like, FSDP.shardings(like))
    assert len(state.params["layers"]["mlp"]["up"]["kernel"].sharding.device_set) == 8
    got, _ = run(FSDP, data[2:], state)
    far = apart(got.params, want.params)
    print(f"pmap x2, checkpoint, FSDP x tensor x2: {far:.1e}")
    assert far < 1e-5 and int(got.step) == 4


def test_the_mean_of_per_device_means_is_wrong(alone):
    def make(axis):
        def step(state, frozen, batch):
            def mean(p):
                keys = rng.per_example(jax.random.fold_in(state.key, state.step), batch["ids"])
                s = noisy(p, frozen, batch, keys)
                return s.total / s.weight

            grads = jax.lax.pmean(jax.grad(mean)(state.params), axis)
            updates, opt = TX.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return state.replace(step=state.step + 1, params=params, opt_state=opt), {}

        return step

    wrong, _ = run(PMAP, list(batches(3)), step=PMAP.compile(make, fresh(), None))
    assert apart(alone[0].params, wrong.params) > 1e-3


@pytest.mark.parametrize("plan", [ONE, FSDP], ids=["one", "fsdp4xtensor2"])
def test_accumulation_is_exact_with_unequal_masks(alone, plan):
    state, rows = run(plan, list(batches(3)), step=compiled(plan, accumulate=2))
    assert apart(state.params, alone[0].params) < 1e-5
    np.testing.assert_allclose(rows[-1]["grad_norm"], alone[1][-1]["grad_norm"], rtol=1e-4)
    assert rows[-1]["weight"] == alone[1][-1]["weight"]


@pytest.mark.parametrize("plan", [FSDP, PMAP], ids=["fsdp4xtensor2", "pmap8"])
def test_state_leaves_the_step_where_it_came_in(plan):
    """So that one program is compiled, and nothing is moved between steps."""
    state, step = plan.place(jax.tree.map(jnp.copy, fresh())), compiled(plan)
    want = tree.flatten(plan.shardings(state))
    state, _ = step(state, None, plan.put(next(batches(1))))
    for path, x in tree.flatten(state).items():
        assert x.sharding == want[path], path


def test_decoding_keeps_the_cache_split_over_rows_and_heads():
    """On FSDP × tensor, from where the weights lie alone: no device holds more than its part, and no token changes."""
    params = jax.jit(lambda key: jax.tree.map(lambda x: 8 * x, LM.unstack(LM.init(key))))(jax.random.key(3))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, LM.vocab, (8, 4)), jnp.int32)
    prompts = Prompts(tokens, jnp.ones(tokens.shape, bool), rng.per_example(jax.random.key(5), jnp.arange(8)))
    sampling = Sampling(max_new=8)
    want = loop.generate(LM, params, prompts, IDENTITY, sampling)
    placed, rows = FSDP.place(params), jax.device_put(prompts, NamedSharding(FSDP.mesh, PartitionSpec("data")))
    d = loop.begin(LM, placed, rows, IDENTITY, sampling)
    for cache in (*d.cache.k, *d.cache.v):
        assert cache.shape == (8, 4, 11, 4)
        assert cache.addressable_shards[0].data.shape == (2, 2, 11, 4)
    text = loop.loop.lower(LM, placed, rows, IDENTITY, sampling).compile().as_text()
    assert "f32[2,2,11,4]" in text and "f32[8,4,11,4]" not in text and "f32[2,4,11,4]" not in text
    # The weights stay where they are too: what meets is activations, for a token is few rows and a kernel many.
    kernel = "f32[64,16]"  # of the MLP, whole
    assert kernel not in text
    out = loop.generate(LM, placed, rows, IDENTITY, sampling)
    assert out.tokens.tolist() == want.tokens.tolist()
    np.testing.assert_allclose(out.logp, want.logp, atol=1e-4)
