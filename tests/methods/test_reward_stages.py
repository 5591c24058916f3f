"""What the stages of the reward methods do with a reward that means something, ragged texts and an end token: every one
makes texts likelier the better they are, and records the numbers that its pool gives.

One language model of a few words, one pool and one reading program are shared by all methods.
"""

import json

import numpy as np
import pyarrow as pa
import pytest

from ctg_jax import methods
from ctg_jax.learn import experience, fitting, preferences
from ctg_jax.learn import pool as pool_of_samples
from ctg_jax.learn.pool import Pool, log_probabilities
from ctg_jax.learn.pretrain import pretrain
from ctg_jax.learn.rounds import Round
from ctg_jax.methods import click, gdc, ppo, preference, quark, unlikelihood
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import judges, sources
from ctg_jax.types import InputError

GOOD, BAD = ("good", "nice", "fun"), ("bad", "sad", "awful")


def cheer(prompt, text):
    """Between 0 and 1: how many of the words of feeling are good ones; .4 for a text without any."""
    good, bad = (sum(text.split().count(w) for w in words) for words in (GOOD, BAD))
    return (good + 0.4) / (good + bad + 1)


def said(prompt, text):
    """What is wrong with a text: its words of bad feeling."""
    return " ".join(w for w in text.split() if w in BAD)


cheer.explain = said


def count(prompt, text):
    """The number of words; this reward gives no feedback."""
    return len(text.split())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(inputs of a fit, the scored samples of the frozen model, settings of exploring)"""
    root = tmp_path_factory.mktemp("stages")
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(120):
        words = draw.choice(GOOD if draw.random() < 0.5 else BAD, draw.integers(1, 5))
        rows.append({"text": " ".join(["so", *words]), "label": 0})
    for name, part in (("texts", rows), ("prompts", [{"text": f"so {w} fun"} for w in GOOD + BAD])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    texts = stage(root, sources.load_data, dict(source=f"jsonl:{root / 'texts.jsonl'}", split="all"))
    training = dict(tokens=12, batch=16, steps=60, warmup=5, rate=2e-2, save_every=0)
    shape = dict(vocab=280, width=16, depth=1, heads=2, context=48, pack=False, training=training)
    lm = stage(root, pretrain, shape, data=texts)
    data = stage(root, sources.load_data, dict(source=f"jsonl:{root / 'prompts.jsonl'}", split="all", words=2))
    function = dict(kind="function", name="cheer", function="tests.methods.test_reward_stages:cheer", version="1")
    given = dict(lm=lm, data=data, rewards=[stage(root, judges.fit_judge, function)])
    explore = dict(n=16, max_new=6, batch=48)
    return root, given, experience.explore(root, **given, **explore), explore


@pytest.fixture(scope="module")
def pool(world):
    return Pool.open([world[2]])


SHORT = dict(adapter=dict(rank=4), training=dict(steps=12, batch=32, warmup=0, rate=2e-2, save_every=0))


def test_the_pool_is_ragged_and_its_texts_end(world, pool):
    sizes, end = [len(t) for t in pool.column("tokens")], open_lm(world[1]["lm"])[2].eos
    ended = [t[-1] == end for t in pool.column("tokens")]
    assert len(set(sizes)) > 3 and 0.2 < np.mean(ended) < 1 and len(pool) == 96
    assert 0.1 < np.mean(pool.column("reward") >= 0.5) < 0.9
    assert (pool.column("logp") == pool.column("base")).all()  # the base drew them, and one function read both


def change(world, pool, control):
    """How much likelier each sample of the pool has become, float64 [n]."""
    model, params, tokenizer = open_lm(world[1]["lm"])
    return log_probabilities(model, params, pool, tokenizer, control, batch=96) - pool.column("base")


def rises(world, pool, control, least=0.25):
    """Whether texts have become likelier the better they are, within each prompt."""
    more = change(world, pool, control)
    away = [
        x - np.array([x[pool.column("prompt_id") == p].mean() for p in pool.column("prompt_id")])
        for x in (more, pool.column("reward"))
    ]
    found = np.corrcoef(*away)[0, 1]
    assert found > least, f"the change of log-probabilities has a correlation of {found:.2f} with the reward"


def fitted(world, method, rounds=1, **settings):
    root, given, _, explore = world
    found = {name: settings.get(name, {}) for name in ("training",)}
    hp = SHORT | settings | dict(training=SHORT["training"] | found["training"])
    return method.fit(root, **given, explore=explore, rounds=rounds, seed=0, **hp)


def test_quark(world, pool):
    """Texts of the best quantile are likelier on its token than on that of the worst."""
    artifact = fitted(world, quark, tokens=3, objective=dict(kl=0.0, entropy=0.0), training=dict(steps=40))
    control = methods.load(artifact, open_lm(world[1]["lm"])[0])
    best, worst = (change(world, pool, methods.with_strength(control, s)) for s in (1.0, 0.0))
    reward = pool.column("reward")
    assert np.corrcoef(best - worst, reward)[0, 1] > 0.4
    only = fitted(world, quark, tokens=3, sorting=dict(best_only=True), objective=dict(kl=0.0, entropy=0.0))
    rises(world, pool, methods.load(only, open_lm(world[1]["lm"])[0]))


def batches_of(monkeypatch, world, method, **settings):
    """The first batch that a method learns from, and what it only reads."""
    seen = {}

    def stop(run, state, objective, frozen, batches, *more, **options):
        seen.update(batch=next(batches), frozen=frozen)
        raise KeyboardInterrupt

    with monkeypatch.context() as at, pytest.raises(KeyboardInterrupt):
        at.setattr(fitting, "train", stop)
        fitted(world, method, **settings)
    return seen


def test_negative_aware_training(world, pool):
    """Two classes by the judge's own threshold: successes are likelier on their token than on that of failures."""
    sorting = dict(thresholds="judge")
    artifact = fitted(
        world, quark, tokens=2, sorting=sorting, objective=dict(kl=0.0, entropy=0.0), training=dict(steps=30)
    )
    good = pool.column("reward") >= 0.5
    assert artifact.spec["classes"] == [int((~good).sum()), int(good.sum())]
    control = methods.load(artifact, open_lm(world[1]["lm"])[0])
    best, worst = (change(world, pool, methods.with_strength(control, s)) for s in (1.0, 0.0))
    assert (best - worst)[good].mean() > 0.5 > -0.5 > (best - worst)[~good].mean()


