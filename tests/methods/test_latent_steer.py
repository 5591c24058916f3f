"""Latent steering vectors: what the search scores is what decoding says, at every site; rows stand alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain
from ctg_jax.controls.codes import coded
from ctg_jax.controls.streams import Stream
from ctg_jax.controls.vectors import SoftPrompt
from ctg_jax.decode import loop
from ctg_jax.learn.vector_search import Search
from ctg_jax.methods import dexperts, finetune, latent_steer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sources
from ctg_jax.types import InputError, Prompts, Sampling

POSITIONS = ("all", "first", "prompt")
LM = worlds.tiny()
PARAMS = worlds.lively(LM)
BEGIN = 0
SENTENCES = [([BEGIN, 3, 5, 2, 7], 1), ([BEGIN, 9, 9, 1], 1), ([BEGIN, 4, 4, 8, 1, 6, 2], 3), ([BEGIN, 2], 1)]
SITES = ["embeddings", f"attention:{LM.depth}", "final", "blocks", "memory"]


def learn(site, sentences=SENTENCES, *, hp=None, devices=1, **options):
    control = latent_steer.init(LM, jax.random.key(3), site=site, **(hp or {}))
    z0 = Search("normal").starts(jax.random.key(1), np.arange(len(sentences)), control.z.shape[-1])
    how = Search(**dict(updates=3, batch=4) | options)
    return control, latent_steer.find(LM, PARAMS, control, sentences, z0, how, devices=jax.devices()[:devices])


def prompts(sentences, rows, length=None):
    made = worlds.prompts([row[:first] for row, first in sentences])
    return Prompts(made.tokens, made.mask, made.keys, {"vector": jnp.asarray(rows)})


def likelihood(control, found, sentences=SENTENCES):
    """Log-probability of each sentence's own tokens when decoded with its vector, [N]."""
    bank = control.replace(z=jnp.asarray(found["z"]), choice="vector")
    rest = [row[first:] for row, first in sentences]
    padded = np.zeros((len(rest), max(map(len, rest))), np.int32)
    for i, row in enumerate(rest):
        padded[i, : len(row)] = row
    logp = loop.score(LM, PARAMS, prompts(sentences, np.arange(len(rest))), jnp.asarray(padded), bank)
    return np.asarray([np.asarray(logp)[i, : len(row)].mean() for i, row in enumerate(rest)])


@pytest.mark.parametrize("site", SITES)
def test_the_loss_of_the_search_is_the_score_of_decoding(site):
    control, found = learn(site)
    np.testing.assert_allclose(-found["loss"], likelihood(control, found), rtol=2e-5, atol=2e-5)
    before = likelihood(control, {"z": np.zeros_like(found["z"])})
    assert (likelihood(control, found) > before).mean() > 0.5  # three updates help


@pytest.mark.parametrize(
    "hp", [dict(positions="first"), dict(positions="prompt", dim=3), dict(parts=2, dim=5)], ids=str
)
def test_time_steps_dimensions_and_mixtures_score_as_they_decode(hp):
    control, found = learn("middle", hp=hp)
    assert found["z"].shape[1] == hp.get("dim", hp.get("parts", 1) * LM.width)
    np.testing.assert_allclose(-found["loss"], likelihood(control, found), rtol=2e-5, atol=2e-5)


def test_time_steps_differ_as_they_should():
    """ "first" and "prompt" agree where the prompt is one token, and differ where it has three."""
    z = jax.random.normal(jax.random.key(0), (LM.width,))
    of = {}
    for positions in POSITIONS:
        control = latent_steer.init(LM, jax.random.key(0), positions=positions).replace(z=z)
        ask = prompts(SENTENCES, np.zeros(4, int))
        of[positions] = loop.forward(LM, PARAMS, ask, jnp.ones((4, 3), jnp.int32), control)
    one, three = [0, 1, 3], 2
    np.testing.assert_allclose(of["first"][jnp.array(one)], of["prompt"][jnp.array(one)], atol=1e-5)
    assert float(jnp.abs(of["first"][three] - of["prompt"][three]).max()) > 1e-3
    assert float(jnp.abs(of["all"] - of["prompt"]).max()) > 1e-3


