"""The train step, the optimizer factory and the loop: what stops it, what it keeps, where it goes on."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from ctg_jax.control import Control
from ctg_jax.learn import train
from ctg_jax.learn.optimizer import optimizer, schedule
from ctg_jax.mesh.plan import Plan
from ctg_jax.run import checkpoint
from ctg_jax.types import InputError, Sum


@struct.dataclass
class Line(Control):
    slope: jax.Array
    norm: jax.Array
    degree: int = struct.field(pytree_node=False, default=1)


def squares(params, frozen, batch, keys):
    """Masked squared error of a line, with a little noise per example."""
    noise = jax.vmap(jax.random.normal)(keys)
    error = params.slope * batch["x"] + params.norm + 0.01 * noise - batch["y"]
    mask = batch["mask"]
    return Sum(jnp.sum(jnp.where(mask, error**2, 0)), jnp.sum(mask, dtype=jnp.float32))


class Batches:
    """An endless stream with a position, as the data pipeline has."""

    def __init__(self, bad=None, end=None):
        self.at, self.bad, self.end, self.seen = 0, bad, end, []

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.end:
            raise StopIteration
        i, self.at = self.at, self.at + 1
        self.seen.append(i)
        r = np.random.default_rng(i)
        x = r.normal(size=8).astype(np.float32)
        y = 2 * x + 1 if i != self.bad else np.full(8, np.nan, np.float32)
        return {"x": x, "y": y, "mask": r.random(8) < 0.7, "ids": np.arange(8 * i, 8 * i + 8, dtype=np.int32)}

    def get_state(self):
        return {"next": self.at}

    def set_state(self, state):
        self.at = state["next"]


TX = optimizer(0.1, clip=None)


def fresh(tx=TX, **options):
    return train.init_state(Line(jnp.float32(0.0), jnp.float32(0.0)), tx, jax.random.key(0), **options)


def loop(path, batches, *, steps=20, tx=TX, state=None, **options):
    options = {"save_every": 5, "progress": False} | options
    state = fresh(tx) if state is None else state
    return train.loop(path, state, train.make_step(squares, tx), batches, steps=steps, **options)


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def values(state):
    return jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))


def equal(a, b):
    for x, y in zip(jax.tree.leaves(values(a)), jax.tree.leaves(values(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_learns_and_leaves_the_callers_state_alone(tmp_path):
    state = fresh()
    end = loop(tmp_path, Batches(), steps=150, state=state)
    np.testing.assert_allclose((end.params.slope, end.params.norm), (2.0, 1.0), atol=0.05)
    assert float(state.params.slope) == 0.0 and int(end.step) == 150
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 151))
    assert rows(tmp_path)[-1]["loss"] < 0.01 < rows(tmp_path)[0]["loss"]
    assert checkpoint.saved_steps(tmp_path / "steps") == [145, 150]


@pytest.mark.parametrize("stateful", [True, False])
def test_going_on_equals_never_having_stopped(tmp_path, stateful):
    def data():
        return Batches() if stateful else iter([next(b) for b in [Batches()] for _ in range(20)])

    whole = loop(tmp_path / "a", data())
    loop(tmp_path / "b", data(), steps=13, log_every=1)
    again = Batches() if stateful else data()
    parts = loop(tmp_path / "b", again)
    equal(whole, parts)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    if stateful:
        assert again.seen == list(range(13, 20))
    equal(loop(tmp_path / "b", Batches()), whole)  # finished: nothing runs
    assert len(rows(tmp_path / "b")) == 20


def test_a_damaged_last_step_is_done_again(tmp_path, caplog):
    whole = loop(tmp_path / "a", Batches(), steps=12)
    loop(tmp_path / "b", Batches(), steps=12)
    bad = max((tmp_path / "b/steps/00000012/arrays").rglob("d/*"), key=lambda p: p.stat().st_size)
    raw = bytearray(bad.read_bytes())
    raw[-3] ^= 4
    bad.write_bytes(raw)
    data = Batches()
    equal(loop(tmp_path / "b", data, steps=12), whole)
    assert data.seen == [10, 11] and bad.name in caplog.text
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    checkpoint.load(tmp_path / "b/steps/00000012")


@pytest.mark.parametrize("bad", [0, 7, 16])
def test_nan_stops_with_one_sentence_and_keeps_the_last_good_step(tmp_path, bad):
    good = loop(tmp_path / "a", Batches(), steps=bad) if bad else fresh()
    with pytest.raises(train.TrainingError, match=rf"stopped at step {bad + 1}: loss is nan.*step {bad}, is kept"):
        loop(tmp_path / "b", Batches(bad=bad), save_every=0, steps=30)
    assert [r["step"] for r in rows(tmp_path / "b")] == list(range(1, bad + 1))
    step, state, _ = checkpoint.load_last(tmp_path / "b/steps", fresh())
    assert step == bad and bool(state.ok)
    equal(state, good)
    mended = loop(tmp_path / "b", Batches(), steps=20)  # the same data without the NaN
    equal(mended, loop(tmp_path / "c", Batches(), steps=20))


def test_a_bad_step_changes_nothing_but_ok():
    step, b = jax.jit(train.make_step(squares, TX)), Batches(bad=1)
    one, _ = step(fresh(ema=True), None, next(b))
    two, metrics = step(one, None, next(b))
    three, _ = step(two, None, next(b))
    assert not metrics["ok"] and not three.ok
    equal(one, three.replace(ok=one.ok))


def test_batches_that_end_early_are_an_error_after_saving(tmp_path):
    with pytest.raises(InputError, match="ended after 7 steps and steps is 20"):
        loop(tmp_path, Batches(end=7))
    assert checkpoint.saved_steps(tmp_path / "steps") == [5, 7]
    equal(loop(tmp_path, Batches()), loop(tmp_path / "other", Batches()))


def test_log_every_and_tensorboard(tmp_path):
    loop(tmp_path, Batches(), steps=10, log_every=4, boards=["tensorboard"])
    assert [r["step"] for r in rows(tmp_path)] == [4, 8, 10]
    assert set(rows(tmp_path)[0]) == {"step", "loss", "weight", "grad_norm"}
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_state_of_another_shape_is_refused(tmp_path):
    loop(tmp_path, Batches(), steps=2)
    other = train.init_state(Line(jnp.zeros(3), jnp.float32(0)), TX, jax.random.key(0))
    with pytest.raises(InputError, match=r"'(params/slope|opt_state/.*)' is float32\[\] where float32\[3\]"):
        loop(tmp_path, Batches(), state=other)


def test_ema_by_hand():
    tx = optax.sgd(0.5)
    step, state, b = train.make_step(squares, tx, ema=0.15), fresh(tx, ema=True), Batches()
    slopes = [0.0]
    for _ in range(2):
        state, _ = jax.jit(step)(state, None, next(b))
        slopes.append(float(state.params.slope))
    want = 0.15 * (0.1 * slopes[0] + 0.9 * slopes[1]) + 0.85 * slopes[2]  # decays: 1/10, then 2/11 cut to 0.15
    np.testing.assert_allclose(state.ema.slope, want, rtol=1e-6)


@pytest.mark.parametrize("updates, constant", [(100, 0.905), (600, 0.549), (2000, 0.135)])
def test_the_average_forgets_the_random_start(updates, constant):
    """A start at 1 and an update to 0, where the parameter stays, so that the average is the weight of the start."""
    assert 0.999**updates == pytest.approx(constant, abs=5e-4)  # what a constant decay leaves
    tx = optax.sgd(1.0)
    step = train.make_step(lambda p, frozen, batch, keys: Sum(0.5 * p["x"] ** 2, jnp.float32(1)), tx)
    state = train.init_state({"x": jnp.ones(())}, tx, jax.random.key(0), ema=True)

    def update(state, _):
        state, _ = step(state, None, {"ids": jnp.arange(1)})
        return state, state.ema["x"]

    state, kept = jax.jit(lambda s: jax.lax.scan(update, s, length=updates))(state)
    assert int(state.step) == updates and float(state.params["x"]) == 0
    assert float(kept[0]) == pytest.approx(0.1)  # the first decay is 1/10
    assert 0 <= float(kept[-1]) < 1e-12
    # Held at 1, the average is 1: its weights add up to 1 after any number of updates.
    ones = train.averaged({"x": jnp.ones(())}, {"x": jnp.ones(())}, jnp.int32(updates), 0.999)
    assert float(ones["x"]) == 1.0


def test_the_average_of_bfloat16_moves():
    """Steps of a thousandth are lost in bfloat16: the average is float32 whatever the parameters are."""
    state = train.init_state({"x": jnp.ones((), jnp.bfloat16)}, TX, jax.random.key(0), ema=True)
    found = train.averaged(state.ema, {"x": jnp.zeros((), jnp.bfloat16)}, jnp.int32(10**6), 0.999)
    assert float(found["x"]) == pytest.approx(0.999)


def test_an_average_goes_on_where_it_was_cut(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    end = loop(whole, Batches(), state=fresh(ema=True))
    loop(parts, Batches(), steps=7, state=fresh(ema=True))
    equal(loop(parts, Batches(), state=fresh(ema=True)), end)


def test_the_mean_is_over_the_weight_and_an_empty_mask_moves_nothing():
    step = jax.jit(train.make_step(squares, optax.sgd(1.0)))
    batch = next(Batches())
    state, metrics = step(fresh(optax.sgd(1.0)), None, batch | {"mask": np.zeros(8, bool)})
    assert metrics["weight"] == 0 and metrics["loss"] == 0 and float(state.params.slope) == 0
    _, metrics = step(fresh(optax.sgd(1.0)), None, batch)
    want = np.mean((batch["y"] ** 2)[batch["mask"]])
    np.testing.assert_allclose(metrics["loss"], want, rtol=0.05)


def test_randomness_follows_the_example_and_the_step():
    step = jax.jit(train.make_step(squares, optax.sgd(0.0)))
    batch = next(Batches()) | {"mask": np.ones(8, bool)}
    turned = {k: v[::-1] for k, v in batch.items()}
    state = fresh(optax.sgd(0.0))
    after, a = step(state, None, batch)
    _, b = step(state, None, turned)
    _, c = step(after, None, batch)
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    assert abs(float(a["loss"] - c["loss"])) > 1e-6


def test_bad_batches_and_states_are_said():
    step, batch = train.make_step(squares, TX), next(Batches())
    with pytest.raises(InputError, match="lacks 'ids'"):
        step(fresh(), None, {"x": batch["x"]})
    with pytest.raises(InputError, match="accumulate is 3"):
        train.make_step(squares, TX, accumulate=3)(fresh(), None, batch)
    with pytest.raises(InputError, match="'slope' has type int32"):
        train.init_state(Line(jnp.int32(1), jnp.float32(0)), TX, jax.random.key(0))


def test_schedules_by_hand():
    rate = schedule(1.0, "linear", warmup=2, steps=6, final=0.5)
    np.testing.assert_allclose([rate(i) for i in range(8)], [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.5], rtol=1e-6)
    rate = schedule(2.0, "cosine", steps=4)
    np.testing.assert_allclose([rate(i) for i in (0, 2, 4, 9)], [2, 1, 0, 0], atol=1e-6)
    rate = schedule(0.3, warmup=3)
    np.testing.assert_allclose([rate(i) for i in (0, 1, 3, 99)], [0, 0.1, 0.3, 0.3], rtol=1e-6)
    with pytest.raises(InputError, match="expected 'constant', 'linear' or 'cosine'"):
        schedule(1.0, "cosin")
    with pytest.raises(InputError, match="needs steps above warmup=5, found steps=None"):
        schedule(1.0, "linear", warmup=5)


def test_optimizer_clips_decays_and_freezes_by_path():
    params = {"up": {"kernel": jnp.ones(4)}, "norm": {"scale": jnp.ones(4)}, "bias": jnp.ones(4)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = optimizer(0.1, decay=0.5)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["up"]["kernel"], np.full(4, -0.05), rtol=1e-6)
    assert not updates["norm"]["scale"].any() and not updates["bias"].any()

    tx = optimizer(0.1, trained=r"up/.*", decay=0.5)
    ones = jax.tree.map(lambda x: jnp.full_like(x, 100.0), params)
    state = tx.init(params)
    updates, _ = tx.update(ones, state, params)
    assert updates["up"]["kernel"].any() and not updates["norm"]["scale"].any() and not updates["bias"].any()
    assert len([x for x in jax.tree.leaves(state) if np.shape(x) == (4,)]) == 2  # moments of one leaf only

    # The clipped gradient is 1/2 in each of four places, so that its norm is 1: Adam's first moment shows it.
    found = [x for x in jax.tree.leaves(tx.update(ones, state, params)[1]) if np.shape(x) == (4,)]
    np.testing.assert_allclose(found[0], np.full(4, 0.1 * 0.5), rtol=1e-5)


def test_many_steps_on_many_devices_do_not_deadlock(tmp_path):
    end = loop(tmp_path, Batches(), steps=100, save_every=0, plan=Plan("jit", {"data": 8}))
    one = loop(tmp_path / "one", Batches(), steps=100, save_every=0)
    np.testing.assert_allclose(end.params.slope, one.params.slope, atol=1e-4)


def test_pmap_runs_the_same_loop(tmp_path):
    a = loop(tmp_path / "a", Batches(), steps=6, save_every=3, plan=Plan("pmap", {"data": 2}))
    b = loop(tmp_path / "b", Batches(), steps=6)
    np.testing.assert_allclose(a.params.slope, b.params.slope, atol=1e-5)
    loop(tmp_path / "a", Batches(), steps=8, plan=Plan("jit", {"data": 2}))  # the same checkpoint on another plan


def test_one_compilation_per_loop(tmp_path):
    count = []

    def counted(params, frozen, batch, keys):
        count.append(1)
        return squares(params, frozen, batch, keys)

    train.loop(tmp_path, fresh(), train.make_step(counted, TX), Batches(), steps=12, save_every=4, progress=False)
    assert len(count) == 1


def test_make_step_is_a_value():
    assert train.make_step(squares, TX).over("batch") == functools.partial(train.make_step, squares, TX)(axis="batch")
