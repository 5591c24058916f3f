"""`truncate.rules` against the processors that `transformers` makes of the same options, for all pairs of options.

Both are compared as distributions. Ties differ by design: where tokens have equal logits, top-p keeps all or none of
them here, and `transformers` those that its sort put first (top-k, min-p and typical keep ties in both). So the rows
are random floats without ties, and ties are a test of their own.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax.control import edit_logits
from ctg_jax.controls import truncate
from ctg_jax.support import removed
from ctg_jax.types import Prompts

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, EOS = 12, 5
LM = worlds.tiny(vocab=V)
READ = np.array([[1, 2, 3, 1, 2], [4, 4, 6, 7, 4], [8, 9, 10, 8, 9], [5, 0, 1, 5, 0]])
OPTIONS = {  # name here -> (value, the options of `transformers`)
    "repetition_penalty": (1.7, {"repetition_penalty": 1.7}),
    "no_repeat_ngram": (2, {"no_repeat_ngram_size": 2}),
    "banned": ((2, 7), {"bad_words_ids": [[2], [7]]}),
    "min_length": (3, {"min_new_tokens": 3}),
    "temperature": (0.6, {"temperature": 0.6}),
    "top_k": (4, {"top_k": 4}),
    "top_p": (0.7, {"top_p": 0.7}),
    "min_p": (0.15, {"min_p": 0.15}),
    "typical_p": (0.6, {"typical_p": 0.6}),
}


@pytest.fixture(scope="module")
def model():
    config = transformers.GPT2Config(vocab_size=V, n_embd=4, n_layer=1, n_head=1, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def theirs(model, options, z, read):
    settings = dict(do_sample=True, top_k=0, eos_token_id=EOS, pad_token_id=EOS) | options
    config = transformers.GenerationConfig(**settings)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
    ids = torch.tensor(read)
    processors = model._get_logits_processor(config, input_ids_seq_length=ids.shape[1], device="cpu", model_kwargs={})
    return torch.softmax(processors(ids, torch.tensor(np.asarray(z))), dim=-1).numpy()


def ours(options, z, read):
    if "min_length" in options:
        options = options | {"eos": (EOS,)}
    control = truncate.rules(LM, **options)
    tokens, mask = jnp.asarray(read, jnp.int32), jnp.ones(read.shape, bool)
    prompts = Prompts(tokens, mask, jax.random.split(jax.random.key(0), len(read)))
    found, _ = edit_logits(control, jnp.asarray(z)[:, None], None, tokens, mask, control.init(prompts, 16))
    return np.asarray(jax.nn.softmax(found[:, 0], axis=-1))


@pytest.mark.parametrize("names", [*itertools.combinations(OPTIONS, 2), tuple(OPTIONS)], ids="+".join)
def test_every_pair_of_options_is_that_of_transformers(model, names):
    z = 2 * np.random.default_rng(len("+".join(names))).normal(size=(4, V)).astype(np.float32)
    mine = {name: OPTIONS[name][0] for name in names}
    yours = {key: value for name in names for key, value in OPTIONS[name][1].items()}
    np.testing.assert_allclose(ours(mine, z, READ), theirs(model, yours, z, READ), atol=2e-6)


def test_typical_acts_on_what_min_p_left(model):
    """Entropy of (.5, .2, .2) / .9 is .995 nats; the distances to it are .407, .509, .509: token 0 is the most typical.
    Without min-p before it, entropy 1.221 is nearest to -log .2."""
    z = np.log(np.array([[0.5, 0.2, 0.2, 0.1] + [1e-9] * 8], np.float32))
    found = ours(dict(typical_p=0.3, min_p=0.3), z, READ[:1])
    np.testing.assert_allclose(found[0, :4], [1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found, theirs(model, dict(typical_p=0.3, min_p=0.3), z, READ[:1]), atol=1e-6)
    alone = ours(dict(typical_p=0.3), z, READ[:1])
    np.testing.assert_allclose(alone[0, :4], [0, 0.5, 0.5, 0], atol=1e-6)


def test_tied_tokens_are_kept_together_where_transformers_keeps_some(model):
    """The nucleus of mass .5 ends among three tokens of .2 each: here all stay, there two are dropped."""
    z = np.log(np.array([[0.4, 0.2, 0.2, 0.2] + [1e-9] * 8], np.float32))
    np.testing.assert_allclose(ours(dict(top_p=0.5), z, READ[:1])[0, :4], [0.4, 0.2, 0.2, 0.2], atol=1e-6)
    assert sorted(theirs(model, dict(top_p=0.5), z, READ[:1])[0] > 1e-6)[-4:] == [False, False, True, True]
    for options in (dict(top_k=2), dict(min_p=0.4), dict(typical_p=0.5)):
        np.testing.assert_allclose(ours(options, z, READ[:1]), theirs(model, options, z, READ[:1]), atol=1e-6)


def test_what_an_option_removes_is_removed_and_not_only_unlikely():
    control = truncate.rules(LM, banned=(3,), top_k=2)
    z = jnp.arange(V, dtype=jnp.float32)[None, None]
    found, _ = edit_logits(control, z, None, None, None, control.init(None, 16))
    assert np.flatnonzero(~np.asarray(removed(found[0, 0]))).tolist() == [10, 11]
