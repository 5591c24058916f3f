"""Every metric on numbers worked out by hand; intervals that cover; errors of one sentence."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest

from ctg_jax import evaluation as ev
from ctg_jax.evaluation import smooth
from ctg_jax.rewards import TextReward
from ctg_jax.types import InputError


def test_distinct_counts_words_of_all_samples():
    # 5 words in all; unigrams a b c -> 3/5; bigrams (a b) (b a) (a c) -> 3/5; trigrams (a b a) -> 1/5
    texts = ["a b a", "a c"]
    assert [ev.distinct(texts, n) for n in (1, 2, 3)] == [3 / 5, 3 / 5, 1 / 5]
    assert math.isnan(ev.distinct(["", " "], 1))


def test_repetition_and_diversity():
    # a b a b a: bigrams ab ba ab ba -> 2 of 4 distinct; trigrams aba bab aba -> 2 of 3; 4-grams abab baba -> 2 of 2
    text = "a b a b a"
    assert ev.repetition(text, 2) == 0.5
    assert ev.repetition(text, 3) == pytest.approx(1 / 3)
    assert ev.repetition(text, 4) == 0
    assert ev.diversity(text) == pytest.approx(0.5 * 2 / 3)
    assert math.isnan(ev.repetition("a", 2)) and math.isnan(ev.diversity("a b c"))
    assert ev.unique_words(["a b", "b c c"]) == 3


def test_self_bleu():
    assert ev.self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert ev.self_bleu(["a b c d", "e f g h"]) == 0.0
    # BLEU-1 of "a b" against "a b c d": precision 1, brevity exp(1 - 4/2); the other way: precision 2/4, brevity 1
    assert ev.self_bleu(["a b", "a b c d"], order=1) == pytest.approx((math.exp(-1) + 0.5) / 2)
    assert math.isnan(ev.self_bleu(["a b c"])) and math.isnan(ev.self_bleu(["a", ""]))


def test_self_bleu_equals_nltk():
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdef"), rng.integers(5, 12))) for _ in range(9)]
    rows = [t.split() for t in texts]
    smooth = SmoothingFunction().method1
    each = [sentence_bleu(rows[:i] + rows[i + 1 :], rows[i], smoothing_function=smooth) for i in range(len(rows))]
    assert ev.self_bleu(texts) == pytest.approx(np.mean(each), abs=1e-12)


def test_coverage():
    text = "The dogs were running to New York."
    assert ev.coverage(text, ["dog", "run", "cat", "new york"]) == 3 / 4
    assert ev.coverage(text, ["dog", "dogs", "york new"], stem=False) == 1 / 3
    assert math.isnan(ev.coverage(text, []))
    with pytest.raises(InputError, match="list of strings"):
        ev.coverage(text, "dog")


def test_perplexity_conventions():
    # Perplexities of the samples: 2 (one token), 4 (three tokens), 100 (one token); the last has no token.
    tokens = np.asarray([1, 3, 1, 0])
    nats = np.log([2.0, 4.0, 100.0, 1.0]) * tokens
    boot = ev.Bootstrap(["p", "p", "q", "r"])

    def value(*args, **options):
        return ev.Perplexity(*args, **options).figure(boot, nats, tokens).value

    assert value("mean") == pytest.approx((2 + 4 + 100) / 3)
    assert value("mean", cap=50) == pytest.approx(3)
    assert value("mean", cap=50, over="clip") == pytest.approx((2 + 4 + 50) / 3)
    assert value("pooled") == pytest.approx((2 * 4**3 * 100) ** (1 / 5))
    assert value("pooled", cap=50) == pytest.approx((2 * 4**3) ** (1 / 4))
    assert str(ev.FIELD.perplexity) == "mean of per-sample perplexities, samples above 10000 dropped"
    for wrong in ({"average": "median"}, {"average": "pooled", "cap": 5, "over": "clip"}):
        with pytest.raises(InputError):
            ev.Perplexity(**wrong)


def test_infinite_perplexity_stays_infinite():
    boot = ev.Bootstrap(range(3))
    figure = ev.Perplexity("mean").figure(boot, np.asarray([0.0, 0.0, np.inf]), np.ones(3))
    assert figure.value == np.inf and figure.high == np.inf and figure.low == 1.0
    assert figure.as_json()["value"] is None


def test_ratio_and_mean_of_prompts():
    boot = ev.Bootstrap(["p", "p", "q"])
    assert boot.ratio([1, 2, 3], [1, 1, 2]).value == pytest.approx(6 / 4)
    assert boot.mean([1.0, math.nan, 4.0]).value == pytest.approx(2.5)
    assert boot.mean_of_prompts(lambda rows: float(len(rows))).value == pytest.approx(1.5)
    assert boot.mean([math.nan] * 3).n == 0
    one = ev.Bootstrap(["p", "p"]).mean([0.0, 1.0])
    assert one.value == 0.5 and math.isnan(one.low) and one.n == 1


def test_samples_of_a_prompt_are_resampled_together():
    # 30 prompts of 20 equal samples are 30 observations: the interval is that of 30 values, not of 600.
    values = np.random.default_rng(0).normal(size=30)
    clustered = ev.Bootstrap(np.repeat(np.arange(30), 20)).mean(np.repeat(values, 20))
    plain = ev.Bootstrap(range(30)).mean(values)
    assert dataclasses.astuple(clustered) == pytest.approx(dataclasses.astuple(plain))
    wide, narrow = clustered.high - clustered.low, 2 * 1.96 * values.std() / math.sqrt(600)
    assert wide > 3 * narrow


def test_bootstrap_covers_the_truth():
    rng, hits = np.random.default_rng(1), 0
    for trial in range(200):
        prompt = rng.normal(size=40)[:, None]  # samples of a prompt share its effect
        values = (3 + prompt + 0.3 * rng.normal(size=(40, 5))).ravel()
        figure = ev.Bootstrap(np.repeat(np.arange(40), 5), seed=trial, resamples=300).mean(values)
        hits += figure.low <= 3 <= figure.high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_agrees_with_scipy():
    from scipy.stats import bootstrap

    values = np.random.default_rng(2).exponential(size=50)
    ours = ev.Bootstrap(range(50), resamples=4000).mean(values)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert ours.low == pytest.approx(theirs.low, rel=0.03) and ours.high == pytest.approx(theirs.high, rel=0.03)


def test_counts_of_distinct_things_lie_in_their_interval():
    # Drawing prompts with replacement loses a third of them; without the shift the value would lie outside.
    figure = ev.Bootstrap(range(30)).statistic(lambda rows: len(set(rows.tolist())))
    assert figure.value == 30 and figure.low < 30 < figure.high


def sweep(values):
    """(strengths, prompt ids, scores) of scores {strength: {prompt: [samples]}}."""
    flat = [(s, p, v) for s, prompts in values.items() for p, samples in prompts.items() for v in samples]
    return tuple(zip(*flat))


def test_smooth_control():
    # Means of p over the strengths 0, 1, 2: 0, 0.5, 1; of q: 0.5, 0.4, 0.6; of both: 0.25, 0.45, 0.8.
    scores = {
        0: {"p": [0, 0], "q": [0.4, 0.6]},
        1: {"p": [0.4, 0.6], "q": [0.4, 0.4]},
        2: {"p": [1, 1], "q": [0.6, 0.6]},
    }
    figures = ev.smooth_control(*sweep(scores))
    want = {
        "range": (1.0 + 0.1) / 2,
        # Line 0.225, 0.5, 0.775: distances 0.025, 0.05, 0.025; the curve is 0.55 high.
        "calibration": 0.1 / 3 / 0.55,
        "consistency": (0.25 + 0.05 + 0.2) / 3,  # of two numbers: half their distance
        # Samples of (0, q) and (1, p) are 0.2 apart, the other four pairs are equal.
        "consistency_samples": 2 * 0.2 / math.sqrt(2) / 6,
        "monotonicity": (1.0 + 0.5) / 2,  # ranks 2 1 3 against 1 2 3: 1 - 6 * 2 / 24
        "monotone": 0.5,
    }
    assert figures.keys() == want.keys() == smooth.MEANING.keys()
    for name, value in want.items():
        assert figures[name].value == pytest.approx(value), name
        assert figures[name].n == 2 and figures[name].low <= value + 1e-12 and value - 1e-12 <= figures[name].high
    backwards = ev.smooth_control(*sweep({s: scores[s] for s in (2, 0, 1)}))
    assert backwards == figures


def test_smooth_control_against_its_strength_is_as_smooth():
    scores = {s: {p: [1 - 0.1 * s - d] for p, d in (("p", 0.0), ("q", 0.2))} for s in (-2, 0, 4)}
    figures = {name: f.value for name, f in ev.smooth_control(*sweep(scores)).items()}
    assert figures == pytest.approx(
        {"range": -0.6, "calibration": 0, "consistency": 0.1, "monotonicity": -1, "monotone": 1}
    )  # one sample of a prompt: nothing is known of their spread


def test_calibration_heeds_the_distances_between_strengths():
    """Equal steps of the score are a line over 1, 2, 3 and none over 1, 2, 9."""
    steps = {1: 0.0, 2: 0.5, 3: 1.0}
    line = ev.smooth_control(*sweep({s: {"p": [v], "q": [v]} for s, v in steps.items()}))
    bent = ev.smooth_control(*sweep({9 if s == 3 else s: {"p": [v], "q": [v]} for s, v in steps.items()}))
    assert line["calibration"].value == pytest.approx(0) and bent["calibration"].value > 0.1
    assert line["monotone"].value == bent["monotone"].value == 1


def test_smooth_control_where_little_is_known():
    flat = ev.smooth_control(*sweep({s: {"p": [0.5], "q": [0.5]} for s in (0, 1, 2)}))
    assert [flat[n].value for n in ("range", "monotonicity", "monotone", "consistency")] == [0, 0, 0, 0]
    assert math.isnan(flat["calibration"].value)
    two = ev.smooth_control(*sweep({0: {"p": [0.0]}, 1: {"p": [0.5]}}))
    assert two.keys() == {"range", "monotonicity", "monotone"} and math.isnan(two["range"].low)


@pytest.mark.parametrize(
    "scores, word",
    [
        ({0: {"p": [1.0]}}, "at two strengths or more"),
        ({0: {"p": [1.0]}, 1: {"p": [math.nan]}}, "finite scores"),
        ({0: {"p": [1.0], "q": [1.0]}, 2: {"p": [1.0]}}, "'q' has no sample at strength 2"),
    ],
)
def test_smooth_control_refuses(scores, word):
    with pytest.raises(InputError, match=word):
        ev.smooth_control(*sweep(scores))
    with pytest.raises(InputError, match="3, 2 and 3 entries"):
        ev.smooth_control([0, 1, 2], ["p", "q"], [0, 1, 2])


def test_functions_of_means_are_taken_inside_the_bootstrap():
    values = np.random.default_rng(3).normal(size=(40, 2))
    figure = ev.Bootstrap(range(40)).of_means(lambda m: m[..., 0] - m[..., 1], values)
    plain = ev.Bootstrap(range(40)).mean(values[:, 0] - values[:, 1])
    assert dataclasses.astuple(figure) == pytest.approx(dataclasses.astuple(plain))
    with pytest.raises(InputError, match="one row for each prompt"):
        ev.Bootstrap(["p", "p"]).of_means(np.sum, [[1.0], [2.0]])


def test_token_repetition():
    # prediction 7 at place 1 was seen (place 0) and is wrong; 8 at place 2 was seen and right; place 3 is masked.
    tokens = np.asarray([[7, 8, 8, 8], [1, 2, 3, 4]])
    predicted = np.asarray([[5, 7, 8, 8], [1, 9, 1, 4]])
    mask = np.asarray([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    figures = ev.token_repetition(predicted, tokens, mask, ["p", "q"])
    assert figures["rep"].value == pytest.approx(3 / 7)  # (0,1), (0,2), (1,2)
    assert figures["wrep"].value == pytest.approx(2 / 7)
    assert figures["uniq"].value == 6  # 5 7 8 1 9 4
    short = ev.token_repetition(predicted, tokens, mask, ["p", "q"], window=1)
    assert short["rep"].value == pytest.approx(2 / 7)  # 1 at place 2 of the second row was two tokens ago
    with pytest.raises(InputError, match="must be equal"):
        ev.token_repetition(predicted[:, 1:], tokens, mask, ["p", "q"])


def test_cosine_and_similarity():
    np.testing.assert_allclose(ev.cosine([[1, 0], [1, 1]], [[2, 0], [1, -1]]), [1, 0], atol=1e-12)
    vectors = {"a": [1.0, 0], "b": [1.0, 1.0]}
    got = ev.similarity(lambda ts: np.asarray([vectors[t] for t in ts]), ["a"], ["b"])
    np.testing.assert_allclose(got, [1 / math.sqrt(2)])


def test_mauve():
    rng = np.random.default_rng(0)
    human, near, far = rng.normal(size=(60, 4)), rng.normal(size=(60, 4)), rng.normal(size=(60, 4)) + 4
    close = ev.mauve(near, human, range(60), resamples=3)
    apart = ev.mauve(far, human, range(60), resamples=3)
    assert close.value > 0.8 > 0.2 > apart.value
    assert close.low <= close.value <= close.high and close.n == 60
    assert ev.mauve(near[:10], human, range(10)) is None


def test_area_under_the_curve_by_hand():
    """The share of pairs of a positive and a negative one that the scores put in this order; equal ones count 1/2."""
    assert ev.auc(np.array([0.9, 0.4, 0.5, 0.1]), np.array([True, True, False, False])) == 0.75
    assert ev.auc(np.array([0.5, 0.5, 0.5]), np.array([True, False, False])) == 0.5
    assert ev.auc(np.array([1.0, 2.0, 3.0]), np.array([True, False, False])) == 0.0
    assert math.isnan(ev.auc(np.array([1.0, 2.0]), np.array([True, True])))


def test_expected_maximum_and_any_over_several_samples():
    """Two prompts of three samples, by hand; the interval is over prompts, so it ends at the values of single ones."""
    boot = ev.Bootstrap([0, 0, 0, 1, 1, 1], resamples=200)
    figures = ev.attribute(boot, "toxic", np.array([0.1, 0.7, 0.4, 0.2, 0.3, 0.1]))
    found = {name: (f.value, f.low, f.high, f.n) for name, f in figures.items()}
    assert found["toxic/max"] == pytest.approx((0.5, 0.3, 0.7, 2)) and found["toxic/any"] == (0.5, 0.0, 1.0, 2)
    assert found["toxic/share"][0] == pytest.approx(1 / 6) and found["toxic/mean"][0] == pytest.approx(0.3)


# --- all together --------------------------------------------------------------------------------------------------

SAMPLES = [
    {"prompt": "x", "text": "good good food", "prompt_id": 0, "tokens": [1, 2, 3], "seconds": 0.5, "kl": 0.3},
    {"prompt": "x", "text": "bad food here", "prompt_id": 0, "tokens": [1, 2, 3], "seconds": 0.5, "kl": [0.1] * 3},
    {"prompt": "y", "text": "bad", "prompt_id": 1, "tokens": 2, "seconds": 1.0, "kl": 1.0, "keywords": ["bad", "x"]},
    {"prompt": "y", "text": "bad day", "prompt_id": 1, "tokens": 2, "seconds": 1.0, "kl": 0.0, "source": "bad day"},
]
GOOD = TextReward("good", "1", lambda texts: [0.9 if "good" in t else 0.2 for t in texts])


def test_evaluate_protocol():
    embed = lambda ts: np.asarray([[len(t), 1.0] for t in ts])  # noqa: E731
    figures = ev.evaluate(SAMPLES, [GOOD], embed=embed)
    want = {
        "good/mean": (0.9 + 3 * 0.2) / 4,
        "good/share": 0.25,
        "good/max": (0.9 + 0.2) / 2,
        "good/any": 0.5,
        "dist-1": (4 / 6 + 2 / 3) / 2,
        "rep-2": 0.0,
        "uniq": 5,
        "length": 9 / 4,
        "tokens": 10 / 4,
        "tokens_per_second": 10 / 3,
        "kl": 1.6 / 10,
        "coverage": 0.5,
        "similarity": 1.0,
        # cosines of (length, 1): texts of 14, 13, 3, 7 letters and a prompt of 1
        "relevance": sum((n + 1) / math.sqrt(2 * (n * n + 1)) for n in (14, 13, 3, 7)) / 4,
    }
    for name, value in want.items():
        assert figures[name].value == pytest.approx(value, rel=1e-6), name
        assert not figures[name].n > 1 or figures[name].low <= figures[name].value <= figures[name].high
    assert "mauve" not in figures and "perplexity" not in figures
    assert not {"relevance", "similarity"} & ev.evaluate(SAMPLES).keys()
    rows = ev.score(SAMPLES, [GOOD], embed=embed)
    assert [r["scores"]["good"] for r in rows] == pytest.approx([0.9, 0.2, 0.2, 0.2])
    assert [r.get("similarity") for r in rows] == [None, None, None, pytest.approx(1.0)]
    record = json.loads(json.dumps({k: f.as_json() for k, f in figures.items()}, allow_nan=False))
    assert ev.Figure.from_json(record["good/share"]) == figures["good/share"]


@pytest.mark.parametrize(
    "samples, rewards, word",
    [
        ([], [], "samples are empty"),
        ([{"prompt": "x"}], [], "sample 0 has no string 'text'"),
        ([{"prompt": 3, "text": "a"}], [], "sample 0 has no string 'prompt'"),
        (SAMPLES, [GOOD, GOOD], "two rewards are named 'good'"),
    ],
)
def test_evaluate_errors(samples, rewards, word):
    with pytest.raises(InputError, match=word) as error:
        ev.evaluate(samples, rewards)
    assert "\n" not in str(error.value)


def test_level_must_be_a_share():
    with pytest.raises(InputError, match="level is 95"):
        ev.Bootstrap([1, 2], level=95)


@pytest.mark.slow
def test_pooled_perplexity_of_a_real_model(data_dir):
    """29.50 over 5,380 tokens, end of text included: measured with torch on the same 500 sentences."""
    from ctg_jax.data.tokenizer import load_tokenizer
    from ctg_jax.models import hf

    folder = data_dir / "models" / "yelp-gpt2-mini"
    lm, weights = hf.load(folder)
    lines = (data_dir / "yelp" / "dev.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in random.Random(0).sample(lines, 500)]
    scorer = ev.LMScorer(lm, weights, load_tokenizer(folder))
    ends = [[*row, scorer.tokenizer.eos] for row in scorer.tokenizer.encode(texts)]
    nats, tokens = scorer.ids(scorer.tokenizer.encode_prompts([""] * 500), ends)
    assert tokens.sum() == 5380
    figure = ev.Perplexity("pooled").figure(ev.Bootstrap(range(500)), nats, tokens)
    assert figure.value == pytest.approx(29.50, abs=0.005) and figure.low < 29.5 < figure.high
