"""Judges, figures and smoothness as stages: what is written, what is refused, and numbers worked out by hand."""

import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.learn import experience
from ctg_jax.run.stage import open_lm, stage, write_jsonl
from ctg_jax.stages import judges, sampling, sources
from ctg_jax.types import InputError
from tests.experiments.tiny_lm import write_lm

RECORDS = [
    {"text": "the food", "label": 0, "source": "the food was good", "keywords": ["food"]},
    {"text": "the room was", "label": 1},
]


ORACLE = "exact on texts of its own corpus and a count of cue words on any other"


def texts(run, *, rows):
    write_jsonl(run.path / "data.jsonl", rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def lm(root, tmp_path_factory):
    return stage(root, sources.load_lm, {"source": str(write_lm(tmp_path_factory.mktemp("lm")))})


@pytest.fixture(scope="module")
def samples(root, lm):
    prompts = stage(root, texts, {"rows": RECORDS})
    return stage(root, sampling.sample, dict(n=3, max_new=5, batch=6), lm=lm, prompts=prompts)


@pytest.mark.parametrize("kind", ["bag", "oracle"])
def test_a_judge_is_fitted_once_and_read_back(root, kind):
    rows = [{"text": f"the {w} was {a}", "label": l} for w in ("soup", "room", "pasta")
            for a, l in (("delicious", 1), ("wonderful", 1), ("bland", 0), ("terrible", 0))]  # fmt: skip
    data = stage(root, texts, {"rows": rows})
    judge = stage(root, judges.fit_judge, {"kind": kind}, data=data if kind == "bag" else None, heldout=data)
    (row,) = judge.metrics()
    said = {"bag": "v, accuracy 1.000, AUC 1.000 on 12 held-out texts", "oracle": f"v, {ORACLE}"}
    assert judges._with_accuracy("v", judge) == said[kind]
    assert row["version"] == judges.open_judge(judge).version
    # On its own corpus an oracle is right by construction, which is no accuracy.
    figures = {"bag": (1.0, 12, None), "oracle": (None, 0, 12)}[kind]
    assert tuple(row.get(name) for name in ("accuracy", "heldout", "own")) == figures
    scores = judges.open_judge(judge)(["", ""], ["the soup was delicious", "the soup was bland"])
    assert scores[0] > 0.5 > scores[1]


def test_an_oracle_is_not_called_exact_on_texts_that_are_not_its_own(root, lm):
    """Its accuracy on its own corpus says nothing of other texts; there it is measured, and texts in its words are
    counted."""
    foreign = [{"text": "a marvellous sonata", "label": 1}, {"text": "dull prose throughout", "label": 0}]
    own = [{"text": f"the soup was {word}", "label": 1} for word in ("delicious", "wonderful")]
    data = stage(root, texts, {"rows": [*foreign, {"text": "quite bland verse", "label": 1}, *own]})
    judge = stage(root, judges.fit_judge, {"kind": "oracle"}, heldout=data)
    # A text without cues does not count as positive: of the three foreign texts the second alone is judged right. The
    # two of the oracle's own corpus do not raise that to 3 of 5.
    (row,) = judge.metrics()
    assert (row["own"], row["heldout"]) == (2, 3) and row["accuracy"] == pytest.approx(1 / 3)
    # "dull" and "bland" are cues and score alike, below a text without one: of the two pairs, one counts a half.
    assert judges._with_accuracy("v", judge) == f"v, {ORACLE}, accuracy 0.333, AUC 0.750 on 3 held-out texts of others"
    rows = [{"text": t, "prompt": "we", "prompt_id": i} for i, t in enumerate(["the soup was bland", "a sonata", ""])]
    result = stage(
        root, judges.evaluate, {"resamples": 10}, samples=stage(root, written, {"rows": rows}), judges=[judge]
    )
    assert result.spec["own"] == {"positive": 1} and result.spec["judged"] == 3


def test_a_judge_is_measured_on_more_sets(root):
    """Of four texts, by hand: the scores are 1 for delicious, 0 for bland, 0.5 without a cue, which is not positive."""
    rows = [("a delicious sonata", 1), ("a sonata", 1), ("a bland sonata", 0), ("a tune", 0)]
    data = stage(root, texts, {"rows": [{"text": text, "label": label} for text, label in rows]})
    judge = stage(root, judges.fit_judge, {"kind": "oracle"})
    (row,) = stage(root, judges.heldout, {"name": "music"}, judge=judge, data=data).metrics()
    assert row == {"name": "music", "own": 0, "heldout": 4, "accuracy": 0.75, "auc": 3.5 / 4}
    assert judges.how_right(row) == "accuracy 0.750, AUC 0.875 on 4"


def written(run, *, rows):
    write_jsonl(run.path / "samples.jsonl", rows)


def test_an_oracle_of_the_other_label(root):
    """`target` is honoured: a neutral text is neither positive nor negative."""
    data = stage(root, texts, {"rows": [{"text": "the soup was bland", "label": 0}, {"text": "a desk", "label": 1}]})
    judge = stage(root, judges.fit_judge, {"kind": "oracle", "name": "negative", "target": 0}, heldout=data)
    negative = judges.open_judge(judge)
    scores = negative([""] * 3, ["the soup was delicious", "the soup was bland", "a desk"])
    assert negative.name == "negative" and scores[0] < 0.5 < scores[1] and scores[2] == 0.5 < negative.threshold
    assert judge.metrics()[0] == {
        "name": "negative",
        "version": negative.version,
        "own": 1,
        "heldout": 1,
        "accuracy": 1.0,
    }
    assert "sentiment=0" in negative.version
    with pytest.raises(InputError, match="target is 3"):
        stage(root, judges.fit_judge, {"kind": "oracle", "target": 3})


def test_unknown_judge(tmp_path):
    kinds = "bag, classifier, diversity, function, instructions, keywords, length, lexicon, oracle, preference, probe, "
    kinds += "rank, slots"
    with pytest.raises(InputError, match=f"one of {kinds}"):
        stage(tmp_path, judges.fit_judge, {"kind": "orakle"})
    with pytest.raises(InputError, match="no data were given"):
        stage(tmp_path, judges.fit_judge, {"kind": "bag"})
    assert not list(tmp_path.glob("fit_judge-*"))


def test_figures_have_intervals_and_name_their_scorers(root, lm, samples):
    judge = stage(root, judges.fit_judge, {"kind": "oracle"})
    result = stage(root, judges.evaluate, {"resamples": 50, "lm_name": "tiny"}, samples=samples, judges=[judge], lm=lm)
    figures = {row["name"]: row for row in result.metrics()}
    assert {"positive/share", "perplexity", "dist-2", "length", "tokens"} <= figures.keys()
    assert all(f["low"] <= f["value"] <= f["high"] for f in figures.values() if f["low"] is not None)
    spec = result.spec
    assert spec["judges"]["positive"].startswith("reviews-oracle[sentiment=1]:text@")
    assert spec["perplexity"].startswith("tiny@") and ": mean of per-sample perplexities" in spec["perplexity"]
    assert spec["relevance"].startswith("nats per token") and "relevance" in figures and "kl" not in figures
    tokens = [len(r["tokens"]) for r in samples.rows("samples.jsonl")]
    np.testing.assert_allclose(figures["tokens"]["value"], np.mean(tokens))


class Letters:
    """An encoder that counts a few letters."""

    version = "letters@1"

    def __call__(self, texts):
        return np.asarray([[1.0 + t.count(c) for c in "aeot "] for t in texts], np.float32)


def test_an_encoder_gives_relevance_similarity_and_mauve(root, samples, monkeypatch):
    from ctg_jax import evaluation, rewards

    monkeypatch.setattr(rewards, "open_embedder", lambda session, path: Letters())
    seen = {}
    fixed = evaluation.Figure(0.5, 0.4, 0.6, 2)
    monkeypatch.setattr(
        "ctg_jax.evaluation.figures.mauve", lambda a, b, ids, **kw: seen.update(a=a, b=b, ids=ids) or fixed
    )
    human = stage(root, texts, {"rows": [{"text": "a tea"}, {"text": "to eat"}]})
    result = stage(root, judges.evaluate, {"embed": "letters", "resamples": 20}, samples=samples, references=human)
    figures = {row["name"]: row["value"] for row in result.metrics()}
    rows = samples.rows("samples.jsonl")
    encode = Letters()
    close = evaluation.cosine(encode([r["text"] for r in rows]), encode([r["prompt"] for r in rows]))
    np.testing.assert_allclose(figures["relevance"], close.mean(), rtol=1e-6)
    sourced = evaluation.cosine(encode([r["text"] for r in rows[:3]]), encode(["the food was good"] * 3))
    np.testing.assert_allclose(figures["similarity"], sourced.mean(), rtol=1e-6)
    assert figures["coverage"] == np.mean(["food" in r["text"].split() for r in rows[:3]])
    assert figures["mauve"] == 0.5 and seen["ids"] == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(seen["b"], encode(["a tea", "to eat"]))
    assert result.spec["encoder"] == "letters@1" and result.spec["relevance"].endswith("letters@1")
    with pytest.raises(InputError, match="set embed to a sentence encoder"):
        stage(root, judges.evaluate, {}, samples=samples, references=human)


def test_kl_is_estimated_from_the_log_probabilities_of_the_samples(root, lm, samples):
    plain = stage(root, judges.evaluate, {"kl": True, "resamples": 20}, samples=samples, lm=lm)
    (figure,) = [row for row in plain.metrics() if row["name"] == "kl"]
    assert abs(figure["value"]) < 1e-4  # drawn from the LM as it is
    prompts = stage(root, texts, {"rows": RECORDS})
    narrow = stage(
        root, sampling.sample, dict(n=3, max_new=5, batch=6, filter={"top_k": 2}), lm=lm, prompts=prompts
    )  # fmt: skip
    cut = stage(root, judges.evaluate, {"kl": True, "resamples": 20}, samples=narrow, lm=lm)
    (figure,) = [row for row in cut.metrics() if row["name"] == "kl"]
    model, params, tokenizer = open_lm(lm)
    total, count = 0.0, 0
    for row in narrow.rows("samples.jsonl"):
        head = tokenizer.encode([row["prompt"]])[0]
        ids = jnp.asarray([head + row["tokens"]])
        z = np.asarray(model.apply(params, model.embed(params, ids), jnp.ones(ids.shape, bool)).logits[0], np.float64)
        for i, token in enumerate(row["tokens"]):
            at = z[len(head) - 1 + i]
            total += np.logaddexp.reduce(at) - np.logaddexp.reduce(
                np.sort(at)[-2:]
            )  # log p - log p_lm of any kept token
            assert token in np.argsort(at)[-2:]
            count += 1
    np.testing.assert_allclose(figure["value"], total / count, rtol=1e-4)
    scores = cut.rows("scores.jsonl")
    assert [(s["prompt_id"], s["sample"]) for s in scores] == [(i, j) for i in range(2) for j in range(3)]
    np.testing.assert_allclose(sum(s["kl"] for s in scores), total, rtol=1e-4)


def test_kl_that_cannot_be_known_is_refused(root, lm, samples, tmp_path):
    other = stage(root, sources.load_lm, {"source": str(write_lm(tmp_path / "lm", seed=3))})
    for given in (None, other):
        with pytest.raises(InputError, match="kl needs the language model that wrote"):
            stage(root, judges.evaluate, {"kl": True}, samples=samples, lm=given)
    prompts = stage(root, texts, {"rows": RECORDS})
    greedy = stage(root, sampling.sample, dict(n=1, max_new=2, greedy=True), lm=lm, prompts=prompts)
    with pytest.raises(InputError, match="is greedy"):
        stage(root, judges.evaluate, {"kl": True}, samples=greedy, lm=lm)


def drawn(run, *, lm):
    """What `sample` leaves where a strategy without a likelihood drew the samples."""
    row = {"prompt_id": 0, "sample": 0, "prompt": "the", "text": " food", "tokens": [1], "logp": 0.0}
    write_jsonl(run.path / "samples.jsonl", [row])
    run.record(likelihood=False)


def test_samples_without_a_likelihood_have_no_kl_and_teach_nothing(root, lm):
    samples = stage(root, drawn, {}, lm=lm)
    with pytest.raises(InputError, match="kl needs the likelihood of every sample"):
        stage(root, judges.evaluate, {"kl": True}, samples=samples, lm=lm)
    judge = stage(root, judges.fit_judge, {"kind": "oracle"})
    with pytest.raises(InputError, match="gives no text a likelihood"):
        stage(root, experience.score, {}, samples=samples, rewards=[judge], lm=lm)


def scored(run, *, scores, relevance=None, judge: str = "positive@1"):
    """What `evaluate` leaves: scores[prompt][sample]."""
    rows = [
        {"prompt_id": p, "sample": j, "scores": {"positive": x}, "relevance": relevance}
        for p, samples in enumerate(scores) for j, x in enumerate(samples)
    ]  # fmt: skip
    write_jsonl(run.path / "scores.jsonl", rows)
    run.record(judges={"positive": judge}, encoder=None, relevance="made up" if relevance else None)


def test_smoothness_over_the_strengths_of_a_method(root):
    # Means of the two prompts: -1: 0, 0.2; 0: 0.5, 0.3; 1: 1, 0.4. Of both: 0.1, 0.4, 0.7, a line.
    values = {-1.0: [[0, 0], [0.1, 0.3]], 0.0: [[0.5, 0.5], [0.3, 0.3]], 1.0: [[1, 1], [0.4, 0.4]]}
    figures = [stage(root, scored, {"scores": v, "relevance": 0.5 + s / 4}) for s, v in values.items()]
    result = stage(root, judges.smooth, {"strengths": list(values), "resamples": 50}, figures=figures)
    found = {row["name"]: row for row in result.metrics()}
    want = {
        "positive/range": (1.0 + 0.2) / 2,
        "positive/calibration": 0.0,
        "positive/consistency": (0.1 + 0.1 + 0.3) / 3,
        "positive/consistency_samples": 0.2 / math.sqrt(2) / 6,
        "positive/monotonicity": 1.0,
        "positive/monotone": 1.0,
        "relevance": 0.5,
    }
    assert found.keys() == want.keys() and result.spec["judges"] == {"positive": "positive@1"}
    for name, value in want.items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-9), name
        assert found[name]["n"] == 2 and found[name]["low"] is not None
    backwards = stage(
        root, judges.smooth, {"strengths": [1.0, 0.0, -1.0], "resamples": 50}, figures=figures
    )  # fmt: skip
    assert backwards.metrics()[0]["value"] == pytest.approx(-0.6)


