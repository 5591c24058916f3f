"""Strategies: one for each control, cut as the decode loop cuts, and the same rows however they are split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain
from ctg_jax.controls import truncate
from ctg_jax.decode import loop, strategies
from ctg_jax.mesh import layout
from ctg_jax.methods import diffusion_lm, mdlm
from ctg_jax.types import InputError, Samples, Sampling

LM = worlds.tiny(depth=1)
ROWS = [[1, 2], [3], [4, 1, 2], [2, 2]]
SAMPLING = Sampling(max_new=5, eos=(0,), pad=9)


@pytest.fixture(scope="module")
def params():
    return LM.init(jax.random.key(0))


def masked():
    sizes = dict(width=8, depth=1, heads=2, length=12, classes=2)
    return mdlm.init(LM, jax.random.key(1), **sizes).replace(scale=jnp.ones(()))


def words():
    sizes = dict(dim=4, width=8, depth=2, heads=2, length=12, reader_width=8, reader_depth=1, fields={"label": 2})
    return diffusion_lm.init(LM, jax.random.key(1), target={"label": 1, "tags": ["noun"]}, calls=3, **sizes)


def test_a_control_names_its_strategy():
    assert strategies.of(truncate.TopP(0.9)) is strategies.PLAIN
    assert strategies.of(Chain((truncate.TopP(0.9),))) is strategies.PLAIN
    assert isinstance(strategies.of(masked()), mdlm.MaskedDiffusion)
    assert not strategies.of(words()).likelihood and strategies.PLAIN.likelihood
    for chain in (Chain((masked(), truncate.TopP(0.9))), Chain((Chain((words(),)),))):
        with pytest.raises(InputError, match="no other control and no filter can act on it"):
            strategies.of(chain)


@pytest.mark.parametrize("make", [lambda: truncate.rules(LM, top_p=0.9), masked, words], ids=["plain", "mdlm", "words"])
def test_rows_are_the_same_however_they_are_split(make, params):
    """On four devices and on two with a mesh; today's way in a program that splits rows must not read them on the
    host."""
    control, prompts = make(), worlds.prompts(ROWS)
    alone = strategies.run(LM, params, prompts, control, SAMPLING)
    assert alone.tokens.shape == (4, 5) and int(alone.generated) > 0
    for devices in (jax.devices()[:2], jax.devices()[:3]):  # 3 do not divide the rows
        split = strategies.run(LM, params, prompts, control, SAMPLING, devices)
        assert split.tokens.tolist() == alone.tokens.tolist() and split.mask.tolist() == alone.mask.tolist()
        np.testing.assert_allclose(split.logp, alone.logp, atol=1e-5)
    with layout.laid_out(layout.read("data=2")):
        assert strategies.run(LM, params, prompts, control, SAMPLING).tokens.tolist() == alone.tokens.tolist()
    streamed = np.stack(list(strategies.stream(LM, params, prompts, control, SAMPLING)), axis=1)
    assert streamed.tolist() == alone.tokens[:, : streamed.shape[1]].tolist()


def test_strengths_for_each_row_stay_with_their_rows(params):
    control, prompts = methods.get("steer").example(LM, jax.random.key(3)), worlds.prompts(ROWS)
    control = methods.with_strength(control, jnp.asarray([0.0, 5.0, -5.0, 20.0]))
    alone = strategies.run(LM, params, prompts, control, SAMPLING)
    split = strategies.run(LM, params, prompts, control, SAMPLING, jax.devices()[:4])
    assert split.tokens.tolist() == alone.tokens.tolist()


def test_whole_rows_are_cut_as_the_decode_loop_cuts_them():
    rows = jnp.asarray([[1, 2, 3, 1, 2], [4, 0, 1, 1, 1], [1, 1, 2, 5, 5], [3, 3, 3, 3, 3], [2, 1, 1, 1, 2]])
    sampling = dataclasses.replace(SAMPLING, stop=((1, 2), (3, 3, 3)))
    tokens, mask = strategies.cut(rows, sampling)
    assert mask.sum(1).tolist() == [2, 2, 3, 3, 5]
    assert tokens.tolist() == [[1, 2, 9, 9, 9], [4, 0, 9, 9, 9], [1, 1, 2, 9, 9], [3, 3, 3, 9, 9], [2, 1, 1, 1, 2]]
    for row, kept in zip(rows, mask.sum(1)):
        d = loop.Decoding(0, None, None, None, None, row[None], None, None)
        ends = [bool(loop.ended(d.replace(t=t + 1), row[t : t + 1], sampling)[0]) for t in range(5)]
        assert (ends.index(True) + 1 if any(ends) else 5) == int(kept)


def test_a_strategy_of_ones_own_is_run_like_any_other(params):
    """Twenty lines: no list to edit, and nothing that asks what kind of control it is."""

    @dataclasses.dataclass(frozen=True)
    class Echo(strategies.Strategy):
        def check(self, lm, prompts, control, sampling):
            if sampling.max_new > 2:
                raise InputError("an echo has two tokens")

        def __call__(self, lm, params, prompts, control, sampling):
            text = prompts.tokens[:, -sampling.max_new :]
            return Samples(text, jnp.ones(text.shape, bool), jnp.zeros(text.shape), jnp.int32(1))

    class Repeat:
        strategy = Echo()

    jax.tree_util.register_static(Repeat)
    prompts = worlds.prompts([[1, 2], [3, 4]])
    out = strategies.run(LM, params, prompts, Repeat(), Sampling(max_new=2), jax.devices()[:2])
    assert out.tokens.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(InputError, match="an echo has two tokens"):
        strategies.run(LM, params, prompts, Repeat(), Sampling(max_new=3))
