"""Preferences: the losses by hand, the optimum of each method in a world small enough to enumerate, pairs by hand, and
the stage on pairs of every kind."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds
from scipy.special import logit

from ctg_jax import methods
from ctg_jax.learn import experience, preferences
from ctg_jax.learn.improving import improving, law
from ctg_jax.learn.pool import Pool
from ctg_jax.methods import preference
from ctg_jax.methods.weights.preference import Objective
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import judges, sources
from ctg_jax.types import InputError

LM = worlds.tiny(vocab=3, depth=1)
PARAMS = worlds.lively(LM, factor=4)
PROMPT, NEW = [1, 2], 2
EVERY = worlds.sequences(LM, NEW)
BASE = worlds.probabilities(LM, PARAMS, PROMPT, NEW)
REWARD = np.random.default_rng(0).normal(size=len(EVERY))
PAIRS = np.array([(i, j) for i in range(len(EVERY)) for j in range(len(EVERY)) if i != j])


def batch(better, worse, target, reference=None):
    log_p = np.log(BASE if reference is None else reference)
    numbers = dict(reference=log_p[better], other_reference=log_p[worse], target=np.asarray(target))
    fields = {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}
    rows = worlds.written(PROMPT, EVERY[better], other=jnp.asarray(EVERY[worse]), **fields)
    return rows | {"other_written": jnp.ones_like(rows["written"])}


def reached(objective, rows, updates=300, control=None):
    control = preference.init(LM, jax.random.key(0), kind="full") if control is None else control
    loss = preference.loss(LM, objective)
    control, metrics = worlds.trained(loss, control, {"params": PARAMS}, [rows] * updates, trained="changes/.*")
    return control, metrics


def tilted(log_weight):
    p = BASE * np.exp(log_weight)
    return p / p.sum()


@pytest.mark.parametrize("kind", ["logistic", "squared"])
def test_dpo_and_irepo_reach_the_tilted_base(kind):
    """Every pair once, with as much preference as its rewards differ: π ∝ ref · exp(r / (temperature β))."""
    objective = Objective(kind=kind, target="difference", temperature=2.0, beta=0.5)
    gaps = REWARD[PAIRS[:, 0]] - REWARD[PAIRS[:, 1]]
    control, metrics = reached(objective, batch(*PAIRS.T, objective.targets(gaps)))
    wanted = tilted(REWARD / (2.0 * 0.5))
    assert worlds.divergence(BASE, wanted) > 0.2  # where it came from
    assert worlds.divergence(worlds.probabilities(LM, PARAMS, PROMPT, NEW, control), wanted) < 1e-3
    assert float(metrics["accuracy"]) == pytest.approx(0.5)  # every pair is there both ways


def test_ipo_reaches_its_optimum():
    """The better text of every pair once: β log(π / ref) is the least-squares fit to differences of 1/2, which is half
    the mean of the signs of r - r' over all texts."""
    objective = Objective(kind="squared", beta=0.5)
    better = PAIRS[REWARD[PAIRS[:, 0]] > REWARD[PAIRS[:, 1]]]
    control, metrics = reached(objective, batch(*better.T, objective.targets(np.ones(len(better)))))
    signs = np.sign(REWARD[:, None] - REWARD[None]).sum(axis=1)
    wanted = tilted(0.5 * signs / len(EVERY) / 0.5)
    assert worlds.divergence(worlds.probabilities(LM, PARAMS, PROMPT, NEW, control), wanted) < 1e-3
    assert float(metrics["accuracy"]) == 1


@pytest.mark.slow
def test_spin_reaches_people_and_stays():
    """Every human text, p, with every sample, q: π ∝ ref (p / q)^(1/β), which is p where β is 1 and q is the reference.
    At p = π = ref its loss is log 2 and its gradient 0."""
    people, drawn = np.array([4, 2, 1, 1, 4, 2, 1, 4, 2]), np.array([1, 2, 2, 1, 1, 4, 2, 1, 1])
    better, worse = (x.ravel() for x in np.meshgrid(np.repeat(np.arange(9), people), np.repeat(np.arange(9), drawn)))
    for beta in (1.0, 0.5):
        control, _ = reached(Objective(beta=beta), batch(better, worse, np.ones(len(better))))
        wanted = tilted(np.log(people / drawn) / beta)
        assert worlds.divergence(wanted, BASE) > 0.2
        assert worlds.divergence(worlds.probabilities(LM, PARAMS, PROMPT, NEW, control), wanted) < 2e-3
    both = np.concatenate([PAIRS, PAIRS[:, ::-1]])
    rows, start = batch(*both.T, np.ones(len(both))), preference.init(LM, jax.random.key(0), kind="full")
    keys = jax.random.split(jax.random.key(0), len(both))

    def mean(control):
        out = preference.loss(LM, Objective())(control, {"params": PARAMS}, rows, keys)
        return out.total / out.weight

    value, slope = jax.value_and_grad(mean)(start)
    assert float(value) == pytest.approx(np.log(2), rel=1e-5)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope.changes)) < 1e-5


