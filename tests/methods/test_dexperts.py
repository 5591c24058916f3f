"""DExperts: three tokens by hand, closed forms in enumerable worlds, order of filter and experts, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods, tree
from ctg_jax.control import IDENTITY, Chain
from ctg_jax.controls import truncate
from ctg_jax.controls.streams import Stream
from ctg_jax.data.tokenizer import to_prompts
from ctg_jax.decode import loop
from ctg_jax.methods import dexperts
from ctg_jax.models import hf
from ctg_jax.run.stage import Artifact, open_lm, stage
from ctg_jax.stages.controls import made
from ctg_jax.types import InputError

WORLD = worlds.Bigram()
BASE = worlds.table([[0.5, 0.3, 0.2]] * 3)
PLUS = worlds.table([[0.6, 0.3, 0.1]] * 3)
MINUS = worlds.table([[0.2, 0.4, 0.4]] * 3)


def next_token(control, base=BASE, prompt=(0,), cond=None):
    prompts = worlds.prompts([list(prompt)], cond=cond)
    z = loop.forward(WORLD, base, prompts, jnp.zeros((1, 1), jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[0, 0]))


def pair(alpha, **more):
    return dexperts.experts(Stream(PLUS, lm=WORLD), Stream(MINUS, lm=WORLD), alpha, **more)


def test_three_tokens_by_hand():
    """.5 · .6/.2, .3 · .3/.4, .2 · .1/.4 = 1.5, .225, .05; their sum is 1.775."""
    np.testing.assert_allclose(next_token(pair(1.0)), np.array([1.5, 0.225, 0.05]) / 1.775, rtol=1e-5)
    # alpha = -1 turns the fractions over: .5/3, .3/.75, .2/.25 = 1/6, .4, .8
    other = np.array([1 / 6, 0.4, 0.8])
    np.testing.assert_allclose(next_token(pair(-1.0)), other / other.sum(), rtol=1e-5)
    np.testing.assert_allclose(next_token(pair(0.0)), [0.5, 0.3, 0.2], rtol=1e-6)


def test_without_an_anti_expert_and_contrastive_by_hand():
    """p (p⁺/p)^2 = .72, .3, .05; contrastive decoding, p^1.5 / q^.5, against the amateur [.2, .4, .4]."""
    alone = dexperts.experts(Stream(PLUS, lm=WORLD), None, 2.0)
    np.testing.assert_allclose(next_token(alone), np.array([0.72, 0.3, 0.05]) / 1.07, rtol=1e-5)
    found = next_token(dexperts.experts(anti=Stream(MINUS, lm=WORLD), alpha=0.5))
    wanted = np.array([0.5, 0.3, 0.2]) ** 1.5 / np.array([0.2, 0.4, 0.4]) ** 0.5
    np.testing.assert_allclose(found, wanted / wanted.sum(), rtol=1e-5)


def test_filtering_before_and_after_differ_as_in_the_paper():
    """Before, top-p .7 leaves tokens 0 and 1 of the base: 1.5, .225. After, it leaves token 0 alone."""
    cut = truncate.TopP(jnp.float32(0.7))
    np.testing.assert_allclose(next_token(Chain((cut, pair(1.0)))), np.array([1.5, 0.225, 0]) / 1.725, atol=1e-6)
    np.testing.assert_allclose(next_token(Chain((pair(1.0), cut))), [1, 0, 0], atol=1e-6)
    # At a strength below 0 the experts would bring token 2 back; what was cut stays cut.
    assert next_token(Chain((cut, pair(-3.0))))[2] == 0


@pytest.mark.parametrize("anti", [True, False])
def test_a_cut_token_stays_cut_where_the_base_is_a_side(anti):
    side = Stream(PLUS, lm=WORLD)
    control = dexperts.experts(anti=side) if anti else dexperts.experts(side)
    found = next_token(Chain((truncate.TopP(jnp.float32(0.7)), control)))
    assert found[2] == 0 and np.isfinite(found).all()


def test_the_distribution_in_an_exact_world():
    keys = jax.random.split(jax.random.key(3), 3)
    base, plus, minus = (WORLD.init(k) for k in keys)
    control = dexperts.experts(Stream(plus, lm=WORLD), Stream(minus, lm=WORLD), 0.7)
    z, zp, zm = (np.asarray(p["head"]["kernel"], np.float64) for p in (base, plus, minus))
    mixed = z + 0.7 * (zp - zm)
    p = np.exp(mixed) / np.exp(mixed).sum(0)
    found = worlds.enumerate_all(WORLD, base, [2], 3, control)
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    for (a, b, c), probability in found.items():
        assert probability == pytest.approx(p[a, 2] * p[b, a] * p[c, b], rel=1e-4)


def test_caches_of_a_transformer_give_what_three_models_give():
    lm = worlds.tiny(vocab=5)
    base, plus, minus = (worlds.lively(lm, seed) for seed in (0, 1, 2))
    control = dexperts.experts(Stream(plus, lm=lm), Stream(minus, lm=lm), 0.5)
    prompts, completion = worlds.prompts([[1, 2, 3], [4]]), jnp.array([[1, 2, 3], [4, 0, 2]])
    z, zp, zm = (loop.forward(lm, p, prompts, completion) for p in (base, plus, minus))
    found = loop.forward(lm, base, prompts, completion, control)
    np.testing.assert_allclose(found, z + 0.5 * (zp - zm), rtol=1e-4, atol=1e-4)


def test_alpha_per_row():
    control = pair(0.5, cond="strength")
    for strength, alpha in ((2.0, 1.0), (0.0, 0.0), (-2.0, -1.0)):
        row = next_token(control, cond={"strength": jnp.array([strength])})
        np.testing.assert_allclose(row, next_token(pair(alpha)), rtol=1e-5)
    with pytest.raises(InputError, match=r"prompts.cond\['strength'\]"):
        next_token(control)


def test_guidance_forgets_the_prompt_but_its_end():
    lm = worlds.tiny(vocab=5)
    params = worlds.lively(lm)
    long, short = worlds.prompts([[1, 2, 3]]), worlds.prompts([[3]])
    completion = jnp.array([[1, 2]])
    z, empty = (loop.forward(lm, params, p, completion) for p in (long, short))
    found = loop.forward(lm, params, long, completion, dexperts.guidance(lm, 1.5))
    np.testing.assert_allclose(found, empty + 1.5 * (z - empty), rtol=1e-4, atol=1e-4)


def test_an_instruction_as_the_expert():
    lm = worlds.tiny(vocab=5)
    params = worlds.lively(lm)
    told = worlds.prompts([[4, 4, 1, 2], [3, 4]])
    cond = {dexperts.INSTRUCTED: jnp.where(told.mask, told.tokens, -1)}
    plain = worlds.prompts([[1, 2], [2]], cond=cond)
    completion = jnp.array([[1, 2], [0, 3]])
    z, after = (loop.forward(lm, params, p, completion) for p in (plain, told))
    for alpha in (0.3, -0.3):
        found = loop.forward(lm, params, plain, completion, dexperts.prompted(lm, alpha))
        np.testing.assert_allclose(found, z + alpha * (after - z), rtol=1e-4, atol=1e-4)


def test_kinds_that_need_no_fit_are_made_from_settings(small, tmp_path):
    """Guidance, an instruction and an amateur: saved as artifacts and loaded again, with the tokens they read."""
    root, lm, _ = small
    model, params, tokenizer = open_lm(lm)
    hf.save(tmp_path / "amateur", model, jax.tree.map(lambda x: 0.9 * x, params))
    for settings in (
        dict(kind="guidance", alpha=0.5, keep=2),
        dict(kind="instruction", alpha=0.5, instruction="the food was good. "),
        dict(kind="contrastive", alpha=0.5, amateur=str(tmp_path / "amateur")),
    ):
        artifact = stage(root, made, {"method": "dexperts", "init": settings}, lm=lm)
        control = methods.load(artifact, model)
        assert jax.tree.structure(control) == jax.tree.structure(dexperts.make(model, jax.random.key(0), **settings))
        cond = dexperts.conditions(artifact, lm, ["it", "the soup"])
        prompts = to_prompts(tokenizer, ["it", "the soup"], seed=0, cond=cond)
        completion = jnp.ones((2, 2), jnp.int32)
        z, found = (loop.forward(model, params, prompts, completion, c) for c in (IDENTITY, control))
        assert np.isfinite(found).all() and float(jnp.abs(found - z).max()) > 1e-4
        if settings["kind"] == "instruction":
            told = to_prompts(tokenizer, [settings["instruction"] + t for t in ("it", "the soup")], seed=0)
            after = loop.forward(model, params, told, completion)
            np.testing.assert_allclose(found, z + 0.5 * (after - z), rtol=1e-4, atol=1e-4)
    hf.save(tmp_path / "amateur", model, jax.tree.map(lambda x: 0.8 * x, params))  # another model in the same folder
    assert stage(root, made, {"method": "dexperts", "init": settings}, lm=lm).id != artifact.id
    with pytest.raises(InputError, match="kind is 'lora', whose experts are fitted"):
        stage(root, made, {"method": "dexperts", "init": {"alpha": 1.0}}, lm=lm)
    with pytest.raises(InputError, match="method is 'steer', whose control has to be fitted"):
        stage(root, made, {"method": "steer"}, lm=lm)
    with pytest.raises(InputError, match="needs an amateur"):
        stage(root, made, {"method": "dexperts", "init": {"kind": "contrastive"}}, lm=lm)
    with pytest.raises(InputError, match="needs the text of an instruction"):
        stage(root, made, {"method": "dexperts", "init": {"kind": "instruction"}}, lm=lm)


def test_bad_input_raises_one_sentence():
    other = worlds.Bigram(vocab=4)
    control = dexperts.experts(Stream(other.init(jax.random.key(0)), lm=other), None, 1.0)
    with pytest.raises(InputError, match="expert has a vocabulary of 4 tokens and the base model one of 3"):
        next_token(control)
    with pytest.raises(InputError, match="alpha is nan"):
        pair(float("nan"))


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_fit(small, kind):
    root, lm, data = small
    hp = dict(adapter=dict(kind=kind, rank=2), length=2, training=dict(steps=3, batch=4, tokens=16, warmup=1))
    fitted = dexperts.fit(root, lm=lm, data=data, alpha=1.5, **hp)
    model, params, _ = open_lm(lm)
    control = methods.load(fitted, model)
    assert float(control.alpha) == 1.5
    expert = fitted.spec["inputs"]["expert"]
    alone = methods.load(Artifact(root / f"finetune-{expert}", expert), model)
    jax.tree.map(np.testing.assert_array_equal, control.expert.control, alone)
    assert tree.size_bytes(control) < 0.2 * tree.size_bytes(params)  # no weights of the model
    prompts, completion = worlds.prompts([[1, 2, 3], [4]]), jnp.array([[1, 2], [3, 4]])
    z, plus, minus, found = (
        loop.forward(model, params, prompts, completion, c)
        for c in (IDENTITY, control.expert.control, control.anti.control, control)
    )
    np.testing.assert_allclose(found, z + 1.5 * (plus - minus), rtol=1e-4, atol=1e-4)
