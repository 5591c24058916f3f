"""Fine-tuning: changes of weights by hand, soft prompts per row, and training that learns only the control."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods, tree
from ctg_jax.controls.delta import Delta
from ctg_jax.controls.vectors import SoftPrompt, soft_prompt
from ctg_jax.decode import loop
from ctg_jax.learn import train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.methods import finetune
from ctg_jax.run.session import Session
from ctg_jax.run.stage import open_lm
from ctg_jax.types import InputError

LM = worlds.tiny()
PARAMS = worlds.lively(LM)
PROMPTS = worlds.prompts([[1, 2, 3], [4, 5]])
COMPLETION = jnp.array([[1, 2], [3, 4]])


def test_lora_by_hand():
    """W + 2 · b a, with b = (1, 2) and a = (3, 4, 5) in one layer of a 2 x 3 matrix."""
    params = {"layers": {"w": {"kernel": jnp.zeros((1, 2, 3))}}}
    change = {"a": jnp.array([[[3.0, 4.0, 5.0]]]), "b": jnp.array([[[1.0], [2.0]]])}
    control = Delta({"layers/w/kernel": change}, jnp.float32(2))
    wanted = [[6, 8, 10], [12, 16, 20]]
    assert control.weights(params)["layers"]["w"]["kernel"][0].tolist() == wanted
    apart = {"layers": tree.unstack(params["layers"])}
    assert control.weights(apart)["layers"][0]["w"]["kernel"].tolist() == wanted


@pytest.mark.parametrize("kind", ["lora", "full", "prompt"])
def test_a_new_control_has_the_shapes_it_says(kind):
    control = finetune.init(LM, jax.random.key(0), kind=kind, rank=3, length=4)
    if kind == "prompt":
        assert control.vectors.shape == (4, 16)
        assert finetune.neutral(control) is None
        return
    base = loop.forward(LM, PARAMS, PROMPTS, COMPLETION)
    np.testing.assert_array_equal(loop.forward(LM, PARAMS, PROMPTS, COMPLETION, control), base)
    if kind == "lora":
        assert sorted(control.changes) == [f"layers/{p}/kernel" for p in ("attn/out", "attn/qkv", "mlp/down", "mlp/up")]
        assert control.changes["layers/attn/qkv/kernel"]["a"].shape == (2, 3, 16)
        assert control.changes["layers/attn/qkv/kernel"]["b"].shape == (2, 48, 3)
    else:
        assert set(control.changes) == set(tree.flatten(PARAMS))


def test_strength_interpolates_between_base_and_tuned():
    tuned = finetune.example(LM, jax.random.key(0))
    whole, half = tuned.weights(PARAMS), methods.with_strength(tuned, 0.5).weights(PARAMS)
    jax.tree.map(lambda p, w, h: np.testing.assert_allclose(h, (p + w) / 2, rtol=1e-5, atol=1e-5), PARAMS, whole, half)
    nothing = methods.with_strength(tuned, 0.0).weights(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, nothing, PARAMS)


def test_weights_keep_their_type():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    changed = finetune.example(LM, jax.random.key(0)).weights(half)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(changed))


def test_another_model_is_refused():
    control = finetune.example(worlds.tiny(depth=3), jax.random.key(0))
    with pytest.raises(InputError, match=r"changes layers/attn/\w+/kernel by an array of shape \(3, "):
        control.weights(PARAMS)
    with pytest.raises(InputError, match=r"layers/2/attn/.*which this model lacks"):
        control.weights(LM.unstack(PARAMS))
    with pytest.raises(InputError, match="matches no matrix"):
        finetune.init(LM, jax.random.key(0), targets="layers/attention/.*")
    with pytest.raises(InputError, match="no regular expression"):
        finetune.init(LM, jax.random.key(0), targets="(")
    with pytest.raises(InputError, match="kind is 'adapter'"):
        finetune.init(LM, jax.random.key(0), kind="adapter")


@pytest.mark.parametrize("after", [False, True])
def test_a_soft_prompt_of_embeddings_is_the_tokens(after):
    vectors = LM.embed(PARAMS, jnp.array([7, 8]))
    prompt = SoftPrompt(vectors, after=after)
    rows = [[1, 2, 3], [4, 5]]
    hard = worlds.prompts([r + [7, 8] if after else [7, 8] + r for r in rows])
    wanted = loop.forward(LM, PARAMS, hard, COMPLETION)
    found = loop.forward(LM, PARAMS, worlds.prompts(rows), COMPLETION, prompt)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_each_row_may_have_its_own_soft_prompt():
    vectors = soft_prompt(jax.random.key(0), 2, LM.width, choices=3, deviation=1.0)
    rows = worlds.prompts([[1, 2], [1, 2]], cond={"label": jnp.array([2, 0])})
    found = loop.forward(LM, PARAMS, rows, COMPLETION, SoftPrompt(vectors, "label"))
    for row, label in enumerate((2, 0)):
        alone = loop.forward(LM, PARAMS, rows, COMPLETION, SoftPrompt(vectors[label]))
        np.testing.assert_allclose(found[row], alone[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full", "prompt"])
def test_training_lowers_the_loss_and_leaves_the_strength(kind):
    control = finetune.init(LM, jax.random.key(0), kind=kind, rank=4, length=4)
    tx = optimizer(3e-2, trained=r"changes/.*|vectors")
    step = jax.jit(train.make_step(finetune.loss(LM), tx))
    state, frozen = train.init_state(control, tx, jax.random.key(1)), {"params": PARAMS}
    tokens = jnp.tile(jnp.array([[1, 2, 3, 4, 5, 6]]), (4, 1))
    batch = {"tokens": tokens, "mask": jnp.ones_like(tokens, bool), "ids": jnp.arange(4)}
    seen = []
    for _ in range(15):
        state, metrics = step(state, frozen, batch)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < (0.85 if kind == "prompt" else 0.6) * seen[0]
    if kind != "prompt":
        assert float(state.params.scale) == 1


@pytest.mark.parametrize(
    "hp", [dict(adapter=dict(kind="lora", rank=2)), dict(adapter=dict(kind="prompt"), length=2, choices=2)]
)
def test_fit(small, hp):
    root, lm, data = small
    where = None if "length" in hp else {"label": 1}
    settings = dict(training=dict(steps=3, batch=4, tokens=16, warmup=1), where=where, **hp)
    fitted = finetune.fit(root, lm=lm, data=data, **settings)
    model, params, _ = open_lm(lm)
    control = methods.load(fitted, model)
    assert len(fitted.metrics()) == 3 and not (fitted.path / "steps").exists()
    label = {"label": jnp.array([1, 0])}
    out = loop.forward(model, params, worlds.prompts([[1, 2], [3]], cond=label), COMPLETION, control)
    base = loop.forward(model, params, worlds.prompts([[1, 2], [3]]), COMPLETION)
    assert bool(jnp.all(jnp.isfinite(out))) and float(jnp.abs(out - base).max()) > 1e-6


def test_accumulation_and_event_files_can_be_configured(small):
    root, lm, data = small
    training = dict(steps=3, batch=4, tokens=16, warmup=1)
    common = dict(lm=lm, data=data, adapter=dict(rank=2))
    watched = Session(root, boards=["tensorboard"])
    whole = finetune.fit(watched, **common, training=training | dict(log_every=3, save_every=0))
    assert len(whole.metrics()) == 1 and list((whole.path / "tensorboard").iterdir())
    assert finetune.fit(root, **common, training=training) == whole  # the same control, whatever is logged and saved
    parts = finetune.fit(root, **common, training=training | dict(accumulate=2))
    assert parts != whole and parts.spec["config"]["training"]["accumulate"] == 2
    model = open_lm(lm)[0]
    for a, b in zip(*(jax.tree.leaves(methods.load(made, model)) for made in (whole, parts))):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bad_settings_are_refused(small):
    root, lm, data = small
    with pytest.raises(InputError, match="matches no record"):
        finetune.fit(root, lm=lm, data=data, where={"label": 9})
    with pytest.raises(InputError, match="finetune has no setting 'adaptor'; did you mean 'adapter'"):
        finetune.fit(root, lm=lm, data=data, adaptor=dict(rank=3))
    with pytest.raises(InputError, match="adapter of finetune has no setting 'ranks'; did you mean 'rank'"):
        finetune.fit(root, lm=lm, data=data, adapter=dict(ranks=3))
    with pytest.raises(InputError, match="training of finetune is 5, expected a dictionary of settings"):
        finetune.fit(root, lm=lm, data=data, training=5)
    with pytest.raises(InputError, match="steps is 0"):
        finetune.fit(root, lm=lm, data=data, training=dict(steps=0))
