"""Model arithmetic: three tokens by hand, the minimum that the rule is, the formulas that it contains, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds
from scipy.optimize import minimize

from ctg_jax import methods
from ctg_jax.control import IDENTITY
from ctg_jax.controls.formula import Formula, parse
from ctg_jax.controls.streams import Stream
from ctg_jax.data.instructions import instructed
from ctg_jax.data.tokenizer import to_prompts, train_bpe
from ctg_jax.decode import loop
from ctg_jax.learn import next_classifier
from ctg_jax.methods import arithmetic
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages.controls import made
from ctg_jax.types import InputError

WORLD = worlds.Bigram()
P, A, B = [0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.4, 0.4]
BASE, ONE, OTHER = (worlds.table([row] * 3) for row in (P, A, B))
NAMES = ("M", "A", "B")


def built(formula, alpha=1.0, value=None, top=2, divide=True, cond=None):
    streams = (Stream(ONE, lm=WORLD), Stream(OTHER, lm=WORLD))
    found = parse(formula, NAMES, ["C"])
    return arithmetic.Arithmetic(streams, found, value, jnp.float32(alpha), top, divide, cond)


def next_token(control, cond=None):
    z = loop.forward(WORLD, BASE, worlds.prompts([[0]], cond=cond), jnp.zeros((1, 1), jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[0, 0]))


@pytest.mark.parametrize(
    "formula, expected",
    [
        ("M + 0.5 * A", (0.53666, 0.30301, 0.16033)),
        ("M | B", (0.38462, 0.30769, 0.30769)),
        ("M & B", (0.28571, 0.42857, 0.28571)),
        ("M - 0.5 * (M | B)", (0.60606, 0.27273, 0.12121)),  # p² / max(p, b)
        ("M - 0.96 * (M | B)", (0.9994, 0.0006, 0.0)),  # a small weight is a large strength
        ("M + (A - B)", (0.84507, 0.12676, 0.02817)),  # DExperts: p a / b
        ("3 * M - 2 * B", np.array([0.125 / 0.04, 0.027 / 0.16, 0.008 / 0.16]) / (3.125 + 0.16875 + 0.05)),
        ("M | M", P),
        ("-(B - 2 * M)", np.array([0.25 / 0.2, 0.09 / 0.4, 0.04 / 0.4]) / (1.25 + 0.225 + 0.1)),
    ],
)
def test_three_tokens_by_hand(formula, expected):
    np.testing.assert_allclose(next_token(built(formula)), expected, atol=1e-5)
    np.testing.assert_allclose(next_token(built(formula, alpha=0.0)), P, rtol=1e-6)


def test_a_sum_of_weight_0_is_used_only_where_it_is_asked_for():
    np.testing.assert_allclose(next_token(built("A - B", divide=False)), (0.75, 0.1875, 0.0625), rtol=1e-5)
    # Undivided, M + A is p · a; divided it is its root.
    np.testing.assert_allclose(next_token(built("M + A", divide=False)), np.array([0.3, 0.09, 0.02]) / 0.41, rtol=1e-5)
    with pytest.raises(InputError, match="weights of the formula add up to 0, expected more than 0"):
        next_token(built("A - B"))
    with pytest.raises(InputError, match="add up to -1"):
        next_token(built("M + (A - 2 * B | M)"))  # an operand


def test_a_classifier_moves_the_likeliest_tokens():
    """C = .9, .5, .1 after the three tokens, so .62 for the prefix; the third token is not among the two likeliest."""
    odds = np.log(np.array([9.0, 1.0, 1 / 9]))
    value = {"kernel": jnp.asarray(np.tile(odds[:, None], (1, 3)), jnp.float32), "bias": jnp.zeros(3)}
    found = next_token(built("M + C", value=value))
    np.testing.assert_allclose(found, (0.62155, 0.20718, 0.17127), atol=1e-5)
    every = next_token(built("M + C", value=value, top=3))
    np.testing.assert_allclose(every, np.array([0.45, 0.15, 0.02]) / 0.62, rtol=1e-5)
    twice = next_token(built("M + 2 * C", value=value, top=3))
    np.testing.assert_allclose(twice, np.array([0.405, 0.075, 0.002]) / 0.482, rtol=1e-5)


def test_the_rule_is_the_minimum_of_the_weighted_divergences():
    weights, rows = (1.0, 0.7, -0.4), np.array([P, A, B])

    def divergence(free):
        p = np.exp(free - np.logaddexp.reduce(free))
        return sum(w * np.sum(p * np.log(p / q)) for w, q in zip(weights, rows))

    best = minimize(divergence, np.zeros(3), tol=1e-12).x
    expected = np.exp(best - np.logaddexp.reduce(best))
    np.testing.assert_allclose(next_token(built("M + 0.7 * A - 0.4 * B")), expected, atol=1e-5)


def test_what_a_subtracted_union_leaves_alone():
    """Where the base exceeds the other, the union is the base and ratios stay; every other token loses."""
    found = next_token(built("M - 0.5 * (B | M)"))
    assert found[0] > P[0] and found[1] < P[1] and found[2] < P[2]
    kept = next_token(built("M - 0.5 * (A | M)"))  # a exceeds p for token 0 alone
    np.testing.assert_allclose(kept[1] / kept[2], P[1] / P[2], rtol=1e-5)
    assert kept[0] < P[0]


def test_the_distribution_in_an_exact_world():
    keys = jax.random.split(jax.random.key(3), 3)
    tables = [WORLD.init(k) for k in keys]
    logp = [np.asarray(jax.nn.log_softmax(t["head"]["kernel"], axis=0), np.float64) for t in tables]
    control = built("M - 0.4 * (A | M) + 0.3 * B")
    control = control.replace(streams=tuple(Stream(t, lm=WORLD) for t in tables[1:]))
    mixed = (logp[0] - 0.4 * np.maximum(logp[0], logp[1]) + 0.3 * logp[2]) / 0.9
    p = np.exp(mixed) / np.exp(mixed).sum(0)
    for (a, b), found in worlds.enumerate_all(WORLD, tables[0], [2], 2, control).items():
        assert found == pytest.approx(p[a, 2] * p[b, a], rel=1e-4)


def test_strength_per_row():
    control = built("M + (A - B)", cond="strength")
    for strength in (0.0, 0.5):
        row = next_token(control, cond={"strength": jnp.array([strength])})
        np.testing.assert_allclose(row, next_token(built("M + (A - B)", alpha=strength)), rtol=1e-5)


def test_prompts_are_read_in_one_pass_and_equal_forward_of_each(small, tmp_path):
    root, lm, _ = small
    model, params, tokenizer = open_lm(lm)
    hf.save(tmp_path / "other", model, jax.tree.map(lambda x: 0.9 * x, params))
    tokenizer.save(tmp_path / "other")
    prompts = {"T": "it is bad: ", "U": "good"}
    settings = dict(formula="M - 0.4 * (T | M) + 0.5 * U + O", prompts=prompts, models={"O": str(tmp_path / "other")})
    artifact = stage(root, made, {"method": "arithmetic", "init": settings}, lm=lm)
    control = methods.load(artifact, model)
    assert [stream.copies for stream in control.streams] == [2, None]
    texts, completion = ["the soup", "it"], jnp.array([[1, 2], [3, 4]])
    cond = arithmetic.conditions(artifact, lm, texts)
    found = loop.forward(model, params, to_prompts(tokenizer, texts, seed=0, cond=cond), completion, control)
    told = [[before + text for text in texts] for before in ("", *prompts.values())]
    m, t, u = (
        jax.nn.log_softmax(loop.forward(model, params, to_prompts(tokenizer, rows, seed=0), completion))
        for rows in told
    )
    other = jax.nn.log_softmax(
        loop.forward(model, hf.load(tmp_path / "other")[1], to_prompts(tokenizer, texts, seed=0), completion)
    )
    expected = (m - 0.4 * jnp.maximum(t, m) + 0.5 * u + other) / 2.1
    np.testing.assert_allclose(jax.nn.log_softmax(found), jax.nn.log_softmax(expected), atol=1e-4)
    hf.save(tmp_path / "other", model, jax.tree.map(lambda x: 0.8 * x, params))  # another model in the same folder
    assert stage(root, made, {"method": "arithmetic", "init": settings}, lm=lm).id != artifact.id


def test_instructed_pads_on_the_left(small):
    tokenizer = open_lm(small[1])[2]
    found = instructed(tokenizer, ["ab", "a"], ["", "so "], ["!", ""])
    assert found.shape[:2] == (2, 2) and found.dtype == np.int32
    rows = [[r[r >= 0].tolist() for r in pair] for pair in found]
    assert rows == [tokenizer.encode(["ab!", "so ab"]), tokenizer.encode(["a!", "so a"])]
    assert all((np.diff((r >= 0).astype(int)) >= 0).all() for pair in found for r in pair)


def test_fit(small):
    root, lm, data = small
    training = dict(steps=3, batch=4, tokens=16, warmup=1)
    fitted = arithmetic.fit(
        root, lm=lm, data=data, formula="M - 0.5 * (N | M) + C", tuned={"N": {"label": 0}},
        classifier=dict(training=training | {"rate": 0.1}), adapter=dict(rank=2), training=training, top=4,
    )  # fmt: skip
    model, params, _ = open_lm(lm)
    control = methods.load(fitted, model)
    assert control.top == 4 and float(jnp.abs(control.value["kernel"]).max()) > 0
    prompts, completion = worlds.prompts([[1, 2, 3], [4]]), jnp.array([[1, 2], [3, 4]])
    m, n = (
        jax.nn.log_softmax(loop.forward(model, params, prompts, completion, c))
        for c in (IDENTITY, control.streams[0].control)
    )
    plain = control.replace(value=None, formula=parse("M - 0.5 * (N | M)", ["M", "N"]))
    found = jax.nn.log_softmax(loop.forward(model, params, prompts, completion, plain))
    np.testing.assert_allclose(found, jax.nn.log_softmax((m - 0.5 * jnp.maximum(m, n)) / 0.5), atol=1e-4)
    assert np.isfinite(loop.forward(model, params, prompts, completion, control)).all()


def test_the_classifier_learns_what_a_token_says_of_the_text():
    """Texts of label 1 hold token 1 after token 0, those of label 0 token 2: its log-odds there go up and down."""
    head = next_classifier.head(WORLD)
    batch = {"tokens": jnp.array([[0, 1], [0, 2]]), "mask": jnp.ones((2, 2), bool), "label": jnp.array([1, 0])}
    batch |= {"ids": jnp.arange(2)}
    head, metrics = worlds.trained(next_classifier.loss(WORLD), head, {"params": BASE}, [batch] * 100, rate=0.1)
    odds = next_classifier.log_odds(head, jnp.eye(3)[None])[0, 0]
    assert odds[1] > 2 and odds[2] < -2 and float(metrics["accuracy"]) == 1


def test_formulas_that_cannot_be_read():
    for text, words in [
        ("M - ", "cannot be read"),
        ("M ** 2", "is not allowed"),
        ("M * A", "'M \\* A' is not allowed"),
        ("M + 1", "'M \\+ 1' is not allowed"),
        ("M / 0", "is not allowed"),
        ("X + M", "'X' is no known name: expected M, A, B"),
        ("f(M)", "is not allowed: use names"),
        ("M.weight", "is not allowed"),
        ("2 * 3", "a number: expected at least one of M, A, B"),
        ("True * M", "is not allowed"),
        ("M | 2", "is not allowed"),
    ]:
        with pytest.raises(InputError, match=words):
            parse(text, NAMES)
    assert jax.tree.structure(parse("M | A", NAMES)) != jax.tree.structure(parse("M & A", NAMES))
    m, a = Formula(index=0), Formula(index=1)
    assert jax.tree.structure(parse("M - 2 * A", NAMES)) == jax.tree.structure(m - 2.0 * a)


def test_bad_input_raises_one_sentence(small, tmp_path):
    root, lm, _ = small
    key = jax.random.key(0)
    for settings, words in [
        (dict(formula="M", prompts={"T": "x"}), "does not use 'T'"),
        (dict(formula="M + T", prompts={"T": "x"}, tuned=("T",)), "'T' is the name of two models"),
        (dict(formula="M + C", prompts={"C": "x"}), "'C' is the name of two"),
        (dict(formula="M", alpha=float("inf")), "alpha is inf"),
        (dict(formula="M + C", top=0), "top is 0"),
    ]:
        with pytest.raises(InputError, match=words):
            arithmetic.init(WORLD, key, **settings)
    with pytest.raises(InputError, match="has a classifier or fine-tuned models, which are fitted"):
        stage(root, made, {"method": "arithmetic", "init": {"formula": "M + C"}}, lm=lm)
    other = worlds.Bigram(vocab=4)
    control = built("M + A + B").replace(streams=(Stream(other.init(key), lm=other), Stream(OTHER, lm=WORLD)))
    with pytest.raises(InputError, match="Model 1 of the formula has a vocabulary of 4 tokens"):
        next_token(control)
    model, params, _ = open_lm(lm)
    hf.save(tmp_path / "other", model, params)
    train_bpe(["zz zz zzz zzzz zz z zzz"] * 4, 262).save(tmp_path / "other")
    settings = dict(formula="M + O", models={"O": str(tmp_path / "other")})
    with pytest.raises(InputError, match="does not have the vocabulary of the base model"):
        stage(root, made, {"method": "arithmetic", "init": settings}, lm=lm)


def test_the_sizes_of_the_paper_fit_on_paper():
    from configs.arithmetic import PAPER

    lm = Transformer.llama(vocab=32000, width=5120, depth=2, heads=40, kv_heads=40, mlp_width=13824, context=4096)
    for settings in PAPER:
        cond = {arithmetic.own_entry(settings["prompts"]): jax.ShapeDtypeStruct((1, 1, 9), jnp.int32)}
        out = worlds.written_on_paper(lm, lambda key, s=settings: arithmetic.init(lm, key, **s), cond=cond)
        assert out.tokens.shape == (1, 2)
