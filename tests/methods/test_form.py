"""Constraints of form: automata against `re` and `json`, an enumerated world, the budget, rows, order, bad input."""

import itertools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain
from ctg_jax.controls import automaton, truncate
from ctg_jax.controls.constraints import Ban, Force, marks
from ctg_jax.controls.vectors import SoftPrompt, soft_prompt
from ctg_jax.data.tokenizer import to_prompts
from ctg_jax.decode import loop
from ctg_jax.methods import arithmetic, form, steer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sampling, sources
from ctg_jax.stages.controls import made
from ctg_jax.types import InputError, Sampling
from tests.data.sentencepiece import llama_like

LETTERS = "abc"
WORLD = worlds.Bigram(vocab=4)  # the tokens a, b, c and the end
PARAMS = worlds.table([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
END = 3
SCHEMA = {
    "type": "object",
    "properties": {"dish": {"enum": ["soup", "fish"]}, "stars": {"type": "array", "items": {"type": "integer"}}},
    "required": ["dish", "stars"],
}


def letters(*forms, alpha=1.0, **settings):
    """The control of forms over the tokens a, b, c and the end, for `WORLD`."""
    spelled = [c.encode() for c in LETTERS] + [None]
    found = automaton.over_tokens([form.compiled(f) for f in forms], spelled, [END], 64, 8)
    control = form.init(WORLD, None, forms=forms, states=64, classes=8, alpha=alpha, **settings)
    arrays = dict(starts=found.starts, table=found.table, classes=found.classes, need=found.need)
    return control.replace(**{name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()})


def accepts(a, text):
    state = 0
    for byte in text.encode():
        state = a.table[state, byte]
        if state < 0:
            return False
    return bool(a.accepts[state])


def texts(alphabet, longest):
    return ("".join(t) for n in range(longest + 1) for t in itertools.product(alphabet, repeat=n))


# --- automata -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["a|ab", "(a|ab)(c|bcd)?", "a*?b?", "a??", "x*|xy", "[ab]{2,3}c?", "é?a|à", ".*"])
def test_a_regular_expression_matches_whole_texts_by_any_of_its_alternatives(pattern):
    """By itself `outlines-core` stops at the first alternative that matches: "a|ab" would accept "a" alone."""
    found = automaton.of_regex(pattern)
    for text in texts("abcxé", 4):
        assert accepts(found, text) == bool(re.fullmatch(pattern, text)), text


def has(word, text):
    """Whether the word is in the text with no letter beside an edge that is one."""
    before, after = (r"\b" if re.match(r"\w", word[edge]) else "" for edge in (0, -1))
    return bool(re.search(before + re.escape(word) + after, text))


@pytest.mark.parametrize("word", ["aba", "a", "b a", "a!", "!a", "aa", " ", "é"])
def test_a_word_is_whole(word):
    """ "cat" is not in "vacation"; letters of other alphabets are letters too."""
    for appears in (True, False):
        found = automaton.of_word(word, appears)
        assert all(accepts(found, t) == (has(word, t) == appears) for t in texts("ab !é", 5))


def test_words_that_appear_or_do_not():
    found = form.compiled(dict(words=["aba", "ca"], without="b"))
    assert all(accepts(found, t) == (has("aba", t) and has("ca", t) and not has("b", t)) for t in texts("abc ", 7))
    found = form.compiled(dict(regex="[a ]{3}", words="a"))
    assert sum(accepts(found, t) for t in texts("ab ", 4)) == len(["a  ", " a ", "  a", "a a"])


def test_tokens_may_be_parts_of_characters_and_the_table_is_as_small_as_it_can_be():
    spelled = [b"\xc3", b"\xa9", "é".encode(), b"x", b"xx", None]
    found = automaton.over_tokens([automaton.of_regex("éx?")], spelled, [5], 8, 8)
    start = int(found.starts[0])
    assert found.need[start] == 1 and sorted(found.need[2:6]) == [0, 0, 1, 1]
    whole, half = found.table[start, found.classes[2]], found.table[start, found.classes[0]]
    assert found.table[half, found.classes[1]] == whole and found.table[whole, found.classes[3]] > 1
    assert found.classes[4] == 0 and found.table[start, found.classes[5]] == automaton.FREE
    assert found.table[whole, found.classes[5]] == automaton.ENDED


# --- exact ----------------------------------------------------------------------------------------------------------


def by_hand(prompt, n, matches):
    """Every completion of n tokens -> its probability, cut and normalised at each step, up to the end."""
    table = np.exp(np.asarray(PARAMS["head"]["kernel"], np.float64)).T

    def finishes(text, left):
        return matches(text) or (left > 0 and any(finishes(text + c, left - 1) for c in LETTERS))

    found = {}
    for row in itertools.product(range(4), repeat=n):
        before, text, probability = prompt, "", 1.0
        for i, token in enumerate(row):
            allowed = [finishes(text + c, n - i - 1) for c in LETTERS] + [matches(text)]
            q = table[before] * allowed
            probability *= q[token] / q.sum()
            if token == END or not probability:
                break
            text, before = text + LETTERS[token], token
        found[row] = probability
    return found


@pytest.mark.parametrize("pattern", ["a(b|c)*", "(ab|b)c", "(?:a|b|c)*", "(aa)*b?"])
def test_the_distribution_is_the_models_cut_to_what_can_still_be_completed(pattern):
    prompts, every = [0], worlds.sequences(WORLD, 4)
    batch = worlds.prompts([prompts] * len(every))
    written = np.cumsum(np.cumsum(every == END, axis=1), axis=1) <= 1  # up to the first end
    logp = loop.score(WORLD, PARAMS, batch, jnp.asarray(every), letters(dict(regex=pattern)), jnp.asarray(written))
    wanted = by_hand(0, 4, lambda text: bool(re.fullmatch(pattern, text)))
    for row, found in zip(every.tolist(), np.exp(np.asarray(logp, np.float64).sum(1))):
        assert found == pytest.approx(wanted[tuple(row)], abs=1e-5), row


def test_three_tokens_by_hand():
    def first(control, new=2):
        z = loop.forward(WORLD, PARAMS, worlds.prompts([[0]]), jnp.zeros((1, new), jnp.int32), control)
        return np.asarray(jax.nn.softmax(z[0, 0]))

    np.testing.assert_allclose(first(letters(dict(regex="(a|b)b*"))), (4 / 7, 3 / 7, 0, 0), rtol=1e-5)
    np.testing.assert_allclose(first(letters(dict(regex="ab|c")), new=1), (0, 0, 1, 0), atol=1e-6)  # no time for "ab"
    soft = first(letters(dict(regex="(a|b)b*"), alpha=0.5))
    np.testing.assert_allclose(soft, np.array([0.4, 0.3, 0.1, 0.05]) / 0.85, rtol=1e-5)
    np.testing.assert_allclose(first(letters(dict(regex="c"), alpha=0.0)), (0.4, 0.3, 0.2, 0.1), rtol=1e-5)


def test_a_text_that_breaks_its_form_has_probability_0_and_finite_scores():
    control = letters(dict(regex="ab*"))
    batch = worlds.prompts([[0]] * 2)
    found = loop.score(WORLD, PARAMS, batch, jnp.array([[0, 2, 1, 0], [0, 1, 1, 1]]), control)
    assert found[0, 1] < -1e29 and bool(jnp.isfinite(found).all()) and bool((found[1] > -10).all())
    late = loop.score(WORLD, PARAMS, batch, jnp.array([[0, 0, 0, 0], [0, 0, 0, 1]]), letters(dict(regex="a*b")))
    assert late[0, 3] < -1e29 and bool((late[0, :3] > -10).all()) and bool((late[1] > -10).all())


def test_rows_have_forms_of_their_own_alone_as_together():
    forms = [dict(regex="a+"), dict(regex="[bc]{3}"), dict(without="a", words="cb")]
    control = letters(*forms, choice="form")
    rows, pick = [[0], [1, 2], [2, 0, 1], [1], [0, 0]], [0, 1, 2, 2, 1]
    sampling = Sampling(max_new=5, eos=(END,), pad=END)
    batch = worlds.prompts(rows, cond={"form": jnp.array(pick)})
    out = loop.generate(WORLD, PARAMS, batch, control, sampling)
    for i, row in enumerate(np.asarray(out.tokens)):
        text = "".join(LETTERS[t] for t in row if t != END)
        wanted = [r"a+", r"[bc]{3}", r"cb"][pick[i]]
        assert re.fullmatch(wanted, text), (text, wanted)
        alone = worlds.prompts([rows[i]], 3, cond={"form": jnp.array(pick[i : i + 1])})
        alone = alone.replace(keys=batch.keys[i : i + 1])
        assert loop.generate(WORLD, PARAMS, alone, control, sampling).tokens.tolist() == [row.tolist()]
    assert bool(jnp.isfinite(loop.score(WORLD, PARAMS, batch, out.tokens, control, out.mask)).all())
    with pytest.raises(InputError, match=r"prompts.cond\['form'\] is 3 in row 1, but the control has 3"):
        loop.generate(WORLD, PARAMS, worlds.prompts(rows, cond={"form": jnp.array([0, 3, 1, 0, 0])}), control, sampling)


@pytest.mark.slow
def test_a_formula_a_vector_a_prompt_and_a_form_in_one_chain_differ_from_row_to_row():
    lm = worlds.tiny()
    params, key = worlds.lively(lm), jax.random.key(3)
    spelled = [c.encode() for c in '{}":ab12,['] + [None]
    schemas = [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"enum": ["ab", 12, 2]}]
    forms = [*(dict(schema=s) for s in schemas), dict(regex="[ab12]{3,}")]
    found = automaton.over_tokens([form.compiled(f) for f in forms], spelled, [10], 64, 16)
    arrays = dict(starts=found.starts, table=found.table, classes=found.classes, need=found.need)
    shape = form.init(lm, None, forms=forms, choice="form", states=64, classes=16)
    chain = Chain((
        SoftPrompt(soft_prompt(key, 2, lm.width, choices=3, deviation=1.0), choice="style"),
        steer.example(lm, key).replace(cond="push"),
        arithmetic.example(lm, key).replace(cond="weight"),
        shape.replace(**{name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}),
        truncate.TopP(0.9),
    ))  # fmt: skip
    rows = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [3, 3, 10, 1], [2, 8], [7, 7], [5, 1, 4], [10, 9]]
    cond = {
        "style": jnp.arange(8) % 3,
        "push": jnp.linspace(-1, 1, 8),
        "weight": jnp.linspace(0.2, 1, 8),
        "form": jnp.array([0, 1, 2, 0, 1, 2, 0, 0]),
    }
    batch, sampling = worlds.prompts(rows, cond=cond), Sampling(max_new=9, eos=(10,), pad=10)
    out = loop.generate(lm, params, batch, chain, sampling)
    for i, row in enumerate(np.asarray(out.tokens)):
        text = b"".join(spelled[t] for t in row if t != 10).decode()
        tests = (
            lambda text: type(json.loads(text)["a"]) is int,
            lambda text: json.loads(text) in ("ab", 12, 2),
            lambda text: re.fullmatch("[ab12]{3,}", text),
        )
        assert tests[int(cond["form"][i])](text)
        alone = worlds.prompts([rows[i]], 5, cond={name: x[i : i + 1] for name, x in cond.items()})
        single = loop.generate(lm, params, alone.replace(keys=batch.keys[i : i + 1]), chain, sampling)
        assert single.tokens.tolist() == [row.tolist()]
        np.testing.assert_allclose(single.logp[0], out.logp[i], atol=1e-5)


