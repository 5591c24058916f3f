"""The same training on every layout: one device, 8-way data, FSDP × tensor, pmap, and half on each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctg_jax import checkpoint, losses, train, tree
from ctg_jax.models.transformer import Transformer
from ctg_jax.parallel import DECODER, Plan

LM = Transformer.gpt2(vocab=32, width=16, depth=2, heads=4, context=12)
ONE = Plan()
DATA = Plan("jit", {"data": 8})
FSDP = Plan("jit", {"data": 4, "tensor": 2}, DECODER)
PMAP = Plan("pmap", {"data": 8})
TX = train.optimizer(1e-2, decay=0.01)


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


def fresh(tx):
    return train.init_state(LM.init(jax.random.key(0)), tx, jax.random.key(7), ema=True)


def run(plan, data, state=None, tx=TX, make=None, **options):
    state = plan.place(jax.tree.map(jnp.copy, fresh(tx) if state is None else state))
    make = make or functools.partial(train.make_step, noisy, tx, ema=0.9, **options)
    step, rows = plan.compile(make, state, None), []
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


@pytest.mark.parametrize("plan", [FSDP, PMAP], ids=["fsdp4xtensor2", "pmap8"])
def test_plain_gradient_descent_is_as_near(plan):
    data = list(batches(2))
    a, _ = run(ONE, data, tx=optax.sgd(0.1))
    b, _ = run(plan, data, tx=optax.sgd(0.1))
    assert apart(a.params, b.params) < 1e-5


def test_a_run_may_move_from_pmap_to_a_mesh(tmp_path):
    data = list(batches(4))
    want, _ = run(ONE, data)
    half, _ = run(PMAP, data[:2])
    checkpoint.save(tmp_path / "c", half.replace(key=jax.random.wrap_key_data(half.key)))
    like = jax.eval_shape(lambda: fresh(TX))
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
                s = losses.lm_loss(LM)(p, frozen, batch, None)
                return s.total / s.weight

            grads = jax.lax.pmean(jax.grad(mean)(state.params), axis)
            updates, opt = TX.update(grads, state.opt_state, state.params)
            return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt), {}

        return step

    def exact(axis):
        return train.make_step(losses.lm_loss(LM), TX, axis=axis)

    data = list(batches(3))
    want, _ = run(ONE, data, make=exact)
    right, _ = run(PMAP, data, make=exact)
    wrong, _ = run(PMAP, data, make=make)
    assert apart(want.params, right.params) < 1e-5
    assert apart(want.params, wrong.params) > 1e-3


@pytest.mark.parametrize("plan", [ONE, FSDP, PMAP], ids=["one", "fsdp4xtensor2", "pmap8"])
def test_accumulation_is_exact_with_unequal_masks(alone, plan):
    state, rows = run(plan, list(batches(3)), accumulate=2)
    assert apart(state.params, alone[0].params) < 1e-5
    np.testing.assert_allclose(rows[-1]["grad_norm"], alone[1][-1]["grad_norm"], rtol=1e-4)
    assert rows[-1]["weight"] == alone[1][-1]["weight"]


def test_sharded_state_stays_sharded():
    state = FSDP.place(fresh(TX))
    step = FSDP.compile(functools.partial(train.make_step, noisy, TX), state, None)
    want = tree.flatten(FSDP.shardings(state))
    for batch in batches(2):
        state, _ = step(state, None, FSDP.put(batch))
    for path, x in tree.flatten(state).items():
        assert x.sharding.is_equivalent_to(want[path], x.ndim), path
