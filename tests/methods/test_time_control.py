"""Time Control: which latent a token gets, plans that are drawn and given, what a plan is worth, the fit, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.controls.vectors import SoftPrompt
from ctg_jax.data.sentences import sentences_of
from ctg_jax.decode import loop
from ctg_jax.learn import sentence_bridge
from ctg_jax.methods import latent_steer, time_control
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sources
from ctg_jax.types import InputError

LM = worlds.tiny()


def plan(**settings):
    control = time_control.init(LM, jax.random.key(0), kind="frozen", **settings)
    return control.replace(project=jax.random.normal(jax.random.key(1), control.project.shape))


def test_each_latent_is_held_for_its_span_and_the_last_one_to_the_end():
    control = plan(latent=2, sentences=3, span=2, reads="plan")
    z = jnp.array([[[1.0, 0], [0, 1], [2, 2]]] * 2)
    batch = worlds.prompts([[1, 2, 3], [4]], cond={"plan": z})
    before = SoftPrompt(jnp.ones((2, LM.width)))
    for scale, more in ((1.0, 0), (jnp.array([2.0, 3.0]), 0), (1.0, 2)):
        state = control.replace(scale=jnp.asarray(scale)).init(batch, 8)
        state = control.began(state, jnp.array([3, 1]) + more, jnp.array([more, more]))
        pos = jnp.tile(jnp.arange(8 + more), (2, 1))
        push = control.hidden(jnp.zeros((2, 8 + more, LM.width)), 0, pos, state)
        wanted = np.asarray(z[0] @ control.project.T)[[0, 0, 1, 1, 2, 2, 2, 2]]
        strength = np.broadcast_to(np.asarray(scale), 2)[:, None, None]
        np.testing.assert_allclose(push[:, more:], strength * wanted[None], rtol=1e-5)
        np.testing.assert_array_equal(push[:, :more], 0)
        np.testing.assert_array_equal(control.hidden(push, 1, pos, state), push)
        np.testing.assert_array_equal(control.hidden(push, jnp.int32(2), pos, state), push)
    alone = worlds.where_it_acts(LM, batch, 2, control)
    np.testing.assert_array_equal(alone, worlds.where_it_acts(LM, batch, 2, control, before))
    assert alone[0].sum() == 3 + 1 + 2 * 2 and not alone[1:].any()


def test_plans_are_drawn_from_the_densities_of_first_and_last_latents():
    control = plan(latent=1, sentences=3).replace(
        first=jnp.array([-1.0]), first_deviation=jnp.array([0.5]), last=jnp.array([3.0]),
        last_deviation=jnp.array([2.0]), variance=jnp.array([4.0]),
    )  # fmt: skip
    drawn = np.asarray(control.plan(worlds.prompts([[1]] * 8000)))[..., 0]
    np.testing.assert_allclose(drawn.mean(0), [-1, 1, 3], atol=0.1)
    # ¼ (.5² + 2²) + ½ · ½ · 4 in the middle
    np.testing.assert_allclose(drawn.var(0), [0.25, 2.0625, 4], rtol=0.06)
    given = control.replace(reads="plan")
    batch = worlds.prompts([[1]], cond={"plan": jnp.full((1, 5, 1), 7.0)})
    np.testing.assert_array_equal(given.plan(batch), jnp.full((1, 5, 1), 7.0))


def test_a_plan_that_stays_is_a_vector_at_the_embeddings():
    params, batch, text = worlds.lively(LM), worlds.prompts([[1, 2], [3]]), jnp.array([[4, 5, 6]] * 2)
    control = plan(latent=2, sentences=2, span=1, reads="plan")
    batch = batch.replace(cond={"plan": jnp.ones((2, 1, 2))})
    vector = latent_steer.init(LM, jax.random.key(0), site="embeddings").replace(z=control.project.sum(1))
    np.testing.assert_allclose(
        *(loop.forward(LM, params, batch, text, c) for c in (control, vector)), atol=1e-4, rtol=1e-4
    )


def test_what_a_plan_is_worth():
    """Sentences of two tokens that are 1 or 2 where the latent is −1, and 3 or 4 where it is 1: the loss given the plan
    falls to log 2, and that without it cannot be below ½ log 2 + ½ log 4 (the second token knows its sentence)."""
    draw = np.random.default_rng(0)
    kinds = draw.integers(0, 2, (120, 16, 3))
    tokens = 1 + 2 * np.repeat(kinds, 2, axis=2) + draw.integers(0, 2, (120, 16, 6))
    # The latent of the next token's sentence is needed where a sentence ends: the plan of a place looks one ahead.
    plans = 2.0 * np.repeat(kinds, 2, axis=2)[..., None] - 1
    batches = [
        worlds.written([0], t, plan=np.concatenate([p, p[:, -1:]], axis=1).astype(np.float32))
        for t, p in zip(tokens, plans)
    ]
    control = time_control.init(LM, jax.random.key(0), latent=1, sentences=7, span=1, kind="full", reads="plan")
    control = control.replace(project=0.02 * jax.random.normal(jax.random.key(1), control.project.shape))
    frozen, loss = {"params": LM.init(jax.random.key(0))}, time_control.loss(LM)
    learned, _ = worlds.trained(loss, control, frozen, batches, rate=2e-2, trained=r"project|delta/changes/.*")
    keys = jax.random.split(jax.random.key(0), 16)

    def nats(control):
        sums = [loss(control, frozen, batch, keys) for batch in batches[:10]]
        return sum(float(s.total) for s in sums) / sum(float(s.weight) for s in sums)

    assert np.log(2) - 0.01 < nats(learned) < np.log(2) + 0.15
    assert nats(learned.replace(scale=jnp.zeros(()))) > 1.5 * np.log(2) - 0.01
    assert float(learned.scale) == 1


@pytest.fixture(scope="module")
def documents(small):
    root = small[0]
    texts = ["Good fun. A nice day! So good?", "Bad. Awful day. Sad and bad. So sad.", "Too short. Left out."]
    (root / "documents.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return stage(root, sources.load_data, dict(source=f"jsonl:{root / 'documents.jsonl'}", split="all"))


TINY = dict(
    encoder=dict(latent=3, width=8, others=2, training=dict(steps=2, batch=2)),
    training=dict(steps=2, batch=2, tokens=24),
)


def test_fit(small, documents):
    root, lm, _ = small
    control = methods.load(time_control.fit(root, lm=lm, data=documents, **TINY), open_lm(lm)[0])
    assert control.sentences == 4 and control.reads is None and control.delta is not None
    found = stage(root, sentence_bridge.embed_sentences, {}, lm=lm, data=documents)
    records = found.rows("documents.jsonl")
    assert [r["start"] for r in records] == [0, 3] and records[0]["sentences"] == [
        "Good fun.",
        "A nice day!",
        "So good?",
    ]
    assert found.spec["left_out"] == 1
    tokenizer = open_lm(lm)[2]
    z = np.arange(7.0, dtype=np.float32)[:, None]
    rows = time_control.Written(records, z, tokenizer, 64)
    row = rows[1]
    assert tokenizer.decode([row["tokens"]])[0] == "Bad. Awful day. Sad and bad. So sad."
    said, n = np.asarray(row["plan"])[:, 0], len(tokenizer.encode_prompts([""])[0])
    assert len(said) == n + 64 and (np.diff(said) >= 0).all() and said[-1] == 6
    parts = [tokenizer.encode([t])[0] for t in ("Bad.", " Awful day.", " Sad and bad.", " So sad.")]
    assert control.span == round(rows.tokens / 7)
    np.testing.assert_array_equal(said[n:][: len(parts[0]) + 1], [3] * len(parts[0]) + [4])
    whole = len(jax.tree.leaves(control.delta))
    one = dict(variance="unit", span=5, adapter=dict(targets=".*/mlp/up/kernel"))
    again = time_control.fit(root, lm=lm, data=documents, sentences=dict(least=3), **one, **TINY)
    control = methods.load(again, open_lm(lm)[0])
    assert control.span == 5 and len(jax.tree.leaves(control.delta)) < whole
    np.testing.assert_array_equal(control.variance, np.ones(3))


def test_bad_input(small, documents):
    root, lm, data = small
    with pytest.raises(InputError, match=r"no document of .* has 3 sentences: give longer texts, or the list"):
        time_control.fit(root, lm=lm, data=data)
    for sentences in ("One. Two.", ["One.", 2]):
        with pytest.raises(InputError, match=r"a record has the sentences .*, expected a list of strings"):
            sentences_of(dict(text="One. Two.", sentences=sentences))
    with pytest.raises(InputError, match="least is 2, expected at least 3"):
        time_control.fit(root, lm=lm, data=documents, sentences=dict(least=2))
    with pytest.raises(InputError, match="variance is 'one', expected one of fitted, unit"):
        time_control.fit(root, lm=lm, data=documents, variance="one", **TINY)
    with pytest.raises(InputError, match="sentences is 1, span 12 and latent 16, expected at least 2, 1 and 1"):
        time_control.init(LM, jax.random.key(0), sentences=1)
    control = plan(latent=2, reads="plan")
    with pytest.raises(InputError, match=r"expected \[rows, sentences, 2\]: a latent for each sentence"):
        control.init(worlds.prompts([[1]], cond={"plan": jnp.zeros((1, 4, 3))}), 4)
    with pytest.raises(InputError, match="The plan has width 16, and the model 5"):
        batch = worlds.prompts([[1]], cond={"plan": jnp.zeros((1, 4, 2))})
        control.hidden(jnp.zeros((1, 1, 5)), 0, jnp.zeros((1, 1), int), control.init(batch, 4))


def test_the_sizes_of_the_paper_fit_on_paper():
    from configs.time_control import PAPER

    lm = Transformer.gpt2(vocab=50257, width=768, depth=2, heads=12, context=1024)
    out = worlds.written_on_paper(
        lm, lambda key: time_control.init(lm, key, latent=PAPER["encoder"]["latent"], sentences=20, kind="full")
    )
    assert out.tokens.shape == (1, 2)
