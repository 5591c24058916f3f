"""Every truncation rule against numbers worked out by hand, or against a plain numpy statement of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.controls import constraints, truncate
from ctg_jax.models.decoder import Transformer
from ctg_jax.support import likeliest, removed
from ctg_jax.types import InputError, Prompts

Q = np.array([0.4, 0.3, 0.2, 0.1], np.float32)


def kept(control, q=Q, tokens=((0,),), state=None):
    z = jnp.log(jnp.asarray(q))[None, None]
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = jnp.ones(tokens.shape, bool)
    prompts = Prompts(tokens, mask, jax.random.split(jax.random.key(0), tokens.shape[0]))
    state = control.init(prompts, tokens.shape[1] + 4) if state is None else state
    z, _ = control.logits(z, None, tokens, mask, state)
    return (~np.asarray(removed(z[0, 0]))).tolist()


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        (truncate.TopP(0.65), [1, 1, 0, 0]),
        (truncate.TopP(0.71), [1, 1, 1, 0]),
        (truncate.TopP(1e-6), [1, 0, 0, 0]),
        (truncate.TopP(1.0), [1, 1, 1, 1]),
        (truncate.TopK(2), [1, 1, 0, 0]),
        (truncate.TopK(9), [1, 1, 1, 1]),
        (truncate.MinP(0.5), [1, 1, 1, 0]),
        (truncate.MinP(0.51), [1, 1, 0, 0]),
        # entropy 1.280; surprise .916, 1.204, 1.609, 2.303; distance .364, .076, .330, 1.023: order 1, 2, 0, 3
        (truncate.Typical(0.3), [0, 1, 0, 0]),
        (truncate.Typical(0.45), [0, 1, 1, 0]),
        (truncate.Typical(0.6), [1, 1, 1, 0]),
        (constraints.Ban(np.array([1, 0, 0, 1], bool)), [0, 1, 1, 0]),
        (constraints.Force(np.array([2, -1])), [0, 0, 1, 0]),
        (constraints.MinLength(np.array([0, 0, 0, 1], bool), 1), [1, 1, 1, 0]),
        (constraints.MinLength(np.array([0, 0, 0, 1], bool), 0), [1, 1, 1, 1]),
    ],
)
def test_hand_numbers(control, expected):
    assert kept(control) == [bool(x) for x in expected]


def test_ties_with_the_threshold_stay_together():
    assert kept(truncate.TopP(0.5), np.array([0.4, 0.2, 0.2, 0.2], np.float32)) == [True] * 4


def test_no_repeat_ngram_bans_the_continuation_of_a_seen_bigram():
    assert kept(truncate.NoRepeatNgram(3), tokens=((1, 2, 3, 1, 2),)) == [True, True, True, False]
    assert kept(truncate.NoRepeatNgram(1), tokens=((1, 2, 1),)) == [True, False, False, True]
    assert kept(truncate.NoRepeatNgram(3), tokens=((1, 2),)) == [True] * 4


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    control = truncate.RepetitionPenalty(2.0, vocab=4)
    z = jnp.array([[[2.0, -2.0, 4.0, -4.0]]])
    tokens, mask = jnp.array([[0, 1, 2]]), jnp.array([[True, True, False]])
    out, seen = control.logits(z, None, tokens, mask, jnp.zeros((1, 4), bool))
    assert out[0, 0].tolist() == [1.0, -4.0, 4.0, -4.0]
    assert seen[0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", ["RepetitionPenalty", "NoRepeatNgram", "Force", "MinLength"])
def test_many_positions_at_once_equal_one_at_a_time(name):
    made = {
        "RepetitionPenalty": truncate.RepetitionPenalty(1.7, vocab=5),
        "NoRepeatNgram": truncate.NoRepeatNgram(2),
        "Force": constraints.Force(np.array([-1, 3, -1, 1])),
        "MinLength": constraints.MinLength(np.array([0, 0, 0, 0, 1], bool), 2),
    }[name]
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 5, (3, 8)), jnp.int32)
    mask = jnp.arange(8)[None] >= jnp.array([0, 2, 1])[:, None]
    z = jnp.asarray(rng.normal(size=(3, 5, 5)), jnp.float32)
    prompts = Prompts(tokens[:, :4], mask[:, :4], jax.random.split(jax.random.key(0), 3))
    whole, _ = made.logits(z, None, tokens, mask, made.init(prompts, 9))
    state, one = made.init(prompts, 9), []
    for i in range(5):
        new = slice(0, 4) if i == 0 else slice(3 + i, 4 + i)
        out, state = made.logits(z[:, i : i + 1], None, tokens[:, new], mask[:, new], state)
        one.append(out)
    np.testing.assert_array_equal(whole, jnp.concatenate(one, axis=1))


def test_nucleus_is_exact_on_a_large_flat_vocabulary():
    q = jax.nn.softmax(
        jax.random.normal(jax.random.key(0), (4, 1, 50257)) * jnp.array([0.01, 0.5, 2, 8])[:, None, None]
    )
    keep = ~np.asarray(removed(truncate.TopP(0.9).logits(jnp.log(q), None, None, None, None)[0]))
    for row, k in zip(np.asarray(jax.nn.softmax(jnp.log(q)), np.float64)[:, 0], keep[:, 0]):
        order = np.sort(row)[::-1]
        need = np.searchsorted(np.cumsum(order), 0.9) + 1
        assert abs(int(k.sum()) - need) <= max(2, 1e-4 * need)  # float32 against float64 sums
        assert row[k].min() >= row[~k].max()


def test_strength_may_differ_by_row_and_be_swept():
    z = jnp.broadcast_to(jnp.log(jnp.asarray(Q))[None, None], (2, 1, 4))
    out, _ = truncate.TopP(jnp.array([0.3, 0.65])).logits(z, None, None, None, None)
    assert (~np.asarray(removed(out[:, 0]))).tolist() == [[True, False, False, False], [True, True, False, False]]
    sweep = jax.vmap(lambda t: truncate.Temperature(t).logits(z, None, None, None, None)[0])(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(sweep[1], z / 2)


def test_bad_options_are_one_sentence():
    lm = Transformer.gpt2(vocab=4, width=4, depth=1, heads=1, context=8)
    with pytest.raises(InputError, match=r"top_p is 1.5"):
        truncate.rules(lm, top_p=1.5)
    with pytest.raises(InputError, match="temperature is nan"):
        truncate.rules(lm, temperature=float("nan"))
    with pytest.raises(InputError, match="min_length needs eos"):
        truncate.rules(lm, min_length=3)
    chain = truncate.rules(lm, top_p=0.9, repetition_penalty=1.2, temperature=0.7)
    assert [type(c).__name__ for c in chain.parts] == ["RepetitionPenalty", "Temperature", "TopP"]


@pytest.mark.parametrize(("v", "k"), [(7, 1), (7, 7), (50, 3), (1000, 40)])
def test_the_kth_largest_is_that_of_a_sort(v, k):
    z = np.round(np.random.default_rng(v).normal(size=(6, 2, v)) * 2, 1).astype(np.float32)  # with ties
    z[0, 0, : v // 2], z[1, 1], z[2, 0, :3], z[3, 0, 0], z[4, 0, 1] = -1e30, -1e30, -0.0, np.inf, -np.inf
    found = jax.jit(lambda z: truncate.largest(z, k))(z)
    np.testing.assert_array_equal(found[..., 0], -np.sort(-z, axis=-1)[..., k - 1])


def test_the_likeliest_token_is_the_first_of_those_that_tie():
    z = np.round(np.random.default_rng(0).normal(size=(50, 20)), 0).astype(np.float32)
    z[0], z[1], z[2, 3] = -np.inf, -1e30, np.inf
    np.testing.assert_array_equal(jax.jit(likeliest)(z), z.argmax(-1))
    assert 0 <= int(likeliest(jnp.full(20, jnp.nan))) < 20
