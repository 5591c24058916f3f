"""Steering: vectors worked out by hand, the neutral element to the bit, the closed form in a world of three tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import IDENTITY
from ctg_jax.decode import loop
from ctg_jax.learn import activations
from ctg_jax.methods import steer
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError, Sampling

LM = worlds.tiny()
PARAMS = worlds.lively(LM)
WORLD = worlds.Bigram()


def vector(*rows):
    return np.array(rows, np.float32)


@pytest.fixture(scope="module")
def table():
    return worlds.table([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])


def test_difference_of_means_by_hand(table):
    """In the bigram world a state is the one-hot of its token, at every site. Text 0 1 has label 1, text 2 label 0."""
    tokens, mask = jnp.array([[0, 1], [2, 0]]), jnp.array([[True, True], [True, False]])
    m = activations.moments(WORLD, table, tokens, mask, jnp.array([1, 0]), jnp.ones(2), classes=2)
    np.testing.assert_allclose(m.total[1, 0], [0.5, 0.5, 0.0])
    np.testing.assert_allclose(m.total[0, 0], [0.0, 0.0, 1.0])
    np.testing.assert_allclose(m.norm, [1 + 0.5**0.5] * 3, rtol=1e-6)
    found = steer.difference_of_means(m, 1, (0,))
    np.testing.assert_allclose(found, [[0.5, 0.5, -1.0]] * 3)
    last = activations.moments(WORLD, table, tokens, mask, jnp.array([1, 0]), jnp.ones(2), classes=2, how="last")
    np.testing.assert_allclose(steer.difference_of_means(last, 1, (0,)), [[0.0, 1.0, -1.0]] * 3)


def test_sums_do_not_depend_on_the_split_or_on_padding():
    tokens = jax.random.randint(jax.random.key(0), (6, 5), 0, LM.vocab)
    mask = jnp.arange(5)[None, :] < jnp.array([5, 3, 4, 1, 2, 5])[:, None]
    label, weight = jnp.array([0, 1, 1, 0, 1, 0]), jnp.array([1.0, 1, 1, 1, 1, 0])
    read = jax.jit(lambda *x: activations.moments(LM, PARAMS, *x, classes=2))
    whole = read(tokens, mask, label, weight)
    parts = [read(*(x[i : i + 2] for x in (tokens, mask, label, weight))) for i in (0, 2, 4)]
    summed = parts[0] + parts[1] + parts[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, summed)
    assert whole.count.tolist() == [2, 3]  # the last row has weight 0
    longer = read(jnp.pad(tokens, ((0, 0), (0, 3))), jnp.pad(mask, ((0, 0), (0, 3))), label, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, longer)


def test_pairs_by_hand():
    """Differences (2, 0) and (1, 1): mean (1.5, .5); second moments [[5, 1], [1, 1]], of which the first eigenvector is
    (2 + sqrt 5, 1) up to its length."""
    d = vector([2, 0], [1, 1])
    p = activations.Pairs(np.float32(2), d.sum(0)[None], np.einsum("bd,be->de", d, d)[None], np.ones(1, np.float32))
    np.testing.assert_allclose(steer.mean_difference(p), [[1.5, 0.5]])
    first = np.array([2 + 5**0.5, 1])
    first /= np.linalg.norm(first)
    np.testing.assert_allclose(steer.principal_component(p)[0], first * (first @ [1.5, 0.5]), rtol=1e-5)


def test_pair_moments_are_those_of_the_states(table):
    yes, no = jnp.array([[0], [1]]), jnp.array([[2], [2]])
    ones = jnp.ones((2, 1), bool)
    p = activations.pair_moments(WORLD, table, (yes, ones), (no, ones), jnp.array([1.0, 0.0]))
    assert float(p.count) == 1
    np.testing.assert_allclose(p.total[1], [1.0, 0.0, -1.0])
    np.testing.assert_allclose(p.square[1], np.outer([1, 0, -1], [1, 0, -1]))
    np.testing.assert_allclose(p.norm, [2.0] * 3)


def test_normalisation():
    v, norm = vector([3, 4], [0, 2]), np.array([10.0, 1.0], np.float32)
    np.testing.assert_allclose(activations.scaled(v, norm, "none"), v)
    np.testing.assert_allclose(activations.scaled(v, norm, "unit"), [[0.6, 0.8], [0, 1]])
    np.testing.assert_allclose(activations.scaled(v, norm, "stream"), [[6, 8], [0, 1]])
    with pytest.raises(InputError, match="normalise is 'l2'"):
        activations.scaled(v, norm, "l2")


def test_gates():
    assert activations.gates(3, "all").tolist() == [0, 1, 1, 1, 0]
    assert activations.gates(3, [0, -1]).tolist() == [1, 0, 0, 0, 1]
    assert activations.gates(12, "middle").tolist().index(1.0) == 7
    with pytest.raises(InputError, match="sites holds 9"):
        activations.gates(3, [9])


def test_scale_zero_is_the_base_to_the_bit():
    nothing = steer.neutral(steer.example(LM, jax.random.key(1)))
    prompts = worlds.prompts([[1, 2, 3], [4, 5]])
    completion = jnp.array([[1, 2, 3], [4, 5, 6]])
    base = loop.forward(LM, PARAMS, prompts, completion)
    assert bool(jnp.all(base == loop.forward(LM, PARAMS, prompts, completion, nothing)))
    sampling = Sampling(max_new=4)
    a, b = (loop.generate(LM, PARAMS, prompts, c, sampling) for c in (IDENTITY, nothing))
    assert a.tokens.tolist() == b.tokens.tolist() and a.logp.tolist() == b.logp.tolist()


def test_the_distribution_in_an_exact_world(table):
    """z = W (onehot + scale · Σ gate · vector): every completion of three tokens has the probability this gives."""
    v = jax.random.normal(jax.random.key(2), (3, 3))
    control = steer.Steer(v, jnp.array([1.0, 0.5, 0.0]), jnp.float32(0.8))
    w = np.asarray(table["head"]["kernel"], np.float64)
    push = 0.8 * (np.asarray(v[0], np.float64) + 0.5 * np.asarray(v[1], np.float64))
    z = w @ (np.eye(3) + push[:, None])
    p = np.exp(z) / np.exp(z).sum(0)  # p[v, u] of v after u
    found = worlds.enumerate_all(WORLD, table, [1], 3, control)
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    for (a, b, c), probability in found.items():
        assert probability == pytest.approx(p[a, 1] * p[b, a] * p[c, b], rel=1e-4)


def test_a_site_inside_a_block_is_left_alone_in_both_layouts():
    control, h = steer.example(LM, jax.random.key(1)), jnp.ones((1, 2, LM.width))
    state = control.init(worlds.prompts([[1, 2]]), 2)
    for site in (LM.depth + 2, jnp.int32(LM.depth + 2)):
        np.testing.assert_array_equal(control.hidden(h, site, None, state), h)
    static, traced = (control.hidden(h, s, None, state) for s in (1, jnp.int32(1)))
    np.testing.assert_array_equal(static, traced)
    assert float(jnp.abs(static - h).max()) > 0.1


def test_another_width_is_refused():
    control = steer.example(worlds.tiny(depth=2), jax.random.key(0)).replace(vector=jnp.zeros((4, 8)))
    with pytest.raises(InputError, match="width 8, but the model's is 16"):
        loop.forward(LM, PARAMS, worlds.prompts([[1]]), jnp.array([[1]]), control)


@pytest.mark.parametrize("kind", ["mean", "pairs", "pca"])
def test_fit(small, kind):
    root, lm, data = small
    fitted = steer.fit(root, lm=lm, data=data, kind=kind, sites=[1], normalise="stream", batch=4, tokens=16)
    assert fitted.spec["method"] == "steer"
    control = methods.load(fitted, open_lm(lm)[0])
    assert control.gate.tolist() == [0, 1, 0] and float(control.scale) == 1
    rows = fitted.metrics()
    assert [r["site"] for r in rows] == [0, 1, 2]
    assert rows[1]["vector_norm"] == pytest.approx(rows[1]["stream_norm"], rel=1e-4)


def test_a_sweep_over_sites_reads_the_texts_once(small):
    root, lm, data = small
    before = len(list(root.glob("steer.activations-*")))
    for sites in ([0], [1], "all"):
        steer.fit(root, lm=lm, data=data, sites=sites, batch=3, tokens=16)
    assert len(list(root.glob("steer.activations-*"))) == before + 1


def test_one_sided_data_are_refused(small):
    root, lm, data = small
    with pytest.raises(InputError, match=r"target is 7, but the labels .* are \[0, 1\]"):
        steer.fit(root, lm=lm, data=data, target=7)
    with pytest.raises(InputError, match="kind is 'median'"):
        steer.fit(root, lm=lm, data=data, kind="median")


def test_separation_is_what_chance_does_not_give():
    """Hand numbers in one dimension: classes (0, 2) and (4, 6). Means 1 and 5, V = 4 / 2 = 2, so 1 - 2 (1/2 + 1/2) / 16
    = 7/8. Two equal classes have none, and two texts no variance."""

    def moments(*classes):
        x = [np.asarray(c, np.float32)[:, None, None] for c in classes]
        every = np.concatenate(x)
        count = jnp.array([len(c) for c in x], jnp.float32)
        total = jnp.stack([c.sum(0) for c in x])
        return activations.Moments(total, count, jnp.ones(1), jnp.sum(jnp.asarray(every) ** 2, axis=(0, 2)))

    assert float(steer.separation(moments([0, 2], [4, 6]))[0]) == pytest.approx(7 / 8)
    assert float(steer.separation(moments([0, 2], [0, 2]))[0]) == -np.inf
    assert np.isnan(steer.separation(moments([0], [4]))[0])
    off = moments([0.3], [1.7])  # sums whose rounding leaves a variance
    assert np.isnan(steer.separation(off.replace(square=off.square * 1.000001))[0])


def test_agreement_is_that_of_the_differences():
    """Hand numbers: equal differences, opposite ones, and at right angles; and the warning that follows."""
    for d, wanted in (([[1, 0], [1, 0]], 1.0), ([[1, 0], [-1, 0]], -1.0), ([[1, 0], [0, 1]], 0.0)):
        d = np.asarray(d, np.float32)[:, None]
        pairs = activations.Pairs(jnp.float32(2), d.sum(0), np.einsum("nsd,nse->sde", d, d), jnp.ones(1))
        assert float(steer.agreement(pairs)[0]) == wanted
    one = np.ones((1, 1, 2), np.float32)
    assert np.isnan(
        steer.agreement(activations.Pairs(jnp.float32(1), one[0], np.einsum("nsd,nse->sde", one, one), jnp.ones(1)))[0]
    )
    off = 1.000001 * np.einsum("nsd,nse->sde", one, one)  # rounded in another way than the sum
    assert np.isnan(steer.agreement(activations.Pairs(jnp.float32(1), one[0], off, jnp.ones(1)))[0])
