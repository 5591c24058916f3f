"""GeDi: three tokens by hand, Bayes' rule on a mixture, brute force without caches, the loss, a fit, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from laws import worlds

from ctg_jax import methods, tree
from ctg_jax.control import Chain, Control
from ctg_jax.decode import loop
from ctg_jax.methods import gedi
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.record import record
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError

WORLD = worlds.Bigram()
P, A, B = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.4, 0.4])
BASE = worlds.table([P] * 3)
LM = worlds.tiny(depth=1)
PARAMS = worlds.lively(LM)


@struct.dataclass
class Classes:
    """A class-conditional model of independent tokens, in place of a stream; probabilities [C, V]."""

    p: np.ndarray
    lm: worlds.Bigram = struct.field(pytree_node=False, default=WORLD)

    def check(self, prompts):
        pass

    def readers(self, name):
        return ()

    def init(self, prompts, length):
        return ()

    def read(self, tokens, mask, new, reading, everything=False):
        n = tokens.shape[1] + 1 if everything else new
        z = jnp.log(jnp.asarray(self.p, jnp.float32))[None, :, None]
        return jnp.broadcast_to(z, (len(tokens), len(self.p), n, z.shape[-1])), None, ()


def built(p=(B, A), alpha=1.0, cover=1.0, tau=1.0, prior=(0.0, 0.0), temper=1.0, **static):
    """The first class is B, the wanted one A."""
    numbers = (jnp.asarray(x, jnp.float32) for x in (temper, prior, 0.0, alpha, cover, tau))
    return gedi.Gedi(Classes(np.array(p)), *numbers, **{"skip": True, **static})


def next_token(control, completion=(0,), cond=None, rows=1, base=BASE):
    prompts = worlds.prompts([[0]] * rows, cond=cond)
    z = loop.forward(WORLD, base, prompts, jnp.asarray([completion] * rows, jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[:, -1]))


ONE, TWO = (0.68988, 0.23653, 0.07359), (0.81675, 0.16002, 0.02323)


def test_three_tokens_by_hand():
    found = next_token(built(alpha=2.0, cond="much"), cond={"much": jnp.array([0.5, 1.0, 0.0])}, rows=3)
    np.testing.assert_allclose(found, [ONE, TWO, P], atol=1e-5)
    # Each row has a class of its own; the other one is that of A.
    other = P * (1 - np.array([0.75, 0.42857, 0.2]))
    found = next_token(built(wanted="class"), cond={"class": jnp.array([1, 0])}, rows=2)
    np.testing.assert_allclose(found, [ONE, other / other.sum()], atol=1e-5)
    # After token 0: the mean over two tokens, and the sum, which is Bayes' rule.
    np.testing.assert_allclose(next_token(built(), (0, 0)), [(0.57886, 0.27785, 0.14328)], atol=1e-5)
    summed = P * np.array([0.9, 0.69231, 0.42857])
    np.testing.assert_allclose(next_token(built(mean=False), (0, 0)), [summed / summed.sum()], atol=1e-5)
    # The prompt is token 0 as well, so that reading it is as far as one token of text.
    np.testing.assert_allclose(next_token(built(skip=False)), [(0.57886, 0.27785, 0.14328)], atol=1e-5)
    # The numbers of a class and of all classes: b, and the bias of the wanted one.
    moved = built(prior=(0.0, 1.0)), built().replace(bias=jnp.float32(1.0))
    np.testing.assert_allclose(next_token(moved[0]), next_token(moved[1]), atol=1e-6)
    assert next_token(moved[0])[0, 0] < ONE[0] and next_token(built(temper=3.0))[0, 0] > ONE[0]


def test_the_filter_by_hand():
    """The posterior is (.75, .43, .2)."""
    np.testing.assert_allclose(next_token(built(cover=0.2)), [(1, 0, 0)], atol=1e-6)
    np.testing.assert_allclose(next_token(built(cover=0.7)), [(0.74468, 0.25532, 0)], atol=1e-5)
    np.testing.assert_allclose(next_token(built(cover=0.2, tau=0.4)), [(0.74468, 0.25532, 0)], atol=1e-5)
    np.testing.assert_allclose(next_token(built(cover=0.0, tau=0.9, alpha=0.0)), [P], atol=1e-6)
    away = next_token(built(cover=0.2, alpha=-1.0))
    assert np.all(away > 0) and away[0, 0] < P[0]


@struct.dataclass
class Mixture(Control):
    """The base becomes Σ_c π_c p_c(y), whose next token depends on all before it; the state is p_c(text) π_c."""

    share: jax.Array
    p: jax.Array

    def init(self, prompts, length):
        return jnp.broadcast_to(self.share, (len(prompts.keys), len(self.share)))

    def logits(self, z, h, tokens, mask, state):
        out = []
        for t in range(z.shape[1]):
            if t or (tokens.shape[1] == 1 and z.shape[1] == 1):
                state = state * self.p[:, tokens[:, tokens.shape[1] - z.shape[1] + t]].T
            out.append(jnp.log(state @ self.p / state.sum(1, keepdims=True)))
        return jnp.stack(out, axis=1), state


def test_bayes_rule_on_a_mixture_gives_the_model_of_the_class():
    share, p = np.array([0.3, 0.7]), np.stack([B, A])
    mixture = Mixture(jnp.asarray(share), jnp.asarray(p))
    control = built(p, prior=np.log(share), mean=False)
    base = worlds.probabilities(WORLD, BASE, [0, 0], 3, mixture)
    texts = worlds.sequences(WORLD, 3)
    by_class = np.prod(p[:, texts], axis=2)
    np.testing.assert_allclose(base, share @ by_class, atol=1e-6)
    found = worlds.probabilities(WORLD, BASE, [0, 0], 3, Chain((mixture, control)))
    np.testing.assert_allclose(found, by_class[1], atol=1e-6)


@jax.jit
def under_codes(control, codes, tokens):
    """Log-probabilities [B, T + 1, V] before the first of the tokens [B, T] and after each, each row behind its code
    [B, D], without a cache."""
    weights = control.reader.control.parts[0].weights(PARAMS)
    x = jnp.concatenate([codes[:, None], LM.embed(weights, tokens)], axis=1)
    return jax.nn.log_softmax(LM.apply(weights, x, jnp.ones(x.shape[:2], bool), last=x.shape[1]).logits)


def by_hand(control, row, completion):
    """z' [N, V] of one row, in loops over what was read in one pass."""
    text = [*row, *completion]
    codes = control.reader.control.parts[1].vectors[:, 0]
    logp = np.asarray(under_codes(control, codes, jnp.asarray([text] * len(codes))))
    base = np.asarray(loop.forward(LM, PARAMS, worlds.prompts([row]), jnp.asarray([completion]))[0])
    out = []
    for i, z in enumerate(base):
        n = len(row) + i
        heard = np.array([sum(p[j, text[j]] for j in range(n)) for p in logp])
        scores = float(control.temper) * (heard[:, None] + logp[:, n]) / (n + 1) + np.asarray(control.prior)[:, None]
        out.append(z + float(control.alpha) * (scores[-1] - np.logaddexp.reduce(scores, axis=0)))
    return np.stack(out)


