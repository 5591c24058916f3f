"""RMT: three tokens by hand, what the mixture learns, reading again without caches, control texts, a fit, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods, tree
from ctg_jax.control import Chain
from ctg_jax.controls import truncate
from ctg_jax.controls.streams import Stream
from ctg_jax.data.tokenizer import to_prompts
from ctg_jax.decode import loop
from ctg_jax.methods import residual
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError, Sampling

WORLD = worlds.Bigram()
P = np.array([0.5, 0.3, 0.2])
BASE = worlds.table([P] * 3)
R = np.array([0.0, 1.0, -1.0])
LM = worlds.tiny(depth=1)
PARAMS = worlds.lively(LM)


def built(r=R, alpha=0.5, own=None, **names):
    """A plug-in with the logits r [3] after every token, or r [3, 3], r[u] after token u."""
    head = {"kernel": jnp.broadcast_to(jnp.asarray(r, jnp.float32), (3, 3)).T}
    stream = Stream({"layers": {"none": jnp.zeros((1, 1))}, "head": head}, lm=WORLD, own=own, before=own is not None)
    return residual.Residual(stream, jnp.zeros((3, 3)), jnp.asarray(alpha, jnp.float32), **names)


def logits(control, cond=None, rows=1, filters=()):
    prompts = worlds.prompts([[0]] * rows, cond=cond)
    z = loop.forward(WORLD, BASE, prompts, jnp.zeros((rows, 1), jnp.int32), Chain((*filters, control)))
    return np.asarray(z[:, 0])


def test_three_tokens_by_hand():
    found = jax.nn.softmax(logits(built()))
    np.testing.assert_allclose(found, [(0.37584, 0.47998, 0.14417)], atol=1e-5)
    np.testing.assert_allclose(logits(built(alpha=1.0)), [R], atol=1e-6)  # the plug-in alone
    np.testing.assert_array_equal(logits(built(alpha=0.0)), logits(residual.neutral(built())))
    base = loop.forward(WORLD, BASE, worlds.prompts([[0]]), jnp.zeros((1, 1), jnp.int32))[:, 0]
    np.testing.assert_array_equal(logits(built(alpha=0.0)), base)
    rows = logits(built(alpha=0.8, cond="much"), {"much": jnp.array([0.0, 0.5, 1.0])}, rows=3)
    np.testing.assert_allclose(rows[1], (rows[0] + rows[2]) / 2, atol=1e-6)  # linear between
    # A filter before removes for good; what it leaves is mixed.
    kept = jax.nn.softmax(logits(built(), filters=(truncate.TopK(2),)))
    two = np.sqrt(P[:2]) * np.exp(R[:2] / 2)
    np.testing.assert_allclose(kept, [(*two / two.sum(), 0)], atol=1e-5)


def test_the_mixture_learns_what_the_base_lacks():
    """(1 - s) z + s r becomes log p_data and a constant."""
    target = np.array([[0.1, 0.6, 0.3], [0.3, 0.3, 0.4], [0.8, 0.1, 0.1]])
    texts = np.repeat(
        worlds.sequences(WORLD, 2), np.round(3000 * np.outer([1 / 3] * 3, 1) * target).astype(int).ravel(), 0
    )
    batch = {"tokens": jnp.asarray(texts), "mask": jnp.ones(texts.shape, bool), "ids": jnp.arange(len(texts))}
    batch["control"] = jnp.full((len(texts), 1), -1)
    start = built(np.zeros((3, 3)), own="control")
    learned, _ = worlds.trained(
        residual.loss(WORLD), start, {"params": BASE}, [batch] * 300, rate=0.1, trained="plugin/params/head/kernel"
    )
    learned = learned.replace(plugin=learned.plugin.replace(own=None, before=False))
    for u in range(3):
        prompts = worlds.prompts([[u]])
        z = loop.forward(WORLD, BASE, prompts, jnp.zeros((1, 1), jnp.int32), learned)[0, 0]
        assert worlds.divergence(target[u], np.asarray(jax.nn.softmax(z), np.float64)) < 1e-4


def test_the_plug_in_alone_does_not_see_the_base():
    batch = {"tokens": jnp.array([[0, 1, 2]]), "mask": jnp.ones((1, 3), bool), "ids": jnp.arange(1)}
    batch["control"] = jnp.full((1, 1), -1)
    out = residual.loss(WORLD, alone=True)(built(own="control"), {"params": BASE}, batch, worlds.prompts([[0]]).keys)
    expected = 2 * np.log(np.exp(R).sum()) - R[1] - R[2]
    assert float(out.total) == pytest.approx(expected, rel=1e-5) and float(out.weight) == 2


CONTROLS = jnp.array([[-1, 6, 2], [9, 3, 3]])


def test_it_equals_reading_every_text_again():
    """The control text before the prompt, which gets no state of the base, and rows of different lengths."""
    given, completions = [[1, 2, 3], [4]], [[5, 6, 7], [1, 2, 10]]
    control = residual.example(LM, jax.random.key(7))
    control = control.replace(plugin=control.plugin.replace(own="control", before=True))
    prompts = worlds.prompts(given, cond={"control": CONTROLS})
    found = loop.forward(LM, PARAMS, prompts, jnp.asarray(completions), control)
    small, weights = control.plugin.lm, control.plugin.params

    @jax.jit
    def by_hand(own, text):
        out = LM.apply(PARAMS, LM.embed(PARAMS, text), jnp.ones(text.shape, bool), last=3)
        x = small.embed(weights, text) + out.hidden @ control.project.T
        x = jnp.concatenate([small.embed(weights, own), x], axis=1)
        return 0.5 * out.logits + 0.5 * small.apply(weights, x, jnp.ones(x.shape[:2], bool), last=3).logits

    for i, row in enumerate(given):
        own = jnp.asarray([[t for t in CONTROLS[i].tolist() if t >= 0]])
        wanted = by_hand(own, jnp.asarray([[*row, *completions[i][:2]]]))[0]
        np.testing.assert_allclose(found[i], wanted, rtol=1e-5, atol=2e-5)
    other = prompts.replace(cond={"control": CONTROLS[::-1]})
    assert float(jnp.abs(loop.forward(LM, PARAMS, other, jnp.asarray(completions), control) - found).max()) > 1e-3
    samples = loop.generate(LM, PARAMS, prompts, control, Sampling(max_new=3))
    logp = jax.nn.log_softmax(loop.forward(LM, PARAMS, prompts, samples.tokens, control))
    chosen = jnp.take_along_axis(logp, samples.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, samples.logp, atol=1e-5)


def test_control_texts_by_hand():
    records = [{"text": "good good fun", "label": 1, "place": "here"}, {"text": "sad", "label": 0, "place": "there"}]
    found = residual.described(records, "{label} {place}, {length}: {words}", labels=("bad", "nice"), words=2)
    assert found == ["nice here, 3: good, fun", "bad there, 1: sad"]
    drawn = {residual.described(records, "{words}", words=1, seed=seed)[0] for seed in range(10)}
    assert drawn == {"good", "fun"}
    for template, words in [
        ("{label.colour}", "no attribute 'colour'"),
        (
            "{mood}",
            r"template is '{mood}', which record 0 cannot fill \('mood'\): expected names in braces among label",
        ),
        ("{label", "which record 0 cannot fill"),
        ("{}", "which record 0 cannot fill"),
    ]:
        with pytest.raises(InputError, match=words):
            residual.described(records, template)


def test_fit_trains_alone_and_then_as_a_mixture(small):
    root, lm, data = small
    training = dict(steps=3, batch=4, tokens=16, warmup=1)
    given = dict(
        lm=lm, data=data, shape=dict(width=8, depth=1, heads=2), pretrain=training, training=training, alpha=0.4
    )
    fitted = residual.fit(
        root, template="Mood: {label}; Words: {length}", labels=("sad", "fun"), wanted="Mood: fun; Words: 5", **given
    )
    model, params, tokenizer = open_lm(lm)
    control = methods.load(fitted, model)
    assert float(control.alpha) == pytest.approx(0.4)
    start = residual.init(model, jax.random.key(0), shape=given["shape"])
    assert tree.size_bytes(control) == tree.size_bytes(start)  # no weights of the base
    cond = residual.conditions(fitted, lm, ["so", "nice day"])
    assert cond["control"].shape[0] == 2 and (cond["control"][0] == cond["control"][1]).all()
    own = residual.controls(tokenizer, ["Mood: fun; Words: 5", "Mood: sad"])
    np.testing.assert_array_equal(own[0], cond["control"][0])
    assert own[1, 0] == -1  # padded on the left
    prompts = to_prompts(tokenizer, ["so", "nice day"], seed=0, cond=cond)
    completion = jnp.array([[3, 4], [5, 6]])
    a, b = (loop.forward(model, params, prompts, completion, *c) for c in ((), (control,)))
    assert float(jnp.abs(a - b).max()) > 1e-3
    with pytest.raises(InputError, match=r"label of record 1 of .* is 1"):
        residual.fit(root, template="{label}", labels=("sad",), **given)
    with pytest.raises(InputError, match=r"The control reads prompts.cond\['control'\]"):
        loop.forward(model, params, prompts.replace(cond=None), completion, control)


def test_the_sizes_of_the_paper_fit_on_paper():
    lm = Transformer.gpt2(width=1280, depth=2, heads=20)
    cond = {"control": jax.ShapeDtypeStruct((1, 12), jnp.int32)}
    out = worlds.written_on_paper(lm, lambda key: residual.init(lm, key), cond=cond)
    assert out.tokens.shape == (1, 2)


def test_bad_input_raises_one_sentence():
    for settings, words in [
        (dict(alpha=float("nan")), "alpha is nan"),
        (dict(shape=dict(layers=3)), "shape has 'layers', expected width, depth and heads"),
        (dict(shape=dict(width=9, heads=2)), "has the width 9, which heads=2 does not divide"),
    ]:
        with pytest.raises(InputError, match=words):
            residual.init(LM, jax.random.key(0), **settings)
    control = residual.init(LM, jax.random.key(0), shape=dict(width=8, depth=1, heads=2))
    long = worlds.prompts([[0]], cond={"control": jnp.zeros((1, 50), jnp.int32)})
    with pytest.raises(InputError, match="but the stream's context is 48: shorten it"):
        loop.forward(LM, PARAMS, long, jnp.zeros((1, 1), jnp.int32), control)
