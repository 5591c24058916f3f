"""Gamma sampling: three tokens by hand, the closed form of a set's share, the order of sets, words, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain
from ctg_jax.controls import truncate
from ctg_jax.decode import loop
from ctg_jax.methods import gamma
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages.controls import made
from ctg_jax.types import InputError

P = (0.5, 0.3, 0.2)


def moved(p, sets, numbers, cond=None, before=(), **settings):
    world, key = worlds.Bigram(vocab=len(p)), jax.random.key(0)
    control = gamma.init(world, key, gamma=numbers, sets=sets, cond="strength" if cond else None, **settings)
    prompts = worlds.prompts([[0]], cond=cond)
    params = worlds.table([p] * len(p))
    z = loop.forward(world, params, prompts, jnp.zeros((1, 1), jnp.int32), Chain((*before, control)))
    return np.asarray(jax.nn.softmax(z[0, 0]))


@pytest.mark.parametrize(
    "p, sets, numbers, expected",
    [
        (P, [[0]], [0.25], (0.75043, 0.14974, 0.09983)),  # .5 ^ .41421
        (P, [[0]], [0.75], (0.18761, 0.48744, 0.32496)),
        (P, [[0], [1]], [0.25, 0.75], (0.75043, 0.07271, 0.17686)),  # token 1 has .6 of what is not frozen
        ((0.1, 0.2, 0.3, 0.4), [[0, 1]], [0.1], (0.27546, 0.55093, 0.07441, 0.09921)),  # of the authors' documents
        (P, [[0]], [0.5], P),
        (P, [[0, 1, 2]], [0.1], P),  # a set of everything is left alone, and so is one of nothing
        (P, [[]], [0.1], P),
    ],
)
def test_by_hand(p, sets, numbers, expected):
    np.testing.assert_allclose(moved(p, sets, numbers), expected, atol=1e-5)
    np.testing.assert_allclose(moved(p, sets, numbers, alpha=0.0), p, rtol=1e-6)


def test_the_share_of_a_set_and_the_proportions():
    p = np.array([0.1, 0.25, 0.05, 0.4, 0.2])
    for g in (0.05, 0.3, 0.9):
        found = moved(tuple(p), [[1, 2]], [g])
        share = 0.3 ** np.tan(np.pi * g / 2)
        np.testing.assert_allclose(found[1] + found[2], share, rtol=1e-4)
        np.testing.assert_allclose(found[1] / found[2], 5, rtol=1e-4)
        np.testing.assert_allclose(found[[0, 3, 4]], p[[0, 3, 4]] / 0.7 * (1 - share), rtol=1e-4)
    assert moved(P, [[0]], [1e-5])[0] > 0.9999 and moved(P, [[0]], [0.999])[0] < 1e-6
    for activation, exponent in (("log", np.log(2) / np.log(4)), ("inverse", 4), ("linear", 0.25)):
        found = moved(P, [[1]], [0.25], activation=activation)[1]
        np.testing.assert_allclose(found, 0.3**exponent, rtol=1e-4)


def test_sets_do_not_commute_and_the_later_one_takes_a_token_of_both():
    one, two = moved(P, [[0], [1]], [0.25, 0.75]), moved(P, [[1], [0]], [0.75, 0.25])
    assert np.abs(one - two).max() > 0.01
    # {0} is raised and then, with token 1, lowered: token 0 is not frozen, so its odds to token 1 stay.
    first, both = moved(P, [[0]], [0.25]), moved(P, [[0], [0, 1]], [0.25, 0.75])
    np.testing.assert_allclose(both[0] / both[1], first[0] / first[1], rtol=1e-5)
    np.testing.assert_allclose(both[0] + both[1], (first[0] + first[1]) ** np.tan(np.pi * 0.375), rtol=1e-4)


def test_strength_per_row_and_a_filter_before():
    np.testing.assert_allclose(moved(P, [[0]], [0.25], alpha=-1.0), moved(P, [[0]], [0.75]), rtol=1e-5)
    cond = {"strength": jnp.array([-1.0])}
    np.testing.assert_allclose(moved(P, [[0]], [0.25], cond=cond), moved(P, [[0]], [0.75]), rtol=1e-5)
    found = moved(P, [[1, 2]], [0.25], before=(truncate.TopP(jnp.float32(0.7)),))
    share = 0.375 ** np.tan(np.pi / 8)
    np.testing.assert_allclose(found, (1 - share, share, 0), atol=1e-5)


def test_words_become_their_first_tokens(small):
    root, lm, _ = small
    model, _, tokenizer = open_lm(lm)
    settings = dict(gamma=(0.2, 0.8), words=(("good", "nice"), ("bad",)), alpha=0.5)
    control = methods.load(stage(root, made, {"method": "gamma", "init": settings}, lm=lm), model)
    firsts = [tokenizer.encode([w])[0][0] for w in ("good", "nice", "bad")]
    assert np.flatnonzero(control.member[1]).tolist() == [firsts[2]]
    assert np.flatnonzero(control.member[0]).tolist() == sorted(firsts[:2])
    assert float(control.alpha) == 0.5 and control.activation == "tan"
    one = next(w for w in ("good", "bad", "nice", "sad") if len(tokenizer.encode([w])[0]) == 1)
    assert gamma.first_tokens(tokenizer, [one, "zq"], whole=True) == tokenizer.encode([one])[0]
    with pytest.raises(InputError, match=r"\['zq'\] … has no token"):
        gamma.make(model, None, tokenizer=tokenizer, words=[["zq"]], gamma=[0.2], whole=True)


def test_bad_input_raises_one_sentence():
    world, key = worlds.Bigram(), jax.random.key(0)
    for settings, words in [
        (dict(gamma=[0.5]), "either words or sets"),
        (dict(gamma=[0.5], sets=[[0]], words=[["a"]]), "either words or sets"),
        (dict(gamma=[0.5, 0.5], sets=[[0]]), "1 sets and 2 numbers gamma"),
        (dict(gamma=[], sets=[]), "0 sets and 0 numbers"),
        (dict(gamma=[1.0], sets=[[0]]), "gamma is 1.0, expected a number between 0 and 1"),
        (dict(gamma=[0.5], sets=[[3]]), "token id 3 is not in the vocabulary"),
        (dict(gamma=[0.5], sets=[[0]], activation="sin"), "activation is 'sin', expected one of tan"),
        (dict(gamma=[0.5], sets=[[0]], alpha=float("inf")), "alpha is inf"),
    ]:
        with pytest.raises(InputError, match=words):
            gamma.init(world, key, **settings)
    control = gamma.init(worlds.Bigram(vocab=4), key, gamma=[0.5], sets=[[0]])
    with pytest.raises(InputError, match="a vocabulary of 4 tokens, but the model has 3"):
        loop.forward(world, worlds.table([P] * 3), worlds.prompts([[0]]), jnp.zeros((1, 1), jnp.int32), control)
