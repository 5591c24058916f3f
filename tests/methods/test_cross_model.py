"""Cross-model control: three tokens by hand, what training finds and where it is carried, other vocabularies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods, tree
from ctg_jax.control import IDENTITY
from ctg_jax.controls.streams import Stream
from ctg_jax.data.token_map import pieces, token_map
from ctg_jax.data.tokenizer import to_prompts, train_bpe
from ctg_jax.decode import loop
from ctg_jax.learn.pretrain import pretrain
from ctg_jax.methods import cross_model
from ctg_jax.methods.logits.cross_model import CrossModel, Words
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.types import InputError, Sampling

WORLD = worlds.Bigram()
BASE = worlds.table([[0.5, 0.3, 0.2]] * 3)
SHAPE = dict(width=8, depth=1, heads=2)


def logits(rows):
    """Parameters of a `Bigram` with the given logits after each token."""
    return {"layers": {"none": jnp.zeros((1, 1))}, "head": {"kernel": jnp.asarray(rows, jnp.float32).T}}


def tiny(params, alpha=1.0, lm=WORLD, **more):
    return CrossModel(Stream(params, lm=lm), jnp.float32(alpha), **more)


def next_token(control, base=BASE, cond=None):
    z = loop.forward(WORLD, base, worlds.prompts([[0]], cond=cond), jnp.zeros((1, 1), jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[0, 0]))


def test_three_tokens_by_hand():
    delta = logits([[0, 1, -1]] * 3)
    np.testing.assert_allclose(next_token(tiny(delta)), (0.35996, 0.58708, 0.05297), atol=1e-5)
    np.testing.assert_allclose(next_token(tiny(delta, 0.0)), (0.5, 0.3, 0.2), rtol=1e-6)
    shifted = logits([[7, 8, 6]] * 3)  # a normalisation of either side moves all logits alike
    np.testing.assert_allclose(next_token(tiny(shifted)), next_token(tiny(delta)), rtol=1e-5)
    row = next_token(tiny(delta, 1.0, cond="strength"), cond={"strength": jnp.array([0.5])})
    np.testing.assert_allclose(row, next_token(tiny(delta, 0.5)), rtol=1e-5)


def batch(counts, **more):
    """Texts of two tokens: 0, and each token as often as `counts` has it."""
    texts = jnp.array([[0, token] for token, n in enumerate(counts) for _ in range(n)])
    return {"tokens": texts, "mask": jnp.ones(texts.shape, bool), "ids": jnp.arange(len(texts))} | more


def test_what_it_learns_beside_one_model_is_a_ratio_that_others_take_over():
    """Trained on data with p = (.2, .2, .6), the template gives that; another base gives p₂ p_data / p₁."""
    control = tiny(logits(np.zeros((3, 3))))
    frozen = {"params": BASE}
    fitted, _ = worlds.trained(
        cross_model.loss(WORLD), control, frozen, [batch([2, 2, 6])] * 200, rate=0.1, trained="delta/params/.*"
    )
    assert float(fitted.alpha) == 1
    data = np.array([0.2, 0.2, 0.6])
    np.testing.assert_allclose(next_token(fitted), data, atol=2e-3)
    second = np.array([0.1, 0.6, 0.3])
    expected = second * data / np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(next_token(fitted, worlds.table([second] * 3)), expected / expected.sum(), atol=3e-3)


def test_texts_that_are_unlearned_count_negatively():
    signs = jnp.array([1, 1, 1, -1, 1])
    both = batch([1, 2, 2], sign=signs)
    control = tiny(logits([[0, 1, -1]] * 3))
    found = cross_model.loss(WORLD)(control, {"params": BASE}, both, jax.random.split(jax.random.key(0), 5))
    nats = -np.log(next_token(control))[[0, 1, 1, 2, 2]]
    assert float(found.total) == pytest.approx(float((nats * signs).sum()), rel=1e-4) and float(found.weight) == 5
    fitted, _ = worlds.trained(
        cross_model.loss(WORLD), control, {"params": BASE}, [both] * 30, rate=0.1, trained="delta/params/.*"
    )
    # Token 2 was seen once on either side, so that its gradient is that of the normaliser alone.
    assert next_token(fitted)[2] < 0.6 * next_token(control)[2]


def test_the_same_tokens_under_other_numbers():
    """Tables that renumber the tokens give what the same model gives under the base's numbers; -1 leaves a logit."""
    swap = jnp.array([2, 0, 1])
    rows = np.array([[0.0, 1, -1], [2, 0, 1], [-1, 0, 2]])
    moved = np.zeros((3, 3))
    moved[np.ix_(swap, swap)] = rows
    words = Words(swap, swap[:, None])
    cond = {cross_model.OWN: swap[jnp.array([[0, 1]])]}
    renumbered = CrossModel(Stream(logits(moved), lm=WORLD, own=cross_model.OWN), jnp.float32(1.0), words)
    prompts, completion = worlds.prompts([[0, 1]], cond=cond), jnp.array([[2, 1, 0]])
    plain = loop.forward(WORLD, BASE, prompts, completion, tiny(logits(rows)))
    np.testing.assert_allclose(loop.forward(WORLD, BASE, prompts, completion, renumbered), plain, atol=1e-5)
    left = renumbered.replace(words=words.replace(map=jnp.array([2, -1, 1])))
    z = loop.forward(WORLD, BASE, prompts, completion)
    found = loop.forward(WORLD, BASE, prompts, completion, left)
    np.testing.assert_allclose(found[..., 1], z[..., 1], atol=1e-6)
    np.testing.assert_allclose(found[..., ::2], plain[..., ::2], atol=1e-5)


