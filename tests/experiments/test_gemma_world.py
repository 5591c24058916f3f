"""The gemma world: refused in a sentence without its folders, and run on tiny models and files of the same layout."""

import json
from pathlib import Path

import pytest

from ctg_jax.run.session import Session
from ctg_jax.types import InputError
from experiments import cli, compare, experiment, inputs, latents, main, reporting
from tests.experiments.tiny_encoder import write_encoder

CONFIGS = Path(__file__).parents[2] / "configs"
USES = sorted(p for p in CONFIGS.glob("*.py") if "gemma" in p.read_text() and "def get_config" in p.read_text())
ARMS = [p for p in USES if p.stem != "latents"]  # which compares no methods
TUNING = dict(steps=4, batch=4, tokens=8, warmup=1, log_every=1)


def rows(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def world(tmp_path, lm_dir, monkeypatch):
    """A folder with the layout of the one that CTG_DATA_DIR names, of a few words, and the variables set."""
    texts = ["the food was good", "a room is so bad", "the room was very kind", "the food is rude"]
    labelled = [{"text": text, "label": 1 - i % 2} for i, text in enumerate(texts)] * 3
    for name in ("yelp/train", "yelp/dev", "sst2/train", "sst2/dev"):
        rows(tmp_path / f"{name}.jsonl", labelled)
    neutral = [{"prompt": "the food", "continuation": "was good.", "num_positive": 12}] * 520
    rows(tmp_path / "sentiment_prompts/neutral.jsonl", neutral)
    scores = [0.1, 0.9, None]
    pairs = [{"prompt": texts[i % 4], "continuation": " was bad", "prompt_toxicity": scores[i % 3],
              "continuation_toxicity": scores[(i + 1) % 3]} for i in range(3330)]  # fmt: skip
    rows(tmp_path / "realtoxicityprompts/prompts.jsonl", pairs)
    kinds = ["hate", "offensive", "neither"]
    tweets = [{"text": text, "label": kinds[i % 3]} for i, text in enumerate(texts * 3)]
    rows(tmp_path / "toxicity/davidson.jsonl", tweets)
    surge = [{"text": text, "label": label} for text, label in zip(texts, ["Toxic", "Not Toxic"] * 2)]
    rows(tmp_path / "toxicity/surge.jsonl", surge)
    comments = tmp_path / "toxicity/wiki_bias/toxicity_nonfuzzed_testset.csv"
    comments.parent.mkdir()
    comments.write_text('rev_id,comment,toxic\n1,"a good, kind room",False\n2,a rude room,True\n')
    for name, words in dict(wordlists="disk\ncode\n", test_wordlists="cable\nC++\n").items():
        rows(tmp_path / f"topics/fudge/{name}/computers.txt", [])
        (tmp_path / f"topics/fudge/{name}/computers.txt").write_text(words)
    write_encoder(tmp_path / "models/all-MiniLM-L6-v2")
    monkeypatch.setenv("CTG_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("CTG_LM_DIR", str(lm_dir))
    return tmp_path


@pytest.mark.parametrize("file", USES, ids=[p.stem for p in USES])
def test_without_a_language_model_it_is_refused(file, monkeypatch, capsys):
    monkeypatch.delenv("CTG_LM_DIR", raising=False)
    script = latents if file.stem == "latents" else compare if file.stem.startswith("compare") else main
    assert cli.run(script.main, [f"--config={file}:gemma"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "CTG_LM_DIR is not set: the gemma world reads its language model" in said[0]


@pytest.mark.parametrize("file", ARMS, ids=[p.stem for p in ARMS])
def test_the_arms_are_those_of_methods_that_are_there(file, world):
    config = cli.config_of(f"{file}:gemma")
    arms = experiment.check(config.to_dict())
    assert config.lm.source and len(arms) > 1
    if file.stem in ("compare_sentiment", "compare_toxicity"):
        assert {"top_p", "steer", "cav", "lm_steer", "dexperts", "quark"} < arms.keys()
        assert any(name.startswith("finetune") for name in arms)


def test_latents_take_the_language_model_and_the_sentences_of_the_other_world(world):
    config = cli.config_of(str(CONFIGS / "latents.py:gemma"))
    assert config.lm.source == cli.config_of(str(CONFIGS / "steer.py:gemma")).lm.source
    assert config.recovery.data.yelp.source.endswith("yelp/dev.jsonl") and config.transfer.train.limit == 25


def test_quark_beside_diffusion_learns_what_the_comparison_is_about(world):
    """The world of this name for rewards is about toxicity, and this comparison is about sentiment."""
    arms = cli.config_of(str(CONFIGS / "compare_diffusion.py:gemma_equal")).methods
    assert "yelp" in arms.quark.rewards.words.data.source and arms.steer.kl == arms.dexperts.kl


def test_without_data_it_is_refused(world, monkeypatch):
    monkeypatch.delenv("CTG_DATA_DIR")
    with pytest.raises(InputError, match=r"CTG_DATA_DIR is not set: the gemma world reads sentiment_prompts/"):
        cli.config_of(str(CONFIGS / "compare_sentiment.py:gemma"))


def test_the_judge_is_trained_and_its_held_out_texts_are_in_the_report(world, tmp_path):
    spec = str(CONFIGS / "compare_toxicity.py:gemma")
    config = cli.config_of(spec)
    config.methods = {"top_p": {}}
    config.prompts.limit, config.sample.n, config.sample.max_new, config.evaluate.resamples = 2, 2, 3, 20
    config.judges.toxic.train.training = TUNING
    root = Session(tmp_path / "runs")
    settings = config.to_dict()
    planned = inputs.ids(root, settings, experiment.check(settings))
    assert not (tmp_path / "runs").exists()
    (cell,) = experiment.run(root, config)
    assert {a.id for a in [inputs.judge(root, "toxic", config.judges.toxic.to_dict())]} < set(planned)
    names = {row["name"] for row in cell.figures.metrics()}
    assert {"toxic/max", "toxic/any", "toxic/share", "perplexity"} <= names
    prompts = {row["prompt"] for row in cell.samples.rows("samples.jsonl")}
    assert len(prompts) == 2
    about = json.loads(reporting.write(root, spec, config, [cell]).with_suffix(".json").read_text())["about"]
    said = about["'toxic' on held-out texts"].split("; ")
    assert [one.split(":")[0] for one in said] == ["continuation", "davidson", "surge", "wikipedia"]
    assert all("accuracy 0." in one or "accuracy 1." in one for one in said) and "AUC" in said[1]
    assert "texts" in said[0] and "on 2 texts" in said[3]
    trained = inputs.trained(root, config.judges.toxic.train.to_dict())
    # Of each half of the first 3,000 records two in three have a score, and half of those are toxic.
    assert trained.spec["texts"] == [2000, 2000]


def test_a_judge_has_one_origin(world):
    config = cli.config_of(str(CONFIGS / "compare_toxicity.py:gemma"))
    settings = config.judges.toxic.to_dict() | {"encoder": str(world / "models/all-MiniLM-L6-v2")}
    with pytest.raises(InputError, match="judge 'toxic' has both encoder and train"):
        inputs.judge(str(world / "runs"), "toxic", settings)


def test_the_texts_that_a_judge_is_trained_on_are_read_before_anything_is_trained(world, tmp_path):
    config = cli.config_of(str(CONFIGS / "compare_toxicity.py:gemma"))
    config.methods = {"top_p": {}}
    sets = config.judges.toxic.train.data
    (tmp_path / "broken.jsonl").write_text('{"continuation": \n')
    sets[sorted(sets)[-1]].source = f"jsonl:{tmp_path / 'broken.jsonl'}"
    with pytest.raises(InputError, match=r"broken\.jsonl line 1 is not a valid JSON object"):
        experiment.run(Session(tmp_path / "runs"), config)
    assert {p.name.partition("-")[0] for p in (tmp_path / "runs").glob("*-*")} <= {"load_data"}
