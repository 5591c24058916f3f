"""Bytes that compiled train steps move between eight devices, against what theory asks for."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ctg_jax import methods
from ctg_jax.learn import losses, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.mesh.plan import Plan
from ctg_jax.mesh.rules import DECODER, NETWORKS
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError
from experiments import traffic

LM = Transformer.gpt2(vocab=64, width=32, depth=2, heads=8, context=16)
ROWS, LENGTH = 16, 9  # read: the last token is only a target


def step_of(plan, method, **init):
    """(collectives of a compiled step, what theory asks for)"""
    tx, key = optimizer(1e-3), jax.random.key(0)
    params = jax.eval_shape(LM.init, key)
    control = jax.eval_shape(lambda k: methods.get(method).init(LM, k, **init), key)
    state = jax.eval_shape(lambda c, k: train.init_state(c, tx, k), control, key)
    frozen = {"params": params}
    make = functools.partial(train.make_step, losses.control_loss(LM), tx)
    kinds = {"tokens": ((ROWS, LENGTH), jnp.int32), "mask": ((ROWS, LENGTH), bool), "ids": ((ROWS,), jnp.int32)}
    batch = {name: jax.ShapeDtypeStruct(*kind) for name, kind in kinds.items()}
    text = plan.compile(make, state, frozen).lower(state, frozen, batch).compile().as_text()
    return traffic.collectives(text, plan.size), traffic.asked(LM, plan, params, control, ROWS, LENGTH - 1)


def sums(found):
    return {kind: round(x) for kind, x in traffic.moved(found).items()}


def test_data_parallel_moves_the_gradients_of_the_control_and_nothing_else():
    found, want = step_of(Plan(axes={"data": 8}), "finetune")
    print(sums(found), want)
    assert {c.kind for c in found} == {"all-reduce"}
    low_rank = LM.depth * 8 * (4 + 2 + 5 + 5) * LM.width  # of qkv, out, up and down; not of the kernels they change
    assert want["gradients"] == 2 * 7 / 8 * 4 * (low_rank + 1)  # and the strength
    assert sum(c.moved for c in found) == want["gradients"] + 2 * 7 / 8 * 4 * 2  # and the loss's total and weight


def test_fsdp_moves_weights_and_gradients_and_no_activations():
    found, want = step_of(Plan(axes={"data": 8}, rules=DECODER + NETWORKS), "finetune", kind="full")
    print(sums(found), want)
    got = traffic.moved(found)
    assert got["all-gather"] == pytest.approx(want["weights"], rel=0.03)
    # XLA on a CPU does not make a scatter of an all-reduce of which each device keeps its part: twice the bytes.
    assert got["all-reduce"] == pytest.approx(2 * want["gradients"], rel=0.06)
    assert got.get("all-to-all", 0) + got.get("collective-permute", 0) <= 2 * want["lookup"]


def test_tensor_parallel_moves_two_sums_of_activations_a_block_each_way():
    found, want = step_of(Plan(axes={"data": 1, "tensor": 8}, rules=DECODER + NETWORKS), "steer")
    print(sums(found), want)
    got = traffic.moved(found)
    assert got["all-reduce"] == pytest.approx(want["activations"], rel=0.05)
    # The fused kernel is cut into queries, keys and values elsewhere than into devices: they are moved to their heads.
    assert sum(got.values()) < 1.3 * want["activations"]
    assert "all-gather" not in got


def test_loops_count_as_often_as_they_run():
    mesh = Plan(axes={"data": 4, "tensor": 2}).mesh

    def some(x):
        def body(carry, _):
            return jax.lax.psum(carry, "data") * 0.5, jax.lax.ppermute(carry, "tensor", [(0, 1)])

        return jax.lax.scan(body, jax.lax.all_gather(x, "tensor", tiled=True), None, length=5)

    f = jax.shard_map(some, mesh=mesh, in_specs=P("tensor"), out_specs=(P(), P(None)), check_vma=False)
    found = traffic.collectives(jax.jit(f).lower(jnp.ones((6, 3))).compile().as_text(), 8)
    size = 6 * 3 * 4
    assert traffic.moved(found) == pytest.approx(
        {"all-gather": size / 2, "all-reduce": 5 * 2 * 3 / 4 * size, "collective-permute": 5 * size / 2}
    )


def test_a_loop_of_unknown_length_is_an_error():
    f = jax.jit(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x + 1, x))
    text = f.lower(jnp.ones((3,))).compile().as_text()
    with pytest.raises(InputError, match="no known length: give trips"):
        traffic.collectives(text, 1)
    assert traffic.collectives(text, 1, trips=3) == []
