"""Sources: one interface, one digest, and one clear sentence for each kind of bad input."""

import gzip
import json
import lzma
import subprocess
import sys

import pytest

from ctg_jax.data import load, reviews
from ctg_jax.data.sources import content
from ctg_jax.types import InputError

ROWS = [{"text": f"row {i} é", "label": i % 2} for i in range(20)]


def write(path, rows=ROWS, opener=open):
    with opener(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    return path


def test_bundled_is_the_grammar(small_reviews):
    train = load("bundled:reviews", "train", cache_dir=small_reviews)
    test = load("bundled:reviews", "test", cache_dir=small_reviews)
    assert (len(train), len(test)) == (200, 60)
    assert train[7] == reviews.generate(7)
    assert test[-1] == reviews.generate(299)
    assert [r["text"] for r in load("bundled:reviews", "train[:10%]", cache_dir=small_reviews)] == [
        train[i]["text"] for i in range(20)
    ]
    with pytest.raises(IndexError):
        train[200]


def test_bundled_is_prepared_once(small_reviews):
    before = sorted((p, p.stat().st_mtime_ns) for p in small_reviews.rglob("*"))
    load("bundled:reviews", "validation", cache_dir=small_reviews)
    assert sorted((p, p.stat().st_mtime_ns) for p in small_reviews.rglob("*")) == before
    assert [p.name for p in small_reviews.iterdir() if p.name.startswith(".")] == []


def test_two_processes_prepare_at_once_and_tensorflow_is_not_imported(tmp_path):
    code = (
        "import sys; from ctg_jax.data import builder, load; builder.SPLITS = {'train': 30};"
        f"s = load('bundled:reviews', 'train', cache_dir={str(tmp_path)!r});"
        "assert 'tensorflow' not in sys.modules; print(s.digest)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = [p.communicate()[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert out[0] == out[1]
    assert len(out[0].strip()) == 64
    assert len(list(tmp_path.iterdir())) == 1


def test_same_data_same_digest_in_every_format(tmp_path, small_reviews):
    plain = load(f"jsonl:{write(tmp_path / 'a.jsonl')}", "all")
    assert len(plain) == 20
    assert plain[3] == ROWS[3]
    assert list(plain) == ROWS
    for path, opener in ((tmp_path / "a.jsonl.gz", gzip.open), (tmp_path / "a.jsonl.xz", lzma.open)):
        assert load(f"jsonl:{write(path, opener=opener)}", "all").digest == plain.digest
    assert load(f"jsonl:{write(tmp_path / 'b.jsonl', ROWS[:-1])}", "all").digest != plain.digest
    bundled = load("bundled:reviews", "test", cache_dir=small_reviews)
    copy = load(f"jsonl:{write(tmp_path / 'c.jsonl', list(bundled))}", "all")
    assert copy.digest == bundled.digest


@pytest.mark.parametrize(
    "split, rows",
    [("all[:10%]", ROWS[:2]), ("train[5:8]", ROWS[5:8]), ("all[90%:]", ROWS[18:]), ("all[-3:]", ROWS[-3:])],
)
def test_jsonl_slices(tmp_path, split, rows):
    assert list(load(f"jsonl:{write(tmp_path / 'a.jsonl')}", split)) == rows


def test_jsonl_folder_has_named_splits(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "dev.jsonl.xz", ROWS[:4], lzma.open)
    assert len(load(f"jsonl:{tmp_path}", "train")) == 20
    assert len(load(f"jsonl:{tmp_path}", "dev[:50%]")) == 2
    with pytest.raises(InputError, match="'test'"):
        load(f"jsonl:{tmp_path}", "test")


def test_text_field(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "n": 1}])
    assert load(f"jsonl:{path}", "all", text="prompt")[0] == {"prompt": "p", "n": 1, "text": "p"}
    with pytest.raises(InputError, match="text=…"):
        load(f"jsonl:{path}", "all")


@pytest.mark.parametrize("bad, word", [('{"text": "a"', "JSON"), ("[1]", "object"), ('{"text": 3}', "string")])
def test_malformed_jsonl_names_the_line(tmp_path, bad, word):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + bad + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"line 3.*{word}") as e:
        load(f"jsonl:{path}", "all")
    assert "\n" not in str(e.value)


