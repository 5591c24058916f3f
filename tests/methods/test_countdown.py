"""Countdown: what each token is told, by hand; the distribution given the length, in a world whose probability of
ending is constant; bounds; a fit; bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain, enter
from ctg_jax.controls.delta import Delta
from ctg_jax.controls.vectors import SoftPrompt
from ctg_jax.decode import loop
from ctg_jax.methods import countdown
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sources
from ctg_jax.types import InputError, Sampling

LM = worlds.tiny(depth=1)
PARAMS = worlds.lively(LM)


def counting(**more):
    """A countdown that adds the number of tokens left, plus 1, to every feature."""
    table = jnp.arange(1.0, 7.0)[:, None] * jnp.ones((1, 16))
    fields = dict(delta=Delta({}, jnp.ones(())), table=table, length=jnp.float32(2), scale=jnp.ones(()))
    return countdown.Countdown(**{**fields, **more})


def told(control, rows=((1, 2, 3),), new=3, before=None, cond=None):
    """What is added to each token of the prompts and of `new` tokens behind them, minus 1: -1 where nothing is."""
    batch = worlds.prompts([list(r) for r in rows], cond=cond)
    chain = control if before is None else Chain((before, control))
    state = chain.init(batch, 9)
    x, mask = jnp.zeros((*batch.tokens.shape, 16)), batch.mask
    x, mask, state = enter(chain, x, mask, state)
    mask = jnp.concatenate([mask, jnp.ones((len(mask), new), bool)], axis=1)
    pos = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    added = 0 if before is None else before.added()
    return (chain.hidden(jnp.zeros((*mask.shape, 16)), 0, pos, state)[:, added:, 0] - 1).astype(int).tolist()


def test_what_each_token_is_told_by_hand():
    """Of a prompt of 3 tokens and a length of 2: the last token of the prompt is told 2, the first new one 1."""
    assert told(counting()) == [[-1, -1, 2, 1, 0, 0]]
    assert told(counting(whole=True)) == [[4, 3, 2, 1, 0, 0]]
    assert told(counting(length=jnp.float32(9))) == [[-1, -1, 5, 5, 5, 5]]  # 9, 8, 7, 6: beyond the table
    assert told(counting(), rows=((1, 2, 3), (5,)))[1][2:] == [2, 1, 0, 0]  # padded on the left
    cond = {"n": jnp.array([1, 3])}
    assert [row[2:] for row in told(counting(cond="n"), ((1, 2, 3), (4, 5)), cond=cond)] == [[1, 0, 0, 0], [3, 2, 1, 0]]


def test_behind_a_soft_prompt_it_counts_as_it_does_alone():
    assert told(counting(), before=SoftPrompt(jnp.zeros((2, 16)))) == told(counting())


def test_only_the_input_is_told():
    control = counting()
    state = control.began(control.init(worlds.prompts([[1]]), 4), jnp.array([1]), jnp.array([0]))
    h, pos = jnp.zeros((1, 1, 16)), jnp.zeros((1, 1), jnp.int32)
    assert control.hidden(h, 2, pos, state) is h
    traced = jax.jit(lambda site: control.hidden(h, site, pos, state))
    assert float(traced(2).sum()) == 0 and float(traced(0).sum()) == 48


def test_the_words_stay_and_the_end_comes_in_time():
    """Two words and an end of probability .3 whatever the word is: given the length, the end has probability 1 where
    nothing is left and 0 before, and words keep their probabilities."""
    world = worlds.Bigram()
    p = np.array([[0.42, 0.28, 0.3], [0.14, 0.56, 0.3], [0.3, 0.3, 0.4]])
    params, generator = worlds.table(p), np.random.default_rng(0)
    rows = []
    while len(rows) < 400:
        row, last = [], 0
        while last != 2 and len(row) < 6:
            last = int(generator.choice(3, p=p[last]))
            row.append(last)
        if last == 2 and len(row) > 1:
            rows.append(row)
    most = max(map(len, rows))
    batch = worlds.written([0], np.array([r + [2] * (most - len(r)) for r in rows]))
    sizes = np.array([len(r) for r in rows])
    batch |= {"written": jnp.arange(most)[None] < sizes[:, None], "asked": jnp.asarray(sizes - 1)}
    control = countdown.Countdown(Delta({}, jnp.ones(())), jnp.zeros((6, 3)), jnp.float32(3), jnp.ones(()))
    fitted, _ = worlds.trained(
        countdown.loss(world), control, {"params": params}, [batch] * 500, rate=0.5, trained="table"
    )
    found = worlds.enumerate_all(world, params, [0], 4, fitted)
    law = lambda *start: sum(x for y, x in found.items() if y[: len(start)] == start)  # noqa: E731
    ends = sum(x for y, x in found.items() if y[3] == 2 and 2 not in y[:3])
    early = sum(x for y, x in found.items() if 2 in y[:3])
    assert ends > 0.98 and early < 0.01
    assert law(0) == pytest.approx(0.6, abs=0.05) and law(0, 1) / law(0) == pytest.approx(0.4, abs=0.05)


def test_bounds_are_uniform_from_the_length_to_the_length_and_its_slack():
    keys = jax.random.split(jax.random.key(0), 3000)
    found = np.asarray(countdown.bounds(keys, jnp.full(3000, 5.0), 0.5))  # 5 to 7.5, rounded up
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == [5, 6, 7, 8] and np.all(np.abs(counts / 3000 - 0.25) < 0.04)
    assert np.unique(countdown.bounds(keys, jnp.full(3000, 5.0), 0.0)).tolist() == [5]
    assert np.unique(countdown.bounds(keys, jnp.full(3000, 10.0), 0.1)).tolist() == [10, 11]


def test_at_scale_0_it_is_the_base_model():
    control = countdown.neutral(countdown.example(LM, jax.random.key(0)))
    batch, completion = worlds.prompts([[1, 2, 3]]), jnp.array([[1, 2]])
    base = loop.forward(LM, PARAMS, batch, completion)
    np.testing.assert_array_equal(loop.forward(LM, PARAMS, batch, completion, control), base)


def test_cut_texts_do_not_count_as_ended(small):
    tokenizer = open_lm(small[1])[2]
    short, long = {"text": "good fun"}, {"text": "so good so nice so good so nice so good"}
    (row,) = countdown.completed([short, long], tokenizer, 1, 6)
    assert row["prompt"] == "good" and row["tokens"][-1] == tokenizer.eos
    assert row["asked"] == len(row["tokens"]) - 1 == len(tokenizer.encode_after(["good"], [" fun"])[0])
    assert row["range"] == row["asked"].bit_length() - 1


def test_a_fit_trains_once_for_all_lengths(small):
    root, lm, data = small
    settings = dict(training=dict(steps=2, batch=4, tokens=16), adapter=dict(rank=2), shape=dict(longest=12), even=True)
    three, five = (countdown.fit(root, lm=lm, data=data, length=n, **settings) for n in (3, 5))
    model, params, _ = open_lm(lm)
    a, b = (methods.load(x, model) for x in (three, five))
    assert (float(a.length), float(b.length), a.cond) == (3, 5, None) and a.table.shape == (13, 16)
    rms = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))  # noqa: E731
    assert rms(a.table) == pytest.approx(rms(params["embed"]["tokens"]), rel=1e-4)
    assert three.spec["inputs"]["learned"] == five.spec["inputs"]["learned"]
    each = methods.load(countdown.fit(root, lm=lm, data=data, **settings), model)
    batch = worlds.prompts([[1], [2]], cond={"length": jnp.array([2, 4])})
    assert loop.generate(model, params, batch, each, Sampling(3)).tokens.shape == (2, 3)


def test_the_records_of_prompts_ask_for_lengths(small):
    root, lm, data = small
    settings = dict(training=dict(steps=2, batch=4, tokens=16), adapter=dict(rank=2), shape=dict(longest=12), even=True)
    fitted = countdown.fit(root, lm=lm, data=data, **settings)
    found = countdown.conditions(fitted, lm, ["a", "b"], [{"tokens": 2}, {"tokens": 63}])
    assert found["length"].tolist() == [2, 63] and countdown.conditions(fitted, lm, ["a"], [{}]) == {}
    fixed = countdown.fit(root, lm=lm, data=data, length=3, **settings)
    assert countdown.conditions(fixed, lm, ["a"], [{"tokens": 2}]) == {}
    for asked in (64, 0, 2.5, None):
        with pytest.raises(InputError, match=f"prompt 2 asks for {asked} tokens, expected a whole number from 1 to 63"):
            countdown.conditions(fitted, lm, ["a", "b"], [{"tokens": 2}, {"tokens": asked}])


def test_bad_input_raises_one_sentence(small, tmp_path):
    root, lm, data = small
    for settings, words in [
        (dict(length=0), "longest is 256 and length is 0, expected at least 1 of each"),
        (dict(longest=0), "longest is 0"),
        (dict(length=48), "length is 48, but the model's context is 48: ask for fewer tokens"),
        (dict(kind="prompt"), "kind is 'prompt', expected 'lora' or 'full'"),
    ]:
        with pytest.raises(InputError, match=words):
            countdown.init(LM, jax.random.key(0), **settings)
    with pytest.raises(InputError, match="slack is -1, expected at least 0"):
        countdown.loss(LM, slack=-1)
    with pytest.raises(InputError, match=r"no text has from 1 to 1 tokens behind its prompt: raise training.tokens"):
        countdown.fit(root, lm=lm, data=data, training=dict(steps=1, batch=2, tokens=2))
    control = countdown.init(LM, jax.random.key(0), cond="length")
    with pytest.raises(InputError, match=r"reads prompts.cond\['length'\]"):
        loop.generate(LM, PARAMS, worlds.prompts([[1]]), control)
    with pytest.raises(InputError, match="the length asked for is 0, expected at least 1 token"):
        loop.generate(LM, PARAMS, worlds.prompts([[1], [2]], cond={"length": jnp.array([3, 0])}), control)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "word"}) + "\n")
    one = stage(root, sources.load_data, dict(source=f"jsonl:{tmp_path / 'one.jsonl'}", split="all"))
    with pytest.raises(InputError, match=r"no text has from 1 to"):
        countdown.fit(root, lm=lm, data=one)


def test_the_sizes_of_the_paper_fit_on_paper():
    large = Transformer.llama(
        vocab=32000, width=4096, depth=4, heads=32, kv_heads=8, mlp_width=14336, context=2048, dtype="bfloat16"
    )
    out = worlds.written_on_paper(large, lambda key: countdown.init(large, key, longest=512))
    assert out.tokens.shape == (1, 2)
