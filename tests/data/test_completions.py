"""What people wrote after a prompt."""

import pytest

from ctg_jax.data import train_bpe
from ctg_jax.data.completions import continuations
from ctg_jax.types import InputError


def test_continuations_are_what_people_wrote():
    tokenizer = train_bpe(["so good so nice", "fun and nice"], 270)
    records = [{"prompt": "so", "text": "so good so nice"}, {"text": "fun and", "reference": "fun  and\nnice"}]
    found = continuations(records, tokenizer, 40)
    assert tokenizer.decode(found) == [" good so nice", " nice"]
    assert all(ids[-1] == tokenizer.eos for ids in found)
    assert continuations(records, tokenizer, 2) == [ids[:2] for ids in found]
    with pytest.raises(InputError, match="record 0 of the data has no text behind its prompt 'fun'"):
        continuations([{"text": "fun"}], tokenizer, 40)
