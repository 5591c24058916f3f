"""Constrained fine-tuning: the KL and its gradient by hand, p · 1[c] / Z in an enumerable world, a fit, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import IDENTITY, Control
from ctg_jax.learn import oracle
from ctg_jax.methods import constrained
from ctg_jax.run.stage import open_artifact, open_lm, stage
from ctg_jax.stages import judges, sources
from ctg_jax.types import InputError

WORLD = worlds.Bigram()
P, R = np.array([0.5, 0.3, 0.2]), np.array([0.9, 0.5, 0.1])
BASE = worlds.table([P] * 3)


def rows(texts, near, human=None, prompt=(0,)):
    texts = np.asarray(texts)
    human = texts if human is None else np.asarray(human)
    batch = worlds.written(list(prompt), texts, near=jnp.asarray(near, jnp.float32), human=jnp.asarray(human))
    return batch | {"human_written": jnp.ones(human.shape, bool)}


def measured(target, batch, change=None, world=WORLD, params=BASE, **settings):
    """(the loss, its gradient) at a change of weights, by default at none."""
    change = constrained.init(world, jax.random.key(0), kind="full") if change is None else change
    keys = jax.random.split(jax.random.key(0), len(batch["ids"]))
    frozen = {"params": params, "target": target}
    objective = constrained.loss(world, **settings)

    def value(change):
        out = objective(change, frozen, batch, keys)
        return out.total, out

    (_, out), slope = jax.jit(jax.value_and_grad(value, has_aux=True))(change)
    return out, slope


def guide(r=R):
    """R of the next token, whatever came before, as an oracle."""
    control = oracle.init(WORLD, jax.random.key(0))
    return control.replace(value={**control.value, "bias": jnp.asarray(np.log(r) - np.log1p(-r), jnp.float32)})


def test_the_closed_form_by_hand():
    """q is (.72581, .24194, .03226)."""
    ce = -np.log(P[[1, 2]]).sum()
    out, _ = measured(guide(), rows([[1, 2]], [1.0]), weight=2.0)
    assert float(out.total) == pytest.approx(ce + 2 * 2 * 0.15959, abs=1e-4) and float(out.weight) == 2
    far, count = out.metrics["divergence"]
    assert float(far / count) == pytest.approx(0.15959, abs=1e-5)
    # After the prompt, token 0, the gradient of the second mean is p - q; texts of people have one token here.
    ways = [measured(guide(), rows([[1]], [1.0], [[1]]), weight=weight)[1] for weight in (0.0, 1.0)]
    apart = jax.tree.map(lambda a, b: b - a, *ways).changes["head/kernel"]
    np.testing.assert_allclose(jax.tree.leaves(apart)[0][:, 0], (-0.22581, 0.05806, 0.16774), atol=1e-5)
    # A sample that does not satisfy the constraint has no part in it, and the mean is over all samples.
    out, _ = measured(guide(), rows([[1, 2], [0, 0]], [2.0, 0.0]))
    assert float(out.metrics["divergence"][0]) == pytest.approx(4 * 0.15959, abs=1e-4)
    # Texts of people in place of samples.
    out, _ = measured(guide(), rows([[0]], [5.0], [[1, 2]]), on="corpus")
    assert float(out.total) == pytest.approx(ce + 2 * 0.15959, abs=1e-4)


def test_without_a_constraint_the_kl_holds_the_model_where_it_is():
    for target in (IDENTITY, guide(np.full(3, 0.5))):
        out, slope = measured(target, rows([[1, 2]], [1.0]), weight=3.0)
        plain, alone = measured(target, rows([[1, 2]], [1.0]), weight=0.0)
        assert float(out.total) == pytest.approx(float(plain.total), abs=1e-5)
        for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a, b, atol=1e-5)


LM = worlds.tiny(vocab=5, depth=1)
PARAMS = worlds.lively(LM, factor=4)
PROMPT = [1, 2]
EVERY = worlds.sequences(LM, 2)
FEATURE = (EVERY == 3).any(1)  # the text holds token 3


@struct.dataclass
class Exact(Control):
    """z + log R of texts of two tokens; r float32 [1 + V, V], before the first token and after each."""

    r: jax.Array

    def logits(self, z, h, tokens, mask, state):
        first = jnp.broadcast_to(self.r[:1], (len(z), self.r.shape[1]))
        return z + jnp.log(jnp.stack([first, self.r[1 + tokens[:, -1]]], axis=1)), state


def test_it_learns_the_base_under_the_condition():
    """As GDC with one pointwise feature does (tests/methods/test_gdc.py), here from the closed form alone."""
    base = worlds.probabilities(LM, PARAMS, PROMPT, 2)
    target = np.where(FEATURE, base, 0) / base[FEATURE].sum()
    joint = base.reshape(5, 5)
    each = joint / joint.sum(1, keepdims=True)
    first = np.array([1.0 if a == 3 else each[a, 3] for a in range(5)])
    second = np.array([[1.0 if 3 in (a, b) else 1e-9 for b in range(5)] for a in range(5)])
    control = Exact(jnp.asarray(np.concatenate([first[None], second]), jnp.float32))
    np.testing.assert_allclose(worlds.probabilities(LM, PARAMS, PROMPT, 2, control), target, atol=1e-5)
    batch = rows(EVERY, 25 * target, prompt=PROMPT)
    batch["human_written"] = jnp.zeros_like(batch["human_written"]).at[0, 0].set(True)  # one token of people
    policy, _ = worlds.trained(
        constrained.loss(LM, weight=1e3), constrained.init(LM, jax.random.key(0), kind="full"),
        {"params": PARAMS, "target": control}, [batch] * 300, rate=1e-2, trained="changes/.*",
    )  # fmt: skip
    found = worlds.probabilities(LM, PARAMS, PROMPT, 2, policy)
    assert worlds.divergence(target, found) < 0.02 < 0.2 < worlds.divergence(target, base)
    assert found[FEATURE].sum() > 0.99


@pytest.fixture(scope="module")
def judge(small):
    options = {"kind": "function", "name": "dice", "function": "configs.reward:dice", "version": "1"}
    return stage(small[0], judges.fit_judge, options)


def test_fit_teaches_an_oracle_of_the_model_as_it_is(small, judge):
    root, lm, data = small
    texts = stage(root, sources.load_data, dict(source=f"jsonl:{data.path / 'data.jsonl'}", split="all", words=1))
    training = dict(steps=2, batch=4, tokens=16, warmup=1)
    given = dict(
        lm=lm, data=texts, rewards=[judge], explore=dict(n=4, max_new=5, batch=16), threshold="median",
        training=training, guide=dict(training=training), adapter=dict(rank=2),
    )  # fmt: skip
    fitted = constrained.fit(root, rounds=2, **given)
    inputs = fitted.spec["inputs"]
    teacher = open_artifact(root / f"constrained_oracle-{inputs['guide']}", fitted.session)
    assert len(inputs["pool"]) == 1 and teacher.spec["inputs"]["policy"] == inputs["start_from"] is not None
    model, _, _ = open_lm(lm)
    policy = methods.load(fitted, model)
    assert fitted.spec["method"] == "constrained" and float(policy.scale) == 1
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(policy.changes)) > 0
    for change, words in [
        (dict(on="both"), "on is 'both', expected one of samples, corpus"),
        (dict(weight=-1.0), "weight is -1.0, expected a number from 0 up"),
        (dict(threshold=2.0), "samples are on one side of the threshold 2"),
        (dict(rewards=[]), "no reward was given"),
        (dict(explore=dict(filter=dict(temperature=2.0))), "explore has a filter with temperature"),
    ]:
        with pytest.raises(InputError, match=words):
            constrained.fit(root, rounds=1, **given | change)
