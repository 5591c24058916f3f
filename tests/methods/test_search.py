"""Search against closed forms in a world that can be enumerated: the best of n, rejection, sampling among candidates,
beams, beam search; what a search draws is what sampling draws; interruption; bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import rewards
from ctg_jax.controls import truncate
from ctg_jax.decode import loop
from ctg_jax.decode.beam import beam_search
from ctg_jax.learn import calibrate, experience, search
from ctg_jax.learn.critics import Watch
from ctg_jax.learn.search import Plan, searched
from ctg_jax.methods import critic
from ctg_jax.run.stage import stage
from ctg_jax.stages import judges, sampling, sources
from ctg_jax.stages.sampling import Options
from ctg_jax.types import InputError, Sampling
from experiments import arms

WORLD = worlds.Bigram(4)
PARAMS = WORLD.init(jax.random.key(2))
VALUES = np.array([0.0, 2.0, 1.0, 2.0])  # of a token; a text has their sum, with ties


class Letters:
    """A tokenizer of four letters."""

    pad, ends, eos = 0, (), None

    def known(self, vocab):
        return np.ones(vocab, bool)

    def encode_prompts(self, texts):
        return [["abcd".index(c) for c in text] for text in texts]

    def before_end(self, ids):
        return list(ids)

    def decode_after(self, prompts, rows):
        return ["".join("abcd"[i] for i in row) for row in rows]


def value(prompts, texts):
    return [sum(VALUES["abcd".index(c)] for c in text) for text in texts]


def found(plan, n=1, new=2, batch=4096, seed=0, asked=value):
    """All records of a search of the prompt "a"."""
    options = Options(n=n, max_new=new, batch=batch, seed=seed)
    made = search.search(WORLD, PARAMS, Letters(), ["a"], asked, plan=plan, options=options)
    return [row for rows in made for row in rows]


def law(texts):
    """The share of each text of two letters."""
    every = ["".join(pair) for pair in itertools.product("abcd", repeat=2)]
    return np.array([texts.count(text) for text in every]) / len(texts)


def enumerated():
    """(p, value) float64 [16] of every text of two letters after "a"."""
    p = worlds.probabilities(WORLD, PARAMS, [0], 2)
    every = itertools.product(range(4), repeat=2)
    return p / p.sum(), np.array([VALUES[list(pair)].sum() for pair in every])


def total_variation(p, q):
    return 0.5 * np.abs(p - q).sum()


def test_the_best_of_n_has_the_law_of_order_statistics():
    """P(y) = p(y) / p(V = v) · (F(v)^n - F(v-)^n)."""
    p, v = enumerated()
    wanted = np.array([p[i] / p[v == x].sum() * (p[v <= x].sum() ** 3 - p[v < x].sum() ** 3) for i, x in enumerate(v)])
    assert wanted.sum() == pytest.approx(1)
    texts = [row["text"] for row in found(Plan(n=3), n=4000)]
    assert total_variation(law(texts), wanted) < 0.04 < total_variation(p, wanted)


def test_rejection_gives_the_posterior_where_it_accepts_and_the_best_where_it_does_not():
    """p(y) 1[v >= c] / Z · (1 - (1 - Z)^n), and below c the best of n."""
    p, v = enumerated()
    z = p[v >= 3].sum()
    below = [p[i] / p[v == x].sum() * (p[v <= x].sum() ** 4 - p[v < x].sum() ** 4) for i, x in enumerate(v)]
    wanted = np.where(v >= 3, p / z * (1 - (1 - z) ** 4), below)
    assert wanted.sum() == pytest.approx(1)
    texts = [row["text"] for row in found(Plan(n=4, accept=3.0), n=4000)]
    assert total_variation(law(texts), wanted) < 0.04


def test_sampling_among_candidates_tends_to_the_tilted_distribution():
    """Of n candidates one is drawn by softmax(v / tau); n is large here, so the law is p exp(v / tau) / Z."""
    p, v = enumerated()
    wanted = p * np.exp(v / 2)
    wanted /= wanted.sum()
    texts = [row["text"] for row in found(Plan(n=40, temperature=2.0), n=2500, batch=20000)]
    assert total_variation(law(texts), wanted) < 0.05 < total_variation(p, wanted)
    two = found(Plan(n=2, temperature=1e-3), n=50)
    best = found(Plan(n=2), n=50)
    assert np.mean([a["value"] == b["value"] for a, b in zip(two, best)]) == 1


def test_one_candidate_is_sampling_and_n_are_its_samples():
    options = Options(n=6, max_new=3, batch=4)
    drawn = [r for rows in sampling.complete(WORLD, PARAMS, Letters(), ["a", "cb"], options=options) for r in rows]
    made = search.search(WORLD, PARAMS, Letters(), ["a", "cb"], value, plan=Plan(n=1), options=options)
    assert [r["tokens"] for rows in made for r in rows] == [r["tokens"] for r in drawn]
    options = Options(n=2, max_new=3, batch=5)
    made = search.search(WORLD, PARAMS, Letters(), ["a", "cb"], value, plan=Plan(n=3), options=options)
    groups = np.arange(12) // 3
    best = calibrate.best_of(value([], [r["text"] for r in drawn]), groups)
    rows = [r for rows in made for r in rows]
    assert [r["tokens"] for r in rows] == [drawn[i]["tokens"] for i in best]
    assert [(r["prompt_id"], r["sample"]) for r in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {r["drawn"] for r in rows} == {9} and {r["candidates"] for r in rows} == {3}
    assert [r["value"] for r in rows] == value([], [r["text"] for r in rows])


def test_segments_without_a_choice_are_sampling():
    """One candidate of one beam: the pauses change nothing."""
    one, paused = (found(Plan(n=1, segment=s), n=8, new=5) for s in (0, 2))
    assert [r["tokens"] for r in one] == [r["tokens"] for r in paused]


def last_letter():
    """A critic of the world whose V is the value of the last token, in half the size of `VALUES`."""
    made = critic.init(WORLD, jax.random.key(0), top=4, link="value", alpha=2.0)
    return made.replace(value={"kernel": jnp.asarray(VALUES / 2, jnp.float32), "bias": jnp.float32(0)})


@pytest.mark.parametrize("segment", [1, 2])
def test_blocks_chosen_by_a_critic_have_the_law_of_the_best_of_each_block(segment):
    """Blocks of M tokens: P(block | before) = p / p(V = v) · (F(v)^K - F(v-)^K) under p after what came before; V is
    that of the last token. One block of two tokens is the best of K texts by the critic."""
    p = np.exp(np.asarray(jax.nn.log_softmax(PARAMS["head"]["kernel"].T, axis=-1)))
    wanted, k = np.zeros((4, 4)), 3

    def best(q, v):
        return np.array(
            [q[i] / q[v == x].sum() * (q[v <= x].sum() ** k - q[v < x].sum() ** k) for i, x in enumerate(v)]
        )

    if segment == 1:
        wanted = best(p[0], VALUES)[:, None] * np.stack([best(row, VALUES) for row in p])
    else:
        wanted = best((p[0][:, None] * p).ravel(), np.tile(VALUES, 4))
    assert wanted.sum() == pytest.approx(1)
    rows = found(Plan(n=k, segment=segment), n=4000, asked=last_letter())
    assert total_variation(law([row["text"] for row in rows]), wanted.ravel()) < 0.04
    assert all(row["value"] == pytest.approx(VALUES["abcd".index(row["text"][-1])] / 2) for row in rows)


def test_one_candidate_of_a_block_is_the_base_and_a_block_of_one_token_the_form_of_the_critic():
    """With K = 1 the critic changes no token; with M = 1 and many candidates, drawn ∝ exp(V / temperature), the law is
    that of the critic's control at alpha = 1 / temperature."""
    plain, watched = found(Plan(n=1), n=50), found(Plan(n=1, segment=1), n=50, asked=last_letter())
    assert [row["tokens"] for row in watched] == [row["tokens"] for row in plain]
    wanted = worlds.probabilities(WORLD, PARAMS, [0], 2, last_letter())
    rows = found(Plan(n=40, segment=1, temperature=0.5), n=2500, batch=20000, asked=last_letter())
    texts = [row["text"] for row in rows]
    assert total_variation(law(texts), wanted) < 0.05 < total_variation(enumerated()[0], wanted)


