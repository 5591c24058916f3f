"""Control codes: each reaches the distribution of its label's texts in a world small enough to enumerate; what is saved
reads back; bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.decode import loop
from ctg_jax.learn import losses
from ctg_jax.methods import ctrl
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError

LM = worlds.tiny(vocab=5, depth=1)
PARAMS = worlds.lively(LM, factor=4)
PROMPT, NEW, K = [1], 2, 3
EVERY = worlds.sequences(LM, NEW)
TEXTS = np.random.default_rng(0).dirichlet(np.full(len(EVERY), 0.3), K)  # [K, n]: how likely label k's texts are


def test_every_code_reaches_the_texts_of_its_label():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, K, 8192).astype(np.int32)
    tails = np.concatenate([EVERY[rng.choice(len(EVERY), 1, p=TEXTS[k])] for k in labels])
    rows = np.concatenate([np.full((len(tails), 1), PROMPT[0], np.int32), tails], axis=1)
    parts = [
        {
            "tokens": jnp.asarray(rows[i]),
            "mask": jnp.ones(rows[i].shape, bool),
            "ids": jnp.asarray(i),
            "label": jnp.asarray(labels[i]),
        }
        for i in np.split(np.arange(len(rows)), 16)
    ]
    control = ctrl.init(LM, jax.random.key(0), codes=K, kind="full")
    control, _ = worlds.trained(
        ctrl.loss(LM), control, {"params": PARAMS}, parts * 40, trained=r"delta/changes/.*|codes"
    )
    base = worlds.probabilities(LM, PARAMS, PROMPT, NEW)
    for k in range(K):
        drawn = np.zeros(len(EVERY))
        np.add.at(drawn, (tails[labels == k] @ [LM.vocab, 1]), 1 / np.sum(labels == k))
        found = worlds.probabilities(LM, PARAMS, PROMPT, NEW, methods.with_strength(control, k / (K - 1)))
        assert worlds.divergence(drawn, found) < 0.03
        assert worlds.divergence(drawn, base) > 0.5  # where it came from
        assert worlds.divergence(drawn, worlds.probabilities(LM, PARAMS, PROMPT, NEW, control)) > 0.5 or k == K - 1


def test_two_codes_with_different_first_tokens_learn_them():
    """Texts of label 0 begin with token 3 and those of label 1 with token 1, whatever follows: behind the empty prompt
    each code writes its own, and p(c | x) is known from the first token."""
    tails = np.array([[3, 2], [1, 2]] * 16, np.int32)
    batch = {
        "tokens": jnp.asarray(tails), "mask": jnp.ones(tails.shape, bool), "ids": jnp.arange(32),
        "label": jnp.tile(jnp.array([0, 1]), 16),
    }  # fmt: skip
    control = ctrl.init(LM, jax.random.key(0), codes=2, kind="full")
    control, _ = worlds.trained(
        ctrl.loss(LM), control, {"params": PARAMS}, [batch] * 150, trained=r"delta/changes/.*|codes"
    )
    empty = worlds.prompts([[], []], length=1, cond={"code": jnp.array([0, 1])})
    both = control.replace(cond="code")
    every = [jnp.full((2, 1), v, jnp.int32) for v in range(LM.vocab)]
    first = np.exp(np.concatenate([loop.score(LM, PARAMS, empty, v, both) for v in every], axis=1))
    assert first[0, 3] > 0.95 and first[1, 1] > 0.95
    # The token that stands for an empty prompt is one; another token is a prompt.
    stands = worlds.prompts([[4], [4]], cond={"code": jnp.array([0, 1])})
    named = both.replace(start=4)
    np.testing.assert_allclose(
        loop.score(LM, PARAMS, stands, every[3], named), loop.score(LM, PARAMS, empty, every[3], both), rtol=1e-5
    )
    longer = loop.score(LM, PARAMS, stands, every[3], both)
    assert not np.allclose(longer, loop.score(LM, PARAMS, stands, every[3], named), atol=1e-2)
    # A short row beside a long one, as decoding has them.
    mixed = worlds.prompts([[], [2, 0, 1]], cond={"code": jnp.array([0, 1])})
    np.testing.assert_allclose(np.exp(loop.score(LM, PARAMS, mixed, every[3], both))[0], first[0, 3:4], rtol=1e-4)


class Letters:
    """A tokenizer of the letters a to e whose texts begin with nothing."""

    adds_bos, start, eos, bos = False, None, None, None

    def begun(self, ids):
        return list(ids)

    def encode_after(self, prompts, texts):
        return [["abcde".index(c) for c in text] for text in texts]

    def known(self, vocab):
        return np.ones(vocab, bool)


def test_the_source_of_a_text_by_hand():
    """p(c | x) is p(x | c) p(c) over its sum, with the first token in p(x | c)."""
    control = ctrl.example(LM, jax.random.key(3))
    empty = worlds.prompts([[]], length=1)
    logp = [
        float(loop.score(LM, PARAMS, empty, jnp.array([[3, 1, 2]]), methods.with_strength(control, k)).sum())
        for k in (0.0, 1.0)
    ]
    for prior in (None, [0.9, 0.1]):
        wanted = np.exp(logp) * (prior or [1, 1])
        found = ctrl.attributed(LM, PARAMS, Letters(), control, ["dbc", "a"], prior=prior)
        np.testing.assert_allclose(found[0], wanted / wanted.sum(), rtol=1e-4)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    with pytest.raises(InputError, match=r"prior is \[1\.0, 0\.0\], expected 2 positive numbers"):
        ctrl.attributed(LM, PARAMS, Letters(), control, ["dbc"], prior=[1, 0])


def test_the_loss_reads_the_code_of_each_row():
    control = ctrl.example(LM, jax.random.key(3))
    tokens, labels = jnp.array([[1, 2, 3], [4, 0, 2]]), jnp.array([1, 0])
    batch = {"tokens": tokens, "mask": jnp.ones((2, 3), bool), "ids": jnp.arange(2), "label": labels}
    out = ctrl.loss(LM)(control, {"params": PARAMS}, batch, jax.random.split(jax.random.key(0), 2))
    wanted = 0.0
    for row, k in zip(tokens, (1.0, 0.0)):
        one = worlds.prompts([[]], length=1)
        wanted -= float(loop.score(LM, PARAMS, one, row[None], methods.with_strength(control, k)).sum())
    assert float(out.total) == pytest.approx(wanted, rel=1e-5) and float(out.weight) == 6
    rest = ctrl.loss(LM, first=False)(control, {"params": PARAMS}, batch, jax.random.split(jax.random.key(0), 2))
    assert float(rest.weight) == 4
    narrow = batch | {"loss_mask": jnp.array([[True, False, True], [False, True, True]])}
    assert float(ctrl.loss(LM)(control, {"params": PARAMS}, narrow, jax.random.split(jax.random.key(0), 2)).weight) == 4
    other = losses.control_loss(LM)(control, {"params": PARAMS}, batch, jax.random.split(jax.random.key(0), 2))
    assert float(other.total) != pytest.approx(wanted, rel=1e-3)  # both rows on the first code


@pytest.mark.parametrize("cond", [None, "code"])
def test_fit_leaves_a_control_that_loads(small, cond):
    root, lm, data = small
    artifact = ctrl.fit(
        root, lm=lm, data=data, adapter=dict(rank=2), training=dict(steps=3, batch=4, tokens=12), cond=cond
    )
    model, _, _ = open_lm(lm)
    control = methods.load(artifact, model)
    assert control.codes.shape == (2, model.width) and control.cond == cond
    assert float(control.scale) == 1.0  # the strength is not trained
    assert any(float(jnp.max(jnp.abs(c["b"]))) > 0 for c in control.delta.changes.values())


def test_bad_input(small):
    root, lm, data = small
    with pytest.raises(InputError, match="no text has the label 2"):
        ctrl.fit(root, lm=lm, data=data, codes=3)
    with pytest.raises(InputError, match="no text has the label 0"):
        ctrl.fit(root, lm=lm, data=data, where={"label": 1})
    with pytest.raises(InputError, match="1 control codes"):
        ctrl.init(LM, jax.random.key(0), codes=1)
    with pytest.raises(InputError, match="kind is 'prompt'"):
        ctrl.init(LM, jax.random.key(0), kind="prompt")