# --- a tokenizer ----------------------------------------------------------------------------------------------------


def test_the_bytes_of_tokens_spell_texts_also_with_byte_fallback():
    tokenizer = llama_like(["the food was good", "we waited an hour"] * 20)
    spelled = form.token_bytes(tokenizer, tokenizer.vocab)
    for text in ("the food naïve ☃ \n", "  two", "l'été"):
        (ids,) = tokenizer.encode_after(["a"], [text])
        assert b"".join(spelled[i] for i in ids) == text.encode()
    assert all(spelled[i] is None for i in tokenizer.ends)


def test_every_sample_is_json_of_its_schema(small):
    root, lm, _ = small
    model, params, tokenizer = open_lm(lm)
    spelled = form.token_bytes(tokenizer, model.vocab)
    for text in ("nice good day", "é ☃ \n", '{"dish": 1}'):
        assert b"".join(spelled[i] for i in tokenizer.encode([text])[0]) == text.encode()
    settings = dict(forms=[{"schema": SCHEMA}], states=64, classes=256)
    control = methods.load(stage(root, made, {"method": "form", "init": settings}, lm=lm), model)
    prompts = to_prompts(tokenizer, ["it", "so nice", "a day"] * 4, seed=0)
    sampling = Sampling(max_new=34, eos=tokenizer.ends, pad=tokenizer.ends[0])
    out = loop.generate(model, params, prompts, Chain((control, truncate.TopP(0.9))), sampling)
    for text in tokenizer.decode([row.tolist() for row in np.asarray(out.tokens)]):
        found = json.loads(text)
        assert found["dish"] in ("soup", "fish") and all(type(n) is int for n in found["stars"])
        assert list(found) == ["dish", "stars"]
    with pytest.raises(InputError, match=r"form 0 cannot be met: its shortest text takes 26 tokens, more than the 25"):
        loop.generate(model, params, prompts, control, Sampling(max_new=25, eos=tokenizer.ends))