def test_truncated_xz(tmp_path):
    path = write(tmp_path / "a.jsonl.xz", opener=lzma.open)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        load(f"jsonl:{path}", "all")


def test_hf_from_a_local_folder(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl")
    source = load(f"hf:{tmp_path / 'set'}", "train[:25%]", cache_dir=tmp_path / "cache")
    assert list(source) == ROWS[:5]
    assert source[4] == ROWS[4]


def test_tfds_from_a_prepared_folder(small_reviews):
    (folder,) = small_reviews.iterdir()
    source = load(f"tfds:{folder}", "validation")
    assert source.digest == load("bundled:reviews", "validation", cache_dir=small_reviews).digest


@pytest.mark.parametrize(
    "spec, split, word",
    [
        ("reviews", "train", "jsonl:PATH"),
        ("tsv:x", "train", "csv:PATH"),
        ("bundled:poems", "train", "bundled:reviews"),
        ("bundled:reviews", "dev", "validation"),
        ("bundled:reviews", "train[:ten]", "NAME"),
        ("jsonl:/nowhere/at/all.jsonl", "all", "no such file"),
        ("hf:nobody/nothing", "train", "network"),
        ("tfds:no_such_data_set", "train", "network"),
    ],
)
def test_bad_specs_are_one_sentence(spec, split, word, small_reviews):
    with pytest.raises(InputError, match=word) as e:
        load(spec, split, cache_dir=small_reviews)
    assert "\n" not in str(e.value)


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        load("bundled:reviews", "train", cache_dir=tmp_path / "file")


def test_real_data(data_dir):
    assert len(load(f"jsonl:{data_dir}/yelp", "dev")) == 4000


def test_lines_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n\n  another \nthird\n")
    assert [r["text"] for r in load(f"text:{tmp_path / 'a.txt'}", "all")] == ["one line", "another", "third"]
    assert [r["text"] for r in load(f"text:{tmp_path / 'a.txt'}", "all[1:2]")] == ["another"]
    with gzip.open(tmp_path / "a.txt.gz", "wt") as f:
        f.write("zipped\n")
    assert [r["text"] for r in load(f"text:{tmp_path / 'a.txt.gz'}", "all")] == ["zipped"]
    with pytest.raises(InputError, match="there is no such file"):
        load(f"text:{tmp_path / 'b.txt'}", "all")
    with pytest.raises(InputError, match="split 'test' of text:"):
        load(f"text:{tmp_path / 'a.txt'}", "test")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe broken")
    with pytest.raises(InputError, match="cannot be read"):
        load(f"text:{tmp_path / 'c.txt'}", "all")


def test_comma_separated_values(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\nrow é,1\n"two\nlines",0\n', encoding="utf-8")
    source = load(f"csv:{path}", "all")
    assert list(source) == [{"text": "row é", "label": "1"}, {"text": "two\nlines", "label": "0"}]
    assert len(load(f"csv:{path}", "all[1:]")) == 1
    for text, words in (
        ("text,label\nshort\n", "record 0 has another number"),
        ('text\n"open', "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            load(f"csv:{path}", "all")


def test_comma_separated_values_whose_fields_are_named_by_the_spec(tmp_path):
    path = tmp_path / "a=b.csv"
    path.write_text('3,"Fears, again"\n4,Race\n')
    named = f"csv:label|text={path}"
    assert list(load(named, "all")) == [{"label": "3", "text": "Fears, again"}, {"label": "4", "text": "Race"}]
    assert set(load(f"csv:{path}", "all", text="Fears, again")[0]) == {"3", "Fears, again", "text"}  # line 1 names them
    assert len({content(spec, "all") for spec in (named, f"csv:text|label={path}", f"csv:{path}")}) == 3
    for spec, words in (
        (f"csv:label={path}", "record 0 has another number of values than the 1 names given"),
        (f"csv:text|text={path}", "a different name for each field"),
        (f"csv:|text={path}", "write csv:FIELD"),
        ("csv:label|text=/none.csv", "there is no such file"),
    ):
        with pytest.raises(InputError, match=words):
            load(spec, "all")
