"""MDLM: what it learns in a world small enough to enumerate, how it completes prompts, its stages, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods, rng
from ctg_jax.decode import strategies
from ctg_jax.learn import masked_classifier
from ctg_jax.learn.diffusion_losses import masked_loss
from ctg_jax.learn.whole_rows import start_token
from ctg_jax.methods import mdlm
from ctg_jax.models import masked
from ctg_jax.run import checkpoint, stage
from ctg_jax.run.stage import open_lm
from ctg_jax.stages import sampling
from ctg_jax.types import InputError, Sampling

LM = worlds.tiny(vocab=7)
SHAPE = dict(width=16, depth=1, heads=2, length=12, eos=0)
ROWS = [[1, 2, 3], [4], [5, 6], [1, 1, 1, 1]]
SAMPLING = Sampling(max_new=6, eos=(0,), pad=0)
FIT = dict(
    width=16,
    depth=1,
    heads=2,
    length=16,
    objective=dict(draws=2),
    training=dict(steps=4, batch=4, warmup=1, save_every=2),
)


def lively(seed=1, **more):
    """Random and loud, with a classifier."""
    control = mdlm.init(LM, jax.random.key(0), classes=2, **SHAPE, **more)
    kernel = jax.random.normal(jax.random.key(seed), control.guide["kernel"].shape)
    params = worlds.lively(control.net, factor=6)
    return control.replace(params=params, guide=control.guide | {"kernel": kernel})


def test_a_small_network_learns_a_distribution():
    """Its bound comes down to the entropy, and its samples have the distribution."""
    world, n = worlds.Bigram(3), 3
    truth = worlds.probabilities(world, worlds.table([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.4, 0.5, 0.1]]), [0], n)
    truth = truth / truth.sum()
    every = worlds.sequences(world, n)
    control = mdlm.init(world, jax.random.key(0), width=16, depth=1, heads=2, length=n)
    r = np.random.default_rng(0)
    batches = []
    for _ in range(300):
        tokens = jnp.asarray(every[r.choice(len(every), 64, p=truth)])
        batches.append({"tokens": tokens, "mask": tokens >= 0, "ids": jnp.arange(64, dtype=jnp.int32)})
    params, _ = worlds.trained(masked_loss(control.net, 0), control.params, {}, batches)
    recover = jax.jit(functools.partial(masked.recovery, control.net, params))
    entropy = -truth @ np.log(truth)
    bound, keys = worlds.masked_bound(recover, every, 3), jax.random.split(jax.random.key(2), 4096)
    assert entropy - 1e-5 < truth @ bound < entropy + 0.05
    some = r.choice(len(every), 4096, p=truth)
    off = jax.jit(lambda: masked.nelbo(recover, jnp.asarray(every[some]), keys, 3, draws=16))() - bound[some]
    assert abs(off.mean()) < 4 * off.std() / 64 < 0.06
    blank = jnp.zeros((4096, n), jnp.int32)
    found, _ = mdlm.infill(control.replace(params=params), blank, blank > 0, keys)
    share = np.bincount(np.asarray(found) @ 3 ** np.arange(n)[::-1], minlength=27) / 4096
    assert np.abs(share - truth).sum() / 2 < 0.08


def test_the_nats_of_a_text_are_those_of_its_whole_row():
    """Padding becomes end tokens, which count, while the weight is the number of tokens of the text."""
    control = lively()
    text = jnp.array([[1, 2, 0] + [5] * 9, [3] * 12])
    mask = jnp.array([[True] * 3 + [False] * 9, [False] * 12])  # the second row only fills up the batch
    keys = jax.random.split(jax.random.key(0), 2)
    found = jax.jit(masked_loss(control.net, 0))(control.params, {}, {"tokens": text, "mask": mask}, keys)
    row = jnp.where(mask, text, 0)
    recover = functools.partial(masked.recovery, control.net, control.params)
    each = jax.jit(lambda: masked.nelbo(recover, row, keys, control.mask, draws=4))()
    assert float(found.weight) == 3 and float(found.total) == pytest.approx(float(each[0]), rel=1e-5)


def test_strength_zero_is_no_guidance_to_the_bit_and_a_strength_guides():
    control, prompts = lively(), worlds.prompts(ROWS * 16)
    bare = control.replace(guide={"kernel": jnp.zeros((0, 48)), "bias": jnp.zeros(0)})
    plain = strategies.run(LM, {}, prompts, bare, SAMPLING)
    zero = strategies.run(LM, {}, prompts, control, SAMPLING)
    np.testing.assert_array_equal(plain.tokens, zero.tokens)
    # A network without opinions and a classifier that reads the embeddings alone, in which first order is exact.
    lowest = 30 * jax.random.normal(jax.random.key(1), (2, 16))
    guide = control.guide | {"kernel": jnp.pad(lowest, ((0, 0), (0, 32)))}
    control = control.replace(params=control.net.init(jax.random.key(0)), guide=guide)
    share, keys = {}, rng.per_example(jax.random.key(4), jnp.arange(256))
    given = jnp.broadcast_to(jnp.arange(12)[None] % 5 == 2, (256, 12))
    judge = jax.jit(
        lambda rows: masked.classify(control.net, control.params, guide, control.params["embed"]["tokens"][rows])
    )
    for strength in (-2.0, 0.0, 2.0):
        at = methods.with_strength(control, strength)
        rows, _ = mdlm.infill(at, jnp.full((256, 12), 5), given, keys)
        assert bool(jnp.all(jnp.where(given, rows == 5, rows < LM.vocab)))
        share[strength] = float(jnp.mean(jnp.exp(judge(rows)[0][:, 1])))
    assert share[-2.0] < share[0.0] - 0.05 < share[0.0] + 0.05 < share[2.0]


def test_a_fitted_classifier_beats_chance_and_guides():
    """Texts of class 1 hold token 5 more often, those of class 0 token 3; the network itself has no opinion."""
    control = mdlm.init(LM, jax.random.key(0), classes=2, **SHAPE)
    r, n = np.random.default_rng(0), 240
    labels = np.arange(n) % 2
    words = np.where(r.uniform(size=(n, 12)) < 0.5, np.where(labels == 1, 5, 3)[:, None], r.integers(1, 7, (n, 12)))
    part = [slice(at, at + 48) for at in range(0, n, 48)]
    batches = [
        {
            "tokens": words[p],
            "mask": np.ones((48, 12), bool),
            "label": labels[p],
            "ids": np.uint32(np.arange(n)[p]),
        }
        for p in part
    ]
    options = masked_classifier.Regression(views=3, inverse_l2=1.0, heldout=0.2, margin=0.1)
    x, found = masked_classifier.read(control.net, control.params, batches, 0, options, 0)
    assert x.shape == (3, n, 48) and np.array_equal(found, labels) and np.abs(x[0] - x[1]).max() > 0
    guide, figures = masked_classifier.fit(x, found, options, 0)
    assert figures["accuracy"] > 0.7 and figures["heldout"] == 48 and figures["chance"] < 0.65
    shuffled = r.permutation(labels)
    with pytest.raises(InputError, match="it would guide nowhere"):
        masked_classifier.fit(x, shuffled, options, 0)
    with pytest.raises(InputError, match="expected views and batch from 1, limit from 0"):
        masked_classifier.Regression(limit=-1)
    keys, nothing = rng.per_example(jax.random.key(4), jnp.arange(128)), jnp.zeros((128, 12), bool)
    share = {}
    for strength in (-8.0, 0.0, 8.0):
        at = methods.with_strength(control.replace(guide=guide), strength)
        rows, _ = mdlm.infill(at, jnp.zeros((128, 12), jnp.int32), nothing, keys)
        share[strength] = float(jnp.mean(rows == 5)), float(jnp.mean(rows == 3))
    assert share[8.0][0] > 2 * share[0.0][0] and share[-8.0][1] > 2 * share[0.0][1]


@pytest.mark.parametrize("by", ["time", "confidence", "uncertain"])
def test_a_row_alone_is_the_row_in_its_batch_whatever_its_padding(by):
    control = methods.with_strength(lively(reveal=6, block=4, final="argmax", by=by), 1.0)
    prompts = worlds.prompts(ROWS, length=6)
    batch = strategies.run(LM, {}, prompts, control, SAMPLING)
    alone = worlds.prompts([ROWS[1]])
    out = strategies.run(LM, {}, alone.replace(keys=prompts.keys[1:2]), control, SAMPLING)
    np.testing.assert_array_equal(out.tokens[0], batch.tokens[1])


def test_an_empty_prompt_gives_no_token_of_a_row():
    """Token 0 stands for it; a row of training that begins with 0 holds nothing else."""
    prompts = worlds.prompts([[0], [0, 1], [4], [0]] * 4, length=3)
    blank = jnp.zeros((16, 12), jnp.int32)
    for start, given in ((0, 0), (None, 1)):
        control = lively(start=start)
        out = strategies.run(LM, {}, prompts, control, SAMPLING)
        rows, _ = mdlm.infill(control, blank, blank.at[:, :given].set(1) > 0, prompts.keys)
        wanted = jnp.where(out.mask, rows[:, given:][:, :6], 0)
        np.testing.assert_array_equal(out.tokens[::4], wanted[::4])
        plain = strategies.run(LM, {}, prompts, control.replace(start=None), SAMPLING)
        np.testing.assert_array_equal(out.tokens[1::4], plain.tokens[1::4])
        np.testing.assert_array_equal(out.tokens[2::4], plain.tokens[2::4])


def test_completions_end_at_the_first_end_token():
    prompts = worlds.prompts(ROWS * 16)
    out = strategies.run(LM, {}, prompts, lively(), SAMPLING)
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    assert tokens.shape == (64, 6) and tokens.max() < LM.vocab and not np.any(out.logp)
    ended = 0
    for row, real in zip(tokens, mask):
        n = real.sum()
        assert real[:n].all() and not (row[: n - 1] == 0).any() and not row[n:].any()
        ended += n < 6
        assert n == 6 or row[n - 1] == 0
    assert 0 < ended < 64
    greedy = Sampling(max_new=6, eos=(0,), greedy=True)
    assert not np.array_equal(strategies.run(LM, {}, prompts, lively(), greedy).tokens, tokens)


def test_stages_go_on_where_they_were_cut_short_and_their_control_writes(small, monkeypatch, tmp_path):
    _, lm, data = small
    texts = dict(source=str(data.spec["config"]["source"]), split="all")
    more = dict(heldout=texts, guide=dict(regression=dict(margin=-1.0, batch=4)))
    whole = mdlm.fit(tmp_path / "a", lm=lm, data=data, **FIT, **more)

    def killed(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "prune", killed)
    with pytest.raises(KeyboardInterrupt):
        mdlm.fit(tmp_path / "b", lm=lm, data=data, **FIT, **more)
    monkeypatch.undo()
    assert list(tmp_path.glob("b/mdlm-*/steps/*")) and not list(tmp_path.glob("b/mdlm-*/DONE"))
    again = mdlm.fit(tmp_path / "b", lm=lm, data=data, **FIT, **more)
    jax.tree.map(np.testing.assert_array_equal, whole.load(), again.load())
    steps = stage.read_jsonl(next(tmp_path.glob("b/mdlm-*")) / "metrics.jsonl")
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    (figures,) = again.metrics()
    assert 0 <= figures["accuracy"] <= 1 and figures["heldout"] == 1
    rows = {r["name"]: r for r in stage.read_jsonl(next(tmp_path.glob("b/mdlm.bound-*")) / "metrics.jsonl")}
    assert rows["mdlm"]["tokens"] == rows["lm"]["tokens"] > 0 and rows["lm"]["exact"] and not rows["mdlm"]["exact"]
    assert rows["mdlm"]["perplexity"] > 1 and rows["lm"]["texts"] == len(data.rows("data.jsonl"))

    control = methods.load(again, open_lm(lm)[0])
    assert control.start == start_token(open_lm(lm)[2]) is not None
    assert np.any(control.guide["kernel"]) and not (again.path / "steps").exists()
    out = stage.stage(
        tmp_path / "b",
        sampling.sample,
        dict(n=2, max_new=3, batch=4, strengths=[1.0]),
        lm=lm,
        prompts=data,
        controls=[again],
    )
    texts = out.rows("samples.jsonl")
    assert len(texts) == 2 * len(data.rows("data.jsonl")) and all(
        r["logp"] == 0 and len(r["tokens"]) <= 3 for r in texts
    )


def test_the_size_of_the_paper_on_paper():
    """12 layers of width 768 over rows of 1,024 tokens of GPT-2's vocabulary and the mask."""
    lm = worlds.Transformer.gpt2()
    paper = dict(width=768, depth=12, heads=12, length=1024, eos=50256, classes=2)
    control = jax.eval_shape(lambda key: mdlm.init(lm, key, **paper), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(control.params)) == 124_439_808 + 768
    prompts = jax.eval_shape(lambda: worlds.prompts([[1] * 8] * 2))
    sample = Sampling(max_new=64, eos=(50256,))
    out = jax.eval_shape(lambda p, c: mdlm.Masked.strategy(lm, {}, p, c, sample), prompts, control)
    assert out.tokens.shape == (2, 64)


