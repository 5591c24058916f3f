"""Blanks in given texts: which tokens are given, what is drawn in a blank, the front door and the script, bad input."""

import jax
import numpy as np
import pytest

from ctg_jax import methods
from ctg_jax.door.mix import Mix, Part
from ctg_jax.door.model import Model
from ctg_jax.learn import infilling
from ctg_jax.learn.fitting import keep
from ctg_jax.learn.infilling import OPEN, Blanks
from ctg_jax.methods import finetune
from ctg_jax.models import masked
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sampling
from ctg_jax.types import InputError
from experiments import cli, generate

TEXT = "good ___ day"
CHAT = '{"messages": [{"role": "user", "content": "a ___ b"}]}'


SHAPES = {"mdlm": {}, "diffusion_lm": dict(dim=4, calls=4)}


def untrained(run, *, lm, method):
    """Stage: a model with rows of 16 tokens, as a `fit` would leave it."""
    model, _, tokenizer = open_lm(lm)
    shape = dict(width=16, depth=1, heads=2, length=16, eos=tokenizer.eos) | SHAPES[method]
    keep(run, methods.get(method).init(model, jax.random.key(0), **shape), method, shape)


@pytest.fixture(scope="module")
def models(small):
    """The artifacts of an untrained masked model and of an untrained Diffusion-LM."""
    return {name: stage(small[0], untrained, {"method": name}, lm=small[1]) for name in SHAPES}


def test_the_tokens_of_a_text_with_blanks(small):
    tokenizer = open_lm(small[1])[2]
    good, day, fun = (tokenizer.encode([t])[0] for t in ("good", " day", "fun"))
    blank = Blanks(tokens=2)
    assert blank.row(tokenizer, "good ___ day", 1) == [*good, OPEN, OPEN, *day]
    assert blank.row(tokenizer, "good ___", 1) == [*good, OPEN, OPEN]
    assert Blanks("[…]", 1).row(tokenizer, "good […] […] day", 1) == [*good, OPEN, OPEN, *day]
    assert blank.row(tokenizer, "good\n___ day", 1) == [*tokenizer.encode(["good\n"])[0], OPEN, OPEN, *day]
    begun = tokenizer.encode_prompts([""])[0] if tokenizer.adds_bos else []
    assert blank.row(tokenizer, "___fun", 1) == [*begun, OPEN, OPEN, *fun]


@pytest.mark.parametrize("name", ["mdlm", "diffusion_lm"])
def test_what_is_given_stays_and_a_blank_holds_no_end(small, models, name):
    lm = small[1]
    opened, control = sampling.opened(lm), sampling.build(lm, [models[name]], [None])
    asked = dict(options=sampling.Options(n=6, batch=5, seed=3), blanks=Blanks(tokens=3))
    texts = [TEXT, "___ fun and nice"]
    rows = [row for part in infilling.fill(*opened, texts, control, **asked) for row in part]
    assert [(r["prompt_id"], r["sample"]) for r in rows] == [(i, j) for i in range(2) for j in range(6)]
    tokenizer = opened[2]
    for row in rows:
        wanted = asked["blanks"].row(tokenizer, texts[row["prompt_id"]], 1)
        assert len(row["tokens"]) == len(wanted) and row["prompt"] == texts[row["prompt_id"]]
        assert all(w in (OPEN, t) and t not in tokenizer.ends for w, t in zip(wanted, row["tokens"]))
    assert rows[0]["text"].startswith("good") and rows[0]["text"].endswith(" day")
    assert rows[6]["text"].endswith(" fun and nice") and len({r["text"] for r in rows[6:]}) > 1
    whole = asked | dict(options=sampling.Options(n=6, batch=12, seed=3))
    (again,) = infilling.fill(*opened, texts, control, **whole)
    assert [r["tokens"] for r in again] == [r["tokens"] for r in rows]