def test_scripts_read_the_form_of_each_prompt_from_its_record(small, tmp_path):
    root, lm, _ = small
    settings = dict(forms=[{"regex": " yes"}, {"regex": " no"}], choice="answer", states=16, classes=16)
    control = stage(root, made, {"method": "form", "init": settings}, lm=lm)
    rows = [{"text": t, "answer": n} for t, n in (("it", 1), ("so nice", 0), ("a day", 1))]

    def written(records):
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        data = stage(root, sources.load_data, dict(source=f"jsonl:{tmp_path / 'prompts.jsonl'}", split="all"))
        given = dict(n=1, max_new=8, batch=3, strengths=[None])
        out = stage(root, sampling.sample, given, lm=lm, prompts=data, controls=[control])
        return [r["text"] for r in out.rows("samples.jsonl")]

    assert written(rows) == [" no", " yes", " no"]
    texts = ["it", "so"]
    assert form.conditions(control, lm, texts, [{}] * 2)["answer"].tolist() == [0, 1]  # a form for each prompt
    for records, words in [
        ([{}] * 3, "There are 2 forms and 3 prompts, none of which has a field 'answer'"),
        ([{"answer": 0}, {"answer": 2}], "prompt 2 has 2 as its 'answer', expected the number of a form, 0 to 1"),
        ([{"answer": 0}, {}], "prompt 2 has None as its 'answer'"),
    ]:
        with pytest.raises(InputError, match=words):
            sampling.conditions([control], lm, ["it"] * len(records), records)


