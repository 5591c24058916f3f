"""What the files of a model say of its meaning is obeyed as `transformers` obeys it, or refused by name."""

import json

import numpy as np
import pytest

from ctg_jax import rewards
from ctg_jax.data import train_bpe
from ctg_jax.models import hf
from ctg_jax.models.hf.decoders import DECODERS
from ctg_jax.models.hf.encoders import ENCODERS
from ctg_jax.rewards.embed import load_text_encoder
from ctg_jax.run.stage import stage, write_jsonl
from ctg_jax.stages import judges
from ctg_jax.types import InputError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = dict(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
# The logits of the table, to the digits that give its probabilities.
LOGITS = [3.0123, 2.0, 2.5, -3.99, 2.78, -3.0]


def _json(file, **changes):
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in (old | changes).items() if v is not None}))


# -- classifiers


def _classifier(folder, logits=LOGITS, **more):
    """A BERT that gives these logits whatever it reads, with a tokenizer."""
    torch.manual_seed(0)
    names = [f"class {i}" for i in range(len(logits))]
    config = transformers.BertConfig(
        **SIZES,
        max_position_embeddings=32,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor(logits))
    model.save_pretrained(folder)
    train_bpe(["the food"], 270).save(folder)
    _json(folder / "tokenizer_config.json", pad_token="<|endoftext|>")
    _json(folder / "config.json", **more)
    return folder


def _score(folder, **options):
    return float(rewards.SequenceClassifier.load(folder, **options)([""], ["the food"])[0])


def _pipeline(folder):
    pipe = transformers.pipeline("text-classification", str(folder), top_k=None)
    return {row["label"]: row["score"] for row in pipe(["the food"])[0]}


@pytest.mark.parametrize(
    "problem, expected",
    [
        ("multi_label_classification", 0.9531),
        ("single_label_classification", 0.3625),
        (None, 0.3625),
        ("regression", 3.0123),
    ],
)
def test_problem_type(problem, expected, tmp_path):
    folder = _classifier(tmp_path, problem_type=problem)
    assert abs(_score(folder, target=0) - expected) < 1e-4
    theirs = _pipeline(folder)
    for i in range(len(LOGITS)):
        assert abs(_score(folder, target=f"class {i}") - theirs[f"class {i}"]) < 1e-5  # names of id2label
    reward = rewards.SequenceClassifier.load(folder)
    assert reward.threshold == (0.0 if problem == "regression" else 0.5)
    encoder, params = hf.load_encoder(folder)
    hf.save(tmp_path / "again", encoder, params)
    assert hf.load_encoder(tmp_path / "again")[0] == encoder


def test_one_output(tmp_path):
    """One logit is a log-odds, unless the file says that it is a value."""
    folder = _classifier(tmp_path, [1.5])
    sigmoid = 1 / (1 + np.exp(-1.5))
    assert abs(_pipeline(folder)["class 0"] - sigmoid) < 1e-6
    for target, expected in ((1, sigmoid), (0, 1 - sigmoid), ("class 0", sigmoid)):
        assert abs(_score(folder, target=target) - expected) < 1e-6
    _json(folder / "config.json", problem_type="regression")
    assert abs(_pipeline(folder)["class 0"] - 1.5) < 1e-6
    assert all(abs(_score(folder, target=t) - 1.5) < 1e-6 for t in (0, 1, "class 0"))
    cross = {"activation_fn": "torch.nn.modules.linear.Identity"}  # what sentence-transformers' cross-encoders say
    _json(folder / "config.json", problem_type=None, sentence_transformers=cross)
    assert abs(_score(folder) - 1.5) < 1e-6
    old = "torch.nn.modules.activation.Sigmoid"
    _json(folder / "config.json", sentence_transformers=None, sbert_ce_default_activation_function=old)
    assert abs(_score(folder) - sigmoid) < 1e-6


def test_classifiers_that_are_refused(tmp_path):
    folder = _classifier(tmp_path)
    for match, changes in (
        ("problem_type is 'ranking'", {"problem_type": "ranking"}),
        (r"id2label names the classes \[1, 2\], expected 0 to 1", {"problem_type": None, "id2label": {1: "a", 2: "b"}}),
    ):
        _json(folder / "config.json", **changes)
        with pytest.raises(InputError, match=match):
            hf.load_encoder(folder)
    one = _classifier(tmp_path / "one", [1.5], sbert_ce_default_activation_function="torch.nn.Softplus")
    with pytest.raises(InputError, match=r"torch\.nn\.Softplus, expected one of Sigmoid, Identity"):
        hf.load_encoder(one)