def one(objective, better=-1.0, worse=-2.0, reference=-1.5, other=-1.0, target=1.0, **more):
    """The loss of one pair of single tokens with these log-probabilities."""
    lm = worlds.Bigram(vocab=3)
    p = np.exp([better, worse])
    params = worlds.table([[*p, 1 - p.sum()]] + [[1 / 3] * 3] * 2)
    control = preference.init(lm, jax.random.key(0), kind="full")
    fields = dict(reference=jnp.array([reference]), other_reference=jnp.array([other]), target=jnp.array([target]))
    rows = worlds.written([0], np.array([[0]]), other=jnp.array([[1]]), other_written=jnp.array([[True]]), **fields)
    return preference.loss(lm, objective)(
        control, {"params": params}, rows | more, jax.random.split(jax.random.key(0), 1)
    )


def test_the_losses_by_hand():
    """β = .5, log-probabilities -1 and -2, of the reference -1.5 and -1: m = .75."""
    for kind, target, wanted in (("logistic", 1.0, 0.3869), ("hinge", 1.0, 0.25), ("squared", 0.2, 0.3025)):
        out = one(Objective(kind=kind, beta=0.5), target=target)
        assert float(out.total) == pytest.approx(wanted, abs=1e-4)
        assert [float(out.metrics[n][0]) for n in ("margin", "better", "worse")] == pytest.approx([0.75, 0.5, -1.0])
    soft = one(Objective(beta=0.5), target=0.3)
    assert float(soft.total) == pytest.approx(0.3 * np.log1p(np.exp(-0.75)) + 0.7 * np.log1p(np.exp(0.75)), rel=1e-5)
    assert float(one(Objective(beta=0.5, anchor=0.3)).total) == pytest.approx(0.3869 + 0.3, abs=1e-4)
    np.testing.assert_allclose(Objective(target="difference", temperature=2.0).targets([4.0]), 1 / (1 + np.exp(-2)))
    assert Objective().targets([4.0]) == 1 and Objective(kind="squared").targets([4.0]) == 0.5


def test_edits_by_hand():
    """5 6 7 8 → 5 9 7 7 8: 6 is removed, 9 and the first 7 are new."""
    removed, new = preferences.edits([5, 6, 7, 8], [5, 9, 7, 7, 8])
    assert removed.tolist() == [False, True, False, False] and new.tolist() == [False, True, True, False, False]
    for before, after, gone, there in (
        ([], [], [], []),
        ([1, 2], [1, 2], [0, 0], [0, 0]),
        ([1, 2, 3], [1, 3], [0, 1, 0], [0, 0]),
        ([1, 3], [1, 2, 3], [0, 0], [0, 1, 0]),
        ([], [4], [], [1]),
        ([1], [2], [1], [1]),
    ):
        removed, new = preferences.edits(before, after)
        assert (removed.astype(int).tolist(), new.astype(int).tolist()) == (gone, there)
    assert preferences.likeness([1, 2, 3], [1, 3]) == pytest.approx(2 / 3) and preferences.likeness([], []) == 1
    removed, new = preference.changed([[5, 6, 7, 8], [1]], [[5, 9, 7, 7, 8], [1, 0]], ends=[0, 8])
    assert new.astype(int).tolist() == [[0, 1, 1, 0, 1], [0, 1, 0, 0, 0]]  # the ends count
    assert removed.astype(int).tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_the_loss_of_edits_by_hand():
    """A removed token with p = .6 (.511 nats) is pushed away; with p = .5 (.693 nats, above the limit) it is not."""
    marks = dict(new=jnp.array([[True]]), removed=jnp.array([[True]]))
    near = one(Objective(kind="edits"), better=np.log(0.3), worse=np.log(0.6), **marks)
    assert float(near.total) == pytest.approx(-np.log(0.3) + 0.5 * np.log(0.6), rel=1e-5) and float(near.weight) == 2
    far = one(Objective(kind="edits"), better=np.log(0.3), worse=np.log(0.5), **marks)
    assert float(far.total) == pytest.approx(-np.log(0.3), rel=1e-5) and float(far.weight) == 1
    none = one(Objective(kind="edits", negative=0.0), better=np.log(0.3), worse=np.log(0.6), **marks)
    assert float(none.total) == pytest.approx(-np.log(0.3), rel=1e-5) and float(none.weight) == 1


def test_pairs_by_hand():
    """Values .2 .5 .9 with likenesses .1 and .2 of the better ones: .5744 and .4256 are drawn from the first."""
    better, worse = preferences.ranked([3, 1, 2, 0, 2], [0] * 5, least=0.5, most=1)
    assert (better.tolist(), worse.tolist()) == ([0], [3])
    with pytest.raises(InputError, match="whose rewards differ by more than 2"):
        preferences.ranked([1, 2], [0, 0], least=2)
    # exp(.3 + .8) against exp(.7 + .1)
    like = np.array([[1, 0.8, 0.1], [0.8, 1, 0.2], [0.1, 0.2, 1]])
    np.testing.assert_allclose(law([0.2, 0.5, 0.9], like, 1.0, 1.0)[0, 1:], [0.5744, 0.4256], atol=1e-4)
    texts = [[1, 2, 3, 4], [1, 2, 3, 5], [9, 9, 9, 9], [7]]

    def similarity(i, j):
        return preferences.likeness(texts[i], texts[j])

    drawn = [improving([0.2, 0.5, 0.9, 0.9], [0, 0, 0, 1], similarity, seed=s) for s in range(400)]
    assert all(worse.tolist() == [0, 1] and better[1] == 2 for worse, better in drawn)
    share = np.mean([better[0] == 1 for _, better in drawn])  # exp(.3 + .75) against exp(.7 + 0)
    assert share == pytest.approx(1 / (1 + np.exp(0.7 - 1.05)), abs=0.07)


