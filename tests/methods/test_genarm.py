"""GenARM: three tokens by hand, any target is reached, the reward that the loss finds, pairs, fits, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods, tree
from ctg_jax.controls.streams import Stream
from ctg_jax.decode import loop
from ctg_jax.learn import preferences
from ctg_jax.methods import genarm
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.record import record
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import judges, sources
from ctg_jax.types import InputError

WORLD, WIDER = worlds.Bigram(), worlds.Bigram(vocab=4)
P, A, B = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.4, 0.4])
BASE, ONE, OTHER = (worlds.table([row] * 3) for row in (P, A, B))
HP = dict(adapter=dict(rank=2), training=dict(steps=2, batch=4, tokens=16, warmup=1))


def built(streams, alpha=1.0, share=(1.0,), **names):
    return genarm.GenArm(tuple(streams), jnp.asarray(alpha, jnp.float32), jnp.asarray(share, jnp.float32), **names)


def next_token(control, cond=None, rows=1):
    prompts = worlds.prompts([[0]] * rows, cond=cond)
    z = loop.forward(WORLD, BASE, prompts, jnp.zeros((rows, 1), jnp.int32), control)
    return np.asarray(jax.nn.softmax(z[:, 0]))


def test_three_tokens_by_hand():
    one, two = Stream(ONE, lm=WORLD), Stream(OTHER, lm=WORLD)
    np.testing.assert_allclose(next_token(built([one])), [(0.73171, 0.21951, 0.04878)], atol=1e-5)
    both = built([one, two], share=(0.5, 0.5))
    np.testing.assert_allclose(next_token(both), [(0.54617, 0.32770, 0.12613)], atol=1e-5)
    np.testing.assert_allclose(next_token(genarm.neutral(both)), [P], rtol=1e-6)
    # Each row has a strength and a mixture of its own.
    cond = {"much": jnp.array([0.0, 1.0, 1.0]), "mix": jnp.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])}
    rows = next_token(built([one, two], share=(0.0, 0.0), shares="mix", cond="much"), cond, rows=3)
    np.testing.assert_allclose(rows, [P, (0.73171, 0.21951, 0.04878), (0.54617, 0.32770, 0.12613)], atol=1e-5)


def test_tokens_that_the_base_lacks_are_left_out():
    wide = worlds.table([[0.3, 0.15, 0.05, 0.5]] * 4)  # .6, .3, .1 on the base's tokens
    np.testing.assert_allclose(next_token(built([Stream(wide, lm=WIDER)])), [(0.73171, 0.21951, 0.04878)], atol=1e-5)


def test_the_product_is_normalised_at_every_step_and_any_target_is_reached():
    key = jax.random.key(3)
    base, target = (np.asarray(jax.random.dirichlet(k, jnp.ones(3), (3,))) for k in jax.random.split(key))
    alpha = 2.0
    ratio = (target / base) ** (1 / alpha)
    reward = Stream(worlds.table(ratio / ratio.sum(1, keepdims=True)), lm=WORLD)
    found = worlds.probabilities(WORLD, worlds.table(base), [0], 3, built([reward], alpha))
    expected = worlds.probabilities(WORLD, worlds.table(target), [0], 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def pair_rows(better, worse):
    rows = worlds.written([0], np.array(better), rejected=jnp.array(worse))
    return rows | {"rejected_written": jnp.ones_like(rows["written"])}


def test_the_loss_by_hand():
    """Sums over tokens: the better text has twice the log-likelihood of one token, and beta scales the difference."""
    change = genarm.init(WORLD, jax.random.key(0), adapter={"kind": "full"}).rewards[0].control
    keys = jax.random.split(jax.random.key(0), 1)
    rows = pair_rows([[0, 0]], [[2, 1]])
    gap = 2 * np.log(0.5) - np.log(0.2 * 0.3)
    out = genarm.loss(WORLD, beta=0.7)(change, {"params": BASE}, rows, keys)
    np.testing.assert_allclose(out.total, np.log1p(np.exp(-0.7 * gap)), rtol=1e-5)
    # One nat apart, with the weight of the authors' code.
    out = genarm.loss(WORLD, beta=0.05 / gap)(change, {"params": BASE}, rows, keys)
    np.testing.assert_allclose(out.total, 0.66846, atol=1e-5)
    rows["rejected_written"] = jnp.array([[True, False]])
    out = genarm.loss(WORLD, beta=1.0)(change, {"params": BASE}, rows, keys)
    np.testing.assert_allclose(out.total, np.log1p(np.exp(-(2 * np.log(0.5) - np.log(0.2)))), rtol=1e-5)


def test_the_loss_finds_the_reward_of_its_pairs():
    """Pairs of single tokens, as often as the Bradley-Terry model of a reward says: beta log π is the reward and a
    constant."""
    reward, beta = np.array([0.8, 0.0, -0.5]), 0.5
    count = 400
    better, worse = [], []
    for i in range(3):
        for j in range(i):
            wins = round(count / (1 + np.exp(reward[j] - reward[i])))
            better += [[i]] * wins + [[j]] * (count - wins)
            worse += [[j]] * wins + [[i]] * (count - wins)
    change = genarm.init(WORLD, jax.random.key(0), adapter={"kind": "full"}).rewards[0].control
    rows = pair_rows(better, worse)
    objective = genarm.loss(WORLD, beta=beta)
    change, _ = worlds.trained(objective, change, {"params": BASE}, [rows] * 200, rate=5e-2, trained="changes/.*")
    found = beta * np.log(worlds.probabilities(WORLD, BASE, [0], 1, change))
    np.testing.assert_allclose(found - found.mean(), reward - reward.mean(), atol=5e-3)


def test_ranked_pairs_by_hand():
    better, worse = preferences.ranked([3, 1, 2, 0, 2, 5, 5], [0, 0, 0, 0, 0, 1, 1])
    assert (better.tolist(), worse.tolist()) == ([0, 2], [3, 1])
    with pytest.raises(InputError, match="No prompt has two samples of different reward"):
        preferences.ranked([1, 1, 2], [0, 0, 1])
    with pytest.raises(InputError, match="reward 1 is nan"):
        preferences.ranked([1, np.nan], [0, 0])


def test_fit_learns_a_model_for_each_reward(small):
    root, lm, data = small
    options = {"kind": "function", "function": "configs.reward:dice", "version": "1"}
    rewards = [stage(root, judges.fit_judge, options | {"name": name}) for name in ("zeal", "calm")]
    explore = dict(n=4, max_new=5, batch=16)
    fitted = genarm.fit(root, lm=lm, data=data, rewards=rewards, explore=explore, share=[0.8, 0.2], **HP)
    model, params, _ = open_lm(lm)
    control = methods.load(fitted, model)
    assert control.share.tolist() == pytest.approx([0.8, 0.2]) and len(control.rewards) == 2
    assert tree.size_bytes(control) < 0.5 * tree.size_bytes(params)  # no weights of the base
    z, found = (
        loop.forward(model, params, worlds.prompts([[1, 2]]), jnp.array([[3, 4]]), *c) for c in ((), (control,))
    )
    # `calm` ranks as `zeal` does, so the two models are one.
    r = loop.forward(model, params, worlds.prompts([[1, 2]]), jnp.array([[3, 4]]), control.rewards[1].control)
    np.testing.assert_allclose(found, z + jax.nn.log_softmax(r), atol=1e-4)


def test_fit_on_pairs_of_people_with_a_small_model(small, tmp_path):
    root, lm, _ = small
    rows = [
        {"text": "so", "chosen": " good", "rejected": " bad day"},
        {"text": "nice", "chosen": " fun", "rejected": ""},
    ]
    path = tmp_path / "pairs.jsonl"

    def data(records):
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return stage(root, sources.load_data, dict(source=f"jsonl:{path}", split="all"))

    made = data(rows * 4)
    model, params, tokenizer = open_lm(lm)
    first = preferences.given(made, tokenizer, 16)[0]
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    assert first["tokens"] == tokenizer.encode_after(["so"], [" good"])[0] + end
    small_lm = dict(width=8, depth=1, heads=2, training=dict(steps=2, batch=4, tokens=16, warmup=1))
    control = methods.load(genarm.fit(root, lm=lm, data=made, small=small_lm, alpha=0.5, **HP), model)
    stream = control.rewards[0]
    assert stream.lm.width == 8
    prompts, completion = worlds.prompts([[1, 2]]), jnp.array([[3, 4]])
    r = loop.forward(stream.lm, stream.params, prompts, completion, stream.control)
    z, found = (loop.forward(model, params, prompts, completion, *c) for c in ((), (control,)))
    np.testing.assert_allclose(found, z + 0.5 * jax.nn.log_softmax(r), atol=1e-4)
    with pytest.raises(InputError, match=r"Record 0 of load_data-[0-9a-f]+ has no text 'rejected'"):
        genarm.fit(root, lm=lm, data=data([{"text": "so", "chosen": " a"}]), **HP)


def test_a_model_of_the_size_of_the_paper_fits_on_paper():
    sizes = dict(vocab=32000, depth=2, context=2048, dtype="bfloat16", param_dtype="bfloat16")
    small = Transformer.llama(width=4096, heads=32, kv_heads=32, mlp_width=11008, **sizes)
    large = Transformer.llama(width=8192, heads=64, kv_heads=8, mlp_width=22016, **sizes)
    for lm, settings in ((small, {}), (large, dict(small=record(small), models=2))):
        out = worlds.written_on_paper(lm, lambda key, lm=lm, s=settings: genarm.init(lm, key, **s))
        assert out.tokens.shape == (1, 2)


def test_bad_input_raises_one_sentence(small):
    key = jax.random.key(0)
    lm = worlds.tiny()
    for settings, words in [
        (dict(models=0), "models is 0"),
        (dict(alpha=float("inf")), "alpha is inf"),
        (dict(models=2, share=(1.0,)), r"share is \[1.0\], expected 2 finite numbers"),
        (dict(share=(float("nan"),)), r"share is \[nan\]"),
        (dict(small=record(worlds.tiny(vocab=9))), "has a vocabulary of 9 tokens and the base model one of 11"),
        (dict(adapter={"kind": "prompt"}), "kind is 'prompt'"),
    ]:
        with pytest.raises(InputError, match=words):
            genarm.init(lm, key, **settings)
    with pytest.raises(InputError, match="beta is 0, expected a positive number"):
        genarm.loss(lm, beta=0)
    one = Stream(ONE, lm=WORLD)
    with pytest.raises(InputError, match=r"prompts.cond\['mix'\] has shape \(1, 2\), expected \(1, 1\)"):
        next_token(built([one], shares="mix"), {"mix": jnp.ones((1, 2))})
    with pytest.raises(InputError, match="Reward model 1 has a vocabulary of 2 tokens"):
        next_token(built([Stream(worlds.table([[0.5, 0.5]] * 2), lm=worlds.Bigram(vocab=2))]))
