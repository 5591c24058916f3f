"""Unlikelihood: the gradients of its four terms by hand, its candidates by hand, what it does to a model that repeats,
bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.learn import losses
from ctg_jax.methods import unlikelihood
from ctg_jax.methods.weights.unlikelihood import Objective
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError

BIGRAM = worlds.Bigram(vocab=3)
TABLE = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])  # [after, token]
HUMAN, OWN = [[1, 2, 1], [2, 2, 0]], [[1, 1, 1], [2, 0, 1]]
HUMAN_REAL = [[True, True, True], [True, True, False]]
ADVANTAGE, DRAWN = np.array([0.8, -1.5]), np.array([-1.0, -9.0])


def batch():
    out = worlds.written([0], np.array(OWN), human=jnp.array(HUMAN), human_written=jnp.array(HUMAN_REAL))
    return out | {"advantage": jnp.asarray(ADVANTAGE, jnp.float32), "drawn": jnp.asarray(DRAWN, jnp.float32)}


def walk(row, real):
    """(token before, token) of each counted position of a completion after 0."""
    before = [0, *row[:-1]]
    return [pair for pair, counted in zip(zip(before, row), real) if counted]


def push(before, token, weight, slope):
    """Adds weight · ∇ log p(token | before) to slope [V, V], whose column u belongs to the logits after u."""
    slope[:, before] += weight * (np.eye(3)[token] - TABLE[before])


def likely(row, pairs):
    slope, value = np.zeros((3, 3)), 0.0
    for before, token in pairs:
        value -= np.log(TABLE[before, token]) / len(pairs)
        push(before, token, -1 / len(pairs), slope)
    return value, slope


def unlikely(pairs, candidates):
    """Mean over positions of -Σ log(1 - p(c)); its slope is p / (1 - p) · ∇ log p."""
    slope, value = np.zeros((3, 3)), 0.0
    for (before, _), negative in zip(pairs, candidates):
        for c in negative:
            p = TABLE[before, c]
            value -= np.log(1 - p) / len(pairs)
            push(before, c, p / (1 - p) / len(pairs), slope)
    return value, slope


def by_hand(term, i):
    human, own = walk(HUMAN[i], HUMAN_REAL[i]), walk(OWN[i], [True] * 3)
    if term == "likelihood":
        return likely(HUMAN[i], human)
    if term == "token":  # written before, without the target: 0 | 1 2 1 and 0 | 2 2
        return unlikely(human, [[{0}, {0, 1}, {0, 2}], [{0}, {0}]][i])
    if term == "sequence":  # pairs of tokens: 1 1 comes twice in 1 1 1, its second time at the last two places
        return unlikely(own, [[set(), {1}, {1}], [set(), set(), set()]][i])
    nats, slope = likely(OWN[i], own)
    weight = ADVANTAGE[i] * min(1.0, np.exp(-nats - DRAWN[i] / 3))
    return weight * nats, weight * slope


@pytest.mark.parametrize("term", ["likelihood", "token", "sequence", "policy"])
def test_the_gradient_by_hand(term):
    control = unlikelihood.init(BIGRAM, jax.random.key(0), kind="full")
    keys = jax.random.split(jax.random.key(0), 2)
    others = dict.fromkeys(("likelihood", "token", "sequence", "policy"), 0.0)
    objective = unlikelihood.loss(BIGRAM, Objective(**others | {term: 0.7}, ngram=2))

    def mean(control):
        out = objective(control, {"params": worlds.table(TABLE)}, batch(), keys)
        return out.total / out.weight

    value, gradient = jax.value_and_grad(mean)(control)
    found = [by_hand(term, i) for i in range(2)]
    assert float(value) == pytest.approx(0.7 * np.mean([v for v, _ in found]), rel=1e-5)
    wanted = 0.7 * np.mean([s for _, s in found], axis=0)
    assert np.abs(wanted).max() > 0.01
    np.testing.assert_allclose(gradient.changes["head/kernel"]["full"], wanted, rtol=1e-5, atol=1e-6)


def test_the_policy_holds_back_what_is_forgotten():
    """The samples above show both cases: row 0 has lost likelihood since it was drawn, row 1 has gained and is cut."""
    nats = [likely(OWN[i], walk(OWN[i], [True] * 3))[0] for i in range(2)]
    assert np.exp(-nats[0] - DRAWN[0] / 3) < 0.7 and np.exp(-nats[1] - DRAWN[1] / 3) > 1.5


def test_a_mix_is_the_weighted_sum():
    control = unlikelihood.init(BIGRAM, jax.random.key(0), kind="full")
    weights = dict(likelihood=0.5, token=0.3, sequence=0.2, policy=0.4)
    keys = jax.random.split(jax.random.key(0), 2)
    out = unlikelihood.loss(BIGRAM, Objective(**weights, ngram=2))(
        control, {"params": worlds.table(TABLE)}, batch(), keys
    )
    wanted = sum(w * by_hand(term, i)[0] for term, w in weights.items() for i in range(2))
    assert float(out.total) == pytest.approx(wanted, rel=1e-5) and float(out.weight) == 2
    for term in weights:
        assert float(out.metrics[term][0]) == pytest.approx(sum(by_hand(term, i)[0] for i in range(2)), rel=1e-5)


def test_repeated_n_grams_by_hand():
    rows = jnp.array([[1, 2, 3, 1, 2, 3, 4], [5, 5, 5, 5, 0, 0, 0]])
    real = jnp.array([[True] * 7, [True] * 4 + [False] * 3])
    three = losses.repeated(rows, real, 3)
    assert three.astype(int).tolist() == [[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0]]  # padding repeats nothing
    assert losses.repeated(rows, real, 1)[0].astype(int).tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert not losses.repeated(rows, real, 4)[0].any() and not losses.repeated(rows, real, 8).any()


def test_sequence_level_training_ends_a_loop():
    """A bigram model that says 1 after 1: trained on its own loops, the probability of going on falls below a third."""
    table = np.array([[0.1, 0.8, 0.1], [0.05, 0.9, 0.05], [0.3, 0.4, 0.3]])
    rows = worlds.written([0], np.ones((4, 8), np.int32))
    objective = unlikelihood.loss(BIGRAM, Objective(likelihood=0.0, token=0.0, sequence=1.0, ngram=2))
    control = unlikelihood.init(BIGRAM, jax.random.key(0), kind="full")
    control, _ = worlds.trained(
        objective, control, {"params": worlds.table(table)}, [rows] * 60, rate=0.1, trained="changes/.*"
    )
    loops = worlds.enumerate_all(BIGRAM, worlds.table(table), [1], 1, control)[1,]
    assert loops < 0.3


def test_advantages_by_hand():
    """Prompt 0 has rewards 1 and 3, around 2; prompt 1 has one sample, around the mean of all, 7 / 3."""
    found = unlikelihood.advantages([1.0, 3.0, 3.0], [0, 0, 1])
    raw = np.array([-1.0, 1.0, 2 / 3])
    np.testing.assert_allclose(found, raw / raw.std())
    assert unlikelihood.advantages([2.0, 2.0], [0, 0]).tolist() == [0.0, 0.0]


@pytest.fixture(scope="module")
def texts(small, tmp_path_factory):
    from ctg_jax.run.stage import stage
    from ctg_jax.stages import sources

    root, _, data = small
    settings = dict(source=f"jsonl:{data.path / 'data.jsonl'}", split="all", words=1)
    return stage(root, sources.load_data, settings)


@pytest.mark.parametrize(
    "weights",
    [dict(token=1.0), dict(token=0.0, sequence=0.5, policy=0.5), dict(token=0.0, policy=0.75, greedy=True)],
    ids=["texts", "own", "greedy"],
)
def test_fit_leaves_a_control_that_loads(small, texts, weights):
    root, lm, _ = small
    greedy = weights.get("greedy", False)
    explore = dict(n=1 if greedy else 2, max_new=5, batch=8, greedy=greedy)
    artifact = unlikelihood.fit(
        root,
        lm=lm,
        data=texts,
        rounds=2,
        explore=explore,
        training=dict(steps=2, batch=4),
        adapter=dict(rank=2),
        objective=dict(ngram=2, **weights),
    )
    assert len(artifact.spec["inputs"]["pool"]) == ("policy" in weights)
    control = methods.load(artifact, open_lm(lm)[0])
    assert any(float(jnp.max(jnp.abs(c["b"]))) > 0 for c in control.changes.values())


def test_bad_input(small):
    root, lm, data = small
    with pytest.raises(InputError, match="expected none below 0 and at least one above it"):
        unlikelihood.loss(BIGRAM, Objective(likelihood=0.0, token=0.0))
    with pytest.raises(InputError, match="expected none below 0 and at least one above it"):
        unlikelihood.loss(BIGRAM, Objective(token=-1.0))
    with pytest.raises(InputError, match="ngram is 0"):
        unlikelihood.loss(BIGRAM, Objective(ngram=0))
    with pytest.raises(InputError, match="record 0 of the data has no text behind its prompt"):
        unlikelihood.fit(root, lm=lm, data=data)
    with pytest.raises(InputError, match="rounds is 0"):
        unlikelihood.fit(root, lm=lm, data=data, rounds=0)
    with pytest.raises(InputError, match="kind is 'prompt'"):
        unlikelihood.init(BIGRAM, jax.random.key(0), kind="prompt")
