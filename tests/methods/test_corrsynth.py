"""CorrSynth: three tokens by hand, rows that are independent, ended rows, labels, groups that are not whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax.control import IDENTITY
from ctg_jax.decode import loop, strategies
from ctg_jax.methods import corrsynth
from ctg_jax.methods.logits.corrsynth import written
from ctg_jax.types import InputError, Sampling

WORLD = worlds.Bigram()
A, B = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.4, 0.4])
TABLE = np.array([A, B, [0.3, 0.3, 0.4]])  # after token 0, 1 and 2
PARAMS = worlds.table(TABLE)


def made(group, **settings):
    return corrsynth.make(WORLD, jax.random.key(0), group=group, **settings)


def next_tokens(control, rows=(A, B), done=None):
    done = jnp.zeros(len(rows), bool) if done is None else jnp.asarray(done)
    return np.asarray(jax.nn.softmax(control.contrasted(jnp.log(jnp.asarray(rows, jnp.float32)), done)))


def test_three_tokens_by_hand():
    found = next_tokens(made(2))
    np.testing.assert_allclose(found[0], (0.67962, 0.24028, 0.08009), atol=1e-5)  # a / b^½
    np.testing.assert_allclose(found[1], (0.11458, 0.32409, 0.56133), atol=1e-5)
    np.testing.assert_allclose(next_tokens(made(2, plausible=0.2))[0], (0.7388, 0.2612, 0), atol=1e-5)
    for control in (made(2, alpha=0.0, plausible=0.2), made(1)):
        np.testing.assert_allclose(next_tokens(control), (A, B), rtol=1e-5)
    squared = next_tokens(made(2, alpha=0.0, gamma=2.0))[0]
    np.testing.assert_allclose(squared, A**2 / (A**2).sum(), rtol=1e-5)


def test_the_mean_of_several_others_labels_and_ended_rows():
    c = TABLE[2]
    rows = (A, B, c, A)

    def normal(q):
        return q / q.sum()

    everyone = next_tokens(made(4, alpha=0.6), rows)
    np.testing.assert_allclose(everyone[0], normal(A / (B * c * A) ** 0.2), rtol=1e-4)
    others = next_tokens(made(4, alpha=0.6, labels=2), rows)  # the first two rows have one label
    np.testing.assert_allclose(others[0], normal(A / (c * A) ** 0.3), rtol=1e-4)
    ended = next_tokens(made(4, alpha=0.6), rows, [False, True, False, False])
    np.testing.assert_allclose(ended[0], normal(A / (c * A) ** 0.3), rtol=1e-4)
    alone = next_tokens(made(4, alpha=0.6), rows, [False, True, True, True])
    np.testing.assert_allclose(alone[0], A, rtol=1e-5)
    # What another row cannot write is no reason for this one.
    cut = made(2).contrasted(jnp.array([[0.0, 0.0, 0.0], [0.0, -1e30, 0.0]]), jnp.zeros(2, bool))
    assert np.isfinite(cut[0]).all() and cut[1, 1] == -1e30


def drawn(control, rows, new=3, eos=(), seed=0):
    prompts = worlds.prompts(rows, seed=seed)
    return prompts, strategies.run(WORLD, PARAMS, prompts, control, Sampling(max_new=new, eos=eos))


def test_the_log_probabilities_of_what_was_drawn():
    """Each token's, recomputed from the tables with what the group had written before it; row 2 of the vocabulary ends
    a text."""
    rows = [[0], [1], [1], [0]]
    for eos in ((), (2,)):
        _, out = drawn(made(2, alpha=0.7), rows, new=4, eos=eos)
        tokens, mask, logp = (np.asarray(x) for x in (out.tokens, out.mask, out.logp))
        last, done = [r[0] for r in rows], [False] * 4
        for t in range(4):
            before = list(last)
            for row in range(4):
                if not mask[row, t]:
                    continue
                other = row ^ 1
                q = TABLE[before[row]] / (1 if done[other] else TABLE[before[other]] ** 0.7)
                assert logp[row, t] == pytest.approx(np.log(q[tokens[row, t]] / q.sum()), abs=1e-4)
            for row in range(4):
                if mask[row, t]:
                    last[row], ended = int(tokens[row, t]), int(tokens[row, t]) in eos
                    done[row] = done[row] or ended


def test_without_contrast_it_is_the_loop_and_the_order_of_rows_changes_nothing():
    rows, sampling = [[0], [1], [2], [0]], Sampling(max_new=4)
    prompts, out = drawn(made(2, alpha=0.0), rows, new=4)
    plain = loop.generate(WORLD, PARAMS, prompts, IDENTITY, sampling)
    assert out.tokens.tolist() == plain.tokens.tolist()
    np.testing.assert_allclose(out.logp, plain.logp, atol=1e-5)
    swapped = jax.tree.map(lambda x: x[jnp.array([1, 0, 3, 2])], prompts)
    one, two = (written(WORLD, PARAMS, p, IDENTITY, made(2), sampling) for p in (prompts, swapped))
    assert one.tokens[jnp.array([1, 0, 3, 2])].tolist() == two.tokens.tolist()
    assert one.tokens.tolist() != out.tokens.tolist()


def test_a_transformer_reads_with_its_cache():
    lm = worlds.tiny(vocab=5)
    params, control = worlds.lively(lm), made(2, alpha=0.5)
    prompts = worlds.prompts([[1, 2, 3], [4]])
    out = strategies.run(lm, params, prompts, control, Sampling(max_new=3))
    z = loop.forward(lm, params, prompts, out.tokens)
    for t in range(3):
        q = jax.nn.log_softmax(control.contrasted(z[:, t], jnp.zeros(2, bool)))
        chosen = jnp.take_along_axis(q, out.tokens[:, t : t + 1], axis=1)[:, 0]
        np.testing.assert_allclose(out.logp[:, t], chosen, atol=1e-4)


def test_bad_input_raises_one_sentence():
    for settings, words in [
        (dict(group=0), "group is 0"),
        (dict(group=4, labels=3), "labels is 3, expected a number that divides group, 4"),
        (dict(group=2, alpha=float("nan")), "alpha is nan"),
        (dict(group=2, plausible=1.5), "plausible is 1.5"),
    ]:
        with pytest.raises(InputError, match=words):
            made(**settings)
    with pytest.raises(InputError, match="has 3 rows, but groups have 2"):
        drawn(made(2), [[0], [1], [2]])
    prompts = worlds.prompts([[0], [1], [2], [0]])
    for rows in ([0, 1, 2, 0], [0, 0, 0, 0]):  # copies of the first row fill a batch that has too few
        filled = prompts.replace(keys=prompts.keys[jnp.array(rows)])
        with pytest.raises(InputError, match="The last group has fewer than 2 rows"):
            strategies.run(WORLD, PARAMS, filled, made(2), Sampling(max_new=1))
