"""A stream reads what its model reads alone under its control; copies are streams; nothing borrowed is saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from laws import worlds

from ctg_jax import tree
from ctg_jax.control import IDENTITY, Chain, Control
from ctg_jax.controls import streams
from ctg_jax.controls.codes import coded
from ctg_jax.controls.delta import lora
from ctg_jax.controls.streams import Stream
from ctg_jax.controls.vectors import SoftPrompt
from ctg_jax.decode import loop
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.pattern import Layer
from ctg_jax.run import checkpoint
from ctg_jax.types import InputError, Sampling

LM = worlds.tiny(vocab=7, depth=1)
PARAMS, OTHER = worlds.lively(LM), worlds.lively(LM, seed=5)
ROWS = [[1, 2, 3], [4], [5, 6]]
NEW = 4


def change(seed, rank=2):
    delta = lora(jax.random.key(seed), jax.eval_shape(LM.init, jax.random.key(0)), rank)
    moved = {p: c | {"b": jax.random.normal(jax.random.key(seed), c["b"].shape)} for p, c in delta.changes.items()}
    return delta.replace(changes=moved)


def soft(seed, length=2):
    return SoftPrompt(3 * jax.random.normal(jax.random.key(seed), (length, LM.width)))


@struct.dataclass
class Read(Control):
    """The logits of a stream in place of those of the model that decodes; with copies the mean of theirs."""

    stream: Stream

    def init(self, prompts, length):
        return self.stream.init(prompts, length)

    def logits(self, z, h, tokens, mask, state):
        z, _, state = self.stream.read(tokens, mask, z.shape[1], state)
        return z if z.ndim == 3 else jnp.mean(z, axis=1), state


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)


def both_ways(control, prompts, params=PARAMS):
    """Logits [B, N, V] of one text, which `generate` drew and scored alike."""
    out = loop.generate(LM, params, prompts, control, Sampling(max_new=NEW))
    close(loop.score(LM, params, prompts, out.tokens, control), out.logp)
    return out.tokens, loop.forward(LM, params, prompts, out.tokens, control)


@pytest.mark.parametrize("case", ["delta", "own weights", "vectors", "under the chain", "frozen under the chain"])
def test_a_stream_reads_what_its_model_reads_alone(case):
    prompts, before = worlds.prompts(ROWS), change(9)
    stream, alone, params = {
        "delta": (Stream(control=change(1), lm=LM), change(1), PARAMS),
        "own weights": (Stream(OTHER, change(1), lm=LM), change(1), OTHER),
        "vectors": (Stream(control=soft(1), lm=LM), soft(1), PARAMS),
        "under the chain": (Stream(control=soft(1), lm=LM, of="current"), Chain((before, soft(1))), PARAMS),
        "frozen under the chain": (Stream(control=soft(1), lm=LM), soft(1), PARAMS),
    }[case]
    chain = Chain((Read(stream), before)) if "chain" in case else Read(stream)
    tokens, found = both_ways(chain, prompts)
    close(found, loop.forward(LM, params, prompts, tokens, alone))


def test_copies_are_streams():
    """Codes by the number of the copy; every copy reads its own prompt, of its own length, in one pass."""
    codes = coded(jax.random.key(1), change(2), LM.width, 2, deviation=3.0)
    texts = [[[1, 2], [3]], [[4], [5, 6]], [[2], [2]]]
    own = jnp.asarray([[[-1] * (2 - len(t)) + t for t in row] for row in texts])
    prompts = worlds.prompts(ROWS, cond={"own": own})
    stream = Stream(control=codes.replace(cond="copy"), lm=LM, own="own", copies=2)
    tokens, found = both_ways(Read(stream), prompts)
    wanted = 0
    for n in range(2):
        alone = worlds.prompts([row[n] for row in texts])
        wanted += loop.forward(LM, PARAMS, alone, tokens, codes.replace(scale=jnp.float32(n))) / 2
    close(found, wanted)
    row = jax.tree.map(lambda x: x[1:2], prompts)
    close(loop.forward(LM, PARAMS, row, tokens[1:2], Read(stream)), found[1:2])


def test_rows_of_a_stream_with_copies_can_be_chosen():
    prompts = worlds.prompts(ROWS)
    control = Read(
        Stream(control=coded(jax.random.key(1), change(2), LM.width, 2).replace(cond="copy"), lm=LM, copies=2)
    )
    sampling, index = Sampling(max_new=NEW), np.array([2, 0])
    half = loop.extend(
        LM, PARAMS, loop.begin(LM, PARAMS, prompts, control, sampling), prompts.keys, control, sampling, 2
    )
    some, keys = loop.choose((half, prompts.keys), index)
    found = loop.extend(LM, PARAMS, some, keys, control, sampling, 2)
    assert found.tokens.tolist() == loop.generate(LM, PARAMS, prompts, control, sampling).tokens[index].tolist()


def test_an_own_prompt_before_that_of_the_base():
    own = [[6], [3, 3], [1, 4]]
    padded = jnp.asarray([[-1] * (2 - len(t)) + t for t in own])
    prompts = worlds.prompts(ROWS, cond={"own": padded})
    tokens, found = both_ways(Read(Stream(control=soft(1), lm=LM, own="own", before=True)), prompts)
    close(found, loop.forward(LM, PARAMS, worlds.prompts([a + b for a, b in zip(own, ROWS)]), tokens, soft(1)))
    long = worlds.prompts(ROWS, cond={"own": jnp.ones((3, 46), jnp.int32)})
    with pytest.raises(
        InputError, match=r"46 tokens, with which a row takes 52 positions, but the stream's context is 48"
    ):
        loop.generate(LM, PARAMS, long, Read(Stream(lm=LM, own="own", before=True)), Sampling(max_new=NEW))


def test_everything_and_extra():
    """Logits before the first token and after each give the likelihood of a padded prompt; states add to embeddings."""
    prompts = worlds.prompts(ROWS)
    stream = Stream(control=soft(1, length=1), lm=LM).bind(PARAMS, PARAMS)
    z, h, _ = stream.read(prompts.tokens, prompts.mask, 1, stream.init(prompts, 3), everything=True)
    assert z.shape == (3, 4, 7) and h.shape == (3, 4, LM.width)
    logp = np.asarray(streams.heard(z, prompts.tokens, prompts.mask))
    for i, row in enumerate(ROWS):
        vector = loop.score(LM, PARAMS, worlds.prompts([row[:1]]), jnp.asarray([row[1:] or [0]]), soft(1, length=1))
        close(logp[i, 4 - len(row) :], vector[0, : len(row) - 1])
        assert not logp[i, : 3 - len(row)].any()
    x = jnp.asarray([ROWS[0][:1]])
    first = jax.nn.log_softmax(LM.apply(PARAMS, soft(1, 1).vectors[None], jnp.ones((1, 1), bool)).logits[:, 0])
    assert logp[0, 0] == pytest.approx(float(first[0, x[0, 0]]), abs=1e-4)
    extra = jax.random.normal(jax.random.key(3), (3, 5, LM.width))
    moved, _, _ = stream.read(prompts.tokens, prompts.mask, 1, stream.init(prompts, 3), extra=extra)
    embedded = LM.embed(PARAMS, prompts.tokens) + extra[:, 2:]
    head = jnp.concatenate([jnp.broadcast_to(soft(1, 1).vectors, (3, 1, LM.width)), embedded], axis=1)
    mask = jnp.concatenate([jnp.ones((3, 1), bool), prompts.mask], axis=1)
    close(moved, LM.apply(PARAMS, head, mask, last=1).logits)
    plain = Stream(lm=LM).bind(PARAMS, PARAMS)
    with pytest.raises(InputError, match="everything needs something before the prompt"):
        plain.read(prompts.tokens, prompts.mask, 1, plain.init(prompts, 3), everything=True)


@struct.dataclass
class LookAhead(Control):
    """Every token of `candidates` is preferred by the likelihood of token 1 after it."""

    stream: Stream
    candidates: tuple = struct.field(pytree_node=False, default=(0, 2, 5))

    def init(self, prompts, length):
        return self.stream.init(prompts, length)

    def logits(self, z, h, tokens, mask, state):
        _, _, state = self.stream.read(tokens, mask, z.shape[1], state)
        tokens = jnp.broadcast_to(jnp.asarray(self.candidates, jnp.int32), (len(z), len(self.candidates)))
        for m in range(z.shape[1]):
            ahead = self.stream.peek(tokens, state, z.shape[1] - 1 - m)[0]
            z = z.at[:, m, jnp.asarray(self.candidates)].add(jax.nn.log_softmax(ahead)[..., 1])
        return z, state


READERS = {
    "own prompt": dict(control=Chain((soft(1), change(2))), own="own", before=True),
    "copies": dict(control=coded(jax.random.key(1), change(2), LM.width, 2).replace(cond="copy"), copies=2),
}


GROUPED = Transformer.llama(  # rotary, two heads a key, windows of two tokens in every second layer, capped scores
    vocab=7, width=16, depth=2, heads=4, kv_heads=2, mlp_width=16, context=48, attn_cap=5.0, tied=True,
    pattern=(Layer(window=2), Layer()),
)  # fmt: skip


@pytest.mark.parametrize("case", [*READERS, "windows"])
def test_looking_ahead_is_reading(case):
    """After padded prompts, one token later, and from a position before the last one."""
    prompts = worlds.prompts(ROWS, cond={"own": jnp.asarray([[-1, 6], [3, 3], [1, 4]])})
    candidates, one = jnp.asarray([[0, 5], [1, 2], [6, 4]]), jnp.ones((3, 1), bool)

    lm, params = (GROUPED, worlds.lively(GROUPED)) if case == "windows" else (LM, PARAMS)

    @jax.jit
    def read_and_peek(stream):
        stream = stream.bind(params, params)
        _, _, start = stream.read(prompts.tokens, prompts.mask, 1, stream.init(prompts, 6))
        _, _, later = stream.read(candidates[:, :1], one, 1, start)
        text = jnp.concatenate([prompts.tokens, candidates[:, :1]], axis=1)
        _, _, whole = stream.read(text, jnp.concatenate([prompts.mask, one], axis=1), 2, stream.init(prompts, 6))
        peeked = [stream.peek(candidates, *at) for at in ((start,), (later,), (later, 1), (whole, 1))]
        read = [[stream.read(candidates[:, k : k + 1], one, 1, at)[:2] for k in range(2)] for at in (start, later)]
        return peeked, read

    peeked, (after_start, after_later) = read_and_peek(Stream(lm=lm, ahead=True, **READERS.get(case, {})))
    for (z, h), wanted in zip(peeked, (after_start, after_later, after_start, after_start)):
        for k, (logits, states) in enumerate(wanted):
            close(z[..., k, :], logits[..., 0, :])
            close(h[..., k, :], states[..., 0, :])


def test_nothing_of_the_cache_is_copied_for_candidates():
    """No array of the program has the size of a cache for each of a fourth of the candidates."""
    prompts, candidates = worlds.prompts(ROWS), jnp.tile(jnp.arange(7), (3, 4))

    def peeked():
        stream = Stream(lm=LM, ahead=True).bind(PARAMS, PARAMS)
        _, _, reading = stream.read(prompts.tokens, prompts.mask, 1, stream.init(prompts, 40))
        return reading.cache, stream.peek(candidates, reading)

    held = jax.eval_shape(peeked)[0].k[0].size
    sizes = [v.aval.size for eqn in jax.make_jaxpr(peeked)().eqns for v in eqn.outvars]
    assert max(sizes) < held * candidates.shape[1] / 4


def test_a_control_looks_ahead_alike_while_decoding_and_scoring():
    prompts = worlds.prompts(ROWS)
    control = LookAhead(Stream(control=soft(1), lm=LM, ahead=True))
    tokens, found = both_ways(control, prompts)
    assert np.abs(found - loop.forward(LM, PARAMS, prompts, tokens)).max() > 0.1
    row = jax.tree.map(lambda x: x[1:2], prompts)
    close(loop.forward(LM, PARAMS, row, tokens[1:2], control), found[1:2])
    with pytest.raises(InputError, match="peek needs a stream with ahead=True that has read the prompt"):
        loop.forward(LM, PARAMS, prompts, tokens, LookAhead(Stream(lm=LM)))


@struct.dataclass
class Unembed(Control):
    """The logits that the unembedding makes of the states that `logits` is given."""

    params: dict

    def logits(self, z, h, tokens, mask, state):
        return LM.unembed(self.params, h[:, h.shape[1] - z.shape[1] :]), state


def test_logits_get_the_states_that_the_unembedding_reads():
    prompts, both = worlds.prompts(ROWS), Chain((soft(1), Unembed(PARAMS)))
    tokens, found = both_ways(both, prompts)
    close(found, loop.forward(LM, PARAMS, prompts, tokens, soft(1)))


def test_nothing_borrowed_is_held_or_saved(tmp_path):
    control = Chain((Read(Stream(control=change(1), lm=LM)),))
    loop.generate(LM, PARAMS, worlds.prompts(ROWS), control, Sampling(max_new=1))
    assert control.parts[0].stream.params is None
    assert tree.size_bytes(control) == tree.size_bytes(change(1))
    checkpoint.save(tmp_path / "c", control)
    found = checkpoint.load(tmp_path / "c", jax.eval_shape(lambda: control))
    assert jax.tree.structure(found) == jax.tree.structure(control)
    assert IDENTITY.bind(PARAMS, PARAMS) is IDENTITY
    with pytest.raises(InputError, match="reads before it has weights"):
        jax.eval_shape(lambda: control.logits(*[jnp.zeros((1, 1, 7))] * 2, jnp.zeros((1, 1), int), None, ((),)))


def test_log_probabilities_and_mixture_by_hand():
    z = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    without = streams.log_probabilities(jnp.array([z[0], -1e30, z[2]]))
    close(without[jnp.array([0, 2])], np.log([5 / 7, 2 / 7]))
    assert float(without[1]) == np.float32(-1e30)
    other = jnp.log(jnp.array([0.1, 0.1, 0.8]))
    close(jnp.exp(streams.mixture(z, other, jnp.array([0.75]))), [0.2, 0.15, 0.65])
    close(streams.mixture(z, other, jnp.zeros(1)), z)
