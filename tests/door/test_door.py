"""The front door: text in, text out. What it gives is what the stages give, and bad input is one sentence."""

import logging
import re
from inspect import getsource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ctg_jax as ctg
from ctg_jax import methods
from ctg_jax.control import IDENTITY, STRENGTHS, Chain, Control
from ctg_jax.controls.truncate import TopP
from ctg_jax.decode import loop
from ctg_jax.door import inputs
from ctg_jax.methods.hidden.steer import Steer
from ctg_jax.models import hf
from ctg_jax.run.stage import open_artifact
from ctg_jax.stages import sampling
from ctg_jax.types import InputError
from tests.experiments.tiny_lm import write_lm
from tests.laws import worlds

PAIRS = [
    ("the food was good", "the food was bad"),
    ("we liked it", "we left early"),
    ("good", "bad"),
    ("a plate", "wait"),
]
TEXTS = ["the food was", "we", "a long wait for"]
QUICK = {"training": {"steps": 2, "batch": 4, "tokens": 16}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("door")


@pytest.fixture(scope="module")
def lm(folder):
    path = write_lm(folder / "lm")
    model, _ = hf.load(path)
    hf.save(path, model, worlds.lively(model, factor=20), tokens={"eos_token_id": 0})
    return ctg.load(path, root=folder / "root")


@pytest.fixture(scope="module")
def steer(lm):
    return ctg.steer.from_pairs(lm, PAIRS)


def test_five_lines(lm, steer, folder):
    plain = lm.write(TEXTS, max_new=6)
    pushed = lm.write(TEXTS, control=20 * steer, max_new=6)
    assert [type(t) for t in plain] == [str] * 3 and plain != pushed
    assert lm.write(TEXTS, control=0 * steer, max_new=6) == plain == lm.write(TEXTS, control=IDENTITY, max_new=6)
    (20 * steer).save(folder / "cheerful")
    again = ctg.load_control(folder / "cheerful", lm)
    assert repr(again) == "20 * steer" and lm.write(TEXTS, control=again, max_new=6) == pushed


def test_a_mix_is_one_file_to_pass_on(lm, steer, folder):
    """With strengths, the settings of its parts and the fingerprint of the model; twice loaded it is one artifact."""
    both = 20 * steer + 3 * steer
    both.save(folder / "both.safetensors")
    again = ctg.load_control(folder / "both.safetensors", lm)
    assert repr(again) == "20 * steer + 3 * steer"
    assert lm.write(TEXTS, again, max_new=4) == lm.write(TEXTS, both, max_new=4)
    twice = ctg.load_control(folder / "both.safetensors", lm)
    assert twice.artifacts == again.artifacts
    (2 * again).save(folder / "both.safetensors")  # what was loaded can be saved, and replaces the file
    assert repr(ctg.load_control(folder / "both.safetensors", lm)) == "2 * steer + 2 * steer"
    again.save(folder / "both")  # and as a folder
    assert repr(ctg.load_control(folder / "both", lm)) == repr(again)
    (folder / "no.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be read"):
        ctg.load_control(folder / "no.safetensors", lm)
    hf.save(folder / "model", lm.lm, hf.load(folder / "lm")[1])
    with pytest.raises(InputError, match="holds tensors, but no control"):
        ctg.load_control(folder / "model" / "model.safetensors", lm)
    other = ctg.load(write_lm(folder / "other", width=8), root=folder / "root")
    with pytest.raises(InputError, match=r"expected .*: it was fitted on another model"):
        ctg.load_control(folder / "both.safetensors", other)


def test_texts_are_those_of_the_stages(lm, steer):
    """The same prompts, seed and control through `build` and `complete`, which experiments call."""
    control = sampling.build(lm.artifact, steer.artifacts, [20.0], {"top_p": 0.9})
    options = sampling.Options(n=2, max_new=6, seed=3)
    rows = [row for part in sampling.complete(*sampling.opened(lm.artifact), TEXTS, control, options) for row in part]
    made = lm.write(TEXTS, 20 * steer, max_new=6, seed=3, n=2, top_p=0.9, details=True)
    assert [row["text"] for row in rows] == [w.text for texts in made for w in texts]
    assert [row["tokens"] for row in rows] == [w.tokens for texts in made for w in texts]
    np.testing.assert_allclose([row["logp"] for row in rows], [sum(w.logps) for ws in made for w in ws], atol=1e-4)
    assert all(len(w.logps) == len(w.tokens) for texts in made for w in texts)


def test_a_control_for_each_text(lm, steer):
    mixed = lm.write(TEXTS, control=[20 * steer, None, -20 * steer], max_new=6)
    alone = [lm.write(TEXTS, control=c, max_new=6)[i] for i, c in enumerate((20 * steer, None, -20 * steer))]
    assert mixed == alone and mixed[0] != lm.write(TEXTS, max_new=6)[0]
    assert lm.write(TEXTS, control=np.array([20.0, 0.0, -20.0]) * steer, max_new=6) == mixed
    assert lm.write(TEXTS, control=[20, 0, -20] * steer, max_new=6) == mixed


def test_rows_that_differ_in_strength_share_a_batch_and_a_program(lm, steer):
    lm.write(TEXTS, control=[1 * steer, 2 * steer, 3 * steer], max_new=6)
    before = loop.loop._cache_size()
    strengths = (20, -20, 0)
    mixed = lm.write(TEXTS, control=[s * steer for s in strengths], max_new=6)
    assert loop.loop._cache_size() == before
    assert len(inputs.groups([s * steer for s in strengths])) == 1
    assert mixed == [lm.write(TEXTS, control=s * steer, max_new=6)[i] for i, s in enumerate(strengths)]
    soft = ctg.finetune.from_texts(lm, ["good", "bad"], adapter={"kind": "prompt"}, length=3, **QUICK)
    both = [s * steer + soft for s in strengths]  # a soft prompt has no strength, and joins the rows all the same
    assert len(inputs.groups(both)) == 1 and len(inputs.groups([*both, soft])) == 2
    again = lm.write(TEXTS, control=both, max_new=6)
    assert again == [lm.write(TEXTS, control=c, max_new=6)[i] for i, c in enumerate(both)]


@pytest.mark.parametrize("name", methods.names())
def test_an_entry_for_each_row_multiplies_the_strength_where_a_class_says_so(name):
    """So the front door may give every row a strength of its own."""
    for found in vars(methods.get(name)).values():
        own = isinstance(found, type) and issubclass(found, Control) and "cond" in found.__dataclass_fields__
        if own and any(s in found.__dataclass_fields__ for s in STRENGTHS):
            assert found.cond_multiplies == bool(
                re.search(r"per_row\(self\.\w+, prompts, self\.cond\)", getsource(found))
            )


def test_the_algebra_is_that_of_chains(lm, steer):
    other = ctg.cav.from_texts(lm, [text for pair in PAIRS for text in pair], [1, 0] * len(PAIRS))
    control = (2 * steer + 0.5 * other + TopP(0.9)).control
    assert isinstance(control, Chain) and [type(c).__name__ for c in control.parts] == ["Steer", "Cav", "TopP"]
    assert [float(c.scale) for c in control.parts[:2]] == [2.0, 0.5]
    both = 3 * (steer + other)
    assert [float(p.control.scale) for p in both.parts] == [3.0, 3.0] and float(steer.control.scale) == 1.0
    left = (TopP(0.9) + steer).control
    assert [type(c).__name__ for c in left.parts] == ["TopP", "Steer"]
    assert repr(2 * steer + TopP(0.9)) == "2 * steer + TopP"


def test_controls_have_the_same_algebra(steer):
    a = steer.control
    assert jax.tree.all(jax.tree.map(jnp.array_equal, 3 * a, methods.with_strength(a, 3)))
    assert float((2 * (3 * a)).scale) == float((np.float64(2) * a).scale) == float((a * jnp.float32(2)).scale) == 2.0
    assert jax.tree.structure((a + a) + a) == jax.tree.structure(a + (a + a)) == jax.tree.structure(Chain((a, a, a)))
    assert (IDENTITY + a) is a and (a + IDENTITY) is a
    with pytest.raises(TypeError):
        a + 2


def test_a_second_length_compiles_nothing(lm):
    lm.write(["the food was"], max_new=6)
    before = loop.loop._cache_size()
    lm.write(["we"], max_new=6, seed=5)
    lm.write(["a long wait"], max_new=6)
    assert loop.loop._cache_size() == before
    assert "".join(lm.stream("we", max_new=6)) == lm.write(["we"], max_new=6)[0]
    before = loop._onward._cache_size()
    list(lm.stream("the food", max_new=6))
    assert loop._onward._cache_size() == before


def test_streams_are_what_is_written(lm, steer):
    for stop in ((), ["oo", "a"]):
        for text in TEXTS[:2]:
            asked = dict(control=20 * steer, max_new=6, seed=7, stop=stop)
            assert "".join(lm.stream(text, **asked)) == lm.write([text], **asked)[0]


def test_a_text_ends_behind_the_first_stop(lm):
    free = lm.write(TEXTS * 3, max_new=6, details=True)
    stop = free[0].text[3:5]
    for whole, ended in zip(free, lm.write(TEXTS * 3, max_new=6, stop=[stop, "x" * 9], details=True)):
        at = whole.text.find(stop)
        assert ended.text == (whole.text if at < 0 else whole.text[: at + len(stop)])
        assert ended.tokens == whole.tokens[: len(ended.tokens)]


@pytest.mark.parametrize("name", ["cav", "lm_steer", pytest.param("dexperts", marks=pytest.mark.slow)])
def test_methods_learn_from_pairs_and_from_texts(lm, name):
    module = getattr(ctg, name)
    settings = {} if name == "cav" else QUICK
    if name == "lm_steer":
        settings = {**settings, "rank": 4}
    pairs = module.from_pairs(lm, PAIRS, **settings)
    texts = module.from_texts(lm, [t for pair in PAIRS for t in pair], [1, 0] * len(PAIRS), **settings)
    assert pairs.artifacts == texts.artifacts  # the same records, so the same stages
    assert pairs.artifacts[0].spec["method"] == name and lm.write(TEXTS, 2 * pairs, max_new=6)


def test_finetuning_and_soft_prompts_learn_from_texts(lm, folder):
    tuned = ctg.finetune.from_texts(lm, [a for a, _ in PAIRS], **QUICK)
    soft = ctg.finetune.from_texts(lm, [a for a, _ in PAIRS], adapter={"kind": "prompt"}, length=3, **QUICK)
    both = tuned + soft
    both.save(folder / "both")
    both.save(folder / "both")  # replaces the first
    again = ctg.load_control(folder / "both", lm)
    assert lm.write(TEXTS, again, max_new=6) == lm.write(TEXTS, both, max_new=6)


def test_a_strength_that_breaks_the_text_is_told(lm, steer, caplog, monkeypatch):
    """This model was never trained, so no text of it is fluent, and a fifth more perplexity is called broken here."""
    monkeypatch.setattr("ctg_jax.door.model.BREAKS", 1.1)
    monkeypatch.setattr(logging.getLogger("ctg_jax"), "propagate", True)
    caplog.set_level("WARNING")
    lm.write(TEXTS, 0.1 * steer, max_new=6, n=2, watch=True)
    assert not caplog.records
    written = lm.write(TEXTS, -400 * steer, max_new=6, n=2, watch=True)
    assert written == lm.write(TEXTS, -400 * steer, max_new=6, n=2)
    (record,) = caplog.records
    assert "without control: the text is likely broken" in record.getMessage()


def test_what_is_saved_is_an_artifact(lm, steer, folder):
    (4 * steer).save(folder / "four")
    artifact = open_artifact(folder / "four")
    built = sampling.build(lm.artifact, [artifact], [None])
    assert float(built.scale) == 4.0 and artifact.spec["fingerprints"]["lm"] == lm.artifact.fingerprint


def test_a_mix_that_cannot_be_replaced_is_kept(lm, steer, folder, monkeypatch):
    (3 * steer).save(folder / "kept")
    rename = Path.rename

    def failing(path, target):
        if path.name.endswith(".new"):
            raise OSError(28, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        with pytest.raises(InputError, match="kept cannot be written"):
            (5 * steer).save(folder / "kept")
    assert repr(ctg.load_control(folder / "kept", lm)) == "3 * steer"


def test_what_was_fitted_is_found_again(lm, steer, folder):
    before = len(lm.session.tally.executed)
    assert ctg.steer.from_pairs(lm, list(PAIRS)).artifacts == steer.artifacts
    assert len(lm.session.tally.executed) == before


def test_strengths_are_steps_of_the_stream(lm, steer):
    rows = {row["site"]: row for row in steer.artifacts[0].metrics()}
    (site,) = np.flatnonzero(np.asarray(steer.control.gate))
    assert np.linalg.norm(steer.control.vector[site]) == pytest.approx(rows[site]["stream_norm"] / 20, rel=1e-4)


def broken(lm, steer, tmp):
    """name -> (what is asked, words of the sentence)."""
    write = lm.write
    other = ctg.load(write_lm(tmp / "other", seed=1), root=tmp / "root")
    return {
        "one string": (lambda: write("the food"), "prompts is one string"),
        "one conversation": (lambda: write([{"role": "user", "content": "hi"}]), "prompts is one conversation"),
        "a number": (lambda: write(3), "prompts is 3, expected a list"),
        "no prompts": (lambda: write([]), "prompts is an empty list"),
        "an empty prompt": (lambda: write(["a", " "]), "prompt 2 is empty"),
        "a prompt of another kind": (lambda: write(["a", 3]), "prompt 2 is 3"),
        "a malformed message": (lambda: write([[{"role": "robot", "content": "a"}]]), "prompt 1: message 1"),
        "no chat template": (lambda: write([[{"role": "user", "content": "a"}]]), "template"),
        "a system prompt for a text": (lambda: write(["a"], system="be kind"), "system is given"),
        "a prompt that is too long": (lambda: write(["good " * 40]), "context"),
        "half of a surrogate pair": (lambda: write(["a\ud800"]), "Unicode"),
        "a class": (lambda: write(["a"], control=Steer), "control is the class Steer"),
        "a path": (lambda: write(["a"], control="cheerful"), "load it with ctg_jax.load_control"),
        "a module": (lambda: write(["a"], control=ctg.steer), "expected a control"),
        "controls for others": (lambda: write(["a"], control=[steer] * 2), "control is a list of 2, but there are 1"),
        "strengths for others": (lambda: write(["a"], control=np.ones(2) * steer), "holds 2 numbers, but there are 1"),
        "no strength": (lambda: 2 * TopP(0.9), "TopP has no strength"),
        "a strength that is a word": (lambda: "much" * steer, "strength is 'much', expected a number"),
        "a strength that is not finite": (lambda: float("nan") * steer, "strength is nan"),
        "a sum with a number": (lambda: steer + 2, "the right side of \\+ is 2"),
        "another language model": (lambda: other.write(["a"], control=steer), "fitted on another language model"),
        "p above 1": (lambda: write(["a"], top_p=1.5), "top_p is 1.5"),
        "p that is a word": (lambda: write(["a"], top_p="0.9"), "top_p is '0.9', expected a number"),
        "an unknown option": (lambda: write(["a"], top_q=0.9), "did you mean 'top_p'"),
        "half a token": (lambda: write(["a"], top_k=2.5), "top_k is 2.5, expected a whole number"),
        "no new tokens": (lambda: write(["a"], max_new=0), "max_new is 0"),
        "a number of tokens as text": (lambda: write(["a"], max_new="5"), "max_new is '5'"),
        "an empty stop": (lambda: write(["a"], stop=[""]), "stop holds ''"),
        "a stop that is a token": (lambda: write(["a"], stop=[13]), "stop holds 13"),
        "a negative seed": (lambda: write(["a"], seed=-1), "seed is -1"),
        "no completions": (lambda: write(["a"], n=0), "n is 0"),
        "greedy by word": (lambda: write(["a"], greedy="yes"), "greedy is 'yes'"),
        "a stream of a list": (lambda: lm.stream(["a"]), "expected one text or one conversation"),
        "no model": (lambda: ctg.load(None), "source is None"),
        "a model that is not there": (lambda: ctg.load("/nowhere/at all"), "there is no such folder"),
        "another dtype": (lambda: ctg.load(tmp / "other", dtype="int8", root=tmp / "root"), "dtype is 'int8'"),
        "no pairs": (lambda: ctg.steer.from_pairs(lm, []), "pairs is an empty list"),
        "texts for pairs": (lambda: ctg.steer.from_pairs(lm, ["good", "bad"]), "pair 1 is 'good', expected two texts"),
        "a side that is missing": (lambda: ctg.steer.from_pairs(lm, [("good",)]), "pair 1 is"),
        "an empty side": (lambda: ctg.steer.from_pairs(lm, [("good", "")]), "pair 1 holds an empty text"),
        "sides that are equal": (lambda: ctg.steer.from_pairs(lm, [("a", "a")]), "the same text twice"),
        "no model to learn on": (lambda: ctg.steer.from_pairs(lm.lm, PAIRS), "lm is Transformer"),
        "an unknown setting": (lambda: ctg.steer.from_pairs(lm, PAIRS, site=1), "did you mean 'sites'"),
        "labels for others": (lambda: ctg.cav.from_texts(lm, ["a", "b"], [1]), "labels is a list of 1"),
        "labels that are words": (lambda: ctg.cav.from_texts(lm, ["a", "b"], ["x", "y"]), "label 1 is 'x'"),
        "one label only": (lambda: ctg.steer.from_texts(lm, ["a", "b"], [1, 1]), "texts are needed on both sides"),
        "saving what was made by hand": (lambda: (steer + TopP(0.9)).save(tmp / "x"), "TopP was made by hand"),
        "saving over something else": (lambda: steer.save(tmp / "other"), "holds no saved control"),
        "loading nothing": (lambda: ctg.load_control(tmp / "none", lm), "holds no artifact"),
        "loading for another model": (lambda: _moved(steer, tmp, other), "fitted on another language model"),
        "a method that is none": (lambda: ctg.steering, "no attribute"),
    }  # fmt: skip


def _moved(steer, tmp, other):
    steer.save(tmp / "saved")
    ctg.load_control(tmp / "saved", other)


NAMES = re.findall(r'^        "(.+?)": \(lambda', Path(__file__).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def cases(lm, steer, tmp_path_factory):
    return broken(lm, steer, tmp_path_factory.mktemp("broken"))


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_sentence(cases, name):
    ask, words = cases[name]
    with pytest.raises((InputError, AttributeError), match=words) as caught:
        ask()
    text = str(caught.value)
    assert "\n" not in text and 10 < len(text) < 400


def test_every_case_is_asked(cases):
    assert set(NAMES) == set(cases) and len(NAMES) >= 25
