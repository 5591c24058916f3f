"""The strength at which the KL to the base is what was asked: the KL by hand, the search on curves, every kind of
control, and what cannot be reached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

import ctg_jax as ctg
from ctg_jax import methods
from ctg_jax.control import Chain, strength_of
from ctg_jax.controls import selection
from ctg_jax.controls.truncate import TopP
from ctg_jax.door.mix import Mix, Part
from ctg_jax.evaluation import strength as strengths
from ctg_jax.evaluation.strength import Divergence, dial, solve
from ctg_jax.io import json_line
from ctg_jax.methods import cav, dexperts, finetune, lm_steer, quark, steer
from ctg_jax.models import hf
from ctg_jax.run.stage import stage
from ctg_jax.stages import controls, sampling, sources
from ctg_jax.stages.strengths import calibrate
from ctg_jax.types import InputError
from tests.experiments.tiny_lm import TEXTS, write_lm


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(lm, params, tokenizer) of a few thousand weights, and its folder."""
    from ctg_jax.data import load_tokenizer

    path = write_lm(tmp_path_factory.mktemp("lm") / "lm")
    model, _ = hf.load(path)
    params = worlds.lively(model, factor=20)
    hf.save(path, model, params, tokens={"eos_token_id": 0})
    return path, model, params, load_tokenizer(path)


@pytest.fixture(scope="module")
def measure(opened):
    return Divergence(*opened[1:], TEXTS, batch=2)


def curve(k, power=2.0, top=np.inf):
    def kl(s):
        kl.calls.append(s)
        return min(top, k * abs(s) ** power)

    kl.calls = []
    return kl


