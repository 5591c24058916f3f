"""RE-Control: steps by hand, the closed form of a linear value, a value that learns, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.decode import loop
from ctg_jax.methods import recontrol, steer
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError

WORLD = worlds.Bigram()
A, B = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]
TABLE = worlds.table([A, B, [0.3, 0.3, 0.4]])


def linear(w, rate, steps):
    """V(h) = w·h, as two hidden units far from their kinks."""
    control = recontrol.init(WORLD, jax.random.key(0), width=2, steps=steps, rate=rate)
    w = jnp.asarray(w, jnp.float32)
    value = {"in": jnp.stack([w, -w]), "bias": jnp.array([0.0, 0.0]), "out": jnp.array([1.0, -1.0])}
    return control.replace(value=value | {"offset": jnp.zeros(())})


def test_a_linear_value_is_a_push_of_rate_times_steps():
    """From the state of token 0 with w = e₁ and η n = .5: z' = log a + .5 log b, worked out by hand."""
    control = linear([0, 1, 0], 0.25, 2)
    control = control.replace(value=control.value | {"bias": jnp.array([9.0, 9.0])})
    found = jax.nn.softmax(loop.forward(WORLD, TABLE, worlds.prompts([[0]]), jnp.array([[0]]), control))[0, 0]
    # ∇V = w + w here, since both units are open: half the rate gives the push of .5
    wanted = np.array(A) * np.array(B) ** 1.0
    np.testing.assert_allclose(found, wanted / wanted.sum(), rtol=1e-4)
    one = control.replace(rate=jnp.float32(0.125))
    found = jax.nn.softmax(loop.forward(WORLD, TABLE, worlds.prompts([[0]]), jnp.array([[0]]), one))[0, 0]
    half = np.array(A) * np.array(B) ** 0.5
    np.testing.assert_allclose(found, half / half.sum(), rtol=1e-4)
    push = steer.Steer(jnp.zeros((3, 3)).at[2, 1].set(0.5), jnp.ones(3), jnp.ones(()))
    same = jax.nn.softmax(loop.forward(WORLD, TABLE, worlds.prompts([[0]]), jnp.array([[0]]), push))[0, 0]
    np.testing.assert_allclose(found, same, rtol=1e-5)


def test_two_steps_by_hand_over_a_kink():
    """V(h) = max(h₀ − 1, 0): no slope below 1, and from .9 + … nothing; from 1.5 two steps of .2 give 1.9."""
    value = {"in": jnp.array([[1.0, 0, 0]]), "bias": jnp.array([-1.0]), "out": jnp.ones(1), "offset": jnp.zeros(())}
    h = jnp.array([[0.9, 1.0, 2.0], [1.5, 0.0, 0.0]])
    np.testing.assert_allclose(recontrol.values(value, h), [0.0, 0.5])
    np.testing.assert_allclose(recontrol.ascended(value, h, jnp.float32(0.2), 2), [[0.9, 1, 2], [1.9, 0, 0]], rtol=1e-6)


def test_a_value_learns_the_label_of_a_state():
    """Texts of token 1 are of label 1, texts of token 2 of label 0: V is the logit of the label of each state."""
    control = recontrol.init(WORLD, jax.random.key(1), width=8)
    batch = {"tokens": jnp.array([[1, 1], [2, 2]]), "mask": jnp.ones((2, 2), bool), "ids": jnp.arange(2),
             "goal": jnp.array([1.0, 0.0]), "importance": jnp.ones(2)}  # fmt: skip
    loss = recontrol.loss(WORLD)
    learned, _ = worlds.trained(loss, control, {"params": TABLE}, [batch] * 150, rate=5e-2, trained="value/.*")
    v = recontrol.values(learned.value, jnp.eye(3))
    assert float(v[1]) > 2 and float(v[2]) < -2
    weighed = batch | {"mask": jnp.array([[True, True], [True, False]])}
    assert float(loss(control, {"params": TABLE}, weighed, None).weight) == 3


def test_fit(small):
    root, lm, data = small
    tiny = dict(value=dict(width=4, steps=2, rate=0.1), training=dict(steps=2, batch=4, tokens=16, rate=1e-2))
    control = methods.load(recontrol.fit(root, lm=lm, data=data, **tiny), open_lm(lm)[0])
    assert control.steps == 2 and float(jnp.abs(control.value["out"]).max()) > 0 and control.site == 2
    with pytest.raises(InputError, match="width is 0 and steps 30"):
        recontrol.init(WORLD, jax.random.key(0), width=0)
    with pytest.raises(InputError, match="has no setting 'widht'"):
        recontrol.fit(root, lm=lm, data=data, value=dict(widht=3))


def test_the_widths_of_the_paper_on_paper():
    """`:paper`, with two of its layers: shapes alone, no array is made."""
    lm = Transformer.llama(vocab=128256, width=4096, depth=2, heads=32, kv_heads=8, mlp_width=14336, context=4096)
    out = worlds.written_on_paper(lm, lambda key: recontrol.init(lm, key))
    assert out.tokens.shape == (1, 2)