def test_tokens_of_several_pieces_and_of_none():
    """Each logit is that of the tiny model after all pieces so far, read from scratch; a token without pieces changes
    nothing. Text that was generated scores what it was drawn with."""
    lm = Transformer.gpt2(vocab=5, width=8, depth=2, heads=2, context=48)
    params = worlds.lively(lm)
    table = np.array([[-1, 3], [4, 0], [-1, -1]])
    words = Words(jnp.array([1, -1, 4]), jnp.asarray(table))
    control = CrossModel(Stream(params, lm=lm, own=cross_model.OWN), jnp.float32(1.0), words)
    own = jnp.array([[2, 1, 3], [-1, -1, 2]])
    prompts = worlds.prompts([[0, 1], [2]], cond={cross_model.OWN: own})
    completion = jnp.array([[1, 2, 0, 1], [2, 2, 1, 0]])
    z = loop.forward(WORLD, BASE, prompts, completion)
    found = loop.forward(WORLD, BASE, prompts, completion, control)
    for row in range(2):
        read = [int(i) for i in own[row] if i >= 0]
        for at in range(4):
            after = loop.forward(lm, params, worlds.prompts([read], length=12), jnp.zeros((1, 1), jnp.int32))[0, 0]
            expected = z[row, at] + jnp.array([after[1], 0.0, after[4]])
            np.testing.assert_allclose(found[row, at], expected, atol=1e-4)
            read += [int(i) for i in table[int(completion[row, at])] if i >= 0]
    out = loop.generate(WORLD, BASE, prompts, control, Sampling(max_new=5))
    np.testing.assert_allclose(loop.score(WORLD, BASE, prompts, out.tokens, control), out.logp, atol=1e-4)


def test_tables_between_two_tokenizers():
    one = train_bpe(["the food was good", "good food the"] * 4, 270)
    two = train_bpe(["foot foot goods goods the the"] * 4, 268)
    same = token_map(one, one, one.vocab)
    assert same.tolist() == list(range(one.vocab))
    found, parts = token_map(one, two, one.vocab), pieces(one, two, one.vocab)
    texts, theirs = one.token_texts(range(one.vocab)), two.token_texts(range(two.vocab))
    for i, text in enumerate(texts):
        if i in one.ends:
            assert found[i] == two.ends[0]
            continue
        if text in theirs and "\ufffd" not in text:
            assert theirs[found[i]] == text
        elif "\ufffd" not in text:
            fits = [t for t in theirs if t.strip() and (t.startswith(text) or text.startswith(t))]
            away = [abs(len(t) - len(text)) for t in fits]
            assert away[fits.index(theirs[found[i]])] == min(away) if fits else found[i] == -1
            assert "".join(theirs[p] for p in parts[i] if p >= 0) == text
    longer = [i for i, text in enumerate(texts) if text not in theirs]
    assert longer and parts.shape[1] > 1


def test_fit_and_carry(small):
    root, lm, data = small
    training = dict(steps=3, batch=4, tokens=16, warmup=1)
    fitted = cross_model.fit(root, lm=lm, data=data, shape=SHAPE, forget={"label": 0}, alpha=0.7, training=training)
    model, params, tokenizer = open_lm(lm)
    control = methods.load(fitted, model)
    assert control.words is None and float(control.alpha) == pytest.approx(0.7)
    assert tree.size_bytes(control) < tree.size_bytes(params)
    shape = dict(vocab=265, width=8, depth=1, heads=2, context=40, training=training)
    second = stage(root, pretrain, shape, data=data)
    moved = cross_model.carry(root, lm=second, control=fitted)
    other, theirs, tokens = open_lm(second)
    carried = methods.load(moved, other)
    assert carried.words.map.shape == (other.vocab,) and float(carried.alpha) == pytest.approx(0.7)
    jax.tree.map(np.testing.assert_array_equal, carried.delta.params, control.delta.params)
    texts = ["good", "a nice day"]
    cond = cross_model.conditions(moved, second, texts)
    assert [r[r >= 0].tolist() for r in cond[cross_model.OWN]] == tokenizer.encode(texts)
    prompts = to_prompts(tokens, texts, seed=0, cond=cond)
    completion = jnp.array([[1], [2]])
    z, found = (loop.forward(other, theirs, prompts, completion, c) for c in (IDENTITY, carried))
    tiny_lm = carried.delta.lm
    after = loop.forward(tiny_lm, control.delta.params, to_prompts(tokenizer, texts, seed=0), completion)
    table = np.asarray(carried.words.map)
    expected = z + 0.7 * np.where(table >= 0, np.asarray(after)[..., np.maximum(table, 0)], 0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(InputError, match="is no control of cross_model"):
        cross_model.carry(root, lm=second, control=lm)


def test_the_sizes_of_the_paper_fit_on_paper():
    from configs.cross_model import PAPER

    lm = Transformer.llama(vocab=32000, width=4096, depth=2, heads=32, kv_heads=32, mlp_width=11008, context=4096)
    out = worlds.written_on_paper(lm, lambda key: cross_model.init(lm, key, shape=PAPER))
    assert out.tokens.shape == (1, 2)


def test_bad_input_raises_one_sentence():
    key = jax.random.key(0)
    for settings, words in [
        (dict(shape=dict(width=8)), "expected width, depth and heads"),
        (dict(shape=dict(width=9, depth=1, heads=2)), "of which heads divides width"),
        (dict(shape=SHAPE, alpha=float("nan")), "alpha is nan"),
    ]:
        with pytest.raises(InputError, match=words):
            cross_model.init(worlds.tiny(), key, **settings)
    other = worlds.Bigram(vocab=4)
    with pytest.raises(InputError, match="a vocabulary of 4 tokens and the base model one of 3"):
        next_token(tiny(other.init(key), lm=other))
