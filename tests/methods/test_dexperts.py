"""DExperts: three tokens by hand, closed forms in enumerable worlds, order of filter and experts, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain
from ctg_jax.controls import truncate
from ctg_jax.controls.delta import full
from ctg_jax.decode import loop
from ctg_jax.methods import dexperts
from ctg_jax.run.stage import open_lm
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
    return dexperts.experts(dexperts.member(WORLD, PLUS), dexperts.member(WORLD, MINUS), alpha, **more)


def test_three_tokens_by_hand():
    """.5 · .6/.2, .3 · .3/.4, .2 · .1/.4 = 1.5, .225, .05; their sum is 1.775."""
    np.testing.assert_allclose(next_token(pair(1.0)), np.array([1.5, 0.225, 0.05]) / 1.775, rtol=1e-5)
    # alpha = -1 turns the fractions over: .5/3, .3/.75, .2/.25 = 1/6, .4, .8
    other = np.array([1 / 6, 0.4, 0.8])
    np.testing.assert_allclose(next_token(pair(-1.0)), other / other.sum(), rtol=1e-5)
    np.testing.assert_allclose(next_token(pair(0.0)), [0.5, 0.3, 0.2], rtol=1e-6)


def test_without_an_anti_expert_and_contrastive_by_hand():
    """p (p⁺/p)^2 = .72, .3, .05; contrastive decoding, p^1.5 / q^.5, against the amateur [.2, .4, .4]."""
    alone = dexperts.experts(dexperts.member(WORLD, PLUS), None, 2.0)
    np.testing.assert_allclose(next_token(alone), np.array([0.72, 0.3, 0.05]) / 1.07, rtol=1e-5)
    found = next_token(dexperts.contrastive(dexperts.member(WORLD, MINUS), 0.5))
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
    member = dexperts.member(WORLD, PLUS)
    control = dexperts.contrastive(member, 2.0) if anti else dexperts.experts(member, None, 2.0)
    found = next_token(Chain((truncate.TopP(jnp.float32(0.7)), control)))
    assert found[2] == 0 and np.isfinite(found).all()


def test_the_distribution_in_an_exact_world():
    keys = jax.random.split(jax.random.key(3), 3)
    base, plus, minus = (WORLD.init(k) for k in keys)
    control = dexperts.experts(dexperts.member(WORLD, plus), dexperts.member(WORLD, minus), 0.7)
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
    control = dexperts.experts(dexperts.member(lm, plus), dexperts.member(lm, minus), 0.5)
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
    found = loop.forward(lm, params, long, completion, dexperts.guidance(lm, params, 1.5))
    np.testing.assert_allclose(found, empty + 1.5 * (z - empty), rtol=1e-4, atol=1e-4)


def test_an_instruction_as_the_expert():
    lm = worlds.tiny(vocab=5)
    params = worlds.lively(lm)
    plain, told = worlds.prompts([[1, 2]]), worlds.prompts([[4, 4, 1, 2]])
    completion = jnp.array([[1, 2]])
    z, after = (loop.forward(lm, params, p, completion) for p in (plain, told))
    found = loop.forward(lm, params, plain, completion, dexperts.prompted(lm, params, [4, 4], 0.3))
    np.testing.assert_allclose(found, z + 0.3 * (after - z), rtol=1e-4, atol=1e-4)


def test_a_delta_is_merged_once():
    lm = worlds.tiny(vocab=5)
    params = worlds.lively(lm)
    change = full(params, r"layers/mlp/up/kernel")
    change = change.replace(changes=jax.tree.map(lambda x: x + 0.1, change.changes))
    member = dexperts.member(lm, params, change)
    wanted = params["layers"]["mlp"]["up"]["kernel"][1] + 0.1
    np.testing.assert_allclose(member.params["layers"][1]["mlp"]["up"]["kernel"], wanted, rtol=1e-6)


def test_bad_input_is_said_in_a_sentence(small):
    other = worlds.Bigram(vocab=4)
    control = dexperts.experts(dexperts.member(other, other.init(jax.random.key(0))), None, 1.0)
    with pytest.raises(InputError, match="expert has a vocabulary of 4 tokens and the base model one of 3"):
        next_token(control)
    with pytest.raises(InputError, match="alpha is nan"):
        pair(float("nan"))
    root, lm, data = small
    with pytest.raises(InputError, match="kind is 'prompt'"):
        dexperts.fit(root, lm=lm, data=data, kind="prompt")


def test_fit(small):
    root, lm, data = small
    hp = dict(adapter=dict(rank=2), training=dict(steps=3, batch=4, tokens=16, warmup=1))
    fitted = dexperts.fit(root, lm=lm, data=data, alpha=1.5, **hp)
    model, params, _ = open_lm(lm)
    control = methods.load(fitted, model)
    assert float(control.alpha) == 1.5
    expert = root / f"finetune-{fitted.spec['inputs']['expert']}"
    assert expert.exists() and len(list(root.glob("dexperts-*"))) == 1
    base = params["layers"]["mlp"]["up"]["kernel"][0]
    assert float(jnp.abs(control.expert.params["layers"][0]["mlp"]["up"]["kernel"] - base).max()) > 0