@pytest.mark.parametrize("power", [0.7, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("k", [1e-4, 1.0, 1e4])
def test_the_search_on_curves(k, power):
    kl = curve(k, power)
    found = solve(kl, 0.5)
    assert abs(found.kl / 0.5 - 1) <= 0.02 and len(kl.calls) == len(found.tried) <= 12
    assert found.strength == pytest.approx((0.5 / k) ** (1 / power), rel=0.04) and kl(found.strength) == found.kl
    assert solve(curve(k, power), 0.5, start=-1.0).strength < 0


def test_the_search_on_a_curve_that_bends():
    """Saturating, with a knee, nearly flat at first: the bracket never loses the answer."""
    for kl in (lambda s: 3 * np.tanh(abs(s) / 40) ** 2, lambda s: 1e-3 * s**2 + max(0.0, s - 5) ** 3,
               lambda s: 1e-6 * s + (s > 2) * (s - 2) ** 4):  # fmt: skip
        found = solve(kl, 0.5)
        assert abs(kl(found.strength) / 0.5 - 1) <= 0.02


def test_what_cannot_be_reached_is_told_with_what_can():
    with pytest.raises(InputError, match=r"kl is 0.5 nats per token, but the control reaches at most 0.3"):
        solve(curve(1.0, top=0.3), 0.5)
    with pytest.raises(InputError, match=r"already at 0.7 at strength"):
        solve(lambda s: 0.7, 0.5)
    with pytest.raises(InputError, match=r"the KL jumps from 0.1 at strength .* to 0.9"):
        solve(lambda s: 0.9 if s > 0.6 else 0.1, 0.5)
    for wrong in (0, -1.0, float("nan"), "much"):
        with pytest.raises(InputError, match="expected nats per token above 0"):
            solve(curve(1.0), wrong)


def test_the_kl_is_that_of_the_distributions(opened, measure):
    """Against log-softmaxes of `forward`, text by text, without padding or batches."""
    _, lm, params, tokenizer = opened
    control = 0.5 * steer.example(lm, jax.random.key(3))
    total = count = 0
    for text in TEXTS:
        ids = tokenizer.begun(tokenizer.encode([text])[0])
        prompts, tail = worlds.prompts([ids[:1]]), jnp.asarray([ids[1:]])
        p, q = (
            jax.nn.log_softmax(ctg.forward(lm, params, prompts, tail, c)[..., : tokenizer.vocab])
            for c in (control, ctg.IDENTITY)
        )
        total += float(jnp.sum(jnp.exp(p) * (p - q)))
        count += tail.shape[1]
    assert measure(control) == pytest.approx(total / count, rel=1e-4)
    assert measure(0.0 * control) == pytest.approx(0, abs=1e-6)


def test_a_control_of_the_prompt_is_measured_behind_one(opened):
    """The KL of tokens 4 and on of each text, given its first three, of a control that acts on these alone."""
    _, lm, params, tokenizer = opened
    control = steer.example(lm, jax.random.key(3)).replace(positions=selection.positions("prompt"))
    texts = [text for text in TEXTS if len(tokenizer.encode([text])[0]) > 4]
    total = count = 0
    for text in texts:
        ids = tokenizer.begun(tokenizer.encode([text])[0])
        prompts, tail = worlds.prompts([ids[:3]]), jnp.asarray([ids[3:]])
        p, q = (
            jax.nn.log_softmax(ctg.forward(lm, params, prompts, tail, c)[..., : tokenizer.vocab])
            for c in (control, ctg.IDENTITY)
        )
        total += float(jnp.sum(jnp.exp(p) * (p - q)))
        count += len(ids) - 3
    found = Divergence(*opened[1:], texts, batch=2, prompt=3)(control)
    assert texts and found == pytest.approx(total / count, rel=1e-4) and found > 1e-3


def made(name, lm):
    key = jax.random.key(5)
    if name == "chain":
        return Chain((0.1 * steer.example(lm, key), TopP(jnp.float32(1.0)), 0.2 * lm_steer.example(lm, key))), None
    module = {"steer": steer, "cav": cav, "lm_steer": lm_steer, "dexperts": dexperts, "lora": finetune, "quark": quark}
    return module[name].example(lm, key), "delta/scale" if name == "quark" else None


@pytest.mark.parametrize("name", ["steer", "cav", "lm_steer", "dexperts", "lora", "quark", "chain"])
def test_every_kind_of_control_reaches_what_was_asked_and_nothing_recompiles(opened, measure, name):
    control, leaf = made(name, opened[1])
    start, at = dial(control, leaf)
    base = measure(at(0.0))
    wanted = base + 0.5 * (measure(at(start)) - base)
    before = strengths._kl._cache_size()
    found = solve(lambda value: measure(at(value)), wanted, 3.0 * start)
    assert abs(found.kl / wanted - 1) <= 0.02 and len(found.tried) <= 12
    assert strengths._kl._cache_size() == before
    assert measure(at(found.strength)) == found.kl


def test_a_dial_keeps_ratios_and_names_leaves(opened):
    control, _ = made("chain", opened[1])
    start, at = dial(control)
    assert start == pytest.approx(0.1)
    parts = at(0.3).parts
    assert float(strength_of(parts[0])) == pytest.approx(0.3) and float(strength_of(parts[2])) == pytest.approx(0.6)
    assert parts[1] == control.parts[1] and jax.tree.structure(at(0.3)) == jax.tree.structure(control)
    coded, leaf = made("quark", opened[1])
    moved = dial(coded, leaf)[1](0.25)
    assert float(moved.delta.scale) == 0.25 and float(moved.scale) == float(coded.scale)
    assert dial(0.0 * steer.example(opened[1], jax.random.key(0)))[0] == 1.0
    with pytest.raises(InputError, match="leaf is 'delta/scales', expected a single number of the control: delta/scal"):
        dial(coded, "delta/scales")
    with pytest.raises(InputError, match="has no strength"):
        dial(TopP(jnp.float32(0.9)))
    with pytest.raises(InputError, match="one number for each row"):
        dial(methods.with_strength(control, jnp.ones(3)))


def test_quark_chooses_a_code_so_its_strength_cannot_be_solved_for(opened, measure):
    control, _ = made("quark", opened[1])
    control = control.replace(codes=jnp.array([0.0, 1.0, 4.0])[:, None] * control.codes[-1:])
    least, *_, most = sorted(measure(methods.with_strength(control, s)) for s in (0.0, 0.5, 1.0))
    with pytest.raises(InputError, match="reaches at most"):
        solve(lambda s: measure(methods.with_strength(control, s)), 1.5 * most, 0.5)
    with pytest.raises(InputError, match=r"already at|jumps from"):
        solve(lambda s: measure(methods.with_strength(control, s)), 0.5 * least, 0.5)


def test_the_door(opened, tmp_path):
    lm = ctg.load(opened[0], root=tmp_path)
    pairs = [("the food was good", "the food was bad"), ("we liked it", "we left early"), ("good", "bad")]
    mix = ctg.steer.from_pairs(lm, pairs)
    found = ctg.calibrate(-1 * mix, lm, TEXTS, kl=0.2)
    assert found.strength < 0 and found.kl == pytest.approx(0.2, rel=0.02) and found.tried[-1][1] == found.kl
    assert float(strength_of(found.control.control)) == np.float32(found.strength)
    assert found.control.artifacts == mix.artifacts  # so it can be saved
    assert lm.write(TEXTS, found.control, max_new=4) == lm.write(TEXTS, found.strength * mix, max_new=4)
    with pytest.raises(InputError, match="texts is 'the food', expected a list"):
        ctg.calibrate(mix, lm, "the food", kl=0.2)
    with pytest.raises(InputError, match="there are no texts"):
        ctg.calibrate(mix, lm, [], kl=0.2)
    with pytest.raises(InputError, match="text 2 is too short for a prompt of 1 and a token behind it"):
        ctg.calibrate(mix, lm, ["the food was", "a"], kl=0.2)
    for wrong in (dict(prompt=0), dict(tokens=0), dict(batch=0), dict(prompt=1.5)):
        ((name, value),) = wrong.items()
        with pytest.raises(InputError, match=f"{name} is {value}, expected a whole number of at least 1"):
            ctg.calibrate(mix, lm, TEXTS, kl=0.2, **wrong)
    with pytest.raises(InputError, match="lm is str"):
        ctg.calibrate(mix, "lm", TEXTS, kl=0.2)


def test_the_stage_multiplies_the_strengths_that_it_was_given(opened, tmp_path):
    """Of one control too: an arm that names one control at 0.5 samples at 0.5 times what was found."""
    lm = ctg.load(opened[0], root=tmp_path)
    mix = ctg.steer.from_pairs(lm, [("the food was good", "the food was bad"), ("good", "bad")])
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json_line({"text": text}) for text in TEXTS))
    data = stage(lm.session, sources.load_data, dict(source=f"jsonl:{path}", split="all"))
    alone, half = (
        stage(lm.session, calibrate, dict(kl=0.2, **given), lm=lm.artifact, data=data, controls=mix.artifacts).spec
        for given in ({}, dict(strengths=(0.5,)))
    )
    measure = Divergence(*sampling.opened(lm.artifact), TEXTS)
    for spec, factor in ((alone, 1.0), (half, 0.5)):
        there = measure(methods.with_strength(mix.control, factor * spec["strength"]))
        assert there == pytest.approx(0.2, rel=0.02) and there == pytest.approx(spec["kl"], rel=1e-3)