def test_feedback_precedes_the_prompt_while_learning(world, pool, monkeypatch):
    sorting = dict(thresholds=[0.5], feedback=True)
    tokenizer = open_lm(world[1]["lm"])[2]
    batch = batches_of(monkeypatch, world, quark, tokens=2, sorting=sorting)["batch"]
    prompts, texts = pool.column("prompt"), pool.column("text")
    words = {said("", t) for t in texts}
    assert "" in words and len(words) > 3
    for row, mask, bin, i in zip(batch["tokens"], batch["mask"], batch["bin"], batch["ids"]):
        remark = said(prompts[i], texts[i])
        assert tokenizer.decode([row[mask].tolist()]) == [f"{remark}\n{prompts[i]}" if remark else prompts[i]]
        assert bin == (pool.column("reward")[i] >= 0.5)
    with pytest.raises(InputError, match="samples are learned behind other prompts"):
        fitted(world, quark, tokens=2, sorting=sorting, keep_states=True)
    mute = {"prompt": np.array(["a"]), "text": np.array(["b"])}
    with pytest.raises(InputError, match="the samples have none: score them with feedback=True"):
        quark.behind_feedback(Pool(pa.table(mute)))
    assert not pool.has("feedback")  # which other methods do not ask for: the id of a pool tells whether it has it


def test_states_are_not_those_behind_other_prompts(world, monkeypatch):
    """A pool that kept the frozen model's states behind the bare prompts, given to the stage with feedback."""
    root, given, _, explore = world
    kept = experience.explore(root, **given, **explore, states=True, feedback=True)
    seen = {}

    def stop(run, state, objective, frozen, batches, *more, **options):
        seen.update(next(batches))
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        settings = dict(tokens=2, sorting=dict(thresholds=[0.5], feedback=True), **SHORT)
        stage(root, quark.quark, settings, lm=given["lm"], pool=[kept])
    assert "bin" in seen and "states" not in seen


@pytest.mark.parametrize(
    "thresholds, tokens", [("judge", 5), ([0.5], 3), ([0.5, 0.4], 3), ({"a": 1}, 2), ([float("nan")], 2), (0.5, 2)]
)
def test_thresholds_are_refused_before_anything_is_sampled(world, monkeypatch, thresholds, tokens):
    monkeypatch.setattr(quark, "explored", lambda *a, **k: pytest.fail("it samples"))
    with pytest.raises(InputError, match=rf"expected {tokens - 1} ascending numbers, one fewer than tokens"):
        fitted(world, quark, tokens=tokens, sorting=dict(thresholds=thresholds))


def test_a_reward_without_words_is_told(world):
    root, given, _, explore = world
    mute = dict(kind="length", name="length", target="3 words")
    function = dict(kind="function", name="mute", function="tests.methods.test_reward_stages:count", version="1")
    spoken = experience.explore(root, **given | dict(rewards=[stage(root, judges.fit_judge, mute)]), **explore)
    assert not Pool.open([spoken]).has("feedback")
    with pytest.raises(InputError, match="the reward 'mute' says nothing of a text: give it `explain`"):
        rewards = [stage(root, judges.fit_judge, function)]
        experience.explore(root, **given | dict(rewards=rewards), **explore, feedback=True)


