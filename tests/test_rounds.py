"""Rounds: what each is given, where its seeds come from, and what the next one explores with."""

import pytest

from ctg_jax import rng
from ctg_jax.learn import experience, rounds
from ctg_jax.types import InputError

GIVEN = dict(lm="lm", data="data", rewards=["reward"])


@pytest.fixture
def explored(monkeypatch):
    """The calls of `experience.explore`, of which each gives its number as the samples."""
    calls = []

    def explore(root, **given):
        calls.append(given)
        return f"samples {given['round']}"

    monkeypatch.setattr(experience, "explore", explore)
    return calls


def test_each_round_explores_with_what_the_method_proposed(explored):
    seen = []
    for turn in rounds.explored("root", 3, **GIVEN, explore=dict(n=4), pool="all", seed=7):
        seen.append((turn.number, list(turn.pools), turn.proposal))
        turn.proposal = f"control {turn.number}" if turn.number != 1 else turn.proposal  # the second is not better
    samples = ["samples 0", "samples 1", "samples 2"]
    assert seen == [(0, samples[:1], None), (1, samples[:2], "control 0"), (2, samples, "control 0")]
    assert [call["control"] for call in explored] == [None, "control 0", "control 0"]
    assert all(call["n"] == 4 and call["seed"] == 7 and call["lm"] == "lm" for call in explored)


def test_the_last_samples_or_none(explored):
    last = [(turn.seen, turn.pools) for turn in rounds.explored("root", 2, **GIVEN)]
    assert last == [(["samples 0"], ["samples 0"]), (["samples 0", "samples 1"], ["samples 1"])]
    explored.clear()
    assert [turn.pools for turn in rounds.explored("root", 2, **GIVEN, sampled=False)] == [[], []] and not explored


def test_no_two_rounds_of_any_seeds_share_one(explored):
    seeds = [turn.seed for seed in range(20) for turn in rounds.explored("root", 5, **GIVEN, seed=seed)]
    assert len(set(seeds)) == 100 and seeds[6] == rng.derived_seed(1, "learn", 1)


@pytest.mark.parametrize(
    "count, options, words",
    [(0, {}, "rounds is 0, expected at least 1"), (2, {"pool": "best"}, "pool is 'best', expected 'all' or 'last'")],
)
def test_bad_settings_are_refused_before_anything_is_sampled(explored, count, options, words):
    with pytest.raises(InputError, match=words):
        next(rounds.explored("root", count, **GIVEN, **options))
    assert not explored
