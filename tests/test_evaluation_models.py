"""Metrics that read a language model: likelihoods of texts, and the KL of a control to the base."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax import evaluation as ev
from ctg_jax.control import IDENTITY, Control
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError, Prompts

TINY = Transformer(family="gpt2", vocab=11, width=8, depth=1, heads=2, kv_heads=2, head_dim=4, mlp_width=16, context=16)


class Letters:
    """A tokenizer of the letters a … j, one token each; 10 is BOS."""

    bos, eos, pad, vocab, adds_bos, start = 10, None, None, 11, False, 10

    def encode(self, texts):
        return [[ord(c) - ord("a") for c in t] for t in texts]

    encode_prompts = encode

    def encode_after(self, prompts, texts):
        return self.encode(texts)

    def begun(self, ids):
        return list(ids)

    def known(self, vocab):
        return np.arange(vocab) < self.vocab


@pytest.fixture(scope="module")
def params():
    return TINY.init(jax.random.key(0))


def prompts_of(rows):
    return Prompts(jnp.asarray(rows), jnp.ones(np.shape(rows), bool), jax.random.split(jax.random.key(0), len(rows)))


def test_lm_scorer_is_the_sum_of_token_log_probabilities(params):
    scorer = ev.LMScorer(TINY, params, Letters(), name="tiny", batch=2)
    prompts, texts = ["ab", "", "c", "abc"], ["cd", "e", "", "fghij"]
    nats, tokens = scorer(prompts, texts)
    assert tokens.tolist() == [2, 1, 0, 5] and nats[2] == 0
    for i in (0, 1, 3):
        head = Letters().encode([prompts[i]])[0] or [10]
        tail = Letters().encode([texts[i]])[0]
        ids = jnp.asarray([head + tail])
        out = TINY.apply(params, TINY.embed(params, ids), jnp.ones(ids.shape, bool))
        logp = jax.nn.log_softmax(out.logits[0].astype(jnp.float32), axis=-1)
        want = -sum(float(logp[len(head) - 1 + k, t]) for k, t in enumerate(tail))
        assert nats[i] == pytest.approx(want, abs=1e-4)
    assert scorer.version.startswith("tiny@")
    again = scorer.ids(Letters().encode(prompts), Letters().encode(texts))
    np.testing.assert_array_equal(again[0], nats)


def test_lm_scorer_limits(params):
    scorer = ev.LMScorer(TINY, params, Letters(), name="tiny", batch=2)
    nats, tokens = scorer(["a" * 30, "b"], ["c" * 4, "d" * 15])
    assert np.isfinite(nats).all() and tokens.tolist() == [4, 15]
    cut, _ = scorer(["a" * 12], ["c" * 4])  # a row does not depend on the others in its batch
    assert nats[0] == pytest.approx(cut[0], abs=1e-4)
    with pytest.raises(InputError, match="text 1 has 16 tokens"):
        scorer(["a", "a"], ["b", "b" * 16])
    tokenizer = Letters()
    tokenizer.start = None
    with pytest.raises(InputError, match="prompt 0 is empty"):
        ev.LMScorer(TINY, params, tokenizer)([""], ["a"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bend(Control):
    """Adds a vector to the logits."""

    bias: jax.Array

    def logits(self, z, h, tokens, mask, state):
        return z + self.bias[None, None], state


def test_kl_to_base_by_hand(params):
    prompts, completion = prompts_of([[1, 2]]), jnp.asarray([[3, 4, 5]])
    bias = jnp.zeros(11).at[7].set(2.0).at[0].set(-jnp.inf)
    kl = np.asarray(ev.kl_to_base(TINY, params, prompts, completion, Bend(bias)))
    ids = jnp.asarray([[1, 2, 3, 4]])
    z = np.asarray(TINY.apply(params, TINY.embed(params, ids), jnp.ones((1, 4), bool), last=3).logits, np.float64)[0]
    p0 = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    weight = p0 * np.where(np.arange(11) == 7, math.e**2, np.arange(11) != 0)
    pc = weight / weight.sum(-1, keepdims=True)
    want = (pc[:, 1:] * np.log(pc[:, 1:] / p0[:, 1:])).sum(-1)
    np.testing.assert_allclose(kl[0], want, rtol=1e-4)
    zero = ev.kl_to_base(TINY, params, prompts, completion, IDENTITY)
    np.testing.assert_allclose(zero, 0, atol=1e-6)
    assert np.isinf(ev.kl_to_base(TINY, params, prompts, completion, IDENTITY, Bend(bias))).all()
    figure = ev.kl_figure(kl, [[True, True, False]], ["p"])
    assert figure.value == pytest.approx(want[:2].mean(), rel=1e-4)


def test_evaluate_is_reproducible_and_uses_the_lm(params):
    scorer = ev.LMScorer(TINY, params, Letters(), batch=4)
    samples = [{"prompt": "a", "text": "bcd"}, {"prompt": "e", "text": "fg"}, {"prompt": "a", "text": "hij"}]
    figures = ev.evaluate(samples, fluency=scorer)
    assert figures == ev.evaluate(samples, fluency=scorer)
    assert figures["perplexity"].n == 2 and figures["perplexity_pooled"].value > 1
    nats, tokens = scorer([s["prompt"] for s in samples], [s["text"] for s in samples])
    assert figures["perplexity"].value == pytest.approx(np.exp(nats / tokens).mean())
    alone, _ = scorer([""] * 3, [s["text"] for s in samples])
    assert figures["relevance"].value == pytest.approx(((alone - nats) / tokens).mean()) != 0