def test_one_missing_token_is_drawn_from_what_the_network_predicts(small, models):
    """The only open place of a row: the softmax of the logits there, without ends and without ids that are no token."""
    lm = small[1]
    model, params, tokenizer = sampling.opened(lm)
    control = methods.load(models["mdlm"], model)
    loud = jax.tree.map(lambda x: 16 * x if x.ndim > 1 else x, control.params)
    control = control.replace(params=loud)
    options = sampling.Options(n=4000, batch=4000, seed=0)
    (rows,) = infilling.fill(model, params, tokenizer, [TEXT], control, options, Blanks(tokens=1))
    row = np.full((1, 16), tokenizer.eos)
    wanted = Blanks(tokens=1).row(tokenizer, TEXT, 1)
    place = wanted.index(OPEN)
    row[0, : len(wanted)] = [control.mask if t == OPEN else t for t in wanted]
    logits = np.array(masked.denoise(control.net, loud, row)[0, place, : model.vocab], np.float64)
    logits[~tokenizer.known(model.vocab)] = -np.inf
    logits[list(tokenizer.ends)] = -np.inf
    p = np.exp(logits - logits.max())
    share = np.bincount([r["tokens"][place] for r in rows], minlength=model.vocab) / 4000
    assert np.abs(share - p / p.sum()).sum() / 2 < 0.1 and p.max() / p.sum() > 0.04


def test_the_front_door_and_the_script(small, models, capsys, tmp_path):
    root, lm, _ = small
    door = Model(lm)
    control = Mix((Part(methods.load(models["mdlm"], open_lm(lm)[0]), models["mdlm"]),))
    (one,) = door.infill([TEXT], control, tokens=2, seed=1)
    assert one.startswith("good") and one.endswith(" day") and "___" not in one
    assert door.write(["good", "so bad"], [0.0 * control, control], max_new=3, seed=1)[0].count(" ") < 16
    ((_, second),) = door.infill([TEXT], control, tokens=2, seed=1, n=2)
    assert second.startswith("good")
    flags = [f"--lm={lm.path}", f"--root={root}", f"--control={models['mdlm'].path}", "--seed=1", "--blank_tokens=2"]
    assert cli.run(generate.main, [*flags, "--blank=___", TEXT]) in (0, None)
    assert capsys.readouterr().out == one.replace("\n", "\\n") + "\n"
    assert cli.run(generate.main, [*flags, "--blank=___", "--stop=day", TEXT]) == 2
    assert "--stop has no meaning for texts with blanks" in capsys.readouterr().err
    asked = tmp_path / "asked.jsonl"
    for line, words in [
        ("", "there are no texts to fill"),
        (CHAT, "text 1 is [{'role': 'user', 'content'"),
    ]:
        asked.write_text(line)
        assert cli.run(generate.main, [*flags, "--blank=___", f"--file={asked}"]) == 2
        assert words in capsys.readouterr().err
    assert cli.run(generate.main, [*flags, "--blank=___", "--max_new=9", TEXT]) == 2
    assert "--max_new has no meaning for texts with blanks" in capsys.readouterr().err


def test_bad_input(small, models):
    lm = small[1]
    opened, door = sampling.opened(lm), Model(lm)
    control = Mix((Part(methods.load(models["mdlm"], opened[0]), models["mdlm"]),))
    tuned = finetune.init(opened[0], jax.random.key(0))
    for texts, settings, words in [
        (["good day"], {}, "text 1 has no blank: write '___' where words are missing"),
        (["good ___", "___ ___"], {}, "text 2 holds nothing but blanks: give at least one word"),
        ([TEXT, 3], {}, "text 2 is 3, expected a text with blanks"),
        (["good ___ " * 9], {}, "tokens with its blanks, but rows of 16 tokens were trained on"),
        (TEXT, {}, "texts is 'good ___ day', expected a list of texts with blanks"),
        ([TEXT], dict(blank=" "), "blank is ' ', expected a text that marks a blank"),
        ([TEXT], dict(tokens=0), "blank_tokens is 0, expected a whole number of at least 1"),
        ([TEXT], dict(control=tuned), "the control does not write whole rows, so it cannot fill blanks"),
        ([TEXT], dict(control=None), "the control does not write whole rows"),
    ]:
        with pytest.raises(InputError) as error:
            door.infill(texts, **({"control": control} | settings))
        assert words in str(error.value), str(error.value)
