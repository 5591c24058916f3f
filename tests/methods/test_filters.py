"""Vocabulary filters: three tokens by hand, truncation against conditioning, predicates, order, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain
from ctg_jax.controls import truncate
from ctg_jax.data.tokenizer import to_prompts
from ctg_jax.decode import loop
from ctg_jax.methods import filters
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages.controls import made
from ctg_jax.types import InputError, Sampling

WORLD = worlds.Bigram()
PARAMS = worlds.table([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]])


def cut(alpha=1.0, cond=None, kept=(1.0, 1.0, 0.0)):
    return filters.Filter(jnp.asarray(kept), jnp.float32(alpha), cond)


def next_token(control, cond=None):
    prompts = worlds.prompts([[0]], cond=cond)
    z = loop.forward(WORLD, PARAMS, prompts, jnp.zeros((1, 1), jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[0, 0]))


def test_three_tokens_by_hand():
    np.testing.assert_allclose(next_token(cut()), (0.625, 0.375, 0), atol=1e-6)
    np.testing.assert_allclose(next_token(cut(0.0)), (0.5, 0.3, 0.2), rtol=1e-6)
    np.testing.assert_allclose(next_token(cut(0.75)), np.array([0.5, 0.3, 0.05]) / 0.85, rtol=1e-5)
    for strength in (0.0, 0.5, 1.0):
        row = next_token(cut(1.0, "strength"), {"strength": jnp.array([strength])})
        np.testing.assert_allclose(row, next_token(cut(strength)), atol=1e-6)


def test_it_truncates_every_step_and_does_not_condition_on_the_whole_text():
    """Given that neither of two tokens is token 2, the model would write 00 with .54348 and 10 with .06522."""
    found = worlds.enumerate_all(WORLD, PARAMS, [0], 2, cut())
    expected = {(0, 0): 0.390625, (0, 1): 0.234375, (1, 0): 0.1875, (1, 1): 0.1875}
    for text, probability in found.items():
        assert probability == pytest.approx(expected.get(text, 0.0), abs=1e-5)
    base = worlds.enumerate_all(WORLD, PARAMS, [0], 2)
    assert base[0, 0] / sum(base[text] for text in expected) == pytest.approx(0.54348, abs=1e-5)


def passes(word, **rule):
    return bool(filters.passed([word], [rule])[0])


@pytest.mark.parametrize(
    "rule, yes, no",
    [
        (dict(without=["e", "x"]), "gadsby", "the"),
        (dict(without="th"), "hat", "path"),
        (dict(without_all=["a", "b"]), "bob", "cab"),
        (dict(with_any=["a", "z"]), "cat", "dog"),
        (dict(with_all=["a", "t"]), "cat", "cab"),
        (dict(starts=["un", "re"]), "redo", "undone"[1:]),
        (dict(ends="ing"), "going", "goings"),
        (dict(letter_at={"0": "c", "2": "t"}), "cot", "cob"),
        (dict(length=3), "abc", "abcd"),
        (dict(shorter=3), "ab", "abc"),
        (dict(longer=3), "abcd", "abc"),
        (dict(near=dict(word="kitten", distance=3)), "sitting", "seating"),
        (dict(syllables=2), "happy", "time"),
        (dict(syllables=1), "time", "table"),
        (dict(rhymes="light"), "night", "late"),
        (dict(rhymes="make"), "lake", "make"),
        (dict(palindrome=True), "level", "label"),
        (dict(anagram="listen"), "silent", "silence"),
        (dict(from_letters="stone"), "tones", "tent"),
        (dict(letters_at_most=1), "world", "hello"),
        (dict(letters_at_least=2), "noon", "moon"),
        (dict(function="keyword:iskeyword"), "while", "whale"),
        (dict(starts="a", length=2), "ab", "abc"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_predicates(rule, yes, no):
    assert passes(yes, **rule) and not passes(no, **rule)


def test_transforms_blanks_and_whole_words():
    texts = [" The", "ing", "!", " ", "E", " ice"]
    assert filters.passed(texts, [{"without": "e"}]).tolist() == [False, True, True, True, True, False]
    assert filters.passed(texts, [{"without": "e"}], ["lower"]).tolist() == [False, True, True, True, False, False]
    short = filters.passed(texts, [{"shorter": 4}], ["letters"], whole_words=True)
    assert short.tolist() == [True, False, True, True, False, True]
    assert filters.passed(texts, [{"longer": 0}], ["letters"], "cut").tolist() == [True, True, False, False, True, True]
    assert filters.passed([" a b "], [{"starts": "a", "ends": "b"}], ["strip"]).all()
    assert not filters.passed([" a b "], [{"starts": "a", "ends": "b"}], ["strip_left"]).any()


def test_no_sample_of_a_model_breaks_a_rule(small):
    root, lm, _ = small
    model, params, tokenizer = open_lm(lm)
    settings = dict(rules=[{"without": ["e", "a"]}], transforms=["lower"])
    control = methods.load(stage(root, made, {"method": "filters", "init": settings}, lm=lm), model)
    kept = np.asarray(control.kept) >= 0.5
    texts = tokenizer.token_texts(range(tokenizer.vocab))
    ends = np.isin(np.arange(tokenizer.vocab), tokenizer.ends)
    assert kept[ends].all()
    assert all(k == (not set("aeAE") & set(t)) for k, t, end in zip(kept, texts, ends) if not end)
    out = loop.generate(model, params, to_prompts(tokenizer, ["it", "so"], seed=0), control, Sampling(max_new=8))
    written = tokenizer.decode([row.tolist() for row in np.asarray(out.tokens)])
    assert not any(set("aeAE") & set(text) for text in written)


def test_a_filter_comes_before_truncation():
    tight = truncate.TopP(jnp.float32(0.1))
    prompts = worlds.prompts([[1]])  # token 2 has .8
    found = loop.forward(WORLD, PARAMS, prompts, jnp.zeros((1, 1), jnp.int32), Chain((cut(), tight)))
    np.testing.assert_allclose(jax.nn.softmax(found[0, 0]), (0.5, 0.5, 0), atol=1e-6)
    with pytest.raises(InputError, match="Filter comes after TopP"):
        loop.generate(WORLD, PARAMS, prompts, Chain((tight, cut())), Sampling(max_new=1))
    soft = loop.generate(WORLD, PARAMS, prompts, Chain((tight, cut(0.5))), Sampling(max_new=1))
    assert soft.tokens.tolist() == [[2]]  # a filter that removes nothing may come after it
    with pytest.raises(InputError, match="Filter leave no token"):
        loop.generate(WORLD, PARAMS, prompts, cut(kept=(0.0, 0.0, 0.0)), Sampling(max_new=1))


def test_bad_input_raises_one_sentence(small):
    lm, params, tokenizer = open_lm(small[1])
    for settings, words in [
        (dict(rules=[]), "rules is empty"),
        (dict(rules=[{"withot": "e"}]), "no predicate 'withot'; did you mean 'without'"),
        (dict(rules=[{"length": 2}], transforms=["lowr"]), "no 'lowr'; did you mean 'lower'"),
        (dict(rules=[{"length": 2}], blank="drop"), "blank is 'drop'"),
        (dict(rules=[{"length": 2}], alpha=1.5), "alpha is 1.5, expected a number from 0 to 1"),
        (dict(rules=[{"length": 999}]), "which no token keeps"),
        (dict(rules=[{"near": "word"}]), "'near' cannot use 'word'"),
        (dict(rules=[{"function": "nowhere:f"}]), "function is 'nowhere:f'"),
    ]:
        with pytest.raises(InputError, match=words):
            filters.make(lm, None, tokenizer=tokenizer, **settings)
    with pytest.raises(InputError, match="a vocabulary of 3 tokens, but the model has"):
        loop.forward(lm, params, worlds.prompts([[1]]), jnp.zeros((1, 1), jnp.int32), cut())
