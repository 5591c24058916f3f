"""A classifier trained from an encoder: it learns, resumes to the same bits, and transformers reads its files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.learn.classifier import classifier
from ctg_jax.models import encoder as encoders
from ctg_jax.models import hf
from ctg_jax.rewards import SequenceClassifier
from ctg_jax.rewards.embed import load_text_encoder
from ctg_jax.run.stage import stage, write_jsonl
from ctg_jax.stages import judges
from ctg_jax.types import InputError
from tests.experiments.tiny_encoder import BERT, WORDS, write_encoder

GOOD, BAD = WORDS[8:11], WORDS[11:]
TRAINING = dict(steps=40, batch=16, tokens=8, rate=1e-2, warmup=2, log_every=1, save_every=10)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    frames = [f"{a} {b} {c} {d} {{}}" for a in WORDS[:2] for b in WORDS[2:4] for c in WORDS[4:6] for d in WORDS[6:8]]
    out = []
    for i in range(count):
        label = i % 2
        out.append({"text": str(rng.choice(frames)).format(rng.choice(GOOD if label else BAD)), "label": label})
    return out


def texts(run, *, rows):
    write_jsonl(run.path / "data.jsonl", rows)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(root, encoder):
    data = [stage(root, texts, {"rows": rows(40, seed)}) for seed in (0, 1)]
    return stage(root, classifier, dict(encoder=encoder, labels=["poor", "good"], training=TRAINING), data=data)


def weights(artifact):
    return hf.load_encoder(artifact.path / "state" / "classifier")[1]


def test_it_learns_separable_labels_and_judges(root, trained):
    log = trained.metrics()
    assert log[-1]["loss"] < 0.1 < log[0]["loss"] and log[-1]["accuracy"] == 1
    assert trained.spec["texts"] == [40, 40] and not (trained.path / "steps").exists()
    heldout = stage(root, texts, {"rows": rows(20, 2)})
    judge = stage(root, judges.fit_judge, {"kind": "classifier", "target": "good"}, encoder=trained, heldout=heldout)
    (row,) = judge.metrics()
    assert (row["accuracy"], row["auc"], row["heldout"]) == (1.0, 1.0, 20)
    opened = judges.open_judge(judge)
    assert opened.labels == ("poor", "good") and opened.version.startswith("classifier@")
    scores = opened([""] * 2, ["the food was so kind", "the food was so rude"])
    assert scores[0] > 0.9 and scores[1] < 0.1
    (more,) = stage(root, judges.heldout, {"name": "twenty"}, judge=judge, data=heldout).metrics()
    assert more == {"name": "twenty", "accuracy": 1.0, "auc": 1.0, "heldout": 20}


def test_all_weights_learn_and_the_pooler_is_kept(encoder):
    """The head begins with BERT's pooler, whose weights the encoder has; the last layer is new."""
    plain, params = hf.load_encoder(encoder)
    model, begun = encoders.classifier(plain, params, ("a", "b", "c"), jax.random.key(1))
    np.testing.assert_array_equal(begun["head"]["dense"]["kernel"], params["head"]["dense"]["kernel"])
    assert begun["head"]["out"]["kernel"].shape == (3, 16) and "project" not in begun
    assert model.classify(begun, jnp.ones((2, 3), int), jnp.ones((2, 3), bool)).shape == (2, 3)


def test_every_weight_that_texts_reach_changes(trained, encoder):
    before = jax.tree_util.tree_leaves_with_path(hf.load_encoder(encoder)[1]["layers"])
    after = jax.tree.leaves(weights(trained)["layers"])
    same = [jax.tree_util.keystr(path) for (path, x), y in zip(before, after, strict=True) if np.array_equal(x, y)]
    assert not same


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, root, trained, encoder, monkeypatch):
    from ctg_jax.learn import train

    data = [stage(tmp_path, texts, {"rows": rows(40, seed)}) for seed in (0, 1)]
    settings = dict(encoder=encoder, labels=["poor", "good"], training=TRAINING)
    save = train._Run.save

    def killed(self, state):
        save(self, state)
        if self.at == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(train._Run, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, classifier, settings, data=data)
    monkeypatch.setattr(train._Run, "save", save)
    again = stage(tmp_path, classifier, settings, data=data)
    assert again.id == trained.id and [r["step"] for r in again.metrics()] == list(range(1, 41))
    jax.tree.map(np.testing.assert_array_equal, weights(again), weights(trained))


def test_transformers_reads_the_same_logits(trained):
    torch = pytest.importorskip("torch", reason="torch, which only the comparison with transformers needs, is missing")
    import transformers

    folder = trained.path / "state" / "classifier"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    some = [r["text"] for r in rows(6, 3)]
    with torch.no_grad():
        expected = theirs(**tokenizer(some, return_tensors="pt", padding=True)).logits.numpy()
    encoder, params, encode = load_text_encoder(folder)
    tokens = jnp.asarray(encode(some))
    np.testing.assert_allclose(encoder.classify(params, tokens, jnp.ones(tokens.shape, bool)), expected, atol=1e-5)
    assert theirs.config.id2label == {0: "poor", 1: "good"}
    scores = SequenceClassifier.load(folder, target="good")([""] * 6, some)
    np.testing.assert_allclose(scores, torch.softmax(torch.tensor(expected), 1)[:, 1], atol=1e-5)


def test_bad_input_is_one_sentence(root, encoder, tmp_path):
    two = stage(root, texts, {"rows": rows(8)})
    one = stage(root, texts, {"rows": [{"text": "the food", "label": 1}]})
    three = stage(root, texts, {"rows": [{"text": "the food", "label": 2}, {"text": "a room", "label": 0}]})
    for data, changes, words in (
        ([], {}, "data is empty"),
        ([one], {}, "every text of data has the label 1"),
        ([two, three], {}, "is 2, but there are 2 classes"),
        ([two], {"labels": ["same", "same"]}, "expected the names of two classes or more"),
        ([two], {"training": {**TRAINING, "tokens": 17}}, "the encoder reads at most 16 tokens"),
        ([two], {"encoder": str(tmp_path / "nowhere")}, "there is no such folder"),
    ):
        with pytest.raises(InputError, match=words) as error:
            stage(root, classifier, {"encoder": encoder, "training": TRAINING} | changes, data=data)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="the family 't5' has no classifier"):
        encoders.classifier(dataclasses.replace(BERT, family="t5"), {}, ("a", "b"), jax.random.key(0))
    with pytest.raises(InputError, match="expected what the stage 'classifier' made"):
        stage(root, judges.fit_judge, {"kind": "classifier"}, encoder=two)
