"""Records in another form: every template by hand, real layouts of data to text, and one sentence for bad templates."""

import pytest

from ctg_jax.data import load
from ctg_jax.data.completions import continuations
from ctg_jax.data.recast import recast
from ctg_jax.run.stage import stage
from ctg_jax.stages import sources
from ctg_jax.types import InputError


def test_templates_by_hand():
    record = {"text": "The end, my friend!", "scene": ["one", "two words"], "n": 3}
    assert recast(record, {"a": "{first}/{last}/{words}"}, "x")["a"] == "The/friend/4"
    made = recast(record, {"a": "{scene} of {n}", "b": "{scene[1]}"}, "x")
    assert made == record | {"a": "one two words of 3", "b": "two words"}
    assert recast(record, {"keywords": "scene"}, "x")["keywords"] == ["one", "two words"]
    assert recast(record, {"keywords": "text"}, "x")["keywords"] == ["The", "end", "my", "friend"]
    assert recast(record, {"a": "{{{n}}}"}, "x")["a"] == "{3}"
    swapped = recast(record, {"text": "{n}", "n": "{text}"}, "x")
    assert (swapped["text"], swapped["n"]) == ("3", record["text"])


def test_the_last_word_first_can_be_undone():
    for text in ("a b c", "to be, or not."):
        made = recast({"text": text}, {"prompt": "{last} |", "text": "{last} | {text}"}, "x")
        assert made["text"].removeprefix(made["prompt"])[1:] == text
        assert made["prompt"].split()[0] == made["text"].rstrip(".").split()[-1]


def test_data_to_text_and_its_prompts(tmp_path):
    (tmp_path / "e2e.csv").write_text('mr,ref\n"name[A], food[Thai]","A is Thai."\n"name[B]",B it is.\n')
    (tmp_path / "concepts.txt").write_text("dog run park\ncat sit mat\n")
    (tmp_path / "scenes.txt").write_text("A dog runs.\nThe cat sits.\n")
    e2e = load(f"csv:{tmp_path / 'e2e.csv'}", "all", text={"prompt": "{mr} =", "text": "{mr} = {ref}"})
    assert e2e[0]["text"] == "name[A], food[Thai] = A is Thai." and e2e[1]["prompt"] == "name[B] ="
    source = f"lines:concepts={tmp_path / 'concepts.txt'}|scene={tmp_path / 'scenes.txt'}"
    templates = {"prompt": "{concepts} =", "text": "{concepts} = {scene}", "keywords": "concepts"}
    settings = dict(source=source, split="all", text=templates)
    rows = stage(tmp_path / "runs", sources.load_data, settings).rows("data.jsonl")
    assert rows[1]["keywords"] == ["cat", "sit", "mat"] and rows[1]["prompt"] == "cat sit mat ="
    assert rows[1]["text"] == "cat sit mat = The cat sits."

    class Words:
        eos = None

        def encode_after(self, prompts, texts):
            return [list(t) for t in texts]

    assert continuations(rows, Words(), 99) == [list(" A dog runs."), list(" The cat sits.")]


def test_other_settings_see_what_templates_make(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a b c"}\n{"text": "d e"}\n{"text": "f g h"}\n')
    settings = dict(source=f"jsonl:{tmp_path / 't.jsonl'}", split="all")
    templates = {"size": "words", "prompt": "{words} words:", "text": "{words} words: {text}"}
    rows = stage(tmp_path, sources.load_data, settings | dict(text=templates, where={"size": 3})).rows("data.jsonl")
    assert [r["text"] for r in rows] == ["3 words: a b c", "3 words: f g h"]
    cut = stage(tmp_path, sources.load_data, settings | dict(text=templates, words=3, limit=1)).rows("data.jsonl")
    assert cut[0]["text"] == "3 words: a" and "prompt" not in cut[0]


def test_files_of_lines_are_identified_by_their_contents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("x\ny\n")
    both = f"lines:a={tmp_path / 'a'}|b={tmp_path / 'b'}"
    assert load(both, "all[1:]", text={"text": "{a}{b}"})[0] == {"a": "y", "b": "y", "text": "yy"}
    first = sources._source_content(both, {"split": "all"}, lambda p: p.read_text())
    (tmp_path / "b").write_text("x\nz\n")
    assert sources._source_content(both, {"split": "all"}, lambda p: p.read_text()) != first


@pytest.mark.parametrize(
    "templates, words",
    [
        ({"text": "{sentence}"}, "the template of 'text' names 'sentence', which x does not have; it has"),
        ({"text": "sentence"}, "the template of 'text' names 'sentence', which x does not have"),
        ({"text": "{scene[7]}"}, r"names 'scene\[7\]', which x does not have"),
        ({"text": "{none}"}, "names 'none', which is None in x: leave such records out"),
        ({"text": "{text"}, "is malformed"),
        ({"text": "{text.upper}"}, "is malformed at 'text.upper': write {field}"),
        ({"text": "{text!r}"}, "is malformed at 'text'"),
        ({"text": 3}, "the template of 'text' is 3, expected a format string or the name of a field"),
        ({"prompt": "scene", "text": "{scene}"}, r"of 'prompt' makes \['c'\] of x, expected a text: write {field} in"),
        ({"prompt": "{last} |", "text": "{text}"}, r"does not begin with the prompt"),
    ],
)
def test_bad_templates_raise_one_sentence(templates, words):
    with pytest.raises(InputError, match=words):
        recast({"text": "a b", "scene": ["c"], "none": None}, templates, "x")


def test_bad_files_of_lines_raise_one_sentence(tmp_path):
    (tmp_path / "a").write_text("x\ny\n")
    (tmp_path / "b").write_text("x\n")
    for spec, words in [
        (f"lines:{tmp_path / 'a'}", "is malformed: write lines:FIELD=PATH"),
        (f"lines:a={tmp_path / 'a'}|b={tmp_path / 'b'}", r"different numbers of lines \(a 2, b 1\)"),
        (f"lines:a={tmp_path / 'nowhere'}", "there is no such file"),
    ]:
        with pytest.raises(InputError, match=words):
            load(spec, "all", text={"text": "{a}"})
    with pytest.raises(InputError, match="names 'sentence', which record 0 of text:"):
        load(f"text:{tmp_path / 'a'}", "all", text={"text": "{sentence}"})
