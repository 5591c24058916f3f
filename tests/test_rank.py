"""RankGen's scorer: the loss by hand, its optimum in a world of nine pairs, chance, files, pairs of records."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctg_jax import rewards
from ctg_jax.rewards import rank
from ctg_jax.rewards.rank import RankScorer, info_nce
from ctg_jax.types import InputError


def letters(texts):
    """One-hot by the first letter, of six."""
    return np.eye(6, dtype=np.float32)[["abcxyz".index(t.strip()[0]) for t in texts]]


letters.version = "letters@1"
JOINT = np.array([[6, 1, 1], [1, 4, 1], [1, 1, 4]])  # counts of a x, a y, a z, b x, …


def test_the_loss_by_hand():
    assert info_nce(jnp.eye(2)).tolist() == pytest.approx([np.log(1 + np.exp(-1))] * 2)
    assert float(info_nce(jnp.eye(2))[0]) == pytest.approx(0.3133, abs=1e-4)
    more = info_nce(jnp.eye(2), jnp.ones((2, 1)))
    assert more.tolist() == pytest.approx([np.log(2 * np.e + 1) - 1] * 2)
    assert info_nce(jnp.zeros((5, 5))).tolist() == pytest.approx([np.log(5)] * 5)


def test_the_optimum_is_mutual_information_up_to_a_number_for_each_prompt():
    """One batch holds every pair as often as it occurs, so its loss is that of the population."""
    rows = [(x, y) for x in range(3) for y in range(3) for _ in range(JOINT[x, y])]
    x, y = np.eye(6)[[i for i, _ in rows]], np.eye(6)[[3 + j for _, j in rows]]
    params, tx = rank.started(np.random.default_rng(0), 8, 6), optax.adam(optax.linear_schedule(0.05, 0.0, 1500))
    state = tx.init(params)
    step = jax.jit(
        lambda p, s: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(jax.grad(rank.loss)(p, x, y), s))
    )
    for _ in range(1500):
        params, state = step(params, state)
    scorer = RankScorer(letters, params["left"], params["right"], params["sharpness"])
    s = np.array([[scorer([a], [b])[0] for b in "xyz"] for a in "abc"])
    p = JOINT / JOINT.sum()
    mutual = np.log(p / p.sum(1, keepdims=True) / p.sum(0, keepdims=True))
    gap = s - mutual
    np.testing.assert_allclose(gap - gap.mean(1, keepdims=True), 0, atol=1e-3)
    assert np.argmax(s[1] - s[0]) == 1  # y after b is told apart from y after a


def test_a_fit_tells_true_continuations_from_others_and_chance_does_not(tmp_path):
    mates = {"a": "x", "b": "y", "c": "z"}
    order = [list("abc"), list("cab"), list("bca")]
    records = [{"text": f"{a} {mates[a]}", "prompt": a, "document": d} for d, row in enumerate(order) for a in row]
    settings = {"name": "fits", "embedder": lambda: letters}
    scorer = rewards.get("rank").fit(records, settings, "here")
    assert rank.accuracy(scorer, records, "here") == 1
    shuffled = RankScorer(letters, np.zeros((2, 6)), np.zeros((2, 6)))
    assert rank.accuracy(shuffled, records, "here") == 0  # ties are no hits
    scorer.save(tmp_path)
    again = rewards.get("rank").load(tmp_path, settings)
    assert again.version == scorer.version and again.name == "fits"
    np.testing.assert_array_equal(again(["a", "b"], ["x", "x"]), scorer(["a", "b"], ["x", "x"]))
    assert scorer([], []).shape == (0,)


def test_what_was_generated_is_a_negative():
    fitted = RankScorer.fit(letters, ["a"] * 4, ["x"] * 4, range(4), generated=["y"] * 4, steps=100, rate=0.05)
    assert fitted(["a"], ["x"])[0] > fitted(["a"], ["y"])[0] + 2


def test_what_was_generated_belongs_to_the_prompt_of_its_record(monkeypatch):
    """A record without a pair has a generated text, and the pair of another record has none: it is not given that."""
    monkeypatch.setattr(RankScorer, "fit", lambda embedder, *pairs, **more: more)
    whole = {"text": "a x", "prompt": "a", "generated": " y"}
    settings = {"embedder": lambda: letters, "name": "rank"}
    assert rank.fit([whole, whole], settings, "data")["generated"] == [" y", " y"]
    bare = {"text": "b", "prompt": "b", "generated": " z"}
    assert "generated" not in rank.fit([bare, {"text": "a x", "prompt": "a"}], settings, "data")


def test_pairs_of_records():
    pieces = [{"text": t, "document": d} for t, d in (("a", 1), ("b", 1), ("c", 1), ("x", 2), ("y", 2))]
    assert rank.pairs(pieces, "here") == (["a", "b", "x"], ["b", "c", "y"], [1, 1, 2])
    cut = [{"text": "a b", "reference": "a b c"}, {"text": "a b", "prompt": "a"}]
    assert rank.pairs(cut, "here") == (["a b", "a"], [" c", " b"], [None, None])


def test_bad_input_raises_one_sentence():
    with pytest.raises(InputError, match="here has no pair of a prompt and its continuation: give records with"):
        rank.pairs([{"text": "a"}, {"text": "b"}], "here")
    with pytest.raises(InputError, match="no document has two pairs"):
        RankScorer.fit(letters, ["a", "b"], ["x", "y"], [1, 2])
    with pytest.raises(InputError, match="here has no document with two pairs"):
        rank.accuracy(RankScorer(letters, np.eye(6), np.eye(6)), [{"text": "a b", "prompt": "a"}], "here")
