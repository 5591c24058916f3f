"""LM-Steer: three tokens by hand, both signs at once, the map on embeddings, sums, another model, words and spans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain
from ctg_jax.decode import loop
from ctg_jax.learn import fitting, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.methods import dexperts, lm_steer, steer
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError, Sampling

LM = worlds.tiny()
PARAMS = worlds.lively(LM)
WORLD = worlds.Bigram()
TABLE = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
PROMPTS = worlds.prompts([[1, 2, 3], [4, 5]])
COMPLETION = jnp.array([[1, 2, 3], [4, 5, 6]])


def by_hand(p1, p2, scale=3.0, epsilon=0.1, **more):
    columns = (jnp.asarray(p, jnp.float32).reshape(3, -1) for p in (p1, p2))
    return lm_steer.LMSteer(*columns, jnp.float32(scale), site=2, epsilon=epsilon, **more)


class Words:
    """A tokenizer of the words w0, w1, … in the order of `ids`."""

    adds_bos, bos = False, None

    def __init__(self, ids):
        self.ids, self.vocab = list(ids), len(ids)

    def token(self, id):
        return f"w{self.ids[id]}"

    def id(self, token):
        return next((i for i in range(self.vocab) if self.token(i) == token), None)

    def encode(self, texts):
        return [[self.id(w) for w in t.split()] for t in texts]

    def begun(self, ids):
        return list(ids)

    def token_texts(self, ids):
        return [self.token(i) for i in ids]


def test_three_tokens_by_hand():
    """After token 0 the state is (1, 0, 0); c P1 = 1 and P2 = (0, 1, -1), so it moves by 3 · .1 · (0, 1, -1), and the
    probabilities p(v | 0) by (p(v | 1) / p(v | 2))^.3. After token 1, c P1 = 0 and nothing moves."""
    control = by_hand([1, 0, 2], [0, 1, -1])
    z = loop.forward(WORLD, worlds.table(TABLE), worlds.prompts([[0], [1]]), jnp.zeros((2, 1), jnp.int32), control)
    wanted = TABLE[0] * (TABLE[1] / TABLE[2]) ** 0.3
    np.testing.assert_allclose(jax.nn.softmax(z[0, 0]), wanted / wanted.sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(z[1, 0]), TABLE[1], rtol=1e-5)


def test_it_is_a_linear_map_of_the_word_embeddings():
    control = methods.with_strength(lm_steer.example(LM, jax.random.key(0)), 0.7)
    w = control.p1 @ control.p2.T
    e = PARAMS["embed"]["tokens"]
    moved = e @ (jnp.eye(LM.width) + 0.7 * control.epsilon * w).T
    untied = Transformer.gpt2(vocab=11, width=16, depth=2, heads=2, context=48, tied=False)
    wanted = loop.forward(untied, {**PARAMS, "head": {"kernel": moved}}, PROMPTS, COMPLETION)
    found = loop.forward(LM, PARAMS, PROMPTS, COMPLETION, control)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_scale_zero_is_the_base_to_the_bit():
    nothing = lm_steer.neutral(lm_steer.example(LM, jax.random.key(1)))
    base = loop.forward(LM, PARAMS, PROMPTS, COMPLETION)
    assert bool(jnp.all(base == loop.forward(LM, PARAMS, PROMPTS, COMPLETION, nothing)))


def test_the_dummy_steer_acts_whatever_the_strength():
    both = by_hand([[1, 0], [0, 1], [2, 0]], [[0, 1], [1, 0], [-1, 2]], fixed=1, scale=0.0)
    dummy = by_hand([0, 1, 0], [1, 0, 2], scale=1.0)
    prompts, token = worlds.prompts([[0], [1]]), jnp.zeros((2, 1), jnp.int32)
    z = [loop.forward(WORLD, worlds.table(TABLE), prompts, token, c) for c in (both, dummy, lm_steer.neutral(both))]
    np.testing.assert_allclose(z[0], z[1], rtol=1e-6)
    np.testing.assert_allclose(jax.nn.softmax(z[2][:, 0]), TABLE[:2], rtol=1e-5)
    assert lm_steer.neutral(both).p1.shape == (3, 1)


def batch_of(rows, values):
    tokens = jnp.asarray(rows)
    return {"tokens": tokens, "mask": jnp.ones_like(tokens, bool), "ids": jnp.arange(len(rows)), "value": values}


def test_both_signs_are_learned_together():
    control = lm_steer.init(LM, jax.random.key(0), rank=8, fixed=8, cond="value")
    tx = optimizer(1e-1, trained="p1|p2")
    step = jax.jit(train.make_step(lm_steer.loss(LM), tx))
    state, frozen = train.init_state(control, tx, jax.random.key(1)), {"params": PARAMS}
    good, bad = [1, 2, 3, 4, 5], [1, 6, 7, 8, 9]
    batch = batch_of([good, bad], jnp.array([1.0, -1.0]))
    for _ in range(60):
        state, _ = step(state, frozen, batch)
    assert float(state.params.scale) == 1
    learned = lm_steer.neutral(state.params).replace(cond=None)
    prompts, completion = worlds.prompts([[1], [1]]), jnp.array([good[1:], bad[1:]])

    def told(s):
        return loop.score(LM, PARAMS, prompts, completion, methods.with_strength(learned, s)).sum(1)

    minus, base, plus = told(-1.0), told(0.0), told(1.0)
    assert plus[0] > base[0] + 1 and base[0] > minus[0]
    assert minus[1] > base[1] + 1 and base[1] > plus[1]


def test_padding_is_not_trained_on():
    control = lm_steer.example(LM, jax.random.key(0)).replace(cond="value")
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = jnp.array([[True] * 4, [True, True, False, False]])
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def gradient(tokens):
        batch = {"tokens": tokens, "mask": mask, "value": jnp.array([1.0, -1.0])}
        return jax.value_and_grad(lambda c: lm_steer.loss(LM)(c, {"params": PARAMS}, batch, keys).total)(control)

    assert float(lm_steer.loss(LM)(control, {"params": PARAMS}, batch_of(tokens, jnp.ones(2)), keys).weight) == 6
    zeros, others = gradient(tokens), gradient(tokens.at[1, 2:].set(7))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), zeros, others)
    assert float(jnp.abs(zeros[1].p1).max()) > 1e-3


def test_the_penalty_by_hand():
    """‖P1‖² + ‖P2‖² = 1 + 4 + 1 + 1 = 7, for each of the two tokens that are predicted."""
    control = by_hand([1, 0, 2], [0, 1, -1], cond="value")
    batch = batch_of([[0, 1, 2]], jnp.array([1.0]))
    frozen, keys = {"params": worlds.table(TABLE)}, jax.random.split(jax.random.key(0), 1)
    plain, more = (lm_steer.loss(WORLD, l2=l2)(control, frozen, batch, keys) for l2 in (0.0, 0.5))
    assert float(more.total - plain.total) == pytest.approx(0.5 * 2 * 7, rel=1e-5)
    assert more.metrics["cross_entropy"] == (plain.total, plain.weight)


def test_sums_are_exact_and_a_chain_is_a_product():
    a, b = by_hand([1, 0, 2], [0, 1, -1], scale=2.0), by_hand([0, 1, 1], [1, 0, 1], scale=-0.5, epsilon=0.2)
    c = jnp.array([[[1.0, 2.0, 3.0]]])

    def moved(control):
        return control.hidden(c, 2, None, control.init(worlds.prompts([[0]]), 1))[0, 0]

    # c P1 = 7 and 5, so the steers move c by .1 · 2 · 7 (0, 1, -1) and .2 · -.5 · 5 (1, 0, 1).
    push_a, push_b = np.array([0, 1.4, -1.4]), np.array([-0.5, 0, -0.5])
    np.testing.assert_allclose(moved(lm_steer.add(a, b)), c[0, 0] + push_a + push_b, rtol=1e-6)
    # b reads the moved state too: its c P1 is 5 + 1.4 - 1.4 = 5 after a, and a's is 7 - .5 - 1 = 5.5 after b.
    chain = Chain((b, a))
    after = chain.hidden(c, 2, None, chain.init(worlds.prompts([[0]]), 1))[0, 0]
    np.testing.assert_allclose(after, c[0, 0] + push_b + 0.2 * 5.5 * np.array([0, 1, -1]), rtol=1e-6)
    assert float(methods.with_strength(lm_steer.add(a, b), 0.5).scale) == 0.5


def test_transfer_to_an_exact_image_shifts_every_logit_alike():
    """e' = M e, and so c' with Mᵀ c' = c gives the same logits: the shifts must be the same, word by word."""
    source = worlds.tiny(vocab=40)
    params, mine = worlds.lively(source, seed=2), Words(range(40))
    target, theirs = Transformer.gpt2(vocab=42, width=24, depth=1, heads=2, context=48), Words(range(41, -1, -1))
    m = np.random.default_rng(0).normal(size=(24, 16))
    e = np.asarray(params["embed"]["tokens"], np.float64)
    f = np.random.default_rng(1).normal(size=(42, 24))  # two words of its own
    f[[theirs.id(mine.token(i)) for i in range(40)]] = e @ m.T
    there = {"embed": {"tokens": jnp.asarray(f, jnp.float32)}}
    control = lm_steer.example(source, jax.random.key(0))
    moved = lm_steer.transfer(control, (source, params, mine), (target, there, theirs))
    assert moved.site == 2 and moved.p1.shape == (24, 4)

    c = np.random.default_rng(2).normal(size=(5, 16))
    image = c @ np.linalg.pinv(m)
    np.testing.assert_allclose(image @ f[41 - np.arange(40)].T, c @ e.T, rtol=1e-6, atol=1e-6)

    def push(control, states):
        p1, p2 = np.asarray(control.p1, np.float64), np.asarray(control.p2, np.float64)
        return control.epsilon * states @ p1 @ p2.T

    wanted = push(control, c) @ e.T
    found = push(moved, image) @ f[41 - np.arange(40)].T
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_transfer_onto_itself_changes_nothing(small):
    model = open_lm(small[1])
    control = lm_steer.example(model[0], jax.random.key(0))
    again = lm_steer.transfer(control, model, model)
    np.testing.assert_allclose(again.p1 @ again.p2.T, control.p1 @ control.p2.T, rtol=1e-4, atol=1e-4)