def test_a_critic_reads_block_by_block_what_it_would_read_at_once():
    """Prompts of several lengths, rows that end inside a block, a last block that is shorter, rows in another order."""
    lm = worlds.tiny()
    params, batch = worlds.lively(lm), worlds.prompts([[1, 2, 3], [4], [5, 6]])
    made = critic.example(lm, jax.random.key(1))
    tokens = np.array([[7, 8, 9, 1, 2], [3, 4, 0, 0, 0], [5, 6, 7, 8, 0]], np.int32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], bool)
    whole, _ = critic.of_prefixes(
        made, params, dict(tokens=batch.tokens, mask=batch.mask, completion=tokens, written=mask), batch.keys
    )
    watch = Watch(made, lm, params)
    valued = watch.begin(batch, 5, 3)
    np.testing.assert_allclose(valued.v, whole[:, 0], atol=1e-5)
    for look, last in enumerate(([3, 2, 3], [4, 5, 2])):
        valued = watch.read(valued, tokens, mask, look, 3)
        np.testing.assert_allclose(valued.v, whole[np.arange(3), last], atol=1e-5)
        order = np.array([2, 0, 1])
        valued, tokens, mask, whole = (loop.choose(valued, order), tokens[order], mask[order], whole[order])


def test_beams_over_segments_look_at_every_segment():
    """With many candidates, the best first letters are kept, then the best second ones: b or d at each place."""
    rows = found(Plan(n=30, beams=2, segment=1), n=5, new=3)
    assert all(set(r["text"]) <= set("bd") and r["value"] == 6 for r in rows)
    apart = {r["text"] for r in found(Plan(n=30, beams=2, segment=1), n=40, new=3)}
    assert len(apart) > 1


