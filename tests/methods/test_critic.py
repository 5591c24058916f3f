"""Critics: three tokens by hand, exact and learned values, looking ahead against reading again, fits, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import struct
from laws import worlds

from configs import critic as configured
from configs import reward
from ctg_jax import methods, tree
from ctg_jax.control import IDENTITY, Chain, Control
from ctg_jax.controls import constraints
from ctg_jax.decode import loop
from ctg_jax.learn.critics import Objective, goals
from ctg_jax.learn.pool import Pool
from ctg_jax.methods import critic
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.record import record
from ctg_jax.run.stage import open_artifact, open_lm, stage
from ctg_jax.stages import judges
from ctg_jax.types import InputError

WORLD = worlds.Bigram()
P = np.array([0.5, 0.3, 0.2])
BASE = worlds.table([P] * 3)
LM = worlds.tiny(depth=1)
PARAMS = worlds.lively(LM)
TEXTS = worlds.sequences(WORLD, 3)
PREFIXES = 40  # of at most three tokens: the empty one is 0, and token v after prefix i makes 3 i + v + 1
MIXED = worlds.table(jax.random.dirichlet(jax.random.key(5), jnp.ones(3), (3,)))  # another next token after each


def logit(p):
    p = np.clip(np.asarray(p, np.float64), 1e-13, 1 - 1e-13)
    return np.log(p) - np.log1p(-p)


@struct.dataclass
class Prefixes:
    """A stream whose states tell the number of the prefix; what it has read are the numbers of the last positions."""

    control: Control = IDENTITY
    ahead: bool = struct.field(pytree_node=False, default=True)
    lm: worlds.Bigram = struct.field(pytree_node=False, default=WORLD)

    def bind(self, frozen, params):
        return self

    def check(self, prompts):
        pass

    def readers(self, name):
        return ()

    def init(self, prompts, length):
        return jnp.zeros((len(prompts.keys), 0), jnp.int32)

    def read(self, tokens, mask, new, reading):
        later, numbers = tokens, [reading[:, -1]] if reading.shape[1] else []
        if not numbers:
            later, numbers = tokens[:, tokens.shape[1] - (new - 1) :], [jnp.zeros(len(tokens), jnp.int32)]
        for t in range(later.shape[1]):
            numbers.append(3 * numbers[-1] + later[:, t] + 1)
        reading = jnp.stack(numbers[-new:], axis=1)
        return None, jax.nn.one_hot(reading, PREFIXES), reading

    def peek(self, tokens, reading, back):
        at = jnp.take(reading, reading.shape[1] - 1 - back, axis=1)[:, None]
        return None, jax.nn.one_hot(3 * at + tokens + 1, PREFIXES)


def built(v, alpha=1.0, **static):
    """The critic with a value for each prefix, as far as they are given."""
    kernel = jnp.zeros(PREFIXES).at[: len(v)].set(jnp.asarray(v, jnp.float32))
    value = {"kernel": kernel, "bias": jnp.zeros(())}
    return critic.Critic(Prefixes(), value, jnp.asarray(alpha, jnp.float32), **{"top": 3, **static})


def next_token(control, cond=None, rows=1):
    prompts = worlds.prompts([[0]] * rows, cond=cond)
    z = loop.forward(WORLD, BASE, prompts, jnp.zeros((rows, 1), jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[:, 0]))


@pytest.mark.parametrize(
    "values, settings, expected",
    [
        (logit([0.62, 0.9, 0.5]), dict(link="ratio", top=2), (0.62155, 0.20718, 0.17127)),  # CriticControl
        (logit([0.62, 0.9, 0.5]), dict(link="ratio", top=2, rest="drop"), (0.75, 0.25, 0)),
        (logit([0.5, 0.9, 0.5, 0.1]), dict(link="log"), (0.72581, 0.24194, 0.03226)),  # FUDGE
        (logit([0.5, 0.9, 0.5, 0.1]), dict(link="log", alpha=4.0), (0.94588, 0.05406, 0.00006)),
        ([0, 0.9, 0.5, 0.1], dict(link="clip", top=2, rest="drop", alpha=2.0), (0.78765, 0.21235, 0)),  # RAD
        ([0, 1.7, -0.4, 3.0], dict(link="clip", top=2, rest="drop", alpha=np.log(3)), (5 / 6, 1 / 6, 0)),
        ([0, 0.9, 0.5, 0.1], dict(link="centred", alpha=2.0), (0.74055, 0.19965, 0.05981)),  # VAS
        ([0, 0.9, 0.5, 0.1], dict(link="centred", top=2, alpha=2.0), (0.65031, 0.17532, 0.17437)),
        ([0, 0.9, 0.5, 0.1], dict(link="value", top=2, rest="drop", alpha=2.0), (0.78765, 0.21235, 0)),  # ARGS
        ([0, 0.9, 0.5, 0.1], dict(link="clip", top=2, rest="drop", alpha=0.0), P),  # nothing is dropped at strength 0
    ],
)
def test_three_tokens_by_hand(values, settings, expected):
    np.testing.assert_allclose(next_token(built(values, **settings)), [expected], atol=1e-5)


def test_each_row_has_a_strength_and_removed_tokens_are_no_candidates():
    control = built([0, 0.9, 0.5, 0.1], link="clip", top=2, rest="drop", cond="much")
    found = next_token(control, {"much": jnp.array([2.0, 0.0, 1.0])}, rows=3)
    one = P[:2] * np.exp([0.9, 0.5])
    np.testing.assert_allclose(found, [(0.78765, 0.21235, 0), P, (*one / one.sum(), 0)], atol=1e-5)
    ban = constraints.Ban(jnp.array([True, False, False]))
    centred = built([0, 9.0, 0.5, 0.1], link="centred", alpha=2.0)
    pushed = np.array([0, 0.3 * np.exp(0.4), 0.2 * np.exp(-0.4)])
    found = next_token(Chain((ban, centred)))
    np.testing.assert_allclose(found, [pushed / pushed.sum()], atol=1e-5)
    assert built([0], rest="drop").selects and not built([0], rest="keep").selects


def expected_of(phi):
    """E_p[phi | prefix] float64 [40] for values phi [27] of texts of three tokens under MIXED, and p [27]."""
    p = worlds.probabilities(WORLD, MIXED, [0], 3)
    out, mass = np.zeros(PREFIXES), np.zeros(PREFIXES)
    for text, share, value in zip(TEXTS, p, phi):
        at = 0
        for v in (None, *text):
            at = at if v is None else 3 * at + v + 1
            out[at] += share * value
            mass[at] += share
    return out / mass, p


REWARD = np.array([(a == 0) + 0.5 * (b == 2) - (c == a) for a, b, c in TEXTS.tolist()])
CLASS = np.clip(0.5 + 0.4 * REWARD, 0, 1)
BETA = 0.5


def under(control):
    return worlds.probabilities(WORLD, MIXED, [0], 3, control)


@pytest.mark.parametrize("link, rest", [("ratio", "keep"), ("log", "drop")])
def test_exact_probabilities_give_the_base_under_the_condition(link, rest):
    exact, p = expected_of(CLASS)
    target = p * CLASS / np.sum(p * CLASS)
    np.testing.assert_allclose(under(built(logit(exact), link=link, rest=rest)), target, atol=1e-5)
    assert worlds.divergence(np.where(target > 1e-9, target, 0), p) > 0.05


def test_soft_values_give_the_optimum_and_expected_values_do_not():
    psi, p = expected_of(np.exp(REWARD / BETA))
    target = p * np.exp(REWARD / BETA)
    target /= target.sum()
    np.testing.assert_allclose(under(built(BETA * np.log(psi), 1 / BETA, link="value")), target, atol=1e-5)
    mean, _ = expected_of(REWARD)
    found = under(built(mean, 1 / BETA, link="value"))
    base = np.exp(np.asarray(MIXED["head"]["kernel"])).T
    by_hand = []  # one step at a time: p exp(V' / β), normalised
    for text in TEXTS:
        at, before, share = 0, 0, 1.0
        for v in text:
            weights = base[before] * np.exp(mean[3 * at + 1 : 3 * at + 4] / BETA)
            share *= weights[v] / weights.sum()
            at, before = 3 * at + v + 1, v
        by_hand.append(share)
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    assert worlds.divergence(target, found) > 0.01


def rows(goal, importance, texts=TEXTS, **fields):
    goal, importance = (jnp.asarray(x, jnp.float32) for x in (goal, importance))
    return worlds.written([0], np.asarray(texts), goal=goal, importance=importance, **fields)


@pytest.mark.parametrize(
    "objective, goal, learned",
    [
        (Objective("bce"), CLASS, lambda: logit(expected_of(CLASS)[0])),
        (Objective("soft", beta=BETA), REWARD, lambda: BETA * np.log(expected_of(np.exp(REWARD / BETA))[0])),
        (Objective("mse"), REWARD, lambda: expected_of(REWARD)[0]),
        (Objective("gae", lam=1.0), REWARD, lambda: expected_of(REWARD)[0]),
        (Objective("gae", lam=0.5), REWARD, lambda: expected_of(REWARD)[0]),
    ],
    ids=["bce", "soft", "mse", "gae 1", "gae .5"],
)
def test_what_is_learned(objective, goal, learned):
    """The law of p · φ / Z within 0.02 nats, and the expected reward at every prefix."""
    exact, (_, p) = learned(), expected_of(goal)
    control, _ = worlds.trained(
        critic.loss(objective), built([0]), {"params": MIXED}, [rows(goal, 27 * p)] * 500, rate=0.1,
        trained="value/kernel",
    )  # fmt: skip
    found = np.asarray(control.value["kernel"])
    if objective.kind in ("mse", "gae"):
        np.testing.assert_allclose(found, exact, atol=0.02)
        return
    control = control.replace(link="ratio" if objective.kind == "bce" else "value")
    control = control.replace(alpha=jnp.float32(1 if objective.kind == "bce" else 1 / BETA))
    phi = CLASS if objective.kind == "bce" else np.exp(REWARD / BETA)
    target = p * phi / np.sum(p * phi)
    assert worlds.divergence(target, under(control)) < 0.02 < worlds.divergence(target, p)


def test_errors_by_hand():
    """Values .5, 1 and 2 of the prefixes of a text of two tokens with the reward 1, and 1 and 3 of a text of one token
    with the reward 0, which counts twice."""
    v, real = jnp.array([[0.5, 1.0, 2.0], [1.0, 3.0, 9.0]]), jnp.array([[True, True, True], [True, True, False]])
    given = (v, real, jnp.array([1.0, 0.0]), jnp.array([1.0, 2.0]))
    returns = Objective("gae", gamma=0.5, lam=1.0), Objective("gae", gamma=1.0, lam=0.0)
    kinds = [*map(Objective, ("mse", "weighted", "last", "bce")), *returns, Objective("soft", beta=0.5)]
    found = jax.jit(lambda: [objective.errors(*given) for objective in kinds])()
    mse, weighted, last, bce, far, near, soft = (np.asarray(errors * weights) for errors, weights in found)
    np.testing.assert_allclose(mse, [[0.25, 0, 1], [2, 18, 0]])
    np.testing.assert_allclose(weighted, [[0, 0, 2 / 3], [0, 18, 0]], rtol=1e-6)
    np.testing.assert_allclose(last, [[0, 0, 1], [0, 18, 0]])
    np.testing.assert_allclose([np.sum(weights) for _, weights in found[:3]], [7, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(bce[:, 0], [0.474077, 2 * 1.313262], rtol=1e-5)
    np.testing.assert_allclose(far, [[0.0625, 0.25, 1], [2, 18, 0]], atol=1e-6)  # the returns are .25, .5, 1 and 0, 0
    np.testing.assert_allclose(near, [[0.25, 1, 1], [8, 18, 0]], atol=1e-6)  # the value of the next prefix
    np.testing.assert_allclose(soft[0], [np.e - 2, 0, np.exp(-2) + 1], rtol=1e-5, atol=1e-6)


def test_goals_by_hand():
    rewards = np.array([0.2, 0.6, 1.0])
    assert goals(rewards, Objective("bce"), 0.6).tolist() == [0, 1, 1]
    np.testing.assert_allclose(goals(rewards, Objective("mse"), 0.5), rewards)
    np.testing.assert_allclose(goals(rewards, Objective("gae", "logit"), 0.5), logit([0.2, 0.6, 1 - 1e-4]), rtol=1e-5)
    pool = Pool(pa.table({"base": [-1.0, -2.0, -3.0], "logp": [-1.0, -2.0 - np.log(2), -9.0]}))
    np.testing.assert_allclose(pool.importance(3.0), [0.5, 1.0, 1.5], rtol=1e-6)
    with pytest.raises(InputError, match="all 3 samples are on one side of the threshold 2"):
        goals(rewards, Objective("bce"), 2.0)
    with pytest.raises(InputError, match="a reward is 3, but kind 'bce' needs probabilities"):
        goals(np.array([3.0, 0.0]), Objective("bce", "reward"), 0.5)


def test_looking_ahead_equals_reading_every_candidate():
    given, completions = [[1, 2, 3], [4]], [[5, 6, 7], [1, 2, 10]]
    control = critic.example(LM, jax.random.key(7)).replace(rest="keep", top=3)
    found = loop.forward(LM, PARAMS, worlds.prompts(given), jnp.asarray(completions), control)
    base = np.asarray(loop.forward(LM, PARAMS, worlds.prompts(given), jnp.asarray(completions)))

    @jax.jit
    def value(tokens):
        h = LM.apply(PARAMS, LM.embed(PARAMS, tokens), jnp.ones(tokens.shape, bool), last=1).hidden
        return control.values(h[:, -1:])[:, 0]

    for i, (row, completion) in enumerate(zip(given, completions)):
        for n in range(3):
            text = [*row, *completion[:n]]
            top = np.argsort(-base[i, n])[:3]
            now = float(value(jnp.asarray([text]))[0])
            ahead = np.asarray(value(jnp.asarray([[*text, v] for v in top])))
            wanted = base[i, n].copy()
            wanted[top] += np.log1p(np.exp(-now)) - np.log1p(np.exp(-ahead))
            np.testing.assert_allclose(found[i, n], wanted, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module")
def judge(small):
    options = {"kind": "function", "name": "dice", "function": "configs.reward:dice", "version": "1"}
    return stage(small[0], judges.fit_judge, options)


TRAINING = dict(steps=3, batch=4, tokens=16, warmup=1)


def test_fit_learns_a_head_on_the_base_from_samples(small, judge):
    root, lm, data = small
    settings = dict(
        explore=dict(n=4, max_new=5, batch=16, filter=dict(temperature=2.0)), training=TRAINING,
        objective=dict(kind="gae", goal="logit", gamma=0.99), control=dict(top=4, alpha=2.0),
    )  # fmt: skip
    fitted = critic.fit(root, lm=lm, data=data, rewards=[judge], **settings)
    model = open_lm(lm)[0]
    control = methods.load(fitted, model)
    assert float(jnp.abs(control.value["kernel"]).max()) > 0 and (control.top, float(control.alpha)) == (4, 2)
    assert tree.size_bytes(control) == 4 * (model.width + 2) and control.judge.params is None  # no weights of the base


@pytest.mark.parametrize("world", sorted(reward.WORLDS))
def test_small_models_learn_a_language_from_texts_and_not_from_prompts(monkeypatch, world):
    monkeypatch.setenv("CTG_DATA_DIR", "/data")
    monkeypatch.setenv("CTG_LM_DIR", "/lm")
    arms = configured.get_config(world).to_dict()["methods"].values()
    trained = [arm for arm in arms if "small" in arm.get("fit", {})]
    assert trained
    for arm in trained:
        texts, prompts = arm["fit"]["small"]["texts"], arm["data"]
        assert "words" not in texts and texts.get("text") != "prompt"
        assert texts.get("limit", 1001) > prompts["limit"]


def test_prompts_alone_teach_no_small_model(small, judge):
    root, lm, data = small
    with pytest.raises(InputError, match=r"^small has neither a source nor texts, .* or the settings of load_data"):
        critic.fit(root, lm=lm, data=data, rewards=[judge], small=dict(width=8, depth=1, heads=2))


def test_fit_learns_a_small_model_from_labels(small):
    root, lm, data = small
    shape = dict(width=8, depth=1, heads=2, training=TRAINING)
    given = dict(lm=lm, data=data, small=shape, training=TRAINING, objective=dict(kind="weighted"))
    fitted = critic.fit(root, control=dict(link="clip", rest="drop", alpha=30.0), **given)
    model = open_lm(lm)[0]
    control = methods.load(fitted, model)
    assert control.judge.lm.width == 8 and control.value["kernel"].shape == (8,)
    reader = open_artifact(root / f"sibling-{fitted.spec['inputs']['small']}", fitted.session)
    before = open_lm(reader)[1]["embed"]["tokens"]
    assert float(jnp.abs(control.judge.params["embed"]["tokens"] - before).max()) > 1e-4  # it learns with the head
    assert float(jnp.abs(control.value["kernel"]).max()) > 0
    with pytest.raises(InputError, match=r"label is 3, but the texts of .* have the labels \[0, 1\]"):
        critic.fit(root, label=3, **given)


def test_the_sizes_of_the_paper_fit_on_paper():
    large = Transformer.gpt2(width=1280, depth=2, heads=20)
    small = record(Transformer.gpt2(width=768, depth=2, heads=12))
    for settings in (dict(), dict(small=small, top=20, link="clip", rest="drop", alpha=30.0)):
        out = worlds.written_on_paper(large, lambda key, s=settings: critic.init(large, key, **s))
        assert out.tokens.shape == (1, 2)


def test_bad_input_raises_one_sentence(small, judge):
    root, lm, data = small
    key = jax.random.key(0)
    for settings, words in [
        (dict(link="odds"), "link is 'odds', expected one of ratio, log, clip, value, centred"),
        (dict(rest="cut"), "rest is 'cut', expected one of keep, drop"),
        (dict(alpha=float("nan")), "alpha is nan"),
        (dict(top=12), "top is 12, but the vocabulary has 11 tokens: expected 1 to 11 candidates"),
        (dict(top=0), "top is 0, but"),
        (dict(small=record(worlds.tiny(vocab=9)), top=3), "has a vocabulary of 9 tokens and the base model one of 11"),
    ]:
        with pytest.raises(InputError, match=words):
            critic.init(LM, key, **settings)
    with pytest.raises(InputError, match="top is 4, but the vocabulary has 3 tokens"):
        next_token(built([0], top=4))
    for settings, words in [
        (dict(kind="hinge"), "kind is 'hinge', expected one of bce"),
        (dict(goal="rank"), "goal is 'rank', expected one of label"),
        (dict(beta=0), "beta is 0, expected a positive number"),
    ]:
        with pytest.raises(InputError, match=words):
            Objective(**settings)
    given = dict(lm=lm, data=data, rewards=[judge])
    with pytest.raises(InputError, match="rounds is 2, but rest 'drop'"):
        critic.fit(root, rounds=2, control=dict(rest="drop"), **given)
    with pytest.raises(InputError, match="explore has a filter with top_p"):
        critic.fit(root, explore=dict(filter=dict(top_p=0.9)), **given)
    with pytest.raises(InputError, match="init has no setting 'topp'; did you mean 'top'"):
        critic.fit(root, explore=dict(n=4, max_new=5, batch=16), control=dict(topp=3), **given)