def test_words_by_hand():
    """W = 6 u vᵀ with u = (1, 0, 0), v = (0, 1, 0): words are moved by their second coordinate, log p(word | 1)."""
    params, tokenizer = worlds.table(TABLE), Words(range(3))
    for sign in (1, -1):
        control = by_hand([2 * sign, 0, 0], [0, 3, 0])
        (row,) = lm_steer.words(control, WORLD, params, tokenizer, 2, texts=["w0 w2", "w0"])
        assert row["dimension"] == 0 and row["strength"] == pytest.approx(0.6)
        most, least = ["w1", "w2"], ["w0", "w2"]  # p(word | 1) = .1, .6, .3
        assert (row["up"], row["down"]) == ((most, least) if sign > 0 else (least, most))


def test_a_highlight_is_a_likelihood_ratio_token_by_token():
    control = by_hand([1, 0, 2], [0, 1, -1])
    tokens, mask = jnp.array([[0, 1, 0], [2, 0, 1]]), jnp.array([[True] * 3, [True, True, False]])
    found = lm_steer.highlight(control, WORLD, worlds.table(TABLE), tokens, mask, strength=3.0)
    tilt = (TABLE[1] / TABLE[2]) ** 0.3
    plus, minus = TABLE[0] * tilt / (TABLE[0] @ tilt), TABLE[0] / tilt / (TABLE[0] @ (1 / tilt))
    assert found[0, 1] == pytest.approx(np.log(plus[1] / minus[1]), rel=1e-4)
    assert found[0, 2] == pytest.approx(0, abs=1e-6)  # after token 1 nothing moves
    plus, minus = TABLE[2] * tilt**2 / (TABLE[2] @ tilt**2), TABLE[2] / tilt**2 / (TABLE[2] @ tilt**-2)
    assert found[1, 1] == pytest.approx(np.log(plus[0] / minus[0]), rel=1e-4)
    assert found[:, 0].tolist() == [0, 0] and float(found[1, 2]) == 0


