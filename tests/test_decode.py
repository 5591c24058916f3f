"""The decode loop: early stop, padding, streaming, stop sequences, both layouts, prefixes, bad lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from ctg_jax import IDENTITY, Control, Prompts, Sampling, forward, generate, rng, score
from ctg_jax.controls import truncate
from ctg_jax.decode import loop
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError

GPT2 = Transformer.gpt2(vocab=23, width=16, depth=2, heads=2, context=40)
LLAMA = Transformer.llama(vocab=23, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24, context=40)
NEOX = Transformer.gpt2(
    vocab=23, width=16, depth=2, heads=2, context=40, family="gpt_neox", positions="rotary", rotary_dim=4, parallel=True
)


@functools.cache
def weights(lm):
    # Larger than the usual initialisation, so that distributions are far from flat.
    return jax.jit(lambda key: jax.tree.map(lambda x: x * 6, lm.init(key)))(jax.random.key(0))


def prompts(lengths=(2, 5, 4)):
    t = max(lengths)
    mask = jnp.arange(t)[None] >= t - jnp.asarray(lengths)[:, None]
    tokens = jax.random.randint(jax.random.key(3), (len(lengths), t), 0, 23)
    return Prompts(jnp.where(mask, tokens, 0), mask, rng.per_example(jax.random.key(1), jnp.arange(len(lengths))))


@pytest.mark.parametrize("lm", [GPT2, LLAMA, NEOX], ids=lambda lm: lm.family)
def test_cached_decoding_is_the_teacher_forced_model(lm):
    params, p = weights(lm), prompts()
    s = generate(lm, params, p, sampling=Sampling(max_new=7))
    np.testing.assert_allclose(score(lm, params, p, s.tokens), s.logp, atol=2e-5)
    greedy = generate(lm, params, p, sampling=Sampling(max_new=7, greedy=True))
    np.testing.assert_array_equal(forward(lm, params, p, greedy.tokens).argmax(-1), greedy.tokens)


@pytest.mark.parametrize("lm", [GPT2, LLAMA, NEOX], ids=lambda lm: lm.family)
def test_stacked_and_unstacked_layouts_agree(lm):
    params, p = weights(lm), prompts()
    x = lm.embed(params, p.tokens)

    def pool(h):
        return h.sum(axis=1)

    a = lm.apply(params, x, p.mask, tap=pool)
    b = lm.apply(lm.unstack(params), x, p.mask, tap=pool)
    assert a.taps.shape == (lm.depth + 2, 3, lm.width)
    # Two programs, so the compiler may order sums differently; the logits are as large as 5.
    np.testing.assert_allclose(a.logits, b.logits, atol=3e-5)
    np.testing.assert_allclose(a.taps, b.taps, atol=1e-4)
    c = Transformer(**{**lm.__dict__, "remat": True})
    np.testing.assert_allclose(c.apply(params, x, p.mask).logits, a.logits, atol=3e-5)


def test_eos_ends_a_row_and_the_loop():
    params, p = weights(GPT2), prompts()
    free = generate(GPT2, params, p, sampling=Sampling(max_new=8, greedy=True))
    eos = int(free.tokens[0, 1])
    s = generate(GPT2, params, p, sampling=Sampling(max_new=8, greedy=True, eos=(eos,), pad=22))
    first = list(np.asarray(free.tokens[0])).index(eos)
    assert s.tokens[0].tolist() == free.tokens[0, : first + 1].tolist() + [22] * (7 - first)
    assert s.mask[0].tolist() == [True] * (first + 1) + [False] * (7 - first)
    assert s.logp[0, first + 1 :].tolist() == [0.0] * (7 - first)
    every = generate(GPT2, params, p, sampling=Sampling(max_new=8, greedy=True, eos=tuple(range(23))))
    assert int(every.generated) == 1 and every.mask.sum() == 3


def test_stop_sequence_ends_a_row_after_its_last_token():
    params, p = weights(GPT2), prompts()
    free = np.asarray(generate(GPT2, params, p, sampling=Sampling(max_new=8)).tokens)
    stop = tuple(int(t) for t in free[1, 2:4])
    s = generate(GPT2, params, p, sampling=Sampling(max_new=8, stop=(stop,)))
    end = next(i for i in range(2, 9) if tuple(free[1, i - 2 : i]) == stop)
    assert s.mask[1].tolist() == [True] * end + [False] * (8 - end)
    assert s.tokens[1, :end].tolist() == free[1, :end].tolist()


def test_stream_yields_what_generate_returns():
    params, p = weights(LLAMA), prompts()
    sampling = Sampling(max_new=6, eos=(4, 7), pad=1)
    control = truncate.rules(LLAMA, top_p=0.8, repetition_penalty=1.3)
    s = generate(LLAMA, params, p, control, sampling)
    streamed = np.stack(list(loop.stream(LLAMA, params, p, control, sampling)), axis=1)
    np.testing.assert_array_equal(streamed, s.tokens[:, : int(s.generated)])


@struct.dataclass
class Memory(Control):
    """Keys and values of some other text, as a prefix."""

    k: jax.Array
    v: jax.Array

    def prefix(self, state):
        return self.k, self.v


def test_prefix_is_read_the_same_with_and_without_a_cache():
    params, p = weights(LLAMA), prompts()
    shape = (LLAMA.depth, 3, LLAMA.kv_heads, 2, LLAMA.head_dim)
    k, v = jax.random.normal(jax.random.key(5), (2, *shape))
    control = Memory(k, v)
    s = generate(LLAMA, params, p, control, Sampling(max_new=5))
    np.testing.assert_allclose(score(LLAMA, params, p, s.tokens, control), s.logp, atol=2e-5)
    assert jnp.abs(score(LLAMA, params, p, s.tokens) - s.logp).max() > 1e-2


def test_a_row_does_not_depend_on_its_batch():
    params, p = weights(GPT2), prompts()
    s = generate(GPT2, params, p, sampling=Sampling(max_new=6))
    for i, n in enumerate([2, 5, 4]):
        alone = Prompts(p.tokens[i : i + 1, 5 - n :], p.mask[i : i + 1, 5 - n :], p.keys[i : i + 1])
        np.testing.assert_array_equal(
            generate(GPT2, params, alone, sampling=Sampling(max_new=6)).tokens[0], s.tokens[i]
        )


def test_bfloat16_is_close_to_float32():
    params, p = weights(LLAMA), prompts()
    half = Transformer(**{**LLAMA.__dict__, "dtype": "bfloat16"})
    s = generate(half, params, p, sampling=Sampling(max_new=4))
    assert half.apply(params, half.embed(params, p.tokens), p.mask).logits.dtype == jnp.float32
    np.testing.assert_allclose(score(LLAMA, params, p, s.tokens), score(half, params, p, s.tokens), atol=0.5)


def test_nothing_recompiles_when_a_leaf_changes():
    params, p = weights(GPT2), prompts()
    generate(GPT2, params, p, truncate.TopP(0.5), Sampling(max_new=3))
    before = loop.loop._cache_size()
    generate(GPT2, params, p, truncate.TopP(0.7), Sampling(max_new=3))
    assert loop.loop._cache_size() == before


def test_lengths_are_checked():
    params, p = weights(GPT2), prompts()
    with pytest.raises(
        InputError, match="longest prompt has 5 tokens and max_new is 37, but the model's context is 40"
    ):
        generate(GPT2, params, p, IDENTITY, Sampling(max_new=37))
    with pytest.raises(InputError, match="max_new is 0"):
        generate(GPT2, params, p, IDENTITY, Sampling(max_new=0))
    none = jax.tree.map(lambda x: x[:0], p)
    with pytest.raises(InputError, match="at least one row"):
        generate(GPT2, params, none)
