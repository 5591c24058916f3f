"""Sampling and evaluation as stages: resumed, independent of the batch, refused on bad input."""

import json

import jax
import numpy as np
import pytest

from ctg_jax import io
from ctg_jax.controls import truncate
from ctg_jax.decode import strategies
from ctg_jax.learn.pool import check_drawn
from ctg_jax.mesh import layout
from ctg_jax.run.stage import Run, stage, write_jsonl
from ctg_jax.stages import sampling, sources
from ctg_jax.stages.controls import made
from ctg_jax.types import InputError
from tests.experiments.tiny_lm import write_lm

TEXTS = ["the food", "the room was", "we"]


def texts(run, *, rows):
    write_jsonl(run.path / "data.jsonl", rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def lm(root, tmp_path_factory):
    return stage(root, sources.load_lm, {"source": str(write_lm(tmp_path_factory.mktemp("lm")))})


@pytest.fixture(scope="module")
def prompts(root):
    return stage(root, texts, {"rows": [{"text": t, "label": i % 2} for i, t in enumerate(TEXTS)]})


@pytest.fixture(scope="module")
def samples(root, lm, prompts):
    return stage(root, sampling.sample, dict(n=3, max_new=5, batch=4, filter={"top_p": 0.9}), lm=lm, prompts=prompts)


def content(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_records_are_in_order_and_complete(samples):
    rows = samples.rows("samples.jsonl")
    assert [(r["prompt_id"], r["sample"], r["prompt"]) for r in rows] == [
        (i, j, t) for i, t in enumerate(TEXTS) for j in range(3)
    ]
    assert [r["prompt_label"] for r in rows] == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert all(1 <= len(r["tokens"]) <= 5 and r["logp"] < 0 and r["seconds"] > 0 for r in rows)
    assert sorted(p.name for p in samples.path.iterdir()) == ["DONE", "samples.jsonl", "spec.json"]


def test_a_text_does_not_depend_on_the_batch_or_on_how_many_there_are(root, lm, prompts, samples):
    more = stage(root, sampling.sample, dict(n=4, max_new=5, batch=7, filter={"top_p": 0.9}), lm=lm, prompts=prompts)
    kept = [r for r in more.rows("samples.jsonl") if r["sample"] < 3]
    assert [r["tokens"] for r in kept] == [r["tokens"] for r in samples.rows("samples.jsonl")]


def test_speculation_is_an_option_of_the_filter_that_changes_no_distribution(root, lm, prompts):
    given = dict(n=2, max_new=4, batch=6)
    plain, proposed = (
        stage(root, sampling.sample, given | dict(filter=filter), lm=lm, prompts=prompts)
        for filter in (None, {"speculate": 2})
    )
    assert plain.id != proposed.id
    rows = [artifact.rows("samples.jsonl") for artifact in (plain, proposed)]
    assert [r["tokens"] for r in rows[0]] == [r["tokens"] for r in rows[1]]  # where nothing judges
    chain = sampling.build(lm, filter={"top_p": 0.9, "speculate": 3})
    assert chain.k == 3 and not chain.draft.parts and [type(c) for c in chain.rule.parts] == [truncate.TopP]
    assert sampling.truncation({"top_p": 0.9, "speculate": 3}) == {"top_p": 0.9}
    check_drawn({"filter": {"speculate": 3}}, "a method that reads log-probabilities")
    for filter, words in [
        ({"speculate": 2, "no_repeat_ngram": 2}, "^NoRepeatNgram changes its state with every token"),
        ({"speculate": 2.5}, "speculate is 2.5, expected a whole number"),
        ({"speculate": -1}, "k is -1, expected at least 1"),
    ]:
        with pytest.raises(InputError, match=words):
            stage(root, sampling.sample, given | dict(filter=filter), lm=lm, prompts=prompts)


def test_eight_devices_write_what_one_writes(lm, monkeypatch):
    """13 rows in batches of 8: a row a device, and the last batch is filled up."""
    opened, chain = sampling.opened(lm), sampling.build(lm, filter={"top_p": 0.9})
    found = []
    for devices in ((), tuple(jax.devices())):
        monkeypatch.setattr(layout, "accelerators", lambda devices=devices: devices)
        found.append(
            [
                r
                for part in sampling.complete(*opened, TEXTS * 2 + ["the"] * 7, chain, sampling.Options(batch=8))
                for r in part
            ]
        )
    one, eight = found
    assert len(jax.devices()) == 8 and len(one) == 13
    assert [r["tokens"] for r in eight] == [r["tokens"] for r in one]
    np.testing.assert_allclose([r["logp"] for r in eight], [r["logp"] for r in one], atol=2e-5)


@pytest.mark.parametrize("whole", [1, 2])
def test_interrupted_sampling_goes_on_behind_its_last_whole_batch(tmp_path, lm, prompts, samples, monkeypatch, whole):
    done = [0]
    run = strategies.run

    def dying(*args, **kw):
        done[0] += 1
        if done[0] > whole:
            raise KeyboardInterrupt
        return run(*args, **kw)

    config = dict(n=3, max_new=5, batch=4, filter={"top_p": 0.9})
    monkeypatch.setattr(strategies, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, sampling.sample, config, lm=lm, prompts=prompts)
    (partial,) = tmp_path.glob("sample-*/partial.jsonl")
    with open(partial, "a") as f:
        f.write('{"prompt_id": 1, "sam')  # killed while writing
    calls = []
    monkeypatch.setattr(strategies, "run", lambda *a, **kw: calls.append(1) or run(*a, **kw))
    again = stage(tmp_path, sampling.sample, config, lm=lm, prompts=prompts)
    assert len(calls) == 3 - whole
    assert content(again.rows("samples.jsonl")) == content(samples.rows("samples.jsonl"))


def test_bad_prompts(tmp_path, root, lm):
    empty = stage(root, texts, {"rows": []})
    with pytest.raises(InputError, match="the list of prompts is empty"):
        stage(tmp_path, sampling.sample, {}, lm=lm, prompts=empty)
    long = stage(root, texts, {"rows": [{"text": "the food"}, {"text": "the food was good " * 9}]})
    with pytest.raises(InputError, match=r"prompt 2 has .* context is 32"):
        stage(tmp_path, sampling.sample, {}, lm=lm, prompts=long)
    assert not list(tmp_path.glob("sample-*"))


def test_strengths_and_controls_must_match(lm):
    with pytest.raises(InputError, match="1 strengths were given for 0 controls"):
        sampling.build(lm, [], [1.0])


def test_perplexity_of_a_text_is_that_of_its_log_probability(root, lm, prompts):
    """Without truncation and where texts encode back to their tokens, the scorer sees what the decoder saw."""
    made = stage(root, sampling.sample, dict(n=32, max_new=4), lm=lm, prompts=prompts)
    from ctg_jax.evaluation import LMScorer
    from ctg_jax.run.stage import open_lm

    model, params, tokenizer = open_lm(lm)
    rows = [r for r in made.rows("samples.jsonl") if tokenizer.encode([r["text"]])[0] == r["tokens"]]
    nats, _ = LMScorer(model, params, tokenizer)([r["prompt"] for r in rows], [r["text"] for r in rows])
    assert rows
    np.testing.assert_allclose(nats, [-r["logp"] for r in rows], atol=2e-4)


def test_perplexity_of_human_text_under_a_control(root, lm):
    """By hand from `decode.score`, pooled over all tokens, with and without a control; a control that was trained on
    these texts finds them likelier."""
    from ctg_jax.decode import loop
    from ctg_jax.methods import finetune
    from ctg_jax.run.stage import open_lm
    from ctg_jax.types import Prompts

    rows = [{"text": "the food", "reference": "the food was good"}, {"text": "we", "reference": "we like the room"}]
    data = stage(root, texts, {"rows": rows})
    whole = stage(root, texts, {"rows": [{"text": r["reference"]} for r in rows]})
    training = dict(steps=20, batch=2, tokens=16, rate=1e-2)
    control = finetune.fit(root, lm=lm, data=whole, adapter=dict(rank=2), training=training)
    model, params, tokenizer = open_lm(lm)
    end = [tokenizer.eos]
    values = []
    for controls, strengths in ([], []), ([control], [1.0]):
        nats = count = 0
        for r in rows:
            head = tokenizer.encode([r["text"]])[0]
            tail = tokenizer.encode([r["reference"][len(r["text"]) :]])[0] + end
            ids = np.asarray([head], np.int32)
            prompts = Prompts(ids, np.ones_like(ids, bool), jax.random.split(jax.random.key(0), 1))
            chain = sampling.build(lm, controls, strengths)
            nats -= float(loop.score(model, params, prompts, np.asarray([tail], np.int32), chain).sum())
            count += len(tail)
        settings = {"strengths": strengths, "resamples": 20}
        (row,) = stage(root, sampling.human_perplexity, settings, lm=lm, data=data, controls=controls).metrics()
        assert row["name"] == "human_perplexity"
        np.testing.assert_allclose(row["value"], np.exp(nats / count), rtol=1e-5)
        values.append(row["value"])
    assert values[1] < 0.9 * values[0]


def test_perplexity_of_human_text_under_a_control_with_prompts_of_its_own(root, lm):
    """By hand: the description before each prompt, as in sampling."""
    from ctg_jax.decode import loop
    from ctg_jax.run.stage import open_lm
    from ctg_jax.types import Prompts

    rows = [{"text": "the food", "reference": "the food was good"}, {"text": "we", "reference": "we like the room"}]
    data = stage(root, texts, {"rows": rows})
    init = {"descriptions": ["bad. "], "alpha": 5.0}
    control = stage(root, made, {"method": "self_debias", "init": init}, lm=lm)
    model, params, tokenizer = open_lm(lm)
    nats = count = 0
    for r in rows:
        ids = np.asarray(tokenizer.encode([r["text"]]), np.int32)
        tail = tokenizer.encode([r["reference"][len(r["text"]) :]])[0] + [tokenizer.eos]
        cond = sampling.conditions([control], lm, [r["text"]])
        prompts = Prompts(ids, np.ones_like(ids, bool), jax.random.split(jax.random.key(0), 1), cond)
        chain = sampling.build(lm, [control], [5.0])
        nats -= float(loop.score(model, params, prompts, np.asarray([tail], np.int32), chain).sum())
        count += len(tail)
    settings = {"strengths": [5.0], "resamples": 20}
    (row,) = stage(root, sampling.human_perplexity, settings, lm=lm, data=data, controls=[control]).metrics()
    np.testing.assert_allclose(row["value"], np.exp(nats / count), rtol=1e-5)


def test_partial_rows_are_cut_back_to_whole_batches(tmp_path):
    run = Run(tmp_path)
    rows = [{"x": i} for i in range(5)]
    path = run.path / "partial.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"x":')
    assert io.whole_batches(path, 2, 9) == rows[:4]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert io.whole_batches(path, 2, 5) == rows
