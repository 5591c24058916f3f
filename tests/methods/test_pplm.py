"""PPLM: the fusion by hand, every position recomputed without the scan, the window, a fitted classifier, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.controls.streams import Stream
from ctg_jax.decode import loop
from ctg_jax.methods import pplm
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages.controls import made
from ctg_jax.types import InputError

WORLD = worlds.Bigram()
P, A = [0.5, 0.3, 0.2], [0.6, 0.3, 0.1]
LM = worlds.tiny(depth=1)
PARAMS = worlds.lively(LM, factor=6)
ROWS, REST = [[1, 2, 3], [9]], jnp.array([[4, 5], [2, 2]])


def test_three_tokens_by_hand():
    control = pplm.init(WORLD, None, sets=((0,),)).replace(reader=Stream(worlds.table([A] * 3), lm=WORLD))
    z = loop.forward(WORLD, worlds.table([P] * 3), worlds.prompts([[0]]), jnp.zeros((1, 1), jnp.int32), control)
    np.testing.assert_allclose(jax.nn.softmax(z[0, 0]), (0.59133, 0.3011, 0.10757), atol=1e-5)
    slope = ((jnp.full((1, 1, 2, 2), 3.0), jnp.full((1, 1, 2, 2), 4.0)),)  # the norm is 10
    for power, factor in ((1.0, 0.1), (1.5, 10**-1.5), (0.0, 1.0)):
        k, v = pplm.scaled(slope, jnp.float32(power))[0]
        np.testing.assert_allclose((k[0, 0, 0, 0], v[0, 0, 0, 0]), (3 * factor, 4 * factor), rtol=1e-5)
    assert not np.any(pplm.scaled(jax.tree.map(jnp.zeros_like, slope), jnp.float32(1.5))[0][0])


def recomputed(control, tokens, first):
    """The logits after `tokens` from number `first` on, one position after the other, of one row without padding."""
    params = LM.unstack(PARAMS)
    cache, found = LM.init_cache(params, 1, len(tokens) + 1), []
    apply = lambda ids, cache: LM.apply(params, LM.embed(params, ids), jnp.ones(ids.shape, bool), cache)  # noqa: E731
    if first:
        cache = apply(jnp.array([tokens[:first]]), cache).cache
    for n in range(first, len(tokens)):
        token, plain = jnp.array([[tokens[n]]]), apply(jnp.array([tokens[: n + 1]]), LM.init_cache(params, 1, n + 1))
        logp = jax.nn.log_softmax(plain.logits[0, -1])
        states = plain.hidden[0]

        def loss(change, token=token, logp=logp, states=states, cache=cache, n=n):
            out = apply(token, pplm.shifted(cache, change))
            found_logp = jax.nn.log_softmax(out.logits[0, 0])
            away = control.kl * jnp.sum(jnp.exp(found_logp) * (found_logp - logp))
            if control.member is not None:
                return away - jnp.log(jnp.sum(jnp.where(control.member[0] >= 0.5, jnp.exp(found_logp), 0.0)))
            total = jnp.sum(states[:n], axis=0) + out.hidden[0, 0]
            words = jnp.exp(found_logp) @ PARAMS["embed"]["tokens"]
            real = jnp.ones((1, 1), bool)
            total += LM.apply(params, words[None, None], real, apply(token, cache).cache).hidden[0, 0]
            odds = control.value["kernel"] @ (total / (n + 2)) + control.value["bias"]
            return away - jax.nn.log_softmax(odds)[control.target]

        slope = jax.jit(jax.grad(loss))
        change = ((jnp.zeros_like(cache.k[0]), jnp.zeros_like(cache.v[0])),)
        for _ in range(control.steps):
            ((k, v),) = slope(change)
            real = jnp.arange(k.shape[2]) < n
            k, v = (jnp.where(real[None, None, :, None], g, 0.0) for g in (k, v))
            norm = jnp.sqrt(jnp.sum(k**2) + jnp.sum(v**2))
            factor = control.rate / norm**control.power if n else 0.0
            change = ((change[0][0] - factor * k, change[0][1] - factor * v),)
        out = apply(token, pplm.shifted(cache, change))
        cache = out.cache
        found.append(control.alpha * jax.nn.log_softmax(out.logits[0, 0]) + (1 - control.alpha) * logp)
    return jnp.stack(found)


@pytest.mark.parametrize("kind", ["bag", pytest.param("classifier", marks=pytest.mark.slow)])
def test_every_position_is_that_of_the_definition(kind):
    if kind == "bag":
        control = pplm.init(LM, None, sets=((1, 4, 7),), steps=2, rate=0.5, kl=0.2)
    else:
        control = pplm.init(LM, None, classes=3, target=2, steps=2, rate=0.5, kl=0.2)
        kernel = jax.random.normal(jax.random.key(1), (3, 16))
        control = control.replace(value={"kernel": kernel, "bias": jnp.arange(3.0)})
    z = loop.forward(LM, PARAMS, worlds.prompts(ROWS), REST, control)
    base = loop.forward(LM, PARAMS, worlds.prompts(ROWS), REST)
    for i, row in enumerate(ROWS if kind == "classifier" else ROWS[:1]):
        wanted = recomputed(control, [*row, *REST[i, :1].tolist()], len(row) - 1)
        np.testing.assert_allclose(jax.nn.log_softmax(z[i]), jax.nn.log_softmax(wanted), atol=2e-5)
    assert float(jnp.max(jnp.abs(jax.nn.softmax(z) - jax.nn.softmax(base)))) > 0.02
    if kind == "bag":  # the longer the steps, the more of the bag; without them the base
        batch = worlds.prompts(ROWS)
        inside = [
            jnp.sum(jax.nn.softmax(loop.forward(LM, PARAMS, batch, REST, c))[0, :, jnp.array([1, 4, 7])], axis=0)
            for c in (control.replace(rate=jnp.float32(x)) for x in (0.0, 0.2, 0.5))
        ]
        assert bool(jnp.all(inside[0] < inside[1])) and bool(jnp.all(inside[1] < inside[2]))
        base = jnp.sum(jax.nn.softmax(base)[0, :, jnp.array([1, 4, 7])], axis=0)
        np.testing.assert_allclose(inside[0], base, atol=1e-5)


def test_a_window_holds_the_newest_positions_and_rows_pick_their_bag():
    control = pplm.init(LM, None, sets=((1, 4), (2, 5)), steps=1, rate=0.5, options=dict(window=2, choice="bag"))
    params = LM.unstack(PARAMS)
    control = control.bind(params, params)
    mask = jnp.array([[True] * 4, [False, True, True, True]])
    tokens = jnp.array([[1, 2, 3, 4], [0, 5, 6, 7]])
    cache = LM.apply(params, LM.embed(params, tokens), mask, LM.init_cache(params, 2, 6)).cache
    x, real = LM.embed(params, jnp.array([[3], [3]])), jnp.ones((2, 1), bool)
    logp = jnp.full((2, LM.vocab), -np.log(LM.vocab))
    sums = jnp.zeros((2, 16)), jnp.zeros(2)
    moved = {}
    for pick in (0, 1):
        after = jax.jit(control._moved)(cache, x, real, logp, jnp.full(2, pick), sums)
        change = np.abs(np.asarray(after.k[0] - cache.k[0])).sum(axis=(1, 3)) > 0
        assert change.tolist() == [[False, False, True, True, False, False]] * 2
        out = LM.apply(params, x, real, after, last=1)
        moved[pick] = jax.nn.softmax(out.logits[:, 0])
    assert bool(jnp.all(moved[0][:, [1, 4]].sum(1) > moved[1][:, [1, 4]].sum(1)))


def test_words_and_a_classifier_that_is_fitted(small):
    root, lm, data = small
    model, _, tokenizer = open_lm(lm)
    bag = methods.load(stage(root, made, dict(method="pplm", init=dict(words=[["o", "e"]])), lm=lm), model)
    assert np.flatnonzero(bag.member[0]).tolist() == sorted(i for (i,) in tokenizer.encode(["o", "e"]))
    training = dict(steps=60, batch=12, tokens=16, rate=3e-1, log_every=20)
    fitted = pplm.fit(root, lm=lm, data=data, training=training, control=dict(steps=1, rate=0.1))
    control = methods.load(fitted, model)
    assert fitted.rows("metrics.jsonl")[-1]["accuracy"] > 0.8 and control.steps == 1 and control.reader.params is None
    assert sum(f.stat().st_size for f in fitted.path.rglob("*") if f.is_file()) < 100_000


def test_bad_input_raises_one_sentence(small):
    lm, _, tokenizer = open_lm(small[1])
    for settings, words in [
        (dict(), "exactly one of words, sets and classes"),
        (dict(sets=((1,),), classes=2), "exactly one of words, sets and classes"),
        (dict(sets=()), "no bag of words"),
        (dict(words=[["supercalifragilistic"]]), "No word of the bag .* is one token"),
        (dict(classes=2), "has to be fitted"),
        (dict(classes=2, target=2), "target is 2, expected a class from 0 to 1"),
        (dict(sets=((1,),), rate=-1.0), "rate is -1.0, expected a finite number of at least 0"),
        (dict(sets=((1,),), options=dict(horizon=2)), "a horizon of 0 or 1"),
        (dict(sets=((1,),), options=dict(windw=2)), "options hold 'windw'"),
        (dict(sets=((9999,),)), "token id 9999 is not in the vocabulary"),
    ]:
        with pytest.raises(InputError, match=words):
            pplm.make(lm, None, tokenizer=tokenizer, **settings)
    control = pplm.init(LM, None, sets=((1,), (2,)), options=dict(choice="bag"))
    with pytest.raises(InputError, match=r"prompts.cond\['bag'\] is 2 in row 1, but the control has 2"):
        loop.forward(LM, PARAMS, worlds.prompts(ROWS, cond={"bag": jnp.array([0, 2])}), REST, control)
