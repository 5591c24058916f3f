"""Removal of tokens: it is explicit and final, the support is never empty, and what cannot hold is one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from laws import worlds

from ctg_jax.control import Chain, Control
from ctg_jax.controls import constraints, truncate
from ctg_jax.controls.constraints import Ban, Force, MinLength, marks
from ctg_jax.controls.streams import Stream
from ctg_jax.decode import loop
from ctg_jax.learn import losses
from ctg_jax.methods import dexperts
from ctg_jax.support import REMOVED, remove, removed, settle
from ctg_jax.types import InputError, Sampling

LM = worlds.Bigram(vocab=50)
PARAMS = jax.jit(LM.init)(jax.random.key(0))
PROMPTS = worlds.prompts([[1, 2, 3], [4], [5, 6]])
SAMPLING = Sampling(max_new=3)
WORLD = worlds.Bigram()
TABLE = worlds.table([[0.5, 0.3, 0.2]] * 3)


def generate(control, params=PARAMS):
    return loop.generate(LM, params, PROMPTS, control, SAMPLING)


def next_token(*parts):
    z = loop.forward(WORLD, TABLE, worlds.prompts([[0]]), jnp.zeros((1, 1), jnp.int32), Chain(parts))
    return np.asarray(jax.nn.softmax(z[0, 0]))


# --- removed stays removed ------------------------------------------------------------------------------------------


def test_a_removed_token_does_not_come_back_through_temperature_and_experts():
    """Top-p .7 removes token 2. Divided by 20, its -1e30 passed for a logit, and z + (z⁺ - z) made it 0 where
    the others had log .6 and log .3: the probability 1 / 1.9 = .5263."""
    push = dexperts.experts(Stream(worlds.table([[0.6, 0.3, 0.1]] * 3), lm=WORLD), alpha=1.0)
    found = next_token(truncate.TopP(jnp.float32(0.7)), truncate.Temperature(20.0), push)
    np.testing.assert_allclose(found, [2 / 3, 1 / 3, 0], atol=1e-6)


def test_a_stream_may_remove_tokens_for_itself():
    """The expert's own top-p removes token 2 of (.6, .3, .1): the base's logit counts for it."""
    plus, minus = worlds.table([[0.6, 0.3, 0.1]] * 3), worlds.table([[0.2, 0.4, 0.4]] * 3)
    for sign in (1.0, -1.0):
        narrow = Stream(plus, truncate.TopP(jnp.float32(0.9)), lm=WORLD)
        found = next_token(dexperts.experts(narrow, Stream(minus, lm=WORLD), sign))
        wanted = np.array([0.5 * 3**sign, 0.3 * 0.75**sign, 0.2])
        np.testing.assert_allclose(found, wanted / wanted.sum(), rtol=1e-5)


def test_settle_by_hand():
    z = jnp.array([[3.0, 1.0, -jnp.inf, REMOVED]])
    assert settle(z, z + 5).tolist() == [[8, 6, np.float32(REMOVED), np.float32(REMOVED)]]
    assert settle(z, jnp.array([[0.0, -jnp.inf, 9, jnp.nan]])).tolist() == [[0, *[np.float32(REMOVED)] * 3]]
    assert settle(z, jnp.full((1, 4), REMOVED)).tolist() == [[3, *[np.float32(REMOVED)] * 3]]  # the least bad token
    for broken in (z.at[0, 1].set(jnp.nan), jnp.full((1, 4), -jnp.inf)):
        assert np.isnan(settle(broken, remove(broken, jnp.ones(4, bool)[None]))).all()
    assert np.isnan(settle(z, z.at[0, 1].set(jnp.nan))).all()


@pytest.mark.parametrize("rule", [
    truncate.NoRepeatNgram(1), truncate.TopP(1e-9), truncate.MinP(2.0), truncate.MinP(jnp.inf),
    truncate.Typical(1e-9), truncate.TopK(1),
], ids=lambda rule: type(rule).__name__)  # fmt: skip
def test_a_rule_that_would_leave_nothing_leaves_the_least_bad_token(rule):
    banned = jnp.asarray(marks([0], 4))
    z, read = jnp.array([[[9.0, 1.0, 3.0, 2.0]]]), jnp.array([[1, 2, 3]])
    prompts = worlds.prompts([[1, 2, 3]])
    chain = Chain((Ban(banned), rule))
    found, _ = chain.logits(z, None, read, read > 0, chain.init(prompts, 8))
    left = np.flatnonzero(~np.asarray(removed(found[0, 0]))).tolist()
    assert left == [2] or (isinstance(rule, truncate.Typical) and len(left) == 1 and left != [0])


def test_differences_of_truncated_distributions_are_finite_and_entropies_right():
    z = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    p, q = remove(z, jnp.array([[False, False, True]])), remove(z, jnp.array([[False, True, True]]))
    assert bool(jnp.isfinite(p - q).all()) and float(losses.kl(q, p)[0]) == pytest.approx(np.log(8 / 5), abs=1e-6)
    assert float(losses.entropy(q)[0]) == 0 and float(losses.entropy(p)[0]) == pytest.approx(0.6616, abs=1e-4)
    assert float(jax.nn.log_softmax(p)[0, 2]) == np.float32(REMOVED)
    slope = jax.grad(lambda p: losses.kl(p, q * 2)[0] + losses.entropy(p)[0])(p)
    assert bool(jnp.isfinite(slope).all())


# --- constants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("control", "message"), [
    (Force(np.array([99])), "token id 99, expected ids below 50"),
    (Force(np.zeros((3, 0), int)), "forced is empty"),
    (Ban(marks(range(50), 50)), "Ban leave no token that could be new token number 1"),
    (Ban(marks([7], 51)), r"banned is bool of shape \(51,\), expected bool \[50\]"),
    (Ban(np.array([7])), "banned is int64"),
    (Chain((Ban(marks([7], 50)), Force(np.array([-1, 7])))), "Ban and Force leave no token .* new token number 2"),
    (Chain((Force(np.array([8])), Chain((Force(np.array([[8], [8], [9]])),)))), "new token number 1 in row 2"),
    (Chain((MinLength(marks([0], 50), 2), Force(np.array([-1, 0])))), "MinLength and Force .* number 2"),
    (Chain((MinLength(~marks([3], 50), 2), Ban(marks([3], 50)))), "MinLength and Ban .* number 1"),
    (Chain((truncate.TopP(0.3), Force(np.array([7])))), "Force comes after TopP, .* put Force before TopP"),
    (Chain((Chain((truncate.TopK(1),)), Ban(marks([7], 50)))), "Ban comes after TopK"),
    (Chain((truncate.NoRepeatNgram(1), MinLength(marks([0], 50)))), "MinLength comes after NoRepeatNgram"),
])  # fmt: skip
def test_constants_that_cannot_hold_are_refused_before_decoding(control, message):
    with pytest.raises(InputError, match=message):
        generate(control)
    with pytest.raises(InputError, match=message):
        loop.score(LM, PARAMS, PROMPTS, jnp.zeros((3, 3), jnp.int32), control)
    with pytest.raises(InputError, match=message):
        next(loop.stream(LM, PARAMS, PROMPTS, control, SAMPLING))


def test_constants_that_can_hold_do():
    control = Chain((
        Ban(marks([7], 50)), MinLength(marks([0], 50), jnp.array([3, 1, 0])),
        Force(jnp.array([[-1, 9, -1], [8, 0, 9], [0, -1, 9]])), truncate.TopP(0.3), truncate.Temperature(0.7),
    ))  # fmt: skip
    out = generate(control)
    assert out.tokens[0, 1] == 9 and out.tokens[1].tolist() == [8, 0, 9] and out.tokens[2, 0] == 0
    assert (out.logp[1] == 0).all() and bool(jnp.isfinite(out.logp).all())
    np.testing.assert_allclose(loop.score(LM, PARAMS, PROMPTS, out.tokens, control), out.logp, atol=1e-5)
    other = loop.score(LM, PARAMS, PROMPTS, out.tokens.at[1, 0].set(7), control)
    assert float(other[1, 0]) == np.float32(REMOVED)  # probability 0, and still a number


def test_where_values_are_not_known_a_constant_that_cannot_hold_is_nan():
    force = lambda id: loop.forward(LM, PARAMS, PROMPTS, jnp.zeros((3, 1), jnp.int32), Force(id[None]))  # noqa: E731
    assert np.isnan(jax.jit(force)(jnp.int32(99))).all()
    assert not np.isnan(jax.jit(force)(jnp.int32(9))).any()


def test_ids_are_marked_or_refused():
    assert np.flatnonzero(marks([1, 3], 5)).tolist() == [1, 3] and not marks([], 5).any()
    for id in (-1, 5):
        with pytest.raises(InputError, match=f"token id {id} is not in the vocabulary, expected ids from 0 to 4"):
            marks([id], 5)


def test_a_constant_that_a_rule_of_ones_own_leaves_nothing_for_stops_with_a_sentence():
    @struct.dataclass
    class Only(Control):
        id: int = struct.field(pytree_node=False, default=7)

        def logits(self, z, h, tokens, mask, state):
            return remove(z, (jnp.arange(z.shape[-1]) != self.id)[None, None]), state

    with pytest.raises(InputError, match="removed every token that Ban, Force or MinLength allows"):
        generate(Chain((Only(), Ban(marks([7], 50)))))
    assert (np.asarray(generate(Chain((Ban(marks([8], 50)), Only()))).tokens) == 7).all()


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "control"), [(jnp.nan, truncate.TopK(2)), (jnp.inf, Chain(()))])
def test_logits_that_are_not_finite_stop_with_a_sentence(value, control):
    broken = {**PARAMS, "head": {"kernel": PARAMS["head"]["kernel"].at[7].set(value)}}  # the logit of token 7
    with pytest.raises(InputError, match="logits of row 0, new token 1, are not finite"):
        generate(control, broken)
    with pytest.raises(InputError, match="logits of row 0, new token 1, are not finite"):
        loop.score(LM, broken, PROMPTS, jnp.full((3, 2), 7, jnp.int32), control)
    with pytest.raises(InputError, match="not finite"):
        next(loop.stream(LM, broken, PROMPTS, control, SAMPLING))
    inside = jax.jit(lambda p: generate(control, p).tokens)(broken)  # nothing can be raised here
    assert ((np.asarray(inside) >= 0) & (np.asarray(inside) < LM.vocab)).all()


def test_only_ids_that_are_tokens_have_probability():
    known = np.arange(50) < 20
    assert constraints.only(np.ones(50, bool), Chain(())) == Chain(())
    control = constraints.only(known, truncate.Temperature(20.0))
    out = loop.generate(LM, PARAMS, worlds.prompts([[1]] * 64), control, Sampling(max_new=4))
    assert int(out.tokens.max()) < 20
    logp = jax.nn.log_softmax(loop.forward(LM, PARAMS, PROMPTS, jnp.zeros((3, 2), jnp.int32), control))
    assert float(jnp.exp(logp[..., 20:]).sum()) == 0
    banned, rest = constraints.apart(control)
    assert banned.tolist() == (~known).tolist() and rest == truncate.Temperature(20.0)