def test_a_judge_takes_names_and_refuses_what_it_cannot_measure(tmp_path):
    def texts(run):
        write_jsonl(run.path / "data.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])

    root, data = tmp_path / "runs", stage(tmp_path / "runs", texts)
    folder = _classifier(tmp_path / "several", problem_type="multi_label_classification")
    options = {"kind": "classifier", "encoder": str(folder)}
    judge = stage(root, judges.fit_judge, options | {"target": "class 0"}, heldout=data)
    assert judge.metrics()[0]["accuracy"] == 0.5  # both are called class 0
    assert abs(judges.open_judge(judge)([""], ["x"])[0] - 0.9531) < 1e-4
    own = stage(root, judges.fit_judge, options | {"problem": "regression", "threshold": 3.0, "target": 0})
    assert judges.open_judge(own).threshold == 3.0 and abs(judges.open_judge(own)([""], ["x"])[0] - 3.0123) < 1e-6
    with pytest.raises(InputError, match="gives values, which cannot be compared with labels"):
        stage(root, judges.fit_judge, options | {"problem": "regression"}, heldout=data)
    with pytest.raises(InputError, match=r"threshold is 0\.2, but a judge of kind 'bag' does not read it"):
        stage(root, judges.fit_judge, {"kind": "bag", "threshold": 0.2}, data=data)


# -- sentence-transformers


def _sentence(folder, **texts):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, max_position_embeddings=32)
    transformers.BertModel(config).save_pretrained(folder)
    encoder, params = hf.load_encoder(folder)
    hf.save(folder, encoder, params)
    (folder / "sentence_bert_config.json").unlink()
    train_bpe(["the food"], 270).save(folder)
    _json(folder / "tokenizer_config.json", pad_token="<|endoftext|>")
    for name, content in texts.items():
        _json(folder / f"{name}.json", **content)
    return folder


def _ids(folder, text):
    encoder, _, encode = load_text_encoder(folder)
    return encode([text])[0], encoder.context


def test_texts_of_a_sentence_encoder(tmp_path):
    plain, context = _ids(_sentence(tmp_path / "plain"), "The Food")
    assert context == 32
    lower = _ids(_sentence(tmp_path / "lower", sentence_bert_config={"do_lower_case": True}), "The Food")[0]
    assert lower == _ids(tmp_path / "plain", "the food")[0] != plain
    asked = dict(prompts={"query": "ask: ", "none": ""}, default_prompt_name="query")
    folder = _sentence(tmp_path / "asked", config_sentence_transformers=asked)
    assert _ids(folder, "The Food")[0] == _ids(tmp_path / "plain", "ask: The Food")[0]
    _json(folder / "1_Pooling" / "config.json", include_prompt=False)
    with pytest.raises(InputError, match="include_prompt is false"):
        load_text_encoder(folder)
    _json(folder / "config_sentence_transformers.json", default_prompt_name="passage")
    with pytest.raises(InputError, match="default_prompt_name is 'passage'"):
        load_text_encoder(folder)


def test_longest_input_of_an_encoder(tmp_path):
    folder = _sentence(tmp_path, sentence_roberta_config={"max_seq_length": 9})
    assert _ids(folder, "food " * 30)[1] == 9
    (folder / "sentence_roberta_config.json").unlink()
    _json(folder / "tokenizer_config.json", model_max_length=11)
    ids, context = _ids(folder, "food " * 30)
    assert context == 11 and len(ids) == 11
    _json(folder / "tokenizer_config.json", model_max_length=10**30)
    assert _ids(folder, "food")[1] == 32


def test_modules_of_a_sentence_encoder(tmp_path):
    folder = _sentence(tmp_path)
    file = folder / "1_Pooling" / "config.json"
    for content, expected in (
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({}, "mean"),
    ):
        file.write_text(json.dumps(content))
        assert hf.load_encoder(folder)[0].pooling == expected
    _json(folder / "sentence_bert_config.json", tokenizer_args={"do_lower_case": True})
    with pytest.raises(InputError, match="settings hold tokenizer_args"):
        hf.load_encoder(folder)
    (folder / "sentence_bert_config.json").unlink()
    file.write_text(json.dumps({"pooling_mode": "lasttoken"}))
    with pytest.raises(InputError, match="pooling is lasttoken"):
        hf.load_encoder(folder)


# -- what config.json leaves out


CONFIGS = {
    "gpt2": "GPT2Config",
    "llama": "LlamaConfig",
    "gpt_neox": "GPTNeoXConfig",
    "gptj": "GPTJConfig",
    "opt": "OPTConfig",
    "stablelm": "StableLmConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "olmo2": "Olmo2Config",
    "smollm3": "SmolLM3Config",
    "phi3": "Phi3Config",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
    "bert": "BertConfig",
    "roberta": "RobertaConfig",
    "distilbert": "DistilBertConfig",
    "t5": "T5Config",
}


@pytest.mark.parametrize("family", CONFIGS)
def test_an_entry_that_is_left_out_means_what_it_means_to_transformers(family):
    """Every default is the one of `transformers`, or the entry is asked for."""
    whole = getattr(transformers, CONFIGS[family])().to_dict()
    read = (DECODERS | ENCODERS)[family].read
    expected, asked = read(whole, set()), []
    for key in whole:
        less = {k: v for k, v in whole.items() if k != key}
        try:
            assert read(less, set()) == expected, key
        except KeyError:
            asked.append(key)
    assert len(asked) < 10  # sizes
