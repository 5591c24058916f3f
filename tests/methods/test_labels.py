"""Records without a label (missing, null, or -1 as in the test split of SST-2) are left out and counted, everywhere."""

import logging

import jax
import numpy as np
import pytest

from ctg_jax.data.labels import is_label, labelled
from ctg_jax.learn import attributes, embeddings, masked_classifier, next_classifier
from ctg_jax.methods import cav, ctrl, diffusion_lm, finetune, lm_steer, mdlm, pplm, steer
from ctg_jax.rewards import BagOfWords, LinearProbe
from ctg_jax.run.stage import stage, write_jsonl
from ctg_jax.stages import judges, sources
from ctg_jax.studies.label_transfer import binary_labels
from ctg_jax.types import InputError

GOOD, BAD = "good good fun", "bad awful sad"


def records(run, *, rows, name="data.jsonl"):
    write_jsonl(run.path / name, rows)


def rows(unlabelled=4):
    """Six texts of each class, and others with no label, of each kind."""
    labelled = [{"text": f"{t} day {i}", "label": y} for i in range(6) for y, t in enumerate((BAD, GOOD))]
    none = [{"text": GOOD, "label": -1}, {"text": BAD}, {"text": "a day", "label": None}, {"text": "x", "label": -1.0}]
    return labelled[:5] + none[:unlabelled] + labelled[5:]


def embed(texts):
    return np.asarray([[t.count("good"), t.count("bad"), len(t) / 20] for t in texts], np.float32)


@pytest.fixture
def counted(caplog):
    """Whether exactly one warning was logged that counts the texts without a label."""
    caplog.set_level(logging.WARNING, logger="ctg_jax")

    def check(count, total):
        found = [r.getMessage() for r in caplog.records if "no label" in r.getMessage()]
        caplog.clear()
        assert [f"{count} of {total} texts have no label" in m for m in found] == [True], found

    return check


def test_what_is_a_label():
    assert [is_label(x) for x in (0, 1, 7, "positive", 0.5)] == [True] * 5
    assert [is_label(x) for x in (-1, -1.0, None, float("nan"))] == [False] * 4


@pytest.mark.parametrize("kind", [LinearProbe, BagOfWords])
def test_probes_learn_from_labelled_texts_alone(kind, counted):
    texts, labels = [r["text"] for r in rows()], [r.get("label") for r in rows()]
    kept = labelled(rows(), "x")
    counted(4, 16)
    fit = lambda *a: kind.fit(*((embed,) if kind is LinearProbe else ()), *a)  # noqa: E731
    found, wanted = fit(texts, labels), fit([r["text"] for r in kept], [r["label"] for r in kept])
    counted(4, 16)
    assert found.classes == [0, 1] and found.version == wanted.version
    with pytest.raises(InputError, match="none of the 2 texts has a label"):
        fit(["a", "b"], [-1, -1])


def test_the_accuracy_of_a_judge_is_over_labelled_texts(tmp_path, counted):
    data = stage(tmp_path, records, {"rows": rows(0)})
    heldout = stage(tmp_path, records, {"rows": rows()})
    judge = stage(tmp_path, judges.fit_judge, {"kind": "bag"}, data=data, heldout=heldout)
    counted(4, 16)
    (row,) = judge.metrics()
    assert row["accuracy"] == 1 and row["heldout"] == 12
    same = stage(tmp_path, judges.fit_judge, {"kind": "bag"}, data=heldout)
    assert same.metrics()[0]["version"] == row["version"]


def test_a_balanced_sample_of_the_data_has_no_class_of_unlabelled_records(tmp_path, caplog):
    file = tmp_path / "x.jsonl"
    write_jsonl(file, rows())
    settings = dict(source=f"jsonl:{file}", split="all", balance="label", limit=3)
    found = stage(tmp_path, sources.load_data, settings).rows("data.jsonl")
    assert sorted(r["label"] for r in found) == [0, 0, 0, 1, 1, 1]
    assert "4 records have no label" in caplog.text


def test_steering_reads_labelled_texts_alone(counted):
    with_, without = steer.sides(rows(), 1, False, "x")
    counted(4, 16)
    assert len(with_) == len(without) == 6 and all(GOOD in t for t in with_) and all(BAD in t for t in without)


def test_lm_steer_and_classes(counted):
    assert {r["value"] for r in lm_steer.valued(rows(), (-1.0, 1.0), "x")} == {-1.0, 1.0}
    counted(4, 16)
    with pytest.raises(InputError, match="label of record 1 of x is 7, but there are 2 classes: expected 0 to 1"):
        labelled([{"label": 1}, {"label": 7}], "x", classes=2)
    with pytest.raises(InputError, match=r"label of record 0 of x is 0\.7"):
        labelled([{"label": 0.7}], "x", classes=2)


