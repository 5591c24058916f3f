"""SoftSRV: mixtures by hand, one prompt is prompt tuning, learning what an example says, a fit, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.controls.vectors import SoftPrompt
from ctg_jax.data.messages import shown
from ctg_jax.decode import loop
from ctg_jax.methods import softsrv
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sampling, sources
from ctg_jax.types import InputError

LM = worlds.tiny()
PARAMS = worlds.lively(LM)
ROWS = [[1, 2, 3], [7, 5]]
COMPLETION = jnp.array([[1, 2], [3, 4]])


def scores(control, cond=None):
    return np.asarray(loop.score(LM, PARAMS, worlds.prompts(ROWS, cond=cond), COMPLETION, control))


def two(**more):
    """Two prompts of two vectors behind embeddings of width 2, far apart where the embedding is one of the axes."""
    control = softsrv.init(LM, jax.random.key(0), embedding=2, prompts=2, length=2)
    return control.replace(basis=50 * control.basis, **more)


def test_mixtures_by_hand():
    basis = jnp.asarray([[[1.0]], [[5.0]]])
    gate = {"kernel": jnp.array([[0.0, 0.0], [jnp.log(3.0), 0.0]]), "bias": jnp.zeros(2)}
    cond = {"example": jnp.array([[1.0, 0.0], [0.0, 1.0]])}  # odds of the second prompt: 3 and 1

    def mixed(scale):
        control = softsrv.Mixture(basis, gate, jnp.asarray(scale))
        return control.init(worlds.prompts(ROWS, cond=cond), 5)[:, 0, 0]

    np.testing.assert_allclose(mixed(1.0), [4, 3], atol=1e-6)
    np.testing.assert_allclose(mixed(0.0), [3, 3], atol=1e-6)
    np.testing.assert_allclose(mixed(2.0), [1 + 4 * 0.9, 3], atol=1e-6)  # odds 9
    np.testing.assert_allclose(mixed([0.0, 1.0]), [3, 3], atol=1e-6)


def test_embeddings_that_name_a_class_give_the_prompt_of_the_class_and_one_prompt_is_prompt_tuning():
    control = two(gate={"kernel": 1e3 * jnp.eye(2), "bias": jnp.zeros(2)})
    classes = scores(SoftPrompt(control.basis, choice="label"), {"label": jnp.array([1, 0])})
    found = scores(control, {"example": jnp.array([[0.0, 1.0], [1.0, 0.0]])})
    np.testing.assert_allclose(found, classes, atol=1e-5)
    other = scores(control, {"example": jnp.array([[1.0, 0.0], [0.0, 1.0]])})
    assert np.abs(other - found).max() > 0.05
    one = softsrv.init(LM, jax.random.key(0), embedding=2, prompts=1, length=3)
    any_ = {"example": jnp.array([[0.3, -2.0], [5.0, 1.0]])}
    np.testing.assert_allclose(scores(one, any_), scores(SoftPrompt(one.basis[0])), atol=1e-6)


def test_it_learns_to_write_what_the_embedding_says():
    """Half of the texts go on with 4 and half with 9: one prompt for all leaves log 2 nats, and two leave less."""
    tokens = jnp.asarray([[0, 4], [0, 9]] * 4)
    batch = {
        "tokens": tokens, "mask": jnp.ones(tokens.shape, bool), "ids": jnp.arange(8),
        "example": jnp.tile(jnp.eye(2), (4, 1)),
    }  # fmt: skip
    value, after = worlds.trained(softsrv.loss(LM), two(), {"params": PARAMS}, [batch] * 150, rate=0.3)
    assert float(after["loss"]) < 0.8 * np.log(2)
    assert np.abs(np.asarray(value.gate["kernel"] - two().gate["kernel"])).max() > 0.1


def test_a_fit_embeds_its_texts_and_reads_other_examples(small):
    root, lm, data = small
    fitted = softsrv.fit(root, lm=lm, data=data, prompts=3, length=2, training=dict(steps=2, batch=4, tokens=8))
    control = methods.load(fitted, open_lm(lm)[0])
    assert control.basis.shape == (3, 2, 16) and control.reads == "example"
    assert np.abs(control.gate["bias"]).max() <= 2.1e-3  # a hundredth of the rate of the prompts, 0.1
    records = [{"source": "good fun"}, {"reference": "good fun"}, {}]
    found = softsrv.conditions(fitted, lm, ["so", "bad", "good fun"], records)["example"]
    assert found.shape == (3, control.gate["kernel"].shape[1])
    np.testing.assert_allclose(found[0], found[2], atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    conversation = [{"role": "user", "content": "good fun"}]
    told = softsrv.conditions(fitted, lm, [conversation, "so"], [{"source": None}] * 2)["example"]
    as_read = softsrv.conditions(fitted, lm, [shown(conversation), "so"], [{}] * 2)["example"]
    np.testing.assert_array_equal(told, as_read)
    with pytest.raises(InputError, match="prompt 2 has 7 as its source, expected the text of an example"):
        softsrv.conditions(fitted, lm, ["so", "so"], [{}, {"source": 7}])
    path = root / "examples.jsonl"
    path.write_text('{"text": "so", "source": "good fun"}\n{"text": "so", "source": "bad sad"}\n')
    prompts = stage(root, sources.load_data, dict(source=f"jsonl:{path}", split="all"))
    drawn = stage(
        root, sampling.sample, dict(n=1, max_new=3, strengths=[None]), lm=lm, prompts=prompts, controls=[fitted]
    )
    assert [row["source"] for row in drawn.rows("samples.jsonl")] == ["good fun", "bad sad"]


def test_bad_input_raises_one_sentence(small):
    root, lm, data = small
    with pytest.raises(InputError, match="embedding, prompts and length are 4, 0, 20: expected at least 1"):
        softsrv.init(LM, jax.random.key(0), embedding=4, prompts=0)
    with pytest.raises(InputError, match=r"prompts.cond\['example'\] has shape \(2, 3\), expected \(2, 2\)"):
        loop.generate(LM, PARAMS, worlds.prompts(ROWS, cond={"example": jnp.ones((2, 3))}), two())
    with pytest.raises(InputError, match=r"reads prompts.cond\['example'\] for each row"):
        loop.generate(LM, PARAMS, worlds.prompts(ROWS), two())
    with pytest.raises(InputError, match="which matches no record"):
        softsrv.fit(root, lm=lm, data=data, where={"label": 7})
