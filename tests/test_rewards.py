"""Rewards: worked numbers, versions that follow the weights, files without pickle, errors of one sentence."""

import json
import math

import numpy as np
import pytest

from ctg_jax import rewards
from ctg_jax.rewards.embed import length_batches
from ctg_jax.rewards.logistic import fit_logistic
from ctg_jax.types import InputError

GOOD, BAD = ["good meal", "a good day", "so good"], ["bad meal", "a bad day", "so bad"]
LABELS = [1, 1, 1, 0, 0, 0]


def toy_embed(texts):
    """Two features by hand: +1 / -1 for good / bad, and the number of words."""
    return np.asarray([[("good" in t) - ("bad" in t), len(t.split())] for t in texts], np.float32)


toy_embed.version = "toy@1"


def one_sentence(error) -> bool:
    text = str(error.value)
    return "\n" not in text and ". " not in text.rstrip(".")


def test_lexicon_numbers():
    lexicon = rewards.Lexicon({"Good": 2.0, "bad": -3.0}, normalise="sum")
    assert lexicon(["", ""], ["Good, good BAD!", "nothing"]).tolist() == [1.0, 0.0]
    mean = rewards.Lexicon({"good": 2.0}, normalise="mean")
    assert mean([""], ["good and nice food"]).tolist() == [0.5]
    compound = rewards.Lexicon({"good": 2.0})
    np.testing.assert_allclose(compound([""], ["good"]), [2 / math.sqrt(4 + 15)], rtol=1e-6)
    any_of = rewards.Lexicon({"fool": 1.0}, normalise="any")
    assert any_of(["", ""], ["you fool", "foolish"]).tolist() == [0.0 + 1.0, 0.0]


def test_diversity_numbers():
    """a b c a b c has the 3-grams abc, bca, cab, abc: three of four are distinct."""
    reward = rewards.diversity()
    assert reward([""] * 3, ["a b c a b c", "too short", "a b c d"]).tolist() == [0.75, 0.0, 1.0]
    assert rewards.diversity(2)([""], ["a a a"]).tolist() == [0.5] and rewards.diversity(2).version != reward.version
    with pytest.raises(InputError, match="order is 0"):
        rewards.diversity(0)


def test_lexicon_reads_prompt_only_when_asked():
    both = rewards.Lexicon({"good": 1.0}, normalise="sum", reads="both")
    text = rewards.Lexicon({"good": 1.0}, normalise="sum")
    assert both(["good "], ["good"])[0] == 2.0 and text(["good "], ["good"])[0] == 1.0
    assert both.version != text.version


def test_word_list_readers(tmp_path):
    (tmp_path / "vader.txt").write_text("great\t3.1\t0.5\t[3, 3]\nawful\t-2.0\t0.9\t[-2, -2]\n")
    assert rewards.read_weights(tmp_path / "vader.txt") == {"great": 3.1, "awful": -2.0}
    (tmp_path / "words.txt").write_text("; a comment\n\nNice\nfine\n")
    assert rewards.read_words(tmp_path / "words.txt", weight=-1) == {"nice": -1, "fine": -1}
    (tmp_path / "broken.txt").write_text("great\t3.1\nawful two\n")
    with pytest.raises(InputError, match=r"line 2: 'awful two'") as error:
        rewards.read_weights(tmp_path / "broken.txt")
    assert one_sentence(error)
    with pytest.raises(InputError, match=r"missing\.txt"):
        rewards.read_words(tmp_path / "missing.txt")


def test_lexicon_neutral_text_is_not_positive():
    lexicon = rewards.Lexicon({"good": 1.0, "bad": -1.0})
    assert (lexicon([""] * 3, ["good", "table", "bad"]) >= lexicon.threshold).tolist() == [True, False, False]


def test_reviews_oracle():
    reviews = pytest.importorskip("ctg_jax.data.reviews")
    records = [reviews.generate(i) for i in range(20)]
    reward = rewards.reviews_oracle()
    scores = reward([""] * 20, [r["text"] for r in records])
    assert ((scores >= reward.threshold).astype(int) == [r["label"] for r in records]).all()
    assert reward([""], ["xyzzy"])[0] == 0.5 < reward.threshold


