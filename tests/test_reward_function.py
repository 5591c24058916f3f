"""Rewards that call out, and reward models from comparisons."""

import threading
import time

import numpy as np
import pytest

from ctg_jax.rewards import FunctionReward, PreferenceModel, named
from ctg_jax.run.stage import stage, write_jsonl
from ctg_jax.stages import judges
from ctg_jax.types import InputError


def length(prompt, text):
    return len(text) / 10


class Embedder:
    """Counts of letters a and b."""

    version = "letters@1"

    def __call__(self, texts):
        return np.array([[t.count("a"), t.count("b")] for t in texts], np.float32)


def test_calls_run_side_by_side_and_answers_are_kept(tmp_path):
    asked, gate = [], threading.Barrier(4, timeout=10)

    def slow(prompt, text):
        gate.wait()  # passes when four calls are under way at once
        asked.append(text)
        return len(text)

    options = dict(name="length", version="1", code="a1", workers=4, cache=tmp_path / "scores.sqlite")
    texts = ["a", "bb", "a", "ccc", "dddd"]
    assert FunctionReward(slow, **options)([""] * 5, texts).tolist() == [1, 2, 1, 3, 4]
    assert sorted(asked) == ["a", "bb", "ccc", "dddd"]  # equal texts once
    assert FunctionReward(None, **options)([""] * 2, texts[:2]).tolist() == [1, 2]  # another process asks nobody
    with pytest.raises(InputError, match="failed 1 times, last with TypeError"):
        FunctionReward(None, **options | {"version": "2", "retries": 0})([""], ["a"])


def test_a_call_is_tried_again_and_failure_loses_nothing(tmp_path):
    tries = {}

    def flaky(prompt, text):
        tries[text] = tries.get(text, 0) + 1
        if text == "down" or (text == "later" and tries[text] < 3):
            raise ConnectionError("no answer")
        return 1.0

    options = dict(
        name="service", version="1", code="a1", workers=1, retries=2, wait=0.001, cache=tmp_path / "scores.sqlite"
    )
    with pytest.raises(InputError, match="'service' failed 3 times, last with ConnectionError: no answer; what was sc"):
        FunctionReward(flaky, **options)([""] * 3, ["fine", "later", "down"])
    assert tries == {"fine": 1, "later": 3, "down": 3}
    assert FunctionReward(None, **options)([""] * 2, ["fine", "later"]).tolist() == [1, 1]


def test_waiting_doubles():
    reward = FunctionReward(lambda p, t: 1 / 0, name="x", version="1", retries=3, wait=0.01)
    start = time.monotonic()
    with pytest.raises(InputError, match="failed 4 times, last with ZeroDivisionError"):
        reward([""], ["a"])
    assert time.monotonic() - start >= 0.07


def test_a_judge_of_ones_own(tmp_path):
    settings = dict(kind="function", name="length", function=f"{__name__}:length", version="1")
    judge = judges.open_judge(stage(tmp_path, judges.fit_judge, settings))
    assert judge([""], ["abcde"]).tolist() == [0.5]
    assert judge.version == f"1@{judge.code}" and (tmp_path / ".scores" / f"{judge.code}.sqlite").exists()
    for path, wanted in (
        ("length", "no colon"),
        ("nowhere_at_all:f", "No module named"),
        (f"{__name__}:missing", "no attribute"),
        (f"{__name__}:__name__", "cannot be called"),
    ):
        with pytest.raises(InputError, match=wanted):
            named(path)
    with pytest.raises(InputError, match="returned nan for 'a'; expected a finite number"):
        FunctionReward(lambda p, t: float("nan"), name="x", version="1")([""], ["a"])
    with pytest.raises(InputError, match="version of the reward 'x' is empty"):
        FunctionReward(length, name="x", version="")


def test_a_preference_model_learns_what_was_chosen(tmp_path):
    draw = np.random.default_rng(0)
    words = ["a" * int(n) + "b" * int(m) for n, m in draw.integers(0, 5, (200, 2))]
    left, right = words[:100], words[100:]

    def utility(t):
        return 2.0 * t.count("a") - 1.0 * t.count("b")

    wins = draw.random(100) < 1 / (1 + np.exp(-np.array([utility(x) - utility(y) for x, y in zip(left, right)])))
    chosen = [x if w else y for x, y, w in zip(left, right, wins)]
    rejected = [y if w else x for x, y, w in zip(left, right, wins)]
    model = PreferenceModel.fit(Embedder(), [""] * 100, chosen, rejected, inverse_l2=100.0)
    np.testing.assert_allclose(model.weights, [2, -1], atol=0.8)  # the utility that drew them
    assert model([""] * 2, ["aa", "b"]).tolist() == pytest.approx([2 * model.weights[0], model.weights[1]])
    assert model.accuracy([""] * 100, chosen, rejected) > 0.8
    model.save(tmp_path)
    again = PreferenceModel.load(tmp_path, Embedder())
    assert again.version == model.version
    other = Embedder()
    other.version = "letters@2"
    with pytest.raises(InputError, match="with this encoder"):
        PreferenceModel.load(tmp_path, other)


def test_explanations_are_strings_and_failures_are_told_in_a_sentence():
    def scored(prompt, text):
        return 0.0

    scored.explain = lambda prompt, text: {"a": "too short", "b": 3}[text]
    reward = FunctionReward(scored, name="size", version="1")
    assert reward.explain([""], ["a"]) == ["too short"]
    with pytest.raises(InputError, match="explain of the reward 'size' returned 3 for text 1; expected a string"):
        reward.explain([""] * 2, ["a", "b"])
    with pytest.raises(InputError, match="explain of the reward 'size' failed for text 1 with KeyError: 'c'"):
        reward.explain([""] * 2, ["a", "c"])
    assert not hasattr(FunctionReward(length, name="size", version="1"), "explain")


def test_a_judge_needs_its_records(tmp_path):
    def records(run, *, rows):
        write_jsonl(run.path / "data.jsonl", rows)

    data = stage(tmp_path, records, {"rows": [{"text": "a"}]})
    with pytest.raises(InputError, match="none of the 1 texts has a label"):
        stage(tmp_path, judges.fit_judge, {"kind": "bag"}, data=data)
    with pytest.raises(InputError, match="records without a text under rejected"):
        stage(tmp_path, judges.fit_judge, {"kind": "preference", "encoder": "x"}, data=data)
