"""What latent vectors are for: figures by hand, and the experiment in its tiny world, where nothing runs twice."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax import evaluation, methods
from ctg_jax.decode import loop
from ctg_jax.evaluation.agreement import bleu, spearman
from ctg_jax.learn.pretrain import pretrain
from ctg_jax.methods import latent_steer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sources
from ctg_jax.studies import latents
from ctg_jax.studies.label_transfer import direction, offset
from ctg_jax.studies.sentence_pairs import sentences_of_pairs, similarity
from ctg_jax.studies.vectors import open_vectors
from ctg_jax.types import InputError, Prompts
from experiments import cli
from experiments import latents as script

CONFIG = Path(__file__).parents[2] / "configs" / "latents.py"


def test_bleu_is_sacrebleus():
    from sacrebleu.metrics import BLEU

    said = ["the food was good and the staff was nice", "we will not come back here again", "fine"]
    wanted = ["the food was good and the staff was rude", "we will never come back here again", "fine food"]
    found = bleu(said, wanted, resamples=50)
    assert found.value == pytest.approx(BLEU().corpus_score(said, [wanted]).score)
    assert found.low <= found.value <= found.high and found.n == 3
    assert bleu(wanted, wanted, resamples=20).value == pytest.approx(100)


def test_spearman_by_hand():
    """Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 − 6 · 4 / (5 · 24) = 0.8."""
    found = spearman(np.arange(5.0), np.array([2.0, 1, 4, 3, 5]), resamples=20)
    assert found.value == pytest.approx(80)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(root, lm, sentences with labels, a file of pairs)."""
    root = tmp_path_factory.mktemp("latents")
    rows = [{"text": text, "label": y} for y, texts in enumerate(("abc", "xyz")) for text in texts]
    (root / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (root / "pairs.csv").write_text("".join(f"good {a},bad {b},{i}\n" for i, (a, b) in enumerate(zip("abcd", "bbce"))))
    data = stage(root, sources.load_data, dict(source=f"jsonl:{root / 'texts.jsonl'}", split="all"))
    shape = dict(
        vocab=270, width=16, depth=1, heads=2, context=64, training=dict(tokens=16, batch=4, steps=2, warmup=1)
    )
    return root, stage(root, pretrain, shape, data=data), data, root / "pairs.csv"


def test_transfer_moves_by_the_difference_of_the_means(world):
    root, lm, data, _ = world
    vectors = latent_steer.fit(root, lm=lm, data=data, site="final", end=False, search=dict(updates=150, rate=0.3))
    assert all(r["recovered"] for r in vectors.metrics()), "a state after the last norm says any one letter"
    z = np.asarray(vectors.load()["z"])
    np.testing.assert_allclose(offset(lm, data, vectors, 3), z[3:].mean(0) - z[:3].mean(0), rtol=1e-5, atol=1e-6)
    recovered = stage(root, latents.recover, {}, lm=lm, data=data, vectors=vectors)
    figures = {r["name"]: r["value"] for r in recovered.metrics()}
    assert figures["exact match"] == 1 and figures["recovered"] == 1
    assert [r["text"] for r in recovered.rows("samples.jsonl")] == [r["text"] for r in data.rows("data.jsonl")]
    way = stage(root, direction, dict(count=3), lm=lm, train=data, vectors=vectors)
    model, params, _ = open_lm(lm)
    control = methods.load(way, model)
    np.testing.assert_allclose(control.z, z[3:].mean(0) - z[:3].mean(0), rtol=1e-5, atol=1e-6)
    prompt = Prompts(jnp.array([[3, 4]]), jnp.ones((1, 2), bool), jax.random.split(jax.random.key(0), 1))
    plain = loop.forward(model, params, prompt, jnp.array([[5]]))
    twice = loop.forward(model, params, prompt, jnp.array([[5]]), methods.with_strength(control, 2.0))
    moved = 2 * np.asarray(control.z) @ np.asarray(params["embed"]["tokens"]).T  # after the last norm: z = E h
    np.testing.assert_allclose((twice - plain)[0, 0], moved, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="count is 4, but only 3 sentences of label 0"):
        offset(lm, data, vectors, 4)


def test_similarity_measures_every_representation(world):
    root, lm, _, pairs = world
    sentences = stage(root, sentences_of_pairs, dict(file=str(pairs)))
    assert [r["text"] for r in sentences.rows("data.jsonl")][:2] == ["good a", "bad b"]
    vectors = latent_steer.fit(root, lm=lm, data=sentences, search=dict(updates=3))
    found = stage(root, similarity, dict(resamples=20), lm=lm, pairs=sentences, vectors=vectors)
    names = [r["name"] for r in found.metrics()]
    states = [f"{how}, site {s}" for how in ("mean of states", "last state") for s in range(3)]
    assert names == ["z", "z centred", *states]
    assert all(-100 <= r["value"] <= 100 for r in found.metrics())
    z, records = np.asarray(open_vectors(lm, vectors)[0].z), sentences.rows("data.jsonl")
    apart = z - z.mean(0)
    scores = np.asarray([r["score"] for r in records[::2]])
    by_hand = evaluation.spearman(evaluation.cosine(apart[::2], apart[1::2]), scores, 20)
    assert found.metrics()[1]["value"] == pytest.approx(by_hand.value)


def test_a_file_of_no_pairs_is_refused(world, tmp_path):
    (tmp_path / "bad.csv").write_text("one,two\n")
    for file, message in (
        (tmp_path / "bad.csv", "is no CSV of first sentence"),
        (tmp_path / "none.csv", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            stage(tmp_path, sentences_of_pairs, dict(file=str(file)))


def test_some_of_the_pairs_come_from_all_of_the_file(tmp_path):
    """A corpus lists one source after another, so the first pairs would be of one kind."""
    file = tmp_path / "pairs.csv"
    file.write_text("".join(f"one {i},two {i},{i / 2}\n" for i in range(7)))

    def kept(limit):
        rows = stage(tmp_path, sentences_of_pairs, dict(file=str(file), limit=limit)).rows("data.jsonl")
        numbers = [int(2 * r["score"]) for r in rows[::2]]
        assert [r["text"] for r in rows] == [f"{side} {i}" for i in numbers for side in ("one", "two")]
        return numbers

    assert kept(3) == [0, 2, 4] and kept(2) == [0, 3] and kept(9) == kept(None) == list(range(7))
    with pytest.raises(InputError, match="limit is 0, expected at least 1 pair"):
        kept(0)


@pytest.mark.slow
def test_the_tiny_experiment_runs_and_runs_nothing_twice(tmp_path, capsys):
    argv = [f"--config={CONFIG}:tiny", f"--root={tmp_path}"]
    assert cli.run(script.main, argv) == 0
    pages = [Path(p) for p in capsys.readouterr().out.split()]
    assert [p.parent.name for p in pages] == ["recovery", "analysis", "reconstruction"]
    assert all(p.exists() for p in pages)
    assert (pages[0].parent / "recovery.png").exists() and (pages[1].parent / "principal.png").exists()
    assert cli.run(script.main, argv) == 0
    assert "stages: 0 executed" in capsys.readouterr().err
    assert cli.run(script.main, [*argv, "--sections=recover"]) == 2
    assert "recover" in capsys.readouterr().err


def test_random_words_keep_lengths_and_words(world):
    root, _, _, pairs = world
    data = stage(root, sentences_of_pairs, dict(file=str(pairs)))
    texts = [r["text"] for r in data.rows("data.jsonl")]
    found = [r["text"] for r in stage(root, latents.random_words, {}, data=data).rows("data.jsonl")]
    assert [len(t.split()) for t in found] == [len(t.split()) for t in texts]
    assert {w for t in found for w in t.split()} <= {w for t in texts for w in t.split()}
    assert found != texts