def test_a_beam_that_has_ended_competes_once_and_equal_texts_are_asked_for_once():
    asked = []

    def counting(prompts, texts):
        asked.extend(texts)
        return value(prompts, texts)

    class Ends(Letters):
        ends, eos = (3,), 3

        def before_end(self, ids):
            return list(itertools.takewhile(lambda i: i != 3, ids))

    plan, options = Plan(n=3, beams=2, segment=1), Options(n=1, max_new=4, batch=6)
    params = worlds.table(np.full((4, 4), 1e-6) + np.array([1e-6, 0, 0, 1.0]))  # it ends at once
    (rows,) = search.search(WORLD, params, Ends(), ["a"], counting, plan=plan, options=options)
    assert rows[0]["tokens"] == [3] and asked == [""] and rows[0]["drawn"] == 6
    scores = np.array([1.0, -np.inf, -np.inf, 0.5])
    assert search._chosen(scores, 3, Plan(), 0, (0, 0, 0)).tolist() == [0, 3, 0]


def test_copies_of_a_beam_draw_new_tokens():
    keys = jax.random.split(jax.random.key(0), 2)
    new = search._renewed(jnp.repeat(keys, 3), 0, 3)
    data = jax.random.key_data(new)
    assert len(np.unique(data, axis=0)) == 6
    np.testing.assert_array_equal(data[::3], jax.random.key_data(keys))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beam_search_with_enough_beams_is_the_best_of_all(penalty):
    """Token 3 ends a text; with as many beams as texts nothing is lost, so the scores are those of all texts."""
    sampling_, new = Sampling(max_new=3, eos=(3,)), 3
    every = {}
    for size in range(1, new + 1):
        for text in itertools.product(range(4), repeat=size):
            if 3 not in text[:-1] and (text[-1] == 3 or size == new):
                logp = jnp.asarray([list(text)])
                every[text] = float(loop.score(WORLD, PARAMS, worlds.prompts([[0]]), logp).sum()) / size**penalty
    best = sorted(every.items(), key=lambda item: -item[1])
    (hypotheses, other) = beam_search(
        WORLD, PARAMS, worlds.prompts([[0], [2, 0]]), sampling=sampling_, beams=40, penalty=penalty
    )
    assert len(hypotheses) == 40
    for h, (_, score) in zip(hypotheses[:5], best):
        assert h.score == pytest.approx(score, abs=1e-5) and every[h.tokens] == pytest.approx(score, abs=1e-5)
        assert sum(h.logp) == pytest.approx(h.score * len(h.tokens) ** penalty, abs=1e-5)
    assert [h.tokens for h in other[:5]] == [h.tokens for h in hypotheses[:5]]  # the world reads the last token alone


def test_one_beam_is_greedy_and_removed_tokens_are_never_extended():
    from ctg_jax.controls.constraints import Ban, marks

    lm = worlds.tiny()
    params, batch = worlds.lively(lm), worlds.prompts([[1, 2, 3], [4]])
    greedy = loop.generate(lm, params, batch, sampling=Sampling(4, greedy=True))
    found = beam_search(lm, params, batch, sampling=Sampling(4), beams=1)
    assert [list(h[0].tokens) for h in found] == greedy.tokens.tolist()
    ban = Ban(jnp.asarray(marks(range(9), lm.vocab)))
    found = beam_search(lm, params, batch, ban, Sampling(2), beams=8)
    assert all({*h.tokens} <= {9, 10} for row in found for h in row) and [len(row) for row in found] == [4, 4]