def test_it_equals_reading_every_text_again():
    rows, completions = [[1, 2, 3], [4]], [[5, 6, 7], [1, 2, 10]]
    control = gedi.example(LM, jax.random.key(7))
    control = control.replace(cover=jnp.float32(1), temper=jnp.float32(3), prior=jnp.array([0.2, -0.1]))
    found = loop.forward(LM, PARAMS, worlds.prompts(rows), jnp.asarray(completions), control)
    for i, (row, completion) in enumerate(zip(rows, completions)):
        np.testing.assert_allclose(found[i], by_hand(control, row, completion), rtol=1e-4, atol=2e-4)


def test_the_loss_by_hand():
    own, apart, right = gedi.terms(jnp.array([[1.0, 1.5]]), jnp.array([0]), jnp.float32(2.0), jnp.zeros(2))
    assert float(0.8 * own[0] + 0.2 * apart[0]) == pytest.approx(0.86265, abs=1e-5) and float(right[0]) == 1
    control = gedi.example(LM, jax.random.key(7))
    tokens, mask = jnp.array([[1, 2, 3], [4, 5, 0]]), jnp.array([[True] * 3, [True, True, False]])
    batch = {"tokens": tokens, "mask": mask, "label": jnp.array([1, 0])}
    out = jax.jit(gedi.loss(LM, balance=1.0))(
        control, {"params": PARAMS}, batch, jax.random.split(jax.random.key(0), 2)
    )
    logp = np.asarray(under_codes(control, control.reader.control.parts[1].vectors[:, 0][batch["label"]], tokens))
    expected = -sum(
        sum(logp[i, j, tokens[i, j]] for j in range(size)) / size for i, size in enumerate(mask.sum(1).tolist())
    )
    assert float(out.total) == pytest.approx(float(expected), rel=1e-4) and float(out.weight) == 2