@pytest.fixture(scope="module")
def given(small, tmp_path_factory):
    """(root, lm, texts with prompts, pairs, a reward)"""
    root, lm, data = small
    words = dict(source=f"jsonl:{data.path / 'data.jsonl'}", split="all", words=1)
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"text": t, "prompt": t, "chosen": " fun", "rejected": " sad", "preference": 0.9} for t in ("a", "so")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = stage(root, sources.load_data, dict(source=f"jsonl:{folder / 'pairs.jsonl'}", split="all"))
    options = {"kind": "function", "name": "dice", "function": "configs.reward:dice", "version": "1"}
    return root, lm, stage(root, sources.load_data, words), pairs, stage(root, judges.fit_judge, options)


SHORT = dict(explore=dict(n=4, max_new=5, batch=16), adapter=dict(rank=2), training=dict(steps=2, batch=4))


@pytest.mark.parametrize(
    "hp",
    [
        dict(objective=dict(target="difference", beta=0.5)),
        dict(objective=dict(kind="squared", target="difference"), reference="last", rounds=2),
        dict(against="human", reference="last"),
        dict(objective=dict(kind="edits")),
        dict(against="data", objective=dict(kind="squared", target="difference")),
    ],
    ids=["dpo", "irepo", "spin", "figa", "data"],
)
def test_fit_leaves_a_control_that_loads(given, hp, monkeypatch):
    root, lm, texts, pairs, dice = given
    data = pairs if hp.get("against") == "data" else texts
    artifact = preference.fit(root, lm=lm, data=data, rewards=[dice], **SHORT, **hp)
    assert artifact.spec["pairs"] > 0
    control = methods.load(artifact, open_lm(lm)[0])
    assert any(float(jnp.max(jnp.abs(c["b"]))) > 0 for c in control.changes.values())
    first = artifact.metrics()[0]
    if hp.get("objective", {}).get("kind") != "edits" and hp.get("rounds", 1) == 1:
        assert first["margin"] == pytest.approx(0, abs=1e-5)  # policy and reference are one before anything is learned
        assert first["better"] == pytest.approx(0, abs=1e-4)


def test_samples_that_are_the_human_texts_make_no_pair(given, monkeypatch):
    root, lm, texts, _, dice = given
    pool = experience.explore(root, lm=lm, data=texts, rewards=[dice], n=1, max_new=3)
    own = [list(t) for t in Pool.open([pool]).column("tokens")]
    monkeypatch.setattr(preference, "continuations", lambda records, tokenizer, length: own)
    with pytest.raises(InputError, match=f"each of the {len(own)} samples is the human text of its prompt"):
        preference.paired([pool], texts, open_lm(lm)[2], "human", Objective(), 3, 0)


def test_pairs_of_data_have_the_preferences_of_judges(given):
    _, lm, _, pairs, _ = given
    tokenizer = open_lm(lm)[2]
    soft = Objective(kind="squared", target="difference", temperature=3.0)
    rows, gaps = preference.paired((), pairs, tokenizer, "data", soft, 8, 0)
    np.testing.assert_allclose(soft.targets(gaps), logit(0.9), rtol=1e-6)
    found = tokenizer.decode([rows[0]["tokens"], rows[0]["other"]])
    assert [text.strip() for text in found] == ["fun", "sad"]


def test_bad_input(given):
    root, lm, texts, pairs, _ = given
    with pytest.raises(InputError, match="kind is 'dpo', expected one of logistic, squared, hinge, edits"):
        Objective(kind="dpo")
    with pytest.raises(InputError, match="beta is 0, expected a positive number"):
        Objective(beta=0)
    with pytest.raises(InputError, match="which kind 'hinge' does not read"):
        Objective(kind="hinge", target="difference")
    with pytest.raises(InputError, match="against is 'people', expected one of samples, human, data"):
        preference.fit(root, lm=lm, data=texts, against="people")
    with pytest.raises(InputError, match="no reward was given, which ranks samples"):
        preference.fit(root, lm=lm, data=texts)
    with pytest.raises(InputError, match="rounds is 2, but the pairs of data are learned from once"):
        preference.fit(root, lm=lm, data=pairs, against="data", rounds=2)
    with pytest.raises(InputError, match="reference is 'first', expected one of base, last"):
        preference.fit(root, lm=lm, data=pairs, against="data", reference="first")
    with pytest.raises(InputError, match="kind is 'prompt'"):
        preference.init(LM, jax.random.key(0), kind="prompt")
