"""Texts that end a completion are found exactly: inside a token, over several, behind half a character."""

import pytest

from ctg_jax.data import stops, train_bpe
from tests.data.sentencepiece import llama_like

TEXTS = ["we liked it. the end", "a long wait, really.\nno", "café über alles 🙂."]
TOKENIZERS = {"bytes": lambda: train_bpe(TEXTS * 20, 280), "sentencepiece": lambda: llama_like(TEXTS * 20)}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("stop", [".", " the", "\n", "é", "🙂", "it. t", " "])
def test_a_text_is_cut_where_it_occurs(kind, stop):
    tokenizer = TOKENIZERS[kind]()
    (head,) = tokenizer.encode_prompts(["so"])
    for text in TEXTS:
        (row,) = tokenizer.encode_after(["so"], [" " + text])
        (whole,) = tokenizer.decode_after([head], [row])
        assert whole == " " + text
        size = stops.tokens_until(tokenizer, head, row, [stop])
        (ended,) = tokenizer.decode_after([head], [row[:size]])
        assert stops.cut(ended, [stop]) == stops.cut(whole, [stop])
        if stop in whole:  # one token fewer does not hold it
            assert stop not in tokenizer.decode_after([head], [row[: size - 1]])[0]
            assert stops.cut(whole, [stop]).endswith(stop) and stops.cut(whole, [stop]).count(stop) == 1
        else:
            assert (size, ended) == (len(row), whole)


def test_the_first_of_several_counts():
    assert stops.cut("one. two! three", ["!", "."]) == "one."
    assert stops.cut("one", ["!"]) == stops.cut("one", []) == "one"


def test_a_text_that_its_tokens_do_not_spell_is_left_to_the_host():
    tokenizer = llama_like(["abc abc"] * 20)
    found = stops.spellings(tokenizer, ["a", "b c"])
    assert len(found) == 2 and all(tokenizer.decode([ids])[0].endswith(s) for ids, s in zip(found, ["a", "b c"]))

    class Lowers:
        def encode(self, texts):
            return tokenizer.encode([t.lower() for t in texts])

        decode = tokenizer.decode

    assert stops.spellings(Lowers(), ["A", "b"]) == stops.spellings(tokenizer, ["b"])
