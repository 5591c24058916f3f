"""DGLM: its guidance by hand and on latents that lie in two heaps, its prompter on words that only the latent knows,
its stages, and bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import worlds

from ctg_jax import evaluation, methods, rng
from ctg_jax.learn import embeddings, latent_diffusion, latent_prompt, train
from ctg_jax.learn.attributes import coefficients
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.methods import dglm
from ctg_jax.models import diffusion
from ctg_jax.models.diffusion import Schedule
from ctg_jax.run.stage import Artifact, open_lm, stage
from ctg_jax.stages import sources
from ctg_jax.studies import reconstruct
from ctg_jax.types import InputError

LM = worlds.tiny(vocab=8, depth=1)
PARAMS = worlds.lively(LM, factor=2)
NET = dict(width=16, depth=2, heads=2, pseudo_tokens=2, spread=4)


def prompts(n, cond=None):
    p = worlds.prompts([[1, 2]] * n)
    return p.replace(keys=rng.per_example(jax.random.key(0), jnp.arange(n)), cond=cond)


@pytest.fixture(scope="module")
def heaps():
    """A proposal whose denoiser has learned two equal heaps of unit vectors, at + and - along the first axis."""
    r = np.random.default_rng(0)
    x = np.concatenate([[3.0, 0, 0, 0] + r.normal(size=(500, 4)), [-3.0, 0, 0, 0] + r.normal(size=(500, 4))])
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    mean, deviation = latent_diffusion.moments(x)
    net = latent_diffusion.network(4, **NET)
    params = {"net": net.init(jax.random.key(0)), "bins": jnp.zeros(latent_diffusion.BINS)}
    rate = optax.cosine_decay_schedule(6e-3, 1000)
    tx = optax.partition({"net": optax.adam(rate), "bins": optax.sgd(3.0)}, {"net": "net", "bins": "bins"})
    step = train.make_step(latent_diffusion.denoiser_loss(net, drop=1.0), tx)

    def one(state, i):
        rows = jax.random.randint(jax.random.fold_in(jax.random.key(1), i), (64,), 0, len(x))
        batch = {"latent": jnp.asarray(x)[rows], "context": jnp.zeros((64, 4)), "ids": rows}
        return step(state, {"mean": mean, "deviation": deviation}, batch)[0], None

    state = train.init_state(params, tx, jax.random.key(2))
    state, _ = jax.jit(lambda s: jax.lax.scan(one, s, jnp.arange(1000)))(state)
    control = dglm.init(
        LM, jax.random.key(0), latent=4, denoiser=NET, prompter=NET | dict(length=2, kind="frozen"), attributes=2,
        draw=dict(steps=20), conditioned=False,
    )  # fmt: skip
    probes = jnp.asarray([[4.0, 0, 0, 0], [0, 4.0, 0, 0]])
    return control.replace(score=state.params["net"], mean=mean, deviation=deviation, probes=probes)


@jax.jit
def latent(control, prompts):
    return control.latent(prompts)


def drawn(control, n=200, cond=None):
    z = latent(control, prompts(n, cond))
    return np.asarray(z * control.deviation[None] + control.mean[None])


def with_weights(control, *weights, scale=1.0):
    return control.replace(weights_of=jnp.asarray(weights, jnp.float32), scale=jnp.asarray(scale, jnp.float32))


def test_the_energy_is_the_loss_of_what_is_asked_for():
    control = dglm.example(LM, jax.random.key(0)).replace(
        mean=jnp.asarray([1.0, 0, 0, 0]), deviation=jnp.asarray([1.0, 2, 1, 1]), probes=jnp.asarray([[0.0, 3, 0, 0]]),
        biases=jnp.asarray([0.5]),
    )  # fmt: skip
    x = jnp.asarray([[2.0, 2.0, 0, 0]])  # not standardised: (3, 4, 0, 0), of length one (.6, .8, 0, 0)
    logit = 3 * 0.8 + 0.5
    for weight in (2.0, -0.5):
        want = abs(weight) * np.log1p(np.exp(-np.sign(weight) * logit))
        np.testing.assert_allclose(control.energy(x, jnp.asarray([[weight]])), [want], rtol=1e-5)


def test_latents_have_length_one_and_fall_in_both_heaps(heaps):
    x = drawn(with_weights(heaps, 1.0, 0.0, scale=0.0))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-5)
    assert 0.35 < np.mean(x[:, 0] > 0) < 0.65 and np.mean(np.abs(x[:, 0])) > 0.8


def test_guidance_moves_to_the_heap_asked_for_and_composes(heaps):
    shares = [np.mean(drawn(with_weights(heaps, 1.0, 0.0, scale=s))[:, 0] > 0) for s in (0.0, 0.1, 4.0)]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.95
    assert np.mean(drawn(with_weights(heaps, -1.0, 0.0, scale=4.0))[:, 0] < 0) > 0.95
    both = drawn(with_weights(heaps, 1.0, 1.0, scale=4.0))
    assert np.mean((both[:, 0] > 0) & (both[:, 1] > 0)) > 0.9


def test_no_guidance_is_the_unguided_draw_to_the_bit(heaps):
    none = heaps.replace(probes=jnp.zeros((0, 4)), biases=jnp.zeros(0), weights_of=jnp.ones(0))
    np.testing.assert_array_equal(drawn(with_weights(heaps, 1.0, -1.0, scale=0.0), 8), drawn(none, 8))


def test_every_row_its_own_weights_and_its_own_scale(heaps):
    choose = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]] * 50)
    x = drawn(with_weights(heaps, 1.0, 0.0, scale=4.0).replace(cond="wish"), 100, {"wish": choose})
    assert np.mean(x[::2, 0] > 0) > 0.95 and np.mean(x[1::2, 0] < 0) > 0.95
    alone = drawn(with_weights(heaps, 1.0, 0.0, scale=4.0), 1)
    np.testing.assert_allclose(x[:1], alone, atol=1e-5)


def test_averaged_guidance_and_many_steps_agree_on_the_heap(heaps):
    for draw in (dict(average=8), dict(sampler="ddpm", steps=60), dict(sampler="ddim", steps=40)):
        control = with_weights(heaps, 1.0, 0.0, scale=4.0).replace(draw=dglm.Draw(schedule=Schedule(), **draw))
        assert np.mean(drawn(control, 64)[:, 0] > 0) > 0.9


def test_the_gradient_through_the_denoiser_moves_to_the_heap_too(heaps):
    draw = dglm.Draw(schedule=Schedule(), sampler="ddpm", steps=100, through=True)
    none, much = (with_weights(heaps, 1.0, 0.0, scale=s).replace(draw=draw) for s in (0.0, 1.0))
    assert np.mean(drawn(much)[:, 0] > 0) > np.mean(drawn(none)[:, 0] > 0) + 0.25


def test_the_prompter_says_what_only_the_latent_knows():
    """After the same prompt, the word is the one that the latent points at."""
    control = latent_prompt.init(LM, jax.random.key(0), 8, **NET, length=2, kind="frozen")
    latent = jnp.eye(8)
    batch = {
        "tokens": jnp.full((8, 2), 1), "mask": jnp.ones((8, 2), bool), "ids": jnp.arange(8),
        "completion": jnp.arange(8)[:, None], "written": jnp.ones((8, 1), bool), "latent": latent,
    }  # fmt: skip
    frozen = {"params": PARAMS, "mean": jnp.full(8, 1 / 8), "deviation": jnp.full(8, 0.33)}
    tx = optimizer(5e-3, trained="prompter/.*")
    step = train.make_step(latent_prompt.loss(LM), tx)
    state = train.init_state(control, tx, jax.random.key(1))
    run = lambda s, _: (step(s, frozen, batch)[0], None)  # noqa: E731
    state, _ = jax.jit(lambda s: jax.lax.scan(run, s, None, length=300))(state)
    from ctg_jax.decode import loop

    cond = {"latent": (latent - frozen["mean"][None]) / frozen["deviation"][None], "gamma": jnp.full(8, 6.0)}
    z = loop.forward(LM, PARAMS, prompts(8, cond), batch["completion"], state.params)
    assert np.mean(np.argmax(z[:, 0], axis=-1) == np.arange(8)) > 0.8


def test_the_denoiser_reads_the_prefix_as_it_reads_the_latent():
    """Both standardised by the moments of the latents, in training and in drawing."""
    seen = []

    class Net:
        context = 4

        def apply(self, params, z, gamma, context=None, given=None):
            seen.append((context, given))
            return z

    mean, deviation = jnp.asarray([0.5, 0, 0, 0.1]), jnp.asarray([0.1, 0.2, 0.1, 0.4])
    raw, n = jnp.tile(jnp.asarray([[0.6, 0.2, -0.1, 0.5]]), (1000, 1)), 1000
    batch = {"latent": raw, "context": raw}
    frozen, keys = {"mean": mean, "deviation": deviation}, rng.per_example(jax.random.key(0), jnp.arange(n))
    latent_diffusion.denoiser_loss(Net(), drop=0.1)({"net": {}, "bins": jnp.zeros(4)}, frozen, batch, keys)
    np.testing.assert_allclose(seen[0][0][0], [1.0, 1.0, -1.0, 1.0], rtol=1e-5)
    assert 0.07 < 1 - np.mean(seen[0][1]) < 0.13  # the share of rows whose prefix is hidden
    control = dglm.init(LM, jax.random.key(0), latent=4, denoiser=NET, prompter=NET | dict(length=2))
    control = control.replace(net=Net(), mean=mean, deviation=deviation, draw=dglm.Draw(steps=2))
    del seen[:]
    control.latent(prompts(2, {"context": raw[:2]}))
    np.testing.assert_allclose(seen[0][0][0], [1.0, 1.0, -1.0, 1.0], rtol=1e-5)


def test_the_weight_of_the_prefix_decides_how_far_the_draw_follows_it():
    """A denoiser that believes its prefix and, without one, nothing: at weight w the latent is w times the prefix."""

    class Believes:
        context = 4

        def apply(self, params, z, gamma, context=None, given=None):
            alpha, sigma = (a[:, None] for a in diffusion.alpha_sigma(gamma))
            return (alpha * z - (0.0 if context is None else context)) / sigma

    control = dglm.init(LM, jax.random.key(0), latent=4, denoiser=NET, prompter=NET | dict(length=2))
    control = control.replace(net=Believes(), draw=dglm.Draw(steps=3), mean=jnp.asarray([1.0, 0, 0, 0]))
    prefix = jnp.asarray([[1.6, 0.8, 0, 0]])
    for weight in (0.0, 1.0, 3.0):
        z = control.replace(free=jnp.float32(weight)).latent(prompts(1, {"context": prefix}))
        raw = np.asarray([1 + 0.6 * weight, 0.8 * weight, 0, 0])
        np.testing.assert_allclose(z[0], raw / np.linalg.norm(raw) - [1, 0, 0, 0], atol=2e-3)


def test_the_noise_and_the_mean_of_averaged_classifiers():
    gamma = jnp.asarray([0.0, -2.0])
    alpha, sigma = diffusion.alpha_sigma(gamma)
    np.testing.assert_allclose(dglm.Draw().deviation(gamma), sigma)
    np.testing.assert_allclose(dglm.Draw(noise="ratio").deviation(gamma), sigma / alpha)
    with pytest.raises(InputError, match="noise is 'none', expected posterior or ratio"):
        dglm.Draw(noise="none")


def test_the_prompter_is_trained_on_latents_with_the_noise_it_names(monkeypatch):
    """At scale 3 of the cosine schedule, times are uniform; the latent has variance one before it is noised."""
    n, seen = 4000, []

    class Enough(Exception):
        pass

    def read(lm, params, batch, keys, control, cond):
        seen.append(cond)
        raise Enough

    monkeypatch.setattr(latent_prompt, "read", read)
    frozen = {"params": PARAMS, "mean": jnp.full(8, 1.0), "deviation": jnp.full(8, 2.0)}
    keys = rng.per_example(jax.random.key(0), jnp.arange(n))
    with pytest.raises(Enough):
        latent_prompt.loss(LM)(None, frozen, {"latent": jnp.full((n, 8), 3.0)}, keys)
    latent, gamma = (np.asarray(seen[0][name]) for name in ("latent", "gamma"))
    np.testing.assert_allclose(latent, 1.0)
    t = np.arctan(np.exp(-(gamma - 2 * np.log(3.0)) / 2)) * 2 / np.pi  # the inverse of the schedule
    np.testing.assert_allclose(np.quantile(t, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)

    class Net:
        def apply(self, params, z, gamma):
            return z

    control = latent_prompt.init(LM, jax.random.key(0), 8, **NET, length=2, kind="frozen").replace(net=Net())
    z = np.asarray(control.soft_tokens(jnp.asarray(latent), jnp.asarray(gamma), keys))
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-gamma)), 1 / np.sqrt(1 + np.exp(gamma))
    np.testing.assert_allclose(((z - alpha[:, None]) / sigma[:, None])[gamma < 5].std(), 1.0, atol=0.03)


def test_the_sizes_of_the_paper_have_shapes():
    from configs.dglm import PAPER
    from ctg_jax.decode.loop import generate
    from ctg_jax.models.decoder import Transformer
    from ctg_jax.types import Sampling

    lm = Transformer.gpt2(width=1280, depth=2, heads=20)  # of the 36 layers, whose number no network of DGLM reads
    control = jax.eval_shape(lambda key: dglm.init(lm, key, **PAPER), jax.random.key(0))
    sizes = [sum(x.size for x in jax.tree.leaves(p)) for p in (control.score, control.soft_prompt.prompter)]
    # By count of the authors' layers: the score network has 119 million parameters, the prompt generator 54 million.
    assert sizes == pytest.approx([119e6, 54e6], rel=0.02)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    ask = jax.eval_shape(lambda: prompts(2, {"context": jnp.zeros((2, 768))}))
    out = jax.eval_shape(lambda p, a, c: generate(lm, p, a, c, Sampling(max_new=4)), params, ask, control)
    assert out.tokens.shape == (2, 4)


TINY = dict(
    encode=dict(new=4),
    prompter=dict(net=NET | dict(length=2, rank=2), new=4, training=dict(steps=2, batch=4)),
    denoiser=dict(net=NET, training=dict(steps=2, batch=4)),
    draw=dict(steps=2),
)


def test_stages_are_kept_and_shared(small):
    root, lm, data = small
    one = dglm.fit(root, lm=lm, data=data, **TINY)
    other = dglm.fit(root, lm=lm, data=data, **TINY, weights=dict(positive=-1.0))
    assert one.path != other.path and one.spec["inputs"] == other.spec["inputs"]
    control = methods.load(one, worlds_lm(lm))
    assert control.reads == "context" and float(control.weights_of[0]) == 1.0
    assert methods.with_strength(control, 3.0).scale == 3.0
    found = dglm.conditions(one, lm, ["good day", "bad"])["context"]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    rows = embeddings_of(one).rows("pieces.jsonl")
    assert all(r["text"] == f"{r['prompt']} {r['continuation']}" for r in rows)


def test_networks_learn_from_what_the_language_model_writes(small):
    """Behind the prefixes of the texts, which only the probes learn from."""
    root, lm, data = small
    plain = dglm.fit(root, lm=lm, data=data, **TINY)
    own = dglm.fit(root, lm=lm, data=data, **TINY, own=dict(max_new=3, batch=4))
    assert own.spec["inputs"]["probes"] == plain.spec["inputs"]["probes"]
    made = embeddings_of(own)
    samples = Artifact(made.path.parent / f"sample-{made.spec['inputs']['data']}", "")
    heads = [r["prompt"] for r in embeddings_of(plain).rows("pieces.jsonl")]
    assert [r["prompt"] for r in samples.rows("samples.jsonl")] == heads
    written = [r for r in samples.rows("samples.jsonl") if r["text"].strip()]
    rows = made.rows("pieces.jsonl")
    assert [(r["text"], r["tokens"]) for r in rows] == [(w["prompt"] + w["text"], w["tokens"]) for w in written]
    real = embeddings.embedder(lm, None)
    np.testing.assert_allclose(embeddings.arrays(made)[0], real([r["continuation"] for r in rows]), atol=1e-6)


def test_samples_without_a_word_and_with_a_place_to_cut_are_named(small, tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "good", "text": " ", "tokens": [1]}) + "\n")
    root, lm, data = small
    with pytest.raises(InputError, match=r"no sample of .* has a word: let the language model write longer ones"):
        embeddings._written(Artifact(tmp_path, ""))
    heads = stage(root, embeddings.prefixes, {}, latents=stage(root, embeddings.encode, dict(new=4), lm=lm, data=data))
    samples = stage(root, dglm.sampling.sample, dict(n=1, max_new=3, batch=4), lm=lm, prompts=heads)
    with pytest.raises(InputError, match=r"words is 2, but sample-\w+ holds samples, which have prefixes"):
        stage(root, embeddings.encode, dict(words=2), lm=lm, data=samples)


def worlds_lm(lm):
    return open_lm(lm)[0]


def embeddings_of(control):
    return Artifact(control.path.parent / f"embeddings.encode-{control.spec['inputs']['latents']}", "")


def test_continuations_are_as_likely_as_the_evaluation_counts_them(small, monkeypatch):
    """Per token of the text: the end of a text, which a language model hardly doubts, is not one of them."""
    root, lm, data = small
    control = dglm.fit(root, lm=lm, data=data, **TINY)
    held = stage(root, embeddings.encode, TINY["encode"], lm=lm, data=data)
    _, _, tokenizer = opened = open_lm(lm)

    def complete(*given, **options):
        tokens = [*tokenizer.encode_after(["good"], [" day"])[0], tokenizer.ends[0]]
        return [[{"prompt": p, "text": " day", "tokens": tokens} for p in given[3]]]

    monkeypatch.setattr(reconstruct.sampling, "complete", complete)
    done = stage(root, reconstruct.reconstruct, dict(latent="none"), lm=lm, control=control, latents=held)
    heads = [p["prompt"] for p in held.rows("pieces.jsonl")]
    nats, tokens = evaluation.LMScorer(*opened)(heads, [" day"] * len(heads))
    found = {m["name"]: m["value"] for m in done.metrics()}["perplexity_pooled"]
    assert found == pytest.approx(np.exp(nats.sum() / tokens.sum()), rel=1e-5)


def test_encoding_goes_on_where_it_stopped(small, monkeypatch):
    root, lm, data = small
    real, seen = embeddings.embedder(lm, None), []

    class Failing:
        version = real.version

        def __init__(self, after):
            self.left = after

        def __call__(self, texts):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            seen.extend(texts)
            return real(texts)

    monkeypatch.setattr(embeddings, "_PART", 5)
    options = dict(words=1, new=4, seed=3)
    monkeypatch.setattr(embeddings, "embedder", lambda *a: Failing(4))
    with pytest.raises(KeyboardInterrupt):
        stage(root, embeddings.encode, options, lm=lm, data=data)
    monkeypatch.setattr(embeddings, "embedder", lambda *a: Failing(99))
    done = stage(root, embeddings.encode, options, lm=lm, data=data)
    rows = done.rows("pieces.jsonl")
    assert len(seen) == 2 * len(rows)  # no text twice
    x, contexts = embeddings.arrays(done)
    np.testing.assert_allclose(x, real([r["continuation"] for r in rows]), atol=1e-6)
    np.testing.assert_allclose(contexts, real([r["prompt"] for r in rows]), atol=1e-6)


def test_attributes_without_both_labels_are_named_before_a_network_is_trained(small, tmp_path):
    _, lm, data = small
    with pytest.raises(InputError, match="stars"):
        dglm.fit(tmp_path, lm=lm, data=data, **TINY, attributes=dict(stars=dict(field="stars")))
    assert not [*tmp_path.glob("*prompter*"), *tmp_path.glob("*denoiser*")]


def test_bad_input_is_one_sentence(small):
    root, lm, data = small
    with pytest.raises(InputError, match="weights names the attribute 'food'"):
        dglm.fit(root, lm=lm, data=data, **TINY, weights=dict(food=1.0))
    with pytest.raises(InputError, match=r"'stars' of .* none of the 12 texts has a label"):
        dglm.fit(root, lm=lm, data=data, **TINY, attributes=dict(stars=dict(field="stars")))
    with pytest.raises(InputError, match="1 distinct value"):
        dglm.fit(root, lm=lm, data=data, **TINY, attributes=dict(long=dict(words=50)))
    with pytest.raises(InputError, match="no regular expression"):
        dglm.fit(root, lm=lm, data=data, **TINY, attributes=dict(odd=dict(pattern="(")))
    with pytest.raises(InputError, match="choose a divisor of 28"):
        latent_diffusion.network(7, **NET | dict(pseudo_tokens=5))
    control = dglm.init(LM, jax.random.key(0), latent=4, denoiser=NET, prompter=NET | dict(length=2))
    with pytest.raises(InputError, match="width 6, but the denoiser reads embeddings of width 4"):
        control.latent(prompts(1, {"context": jnp.zeros((1, 6))}))
    with pytest.raises(InputError, match="for each row"):
        control.latent(prompts(1))
    fitted = dglm.fit(root, lm=lm, data=data, **TINY)
    probe = next(root.glob("embeddings.probe-*"))
    with pytest.raises(InputError, match="latents of the same encoder"):
        coefficients(Artifact(probe, ""), "another@1")
    spec = json.loads((fitted.path / "spec.json").read_text())
    other = fitted.path.with_name("other")
    other.mkdir()
    (other / "spec.json").write_text(json.dumps(spec | {"version": "another@1"}))
    with pytest.raises(InputError, match="restore that encoder, or fit"):
        dglm.conditions(Artifact(other, ""), lm, ["good"])
    short = root / "short.jsonl"
    short.write_text('{"text": "one"}\n')
    words = stage(root, sources.load_data, dict(source=f"jsonl:{short}", split="all"))
    with pytest.raises(InputError, match="no text long enough"):
        stage(root, embeddings.encode, {}, lm=lm, data=words)