def test_each_row_has_its_strengths_in_a_chain_with_others():
    keys = jax.random.split(jax.random.key(5), 3)
    made = (lm_steer.example(LM, keys[0]), dexperts.example(LM, keys[1]), steer.example(LM, keys[2]))
    parts = tuple(methods.with_strength(c, 1.0) for c in made)
    names = ("words", "experts", "push")
    chain = Chain(tuple(c.replace(cond=name) for c, name in zip(parts, names)))
    cond = {"words": jnp.array([1.0, -2.0, 0.0]), "experts": jnp.array([0.0, 1.0, -0.5]), "push": jnp.arange(3.0)}
    batch = worlds.prompts([[1, 2, 3], [4, 5], [6]], cond=cond)
    completion = jnp.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    together = loop.forward(LM, PARAMS, batch, completion, chain)
    for i in range(3):
        row = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        alone = loop.forward(LM, PARAMS, row, completion[i : i + 1], chain)
        np.testing.assert_allclose(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)
        # The same strengths as leaves, for all rows.
        fixed = Chain(tuple(methods.with_strength(c, float(cond[n][i])) for c, n in zip(parts, names)))
        np.testing.assert_allclose(loop.forward(LM, PARAMS, row, completion[i : i + 1], fixed), alone, rtol=1e-4)
    out = loop.generate(LM, PARAMS, batch, chain, Sampling(max_new=3))
    np.testing.assert_allclose(loop.score(LM, PARAMS, batch, out.tokens, chain), out.logp, rtol=1e-4, atol=1e-4)


