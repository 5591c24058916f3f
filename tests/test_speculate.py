"""Speculative sampling: today's texts where nothing is judged, the exact distribution, ends, rows, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from laws import worlds

from ctg_jax.control import IDENTITY, Chain, Control
from ctg_jax.controls import truncate
from ctg_jax.controls.constraints import Ban, MinLength, marks
from ctg_jax.controls.streams import Stream
from ctg_jax.decode import loop, strategies
from ctg_jax.decode.speculate import Speculative, rounds, split, whole
from ctg_jax.methods import arithmetic, dexperts, finetune, form, gedi, steer
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError, Sampling

LM = worlds.tiny(depth=1)
PARAMS = worlds.lively(LM, factor=6)
ROWS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [3, 3, 10, 1], [2, 8]]
PROMPTS = worlds.prompts(ROWS)
SAMPLING = Sampling(max_new=8)
WORLD = worlds.Bigram()
P = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]]
A = [[0.6, 0.3, 0.1], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]]


def run(control, prompts=PROMPTS, sampling=SAMPLING, lm=LM, params=PARAMS):
    return strategies.run(lm, params, prompts, control, sampling)


def instead(target, lm=WORLD):
    """The rule whose distribution is that of a model with the given table: z + (target - z)."""
    frozen = Stream(worlds.table(P), lm=lm)
    return dexperts.experts(Stream(worlds.table(target), lm=lm), frozen, alpha=1.0)


SLOW = pytest.mark.slow  # programs of their own


@pytest.mark.parametrize("k", [3, pytest.param(1, marks=SLOW)])
def test_where_the_rule_changes_nothing_the_texts_are_those_of_generate(k):
    sampling = Sampling(max_new=8, eos=(7,), pad=9, stop=((3, 3),))
    draft = Chain((truncate.TopP(0.9), steer.example(LM, jax.random.key(1))))
    plain = loop.generate(LM, PARAMS, PROMPTS, draft, sampling)
    out = run(Speculative(IDENTITY, draft, k), sampling=sampling)
    assert out.tokens.tolist() == plain.tokens.tolist() and out.mask.tolist() == plain.mask.tolist()
    np.testing.assert_allclose(out.logp, plain.logp, atol=2e-5)
    assert int(out.generated) == 1 + -(-(int(plain.generated) - 1) // (k + 1))  # everything is kept


@pytest.mark.parametrize("k", [2, pytest.param(1, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_texts_have_the_distribution_of_the_chain(k):
    """χ² of 20,000 texts of three tokens against enumeration, on 26 degrees of freedom."""
    count, rule = 20_000, Chain((instead(A), truncate.Temperature(0.8)))
    prompts = worlds.prompts([[0]] * count, seed=k)
    out = run(Speculative(rule, k=k), prompts, Sampling(max_new=3), WORLD, worlds.table(P))
    wanted = worlds.probabilities(WORLD, worlds.table(P), [0], 3, rule)
    found = np.bincount(np.asarray(out.tokens) @ np.array([9, 3, 1]), minlength=27)
    statistic = float(np.sum((found - count * wanted) ** 2 / (count * wanted)))
    assert statistic < 54.1, statistic  # the 0.999 quantile
    other = worlds.probabilities(WORLD, worlds.table(P), [0], 3)
    assert np.sum((found - count * other) ** 2 / (count * other)) > 1000


@pytest.mark.parametrize(("q", "p", "kept"), [(P, A, 0.9), (A, P, 0.9), ([[0.2, 0.4, 0.4]] * 3, P, 0.7)])
def test_the_share_of_proposals_that_are_kept_by_hand(q, p, kept):
    """1 - ½ Σ |p - q| after token 0; a kept proposal ends two further tokens in one round, a refused one takes two."""
    rule = dexperts.experts(Stream(worlds.table(p), lm=WORLD), Stream(worlds.table(q), lm=WORLD), alpha=1.0)
    chain = whole(None, Speculative(rule))
    one = worlds.prompts([[0]])

    def used(key):  # the first token is drawn from p itself
        prompts = one.replace(keys=key[None])
        out = rounds(WORLD, worlds.table(q), prompts, chain, Sampling(max_new=3), 1)
        return out.tokens[0, 0], out.generated

    first, found = jax.jit(jax.vmap(used))(jax.random.split(jax.random.key(0), 6000))
    found = np.asarray(found)[np.asarray(first) == 0]
    assert np.mean(found == 2) == pytest.approx(kept, abs=4 * np.sqrt(kept * (1 - kept) / len(found)))


RULES = {
    "experts": lambda lm, key: Chain((dexperts.example(lm, key), truncate.TopP(0.9))),
    "formula": lambda lm, key: arithmetic.example(lm, key),
}


@pytest.mark.parametrize("name", ["experts", pytest.param("formula", marks=SLOW)])
def test_log_probabilities_are_scores_and_rows_are_alone_as_together(name):
    keys = jax.random.split(jax.random.key(4), 2)
    control = Speculative(RULES[name](LM, keys[0]), finetune.example(LM, keys[1]), 3)
    out = run(control)
    scores = loop.score(LM, PARAMS, PROMPTS, out.tokens, whole(None, control))
    np.testing.assert_allclose(scores, out.logp, rtol=1e-5, atol=2e-5)
    assert 3 <= int(out.generated) <= 8
    alone = worlds.prompts([ROWS[3]], 5).replace(keys=PROMPTS.keys[3:4])
    single = run(control, alone)
    assert single.tokens.tolist() == out.tokens[3:4].tolist()
    np.testing.assert_allclose(single.logp, out.logp[3:4], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rotary", [False, True])
def test_greedy_texts_are_those_of_generate(rotary):
    """Also with holes in the cache: proposals are refused in some rows and kept in others."""
    lm = Transformer.llama(vocab=11, width=16, depth=2, heads=2, kv_heads=1, mlp_width=16, context=48) if rotary else LM
    params = worlds.lively(lm, factor=6)
    sampling = Sampling(max_new=8, greedy=True)
    control = Speculative(dexperts.example(lm, jax.random.key(4)), k=2)
    out = run(control, sampling=sampling, lm=lm, params=params)
    plain = loop.generate(lm, params, PROMPTS, whole(None, control), sampling)
    assert out.tokens.tolist() == plain.tokens.tolist()
    np.testing.assert_allclose(out.logp, plain.logp, atol=2e-5)
    assert int(out.generated) < 8


@struct.dataclass
class Mean(Control):
    """The mean of the logits that two copies of the base give behind prompts of their own."""

    stream: Stream

    def init(self, prompts, length):
        return self.stream.init(prompts, length)

    def logits(self, z, h, tokens, mask, state):
        found, _, state = self.stream.read(tokens, mask, z.shape[1], state)
        return jnp.mean(found, axis=1), state


@pytest.mark.slow
def test_copies_under_prompts_of_their_own():
    """What was refused is taken back in each of the copies that read in one pass."""
    control = Speculative(Mean(Stream(lm=LM, of="current", own="told", before=True, copies=2)), k=2)
    told = jnp.array([[[1, 2], [-1, 3]], [[4, 4], [5, 1]], [[2, 2], [-1, 7]], [[6, 5], [1, 1]], [[3, 8], [8, 3]]])
    prompts, sampling = PROMPTS.replace(cond={"told": told}), Sampling(max_new=6, greedy=True)
    out = run(control, prompts, sampling)
    assert out.tokens.tolist() == loop.generate(LM, PARAMS, prompts, control.rule, sampling).tokens.tolist()
    assert 3 <= int(out.generated) <= 6
    drawn = run(control, prompts)
    np.testing.assert_allclose(loop.score(LM, PARAMS, prompts, drawn.tokens, control.rule), drawn.logp, atol=2e-5)


def test_ids_that_are_no_token_are_never_proposed():
    rule = instead(A)
    only = Chain((Ban(jnp.asarray(marks([2], 3))), Speculative(rule, k=2)))
    prompts = worlds.prompts([[0]] * 200)
    out = run(only, prompts, Sampling(max_new=4), WORLD, worlds.table(P))
    assert set(np.unique(out.tokens)) == {0, 1}


def test_a_chain_is_split_behind_the_last_control_that_acts_elsewhere():
    push, expert, top = (
        steer.example(LM, jax.random.key(1)),
        dexperts.example(LM, jax.random.key(2)),
        truncate.TopP(0.9),
    )
    found = split(Chain((truncate.TopK(5), push, Chain((expert, top)))), 3)
    assert [type(c) for c in found.draft.parts] == [truncate.TopK, steer.Steer] and found.k == 3
    assert [type(c) for c in found.rule.parts] == [type(expert), truncate.TopP]


def test_what_cannot_be_taken_back_is_refused():
    expert = dexperts.example(LM, jax.random.key(2))
    penalty, ngrams = truncate.RepetitionPenalty(1.2, vocab=LM.vocab), truncate.NoRepeatNgram(2)
    later = MinLength(jnp.asarray(marks([0], LM.vocab)), 2)
    for rule, draft, name in [
        (Chain((expert, penalty)), IDENTITY, "RepetitionPenalty"),
        (expert, ngrams, "NoRepeatNgram"),
        (Chain((later, expert)), IDENTITY, "MinLength"),
        (gedi.example(LM, jax.random.key(3)), IDENTITY, "Gedi"),
        (form.example(LM, None), IDENTITY, "Form"),
    ]:
        with pytest.raises(InputError, match=f"^{name} changes its state with every token, which speculative sampling"):
            run(Speculative(rule, draft))
    with pytest.raises(InputError, match="rule holds Steer, which acts in hidden"):
        Speculative(Chain((expert, steer.example(LM, jax.random.key(1)))))
    with pytest.raises(InputError, match="k is 0, expected at least 1"):
        Speculative(expert, k=0)
    with pytest.raises(InputError, match="no other control and no filter can act on it"):
        strategies.of(Chain((Speculative(expert), penalty)))
