"""Rows that are too long for what reads them are refused, counting what controls add; positions are never clamped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from laws import worlds

from ctg_jax import IDENTITY, Control, Sampling, generate
from ctg_jax.control import Chain
from ctg_jax.controls.codes import coded
from ctg_jax.controls.streams import Stream
from ctg_jax.controls.truncate import TopP
from ctg_jax.controls.vectors import SoftPrompt, joined, soft_prompt
from ctg_jax.decode import loop, reading
from ctg_jax.evaluation import LMScorer, kl_to_base
from ctg_jax.learn import activations, latent_prompt, losses, pool
from ctg_jax.learn.pretrain import pretrain
from ctg_jax.learn.vector_search import Search
from ctg_jax.methods import dexperts, finetune, latent_steer, mdlm
from ctg_jax.models import lengths, masked
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import stage
from ctg_jax.stages import sampling, sources
from ctg_jax.types import InputError

LM = Transformer.gpt2(vocab=20, width=16, depth=1, heads=2, context=16)
PARAMS = jax.jit(LM.init)(jax.random.key(0))
SOFT = SoftPrompt(soft_prompt(jax.random.key(1), 8, LM.width))
ROW = list(range(1, 9))


def ask(*rows):
    return worlds.prompts([list(row) for row in rows or (ROW,)])


def made(n, batch=1):
    return jnp.ones((batch, n), jnp.int32)


def test_what_controls_add_counts_and_the_last_token_takes_no_position():
    with pytest.raises(
        InputError, match="has 8 tokens and max_new is 8, but the model's context is 16, of which controls take 8"
    ):
        generate(LM, PARAMS, ask(), SOFT, Sampling(max_new=8))
    with pytest.raises(InputError, match="of which controls take 8"):
        next(loop.stream(LM, PARAMS, ask(), Chain((TopP(0.9), SOFT)), Sampling(max_new=2)))
    out = generate(LM, PARAMS, ask(), SOFT, Sampling(max_new=1))
    np.testing.assert_allclose(loop.score(LM, PARAMS, ask(), out.tokens, SOFT), out.logp, atol=1e-5)
    most = generate(LM, PARAMS, ask(), sampling=Sampling(max_new=9))
    np.testing.assert_allclose(loop.score(LM, PARAMS, ask(), most.tokens), most.logp, atol=1e-5)
    with pytest.raises(InputError, match="max_new is 10, but the model's context is 16:"):
        loop.begin(LM, PARAMS, ask(), IDENTITY, Sampling(max_new=10))


@pytest.mark.parametrize("read", [loop.forward, reading.read, loop.score, kl_to_base])
def test_whatever_reads_a_completion_refuses_one_that_is_too_long(read):
    more = (IDENTITY,) if read is kl_to_base else ()
    with pytest.raises(InputError, match="has 1 tokens and the completion's length is 47, but the model's context is"):
        read(LM, PARAMS, ask([1]), made(47), *more)
    with pytest.raises(InputError, match="of which controls take 8"):
        read(LM, PARAMS, ask([1]), made(9), SOFT)
    with pytest.raises(InputError, match="of which controls take 8"):
        jax.jit(lambda p: read(LM, p, ask([1]), made(9), SOFT))(PARAMS)
    jax.eval_shape(lambda p: read(LM, p, ask([1]), made(8), SOFT), PARAMS)


def test_padding_takes_no_room_where_it_is_known():
    rows, tail = ask([1] * 12, [1]), made(12, 2)
    written = jnp.arange(12)[None] < jnp.array([[3], [12]])
    logp = loop.score(LM, PARAMS, rows, tail, written=written)
    assert bool(jnp.all((logp == 0) == ~written))
    np.testing.assert_allclose(logp[0, :3], loop.score(LM, PARAMS, ask([1] * 12), tail[:1, :3])[0], atol=1e-5)
    with pytest.raises(InputError, match="has 12 tokens and the completion's length is 12"):
        loop.score(LM, PARAMS, rows, tail)
    with pytest.raises(InputError, match="has 12 tokens and the completion's length is 6"):
        loop.score(LM, PARAMS, rows, tail, written=written.at[0, :6].set(True))


def test_every_control_that_adds_tokens_counts_them():
    net = dict(width=8, depth=1, heads=2, pseudo_tokens=2, spread=2)
    soft = latent_prompt.init(LM, jax.random.key(0), 4, **net, length=5, kind="frozen")
    delta = finetune.example(LM, jax.random.key(0))
    code = coded(jax.random.key(0), delta, LM.width, 3)
    many = SoftPrompt(soft_prompt(jax.random.key(1), 3, LM.width, choices=4), choice="label")
    for control, count in ((soft, 5), (code, 1), (many, 3), (SOFT, 8), (Chain((SOFT, Chain((code,)))), 9)):
        assert control.added() == count
        assert lengths.room(LM, control)[0] == 16 - count
    memory = latent_steer.init(LM, jax.random.key(0), site="memory", slots=6)
    assert lengths.room(LM, memory)[0] == 16  # a prefix takes slots of the cache and no positions
    out = generate(LM, PARAMS, ask(), memory, Sampling(max_new=9))
    np.testing.assert_allclose(loop.score(LM, PARAMS, ask(), out.tokens, memory), out.logp, atol=1e-5)


def test_a_control_that_does_not_tell_what_it_adds_is_refused():
    @struct.dataclass
    class Silent(Control):
        def prompt(self, x, mask, state):
            return joined(x, mask, jnp.zeros((len(x), 2, x.shape[2])))

    with pytest.raises(InputError, match=r"Silent\.prompt adds 2 tokens and its `added` tells 0"):
        generate(LM, PARAMS, ask(), Silent(), Sampling(max_new=2))


def test_models_that_read_along_have_contexts_of_their_own():
    small = dataclasses.replace(LM, context=8)
    stream = Stream(small.init(jax.random.key(2)), lm=small)
    amateur = dexperts.experts(anti=stream)
    for control in (dexperts.experts(stream), amateur, Chain((TopP(0.9), amateur))):
        with pytest.raises(InputError, match=r"has 4 tokens and max_new is 6, but the (expert|anti)'s context is 8:"):
            generate(LM, PARAMS, ask([1] * 4), control, Sampling(max_new=6))
    told = dexperts.experts(Stream(control=SoftPrompt(jnp.zeros((8, LM.width))), lm=LM))
    with pytest.raises(InputError, match="the expert's context is 16, of which controls take 8"):
        loop.forward(LM, PARAMS, ask([1] * 4), made(6), told)
    nested = dexperts.experts(Stream(control=amateur, lm=LM))
    with pytest.raises(InputError, match="the anti's context is 8"):
        generate(LM, PARAMS, ask([1] * 4), nested, Sampling(max_new=6))


def test_training_refuses_rows_that_are_too_long():
    def batch(t):
        return {"tokens": jnp.ones((2, t), jnp.int32), "mask": jnp.ones((2, t), bool), "ids": jnp.arange(2)}

    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(InputError, match="rows of training have 18 tokens, but the model's context is 16:"):
        jax.eval_shape(losses.lm_loss(LM), PARAMS, None, batch(18), keys)
    jax.eval_shape(losses.lm_loss(LM), PARAMS, None, batch(17), keys)
    learn, frozen = losses.control_loss(LM, kl_weight=0.1), {"params": PARAMS}
    with pytest.raises(InputError, match=r"rows of training have 10 tokens, .* of which controls take 8"):
        jax.eval_shape(learn, SOFT, frozen, batch(10), keys)
    jax.eval_shape(learn, SOFT, frozen, batch(9), keys)
    own = worlds.written(ROW, np.ones((2, 9), np.int32))
    with pytest.raises(InputError, match="of which controls take 8"):
        jax.eval_shape(lambda c: pool.read(LM, PARAMS, own, keys, c), SOFT)
    with pytest.raises(InputError, match="the model's context is 16"):
        sentences = [([1] * 18, 1)]
        latent_steer.find(LM, PARAMS, latent_steer.init(LM, keys[0]), sentences, np.zeros((1, 16)), Search())


def test_networks_without_a_cache_refuse_longer_rows():
    control = mdlm.init(LM, jax.random.key(0), width=8, depth=1, heads=2, length=6, classes=2)
    rows = jnp.zeros((2, 7), jnp.int32)
    with pytest.raises(InputError, match="rows have 7 tokens, but the model's context is 6"):
        masked.denoise(control.net, control.params, rows)
    with pytest.raises(InputError, match="rows have 7 tokens, but the model's context is 6"):
        masked.classify(control.net, control.params, control.guide, control.net.embed(control.params, rows))
    with pytest.raises(InputError, match="rows have 7 tokens, but the model's context is 6"):
        mdlm.infill(control, rows, rows == 1, jax.random.split(jax.random.key(0), 2))


class Letters:
    """A tokenizer of letters: the n-th letter is token n."""

    bos = eos = pad = start = None
    adds_bos, vocab, rows, ends = False, 20, 20, ()

    def encode(self, texts):
        return [[ord(c) - 96 for c in text if c != " "] for text in texts]

    encode_prompts = encode

    def encode_after(self, prompts, texts):
        return self.encode(texts)

    def begun(self, ids):
        return list(ids)

    def before_end(self, ids):
        return list(ids)

    def known(self, vocab):
        return np.ones(vocab, bool)

    def decode_after(self, prompts, rows):
        return ["".join(chr(96 + int(t)) for t in row) for row in rows]


def test_pipelines_count_what_controls_add():
    with pytest.raises(InputError, match=r"prompt 2 has 4 tokens and max_new is 6, .* of which controls take 8"):
        next(sampling.complete(LM, PARAMS, Letters(), ["a", "abcd"], SOFT, sampling.Options(max_new=6)))
    (rows,) = sampling.complete(LM, PARAMS, Letters(), ["a", "abcd"], SOFT, sampling.Options(max_new=5))
    assert [len(r["tokens"]) for r in rows] == [5, 5]
    with pytest.raises(InputError, match="A text has 17 tokens, but the model's context is 16"):
        next(activations.batches(LM, Letters(), ["a", "a" * 17], 2, 64))
    tokens, *_ = next(activations.batches(LM, Letters(), ["a", "a" * 16], 2, 64))
    assert tokens.shape == (2, 64)


def test_a_scorer_makes_room_for_what_its_control_adds():
    plain, soft = (LMScorer(LM, PARAMS, Letters(), batch=2, control=c) for c in (IDENTITY, SOFT))
    with pytest.raises(InputError, match="text 0 has 8 tokens; lm reads at most 7 after a prompt"):
        soft(["a"], ["b" * 8])
    for scorer, kept in ((plain, 12), (soft, 4)):  # what is left of the prompt beside a text of four
        long, cut = scorer(["abcdefghijklmnop"], ["bcde"])[0], scorer(["abcdefghijklmnop"[-kept:]], ["bcde"])[0]
        assert long == cut
    pairs = [("abcdefghijklm", "b"), ("a", "abcdefghijklm")]  # each row fits, and the batch would not without its mask
    apart = [plain([prompt], [text])[0][0] for prompt, text in pairs]
    assert plain(*zip(*pairs))[0] == pytest.approx(apart, abs=1e-4)


def test_pretraining_refuses_rows_longer_than_its_context(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "the soup was good"}\n' * 4)
    data = stage(tmp_path, sources.load_data, {"source": f"jsonl:{tmp_path / 'texts.jsonl'}"})
    with pytest.raises(InputError, match="rows of training have 64 tokens, but the model's context is 32"):
        settings = dict(vocab=260, width=8, depth=1, heads=1, context=32, training=dict(tokens=64, steps=1, batch=2))
        stage(tmp_path, pretrain, settings, data=data)