def test_smoothness_is_refused_across_judges(root):
    one, two = (stage(root, scored, {"scores": [[0.1], [0.2]], "judge": j}) for j in ("a@1", "b@1"))
    with pytest.raises(InputError, match="were not scored alike"):
        stage(root, judges.smooth, {"strengths": [0.0, 1.0]}, figures=[one, two])
    with pytest.raises(InputError, match="3 strengths were given for 2"):
        stage(root, judges.smooth, {"strengths": [0.0, 1.0, 2.0]}, figures=[one, one])


def test_what_is_not_defined_is_null(root):
    samples = stage(root, blank, {})
    result = stage(root, judges.evaluate, {"resamples": 10}, samples=samples)
    assert result.rows("scores.jsonl") == [{"prompt_id": 0, "sample": 0, "scores": {}}]
    assert judges._finite(math.nan) is None and judges._finite(0.0) == 0.0 and judges._finite("a") == "a"


def blank(run):
    write_jsonl(run.path / "samples.jsonl", [{"prompt_id": 0, "sample": 0, "prompt": "a", "text": ""}])


SHOUT = '''"""The share of capital letters."""

from ctg_jax.rewards.check import TextReward

SETTINGS = ("reads",)


def load(folder, settings):
    score = lambda texts: [sum(c.isupper() for c in t) / max(1, len(t)) for t in texts]
    return TextReward(settings["name"], "shout:1", score, reads=settings["reads"], threshold=0.5)
'''