def test_bad_input(small, tmp_path):
    _, lm, data = small
    with pytest.raises(InputError, match="final is 'best', expected one of draw, argmax"):
        mdlm.init(LM, jax.random.key(0), final="best")
    with pytest.raises(InputError, match="by is 'size', expected one of time, left, right"):
        mdlm.init(LM, jax.random.key(0), by="size")
    with pytest.raises(InputError, match="width is 10, which heads=4 does not divide"):
        mdlm.init(LM, jax.random.key(0), width=10)
    with pytest.raises(InputError, match="reveal=-1"):
        mdlm.init(LM, jax.random.key(0), reveal=-1)
    with pytest.raises(InputError, match="target is 2, expected a class from 0 to 1"):
        mdlm.init(LM, jax.random.key(0), classes=2, target=2)
    control, prompts = mdlm.init(LM, jax.random.key(0), **SHAPE), worlds.prompts(ROWS)
    with pytest.raises(InputError, match="longest prompt has 4 tokens and max_new is 9, but rows of 12"):
        strategies.run(LM, {}, prompts, control, Sampling(max_new=9))
    with pytest.raises(InputError, match="no classifier was fitted"):
        strategies.run(LM, {}, prompts, methods.with_strength(control, 1.0), SAMPLING)
    with pytest.raises(InputError, match="control has 7 tokens and the model 11"):
        strategies.run(worlds.tiny(), {}, prompts, control, SAMPLING)
    network = stage.stage(tmp_path, mdlm.mdlm, FIT | dict(training=dict(FIT["training"], steps=1)), lm=lm, data=data)
    with pytest.raises(InputError, match="is 1, but there are 1 classes"):
        stage.stage(tmp_path, mdlm.classifier, dict(classes=1), lm=lm, data=data, network=network)
    with pytest.raises(InputError, match="held-out texts, where always naming their most frequent class"):
        stage.stage(tmp_path, mdlm.classifier, dict(regression=dict(margin=0.9)), lm=lm, data=data, network=network)


def test_labels_without_a_text_are_named_before_a_network_is_trained(small, tmp_path):
    _, lm, data = small
    with pytest.raises(InputError, match="labelled texts has the label 2, but a classifier of 3"):
        mdlm.fit(tmp_path, lm=lm, data=data, guide=dict(classes=3), **FIT)
    assert not list(tmp_path.glob("mdlm*"))
