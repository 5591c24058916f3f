"""Data and language models as stages."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.learn.pretrain import pretrain
from ctg_jax.run.session import Session
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sources
from ctg_jax.types import InputError
from experiments import inputs


@pytest.fixture
def corpus(tmp_path):
    rows = [{"text": f"number {i} of the words in a row", "label": i % 3} for i in range(12)] + [{"text": "short"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return f"jsonl:{tmp_path / 'c.jsonl'}"


def loaded(tmp_path, source, **config):
    return stage(tmp_path / "runs", sources.load_data, {"source": source, "split": "all", **config}).rows("data.jsonl")


def test_selection_of_records(tmp_path, corpus):
    assert len(loaded(tmp_path, corpus)) == 13
    assert [r["text"][7] for r in loaded(tmp_path, corpus, where={"label": 1}, limit=2, skip=1)] == ["4", "7"]
    balanced = loaded(tmp_path, corpus, balance="label", limit=2)
    assert [r.get("label") for r in balanced] == [0, 1, 2, 0, 1, 2]  # the one without a label is no class


def test_prompts_are_the_first_words(tmp_path, corpus):
    rows = loaded(tmp_path, corpus, words=3, limit=2)
    assert [r["text"] for r in rows] == ["number 0 of", "number 1 of"]
    assert rows[0]["reference"] == "number 0 of the words in a row"


def test_nothing_matches(tmp_path, corpus):
    with pytest.raises(InputError, match=r"has no record with \{'label': 9\}"):
        loaded(tmp_path, corpus, where={"label": 9})
    assert not list((tmp_path / "runs").glob("load_data-*"))


def test_pretraining_lowers_the_loss_and_gives_an_lm(tmp_path, corpus):
    data = stage(tmp_path, sources.load_data, {"source": corpus, "split": "all"})
    config = dict(
        vocab=280,
        width=16,
        depth=2,
        heads=2,
        context=32,
        training=dict(tokens=16, batch=4, steps=40, warmup=4, log_every=1, rate=1e-2),
    )
    lm = stage(tmp_path, pretrain, config, data=data)
    losses = [row["loss"] for row in lm.metrics()]
    assert len(losses) == 40 and losses[-1] < 0.6 * losses[0]
    model, params, tokenizer = open_lm(lm)
    assert model.context == 32 and model.vocab == tokenizer.vocab <= 280
    assert tokenizer.decode(tokenizer.encode(["number 3 of"])) == ["number 3 of"]
    tokens = jnp.asarray(tokenizer.encode(["number 3 of the words in a row"]))
    z = model.apply(params, model.embed(params, tokens), jnp.ones(tokens.shape, bool)).logits
    nll = -jax.nn.log_softmax(z)[0, jnp.arange(tokens.shape[1] - 1), tokens[0, 1:]]
    np.testing.assert_array_less(nll.mean(), losses[0])
    assert sorted(p.name for p in lm.path.iterdir()) == ["DONE", "metrics.jsonl", "spec.json", "state"]
    session = Session(tmp_path)
    assert stage(session, pretrain, config, data=data) == lm
    assert not session.tally.executed


def test_an_untied_lm_of_texts_in_rows_of_their_own(tmp_path, corpus):
    data = stage(tmp_path, sources.load_data, {"source": corpus, "split": "all"})
    training = dict(tokens=16, batch=4, steps=2, warmup=1, log_every=1)
    shape = dict(vocab=280, width=16, depth=1, heads=2, context=32, training=training)
    lm = stage(tmp_path, pretrain, dict(shape, tied=False, pack=False), data=data)
    model, params, _ = open_lm(lm)
    assert not model.tied and params["head"]["kernel"].shape == params["embed"]["tokens"].shape
    packed = stage(tmp_path, pretrain, shape, data=data)
    assert open_lm(packed)[0].tied
    tokens = [[row["weight"] for row in artifact.metrics()] for artifact in (packed, lm)]
    assert max(tokens[0]) == 4 * 15 and max(tokens[1]) < 4 * 15  # full rows of 16 where packed


def test_a_width_that_heads_do_not_divide(tmp_path, corpus):
    data = stage(tmp_path, sources.load_data, {"source": corpus, "split": "all"})
    with pytest.raises(InputError, match="width is 10"):
        stage(tmp_path, pretrain, dict(width=10, heads=4), data=data)


def test_an_artifact_that_is_no_lm(tmp_path, corpus):
    with pytest.raises(InputError, match="is no language model"):
        open_lm(stage(tmp_path, sources.load_data, {"source": corpus, "split": "all"}))


def test_the_text_may_lie_in_another_field(tmp_path):
    """The layouts of RealToxicityPrompts (nested) and of the sentiment prompts of DExperts."""
    nested = [{"prompt": {"text": f"so many words {i}", "toxicity": 0.1}, "challenging": i == 1} for i in range(3)]
    flat = [{"prompt": f"a few words {i}", "continuation": " and more", "num_positive": i} for i in range(3)]
    for name, rows in (("nested", nested), ("flat", flat)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = f"jsonl:{tmp_path / 'nested.jsonl'}"
    (row,) = loaded(tmp_path, source, text="prompt.text", where={"challenging": True})
    assert row == {"challenging": True, "text": "so many words 1"}
    rows = loaded(tmp_path, f"jsonl:{tmp_path / 'flat.jsonl'}", text="prompt", words=2)
    assert [r["text"] for r in rows] == ["a few"] * 3 and all("prompt" not in r for r in rows)
    with pytest.raises(InputError, match=r"no text under 'prompt\.txt'"):
        loaded(tmp_path, source, text="prompt.txt")
    (tmp_path / "nested.jsonl").write_text(json.dumps(nested[0]) + '\n{"prompt": "no field text"}\n')
    with pytest.raises(InputError, match=r"record 1 has no string under 'prompt\.text'"):
        loaded(tmp_path, source, text="prompt.text")


def test_real_prompt_sets(tmp_path, data_dir):
    toxic = loaded(tmp_path, f"jsonl:{data_dir}/realtoxicityprompts/prompts.jsonl", text="prompt", limit=3)
    assert toxic[0]["text"].startswith("An hour and a half later")
    neutral = stage(
        tmp_path / "runs", sources.load_data,
        {"source": f"jsonl:{data_dir}/sentiment_prompts", "split": "neutral", "text": "prompt", "limit": 3},
    ).rows("data.jsonl")  # fmt: skip
    assert neutral[0]["text"] == "God never intended to"


def test_a_label_may_be_in_another_field_and_made_of_a_score(tmp_path):
    """The layouts of RealToxicityPrompts (a score of each half) and of the comments of Wikipedia (CSV)."""
    rows = [{"prompt": f"so {i}", "toxicity": score} for i, score in enumerate((0.5, 0.49, None, 0.9))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source, scored = f"jsonl:{tmp_path / 'p.jsonl'}", dict(text="prompt", labels={"toxicity": [0.5]})
    found = loaded(tmp_path, source, **scored)
    assert [(r["text"], r["label"]) for r in found] == [("so 0", 1), ("so 1", 0), ("so 3", 1)]
    assert [r["text"] for r in loaded(tmp_path, source, **scored, where={"label": 0})] == ["so 1"]
    assert [r["text"] for r in loaded(tmp_path, source, **scored, balance="label", limit=1)] == ["so 0", "so 1"]
    (tmp_path / "c.csv").write_text('id,comment,toxic\n1,"one, two",True\n2,"say ""no""",False\n')
    three = loaded(tmp_path, source, text="prompt", labels={"toxicity": [0.5, 0.9]})
    assert [r["label"] for r in three] == [1, 0, 2]
    csv = dict(text="comment", labels={"toxic": {"True": 1, "False": 0}})
    found = loaded(tmp_path, f"csv:{tmp_path / 'c.csv'}", **csv)
    assert [(r["text"], r["label"]) for r in found] == [("one, two", 1), ('say "no"', 0)]
    for labels, words in (
        ({"toxicity": [0.9, 0.5]}, "expected ascending bounds"),
        ({"toxicity": []}, "expected ascending bounds"),
        ({"toxicity": [0.5], "prompt": [0.5]}, "for one field"),
        ({"toxicity": "high"}, "for one field"),
    ):
        with pytest.raises(InputError, match=words):
            loaded(tmp_path, source, text="prompt", labels=labels)


def test_labels_become_numbers(tmp_path):
    rows = [{"text": "a", "label": "bad"}, {"text": "b", "label": "good"}, {"text": "c", "label": "odd"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = dict(source=f"jsonl:{tmp_path / 'rows.jsonl'}", split="all", labels=dict(bad=0, good=1))
    found = stage(tmp_path / "runs", sources.load_data, settings).rows("data.jsonl")
    assert found == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


@pytest.mark.parametrize(("backend", "wanted"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_a_dtype_that_is_left_out_is_chosen_before_the_stage_is_identified(backend, wanted, monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(inputs, "stage", lambda root, function, settings, **more: calls.append(settings["dtype"]))
    for more in ({}, {"dtype": None}, {"dtype": "float32"}, {"dtype": "bfloat16"}):
        inputs.language_model("root", {"source": "somewhere", **more})
    assert calls == [wanted, wanted, "float32", "bfloat16"]