def test_it_comes_before_truncation_and_beside_other_rules():
    prompts, control = worlds.prompts([[0]]), letters(dict(regex="c+"))
    sampling = Sampling(max_new=2, eos=(END,))
    with pytest.raises(InputError, match="Form comes after TopP"):
        loop.generate(WORLD, PARAMS, prompts, Chain((truncate.TopP(0.5), control)), sampling)
    with pytest.raises(InputError, match="Form and Ban leave no token that could be new token number 1"):
        loop.generate(WORLD, PARAMS, prompts, Chain((control, Ban(marks([2], 4)))), sampling)
    with pytest.raises(InputError, match="Form and Force leave no token that could be new token number 2"):
        loop.generate(WORLD, PARAMS, prompts, Chain((control, Force(np.array([2, 0])))), sampling)
    out = loop.generate(WORLD, PARAMS, prompts, Chain((control, truncate.TopP(0.5))), sampling)
    assert out.tokens[0, 0] == 2 and out.tokens[0, 1] in (2, END)


def test_without_the_library_it_asks_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(InputError, match=r"install it with pip install 'ctg_jax\[form\]'"):
        automaton.of_regex("a")


def test_bad_input_raises_one_sentence(small):
    lm, params, tokenizer = open_lm(small[1])
    for settings, words in [
        (dict(forms=[]), "forms is empty"),
        (dict(forms=[{}]), "an empty form"),
        (dict(forms=[{"regexp": "a"}]), "no part 'regexp'; did you mean 'regex'"),
        (dict(forms=[{"regex": "a"}, {"regex": "b"}]), "2 forms and choice is None"),
        (dict(forms=[{"regex": "a"}], alpha=2.0), "alpha is 2.0, expected a number from 0 to 1"),
        (dict(forms=[{"regex": "("}]), r"regex is '\(', which cannot be translated"),
        (dict(forms=[{"regex": "a(?=b)"}]), "cannot be translated"),
        (dict(forms=[{"schema": "{"}]), "schema is '{', which is no JSON"),
        (dict(forms=[{"schema": {"type": "integer", "minimum": 3}}]), "schema has the keyword 'minimum'"),
        (dict(forms=[{"schema": {"type": "object", "required": ["a"]}}]), "requires the property 'a'"),
        (dict(forms=[{"schema": {"type": "nothing"}}]), "schema cannot be translated"),
        (dict(forms=[{"regex": "[a-c]*", "words": "d"}]), "rules exclude each other"),
        (dict(forms=[{"words": ""}]), "words hold the empty string"),
        (dict(forms=[{"regex": "a{60}"}], states=32), "The forms have 63 states, more than states=32"),
        (dict(forms=[{"regex": "[a-z]*"}], classes=2), "more than classes=2 classes"),
    ]:
        with pytest.raises(InputError, match=words):
            form.make(lm, None, tokenizer=tokenizer, **settings)
    with pytest.raises(InputError, match="form 0: no text that is made of tokens"):
        automaton.over_tokens([automaton.of_regex("ab")], [b"a", None], [1], 8, 8)
    with pytest.raises(InputError, match="a vocabulary of 4 tokens, but the model has"):
        loop.forward(lm, params, worlds.prompts([[1]]), jnp.zeros((1, 1), jnp.int32), letters(dict(regex="a")))
