"""Minimum Bayes risk: similarities and choices by hand, the law of a vote, the stage over samples, bad input."""

import math

import jax
import numpy as np
import pytest

from ctg_jax.evaluation.text import bleu_pair
from ctg_jax.learn import consensus
from ctg_jax.learn.fitting import keep
from ctg_jax.methods import mdlm
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import judges, sampling
from ctg_jax.types import InputError
from experiments import arms, samples


def test_similarities_by_hand():
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, no quadruple (0.1 of 1): (3/4 · 2/3 · 1/2 · 1/10) ^ ¼
    assert bleu_pair("the food was good", "the food was bad") == pytest.approx((3 / 4 * 2 / 3 / 2 / 10) ** 0.25)
    assert bleu_pair("a b c d", "a b c d") == pytest.approx(1)
    assert bleu_pair("a b c d", "a b c d e") == pytest.approx(math.exp(1 - 5 / 4))
    assert bleu_pair("", "a") == bleu_pair("a", "") == bleu_pair("a", "b") == 0
    assert consensus.overlap("a b c", "b c d e") == pytest.approx(2 * 2 / 7)
    assert consensus.same("a ", "a") == 1 and consensus.same("a", "b") == 0


def test_the_text_most_like_the_others_is_chosen():
    texts = ["the dog sat", "the cat sat", "a cat ran", "the cat ran"]
    # The second and the fourth have 2/3, 2/3 and 1/3 in common with the others; the first of the two is chosen.
    assert consensus.consensus(texts, "overlap") == (1, pytest.approx(5 / 9))
    assert consensus.consensus(["x", "y", "y", "z"], "same") == (1, pytest.approx(1 / 3))
    best, mean = consensus.consensus(["alone"])
    assert best == 0 and math.isnan(mean)


def test_the_law_of_a_vote():
    """Of three texts that are "good" with probability p the chosen one is with p² (3 − 2 p)."""
    draw, p = np.random.default_rng(0), 0.7
    words = np.array(["bad", "good"])
    found = []
    for texts in words[(draw.random((4000, 3)) < p).astype(int)]:
        found.append(texts[consensus.consensus(texts.tolist(), "same")[0]] == "good")
    assert abs(np.mean(found) - p**2 * (3 - 2 * p)) < 0.02


def untrained(run, *, lm):
    """Stage: a masked model, which has no likelihood."""
    model, _, tokenizer = open_lm(lm)
    shape = dict(width=16, depth=1, heads=2, length=16, eos=tokenizer.eos)
    keep(run, mdlm.init(model, jax.random.key(0), **shape), "mdlm", shape)


def test_the_stage_chooses_among_the_samples_of_any_arm(small, monkeypatch):
    root, lm, data = small
    control = stage(root, untrained, lm=lm)
    monkeypatch.setattr(samples, "control_of", lambda *a: control)
    found = arms.read(
        dict(masked=dict(method="mdlm", data=dict(source="x")), vote=dict(consensus=[1, 3], chain=dict(masked=0.0)))
    )
    drawn = list(samples.sampled(root, lm, data, dict(n=2, max_new=4, filter={}), found["vote"], found))
    assert [n for n, *_ in drawn] == [1.0, 3.0]
    one, best = (a.rows("samples.jsonl") for _, a, *_ in drawn)
    plain = stage(
        root, sampling.sample, dict(n=6, max_new=4, filter={}, strengths=[0.0]), lm=lm, prompts=data, controls=[control]
    ).rows("samples.jsonl")
    prompts = len(data.rows("data.jsonl"))
    assert len(one) == len(best) == 2 * prompts and not drawn[1][1].spec["likelihood"]
    for row in best:
        group = [r["text"] for r in plain if r["prompt_id"] == row["prompt_id"] and r["sample"] // 3 == row["sample"]]
        at, mean = consensus.consensus(group)
        assert row["text"] == group[at] and row["agreement"] == pytest.approx(mean) and "logp" not in row
    figures = {row["name"] for row in stage(root, judges.evaluate, {}, samples=drawn[1][1]).metrics()}
    assert "dist-2" in figures and "similarity" not in figures  # which is that to a source


def test_bad_input(small):
    root, lm, data = small
    with pytest.raises(InputError, match="similarity is 'rouge', expected one of bleu, overlap, same"):
        consensus.consensus(["a"], "rouge")
    with pytest.raises(InputError, match="there are no texts to choose from"):
        consensus.consensus([])
    drawn = stage(root, sampling.sample, dict(n=2, max_new=2), lm=lm, prompts=data)
    with pytest.raises(InputError, match="n is 3, expected a divisor of 2, the samples of each prompt"):
        stage(root, consensus.chosen, dict(n=3), samples=drawn)
    for settings, words in [
        (dict(consensus=(4,), similarity="rouge"), "methods.vote.similarity is 'rouge', expected one of bleu"),
        (dict(consensus=(0,)), "methods.vote.consensus holds 0, expected numbers of samples"),
        (dict(consensus=3), "methods.vote.consensus is 3, expected a list of numbers of samples"),
        (dict(consensus=()), r"methods.vote.consensus is \(\), expected a list of numbers of samples"),
        (dict(best_of=3, rewards={}), "methods.vote.best_of is 3, expected a list of numbers of samples"),
        (dict(consensus=(4,), chain=dict(other=1.0)), "methods.vote.chain names 'other', which is no method"),
    ]:
        with pytest.raises(InputError, match=words):
            arms.read(dict(vote=settings))
