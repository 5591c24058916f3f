"""The experience loop: what the pool holds, that nothing is scored twice, and rounds that end bit for bit the same
after a kill in any of their stages."""

import jax
import numpy as np
import pytest

from ctg_jax import evaluation
from ctg_jax.learn import experience
from ctg_jax.learn.pool import Pool, log_probabilities
from ctg_jax.learn.rounds import adapted, history, summary
from ctg_jax.methods import quark
from ctg_jax.rewards import TextReward
from ctg_jax.run.stage import open_lm, stage, write_jsonl
from ctg_jax.stages import judges, sampling, sources
from ctg_jax.types import InputError
from tests.experiments.tiny_lm import write_lm

TEXTS = ["the food", "the room was", "we"]
EXPLORE = dict(n=4, max_new=5, batch=6)
TRAINING = dict(steps=4, batch=4, warmup=1, save_every=2)
ROUNDS = dict(rounds=2, explore=EXPLORE, tokens=3, adapter=dict(rank=2), training=TRAINING)


def texts(run, *, rows):
    write_jsonl(run.path / "data.jsonl", rows)


class Counting(TextReward):
    """The number of letters e; it counts what it was asked, and breaks at a given text."""

    def __init__(self, breaks_at=None):
        super().__init__("letters", "1", lambda rows: [float(r.count("e")) + len(r) / 100 for r in rows])
        self.asked, self.breaks_at = [], breaks_at

    def __call__(self, prompts, texts):
        self.asked += list(zip(prompts, texts))
        if self.breaks_at is not None and len(self.asked) > self.breaks_at:
            raise KeyboardInterrupt
        return super().__call__(prompts, texts)


@pytest.fixture
def counting(monkeypatch):
    reward = Counting()
    monkeypatch.setattr(experience, "open_judge", lambda artifact: reward)
    return reward


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("lm"))


def world(root, folder):
    lm = stage(root, sources.load_lm, {"source": str(folder)})
    data = stage(root, texts, {"rows": [{"text": t, "label": i % 2} for i, t in enumerate(TEXTS)]})
    return dict(lm=lm, data=data, rewards=[stage(root, judges.fit_judge, {"kind": "oracle"})])


def test_the_pool_holds_samples_scores_and_log_probabilities(tmp_path, folder, counting):
    given = world(tmp_path, folder)
    scored = experience.explore(tmp_path, **given, **EXPLORE)
    pool = Pool.open([scored])
    assert len(pool) == 12
    assert pool[5]["prompt"] == TEXTS[1]
    assert pool[5]["sample"] == 1
    wanted = [TextReward.__call__(counting, [r["prompt"]], [r["text"]])[0] for r in pool]
    np.testing.assert_allclose(pool.column("reward"), wanted, rtol=1e-6)
    np.testing.assert_allclose(pool.column("base"), pool.column("logp"), atol=1e-4)  # the base drew them
    assert scored.metrics()[0]["kl_per_token"] == pytest.approx(0, abs=1e-5)
    both = Pool.open([scored, scored]).with_(bin=np.arange(24)).take(np.array([20, 3]))
    assert [r["bin"] for r in both] == [20, 3]
    assert both[0]["text"] == pool[8]["text"]
    lm, params, tokenizer = open_lm(given["lm"])
    again = log_probabilities(lm, params, pool, tokenizer, batch=5)
    np.testing.assert_allclose(again, pool.column("base"), atol=1e-4)


def test_no_text_is_scored_twice(tmp_path, folder, counting):
    given = world(tmp_path, folder)
    samples = stage(
        tmp_path, sampling.sample, dict(EXPLORE, max_new=3, filter={"top_k": 2}), lm=given["lm"], prompts=given["data"]
    )
    distinct = {(r["prompt"], r["text"]) for r in samples.rows("samples.jsonl")}
    inputs = dict(samples=samples, rewards=given["rewards"], lm=given["lm"])
    counting.breaks_at = 4
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, experience.score, {"batch": 2}, **inputs)
    counting.breaks_at = None
    (unfinished,) = tmp_path.glob("score-*")
    with open(unfinished / "scores.partial", "a") as f:
        f.write("[0.")  # the machine went down in the middle of a line
    before = len(counting.asked) - 2  # the last two were asked and never answered
    scored = stage(tmp_path, experience.score, {"batch": 2}, **inputs)
    assert len(counting.asked) - 2 == len(distinct) < 12
    assert counting.asked[:before] == list(dict.fromkeys(counting.asked))[:before]
    assert not (scored.path / "scores.partial").exists()
    pool = Pool.open([scored])
    wanted = [TextReward.__call__(counting, [r["prompt"]], [r["text"]])[0] for r in pool]
    np.testing.assert_allclose(pool.column("reward"), wanted, rtol=1e-6)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, folder):
    """(the control of two rounds that nobody disturbed, how many texts were scored)"""
    root, reward = tmp_path_factory.mktemp("uncut"), Counting()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experience, "open_judge", lambda artifact: reward)
        return quark.fit(root, **world(root, folder), **ROUNDS), len(reward.asked)


class Killed(BaseException):
    """Nothing in the library catches it, as nothing catches a kill."""