def test_fit_goes_on_where_it_was_cut_short(small, monkeypatch, tmp_path):
    _, lm, data = small
    settings = dict(rank=4, cond="sign", training=dict(steps=4, batch=4, tokens=16, save_every=2))
    whole = lm_steer.fit(tmp_path / "a", lm=lm, data=data, **settings)
    model, params, _ = open_lm(lm)
    control = methods.load(whole, model)
    assert control.p1.shape == (model.width, 4) and control.cond == "sign" and control.fixed == 0
    assert float(control.scale) == 1 and not (whole.path / "steps").exists()
    prompts = worlds.prompts([[1, 2], [3]], cond={"sign": jnp.array([1.0, -1.0])})
    out = loop.forward(model, params, prompts, jnp.array([[1, 2], [3, 4]]), methods.with_strength(control, 5.0))
    assert bool(jnp.all(jnp.isfinite(out)))

    def killed(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting.checkpoint, "prune", killed)  # after the first checkpoint was written
    with pytest.raises(KeyboardInterrupt):
        lm_steer.fit(tmp_path / "b", lm=lm, data=data, **settings)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.glob("b/lm_steer-*/steps/*")]
    again = lm_steer.fit(tmp_path / "b", lm=lm, data=data, **settings)
    jax.tree.map(np.testing.assert_array_equal, whole.load(), again.load())
    assert [r["step"] for r in again.metrics()] == [1, 2, 3, 4]


def test_the_dummy_may_be_kept(small):
    root, lm, data = small
    fitted = lm_steer.fit(root, lm=lm, data=data, dummy="keep", rank=4, training=dict(steps=1, batch=4, tokens=16))
    control = methods.load(fitted, open_lm(lm)[0])
    assert control.p1.shape == (16, 8) and control.fixed == 4


def test_bad_input_is_said_in_a_sentence(small):
    root, lm, data = small
    with pytest.raises(InputError, match=r"label of record . of .* is 1, but there are 1 classes"):
        lm_steer.fit(root, lm=lm, data=data, values=(1.0,))
    with pytest.raises(InputError, match=r"values is \[1.0, 1.0\], which gives all texts .* one value"):
        lm_steer.fit(root, lm=lm, data=data, values=(1.0, 1.0))
    with pytest.raises(InputError, match="dummy is 'yes'"):
        lm_steer.fit(root, lm=lm, data=data, dummy="yes")
    with pytest.raises(InputError, match="rank is 0"):
        lm_steer.init(LM, jax.random.key(0), rank=0)
    with pytest.raises(InputError, match="did you mean 'values'"):
        lm_steer.fit(root, lm=lm, data=data, value=3)
    control = lm_steer.example(LM, jax.random.key(0))
    with pytest.raises(InputError, match="width 8, but the model's is 16"):
        narrow = control.replace(p1=jnp.zeros((8, 2)), p2=jnp.zeros((8, 2)))
        loop.forward(LM, PARAMS, PROMPTS, COMPLETION, narrow)
    with pytest.raises(InputError, match="site of the first steer is 3 and of the second 4"):
        lm_steer.add(control, lm_steer.example(worlds.tiny(depth=3), jax.random.key(0)))
    with pytest.raises(InputError, match="strength per row"):
        lm_steer.add(control, methods.with_strength(control, [1.0, 2.0]))
    with pytest.raises(InputError, match="share 11 words, expected at least 16"):
        model = (LM, PARAMS, Words(range(11)))
        lm_steer.transfer(control, model, model)