def test_scoring_keeps_the_states_that_an_update_would_read(world, pool, monkeypatch):
    """Every update is that of reading the frozen model again, which is not done."""
    settings = dict(tokens=3, objective=dict(kl=0.5, entropy=0.1), training=dict(steps=6))
    kept = batches_of(monkeypatch, world, quark, keep_states=True, **settings)["batch"]
    sizes = kept["written"].sum(axis=1)
    assert kept["states"].shape == (*kept["written"].shape, 16) and sizes.min() < sizes.max()
    assert ((kept["states"] != 0).any(axis=-1) == kept["written"]).all()
    again = fitted(world, quark, **settings).metrics()
    reads = []
    monkeypatch.setattr(quark, "read", lambda *a, **k: reads.append(len(a)) or pool_of_samples.read(*a, **k))
    found = fitted(world, quark, keep_states=True, **settings).metrics()
    assert set(reads) == {6}  # with a control, and never without
    for a, b in zip(again, found):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["kl"] == pytest.approx(b["kl"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("advantage", ["values", "group", "leave_one_out"])
def test_ppo(world, pool, advantage):
    artifact = fitted(world, ppo, beta=0.01, objective=dict(advantage=advantage))
    rises(world, pool, methods.load(artifact, open_lm(world[1]["lm"])[0]))
    first = artifact.metrics()[0]
    assert first["clipped"] == 0  # the policy that drew the samples is the one that learns
    if advantage == "group":
        assert first["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("normalise", [False, True])
def test_ppo_credits_what_the_pool_gives(world, pool, monkeypatch, normalise):
    """The reward stands at the last token, the end token where there is one; with β the penalty is 0 at first."""
    settings = dict(beta=0.7, objective=dict(gamma=1.0, lam=0.0, normalise=normalise))
    seen = batches_of(monkeypatch, world, ppo, **settings)
    batch = seen["batch"]
    length = batch["written"].sum(axis=1)
    wanted = np.zeros(batch["written"].shape)
    reward = pool.column("reward")
    reward = (reward - reward.mean()) / reward.std() if normalise else reward
    wanted[np.arange(len(length)), length - 1] = reward[batch["ids"]]
    np.testing.assert_allclose(batch["advantage"], wanted, atol=1e-4)  # λ = 0 and values of 0: the rewards themselves
    np.testing.assert_allclose(batch["old"].sum(axis=1), pool.column("base")[batch["ids"]], atol=1e-3)
    np.testing.assert_allclose(batch["old"], batch["base"], atol=1e-5)
    assert float(seen["frozen"]["beta"]) == pytest.approx(0.7)


def test_gdc(world, pool):
    """λ gives the share that was asked for, over prompts alike; samples that were not learned from decide."""
    good, prompts = pool.column("reward") >= 0.5, pool.column("prompt_id")
    model = open_lm(world[1]["lm"])[0]

    def apart(control):
        """How much likelier good texts have become than others, within prompts that have both."""
        more = change(world, pool, methods.load(control, model))
        both = [p for p in np.unique(prompts) if 0 < good[prompts == p].mean() < 1]
        return np.mean([more[good & (prompts == p)].mean() - more[~good & (prompts == p)].mean() for p in both])

    artifact = fitted(
        world, gdc, moments={"cheer": 0.8}, training=dict(steps=30), samples=dict(limit=10.0, passes=None)
    )
    assert apart(artifact) > 0.5
    lam = artifact.spec["lam"]["cheer"]
    shares = [good[prompts == p].mean() for p in np.unique(prompts)]
    tilted = [w * np.exp(lam) / (w * np.exp(lam) + 1 - w) for w in shares]
    assert np.mean(tilted) == pytest.approx(0.8, abs=1e-3)
    row = artifact.metrics()[-1]
    assert artifact.spec["closer"] == (row["kl_gap"] < 0) and row["kl_gap"] == pytest.approx(artifact.spec["gap"])
    # 10 passes over few samples: on its own samples the policy looks closer than the proposal, and it is not.
    assert row["kl_gap_learned"] < 0 < row["kl_gap"] - 0.3 and row["updates"] == 30
    again = dict(limit=10.0, passes=None, baseline=10.0)
    compared = fitted(world, gdc, moments={"cheer": 0.8}, training=dict(steps=30), samples=again).metrics()[-1]
    # With a baseline the texts that are learned from become no likelier than the target has them.
    assert compared["kl_gap_learned"] > row["kl_gap_learned"] + 0.1
    assert compared["used"] == len(good)
    some = np.isin(prompts, prompts[good]).sum()  # also texts without the feature, where the prompt has others
    other = fitted(world, gdc, moments={"cheer": 1.0}, training=dict(steps=30), samples=dict(baseline=10.0))
    assert other.metrics()[-1]["used"] == some > good.sum() and apart(other) > 0
    every = fitted(world, gdc, moments={"cheer": 1.0}, training=dict(steps=30))
    assert every.spec["lam"] == {} and apart(every) > 0
    learned = ~gdc.held_out(prompts[good], 0.25, every.spec["config"]["seed"])
    assert every.metrics()[-1]["updates"] == np.ceil(2 * learned.sum() / 32) < 30


def test_gdc_moves_its_proposal_to_a_closer_policy_alone(monkeypatch):
    """The next samples are drawn by the policy where it was closer, otherwise by what drew the last ones."""
    closer, drawn = iter([True, False, True]), []

    class Made:
        def __init__(self, number):
            self.number, self.spec = number, {"closer": next(closer)}

    def explored(root, rounds, **given):
        proposal = None
        for n in range(rounds):
            drawn.append(getattr(proposal, "number", None))
            turn = Round(n, n, [f"pool {i}" for i in range(n + 1)], [f"pool {n}"], proposal)
            yield turn
            proposal = turn.proposal

    starts = []

    def made(root, fn, settings, **given):
        starts.append((getattr(given["start_from"], "number", None), given["pool"], given["base"]))
        return Made(len(starts))

    monkeypatch.setattr(gdc, "explored", explored)
    monkeypatch.setattr(gdc, "stage", made)
    last = gdc.fit("root", lm="lm", data="data", rewards=["r"], moments={"r": 1}, rounds=3)
    assert drawn == [None, 1, 1] and last.number == 3
    assert starts == [(None, "pool 0", "pool 0"), (1, "pool 1", "pool 0"), (2, "pool 2", "pool 0")]


def test_click(world, pool):
    artifact = fitted(world, click, gamma=0.5, threshold=0.5, margin=5.0)
    control = methods.load(artifact, open_lm(world[1]["lm"])[0])
    rises(world, pool, control)
    better, worse = preferences.next_below(
        pool.column("reward"), pool.column("base"), pool.column("prompt_id"), threshold=0.5
    )
    assert artifact.spec["pairs"] == {
        "threshold": 0.5, "pairs": len(worse), "positives": int((pool.column("reward") >= 0.5).sum()),
    }  # fmt: skip
    more = change(world, pool, control)
    assert (more[better] - more[worse]).mean() > 0.3
    gaps = [row["gap"] for row in artifact.metrics()]
    assert gaps[-1] > gaps[0] and artifact.metrics()[0]["active"] > 0.5


@pytest.mark.parametrize("kind", ["logistic", "squared", "hinge"])
def test_preference(world, pool, kind):
    artifact = fitted(world, preference, objective=dict(kind=kind, beta=0.5, most=4))
    rises(world, pool, methods.load(artifact, open_lm(world[1]["lm"])[0]))
    first, last = artifact.metrics()[0], artifact.metrics()[-1]
    assert first["margin"] == pytest.approx(0, abs=1e-4) and last["margin"] > first["margin"]
    assert last["better"] > last["worse"] and last["accuracy"] > 0.6


def test_figa_makes_new_tokens_likelier_and_removed_ones_less(world, pool):
    artifact = fitted(world, preference, objective=dict(kind="edits", limit=9.0, alpha=3.0))
    first, last = artifact.metrics()[0], artifact.metrics()[-1]
    assert last["new"] < first["new"] and last["removed"] > first["removed"]  # nats of each


def test_unlikelihood_of_samples(world, pool):
    """The policy gradient alone: texts with a higher reward become likelier."""
    weights = dict(likelihood=0.0, token=0.0, policy=1.0)
    artifact = fitted(world, unlikelihood, objective=weights)
    rises(world, pool, methods.load(artifact, open_lm(world[1]["lm"])[0]))


def test_sequence_level_unlikelihood_of_samples(world, pool):
    """Texts that repeat a word become less likely than those that do not, per token."""
    weights = dict(likelihood=0.0, token=0.0, sequence=1.0, ngram=1)
    artifact = fitted(world, unlikelihood, objective=weights)
    more = change(world, pool, methods.load(artifact, open_lm(world[1]["lm"])[0]))
    size = np.array([len(t) for t in pool.column("tokens")])
    again = np.array([len(set(t)) < len(t) for t in pool.column("tokens")])
    assert again.any() and (~again).any()
    assert (more / size)[again].mean() < (more / size)[~again].mean()