@pytest.mark.slow
def test_beam_search_is_that_of_transformers(tmp_path):
    """The best hypothesis and its score, for three penalties and end tokens that matter; with many of them, most of the
    likeliest extensions end."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from ctg_jax.models import hf

    lm = worlds.tiny(vocab=50)
    params = worlds.lively(lm)
    hf.save(tmp_path, lm, params, tokens={"eos_token_id": 0})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    prompt = [5, 9, 12]
    for penalty in (0.0, 1.0, 2.0):
        for end in ((3,), (17,), (30, 16, 11, 31, 32, 42, 3, 5, 8, 41, 6, 36)):
            (mine,) = beam_search(
                lm, params, worlds.prompts([prompt]), sampling=Sampling(6, eos=end), beams=4, penalty=penalty
            )
            with torch.no_grad():
                out = theirs.generate(
                    torch.tensor([prompt]), attention_mask=torch.ones(1, 3, dtype=torch.long), num_beams=4,
                    do_sample=False, max_new_tokens=6, length_penalty=penalty, early_stopping=False,
                    eos_token_id=list(end), pad_token_id=0, return_dict_in_generate=True, output_scores=True,
                )  # fmt: skip
            row = out.sequences[0, 3:].tolist()
            assert list(mine[0].tokens) == row[: len(mine[0].tokens)]
            assert mine[0].score == pytest.approx(float(out.sequences_scores[0]), abs=1e-4)


def killed(reward, asked, last):
    """What opens a judge with the scores of a reward, which adds what it is asked to `asked`, and is interrupted before
    it answers where `last(texts)` is true."""

    def judge(prompts, texts):
        if last(texts):
            raise KeyboardInterrupt
        asked.extend(zip(prompts, texts))
        return reward(prompts, texts)

    judge.name, judge.threshold, judge.version = reward.name, 0.5, reward.version
    return lambda artifact: judge


def test_the_stage_is_the_best_of_the_samples_and_goes_on_after_a_kill(small, monkeypatch):
    root, lm, _ = small
    letters = rewards.TextReward("letters", "1", lambda rows: [r.count("a") + len(r) / 100 for r in rows])
    asked = []
    monkeypatch.setattr(search, "open_judge", killed(letters, asked, lambda texts: len(asked) + len(texts) > limit))
    monkeypatch.setattr(experience, "open_judge", lambda artifact: letters)
    path = root / "prompts.jsonl"
    path.write_text('{"text": "good"}\n{"text": "so"}\n{"text": "bad"}\n')
    prompts = stage(root, sources.load_data, dict(source=f"jsonl:{path}", split="all"))
    judge = stage(root, judges.fit_judge, {"kind": "oracle"})
    settings = dict(n=2, max_new=4, batch=4, plan=dict(n=2))
    limit = 5
    with pytest.raises(KeyboardInterrupt):
        stage(root, searched, settings, lm=lm, prompts=prompts, rewards=[judge])
    assert 0 < len(asked) <= 5
    limit = 10**6
    out = stage(root, searched, settings, lm=lm, prompts=prompts, rewards=[judge])
    rows = out.rows("samples.jsonl")
    assert len(set(asked)) == len(asked)  # nothing is scored twice
    samples = stage(root, sampling.sample, dict(n=4, max_new=4, batch=12), lm=lm, prompts=prompts)
    scored = stage(root, experience.score, {}, samples=samples, rewards=[judge], lm=lm)
    best = stage(root, experience.best, {"n": 2}, scored=scored).rows("samples.jsonl")
    assert [(r["prompt_id"], r["sample"], r["tokens"]) for r in rows] == [
        (r["prompt_id"], r["sample"], r["tokens"]) for r in best
    ]
    assert out.spec["kl_bound"] == pytest.approx(np.log(2) - 0.5) and out.spec["likelihood"] is False
    given = []
    monkeypatch.setattr(sampling, "conditions", lambda controls, lm, texts, records=(): given.append(records) or {})
    beam = stage(root, searched, dict(max_new=4, plan=dict(beams=3, penalty=1.0)), lm=lm, prompts=prompts)
    assert given == [prompts.rows("data.jsonl")]  # what methods read of the records of the prompts
    assert len(beam.rows("samples.jsonl")) == 3


def test_a_search_over_segments_that_was_killed_between_looks_scores_nothing_twice(small, monkeypatch):
    """The looks of the batch that was cut short are drawn again, and their values are read from disk."""
    root, lm, _ = small
    letters = rewards.TextReward("letters", "1", lambda rows: [r.count("a") + len(r) / 100 for r in rows])
    asked, calls = [], []

    def last(texts):
        calls.append(len(texts))
        return len(calls) == stop

    monkeypatch.setattr(search, "open_judge", killed(letters, asked, last))
    path = root / "looks.jsonl"
    path.write_text('{"text": "good"}\n{"text": "so"}\n')
    prompts = stage(root, sources.load_data, dict(source=f"jsonl:{path}", split="all"))
    judge = stage(root, judges.fit_judge, {"kind": "oracle"})
    settings = dict(max_new=4, batch=4, plan=dict(n=2, beams=2, segment=1))
    stop = 0
    whole = stage(root / "whole", searched, settings, lm=lm, prompts=prompts, rewards=[judge]).rows("samples.jsonl")
    every, asked[:], calls[:] = sorted(set(asked)), [], []
    stop = 3  # the third look of the first prompt
    with pytest.raises(KeyboardInterrupt):
        stage(root / "cut", searched, settings, lm=lm, prompts=prompts, rewards=[judge])
    assert len(calls) == 3 and asked
    stop = 0
    again = stage(root / "cut", searched, settings, lm=lm, prompts=prompts, rewards=[judge]).rows("samples.jsonl")
    assert [(r["tokens"], r["value"]) for r in again] == [(r["tokens"], r["value"]) for r in whole]
    assert sorted(asked) == every  # each once


def test_bad_plans_and_values_raise_one_sentence(small):
    for plan, count, words in [
        (Plan(n=0), 1, "plan has n=0, beams=1, segment=0"),
        (Plan(beams=2), 1, "beams=2 without a segment, which are only more candidates"),
        (Plan(accept=1.0, temperature=1.0), 1, "plan has accept with beams or a temperature"),
        (Plan(), 0, "a search chooses by one reward or critic, not 0"),
        (Plan(penalty=1.0), 1, "plan has a penalty, which makes it beam search"),
        (Plan(penalty=1.0, segment=2), 0, "plan has a penalty, which makes it beam search"),
    ]:
        with pytest.raises(InputError, match=words):
            plan.check(count)

    def half(prompts, texts):
        return [float("nan") if i % 2 else 1.0 for i in range(len(texts))]

    with pytest.raises(
        InputError, match=r"the value of \d+ of \d+ candidates is not finite, first nan for '[abcd]{2}'"
    ):
        found(Plan(n=8), asked=half)
    with pytest.raises(InputError, match=r"the value of \d+ candidates has shape \(1,\), expected a number for each"):
        found(Plan(n=8), asked=lambda prompts, texts: [1.0])
    with pytest.raises(InputError, match="Temperature gives no value to unfinished texts: expected a control of `crit"):
        found(Plan(n=2), asked=truncate.Temperature(jnp.ones(())))
    broken = last_letter().replace(value={"kernel": jnp.full(4, jnp.nan), "bias": jnp.float32(0)})
    with pytest.raises(InputError, match="the critic's value of 8 of 8 candidates is not finite"):
        found(Plan(n=2), n=4, asked=broken)
    with pytest.raises(InputError, match="The critic has a vocabulary of 3 tokens and the base model one of 4"):
        found(Plan(n=2), asked=critic.init(worlds.Bigram(3), jax.random.key(0), top=3))
    with pytest.raises(InputError, match="beams is 0, expected at least 1"):
        beam_search(WORLD, PARAMS, worlds.prompts([[0]]), beams=0)
    with pytest.raises(InputError, match="prompt 1 has 1 tokens and max_new is 40, but the model's context is 32"):
        found(Plan(n=2), new=40)


@pytest.mark.parametrize(
    "arm, words",
    [
        (dict(search=dict(k=2), rewards={"a": {}}), "methods.x.search has no setting 'k'; it has accept"),
        (dict(search=dict(n=2)), "a search chooses by one reward or critic, not 0"),
        (dict(search=dict(n=2), rewards={"a": {}}, chain={"y": 1.0}), "methods.x.chain names 'y', which is no method"),
        (dict(search=dict(n=2), rewards={"a": {}}, truncate_first=True), "methods.x has truncate_first"),
        (
            dict(search=dict(n=2), critic="y"),
            "methods.x.critic is 'y', which is no arm with values of unfinished texts",
        ),
        (dict(search=dict(n=2), critic="y", rewards={"a": {}}), "a search chooses by one reward or critic, not 2"),
        (dict(correct=dict(turn=2), method="correct", data={}), "has no setting 'turn'; did you mean 'turns'"),
        (dict(correct=dict(turns=2), method="correct"), "methods.x lacks data"),
    ],
)
def test_arms_that_search_or_correct_are_checked_before_anything_runs(arm, words):
    with pytest.raises(InputError, match=words):
        arms.read({"x": arm})
