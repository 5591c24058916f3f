"""A model with more rows than its tokenizer has tokens: the rest is never written and has no probability anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import evaluation
from ctg_jax.control import IDENTITY
from ctg_jax.controls import constraints, truncate
from ctg_jax.data.tokenizer import train_bpe
from ctg_jax.decode import strategies
from ctg_jax.methods import corrsynth, diffusion_lm, mdlm
from ctg_jax.stages import sampling
from ctg_jax.types import InputError, Sampling

TOKENIZER = train_bpe(["the soup was good", "the food was bad"] * 4, 270)
LM = worlds.Bigram(vocab=TOKENIZER.vocab + 40, context=64)
PARAMS = jax.jit(LM.init)(jax.random.key(0))
OPTIONS = sampling.Options(n=64, max_new=4, batch=64)
KNOWN = TOKENIZER.known(LM.vocab)


def test_the_tokenizer_tells_which_ids_are_tokens():
    assert KNOWN.sum() == TOKENIZER.vocab and KNOWN[: TOKENIZER.vocab].all()
    assert TOKENIZER.known(5).tolist() == [True] * 5


@pytest.mark.parametrize("control", [IDENTITY, truncate.Temperature(50.0)], ids=["plain", "flat"])
def test_completions_hold_tokens_only_and_their_probability_is_that_of_the_scorer(control):
    rows = [row for part in sampling.complete(LM, PARAMS, TOKENIZER, ["the soup"], control, OPTIONS) for row in part]
    assert max(max(row["tokens"], default=0) for row in rows) < TOKENIZER.vocab
    scorer = evaluation.LMScorer(LM, PARAMS, TOKENIZER, batch=64, control=control)
    nats, _ = scorer.ids(TOKENIZER.encode_prompts(["the soup"] * len(rows)), [row["tokens"] for row in rows])
    np.testing.assert_allclose(-nats, [row["logp"] for row in rows], atol=1e-3)


def test_a_model_without_other_rows_is_left_alone():
    assert constraints.only(TOKENIZER.known(TOKENIZER.vocab), IDENTITY) is IDENTITY


SIZES = dict(width=8, depth=1, heads=2, length=12)


@pytest.mark.parametrize(
    "method, sizes", [(mdlm, SIZES), (diffusion_lm, SIZES | {"dim": 4}), (corrsynth, {"group": 4})]
)
def test_what_replaces_the_decode_loop_writes_tokens_only(method, sizes):
    control = method.init(LM, jax.random.key(1), **sizes)
    prompts = worlds.prompts([[1, 2, 3]] * 32)
    plain = strategies.run(LM, PARAMS, prompts, control, Sampling(max_new=6))
    out = strategies.run(LM, PARAMS, prompts, constraints.only(KNOWN, control), Sampling(max_new=6))
    assert int(plain.tokens.max()) >= TOKENIZER.vocab > int(out.tokens.max())


@pytest.mark.parametrize("method", [mdlm, diffusion_lm])
def test_models_that_write_by_themselves_stop_at_numbers_that_are_none(method):
    sizes = SIZES | ({"dim": 4} if method is diffusion_lm else {})
    control = method.init(LM, jax.random.key(1), **sizes)
    broken = control.replace(params=jax.tree.map(lambda x: x * jnp.nan, control.params))
    with pytest.raises(InputError, match="row 0, new token 1, are not finite"):
        strategies.run(LM, PARAMS, worlds.prompts([[1, 2, 3]]), broken, Sampling(max_new=6))
