"""Batches: the same stream for every number of threads and hosts, and an exact resume."""

import itertools
import json

import numpy as np
import pytest

from ctg_jax.data import load, pipeline, reviews, train_bpe
from ctg_jax.types import InputError

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe((reviews.generate(i)["text"] for i in range(200)), 500)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [reviews.generate(i) for i in range(22)] + [{**reviews.generate(22), "text": "hi"}]
    path.write_text("".join(json.dumps({**r, "name": "x", "half": 0.5}) + "\n" for r in rows))
    return load(f"jsonl:{path}", "all")


@pytest.fixture
def make(source, tokenizer):
    return lambda **kw: pipeline(source, tokenizer, **{"batch": 4, "length": LENGTH, "seed": 1, **kw})


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype
            np.testing.assert_array_equal(x[name], y[name])


def take(stream, n):
    return list(itertools.islice(stream, n))


def test_rows_are_the_texts(make, source, tokenizer):
    for b in take(make(), 6):
        assert (b["tokens"].shape, b["tokens"].dtype, b["mask"].dtype, b["ids"].dtype) == (
            (4, LENGTH),
            np.int32,
            bool,
            np.uint32,
        )
        for tokens, mask, i in zip(b["tokens"], b["mask"], b["ids"]):
            want = [*tokenizer.encode([source[i]["text"]])[0], tokenizer.eos][:LENGTH]
            assert tokens[mask].tolist() == want
            assert mask.tolist() == [True] * len(want) + [False] * (LENGTH - len(want))


def test_each_epoch_is_another_permutation(make, source):
    n = len(source)
    ids = np.concatenate([b["ids"] for b in take(make(), n // 2 + 1)])[: 2 * n]
    assert sorted(ids[:n]) == sorted(ids[n:]) == list(range(n))
    assert list(ids[:n]) != list(ids[n:])
    assert list(ids[:n]) != list(range(n))
    other = np.concatenate([b["ids"] for b in take(make(seed=2), n // 4)])
    assert list(other) != list(ids[: len(other)])


def test_without_shuffle_the_order_is_that_of_the_source(make):
    assert np.concatenate([b["ids"] for b in take(make(shuffle=False), 3)]).tolist() == list(range(12))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_order_does_not_depend_on_threads(make, threads):
    same(take(make(threads=threads), 14), take(make(), 14))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_interleave_to_the_order_of_one(make, hosts, pack):
    whole = take(make(batch=4, pack=pack), 8)
    parts = [take(make(batch=4 // hosts, part=(h, hosts), pack=pack), 8) for h in range(hosts)]
    for step, b in enumerate(whole):
        for name in b:
            np.testing.assert_array_equal(np.stack([p[step][name] for p in parts], 1).reshape(b[name].shape), b[name])


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_resume_at_the_exact_example(make, at, threads, pack):
    whole = take(make(pack=pack), 14)
    first = make(threads=threads, pack=pack)
    take(first, at)
    state = json.loads(json.dumps(first.get_state()))
    second = make(threads=threads, pack=pack)
    take(second, 2)  # a stream that has run already moves back as well
    second.set_state(state)
    same(take(second, 14 - at), whole[at:])
    assert second.get_state()["next"] == 14


def test_state_of_another_stream(make):
    state = make().get_state()
    with pytest.raises(InputError, match="seed was 1 and is now 2"):
        make(seed=2).set_state(state)


def test_state_of_other_data_or_another_tokenizer(source, tokenizer, tmp_path):
    state = pipeline(source, tokenizer, batch=4, length=LENGTH, seed=1).get_state()
    moved = tmp_path / "moved.jsonl"
    moved.write_text("".join(json.dumps(r) + "\n" for r in source))
    pipeline(load(f"jsonl:{moved}", "all"), tokenizer, batch=4, length=LENGTH, seed=1).set_state(state)
    moved.write_text("".join(json.dumps({**r, "label": 0}) + "\n" for r in source))
    with pytest.raises(InputError, match="data was"):
        pipeline(load(f"jsonl:{moved}", "all"), tokenizer, batch=4, length=LENGTH, seed=1).set_state(state)
    with pytest.raises(InputError, match="tokenizer was"):
        pipeline(source, train_bpe(["other"], 300), batch=4, length=LENGTH, seed=1).set_state(state)


def test_a_bad_record_is_named_when_it_is_reached(source, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": 1 if i < 5 else "one"}) + "\n" for i in range(8)))
    stream = pipeline(
        load(f"jsonl:{path}", "all"), tokenizer, batch=2, length=4, seed=0, shuffle=False, fields=("label",)
    )
    take(stream, 2)
    with pytest.raises(InputError, match="'label' of record 5 is 'one'"):
        take(stream, 2)


def test_epochs_and_the_last_batch(make):
    one = make(epochs=1)
    assert one.length == 5
    assert len(list(one)) == 5
    assert len(list(make(epochs=3))) == 69 // 4
    filled = list(make(epochs=1, drop_last=False, fields=("label",)))
    assert len(filled) == 6
    assert filled[-1]["mask"].any(1).tolist() == [True, True, True, False]
    seen = np.concatenate([b["ids"][b["mask"].any(1)] for b in filled])
    assert sorted(seen) == list(range(23))


def test_hosts_get_equally_many_batches(make):
    assert [len(list(make(epochs=1, batch=2, part=(h, 3)))) for h in range(3)] == [3, 3, 3]
    assert [len(list(make(epochs=1, batch=2, part=(h, 3), drop_last=False))) for h in range(3)] == [4, 4, 4]


def test_fields(make, source):
    b = next(make(fields=("label", "topic", "half")))
    assert b["label"].tolist() == [source[i]["label"] for i in b["ids"]]
    assert (b["topic"].dtype, b["half"].dtype) == (np.int32, np.float32)
    with pytest.raises(InputError, match="no field 'lable'"):
        make(fields=("lable",))
    with pytest.raises(InputError, match="expected numbers"):
        make(fields=("name",))


def test_packed_rows_hold_every_token_once(make, source, tokenizer):
    want = [t for r in source for t in (*tokenizer.encode([r["text"]])[0], tokenizer.eos)]
    got = [t for b in make(pack=True, shuffle=False, epochs=1, drop_last=False) for t in b["tokens"][b["mask"]]]
    assert got == want


@pytest.mark.parametrize(
    "bad, word",
    [({"batch": 0}, "impossible"), ({"part": (2, 2)}, "impossible"), ({"batch": 50, "epochs": 1}, "fewer than"),
     ({"pack": True, "fields": ("label",)}, "packed")],
)  # fmt: skip
def test_bad_input(make, bad, word):
    with pytest.raises(InputError, match=word):
        make(**bad)


def test_empty_source(tmp_path, tokenizer):
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(InputError, match="empty"):
        pipeline(load(f"jsonl:{tmp_path / 'e.jsonl'}", "all"), tokenizer, batch=1, length=4, seed=0)
