"""Tokenizers: round trips, agreement with transformers, and prompts."""

import json

import jax
import numpy as np
import pytest

from ctg_jax.data import Tokenizer, load_tokenizer, reviews, to_prompts, train_bpe
from ctg_jax.types import InputError

TEXTS = ["The soup was fine.", "  two  spaces\n\ttab", "naïve café 東京 🙂", "", "don't <b>stop</b>"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe((reviews.generate(i)["text"] for i in range(300)), 600)


def test_bpe_round_trips_any_text(bpe):
    assert bpe.vocab == 600
    assert bpe.decode(bpe.encode(TEXTS)) == TEXTS
    assert (bpe.bos, bpe.eos, bpe.pad, bpe.adds_bos) == (0, 0, None, False)
    assert bpe.token(0) == "<|endoftext|>"
    assert bpe.id("<|endoftext|>") == 0
    assert bpe.decode([[*bpe.encode(["hi"])[0], 0]]) == ["hi"]


def test_bpe_is_deterministic(bpe):
    again = train_bpe((reviews.generate(i)["text"] for i in range(300)), 600)
    assert again.to_json() == bpe.to_json()


def test_bpe_too_small():
    with pytest.raises(InputError, match="257"):
        train_bpe(["a"], 100)


def test_encode_refuses_one_string(bpe):
    with pytest.raises(InputError, match="list"):
        bpe.encode("one string")


def test_save_and_load(bpe, tmp_path):
    bpe.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert (again.vocab, again.bos, again.eos, again.pad) == (bpe.vocab, 0, 0, None)
    assert again.encode(TEXTS) == bpe.encode(TEXTS)
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert theirs.eos_token_id == 0
    assert [theirs(t)["input_ids"] for t in TEXTS] == bpe.encode(TEXTS)


def test_special_tokens_by_id_from_the_model_config(bpe, tmp_path):
    """GPT-2's own tokenizer_config.json names no token."""
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    assert load_tokenizer(tmp_path).eos is None
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [0, 5], "bos_token_id": 0}))
    assert (load_tokenizer(tmp_path).eos, load_tokenizer(tmp_path).bos) == (0, 0)


@pytest.mark.parametrize(
    "name, bos, eos, pad",
    [("yelp-gpt2-mini", "<|endoftext|>", "<|endoftext|>", None), ("all-MiniLM-L6-v2", None, None, "[PAD]")],
)
def test_real_tokenizers_agree_with_transformers(data_dir, name, bos, eos, pad):
    transformers = pytest.importorskip("transformers")
    ours, theirs = (
        f(str(data_dir / "models" / name)) for f in (load_tokenizer, transformers.AutoTokenizer.from_pretrained)
    )
    texts = [*TEXTS, "long " * 300]  # beyond the 128 tokens that the encoder's file would cut at
    assert ours.encode(texts, special=True) == [theirs(t)["input_ids"] for t in texts]
    assert ours.encode(texts) == [theirs(t, add_special_tokens=False)["input_ids"] for t in texts]
    assert ours.vocab == len(theirs)
    assert [None if i is None else ours.token(i) for i in (ours.bos, ours.eos, ours.pad)] == [bos, eos, pad]


def test_prompts_are_padded_on_the_left(bpe):
    texts = ["The soup", "", "The soup was delicious"]
    p = to_prompts(bpe, texts, seed=1, ids=[5, 6, 7], length=12)
    assert p.tokens.shape == p.mask.shape == (3, 12)
    assert p.tokens.dtype == np.int32
    rows = [np.asarray(p.tokens)[i][np.asarray(p.mask)[i]].tolist() for i in range(3)]
    assert rows == [bpe.encode(texts)[0], [bpe.eos], bpe.encode(texts)[2]]
    assert all((np.diff(m.astype(int)) >= 0).all() for m in np.asarray(p.mask))
    alone = to_prompts(bpe, texts[1:2], seed=1, ids=[6])
    assert alone.tokens.shape == (1, 1)
    assert (jax.random.key_data(alone.keys[0]) == jax.random.key_data(p.keys[1])).all()
    assert (jax.random.key_data(to_prompts(bpe, texts, seed=2).keys) != jax.random.key_data(p.keys)).any()


def test_prompts_begin_with_bos_where_the_model_expects_it(bpe):
    from tokenizers import Tokenizer as Core
    from tokenizers.processors import TemplateProcessing

    core = Core.from_str(bpe.to_json())
    core.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    llama_like = Tokenizer(core, bos="<|endoftext|>", eos="<|endoftext|>")
    assert llama_like.adds_bos
    p = to_prompts(llama_like, ["", "hi"], seed=0)
    assert np.asarray(p.mask).sum(1).tolist() == [1, 1 + len(bpe.encode(["hi"])[0])]
    assert p.tokens[1].tolist() == [0, *bpe.encode(["hi"])[0]]


def test_bad_prompts(bpe):
    with pytest.raises(InputError, match="empty"):
        to_prompts(bpe, [], seed=0)
    many = len(bpe.encode(["soup " * 20])[0])
    with pytest.raises(InputError, match=f"prompt 1 has {many} tokens, but length is 5"):
        to_prompts(bpe, ["a", "soup " * 20], seed=0, length=5)
    with pytest.raises(InputError, match="context of the model is 8"):
        to_prompts(bpe, ["soup " * 20], seed=0, context=8)
    with pytest.raises(InputError, match="ids"):
        to_prompts(bpe, ["a"], seed=0, ids=[1, 2])
    with pytest.raises(InputError, match="cond"):
        to_prompts(bpe, ["a"], seed=0, cond=np.zeros(3))


def test_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="network"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_hub_id_is_resolved_as_models_are(bpe, tmp_path, monkeypatch):
    """One snapshot for the weights and the tokenizer; transformers is not asked for an id."""
    from ctg_jax.models import hf

    bpe.save(tmp_path)
    monkeypatch.setattr(hf, "resolve", lambda name: tmp_path if name == "somebody/model" else None)
    assert load_tokenizer("somebody/model").to_json() == bpe.to_json()


def test_settings_that_only_tokenizer_config_has_are_refused(bpe, tmp_path):
    """Today's `transformers` would read texts with them; tokenizer.json alone reads them in another way."""
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    plain = json.loads(file.read_text())
    added = {"0": {"content": "<|endoftext|>", "special": True}, "600": {"content": "<rating>", "special": False}}
    for changes, message in (
        ({"added_tokens_decoder": added}, r"added_tokens_decoder says that token 600 is '<rating>'"),
        ({"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}, "add_prefix_space is True"),
    ):
        file.write_text(json.dumps(plain | changes))
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert theirs("soup<rating>")["input_ids"] != bpe.encode(["soup<rating>"])[0]
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path)
    file.write_text(json.dumps(plain | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}))
    assert load_tokenizer(tmp_path).encode(TEXTS) == bpe.encode(TEXTS)
