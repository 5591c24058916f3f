"""Correctors: the law of pairs by hand, likeness, templates, groups and what is restored, the optimum on a pool that is
fixed, both kinds of fit, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods, rewards
from ctg_jax.controls.delta import Delta
from ctg_jax.learn import experience
from ctg_jax.learn.improving import improving, law
from ctg_jax.learn.pool import Pool
from ctg_jax.learn.preferences import likeness
from ctg_jax.learn.revision import corrected, filled, groups, restored, revise
from ctg_jax.learn.rounds import history
from ctg_jax.methods import correct
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_artifact, open_lm, stage, write_jsonl
from ctg_jax.stages import judges, sampling
from ctg_jax.types import InputError

VALUES = [0.2, 0.5, 0.9]
LIKE = np.array([[1, 0.8, 0.1], [0.8, 1, 0.2], [0.1, 0.2, 1]])
SMALL = dict(adapter=dict(rank=2), training=dict(steps=2, batch=4, warmup=1))


def written(run, *, rows):
    write_jsonl(run.path / "samples.jsonl", rows)


def test_the_law_of_pairs_by_hand():
    """exp(.3 + .8) against exp(.7 + .1) from the first; from the second only one is better; the best has none."""
    found = law(VALUES, LIKE, 1.0, 1.0)
    np.testing.assert_allclose(found, [[0, 0.5744, 0.4256], [0, 0, 1], [0, 0, 0]], atol=5e-5)
    np.testing.assert_allclose(law(VALUES, LIKE, 1000.0, 0.0)[0], [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(law(VALUES, LIKE, 0.0, 0.0)[0], [0, 0.5, 0.5])


def test_pairs_are_drawn_from_the_law_within_prompts():
    asked = []

    def similarity(i, j):
        asked.append((i, j))
        return LIKE[i % 3, j % 3]

    first, second = improving(VALUES * 2 + [0.1], [0, 0, 0, 1, 1, 1, 2], similarity, draws=4000)
    assert set(asked) == {(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)}  # no pair across prompts
    assert np.mean(second[first == 0] == 1) == pytest.approx(0.5744, abs=0.03)
    assert set(second[first == 4].tolist()) == {5} and 6 not in first
    first, second = improving(VALUES, [0] * 3, similarity, draws=10, keep=0.2)
    assert (first[-4:] == second[-4:]).all() and set(first[-4:].tolist()) == {2} and len(first) == 24


def test_likeness_by_hand():
    assert likeness(["a", "b", "c"], ["a", "x", "c", "d"]) == 0.5  # one replaced, one inserted, of four
    assert likeness([], []) == likeness(["a"], ["a"]) == 1 and likeness(["a"], []) == likeness([], ["a"]) == 0


def test_the_optimum_on_a_fixed_pool_is_the_law():
    """Two hypotheses; the better texts of the first in the proportions of the law. A change of all weights."""
    lm = worlds.tiny(vocab=5, depth=1)
    params, rows = worlds.lively(lm, factor=4), [[1, 2], [2, 1], [3, 4]]
    p = law(VALUES, LIKE, 1.0, 1.0)
    counts = [(0, 1, round(100 * p[0, 1])), (0, 2, round(100 * p[0, 2])), (1, 2, 100)]
    head = np.array([rows[i] for i, _, n in counts for _ in range(n)])
    tail = np.array([rows[j] for _, j, n in counts for _ in range(n)])
    batch = {"tokens": head, "mask": np.ones(head.shape, bool), "completion": tail}
    batch |= {"written": np.ones(tail.shape, bool), "ids": np.arange(len(head))}
    batch = {key: jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else bool) for key, x in batch.items()}
    start = correct.init(lm, jax.random.key(0), kind="full")
    fitted, _ = worlds.trained(correct.loss(lm), start, {"params": params}, [batch] * 200, trained="changes/.*")
    found = worlds.enumerate_all(lm, params, rows[0], 2, fitted)
    assert p[0, 1] * np.log(p[0, 1] / found[2, 1]) + p[0, 2] * np.log(p[0, 2] / found[3, 4]) < 0.03
    assert worlds.enumerate_all(lm, params, rows[1], 2, fitted)[3, 4] > 0.97


def test_templates_hold_the_drafts_and_the_prompt():
    assert filled("{drafts}\n=>{prompt}", "so", [" bad"]) == "so bad\n=>so"
    assert filled("{drafts} = {prompt}", "a", [" b", " c"]) == "a b\na c = a"
    for template, words in [
        ("{prompt}", "lacks {drafts}"),
        ("{drafts} {text}", "names 'text', expected {drafts} and {prompt}"),
        ("{drafts", "is malformed"),
    ]:
        with pytest.raises(InputError, match=words):
            filled(template, "a", ["b"])


def test_revisions_keep_the_prompt_and_its_number(tmp_path):
    def row(prompt_id, sample, text, prompt):
        return dict(prompt_id=prompt_id, sample=sample, prompt=prompt, text=text, tokens=[1], prompt_label=7)

    rows = [row(4, 0, " x", "a"), row(4, 1, " y", "a"), row(9, 0, " z", "b"), row(9, 1, " w", "b")]
    samples = stage(tmp_path, written, {"rows": rows})
    prompts = stage(tmp_path, revise, {}, samples=samples)
    assert [r["prompt"] for r in prompts.rows("data.jsonl")] == ["a x\n=>a", "a y\n=>a", "b z\n=>b", "b w\n=>b"]
    new = [dict(prompt_id=i, sample=0, prompt="?", text=f" {i}", tokens=[i], logp=-1.0) for i in range(4)]
    drawn = stage(tmp_path, written, {"rows": new})
    given = dict(lm=drawn, samples=samples, prompts=prompts, revised=drawn)
    found = stage(tmp_path, restored, {}, **given).rows("samples.jsonl")
    kept = [(r["prompt_id"], r["sample"], r["prompt"], r["text"], r["draft"], r["prompt_label"]) for r in found]
    assert kept == [
        (4, 0, "a", " 0", " x", 7), (4, 1, "a", " 1", " y", 7), (9, 0, "b", " 2", " z", 7), (9, 1, "b", " 3", " w", 7)
    ]  # fmt: skip
    both = stage(tmp_path, revise, {"drafts": 2}, samples=samples).rows("data.jsonl")
    assert [r["prompt"] for r in both] == ["a x\na y\n=>a", "b z\nb w\n=>b"]
    orders = {tuple(map(tuple, groups(rows, 2, seed))) for seed in range(20)}
    assert len(orders) == 4 and all(sorted(group) in ([0, 1], [2, 3]) for order in orders for group in order)


def test_a_corrector_learns_in_rounds_and_turns_revise(small, monkeypatch):
    root, lm, data = small
    letters = rewards.TextReward("letters", "1", lambda rows: [len(set(r)) + len(r) / 100 for r in rows])
    monkeypatch.setattr(experience, "open_judge", lambda artifact: letters)
    judge = stage(root, judges.fit_judge, {"kind": "oracle"})
    explore = dict(n=3, max_new=4, batch=9)
    learned = correct.fit(root, lm=lm, data=data, rewards=[judge], rounds=2, explore=explore, **SMALL)
    control = methods.load(learned, open_lm(lm)[0])
    assert isinstance(control, Delta) and any(np.any(c["b"] != 0) for c in control.changes.values())
    assert len(learned.spec["inputs"]["pool"]) == 2 and learned.spec["inputs"]["start_from"]
    second = history(learned)[1]
    revised = open_artifact(root / f"restored-{second.spec['inputs']['samples']}").rows("samples.jsonl")
    found = Pool.open([second])
    assert found.column("logp").tolist() == [r["logp"] for r in revised]  # behind the prompt that holds a draft
    assert np.abs(found.column("logp") - found.column("base")).max() > 1e-2
    samples = stage(root, sampling.sample, dict(n=2, max_new=4), lm=lm, prompts=data)
    given = dict(lm=lm, corrector=learned, samples=samples, max_new=4)
    assert corrected(root, **given, turns=0) is samples
    once, twice = (corrected(root, **given, turns=turns).rows("samples.jsonl") for turns in (1, 2))
    assert [(r["prompt_id"], r["sample"]) for r in once] == [(r["prompt_id"], r["sample"]) for r in twice]
    assert [r["draft"] for r in twice] == [r["text"] for r in once]
    assert {r["prompt"] for r in once} == {r["prompt"] for r in samples.rows("samples.jsonl")}


def test_a_combiner_learns_what_people_wrote(small, tmp_path):
    root, lm, _ = small
    rows = [{"text": f"{a} good fun", "prompt": a} for a in ("so", "bad")]

    def texts(run, *, rows):
        write_jsonl(run.path / "data.jsonl", rows)

    data, tokenizer = stage(root, texts, {"rows": rows}), open_lm(lm)[2]
    samples = stage(root, sampling.sample, dict(n=4, max_new=8), lm=lm, prompts=data)
    made = correct.combined(samples, data, tokenizer, correct.Pairs(drafts=2))
    assert len(made) == 4 and all(r["prompt"].endswith("\n=>so") for r in made[:2])
    assert all(" good fun".startswith(text) and text for text in tokenizer.decode([r["tokens"] for r in made]))
    learned = correct.fit(
        root, lm=lm, data=data, kind="combine", explore=dict(n=2, max_new=8), pairs=dict(drafts=2), **SMALL
    )
    assert methods.load(learned, open_lm(lm)[0]).changes


def test_bad_input_raises_one_sentence(small, tmp_path):
    root, lm, data = small
    with pytest.raises(InputError, match="kind is 'fix', expected 'correct' or 'combine'"):
        correct.fit(root, lm=lm, data=data, kind="fix")
    with pytest.raises(InputError, match="rounds is 0, expected at least 1"):
        correct.fit(root, lm=lm, data=data, rounds=0)
    with pytest.raises(InputError, match="no reward was given: a corrector of kind 'correct' learns from one"):
        correct.fit(root, lm=lm, data=data, explore=dict(n=2, max_new=3))
    with pytest.raises(InputError, match="none of the 3 texts has a better one of its prompt"):
        improving([1, 1, 1], [0, 0, 0], lambda i, j: 1.0)
    with pytest.raises(InputError, match="draws is 0 and keep is 0"):
        improving([1, 2], [0, 0], lambda i, j: 1.0, draws=0)
    samples = stage(root, sampling.sample, dict(n=3, max_new=3), lm=lm, prompts=data)
    with pytest.raises(InputError, match="drafts is 2, expected a divisor of 3"):
        stage(root, revise, {"drafts": 2}, samples=samples)
    with pytest.raises(InputError, match="turns is 2 with 3 drafts"):
        corrected(root, lm=lm, corrector=None, samples=samples, turns=2, drafts=3)


def test_the_sizes_of_the_paper_fit_on_paper():
    large = Transformer.gpt2(width=1280, depth=4, heads=20)
    assert worlds.written_on_paper(large, lambda key: correct.init(large, key)).tokens.shape == (1, 2)