def test_a_kind_of_judge_is_found_by_its_file_name(root, tmp_path, monkeypatch):
    from ctg_jax import rewards

    (tmp_path / "shout.py").write_text(SHOUT)
    monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "ctg_jax.rewards.shout", raising=False)
    assert "shout" in rewards.kinds() and "check" not in rewards.kinds()
    data = stage(root, texts, {"rows": [{"text": "LOUD", "label": 1}, {"text": "quiet", "label": 0}]})
    judge = stage(root, judges.fit_judge, {"kind": "shout", "name": "loud"}, heldout=data)
    assert judge.metrics()[0] == {"name": "loud", "version": "shout:1", "accuracy": 1.0, "auc": 1.0, "heldout": 2}
    assert judges.open_judge(judge)([""], ["aB"]).tolist() == [0.5]
    with pytest.raises(InputError, match="encoder is 'x', but a judge of kind 'shout' does not read it"):
        stage(root, judges.fit_judge, {"kind": "shout", "encoder": "x"})


def test_a_list_of_words_is_a_judge(root):
    data = stage(root, texts, {"rows": [{"text": "A ROCKET, again", "label": 1}, {"text": "rockets", "label": 0}]})
    settings = {"kind": "lexicon", "name": "space", "target": "Rocket orbit"}
    judge = stage(root, judges.fit_judge, settings, heldout=data)
    assert judge.metrics()[0]["accuracy"] == 1.0
    assert judges.open_judge(judge)(["rocket"] * 2, ["in orbit", "no"]).tolist() == [1.0, 0.0]
    whole = judges.open_judge(stage(root, judges.fit_judge, settings | {"reads": "both"}))
    assert whole(["rocket"], [" no"]).tolist() == [1.0] and whole.version != judges.open_judge(judge).version
    for target, wrong in ((1, "target is 1"), ("", "target is "), ("orbit C++", "target is 'C\\+\\+'")):
        with pytest.raises(InputError, match=f"{wrong}.*: expected words to search for"):
            stage(root, judges.fit_judge, settings | {"target": target})


def test_a_judge_of_a_request_in_words_is_measured_on_texts_with_labels(root):
    data = stage(root, texts, {"rows": [{"text": "two words", "label": 1}, {"text": "one", "label": 0}]})
    judge = stage(root, judges.fit_judge, {"kind": "length", "name": "two", "target": "2 words"}, heldout=data)
    assert judge.metrics()[0]["accuracy"] == 1.0