@pytest.mark.parametrize("learns", [next_classifier.next_classifier, pplm.pplm], ids=["next token", "pplm"])
def test_a_classifier_needs_texts_of_every_class(small, learns):
    root, lm, _ = small
    data = stage(root, records, {"rows": [r for r in rows(0) if r["label"] == 1]})
    with pytest.raises(InputError, match=r"none of the 6 labelled texts has the label 0, but a classifier of 2"):
        stage(root, learns, {}, lm=lm, data=data)


def test_a_classifier_of_partly_masked_rows_has_classes_of_its_own_number():
    labels = lambda *found: [{"label": label} for label in found]  # noqa: E731
    assert masked_classifier.texts(labels(0, None, 2, 1), "x", None) == (labels(0, 2, 1), 3)
    assert masked_classifier.texts(labels(None), "x", None) == (labels(None), 0)
    assert masked_classifier.texts(labels(0, 0), "x", 0) == (labels(0, 0), 0)
    for found, message in (((0, 0), "and there is 1"), ((1, 0.7), r"record 1 of x is 0\.7"), (("up",), "is 'up'")):
        with pytest.raises(InputError, match=message):
            masked_classifier.texts(labels(*found), "x", None)


@pytest.mark.parametrize("method", [ctrl, finetune, cav], ids=lambda m: m.__name__.rpartition(".")[2])
def test_training_on_records_of_which_some_have_no_label(small, method, counted):
    root, lm, _ = small
    data, clean = (stage(root, records, {"rows": r}) for r in (rows(), rows(0)))
    sizes = dict(batch=4, tokens=12)
    training = dict(sizes, steps=2)
    prompts = dict(adapter=dict(kind="prompt"), choices=2, length=2, training=training)
    codes = dict(adapter=dict(rank=2), training=training)
    settings = {ctrl: codes, finetune: prompts, cav: sizes}[method]
    found = method.fit(root, lm=lm, data=data, **settings).load()
    counted(4, 16)
    jax.tree.map(np.testing.assert_array_equal, found, method.fit(root, lm=lm, data=clean, **settings).load())
    if method is not cav:
        seven = stage(root, records, {"rows": [*rows(0), {"text": "x", "label": 7}]})
        with pytest.raises(InputError, match=r"label of record 12 of .* is 7, but there are 2 classes"):
            method.fit(root, lm=lm, data=seven, **settings)


def test_classifiers_of_diffusion_models(small, counted):
    root, lm, _ = small
    data = stage(root, records, {"rows": rows()})
    shape = dict(width=8, depth=1, heads=2, length=8, training=dict(steps=1, batch=2))
    network = stage(root, mdlm.mdlm, shape, lm=lm, data=data)
    found = stage(
        root,
        mdlm.classifier,
        dict(regression=dict(views=1, margin=-1.0, heldout=0.2)),
        lm=lm,
        data=data,
        network=network,
    )
    counted(4, 16)
    assert found.spec["init"]["classes"] == 2
    few = dict(views=1, margin=-1.0, heldout=0.5, limit=8)
    fewer = stage(root, mdlm.classifier, dict(regression=few), lm=lm, data=data, network=network)
    assert [f.metrics()[-1]["heldout"] for f in (found, fewer)] == [2, 4], "a fifth of 12 texts, half of 8"
    counted(4, 16)
    none = stage(root, records, {"rows": [{"text": "a day", "label": -1}] * 3})
    found = stage(root, mdlm.classifier, dict(regression=dict(views=1)), lm=lm, data=none, network=network)
    assert found.spec["init"]["classes"] == 0
    words = stage(root, diffusion_lm.diffusion_lm, {**shape, "dim": 4}, lm=lm, data=data)
    hp = dict(fields={"label": 2}, reader_width=8, reader_depth=1, training=dict(steps=1, batch=2))
    stage(root, diffusion_lm.classifier, hp, lm=lm, data=data, network=words)
    counted(4, 16)


def test_probes_of_latents_and_transfer(small, counted, tmp_path):
    root, lm, _ = small
    data = stage(root, records, {"rows": rows()})
    encoded = stage(root, embeddings.encode, dict(words=1), lm=lm, data=data)
    kept = len(encoded.rows("pieces.jsonl"))
    none = sum(not is_label(r.get("label")) for r in encoded.rows("pieces.jsonl"))
    probe = stage(root, attributes.fit_attribute, {"name": "positive"}, latents=encoded)
    counted(none, kept)
    assert probe.metrics()[0]["share"] == pytest.approx(0.5)
    with pytest.raises(InputError, match=r"none of the .* texts has a label"):
        stage(root, attributes.fit_attribute, {"name": "positive", "field": "mood"}, latents=encoded)
    labels = binary_labels(rows(), data)
    counted(4, 16)
    assert labels.count(None) == 4 and labels.count(1) == labels.count(0) == 6
