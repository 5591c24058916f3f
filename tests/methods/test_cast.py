"""Conditional steering: the gate by hand, rows that it leaves alone, a fit whose gate opens for the right texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.decode import loop
from ctg_jax.methods import cast
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError
from tests.methods.conftest import BAD, GOOD

WORLD = worlds.Bigram()
TABLE = worlds.table([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])


def by_hand(pool):
    """In the bigram world a state is a one-hot: the gate opens where the pooled state has at least ½ of token 2."""
    control = cast.init(WORLD, jax.random.key(0), site=1, pool=pool)
    inner = control.inner.replace(vector=jnp.zeros((3, 3)).at[2, 1].set(1.0))
    return control.replace(inner=inner, vector=jnp.array([0.0, 0.0, 2.0]), bias=jnp.float32(-0.99))


@pytest.mark.parametrize("pool, opened", [("mean", [False, True, True]), ("last", [False, True, False])])
def test_the_gate_by_hand(pool, opened):
    """Prompts 0 1, 1 2 and 2 0: the share of token 2 is 0, ½, ½, and its share of the last token 0, 1, 0."""
    control, prompts = by_hand(pool), worlds.prompts([[0, 1], [1, 2], [2, 0]])
    assert control.bind(TABLE, TABLE).init(prompts, 4)[0].tolist() == opened
    text = jnp.array([[0, 1], [1, 0], [2, 2]])
    base, found = (loop.forward(WORLD, TABLE, prompts, text, c) for c in (cast.neutral(control), control))
    moved = np.abs(np.asarray(found - base)).max(axis=(1, 2)) > 0.1
    assert moved.tolist() == opened  # the others are left exactly as they are
    np.testing.assert_array_equal(found[~moved], base[~moved])
    wanted = loop.forward(WORLD, TABLE, prompts, text, control.inner)
    np.testing.assert_allclose(found[moved], wanted[moved], rtol=1e-6)


def test_the_threshold_is_a_probability():
    control, prompts = by_hand("mean"), worlds.prompts([[1, 2]])  # σ(.01) = .5025
    for least, opened in ((0.5, True), (0.51, False)):
        bound = control.replace(least=jnp.float32(least)).bind(TABLE, TABLE)
        assert bound.init(prompts, 4)[0].tolist() == [opened]


def test_fit(small):
    root, lm, data = small
    fitted = cast.fit(root, lm=lm, data=data, field="label", values=(0,), sites=[1], tokens=16, gate=dict(site=1))
    (row,) = fitted.metrics()
    assert row["texts"] == 12 and row["train_accuracy"] > 0.8
    model, params, tokenizer = open_lm(lm)
    control = methods.load(fitted, model).bind(params, params)
    prompts = worlds.prompts([tokenizer.begun(ids) for ids in tokenizer.encode([*BAD, *GOOD])])
    opened = np.asarray(control.init(prompts, 20)[0])
    assert opened[:6].mean() > opened[6:].mean() + 0.5
    assert float(jnp.abs(control.inner.vector).max()) > 0


def test_bad_input(small):
    root, lm, data = small
    with pytest.raises(InputError, match="pool is 'max'"):
        cast.init(WORLD, jax.random.key(0), pool="max")
    with pytest.raises(InputError, match="least is 1, expected a probability"):
        cast.init(WORLD, jax.random.key(0), least=1)
    with pytest.raises(InputError, match="field is 'mood': 0 records have one of the values"):
        cast.fit(root, lm=lm, data=data, field="mood", tokens=16)
    with pytest.raises(InputError, match=r"call Control\.bind first"):
        by_hand("mean").init(worlds.prompts([[0]]), 2)


def test_the_widths_of_the_paper_on_paper():
    """`:paper`, with two of its layers: shapes alone, no array is made."""
    lm = Transformer.llama(vocab=151936, width=2048, depth=2, heads=16, kv_heads=16, mlp_width=5504, context=4096)
    out = worlds.written_on_paper(lm, lambda key: cast.init(lm, key, site=1))
    assert out.tokens.shape == (1, 2)
