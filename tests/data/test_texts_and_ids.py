"""The text of new tokens and the ids of a text behind its prompt, control tokens, and the beginning token."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Core

from ctg_jax.data import Tokenizer, load_tokenizer, pipeline, to_prompts, train_bpe
from ctg_jax.data.completions import Completions, continuations
from ctg_jax.data.sources import Source
from ctg_jax.data.tags import TAGS, tag_table
from ctg_jax.types import InputError
from tests.data.sentencepiece import llama_like

TEXTS = ["the food was great", "the hour was loud", "a naïve café, 東京 🙂", "the foo d"] * 20
ANY = [
    "the food was",
    "  two  spaces\n\ttab ",
    "naïve café 東京 🙂",
    "don't <b>stop</b>",
    "\n",
    " ",
    "a\ufffdb",
    "<0x41>",
]


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request):
    return train_bpe(TEXTS, 300) if request.param == "bytes" else llama_like(TEXTS)


@pytest.fixture(scope="module")
def llama():
    return llama_like(TEXTS)


# --- ids to text and text to ids -------------------------------------------------------------------------------------


def test_the_text_of_new_tokens_is_that_of_all_less_the_prompt(tokenizer):
    whole, head = tokenizer.encode(["the food hour loud", "the food"])
    assert whole[: len(head)] == head
    assert tokenizer.decode_after([head], [whole[len(head) :]]) == [" hour loud"]
    assert tokenizer.decode_after([tokenizer.begun(head)], [[*whole[len(head) :], tokenizer.eos]]) == [" hour loud"]
    assert tokenizer.decode_after([[]], [whole]) == ["the food hour loud"]


@pytest.mark.parametrize("text", ANY)
def test_any_cut_of_the_ids_gives_the_text_back(tokenizer, text):
    """Cuts inside a character too: what the prompt breaks off belongs to the new tokens."""
    (ids,) = tokenizer.encode([text])
    for n in range(len(ids) + 1):
        (head,) = tokenizer.decode([ids[:n]])
        (tail,) = tokenizer.decode_after([ids[:n]], [ids[n:]])
        assert text.endswith(tail)
        kept = text[: len(text) - len(tail)]
        assert head[: len(kept)] == kept and set(head[len(kept) :]) <= {"\ufffd"}


@pytest.mark.parametrize("text", ANY)
def test_any_cut_of_the_text_gives_ids_that_spell_it(tokenizer, text):
    """Where the tokens of prompt and text would merge, the ids still follow encode(prompt)."""
    for n in range(len(text) + 1):
        (head,), (tail,) = tokenizer.encode([text[:n]]), tokenizer.encode_after([text[:n]], [text[n:]])
        assert tokenizer.decode([head + tail]) == [text]
        (whole,) = tokenizer.encode([text])
        if whole[: len(head)] == head:
            assert head + tail == whole


def test_ids_behind_a_prompt_that_would_merge_with_the_text(tokenizer):
    head, other = tokenizer.encode(["the foo", "the food"])
    assert other[: len(head)] != head or len(other) > len(head)
    for prompt, text in [("the foo", "d was"), ("the food ", "was")]:
        (before,), (after,) = tokenizer.encode([prompt]), tokenizer.encode_after([prompt], [text])
        assert tokenizer.decode([before + after]) == [prompt + text]
        assert tokenizer.decode_after([before], [after]) == [text]


def test_a_normaliser_that_joins_prompt_and_text_takes_the_longest_common_beginning():
    from tokenizers.normalizers import NFC

    core = Core.from_str(train_bpe(TEXTS, 300).to_json())
    core.normalizer = NFC()
    tokenizer = Tokenizer(core, eos="<|endoftext|>")
    (head,), (whole,) = tokenizer.encode(["cafe"]), tokenizer.encode(["cafe\u0301"])
    (tail,) = tokenizer.encode_after(["cafe"], ["\u0301"])
    common = next(i for i, (a, b) in enumerate(zip(head, whole)) if a != b)
    assert tail == whole[common:]


def test_a_stream_waits_for_whole_characters(tokenizer):
    (head,), (tail,) = tokenizer.encode(["the food"]), tokenizer.encode_after(["the food"], [" 東京 🙂 loud"])
    pieces = list(tokenizer.decode_stream(head, iter(tail)))
    assert "".join(pieces) == " 東京 🙂 loud" and "\ufffd" not in "".join(pieces) and len(pieces) >= 3
    (cut,) = tokenizer.encode_after(["the food"], [" 🙂"])
    shown = list(tokenizer.decode_stream(head, cut[:-1]))
    assert "".join(shown) == tokenizer.decode_after([head], [cut[:-1]])[0]


def test_continuations_and_completions_on_a_sentencepiece_tokenizer(llama):
    """The Small input of the Llama kind: the tail has no token of its own for the space."""
    ids, n = llama.encode(["the food was great"])[0], len(llama.encode(["the food"])[0])
    records = [{"text": "the food was great", "prompt": "the food"}]
    (tail,) = continuations(records, llama, 9)
    assert tail == [*ids[n:], llama.eos]
    rows = Completions(Source("x", "all", [{**records[0], "tokens": tail}]), llama, 8, 9)
    row = rows[0]
    assert row["tokens"][row["mask"]].tolist() == [llama.bos, *ids[:n]]
    assert row["completion"][row["written"]].tolist() == tail


def test_tags_read_words_not_pieces_on_a_sentencepiece_tokenizer(llama):
    tags = [TAGS[t] for t in tag_table(llama)]
    found = {llama.token(i): t for i, t in enumerate(tags)}
    assert (found["▁the"], found["▁was"], found["the"]) == ("det", "verb", "part")
    assert found["<s>"] == found["</s>"] == "end"
    same = train_bpe(TEXTS, 300)
    assert TAGS[tag_table(same)[same.encode([" was"])[0][0]]] == "verb"


# --- control tokens --------------------------------------------------------------------------------------------------


def test_text_never_becomes_a_control_token(tokenizer):
    for name in (tokenizer.token(tokenizer.bos), tokenizer.token(tokenizer.eos)):
        text = f"a {name} b{name}"
        (ids,) = tokenizer.encode([text])
        assert not {tokenizer.bos, tokenizer.eos} & set(ids)
        assert tokenizer.decode([ids]) == [text]
        (after,) = tokenizer.encode_after(["a"], [f" {name} b"])
        assert not {tokenizer.bos, tokenizer.eos} & set(after)
    p = to_prompts(tokenizer, [f"a {tokenizer.token(tokenizer.eos)} b"], seed=0)
    assert tokenizer.eos not in np.asarray(p.tokens)[0, 1:]


def test_any_text_round_trips(tokenizer):
    texts = [*ANY, "a <|endoftext|> b", "x</s>y<s>", "\x00\x7f", "e\u0301 \u200d \u2028"]
    assert tokenizer.decode(tokenizer.encode(texts)) == texts


def test_a_training_row_is_not_cut_at_a_spelled_control_token(tokenizer):
    text = f"the food {tokenizer.token(tokenizer.eos)} was great"
    batch = next(pipeline(Source("x", "all", [{"text": text}]), tokenizer, batch=1, length=80, seed=0))
    row = batch["tokens"][0][batch["mask"][0]].tolist()
    assert row.count(tokenizer.eos) == 1 and row[-1] == tokenizer.eos
    assert tokenizer.decode([row]) == [text]


def test_an_end_token_that_the_file_does_not_call_special(tmp_path):
    core = Core.from_str(llama_like(TEXTS).to_json())
    core.add_tokens([AddedToken("<end>", special=False), AddedToken("<word>", special=False)])
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(["the <end> food", "the <word> food"])
    assert tokenizer.eos not in ids[0]
    assert tokenizer.id("<word>") in ids[1]  # an added word that controls nothing


def test_a_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"text 1 is 'a\\ud83d', which is not a string of Unicode"):
        tokenizer.encode(["a", "a\ud83d"])
    with pytest.raises(InputError, match="text 0 is 3"):
        tokenizer.encode([3])


# --- the beginning token ---------------------------------------------------------------------------------------------


def test_the_beginning_token_comes_once(llama):
    (ids,) = llama.encode(["the food"])
    for prompt in ("the food", ids, [llama.bos, *ids]):
        assert llama.encode_prompts([prompt]) == [[llama.bos, *ids]]
    p = to_prompts(llama, ["the food", [llama.bos, *ids], ""], seed=0)
    rows = [t[m].tolist() for t, m in zip(np.asarray(p.tokens), np.asarray(p.mask))]
    assert rows == [[llama.bos, *ids], [llama.bos, *ids], [llama.bos]]
    plain = llama_like(TEXTS, bos=False)
    assert plain.encode_prompts(["the food", ""]) == [ids, [plain.start]]


# --- tokens that the model has no row for ----------------------------------------------------------------------------


def test_an_added_token_that_the_model_lacks_is_refused(tmp_path):
    bpe = train_bpe(TEXTS, 300)
    core = Core.from_str(bpe.to_json())
    core.add_tokens(["<rating5>", "<rating1>"])
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": bpe.vocab, "eos_token_id": 0}))
    tokenizer = load_tokenizer(tmp_path)
    words = (
        rf"holds the token id {bpe.vocab}, but the model has {bpe.vocab} tokens .* its tokenizer {bpe.vocab + 2} ids"
    )
    with pytest.raises(InputError, match=words):
        to_prompts(tokenizer, ["<rating5> the food was", "<rating1> the food was"], seed=0)
    assert to_prompts(tokenizer, ["the food was"], seed=0).tokens.shape[0] == 1
    with pytest.raises(InputError, match="token id"):
        next(pipeline(Source("x", "all", [{"text": "<rating1>"}]), tokenizer, batch=1, length=8, seed=0, threads=0))
