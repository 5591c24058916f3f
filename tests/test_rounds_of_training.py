"""Rounds that share one optimizer and one schedule are one training run; the optimizers that can be asked for."""

import ast
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.learn import fitting, oracle
from ctg_jax.learn.fitting import Training
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.methods import click, constrained, correct, critic, gdc, nado, ppo, preference, quark, unlikelihood
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import stage
from ctg_jax.types import InputError, Sum

START = {"w": jnp.array([1.0, -2.0]), "kept": jnp.array([3.0])}


def loss(params, frozen, batch, keys):
    error = jnp.square(params["w"] @ batch["x"].T - 1.0)
    return Sum(jnp.sum(error), jnp.float32(len(error)))


def rows(first, last):
    for n in range(first, last):
        x = np.random.default_rng(n).normal(size=(4, 2)).astype(np.float32)
        yield {"x": x, "ids": np.arange(4, dtype=np.uint32)}


def learn(run, *, first, last, training, start_from=None):
    learner = START if start_from is None else checkpoint.load(start_from.path / "state", START)
    settings = Training(**training)
    found = fitting.train(run, learner, loss, {}, rows(first, last), settings, trained="w", start_from=start_from)
    checkpoint.save(run.path / "state", found)


def weights(artifact):
    return np.asarray(checkpoint.load(artifact.path / "state", START)["w"])


def test_two_rounds_with_one_optimizer_are_one_run_of_twice_the_length(tmp_path):
    common = dict(batch=4, rate=0.1, warmup=2, schedule="linear", clip=None, b2=0.9, eps=1e-4)
    whole = stage(tmp_path, learn, dict(first=0, last=6, training=common | dict(steps=6)))
    half = common | dict(steps=3, rounds=2)
    first = stage(tmp_path, learn, dict(first=0, last=3, training=half))
    second = stage(tmp_path, learn, dict(first=3, last=6, training=half), start_from=first)
    np.testing.assert_allclose(weights(second), weights(whole), rtol=1e-6)
    alone = stage(tmp_path, learn, dict(first=3, last=6, training=common | dict(steps=3)), start_from=first)
    assert np.abs(weights(alone) - weights(whole)).max() > 1e-3
    plain = stage(tmp_path, learn, dict(first=0, last=6, training=common | dict(steps=6, b2=0.999)))
    assert np.abs(weights(plain) - weights(whole)).max() > 1e-4  # b2 reaches Adam


def test_a_schedule_has_rounds_to_share_it_and_none_beyond_its_end(tmp_path):
    """Otherwise a schedule would be used in part, or rounds would learn at its last rate, 0 of a linear one."""
    common = dict(batch=4, rate=0.1, warmup=0, schedule="linear", steps=2, rounds=2)
    rounds = [None]
    for n in range(2):
        rounds.append(stage(tmp_path, learn, dict(first=2 * n, last=2 * n + 2, training=common), start_from=rounds[-1]))
    with pytest.raises(InputError, match=r"training\.rounds is 2, and this is round 3, beyond the end of the schedule"):
        stage(tmp_path, learn, dict(first=4, last=6, training=common), start_from=rounds[-1])
    with pytest.raises(InputError, match=r"training\.rounds is 2, but no optimizer is handed on here: set it to 1"):
        fitting.train(None, START, loss, {}, rows(0, 2), Training(**common), trained="w")


STAGES = [click, constrained, correct, critic, gdc, oracle, ppo, preference, quark, unlikelihood]


@pytest.mark.parametrize("module, call", [(m, "fitting.train") for m in STAGES] + [(nado, "teach")])
def test_every_method_with_rounds_hands_on_its_optimizer(module, call):
    """The call of `fitting.train` in a stage that has a `start_from` names it."""
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.Call)]
    (train,) = [c for c in calls if ast.unparse(c.func) == call]
    assert {k.arg: ast.unparse(k.value) for k in train.keywords}["start_from"] == "start_from"


def test_the_first_update_of_adafactor_has_the_size_of_the_rate():
    """Its direction is the gradient over its root mean square, entry by entry in the first update."""
    tx = optimizer(0.1, clip=None, algorithm="adafactor", trained="w")
    updates, _ = tx.update({"w": jnp.array([4.0, -0.5]), "kept": jnp.array([1.0])}, tx.init(START), START)
    np.testing.assert_allclose(updates["w"], [-0.1, 0.1], rtol=1e-3)
    assert float(updates["kept"][0]) == 0
    decaying = optimizer(0.1, clip=None, algorithm="adafactor", trained="w", decay=0.5)
    updates, _ = decaying.update({"w": jnp.array([4.0, -0.5]), "kept": jnp.array([1.0])}, decaying.init(START), START)
    np.testing.assert_allclose(updates["w"], [-0.1 - 0.1 * 0.5 * 1.0, 0.1 + 0.1 * 0.5 * 2.0], rtol=1e-3)  # as of AdamW
    with pytest.raises(InputError, match="algorithm is 'sgd', expected 'adam' or 'adafactor'"):
        optimizer(0.1, algorithm="sgd")
    with pytest.raises(InputError, match="rounds is 0, expected at least 1"):
        Training(rate=0.1, rounds=0).rates()
    jax.block_until_ready(updates)
