"""Plans: rules choose shardings by path, and say which leaf they leave out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import PartitionSpec as P

from ctg_jax import tree
from ctg_jax.control import Control
from ctg_jax.learn import latent_diffusion, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.mesh.plan import Plan
from ctg_jax.mesh.rules import DECODER, ENCODER, NETWORKS, REPLICATED
from ctg_jax.methods import diffusion_lm, finetune, mdlm, ppo
from ctg_jax.models import heads
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.encoder import Encoder
from ctg_jax.types import InputError

GPT2 = Transformer.gpt2(vocab=32, width=16, depth=2, heads=4, context=16)
LLAMA = Transformer.llama(vocab=32, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24, context=16)
NEOX = Transformer.gpt2(vocab=32, width=16, depth=2, heads=4, context=16, family="gpt_neox", tied=False)


def shapes(lm):
    return jax.eval_shape(lm.init, jax.random.key(0))


def test_decoder_rules_split_kernels_both_ways_and_serve_moments_too():
    plan = Plan("jit", {"data": 4, "tensor": 2}, DECODER)
    make = lambda key: train.init_state(GPT2.init(key), optimizer(1e-3), key)  # noqa: E731
    specs = tree.flatten(plan.specs(jax.eval_shape(make, jax.random.key(0))))
    kernels = {p: s for p, s in specs.items() if p.endswith("layers/attn/qkv/kernel")}
    assert len(kernels) == 3 and set(kernels.values()) == {P(None, "tensor", "data")}
    assert specs["params/layers/mlp/down/kernel"] == P(None, "data", "tensor")
    assert specs["params/layers/mlp/up/bias"] == P(None, "tensor")
    assert specs["params/embed/tokens"] == P("tensor", "data")
    assert specs["params/norm/scale"] == P(None)
    assert specs["key"] == specs["step"] == P()


@pytest.mark.parametrize("lm", [GPT2, LLAMA, NEOX])
def test_every_leaf_of_every_family_has_a_rule_stacked_or_not(lm):
    plan = Plan("jit", {"data": 2, "tensor": 2}, DECODER)
    specs = tree.flatten(plan.specs(shapes(lm)))
    assert any("tensor" in s for s in specs.values())
    flat = tree.flatten(plan.specs(jax.eval_shape(lambda k: lm.unstack(lm.init(k)), jax.random.key(0))))
    assert flat["layers/0/attn/qkv/kernel"] == P("tensor", "data")


SMALL = dict(vocab=32, width=16, depth=2, heads=4, head_dim=4, mlp_width=24, context=16)


@pytest.mark.parametrize(
    "encoder",
    [
        Encoder(**SMALL, position_rows=16, types=2, head="tanh", labels=("no", "yes")),
        Encoder(**SMALL, position_rows=16, project=8, project_bias=True, unit=True),
        Encoder(**SMALL, family="t5", norm="rms", pre_norm=True, bias=False, scaled=False, gated=True, project=8),
    ],
    ids=["classifier", "sentences", "t5"],
)
def test_every_leaf_of_an_encoder_has_a_rule(encoder):
    plan = Plan("jit", {"data": 2, "tensor": 2}, ENCODER)
    found = jax.eval_shape(encoder.init, jax.random.key(0))
    specs = tree.flatten(plan.specs(found))
    assert specs["layers/attn/qkv/kernel"] == P(None, "tensor", "data")
    assert plan.bytes_per_device(found) < tree.size_bytes(found) / 3
    with pytest.raises(InputError, match="no sharding rule of the plan matches"):
        Plan("jit", {"data": 2}, ENCODER[:2]).specs(found)


def test_every_leaf_that_a_network_of_diffusion_or_a_value_head_trains_has_a_rule():
    """Models that write by themselves are no controls, so the law of controls does not see them."""
    plan, key = Plan("jit", {"data": 4, "tensor": 2}, DECODER + NETWORKS), jax.random.key(0)
    net = latent_diffusion.network(16, width=16, depth=2, heads=2, pseudo_tokens=4)
    made = {
        "denoiser": lambda k: {"net": net.init(k), "bins": jnp.zeros(100)},
        "mdlm": lambda k: mdlm.init(GPT2, k, width=16, depth=2, heads=2, classes=2),
        "diffusion_lm": lambda k: diffusion_lm.init(GPT2, k, width=16, depth=2, heads=2, fields={"food": 2}),
        "ppo": lambda k: {"policy": ppo.init(GPT2, k), "value": heads.value_head(16)},
    }
    for name, make in made.items():
        trained = jax.eval_shape(make, key)
        plan.specs(trained)
        trained = getattr(trained, "params", trained)
        state = jax.eval_shape(lambda p, k: train.init_state(p, optimizer(1e-3), k), trained, key)
        assert plan.bytes_per_device(state) < Plan().bytes_per_device(state) / 2, name


def test_a_leaf_no_rule_matches_is_named():
    plan = Plan("jit", {"data": 8}, DECODER)
    with pytest.raises(InputError, match="'steer/vector'"):
        plan.shardings({"steer": {"vector": jnp.zeros((3,))}})
    both = Plan("jit", {"data": 8}, DECODER + REPLICATED)
    assert both.specs({"steer": {"vector": jnp.zeros((3,))}})["steer"]["vector"] == P(None)
    with pytest.raises(InputError, match="names 2 dimensions and 'mlp/up/kernel'"):
        plan.specs({"mlp": {"up": {"kernel": jnp.zeros((3,))}}})


@struct.dataclass
class Unheard(Control):
    """A control with leaves of names that no rule knows, one of which it splits, and another control."""

    xyzzy: jax.Array
    plugh: jax.Array
    inner: Control

    def layout(self, rule):
        return {"plugh": P("data", "tensor")}


def test_controls_say_how_their_leaves_are_split():
    plan, key = Plan("jit", {"data": 4, "tensor": 2}, DECODER), jax.random.key(0)
    control = Unheard(jnp.ones((8, 8)), jnp.ones((3, 8, 8)), finetune.example(GPT2, key))
    specs = tree.flatten(plan.specs({"policy": control}))
    assert specs["policy/xyzzy"] == P(None, None) and specs["policy/plugh"] == P(None, "data", "tensor")
    up = "policy/inner/changes/layers/mlp/up/kernel"
    assert specs[f"{up}/a"] == P(None, None, "data") and specs[f"{up}/b"] == P(None, "tensor", None)
    down = "policy/inner/changes/layers/mlp/down/kernel"
    assert specs[f"{down}/a"] == P(None, None, "tensor") and specs[f"{down}/b"] == P(None, "data", None)
    state = train.init_state(control, optimizer(1e-3), key)  # moments are split as what they belong to
    moments = {p: s for p, s in tree.flatten(plan.specs(state)).items() if p.endswith("plugh")}
    assert len(moments) == 3 and set(moments.values()) == {P(None, "data", "tensor")}
    jax.tree.map(np.testing.assert_array_equal, plan.place(control), control)
    dense = plan.specs(finetune.init(GPT2, key, kind="full"))
    params = tree.flatten(plan.specs(jax.eval_shape(GPT2.init, key)))
    assert {p: s["full"] for p, s in dense.changes.items()} == params


def test_axes_that_do_not_divide_are_left_out():
    plan = Plan("jit", {"data": 4, "tensor": 2}, DECODER)
    spec = plan.specs({"embed": {"tokens": jax.ShapeDtypeStruct((50257, 768), jnp.float32)}})["embed"]["tokens"]
    assert spec == P(None, "data")
    spec = Plan("jit", {"data": 4}, DECODER).specs({"head": {"kernel": jnp.zeros((8, 8))}})["head"]["kernel"]
    assert spec == P(None, "data")


def test_predicted_bytes_are_the_real_ones():
    plan = Plan("jit", {"data": 4, "tensor": 2}, DECODER)
    params = plan.place(jax.jit(GPT2.init)(jax.random.key(0)))
    real = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    assert plan.bytes_per_device(shapes(GPT2)) == real
    assert real < tree.size_bytes(params) / 4
    one = Plan()
    assert one.bytes_per_device(shapes(GPT2)) == tree.size_bytes(params)


def test_bytes_of_a_70b_state_on_a_mesh_that_is_not_here():
    lm = Transformer.llama(vocab=32000, width=8192, depth=80, heads=64, kv_heads=8, mlp_width=28672, context=4096)
    plan = Plan("jit", {"data": 32, "tensor": 8}, DECODER)
    params = shapes(lm)
    total = tree.size_bytes(params)
    assert 270e9 < total < 280e9  # 69 billion parameters in float32
    assert plan.bytes_per_device(params) < 1.01 * total / 256 + 2**22  # norms are replicated
    with pytest.raises(InputError, match="need 256 devices"):
        plan.shardings(params)


def test_batches_are_split_in_row_order_and_must_divide():
    batch = {"tokens": np.arange(16, dtype=np.int32).reshape(8, 2), "ids": np.arange(8, dtype=np.int32)}
    put = Plan("jit", {"data": 4, "tensor": 2}).put(batch)
    assert put["tokens"].sharding.spec == P("data")
    np.testing.assert_array_equal(put["tokens"], batch["tokens"])
    assert put["tokens"].addressable_shards[0].data.shape == (2, 2)
    assert Plan("pmap", {"data": 4}).put(batch)["tokens"].shape == (4, 2, 2)
    for mode in ("jit", "pmap"):
        with pytest.raises(
            InputError, match=r"'ids' has shape .6,., expected a first dimension that is a multiple of 4"
        ):
            Plan(mode, {"data": 4}).put({"ids": np.arange(6)})


def test_axes_are_checked():
    assert dict(Plan("jit", {"data": -1, "tensor": 2}).axes) == {"data": 4, "tensor": 2}
    with pytest.raises(InputError, match="'data' alone for pmap"):
        Plan("pmap", {"data": 4, "tensor": 2})
    with pytest.raises(InputError, match="mode is 'pjit'"):
        Plan("pjit")
    with pytest.raises(InputError, match="at most one -1"):
        Plan("jit", {"data": -1, "tensor": -1})
    with pytest.raises(InputError, match="an axis 'data'"):
        Plan("jit", {"tensor": 2})
    with pytest.raises(InputError, match="need 16 devices and 8"):
        _ = Plan("jit", {"data": 16}).mesh