def before(kind):
    if kind == "soft":
        return SoftPrompt(jax.random.normal(jax.random.key(1), (3, LM.width)))
    return coded(jax.random.key(1), finetune.example(LM, jax.random.key(2)), LM.width, 2)


@pytest.mark.parametrize(("positions", "kind"), [*((p, "soft") for p in POSITIONS), ("prompt", "coded")])
def test_time_steps_are_those_of_the_prompt_behind_a_soft_prompt_too(positions, kind):
    z = jax.random.normal(jax.random.key(0), (LM.width,))
    ask, site = prompts(SENTENCES, np.zeros(4, int)), LM.depth + 1
    control = latent_steer.init(LM, jax.random.key(0), site="final", positions=positions).replace(z=z)
    alone, behind = (worlds.where_it_acts(LM, ask, 3, control, c) for c in (None, before(kind)))
    real = np.concatenate([np.asarray(ask.mask), np.ones((4, 3), bool)], axis=1)
    first = real & (np.cumsum(real, axis=1) == 1)
    inside = real & (np.arange(real.shape[1]) < ask.mask.shape[1])
    np.testing.assert_array_equal(alone[site], {"all": real, "first": first, "prompt": inside}[positions])
    np.testing.assert_array_equal(behind, alone)


@pytest.mark.parametrize("order", ["behind", "in front"])
def test_an_edit_of_the_prompt_reaches_its_last_token_and_no_further(order):
    """At the last site only the edited token feels it; the first logits are those of the last token of the prompt."""
    z = jax.random.normal(jax.random.key(0), (LM.width,))
    control = latent_steer.init(LM, jax.random.key(0), site="final", positions="prompt").replace(z=z)
    soft, ask = before("soft"), prompts(SENTENCES, np.zeros(4, int))
    chain = Chain((soft, control) if order == "behind" else (control, soft))
    text = jnp.ones((4, 3), jnp.int32)
    gap = loop.forward(LM, PARAMS, ask, text, chain) - loop.forward(LM, PARAMS, ask, text, soft)
    assert float(jnp.abs(gap[:, 0]).min(axis=-1).max()) > 0 and float(jnp.abs(gap[:, 1:]).max()) == 0
    # An expert that reads along is told where its own prompt ends.
    told = dexperts.experts(Stream(control=chain, lm=LM), alpha=1.0)
    wanted = loop.forward(LM, PARAMS, ask, text, chain)
    np.testing.assert_allclose(loop.forward(LM, PARAMS, ask, text, told), wanted, atol=1e-4)
    out = loop.generate(LM, PARAMS, ask, told, Sampling(max_new=3))
    np.testing.assert_allclose(loop.score(LM, PARAMS, ask, out.tokens, chain), out.logp, atol=1e-4)


def test_a_basis_is_orthonormal():
    basis = latent_steer.init(LM, jax.random.key(0), dim=5).basis
    np.testing.assert_allclose(basis @ basis.T, np.eye(5), atol=1e-5)


def test_greedy_decoding_says_what_was_recovered():
    control, found = learn("middle", updates=300, rate=0.3)
    assert found["solved"].any(), "no sentence was recovered in 300 updates"
    np.testing.assert_array_equal(found["solved"], found["score"] == 1)
    bank = control.replace(z=jnp.asarray(found["z"]), choice="vector")
    out = loop.generate(LM, PARAMS, prompts(SENTENCES, np.arange(4)), bank, Sampling(max_new=4, greedy=True))
    for i in np.flatnonzero(found["solved"]):
        row, first = SENTENCES[i]
        assert np.asarray(out.tokens)[i, : len(row) - first].tolist() == row[first:]