@pytest.mark.parametrize("where", ["explore", "score", "learn"])
def test_rounds_that_were_killed_end_the_same(tmp_path, folder, counting, uncut, monkeypatch, where):
    """Killed in the second round, in explore, in score, or in the middle of learn: the rerun ends bit for bit as if
    nothing had happened, and no sample is scored twice."""
    whole, asked = uncut
    given = world(tmp_path / "cut", folder)
    kill(monkeypatch, where)
    with pytest.raises(Killed):
        quark.fit(tmp_path / "cut", **given, **ROUNDS)
    monkeypatch.undo()
    monkeypatch.setattr(experience, "open_judge", lambda artifact: counting)
    again = quark.fit(tmp_path / "cut", **given, **ROUNDS)
    assert len(counting.asked) == asked
    jax.tree.map(np.testing.assert_array_equal, again.load(), whole.load())
    assert again.metrics() == whole.metrics()


def kill(monkeypatch, where):
    """Lets the second round of one stage die: sampling after one batch, scoring at its first text, learning after a
    checkpoint."""
    calls = {"n": 0}
    if where == "explore":
        inner = sampling.complete

        def dying(*args, **kw):
            calls["n"] += 1
            for i, batch in enumerate(inner(*args, **kw)):
                if calls["n"] == 2 and i == 1:
                    raise Killed
                yield batch

        monkeypatch.setattr(sampling, "complete", dying)
    elif where == "score":
        inner = evaluation.LMScorer.ids

        def dying(self, *args):
            calls["n"] += 1
            if calls["n"] == 2:
                raise Killed
            return inner(self, *args)

        monkeypatch.setattr(evaluation.LMScorer, "ids", dying)
    else:
        from ctg_jax.run import checkpoint

        inner = checkpoint.save

        def dying(*args, **kw):
            inner(*args, **kw)
            calls["n"] += 1
            if calls["n"] == 4:  # two checkpoints and the control in the first round, one in the second
                raise Killed

        monkeypatch.setattr(checkpoint, "save", dying)


def test_the_kl_coefficient_follows_the_samples(tmp_path):
    """At the target it stays; it moves by a fifth at most either way; an eighth too far is an eighth more."""

    def said(run, *, kl):
        run.log(kl_per_token=kl)

    for kl, wanted in ((0.1, 0.05), (0.9, 0.06), (0.0, 0.04), (0.1125, 0.05625)):
        pool = stage(tmp_path, said, {"kl": kl})
        assert adapted(0.05, pool, 0.1) == pytest.approx(wanted)


def test_the_best_of_n(tmp_path, folder, counting):
    given = world(tmp_path, folder)
    scored = experience.explore(tmp_path, **given, **EXPLORE)
    pool = Pool.open([scored])
    found = stage(tmp_path, experience.best, {"n": 2}, scored=scored).rows("samples.jsonl")
    assert [(r["prompt_id"], r["sample"]) for r in found] == [(i, j) for i in range(3) for j in range(2)]
    for r in found:
        pair = [p for p in pool if p["prompt_id"] == r["prompt_id"] and p["sample"] // 2 == r["sample"]]
        assert r["reward"] == max(p["reward"] for p in pair)
    with pytest.raises(InputError, match="n is 3, expected a divisor of 4"):
        stage(tmp_path, experience.best, {"n": 3}, scored=scored)


def test_bad_rewards_are_said_in_a_sentence(tmp_path, folder, monkeypatch):
    given = world(tmp_path, folder)
    for fn, wanted in (
        (lambda rows: [float("nan")] * len(rows), "reward 'bad' returned nan for text 0"),
        (lambda rows: [1.0], "one score for each text"),
    ):
        reward = TextReward("bad", wanted, fn)
        monkeypatch.setattr(experience, "open_judge", lambda artifact, reward=reward: reward)
        with pytest.raises(InputError, match=wanted):
            experience.explore(tmp_path, **given, **EXPLORE)
    with pytest.raises(InputError, match="no reward was given"):
        experience.explore(tmp_path, **given | {"rewards": []}, **EXPLORE)
    flat = TextReward("flat", "1", lambda rows: [1.0] * len(rows))
    monkeypatch.setattr(experience, "open_judge", lambda artifact: flat)
    with pytest.raises(InputError, match="all 12 rewards are 1: there is nothing to sort"):
        quark.fit(tmp_path / "flat", **world(tmp_path / "flat", folder), **ROUNDS)


def test_the_rounds_of_a_control_are_found_and_measured(uncut):
    control, _ = uncut
    pools = history(control)
    assert [p.spec["config"]["round"] for p in pools] == [0, 1]
    found = stage(control.path.parent, summary, {"resamples": 20}, pools=pools).metrics()
    assert [(r["round"], r["name"]) for r in found][:4] == [
        (0, "reward"), (0, "KL to base"), (0, "perplexity"), (0, "dist-2"),
    ]  # fmt: skip
    figures = {(r["round"], r["name"]): r["value"] for r in found}
    pool = Pool.open(pools[1:])
    assert figures[1, "reward"] == pytest.approx(pool.column("reward").mean())
    tokens = sum(len(t) for t in pool.column("tokens"))
    assert figures[1, "perplexity"] == pytest.approx(np.exp(-pool.column("base").sum() / tokens))
    assert figures[0, "KL to base"] == pytest.approx(0, abs=1e-5)
    assert figures[1, "KL to base"] == pytest.approx((pool.column("logp") - pool.column("base")).sum() / tokens)