def test_fit_trains_codes_that_begin_as_words(small):
    root, lm, data = small
    training = dict(steps=3, batch=4, tokens=16, warmup=1)
    settings = dict(words=("sad", "fun"), control=dict(alpha=2.0, filter=dict(tau=0.9)), training=training)
    fitted = gedi.fit(root, lm=lm, data=data, adapter=dict(rank=2), **settings)
    model, params, tokenizer = open_lm(lm)
    control = methods.load(fitted, model)
    assert (float(control.alpha), float(control.tau)) == (2.0, pytest.approx(0.9)) and float(control.temper) != 1
    assert tree.size_bytes(control) < 0.5 * tree.size_bytes(params)  # no weights of the base
    (word, *_), _ = tokenizer.encode_after(["a", "a"], [" sad", " fun"])
    code = control.reader.control.parts[1].vectors[0, 0]
    moved = float(jnp.abs(code - model.embed(params, jnp.asarray([word]))[0]).max())
    assert 0 < moved < 0.01
    with pytest.raises(InputError, match="No text has the label 2, the class of 'odd': set words"):
        gedi.fit(root, lm=lm, data=data, **settings | dict(words=("sad", "fun", "odd")))
    with pytest.raises(InputError, match=r"label of record 1 of .* is 1"):
        gedi.fit(root, lm=lm, data=data, **settings | dict(words=("sad",)))
    with pytest.raises(InputError, match="init has no setting 'alfa'; did you mean 'alpha'"):
        gedi.fit(root, lm=lm, data=data, **settings | dict(control=dict(alfa=2.0)))


def test_the_sizes_of_the_paper_fit_on_paper():
    small = Transformer.gpt2(width=1024, depth=2, heads=16)
    large = Transformer.gpt2(width=1600, depth=2, heads=25)
    out = worlds.written_on_paper(large, lambda key: gedi.init(large, key, small=record(small)))
    assert out.tokens.shape == (1, 2)


def test_bad_input_raises_one_sentence():
    key = jax.random.key(0)
    for settings, words in [
        (dict(codes=(1, 1)), r"codes is \(1, 1\), expected at least 2 classes"),
        (dict(codes=(2, 0)), "length is 0, expected at least 1 vector"),
        (dict(alpha=float("nan")), "alpha is nan"),
        (dict(bias=float("inf")), "bias is inf"),
        (dict(prompt="none"), "prompt is 'none', expected 'read' or 'skip'"),
        (dict(filter=dict(cover=1.5)), "numbers from 0 to 1"),
        (dict(filter=dict(rho=0.5)), "expected cover and tau"),
        (dict(small=record(worlds.tiny(vocab=9))), "has a vocabulary of 9 tokens and the base model one of 11"),
    ]:
        with pytest.raises(InputError, match=words):
            gedi.init(LM, key, **settings)
    with pytest.raises(InputError, match="balance is 2"):
        gedi.loss(LM, balance=2)
    with pytest.raises(InputError, match=r"prompts.cond\['class'\] is 2 in row 0, but the control has 2"):
        next_token(built(wanted="class"), cond={"class": jnp.array([2])})