def test_a_row_does_not_know_its_neighbours_or_its_device():
    _, whole = learn("attention:1", updates=8)
    _, split = learn("attention:1", updates=8, devices=8)
    z0 = Search("normal").starts(jax.random.key(1), np.arange(4), LM.width)
    control = latent_steer.init(LM, jax.random.key(3), site="attention:1")
    one = latent_steer.find(LM, PARAMS, control, SENTENCES[2:3], z0[2:3], Search(updates=8), devices=jax.devices()[:1])
    for name in whole:
        np.testing.assert_allclose(whole[name], split[name], rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(whole[name][2:3], one[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_objective_by_hand():
    """In the bigram world the state after the norm is the one-hot of the last token, and z adds W z to the logits. With
    z = 0 the loss of "0 1" after 2 is −(ln P(0|2) + ln P(1|0)) / 2; 2 is followed by 2 most often, so one of two is
    right; one unit along token 1 adds that token's column."""
    p = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]
    world, params = worlds.Bigram(), worlds.table(p)
    control = latent_steer.init(world, jax.random.key(0), site="final")
    rows = {"stream": jax.nn.one_hot(jnp.array([[2, 0, 0]]), 3), "mask": jnp.array([[True, True, False]])}
    rows |= {"counted": rows["mask"], "target": jnp.array([[0, 1, 0]]), "start": jnp.array([1])}
    f = latent_steer.objective(world, control)
    loss, score, solved = f(jnp.zeros((1, 3)), rows, (params, None))
    np.testing.assert_allclose(loss, [-(np.log(0.3) + np.log(0.3)) / 2], rtol=1e-5)
    assert (score.tolist(), solved.tolist()) == ([0.0], [False])
    z = jnp.array([[0.0, 1.0, 0.0]])
    moved = np.log(p) + np.log(p)[1]
    want = [np.log(np.exp(moved[u]).sum()) - moved[u][x] for u, x in ((2, 0), (0, 1))]
    np.testing.assert_allclose(f(z, rows, (params, None))[0], [np.mean(want)], rtol=1e-5)


def test_the_blocks_above_a_site_are_a_model_of_their_own():
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 7, 7]])
    mask = jnp.array([[True] * 4, [True, True, True, False]])
    params = LM.unstack(PARAMS)
    whole = LM.apply(params, LM.embed(params, tokens), mask, tap=lambda h: h)
    for site in range(LM.depth + 1):
        upper, weights = LM.above(params, site)
        assert upper.depth == LM.depth - site
        np.testing.assert_allclose(upper.apply(weights, whole.taps[site], mask).logits, whole.logits, atol=1e-5)


def test_fit_end_to_end(small, tmp_path):
    _, lm, data = small
    config = dict(dim=7, positions="all", tokens=20, search=dict(updates=4, batch=4))
    found = latent_steer.fit(tmp_path, lm=lm, data=data, **config)
    model = open_lm(lm)[0]
    control = methods.load(found, model)
    rows = found.metrics()
    texts = data.rows("data.jsonl")
    assert control.z.shape == (len(texts), 7) and [r["record"] for r in rows] == list(range(len(texts)))
    assert all(0 <= r["right"] <= 1 and r["updates"] <= 4 and r["loss"] > 0 for r in rows)
    assert not (found.path / "partial").exists()
    strong = methods.with_strength(control, 0.0)
    assert float(strong.scale) == 0.0


def test_long_sentences_are_left_out_or_refused(small, tmp_path):
    _, lm, _ = small

    def data(*texts):
        file = tmp_path / f"{abs(hash(texts))}.jsonl"
        file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return stage(tmp_path, sources.load_data, dict(source=f"jsonl:{file}", split="all"))

    found = latent_steer.fit(tmp_path, lm=lm, data=data("nice fun", "so " * 30), tokens=12, search=dict(updates=1))
    first, second = found.metrics()
    assert "loss" in first and second["left_out"]
    with pytest.raises(InputError, match=r"sentence 2 .* has \d+ tokens, but the model's context is 64"):
        latent_steer.fit(tmp_path, lm=lm, data=data("nice", "so " * 100), search=dict(updates=1))


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(site="block:9"), "site is 'block:9', expected one of embeddings"),
        (dict(site=99), "site is 99"),
        (dict(positions="middle"), "positions is 'middle', expected one of all, prompt, generated, answer"),
        (dict(dim=0), "dim is 0, expected a number from 1"),
        (dict(dim=LM.width + 1), "expected a number from 1"),
    ],
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(InputError, match=message):
        latent_steer.init(LM, jax.random.key(0), **bad)


def test_a_vector_of_another_model_is_refused():
    other = latent_steer.init(worlds.Bigram(), jax.random.key(0), site=(1,))
    with pytest.raises(InputError, match="learned on another model"):
        loop.forward(LM, PARAMS, prompts(SENTENCES, np.zeros(4, int)), jnp.ones((4, 2), jnp.int32), other)
