"""Addresses of random numbers: no two samples of any prompts share a key, and no two members of a numbered series share
a seed."""

import itertools

import jax
import numpy as np
import pytest
from flax import struct

from ctg_jax import rng
from ctg_jax.control import Control
from ctg_jax.data import to_prompts, train_bpe
from ctg_jax.decode import strategies
from ctg_jax.evaluation import LMScorer
from ctg_jax.methods import click, gdc, ppo, preference, quark, unlikelihood
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.session import Session
from ctg_jax.run.stage import UnfinishedError, stage
from ctg_jax.stages import judges, sampling, sources
from ctg_jax.types import InputError, Samples

HIGHEST = 2**32 - 1


def bits(keys):
    return [tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["the food was good"] * 5, 270)


def test_addresses_of_samples_never_meet(bpe):
    numbers = [0, 1, 2, 65535, 65536, 65537, 2**31 - 1, 2**31, HIGHEST]
    pairs = list(itertools.product(numbers, numbers))
    keys = bits(to_prompts(bpe, ["the"] * len(pairs), 0, ids=pairs).keys)
    assert len(set(keys)) == len(pairs) == 81
    assert keys == bits(rng.per_example(jax.random.key(0), np.asarray(pairs)))
    by_hand = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), np.uint32(65536)), np.uint32(2**31))
    assert keys[pairs.index((65536, 2**31))] == bits(by_hand[None])[0]


def test_keys_of_single_ids_reach_the_highest():
    keys = rng.per_example(jax.random.key(3), np.asarray([7, 2**31, HIGHEST]))
    assert bits(keys)[0] == bits(jax.random.fold_in(jax.random.key(3), 7)[None])[0]
    assert len(set(bits(keys))) == 3
    traced = jax.jit(rng.per_example)(jax.random.key(3), np.asarray([7, 2**31, HIGHEST], np.uint32))
    assert bits(traced) == bits(keys)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([0, -1], "ids go from -1 to 0"),
        ([0, 2**32], "ids go from 0 to 4294967296"),
        ([0.5], "type float64"),
        ([[[1]]], r"shape \(1, 1, 1\)"),
    ],
)
def test_ids_that_would_wrap_are_refused(bpe, ids, message):
    with pytest.raises(InputError, match=message):
        to_prompts(bpe, ["the"] * len(ids), 0, ids=ids)


class OneToken:
    """A tokenizer for which every text is token 1."""

    adds_bos, bos, eos, pad, start, vocab, ends = False, None, 0, 0, 0, 4, (0,)

    def encode(self, texts):
        return [[1]] * len(texts)

    def encode_prompts(self, texts):
        return self.encode(texts)

    def known(self, vocab):
        return np.ones(vocab, bool)

    def begun(self, ids):
        return list(ids)

    def before_end(self, ids):
        return list(ids)

    def decode_after(self, prompts, rows):
        return ["we"] * len(rows)


def test_prompts_65536_apart_are_sampled_apart(monkeypatch):
    """What `complete` gives the first and the last of 65,537 prompts."""
    lm, seen = Transformer.gpt2(vocab=4, width=4, depth=1, heads=1, context=32), []

    def run(model, params, prompts, control, settings, devices):
        seen.append(bits(prompts.keys)[0])
        one = np.ones((1, 1), np.int32)
        return Samples(one, one > 0, one * 0.0, 1)

    monkeypatch.setattr(strategies, "run", run)
    for skip in (0, 65536):
        (row,) = next(
            sampling.complete(lm, {}, OneToken(), ["we"] * 65537, options=sampling.Options(batch=1), skip=skip)
        )
        assert (row["prompt_id"], row["sample"]) == (skip, 0)
    assert seen[0] != seen[1]
    assert seen[1] == bits(rng.per_example(jax.random.key(0), np.asarray([[65536, 0]])))[0]


@struct.dataclass
class Noisy(Control):
    """Logits with noise that is drawn once for each row."""

    def init(self, prompts, length):
        return jax.vmap(lambda key: jax.random.normal(key, (1, 4)))(prompts.keys)

    def logits(self, z, h, tokens, mask, state):
        return z + state, state


def test_a_control_that_draws_scores_a_text_alike_in_every_batch():
    lm = Transformer.gpt2(vocab=4, width=4, depth=1, heads=1, context=32)
    params = lm.init(jax.random.key(0))
    heads, tails = [[1]] * 5, [[2, 3], [1], [3, 3], [2], [1, 1, 2]]
    found = [LMScorer(lm, params, OneToken(), batch=b, control=Noisy()).ids(heads, tails)[0] for b in (2, 5)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    alone = LMScorer(lm, params, OneToken(), batch=2).ids(heads, tails)[0]
    assert np.abs(found[0] - alone).min() > 1e-3


def test_seeds_of_a_series_never_meet():
    """(seed 0, round 1) and (seed 1, round 0) are one seed where seeds are added."""
    series = itertools.product(range(20), ("explore", "learn", "stratum"), range(20))
    seeds = [rng.derived_seed(*address) for address in series]
    assert len(set(seeds)) == len(seeds) == 1200
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert rng.derived_seed(0, "explore", 1) == 1049631535
    assert rng.derived_seed(2**40, "explore") != rng.derived_seed(0, "explore")


FITS = [
    (ppo, {}),
    (quark, {"sorting": {"strata": True}}),
    (click, {"threshold": "median"}),
    (preference, {}),
    (unlikelihood, {"objective": {"sequence": 1.0}}),
    (gdc, {"moments": {}}),
]


@pytest.mark.parametrize("method, hp", FITS, ids=[m.__name__.rpartition(".")[2] for m, _ in FITS])
def test_rounds_of_several_seeds_share_nothing(tmp_path, method, hp):
    """Sampling and learning of every round have a seed that no other round has, of this seed or of another."""
    rounds = 1 if method is gdc else 3  # its second round depends on how the first went
    plan = Session(tmp_path).dry_run()
    lm = stage(plan, sources.load_lm, {"source": "some"})
    given = dict(lm=lm, data=stage(plan, sources.load_data, {"source": "bundled:reviews", "split": "test"}))
    reward = stage(plan, judges.fit_judge, {"kind": "diversity", "name": "some"})
    for seed in range(3):
        try:
            method.fit(plan, **given, rewards=[reward], rounds=rounds, seed=seed, **hp)
        except UnfinishedError:
            assert method is gdc
    name = method.__name__.rpartition(".")[2]
    specs = [plan.pending[key] for key in plan.pending if key.startswith(("sample-", f"{name}-"))]
    assert len(specs) == 2 * 3 * rounds
    seeds = [spec["config"]["seed"] for spec in specs]
    assert len(set(seeds)) == len(seeds)
