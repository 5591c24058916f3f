"""Distillation: the loss by hand, a student that reaches its teacher in a world small enough to enumerate, what is
forgotten by hand, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.controls.experts import experts
from ctg_jax.controls.streams import Stream
from ctg_jax.methods import dexperts, distil
from ctg_jax.run.stage import open_artifact, open_lm
from ctg_jax.types import InputError

LM = worlds.Bigram(vocab=3)
PARAMS = jax.jit(LM.init)(jax.random.key(0))
OTHER = jax.jit(LM.init)(jax.random.key(1))
TEACHER = experts(anti=Stream(OTHER, lm=LM), alpha=2.0, rule="forget")
ROWS = {
    "tokens": jnp.array([[0, 1, 2, 0, 2, 1, 1, 0, 0, 2]]), "mask": jnp.ones((1, 10), bool), "ids": jnp.array([0]),
}  # fmt: skip


def test_forgetting_by_hand():
    """z (2, 1, 0), of the model that was trained further (3, .5, 0), alpha 5: only token 0 becomes less likely."""
    base, further = (worlds.table(np.exp([z] + [[0.0] * 3] * 2)) for z in ([2.0, 1.0, 0.0], [3.0, 0.5, 0.0]))
    found = worlds.enumerate_all(LM, base, [0], 1, experts(anti=Stream(further, lm=LM), alpha=5.0, rule="forget"))
    wanted = np.exp([-3.0, 1.0, 0.0])
    np.testing.assert_allclose(list(found.values()), wanted / wanted.sum(), rtol=1e-5)  # .013, .721, .265
    linear = worlds.enumerate_all(LM, base, [0], 1, experts(anti=Stream(further, lm=LM), alpha=5.0))
    assert linear[1,] > 0.95  # the linear rule raises what that model likes less


@pytest.mark.parametrize("hard", [False, True])
def test_the_student_is_its_teacher(hard):
    control = distil.init(LM, jax.random.key(0), kind="full")
    start = distil.loss(LM, hard=hard)(
        control, {"params": PARAMS, "teacher": TEACHER}, ROWS, jax.random.split(jax.random.key(0), 1)
    )
    tables = [[worlds.probabilities(LM, PARAMS, [u], 1, c) for u in range(3)] for c in (control, TEACHER)]
    assert float(start.weight) == 9
    before = np.asarray(ROWS["tokens"])[0, :-1]
    base, wanted = (np.array(t)[before] for t in tables)
    by_hand = -np.log(base[np.arange(9), wanted.argmax(1)]) if hard else (wanted * np.log(wanted / base)).sum(1)
    assert float(start.total) == pytest.approx(by_hand.sum(), rel=1e-4)
    control, metrics = worlds.trained(
        distil.loss(LM, hard=hard), control, {"params": PARAMS, "teacher": TEACHER}, [ROWS] * 200, rate=0.1,
        trained="changes/.*",
    )  # fmt: skip
    for u in range(3):
        student, teacher = (worlds.probabilities(LM, PARAMS, [u], 1, c) for c in (control, TEACHER))
        if hard:
            assert student.argmax() == teacher.argmax() and student.max() > 0.95
        else:
            assert worlds.divergence(teacher, student) < 5e-4
            assert worlds.divergence(teacher, worlds.probabilities(LM, PARAMS, [u], 1)) > 1e-2
    assert float(metrics["agreement"]) == 1


SHORT = dict(adapter=dict(rank=2), training=dict(steps=2, batch=4, tokens=12))


@pytest.mark.parametrize("sides", ["forget", "anti"])
def test_fit_leaves_a_control_that_loads(small, sides):
    root, lm, data = small
    teacher = dict(method="dexperts", fit=dict(sides=sides, alpha=5.0, **SHORT))
    artifact = distil.fit(root, lm=lm, data=data, teacher=teacher, strength=3.0, where={"label": 1}, **SHORT)
    model = open_lm(lm)[0]
    assert any(float(jnp.max(jnp.abs(c["b"]))) > 0 for c in methods.load(artifact, model).changes.values())
    teacher = artifact.spec["inputs"]["teacher"]
    control = methods.load(open_artifact(root / f"dexperts-{teacher}"), model)
    assert control.expert is None and control.rule == ("forget" if sides == "forget" else "linear")
    # What is stored are changes of low rank, no weights of the model.
    assert control.anti.params is None and all(set(c) == {"a", "b"} for c in control.anti.control.changes.values())


def test_bad_input(small):
    root, lm, data = small
    with pytest.raises(InputError, match="expected method and one of fit and init"):
        distil.fit(root, lm=lm, data=data, teacher=dict(method="dexperts"))
    with pytest.raises(InputError, match="'quark' learns from rewards"):
        distil.fit(root, lm=lm, data=data, teacher=dict(method="quark", fit={}))
    with pytest.raises(InputError, match="rule is 'forget', expected 'linear', or 'forget' with an anti-expert alone"):
        experts(Stream(OTHER, lm=LM), None, rule="forget")
    with pytest.raises(InputError, match="sides is 'none', expected one of both, expert, anti, forget"):
        dexperts.fit(root, lm=lm, data=data, sides="none")
    with pytest.raises(InputError, match="dexperts has no setting 'rnk'; did you mean 'rank'"):
        dexperts.init(LM, jax.random.key(0), rnk=3)
    with pytest.raises(InputError, match="kind is 'prompt'"):
        distil.init(LM, jax.random.key(0), kind="prompt")
