"""Prompt tuning and control prefixes: the keys and values of a text are the text, the embeddings of a text are the
text, the vectors of classes by hand, an optimum in a bigram world, a fit, bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods, tree
from ctg_jax.control import Chain
from ctg_jax.controls.parts import Parts, fold, memory
from ctg_jax.decode import loop
from ctg_jax.methods import prompt
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sources
from ctg_jax.types import InputError, Sampling

LM = worlds.tiny()
PARAMS = worlds.lively(LM)
TEXT = [4, 1, 9]
ROWS = [[1, 2, 3], [7, 5]]
COMPLETION = jnp.array([[1, 2], [3, 4]])


def scores(lm, rows, control, cond=None):
    batch = worlds.prompts(rows, cond=cond)
    return np.asarray(loop.score(lm, worlds.lively(lm), batch, COMPLETION, control))


def by_hand(**more):
    """One shared vector and two attributes of 2 and 3 classes, one vector of width 16 each, as tokens."""
    table = lambda *values: jnp.asarray(values, jnp.float32)[:, None, None] * jnp.ones((1, 1, 16))  # noqa: E731
    fields = dict(shared=jnp.full((1, 16), 9.0), parts={"label": table(1, 3), "area": table(0, 2, 7)})
    return Parts(**{**fields, "scale": jnp.ones(()), **more})


def first(control, cond):
    """[vectors] of each row, by their first number."""
    cond = {name: jnp.asarray(x) for name, x in cond.items()}
    return control.init(worlds.prompts(ROWS, cond=cond), 5)[:, :, 0].tolist()


def test_a_prefix_of_the_keys_and_values_of_a_text_is_the_text():
    """Where positions play no part, which is the one case in which it can be."""
    lm = worlds.tiny(positions="none")
    vectors = memory(lm, worlds.lively(lm), jnp.asarray([TEXT]))[0]
    control = prompt.init(lm, jax.random.key(0), place="prefix", length=3).replace(shared=vectors)
    behind = scores(lm, [TEXT + row for row in ROWS], Chain(()))
    np.testing.assert_allclose(scores(lm, ROWS, control), behind, atol=1e-5)
    assert abs(scores(lm, ROWS, Chain(())) - behind).max() > 0.1


def test_a_prompt_of_the_embeddings_of_a_text_is_the_text():
    control = prompt.init(LM, jax.random.key(0), length=3).replace(shared=LM.embed(PARAMS, jnp.asarray([TEXT]))[0])
    behind = scores(LM, [TEXT + row for row in ROWS], Chain(()))
    np.testing.assert_allclose(scores(LM, ROWS, control), behind, atol=1e-5)


def test_the_vectors_of_classes_by_hand():
    cond = {"label": [1, -1], "area": [2, 0]}  # attributes come in the order of their names
    assert first(by_hand(), cond) == [[9, 7, 3], [9, 0, 2]]
    assert first(by_hand(scale=jnp.float32(0)), cond) == [[9, 3, 2], [9, 3, 2]]
    assert first(by_hand(scale=jnp.float32(2)), cond) == [[9, 11, 4], [9, -3, 2]]
    assert first(by_hand(scale=jnp.array([1.0, 0.0])), cond) == [[9, 7, 3], [9, 3, 2]]
    assert first(by_hand(chosen=(("area", 1), ("label", -1))), {}) == [[9, 2, 2]] * 2
    assert by_hand().added() == by_hand().count() == 3


def test_mixes_by_hand():
    cond = {"label": [1, 0], "area": [2, 0]}
    assert first(by_hand(mix="mean"), cond) == [[9, 5], [9, 0.5]]
    flat = {"in": jnp.eye(16), "out": jnp.zeros(16)}
    assert first(by_hand(mix="attention", gate=flat), cond) == [[9, 5], [9, 0.5]]
    sharp = {"in": jnp.eye(16), "out": jnp.full(16, 100.0)}  # the larger vector takes all the weight
    assert first(by_hand(mix="attention", gate=sharp), cond) == [[9, 7], [9, 1]]
    assert by_hand(mix="mean").added() == 2


def test_two_attributes_are_a_chain_of_two_and_folding_changes_nothing():
    both = dict(place="prefix", length=0, attributes={"label": 2, "area": 3}, network=8)
    one = prompt.init(LM, jax.random.key(3), **both)
    apart = [one.replace(parts={name: one.parts[name]}) for name in ("label", "area")]
    cond = {"label": jnp.array([0, 1]), "area": jnp.array([2, 1])}
    together = scores(LM, ROWS, one, cond)
    np.testing.assert_allclose(scores(LM, ROWS, Chain(tuple(apart)), cond), together, atol=1e-5)
    folded = fold(one)
    assert folded.net is None and folded.parts["area"].shape == (3, 2, 64)
    np.testing.assert_allclose(scores(LM, ROWS, folded, cond), together, atol=1e-5)


def test_one_vector_behind_the_prompt_learns_any_first_token():
    """The next-token logits are a matrix times the vector, so the optimum is the distribution of the texts."""
    world = worlds.Bigram()
    params = world.init(jax.random.key(1))
    control = prompt.init(world, jax.random.key(0), length=1, after=True)
    second = jnp.asarray([0] * 6 + [1] * 3 + [2], jnp.int32)
    tokens = jnp.stack([jnp.zeros_like(second), second], axis=1)
    batch = {"tokens": tokens, "mask": jnp.ones(tokens.shape, bool), "ids": jnp.arange(10)}
    learned, _ = worlds.trained(prompt.loss(world), control, {"params": params}, [batch] * 300, rate=0.1)
    found = worlds.probabilities(world, params, [0], 1, learned)
    assert worlds.divergence(np.array([0.6, 0.3, 0.1]), found) < 1e-3


def test_words_are_the_mean_of_their_tokens(small):
    _, lm, _ = small
    model, params, tokenizer = open_lm(lm)
    ids = tokenizer.encode(["nicely"])[0]
    assert len(ids) > 1
    found = prompt.of_words(model, params, tokenizer, ["nicely"])[0]
    np.testing.assert_allclose(found, np.asarray(params["embed"]["tokens"])[ids].mean(0), atol=1e-6)


def test_a_fit_learns_classes_once_and_chooses_among_them(small):
    root, lm, data = small
    settings = dict(
        shape=dict(place="prefix", length=1, attributes={"label": 2}, network=4),
        training=dict(steps=2, batch=4, tokens=8),
    )
    good, bad = (prompt.fit(root, lm=lm, data=data, chosen={"label": i}, **settings) for i in (1, 0))
    model = open_lm(lm)[0]
    a, b = (methods.load(x, model) for x in (good, bad))
    assert a.chosen == (("label", 1),) and a.net is None and a.shared.shape == (1, 32)
    np.testing.assert_array_equal(a.parts["label"], b.parts["label"])
    assert good.spec["inputs"]["learned"] == bad.spec["inputs"]["learned"]
    started = prompt.fit(root, lm=lm, data=data, start=dict(kind="words", words=["good"]), shape=dict(length=2),
                         z=1e-4, training=dict(steps=1, batch=2, tokens=8, algorithm="adafactor"))  # fmt: skip
    assert methods.load(started, model).shared.shape == (2, 16)
    assert {"cross_entropy"} <= started.rows("metrics.jsonl")[-1].keys()


def test_a_gate_learns_at_a_hundredth_of_the_rate_of_the_vectors(small, tmp_path):
    """At 0.1, the rate of the vectors, its softmax was soon 1 for one attribute and the class of the others changed
    nothing. An update of Adam moves a number by the rate at most."""
    root, lm, _ = small
    words = [("bad", "good"), ("food", "room")]
    rows = [dict(text=f"the {words[1][j]} was {words[0][i]}", label=i, area=j) for i in (0, 1) for j in (0, 1)]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = stage(root, sources.load_data, dict(source=f"jsonl:{tmp_path / 'both.jsonl'}", split="all"))
    shape = dict(length=1, attributes={"label": 2, "area": 2}, each=2, mix="attention")
    before, after = (
        methods.load(prompt.fit(root, lm=lm, data=data, shape=shape, training=training), open_lm(lm)[0])
        for training in (dict(steps=1, rate=1e-9, batch=4, tokens=8), dict(steps=3, batch=4, tokens=8))
    )
    moved = {name: np.abs(np.asarray(x) - y).max() for (name, x), y in zip(
        tree.flatten(before).items(), tree.flatten(after).values())}  # fmt: skip
    assert moved["shared"] > 0.05 and moved["gate/in"] < 3.1e-3 and moved["gate/out"] < 3.1e-3


def test_an_attribute_that_does_not_exist_is_named(small, tmp_path):
    root, lm, data = small

    def fitted(**more):
        return prompt.fit(root, lm=lm, data=data, **more)

    with pytest.raises(InputError, match=r"names 'labels', which no record of .* has; did you mean 'label'"):
        fitted(shape=dict(attributes={"labels": 2}))
    with pytest.raises(InputError, match="chosen names the attribute 'tone', which was not learned"):
        fitted(shape=dict(attributes={"label": 2}), chosen={"tone": 1})
    with pytest.raises(InputError, match=r"chosen has label=2, but it has 2 classes: expected 0 to 1"):
        fitted(shape=dict(attributes={"label": 2}), chosen={"label": 2})
    (tmp_path / "three.jsonl").write_text("".join(json.dumps({"text": "a b", "label": i}) + "\n" for i in range(3)))
    three = stage(root, sources.load_data, dict(source=f"jsonl:{tmp_path / 'three.jsonl'}", split="all"))
    with pytest.raises(InputError, match="is 2, but there are 2 classes: expected 0 to 1"):
        prompt.fit(root, lm=lm, data=three, shape=dict(attributes={"label": 2}))
    with pytest.raises(InputError, match=r"start\.kind is 'word', expected one of"):
        fitted(start=dict(kind="word"))
    with pytest.raises(InputError, match="start has 3 words for 2 shared vectors"):
        fitted(shape=dict(length=2), start=dict(kind="words", words=["a", "b", "c"]))
    with pytest.raises(InputError, match=r"reads prompts.cond\['label'\] for each row"):
        loop.generate(LM, PARAMS, worlds.prompts(ROWS), prompt.init(LM, jax.random.key(0), attributes={"label": 2}))
    cond = {"label": jnp.array([0, 2])}
    with pytest.raises(InputError, match="is 2 in row 1, but the control has 2: expected a class from 0 to 1"):
        loop.generate(
            LM, PARAMS, worlds.prompts(ROWS, cond=cond), prompt.init(LM, jax.random.key(0), attributes={"label": 2})
        )


def test_bad_settings_raise_one_sentence():
    for settings, words in [
        (dict(place="input"), "place is 'input', expected 'prompt' or 'prefix'"),
        (dict(mix="sum"), "mix is 'sum', expected one of concat, mean, attention"),
        (dict(mix="mean"), "mix is 'mean', but there are no attributes to mix"),
        (dict(place="prefix", after=True), "after is True and mix is 'concat', which a prefix cannot have"),
        (dict(length=0), "length is 0 and each is 2 for 0 attributes: expected at least 1 vector"),
        (dict(attributes={"label": 0}), "attribute 'label' has 0 classes, expected at least 1"),
    ]:
        with pytest.raises(InputError, match=words):
            prompt.init(LM, jax.random.key(0), **settings)
    with pytest.raises(InputError, match="context is 48, of which controls take 40: shorten it"):
        loop.generate(LM, PARAMS, worlds.prompts(ROWS), prompt.init(LM, jax.random.key(0), length=40), Sampling(8))


def test_the_sizes_of_the_papers_fit_on_paper():
    large = Transformer.gpt2(width=1280, depth=36, heads=20)
    shape = dict(place="prefix", length=50, attributes={"label": 2}, network=800, chosen={"label": 1})
    for lm, settings in ((dataclasses.replace(large, depth=2), dict(length=100)), (large, shape)):
        out = worlds.written_on_paper(lm, lambda key, lm=lm, s=settings: prompt.init(lm, key, **s))
        assert out.tokens.shape == (1, 2)
