"""The search of one vector per row: alone, in any slots, on any devices and after an interruption it is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from ctg_jax.learn import slot_search
from ctg_jax.run import checkpoint

N, D = 13, 3
AIMS = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32) * np.arange(1, N + 1, dtype=np.float32)[:, None]
TX = optax.chain(
    optax.scale_by_adam(), optax.contrib.reduce_on_plateau(factor=0.5, patience=3, min_scale=0.1), optax.scale(-0.3)
)


def distance(z, rows, frozen):
    gap = jnp.sum(jnp.square(z - rows["aim"]), axis=1)
    return gap, -gap, gap < frozen


def find(slots=4, devices=1, aims=AIMS, steps=60, iterations=7, tolerance=0.05, **more):
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    run = jax.jit(slot_search.over_mesh(mesh, objective=distance, tx=TX, steps=steps, iterations=iterations))
    start = np.zeros(aims.shape, np.float32)
    return slot_search.solve(run, start, {"aim": aims}, np.float32(tolerance), TX, slots, mesh, least=2, **more)


@pytest.fixture(scope="module")
def whole():
    return find()


def same(a, b, tolerance=1e-5):
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_it_finds_what_it_can_in_the_steps_it_has(whole):
    gap = np.square(whole["z"] - AIMS).sum(1)
    np.testing.assert_allclose(whole["loss"], gap, rtol=1e-5)
    assert whole["solved"].any() and not whole["solved"].all()  # the far ones cannot be reached in 60 steps
    np.testing.assert_array_equal(whole["solved"], gap < 0.05)
    assert (whole["steps"][~whole["solved"]] == 60).all() and (whole["steps"][whole["solved"]] <= 60).all()


def test_the_first_update_of_adam_by_hand():
    """Adam's first update is rate · sign(gradient), so after one step z = 0.3 · sign(aim)."""
    found = find(steps=1, tolerance=-1.0)
    np.testing.assert_allclose(found["z"], 0.3 * np.sign(AIMS), rtol=1e-4)
    assert (found["steps"] == 1).all()


def test_an_unsolved_row_keeps_its_best_not_its_last():
    """With a rate far too large, z = 0 is better than what follows."""
    wild = optax.chain(optax.scale_by_adam(), optax.scale(-50.0))
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    wild = optax.with_extra_args_support(wild)
    run = jax.jit(slot_search.over_mesh(mesh, objective=distance, tx=wild, steps=3, iterations=5))
    aims = np.full((2, D), 0.5, np.float32)
    found = slot_search.solve(run, np.zeros((2, D), np.float32), {"aim": aims}, np.float32(0), wild, 2, mesh)
    np.testing.assert_array_equal(found["z"], 0.0)
    np.testing.assert_allclose(found["loss"], 0.75)


@pytest.mark.parametrize("slots, devices", [(1, 1), (16, 1), (4, 8)])
def test_slots_and_devices_change_nothing(whole, slots, devices):
    same(whole, find(slots=slots, devices=devices))


def test_a_row_does_not_know_its_neighbours(whole):
    some = [2, 7, 11]
    same({k: v[some] for k, v in whole.items()}, find(aims=AIMS[some]))


def test_an_interrupted_search_goes_on_to_the_same_bits(whole, tmp_path):
    class Stop(Exception):
        pass

    calls = []

    def stop(finished):
        calls.append(finished)
        if len(calls) == 5:
            raise Stop

    with pytest.raises(Stop):
        find(keep=tmp_path / "search", save_every=0.0, progress=stop)
    assert (tmp_path / "search" / checkpoint.MANIFEST).exists() and 0 < calls[-1] < N
    again = []
    same(whole, find(keep=tmp_path / "search", save_every=0.0, progress=again.append), tolerance=0)
    assert again[0] >= calls[-1] and again[-1] == N
