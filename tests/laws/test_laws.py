"""The laws every method obeys, found by walking `ctg_jax.methods`: a new file there is tested with no list to edit.

A method module gives `example(lm, key) -> Control`, small and not trivial, and `neutral(control) -> Control | None`.
A `Chain` of four different ones goes through everything as well.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from laws import worlds
from laws.examples import CASES, LM, METHODS, build, example

from ctg_jax import methods, tree
from ctg_jax.control import IDENTITY, Chain, Control, edit_logits
from ctg_jax.controls import constraints, truncate
from ctg_jax.controls.codes import coded
from ctg_jax.controls.vectors import SoftPrompt, soft_prompt
from ctg_jax.decode import loop
from ctg_jax.decode.checks import check_rows
from ctg_jax.learn import train
from ctg_jax.learn.losses import control_loss
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.mesh.plan import Plan
from ctg_jax.mesh.rules import DECODER, NETWORKS
from ctg_jax.methods import dexperts, finetune, steer
from ctg_jax.models.decoder import Transformer
from ctg_jax.run import checkpoint
from ctg_jax.support import removed
from ctg_jax.types import InputError, Sampling

PARAMS = worlds.lively(LM)
ROWS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [3, 3, 10, 1], [2, 8], [7, 7, 7, 7, 7], [5, 1, 4], [10, 9]]
PROMPTS = worlds.prompts(ROWS)
SAMPLING = Sampling(max_new=4)


@pytest.fixture(scope="module", params=CASES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def control(name):
    return build(name)


@pytest.fixture(scope="module")
def samples(control):
    return loop.generate(LM, PARAMS, PROMPTS, control, SAMPLING)


@pytest.fixture(scope="module")
def logits(control, samples):
    return loop.forward(LM, PARAMS, PROMPTS, samples.tokens, control)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def test_the_example_does_something(samples, logits):
    base = loop.forward(LM, PARAMS, PROMPTS, samples.tokens)
    assert float(jnp.max(jnp.abs(jax.nn.softmax(base) - jax.nn.softmax(logits)))) > 0.02


def test_chain_is_a_monoid(control, samples, logits):
    other, third = truncate.Temperature(0.7), SoftPrompt(soft_prompt(jax.random.key(1), 2, LM.width, deviation=1.0))

    def every(c):
        same = [Chain((c,)), Chain((IDENTITY, c)), Chain((c, Chain(())))]
        shapes = [Chain((Chain((c, other)), third)), Chain((c, Chain((other, third)))), Chain((c, other, third))]
        return [loop.forward(LM, PARAMS, PROMPTS, samples.tokens, x) for x in same + shapes]

    one, left, right, a, b, flat = jax.jit(every)(control)
    for x in (one, left, right):
        close(x, logits)
    close(a, flat)
    close(b, flat)
    assert float(jnp.max(jnp.abs(flat - logits))) > 1e-2


def test_neutral_gives_the_base(name, control, samples):
    if name == "chain":
        parts = [methods.get(n).neutral(build(n)) for n in METHODS]
        nothing = Chain(tuple(p for p in parts if p is not None))
    else:
        nothing = methods.get(name).neutral(control)
        if nothing is None:
            pytest.skip("it has no neutral element")
    base = loop.forward(LM, PARAMS, PROMPTS, samples.tokens)
    close(loop.forward(LM, PARAMS, PROMPTS, samples.tokens, nothing), base, 1e-6)


@struct.dataclass
class Push(Control):
    """a z + b, an additive control as strong as can be: what it would bring back must stay removed."""

    a: jax.Array
    b: jax.Array

    def logits(self, z, h, tokens, mask, state):
        return self.a * z + self.b[None, None], state


def harsh(control, forbidden) -> Chain:
    """The control among rules that between them would leave nothing: `forbidden` and all but three tokens are removed
    before it, it and two pushes that favour what is gone come after, and then rules that remove most of the rest."""
    push = Push(jnp.float32(1e-6), jnp.where(forbidden, 1e6, 0.0))
    before = (constraints.Ban(forbidden), truncate.TopK(3))
    after = (push, truncate.Temperature(20.0), push, truncate.RepetitionPenalty(1.5, vocab=LM.vocab))
    last = (truncate.NoRepeatNgram(1), truncate.TopP(1e-6), truncate.MinP(1.0), truncate.Typical(1e-6))
    return Chain((*before, control, *after, *last))


def test_removed_tokens_stay_removed_and_the_support_is_never_empty(control):
    forbidden = jnp.asarray(constraints.marks([0, 2, 4, 6, 10], LM.vocab))
    chain = harsh(control, forbidden)
    out = loop.generate(LM, PARAMS, PROMPTS, chain, SAMPLING)
    assert not bool(jnp.any(forbidden[out.tokens]))
    close(loop.score(LM, PARAMS, PROMPTS, out.tokens, chain), out.logp)

    def hook(control, z):  # the logits that the three likeliest allowed tokens have before the control, and those after
        every = harsh(control, forbidden).bind(PARAMS, PARAMS)
        start = Chain(every.parts[:2])
        read = jnp.zeros((*PROMPTS.tokens.shape, LM.width)), PROMPTS.tokens, PROMPTS.mask
        found = edit_logits(start, z, *read, start.init(PROMPTS, 9))[0]
        return found, edit_logits(every, z, *read, every.init(PROMPTS, 9))[0]

    z = jax.random.normal(jax.random.key(1), (len(ROWS), 1, LM.vocab)) * 3
    before, after = jax.jit(hook)(control, z)
    assert removed(before).sum(-1).tolist() == [[LM.vocab - 3]] * len(ROWS)
    assert not bool(jnp.any(removed(before) & ~removed(after)))
    assert bool(jnp.all(jnp.any(~removed(after), axis=-1)))
    assert bool(jnp.all(jnp.isfinite(after))) and bool(jnp.all(jnp.isfinite(before - after)))
    slope = jax.jit(jax.grad(lambda c: jnp.sum(jax.nn.logsumexp(hook(c, z)[1], axis=-1)), allow_int=True))(control)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(slope) if x.dtype == jnp.float32)


def test_score_of_generate_is_its_logp(control, samples, logits):
    scores = loop.score(LM, PARAMS, PROMPTS, samples.tokens, control)
    assert bool(jnp.all(samples.mask))
    close(scores, samples.logp)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), samples.tokens[..., None], axis=-1)[..., 0]
    close(chosen, samples.logp)


def test_a_row_alone_is_the_row_in_its_batch(control, samples, row=3):
    alone = worlds.prompts([ROWS[row]]).replace(keys=PROMPTS.keys[row : row + 1])
    out = loop.generate(LM, PARAMS, alone, control, SAMPLING)
    assert out.tokens.tolist() == samples.tokens[row : row + 1].tolist()
    close(out.logp, samples.logp[row : row + 1])


def test_the_state_has_the_batch_first(control):
    """Every leaf of a decoding has the batch as its first axis, or size 1 there, or no axis: so rows can be chosen."""

    def shapes(rows):
        batch = jax.eval_shape(lambda: worlds.prompts(ROWS[:rows]))
        begun = lambda p, b, c: loop.begin(LM, p, b, c, SAMPLING)  # noqa: E731
        return tree.flatten(jax.eval_shape(begun, PARAMS, batch, control))

    three, five = shapes(3), shapes(5)
    assert three.keys() == five.keys()
    for path, x in three.items():
        first = (x.shape[:1], five[path].shape[:1])
        assert first in (((), ()), ((1,), (1,)), ((3,), (5,))), f"{path} has shape {x.shape} for three rows"
        assert x.shape[1:] == five[path].shape[1:], path


def test_a_paused_decoding_goes_on_as_it_would_have(control, samples):
    """Also some of its rows, in another order, with their own keys."""
    begun = loop.begin(LM, PARAMS, PROMPTS, control, SAMPLING)
    half = loop.extend(LM, PARAMS, begun, PROMPTS.keys, control, SAMPLING, 2)
    assert int(half.t) == 2 and half.tokens[:, :2].tolist() == samples.tokens[:, :2].tolist()
    assert not half.mask[:, 2:].any()
    every = np.array([0, 1, 2, 3, 4, 5, 6, 7])
    for index in (every, np.array([3, 0, 7, 7, 1, 5, 0, 2])):
        chosen, keys = loop.choose((half, PROMPTS.keys), index)
        whole = loop.extend(LM, PARAMS, chosen, keys, control, SAMPLING, 2)
        assert whole.tokens.tolist() == samples.tokens[index].tolist()
        close(whole.logp, samples.logp[index])
    over = loop.extend(LM, PARAMS, whole, keys, control, SAMPLING, 2)
    jax.tree.map(np.testing.assert_array_equal, over, whole)


@pytest.mark.parametrize("kind", ["soft", "coded"])
def test_it_acts_behind_a_soft_prompt_where_it_acts_alone(control, kind):
    before = SoftPrompt(soft_prompt(jax.random.key(1), 2, LM.width))
    if kind == "coded":
        before = coded(jax.random.key(1), finetune.example(LM, jax.random.key(2)), LM.width, 2)
    if control.added():
        pytest.skip("it adds tokens itself")
    alone, behind = (worlds.where_it_acts(LM, PROMPTS, 3, control, c) for c in (None, before))
    np.testing.assert_array_equal(alone, behind)


def test_eight_devices_give_what_one_gives(control, samples):
    mesh = Plan(axes={"data": 8}).mesh
    rows = jax.device_put(PROMPTS, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put((PARAMS, control), NamedSharding(mesh, PartitionSpec()))
    out = loop.generate(LM, everywhere[0], rows, everywhere[1], SAMPLING)
    assert len(out.tokens.sharding.device_set) == 8
    assert out.tokens.tolist() == samples.tokens.tolist()
    close(out.logp, samples.logp)


def test_changing_leaves_recompiles_nothing(control, samples):
    before = loop.loop._cache_size()
    moved = jax.tree.map(lambda x: 0.9 * x, control)
    out = loop.generate(LM, PARAMS, PROMPTS, moved, SAMPLING)
    assert loop.loop._cache_size() == before
    assert not np.allclose(out.logp, samples.logp)


def test_a_vmapped_sweep_is_a_loop(control, samples):
    def weaker(t):
        return jax.tree.map(lambda x: (1 - 0.3 * t) * x, control)

    strengths = jnp.array([0.0, 1.0])
    swept = jax.jit(jax.vmap(lambda t: loop.forward(LM, PARAMS, PROMPTS, samples.tokens, weaker(t))))(strengths)
    for t, found in zip(strengths, swept):
        close(found, loop.forward(LM, PARAMS, PROMPTS, samples.tokens, weaker(t)))


def test_gradients_reach_only_the_control(control):
    step = train.make_step(control_loss(LM), optimizer(1e-2))
    state = train.init_state(control, step.tx, jax.random.key(0))
    batch = {"tokens": PROMPTS.tokens[1:6:4, :3], "mask": jnp.ones((2, 3), bool), "ids": jnp.arange(2)}
    frozen = {"params": PARAMS}
    after, metrics = jax.jit(step)(state, frozen, batch)
    assert bool(metrics["ok"])
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, after.params)
    assert any(jax.tree.leaves(moved)) or not jax.tree.leaves(moved)
    assert jax.tree.structure(after.params) == jax.tree.structure(control)


def test_a_checkpoint_round_trip(name, control, tmp_path):
    like = jax.eval_shape(lambda k: example(name, LM, k), jax.random.key(0))
    checkpoint.save(tmp_path / "c", control)
    found = checkpoint.load(tmp_path / "c", jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like))
    assert jax.tree.structure(found) == jax.tree.structure(control)  # static fields included
    jax.tree.map(np.testing.assert_array_equal, found, control)


def test_per_row_controls_are_rows_alone():
    keys = jax.random.split(jax.random.key(5), 3)
    chain = Chain(
        (
            SoftPrompt(soft_prompt(keys[0], 2, LM.width, choices=3, deviation=1.0), choice="style"),
            steer.example(LM, keys[1]).replace(cond="push"),
            truncate.TopP(jnp.float32(0.9)),
            dexperts.example(LM, keys[2]).replace(cond="expert"),
        )
    )
    cond = {
        "style": jnp.array([0, 2, 1, 1]),
        "push": jnp.array([1.0, -2.0, 0.0, 0.5]),
        "expert": jnp.array([0.0, 1.0, -1.0, 2.0]),
    }
    batch = worlds.prompts(ROWS[:4], cond=cond)
    together = loop.generate(LM, PARAMS, batch, chain, SAMPLING)
    close(loop.score(LM, PARAMS, batch, together.tokens, chain), together.logp)
    for i in range(4):
        row = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        out = loop.generate(LM, PARAMS, row, chain, SAMPLING)
        assert out.tokens.tolist() == together.tokens[i : i + 1].tolist()
        close(out.logp, together.logp[i : i + 1])
    alone = worlds.prompts([ROWS[0]], cond=jax.tree.map(lambda x: x[:1], cond)).replace(keys=batch.keys[:1])
    assert loop.generate(LM, PARAMS, alone, chain, SAMPLING).tokens.tolist() == together.tokens[:1].tolist()


SHAPES = {
    "gpt2-xl": lambda: Transformer.gpt2(width=1600, depth=48, heads=25),
    "llama-7b": lambda: Transformer.llama(
        vocab=32000, width=4096, depth=32, heads=32, kv_heads=32, mlp_width=11008, context=4096, dtype="bfloat16"
    ),
    "llama-70b": lambda: Transformer.llama(
        vocab=32000, width=8192, depth=80, heads=64, kv_heads=8, mlp_width=28672, context=4096, dtype="bfloat16"
    ),
}


@pytest.mark.parametrize("depth", [4, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES)
def test_large_models_fit_on_paper(name, shape, depth):
    """eval_shape of init, generate and the train step: no array is made. Tracing 80 unrolled layers three times, as
    experts do, takes half a minute, so every layer is traced only with --slow."""
    if depth and shape != "llama-70b":
        pytest.skip("the widest shape stands for the others where layers are few")
    lm, key = SHAPES[shape](), jax.random.key(0)
    lm = dataclasses.replace(lm, depth=depth or lm.depth)
    params = jax.eval_shape(lm.init, key)
    control = jax.eval_shape(lambda k: example(name, lm, k), key)
    batch = jax.eval_shape(lambda: worlds.prompts([[1, 2, 3, 4]] * 8))
    out = jax.eval_shape(lambda p, b, c: loop.loop(lm, p, b, c, SAMPLING), params, batch, control)
    assert out.tokens.shape == (8, 4)
    step = train.make_step(control_loss(lm), optimizer(1e-3))
    state = jax.eval_shape(lambda c, k: train.init_state(c, step.tx, k), control, key)
    texts = {
        "tokens": jax.ShapeDtypeStruct((8, 16), jnp.int32),
        "mask": jax.ShapeDtypeStruct((8, 16), bool),
        "ids": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    after, _ = jax.eval_shape(step, state, {"params": params}, texts)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    plan = Plan(axes={"data": 8, "tensor": 8}, rules=DECODER)
    print(f"{shape}: {plan.bytes_per_device(params) / 2**30:.2f} GiB of parameters on each device of 8 x 8")


@pytest.mark.parametrize("which", [n for n in METHODS if ".logits." in methods.get(n).__name__])
def test_a_model_of_another_vocabulary_is_refused_in_a_sentence_or_served(which):
    """Nothing is computed: the decode loop is traced for a model with more tokens than the control was made for."""
    larger, control = worlds.tiny(vocab=13), build(which)
    params = jax.eval_shape(larger.init, jax.random.key(0))
    try:
        check_rows(larger, PROMPTS, control, 2)
        jax.eval_shape(lambda p, c: loop.loop(larger, p, PROMPTS, c, Sampling(max_new=2)), params, control)
    except InputError as e:
        assert "vocabulary" in str(e) and "11 tokens" in str(e) and "13" in str(e)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("which", METHODS)
def test_a_model_of_another_depth_is_refused_in_a_sentence_or_served(which, depth):
    """Nothing is computed. What has something for every block must be refused, as it would act on other blocks."""
    other, control = worlds.tiny(depth=depth), build(which)
    params = jax.eval_shape(other.init, jax.random.key(0))
    per_block = {"cast", "cav", "iti", "prompt", "self_control", "steer"}
    try:
        check_rows(other, PROMPTS, control, 2)
        jax.eval_shape(lambda p, c: loop.loop(other, p, PROMPTS, c, Sampling(max_new=2)), params, control)
    except InputError as e:
        assert "another model" in str(e), e
    else:
        assert which not in per_block


def test_sharding_rules_name_every_leaf_of_a_control(control):
    """A leaf that no rule matches would be an error; a mesh of 4 × 2 must take each leaf and change no value."""
    plan = Plan(axes={"data": 4, "tensor": 2}, rules=DECODER + NETWORKS)
    placed = jax.device_put(control, plan.shardings(control))
    jax.tree.map(np.testing.assert_array_equal, placed, control)