@pytest.mark.parametrize("intercept", [True, False])
def test_a_logistic_regression_is_at_its_optimum(intercept):
    """The gradient of the penalised loss is 0 there, and features that are rounded otherwise give the same weights.
    Few texts, which the weights nearly separate."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(24, 16)).astype(np.float32)
    y = (x @ draw.normal(size=16) > 0).astype(int)
    coef, b, classes = fit_logistic(x, y, 10.0, 0, intercept)
    z = x.astype(np.float64) @ coef[0] + b[0]
    error = 1 / (1 + np.exp(-z)) - y
    assert np.abs(error @ x + coef[0] / 10.0).max() < 1e-4 and classes == [0, 1]
    assert abs(error.sum()) < 1e-4 if intercept else b[0] == 0
    again, _, _ = fit_logistic(x * np.float32(1 + 2**-20), y, 10.0, 0, intercept)
    np.testing.assert_allclose(again, coef, rtol=0, atol=1e-5)


def test_probe_fits_saves_and_loads(tmp_path):
    probe = rewards.LinearProbe.fit(toy_embed, GOOD + BAD, LABELS)
    scores = probe([""] * 2, ["good soup", "bad soup"])
    assert scores.dtype == np.float32 and scores[0] > 0.6 > 0.4 > scores[1]
    np.testing.assert_allclose(probe.of_class(0)([""] * 2, ["good soup", "bad soup"]), 1 - scores, rtol=1e-5)
    probe.save(tmp_path / "p")
    again = rewards.LinearProbe.load(tmp_path / "p", toy_embed)
    assert again.version == probe.version
    assert (again([""] * 2, ["good soup", "bad soup"]) == scores).all()
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["probe.json", "probe.npz"]


def test_probe_worked_probability():
    probe = rewards.LinearProbe(toy_embed, [[2.0, 0.0]], [0.5], [0, 1])
    np.testing.assert_allclose(probe([""], ["good"]), [1 / (1 + math.exp(-2.5))], rtol=1e-6)
    three = rewards.LinearProbe(toy_embed, [[1.0, 0], [0, 0], [-1.0, 0]], [0, 0, 0], [5, 6, 7], target=7)
    expected = math.exp(-1) / (math.exp(1) + 1 + math.exp(-1))
    np.testing.assert_allclose(three([""], ["good"]), [expected], rtol=1e-6)


def test_probe_version_follows_weights_embedder_and_data():
    probe = rewards.LinearProbe(toy_embed, [[2.0, 0.0]], [0.5], [0, 1])
    moved = rewards.LinearProbe(toy_embed, [[2.0, 1e-3]], [0.5], [0, 1])

    def other(texts):
        return toy_embed(texts)

    elsewhere = rewards.LinearProbe(other, [[2.0, 0.0]], [0.5], [0, 1])
    assert len({probe.version, moved.version, elsewhere.version, probe.of_class(0).version}) == 4
    a = rewards.LinearProbe.fit(toy_embed, GOOD + BAD, LABELS)
    b = rewards.LinearProbe.fit(toy_embed, BAD + GOOD, LABELS[::-1])
    assert a.version == rewards.LinearProbe.fit(toy_embed, GOOD + BAD, LABELS).version != b.version


def test_probe_errors(tmp_path):
    probe = rewards.LinearProbe.fit(toy_embed, GOOD + BAD, LABELS)
    probe.save(tmp_path)
    with pytest.raises(InputError, match="fitted on 'toy@1'"):
        rewards.LinearProbe.load(tmp_path, lambda t: toy_embed(t))
    blob = (tmp_path / "probe.npz").read_bytes()
    (tmp_path / "probe.npz").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(InputError, match=r"cannot read .*probe\.npz"):
        rewards.LinearProbe.load(tmp_path, toy_embed)
    with open(tmp_path / "probe.npz", "wb") as f:
        np.savez(f, coef=probe.coef + 1, intercept=probe.intercept)
    with pytest.raises(InputError, match="do not belong together"):
        rewards.LinearProbe.load(tmp_path, toy_embed)
    with open(tmp_path / "probe.npz", "wb") as f:  # an object array would need pickle
        np.savez(f, coef=np.asarray([{}], object), intercept=probe.intercept)
    with pytest.raises(InputError, match=r"probe\.npz"):
        rewards.LinearProbe.load(tmp_path, toy_embed)
    (tmp_path / "probe.json").write_text("{")
    with pytest.raises(InputError, match=r"probe\.json"):
        rewards.LinearProbe.load(tmp_path, toy_embed)
    with pytest.raises(InputError, match="at least two"):
        rewards.LinearProbe.fit(toy_embed, GOOD, [1, 1, 1])
    with pytest.raises(InputError, match=r"shape \[2\] for 3 texts"):
        rewards.LinearProbe.fit(toy_embed, GOOD, [1, 0])
    with pytest.raises(InputError, match=r"knows the labels \[0, 1\]") as error:
        probe.of_class(3)
    assert one_sentence(error)


def test_bag_of_words_round_trip(tmp_path):
    bag = rewards.BagOfWords.fit(GOOD + BAD, LABELS, min_count=1)
    texts = ["a good soup", "a bad soup", "unseen words only", ""]
    scores = bag([""] * 4, texts)
    assert scores[0] > 0.6 and scores[1] < 0.4
    np.testing.assert_allclose(scores[2:], 0.5, atol=0.02)  # nothing known: the prior, which is balanced
    np.testing.assert_allclose(bag.of_class(0)([""] * 4, texts), 1 - scores, rtol=1e-5)
    bag.save(tmp_path)
    again = rewards.BagOfWords.load(tmp_path)
    assert again.version == bag.version and (again([""] * 4, texts) == scores).all()
    meta = json.loads((tmp_path / "probe.json").read_text())
    assert "good meal" in meta["terms"]
    with pytest.raises(InputError, match="kind 'bag-of-words'"):
        rewards.LinearProbe.load(tmp_path, toy_embed)
    with pytest.raises(InputError, match="no features"):
        rewards.BagOfWords.fit(["", "!"], [0, 1])


def test_bag_of_words_learns_word_order():
    texts = ["not good at all", "good at all", "not bad at all", "bad at all"] * 5
    bag = rewards.BagOfWords.fit(texts, [0, 1, 1, 0] * 5, ngrams=2, inverse_l2=1000.0)
    assert ((bag([""] * 4, texts[:4]) > 0.5) == [False, True, True, False]).all()


@pytest.mark.parametrize("bad, word", [([0.5], "shape"), ([0.5, np.nan], "finite"), ([[0.1], [0.2]], "shape")])
def test_reward_output_is_checked(bad, word):
    reward = rewards.TextReward("mine", "1", lambda texts: bad)
    with pytest.raises(InputError, match=word) as error:
        reward(["", ""], ["a", "b"])
    assert one_sentence(error) and "'mine'" in str(error.value)


def test_reward_input_is_checked():
    reward = rewards.TextReward("mine", "1", lambda texts: [0.0] * len(texts))
    for prompts, texts, word in (([""], ["a", "b"], "1 prompts and 2 texts"), ("p", "t", "list"), ([""], [3], "int")):
        with pytest.raises(InputError, match=word):
            reward(prompts, texts)
    assert reward([], []).shape == (0,)
    with pytest.raises(InputError, match="reads"):
        rewards.TextReward("mine", "1", len, reads="prompt")


class ToyEncoder:
    """Counts tokens: embed gives (number of real tokens, sum of ids), classify the logits (0, first id)."""

    context, pad, embed_width, labels, problem = 40, 0, 2, ("no", "yes"), "single_label_classification"

    def __init__(self):
        self.shapes = set()

    def embed(self, params, tokens, mask):
        self.shapes.add(tokens.shape)
        return np.stack([mask.sum(1), (tokens * mask).sum(1)], axis=1) * params["w"]

    def classify(self, params, tokens, mask):
        return np.stack([0 * tokens[:, 0], tokens[:, 0]], axis=1)


def toy_ids(texts):
    return [[int(w) for w in t.split()] for t in texts]


def test_embedder_keeps_order_in_few_shapes():
    encoder = ToyEncoder()
    embed = rewards.Embedder(encoder, {"w": np.float32(1)}, toy_ids, batch=4)
    lengths = [3, 30, 1, 17, 5, 39, 2, 60]
    texts = [" ".join(["2"] * n) for n in lengths]
    want = [[min(n, 40), 2 * min(n, 40)] for n in lengths]
    assert embed(texts).tolist() == want
    assert encoder.shapes == {(4, 8), (4, 40)}
    assert embed([]).shape == (0, 2)
    assert embed.version != rewards.Embedder(encoder, {"w": np.float32(2)}, toy_ids).version


def test_length_batches_never_give_an_empty_row():
    batches = list(length_batches([[], [5, 6]], batch=4, pad=9, longest=64))
    ((indices, tokens, mask),) = batches
    assert indices.tolist() == [0, 1] and tokens.shape == (4, 8)
    assert mask.any(axis=1).all() and mask.sum(1).tolist() == [1, 2, 1, 1]


def test_classifier_reward():
    embed = rewards.Embedder(ToyEncoder(), {"w": np.float32(1)}, toy_ids, batch=2)
    reward = rewards.SequenceClassifier(embed, target="yes")
    np.testing.assert_allclose(reward(["", ""], ["2 1", "-1"]), [1 / (1 + math.exp(-2)), 1 / (1 + math.e)], rtol=1e-6)
    no = rewards.SequenceClassifier(embed, target=0)
    np.testing.assert_allclose(no([""], ["2 1"]) + reward([""], ["2 1"]), 1.0, rtol=1e-6)
    several = rewards.SequenceClassifier(embed, target=0, problem="multi_label_classification")
    assert several([""], ["2"])[0] == 0.5 and several.version != no.version
    for target in (2, "maybe"):
        with pytest.raises(InputError, match="target"):
            rewards.SequenceClassifier(embed, target=target)
    embed.encoder.labels = ()
    with pytest.raises(InputError, match="classification head"):
        rewards.SequenceClassifier(embed)


def test_sentence_encoder_probe_on_real_text(data_dir):
    embed = rewards.sentence_embedder(data_dir / "models" / "all-MiniLM-L6-v2", length=64)
    rows = [json.loads(line) for line in (data_dir / "yelp" / "dev.jsonl").read_text().splitlines()]
    rows = rows[:200] + rows[-200:]
    texts, labels = [r["text"] for r in rows], np.asarray([r["label"] for r in rows])
    train = np.arange(len(rows)) % 2 == 0
    probe = rewards.LinearProbe.fit(embed, [t for t, k in zip(texts, train) if k], labels[train])
    held = [t for t, k in zip(texts, train) if not k]
    right = ((probe([""] * len(held), held) >= 0.5) == labels[~train]).mean()
    assert right > 0.8