@pytest.mark.parametrize("prompt", [1, 3])
def test_what_follows_the_prompt_does_not_reach_what_a_control_computes_from_prompts(opened, tmp_path, prompt):
    """The KL of one token behind the prompt, of texts that differ only after it, by the stage and from the front door:
    the description of self-debiasing stands before the prompt and not before the whole text."""
    lm = ctg.load(opened[0], root=tmp_path)
    made = {"method": "self_debias", "init": {"descriptions": ["bad "]}}
    control = stage(lm.session, controls.made, made, lm=lm.artifact)
    ids = [i for text in TEXTS for i in lm.tokenizer.encode([text])[0]][: prompt + 6]
    found = []
    for more in (1, 3, 6):
        (text,) = lm.tokenizer.decode([ids[: prompt + more]])
        assert lm.tokenizer.encode([text])[0] == ids[: prompt + more]
        path = tmp_path / f"{more}.jsonl"
        path.write_text(json_line({"text": text}))
        data = stage(lm.session, sources.load_data, dict(source=f"jsonl:{path}", split="all"))
        settings = dict(kl=1e-3, prompt=prompt, tokens=1)
        at = stage(lm.session, calibrate, settings, lm=lm.artifact, data=data, controls=[control])
        mix = Mix((Part(methods.load(control, lm.lm), control),))
        assert at.spec["strength"] == pytest.approx(ctg.calibrate(mix, lm, [text], **settings).strength)
        found.append(at.metrics())
    assert found[0] == found[1] == found[2] and found[0][0]["kl"] > 0


def test_a_layer_and_a_strength_are_chosen_on_held_out_prompts(opened, tmp_path):
    """The best first, each at the KL that was asked; what is chosen writes what it was chosen for."""
    lm = ctg.load(opened[0], root=tmp_path)
    pairs = [("the food was good", "the food was bad"), ("we liked it", "we left early"), ("good", "bad")]
    candidates = {site: ctg.steer.from_pairs(lm, pairs, sites=site) for site in (1, 2)}
    options = dict(texts=TEXTS, kl=(0.2, 1e6), n=2, max_new=4)
    found = ctg.choose(candidates, lm, ["the", "we"], lambda text: text.count("o"), **options)
    assert sorted(choice.name for choice in found) == [1, 2] and found[0].score >= found[1].score
    assert all(choice.kl == pytest.approx(0.2, rel=0.02) for choice in found)  # nothing reaches the other
    texts = [t for row in lm.write(["the", "we"], found[0].control, n=2, max_new=4) for t in row]
    assert found[0].score == pytest.approx(np.mean([t.count("o") for t in texts]))
    with pytest.raises(InputError, match=r"candidate 1: kl is 1e\+06 nats per token, but the control reaches"):
        ctg.choose(candidates, lm, ["the"], len, texts=TEXTS, kl=(1e6,))
    no_strength = candidates | {"cut": TopP(jnp.float32(0.9))}
    with pytest.raises(InputError, match="candidate 'cut': TopP has no strength"):  # it is not left out in silence
        ctg.choose(no_strength, lm, ["the", "we"], lambda text: text.count("o"), **options)
    with pytest.raises(InputError, match="candidates is"):
        ctg.choose({}, lm, ["the"], len, texts=TEXTS)
    with pytest.raises(InputError, match="score gives nan for"):
        ctg.choose(candidates, lm, ["the"], lambda text: float("nan"), **options)
