"""Streams that differ by low-rank changes are read in one pass, and give what they give apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax.controls.copies import joined
from ctg_jax.controls.delta import full, lora, row_delta
from ctg_jax.controls.experts import experts
from ctg_jax.controls.streams import Stream
from ctg_jax.controls.vectors import SoftPrompt
from ctg_jax.decode import loop
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError, Sampling

LM = worlds.tiny(vocab=7, depth=1)
PARAMS = worlds.lively(LM)
SHAPES = jax.eval_shape(LM.init, jax.random.key(0))


def tuned(seed, rank=2, scale=1.0, **more):
    delta = lora(jax.random.key(seed), SHAPES, rank)
    moved = {p: c | {"b": jax.random.normal(jax.random.key(seed), c["b"].shape)} for p, c in delta.changes.items()}
    return Stream(control=delta.replace(changes=moved, scale=jnp.float32(scale)), lm=LM, **more)


def test_two_experts_are_one_pass_and_give_what_they_give_apart():
    """Each at its own scale, for rows of several lengths, while decoding and scoring. Experts of different ranks are
    not joined, so the same experts are read apart where one of them is padded with a column of zeros."""
    one, other = tuned(1, scale=0.7), tuned(2, scale=1.3)
    wider = {p: {"a": jnp.pad(c["a"], ((0, 0), (0, 1), (0, 0))), "b": jnp.pad(c["b"], ((0, 0), (0, 0), (0, 1)))}
             for p, c in other.control.changes.items()}  # fmt: skip
    together = experts(one, other, alpha=1.5)
    apart = experts(one, other.replace(control=other.control.replace(changes=wider)), alpha=1.5)
    bound = together.bind(PARAMS, PARAMS)
    assert bound.paired and bound.expert.copies == 2 and not apart.bind(PARAMS, PARAMS).paired
    prompts = worlds.prompts([[1, 2, 3], [4], [5, 6]])
    samples = loop.generate(LM, PARAMS, prompts, together, Sampling(max_new=4))
    again = loop.generate(LM, PARAMS, prompts, apart, Sampling(max_new=4))
    assert np.array_equal(samples.tokens, again.tokens)
    np.testing.assert_allclose(samples.logp, again.logp, atol=1e-4)
    scored = loop.score(LM, PARAMS, prompts, samples.tokens, together)
    np.testing.assert_allclose(scored, samples.logp, atol=1e-4)
    assert float(jnp.max(jnp.abs(scored - loop.score(LM, PARAMS, prompts, samples.tokens)))) > 0.1


@pytest.mark.parametrize(
    "other",
    [
        tuned(2, rank=3),
        tuned(2, of="current"),
        tuned(2, own="before"),
        Stream(control=full(SHAPES), lm=LM),
        Stream(control=SoftPrompt(jnp.zeros((2, LM.width))), lm=LM),
        Stream(PARAMS, tuned(2).control, lm=LM),
        tuned(2).bind(PARAMS, PARAMS),
    ],
    ids=["rank", "of", "own", "dense", "prompt", "another model", "bound"],
)
def test_streams_of_another_kind_stay_apart_and_in_order(other):
    first, last = tuned(1), tuned(3)
    found = joined((first, tuned(4), other, last))
    assert [s.copies for s in found] == [2, None, None] and found[1] is other and found[2] is last
    assert joined((first, other)) == (first, other) and joined(()) == ()


@pytest.mark.parametrize("sizes", [dict(depth=2), dict(width=24)], ids=["depth", "width"])
def test_experts_of_another_model_are_refused_in_a_sentence(sizes):
    """As a single change of weights is; so is a bank of changes, of which each row takes one."""
    other = Transformer.gpt2(**dict(vocab=7, width=16, depth=1, heads=2, context=48) | sizes)
    control, prompts = experts(tuned(1), tuned(2)), worlds.prompts([[1, 2, 3]])
    streams = {name: stream.replace(lm=other) for name, stream in control.sides().items()}
    with pytest.raises(InputError, match="fitted on another model"):
        loop.generate(other, worlds.lively(other), prompts, control.replace(**streams), Sampling(max_new=2))
    chosen = worlds.prompts([[1, 2, 3]], cond={"entry": jnp.zeros(1, jnp.int32)})
    with pytest.raises(InputError, match="fitted on another model"):
        loop.generate(other, worlds.lively(other), chosen, row_delta([tuned(1).control]), Sampling(max_new=2))
