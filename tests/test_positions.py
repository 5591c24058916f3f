"""What is computed from logits chunk by chunk is what all positions at once give, and takes less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax.control import IDENTITY, Chain
from ctg_jax.controls import constraints, truncate
from ctg_jax.controls.streams import Stream
from ctg_jax.controls.vectors import SoftPrompt, soft_prompt
from ctg_jax.decode import loop, reading
from ctg_jax.evaluation import kl_to_base
from ctg_jax.learn import losses
from ctg_jax.methods import click, dexperts, finetune, gdc, latent_steer, ppo, quark, steer, unlikelihood
from ctg_jax.models import heads, masked, positions
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import Prompts

LM = worlds.tiny(vocab=13, depth=1)
PARAMS = worlds.lively(LM)
ROWS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
NEW = 7
COMPLETION = jnp.asarray(np.random.default_rng(0).integers(1, LM.vocab, (len(ROWS), NEW)), jnp.int32)
INSTRUCTED = jnp.array([[-1, -1, 3, 4], [5, 6, 1, 2], [-1, 7, 2, 2]])
PROMPTS = worlds.prompts(ROWS, cond={dexperts.INSTRUCTED: INSTRUCTED, "bin": jnp.array([0, 2, 1])})
KEYS = jax.random.split(jax.random.key(0), 6)


def every_hook():
    """Weights, init, prompt, prefix, hidden and logits, with streams and rules that remember the text."""
    memory = latent_steer.init(LM, KEYS[0], site="memory", slots=2, dim=3)
    parts = (
        SoftPrompt(soft_prompt(KEYS[1], 2, LM.width, deviation=1.0)),
        memory.replace(z=jax.random.normal(KEYS[2], memory.z.shape)),
        steer.example(LM, KEYS[3]),
        finetune.example(LM, KEYS[4]),
        dexperts.example(LM, KEYS[5]),
        truncate.RepetitionPenalty(1.5, vocab=LM.vocab),
        truncate.TopP(jnp.float32(0.95)),
    )
    return Chain(parts)


def rules():
    """Those whose state moves on from position to position."""
    forced = constraints.Force(jnp.array([-1, -1, 5, -1, 3]))
    late = constraints.MinLength(jnp.asarray(constraints.marks([2, 4], LM.vocab)), 3)
    return Chain((forced, late, truncate.RepetitionPenalty(1.7, vocab=LM.vocab), truncate.NoRepeatNgram(2)))


CONTROLS = {
    "plain": lambda: IDENTITY,
    "every hook": every_hook,
    "rules": rules,
    "guidance": lambda: dexperts.guidance(LM, 1.5, keep=2),
    "instruction": lambda: dexperts.prompted(LM, 1.0),
    "penalised stream": lambda: dexperts.experts(
        Stream(control=truncate.RepetitionPenalty(1.7, vocab=LM.vocab), lm=LM), alpha=0.5
    ),
}


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


def differentiable(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


SIZES = [
    pytest.param(name, 3, marks=[] if name in ("every hook", "rules") else [pytest.mark.slow]) for name in CONTROLS
]


@pytest.mark.parametrize(("name", "size"), [*SIZES, ("rules", 1)])
def test_chunks_give_what_all_positions_give(name, size):
    """Values and gradients, of parameters and of the control."""
    control = jax.tree.map(jnp.asarray, CONTROLS[name]())

    def terms(z, target):
        return {"logp": -losses.next_token(z, target), "entropy": losses.entropy(z)}

    def total(given, chunk):
        params, control = given
        text = reading.read(LM, params, PROMPTS, COMPLETION, control)
        found = positions.reduced(text, terms, COMPLETION, chunk=chunk)
        weight = jnp.linspace(-1, 1, NEW)[None]
        real = jnp.where(found["logp"] > -1e6, found["logp"], 0.0)  # a token that a rule removed has no gradient
        return jnp.sum(weight * (real + found["entropy"])), found

    def run(chunk):
        f = jax.value_and_grad(lambda given: total(given, chunk), has_aux=True, allow_int=True)
        (_, found), slope = jax.jit(f)((PARAMS, control))
        return found, differentiable(slope)

    whole, chunked = run(None), run(size * len(ROWS) * LM.vocab)
    assert positions.chunks(len(ROWS), NEW, LM.vocab, size * len(ROWS) * LM.vocab) == (size, (NEW - 1) // size)
    close(chunked[0], whole[0])
    scale = max([1.0, *(float(jnp.max(jnp.abs(x))) for x in whole[1])])
    close([x / scale for x in chunked[1]], [x / scale for x in whole[1]])
    assert np.ptp(whole[0]["logp"]) > 0.1 and scale > 0.1


@pytest.mark.parametrize(
    ("rows", "new", "vocab"), [(32, 40, 262144), (8, 64, 262144), (1, 1000, 200000), (3, 2, 2**27)]
)
def test_a_chunk_stays_within_its_size(rows, new, vocab):
    size, later = positions.chunks(rows, new, vocab)
    assert rows * size * vocab <= positions.CHUNK or size == 1
    assert later and 1 <= new - size * later <= size


def test_what_fits_is_one_chunk():
    assert positions.chunks(32, 40, 50257) == (40, 0)
    assert positions.chunks(8, 32, 262144) == (32, 0)
    assert positions.chunks(4, 0, 11)[1] == 0 and positions.chunks(0, 5, 11)[1] == 0


def batch():
    given = {"tokens": PROMPTS.tokens, "mask": PROMPTS.mask, "completion": COMPLETION}
    written = jnp.arange(NEW)[None] < jnp.array([7, 2, 5])[:, None]  # ragged on the right
    other = jnp.flip(COMPLETION, axis=1)
    given |= {"written": written, "negative": other, "negative_written": written, "human": other}
    given |= {"human_written": written, "bin": jnp.array([0, 2, 1]), "reward": jnp.array([1.0, -2.0, 0.5])}
    return given | {"advantage": given["reward"], "drawn": jnp.full(3, -9.0), "weight": jnp.array([0.5, 1.0, 2.0])}


def learned(loss, params, frozen, given):
    """The `Sum` of a loss and its gradient."""

    def total(params):
        out = loss(params, frozen, given, KEYS[: len(given["tokens"])])
        return out.total, out

    (_, out), slope = jax.jit(jax.value_and_grad(total, has_aux=True, allow_int=True))(params)
    return out, differentiable(slope)


def text():
    return {"tokens": COMPLETION, "mask": batch()["written"], "ids": jnp.arange(3)}


def search(control):
    """Loss, share and gradient of latent vectors at the lowest site."""
    f = latent_steer.objective(LM, control)
    stream = LM.embed(PARAMS, COMPLETION)
    rows = {
        "stream": stream,
        "mask": text()["mask"],
        "counted": text()["mask"],
        "target": COMPLETION,
        "start": jnp.ones(3, int),
    }
    z = jax.random.normal(KEYS[0], (3, LM.width))
    return jax.jit(
        lambda z: (f(z, rows, (PARAMS, None)), jax.grad(lambda z: jnp.sum(f(z, rows, (PARAMS, None))[0]))(z))
    )(z)


def recovered():
    net = Transformer.gpt2(vocab=14, width=8, depth=1, heads=2, context=NEW, causal=False)
    params = worlds.lively(net)
    x = jnp.where(text()["mask"], 13, COMPLETION)
    f = jax.value_and_grad(lambda p: jnp.sum(masked.recovery(net, p, x, COMPLETION)))
    return jax.jit(f)(params)


def users():
    delta, frozen = finetune.example(LM, KEYS[0]), {"params": PARAMS}
    state = {"policy": delta, "value": heads.value_head(LM.width)}
    old = {**frozen, "beta": jnp.float32(0.1)}
    credited = {name: jax.random.normal(k, COMPLETION.shape) for name, k in zip(ppo.FIELDS, KEYS)}
    credited["old"] = -jnp.abs(credited["old"])
    everything = unlikelihood.Objective(likelihood=1.0, token=0.5, sequence=0.5, policy=0.5, ngram=1)
    all_terms = quark.Objective(kl=0.1, entropy=0.1, unlikelihood=0.1)
    filtered = Chain((steer.example(LM, KEYS[3]), truncate.RepetitionPenalty(1.3, vocab=LM.vocab)))
    search_at = latent_steer.init(LM, KEYS[0], site=0)
    return {
        "score": lambda: loop.score(LM, PARAMS, PROMPTS, COMPLETION, filtered, batch()["written"]),
        "KL": lambda: kl_to_base(LM, PARAMS, PROMPTS, COMPLETION, filtered),
        "KL to a filter": lambda: kl_to_base(LM, PARAMS, PROMPTS, COMPLETION, filtered, truncate.TopK(9)),
        "lm_loss": lambda: learned(losses.lm_loss(LM, z=0.1), PARAMS, None, text()),
        "control_loss": lambda: learned(losses.control_loss(LM), filtered, frozen, text()),
        "control_loss and KL": lambda: learned(losses.control_loss(LM, kl_weight=0.5, z=0.1), filtered, frozen, text()),
        "quark": lambda: learned(quark.loss(LM, all_terms), quark.example(LM, KEYS[2]), frozen, batch()),
        "ppo": lambda: learned(ppo.loss(LM, ppo.Objective(entropy=0.1)), state, old, batch() | credited),
        "gdc": lambda: learned(gdc.loss(LM), delta, frozen, batch()),
        "click": lambda: learned(click.loss(LM), delta, frozen, batch()),
        "unlikelihood": lambda: learned(unlikelihood.loss(LM, everything), delta, frozen, batch()),
        "latent vectors": lambda: search(search_at),
        "masked diffusion": recovered,
    }


DEFAULT = ("score", "KL", "KL to a filter", "control_loss and KL", "latent vectors")  # the others compile for longer


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in users()])
def test_whatever_reads_logits_gives_the_same_in_chunks(name, monkeypatch):
    use, seen = users()[name], []
    whole = use()
    plan = positions.chunks
    monkeypatch.setattr(positions, "chunks", lambda *shape: seen.append(found := plan(*shape[:3], 3 * 2 * 14)) or found)
    jax.clear_caches()  # programs of one chunk
    chunked = use()
    jax.clear_caches()  # and those of several
    assert seen and all(later > 1 for _, later in seen)
    scale = max([1.0, *(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(whole) if np.isfinite(x).all())])
    close(jax.tree.map(lambda x: x / scale, chunked), jax.tree.map(lambda x: x / scale, whole))


LARGE = Transformer.gpt2(vocab=50_000, width=16, depth=1, heads=2, context=64)


def temporary(f, *args):
    """MB of temporary memory of a compiled program."""
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes / 1e6


@pytest.mark.parametrize(("kind", "copies"), [("score", 1.5), ("gradient", 4.5)])
def test_peak_memory_follows_the_chunk_and_not_the_text(kind, copies, monkeypatch):
    """Scoring holds the logits of one chunk and at most as much for the first; a gradient with the KL to the base those
    of two readings and what their backward pass adds. At once they hold as many copies of all N positions."""
    params = jax.eval_shape(LARGE.init, jax.random.key(0))
    given = jax.eval_shape(lambda: {"tokens": jnp.ones((4, 33), jnp.int32), "mask": jnp.ones((4, 33), bool)})
    control = jax.eval_shape(lambda: steer.example(LARGE, jax.random.key(0)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))

    def score(params, control, given, keys):
        head = Prompts(given["tokens"][:, :1], given["mask"][:, :1], keys)
        return loop.score(LARGE, params, head, given["tokens"][:, 1:], control)

    def gradient(params, control, given, keys):
        loss = losses.control_loss(LARGE, kl_weight=0.1)
        return jax.grad(lambda c: loss(c, {"params": params}, given, keys).total, allow_int=True)(control)

    f = {"score": score, "gradient": gradient}[kind]
    all_logits, chunk = 4 * 4 * 32 * 50_000 / 1e6, 4 * 4 * 4 * 50_000 / 1e6  # 25.6 and 3.2 MB
    whole = temporary(lambda *args: f(*args), params, control, given, keys)
    monkeypatch.setattr(positions, "CHUNK", int(chunk * 1e6) // 4)
    jax.clear_caches()
    found = temporary(lambda *args: f(*args), params, control, given, keys)
    jax.clear_caches()
    assert found < copies * chunk, (found, whole)
    assert whole > all_logits > copies * chunk


def test_sums_over_the_vocabulary_are_float32_where_weights_are_bfloat16(vocab=50_000):
    lm = Transformer.gpt2(vocab=vocab, width=32, depth=1, heads=2, context=8, dtype="bfloat16", param_dtype="bfloat16")
    kernel = 0.02 * jax.random.normal(jax.random.key(0), (vocab, 32))
    params = {"embed": {"tokens": kernel.astype(jnp.bfloat16)}}
    h = jax.random.normal(jax.random.key(1), (2, 3, 32)).astype(jnp.bfloat16)
    target = jnp.array([[0, 5, 49_999], [7, 7, 1]])
    z = lm.unembed(params, h)
    exact = np.einsum("bnd,vd->bnv", *(np.asarray(x, np.float64) for x in (h, params["embed"]["tokens"])))
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, exact, atol=1e-5 * np.abs(exact).max())
    total = np.log(np.exp(exact).sum(-1))
    nll = total - np.take_along_axis(exact, np.asarray(target)[..., None], axis=-1)[..., 0]
    text = positions.Read(params, h, lm=lm)
    for chunk in (None, 2 * vocab):
        found = positions.reduced(text, losses.next_token, target, chunk=chunk)
        np.testing.assert_allclose(found, nll, rtol=2e-6)
        np.testing.assert_allclose(
            positions.reduced(text, lambda z, _: losses.logsumexp(z), target, chunk=chunk), total, rtol=2e-6
        )
    # Logits that are bfloat16 themselves, as a caller may pass them, are summed in float32 as well.
    rounded = z.astype(jnp.bfloat16)
    exact = np.log(np.exp(np.asarray(rounded, np.float64)).sum(-1))
    np.testing.assert_allclose(losses.logsumexp(rounded), exact, rtol=2e-6)
