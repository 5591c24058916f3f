"""The planner: bytes that can be counted by hand, what a mesh divides, bad input."""

import dataclasses

import jax
import pytest

from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError
from experiments import cli, plan
from tests.experiments.tiny_lm import write_lm

SIZES = dict(batch=8, prompt=3, new=5, rows=16)
LM = Transformer.gpt2(vocab=64, width=16, depth=2, heads=2, context=32)
# Embeddings (64 + 32) · 16; a block: 12 · 16² + 13 · 16 with biases and norms; the last norm.
PARAMS = 96 * 16 + 2 * (12 * 256 + 13 * 16) + 32


CACHE = 2 * 4 * 16 * 2 * 2 * 8 * 7 + 16 * 7 + 16 * 4 + 4  # the last token is not read


def test_bytes_by_hand():
    found = plan.need(LM, "finetune", dict(kind="full"), {"data": 1}, **SIZES)
    learning, sampling = found["learning"], found["sampling"]
    assert learning["weights"] == learning["merged"] == sampling["weights"] == sampling["merged"] == 4 * PARAMS
    # The change, its gradient, two moments; the strength has them too; step, two counts, ok; a key of two words.
    assert 4 * (4 * PARAMS) <= learning["control"] <= 4 * (4 * PARAMS) + 64
    assert sampling["control"] == 4 * PARAMS + 4
    assert sampling["cache"] == CACHE and sampling["logits"] == 16 * 64 * 4
    steer = plan.need(LM, "steer", {}, {"data": 1}, **SIZES)
    assert set(steer) == {"sampling"}  # its vector is a mean of activations, not trained by gradients
    assert steer["sampling"]["merged"] == 0  # it leaves the weights alone


def test_experts_are_two_more_models_with_caches_of_their_own():
    found = plan.need(LM, "dexperts", {}, {"data": 1}, **SIZES)
    assert set(found) == {"sampling"}  # what trains the experts is `finetune`
    sampling, tuned = found["sampling"], plan.need(LM, "finetune", {}, {"data": 1}, **SIZES)
    assert sampling["control"] == 2 * tuned["sampling"]["control"] + 4  # they hold no weights of the model …
    assert sampling["merged"] == 0  # … and are read together with it, without copies of it
    assert tuned["sampling"]["merged"] == 4 * PARAMS  # unlike one change, which decodes with a copy
    # Those of experts have a slot more, and count together what they have read; and the strength.
    assert sampling["cache"] == 3 * CACHE + 2 * (2 * 4 * 16 * 2 * 2 * 8 + 16) - 4 + 4


def test_dglm_samples_with_its_denoiser_and_its_soft_prompt():
    nets = dict(prompter=dict(width=16, depth=1, heads=2, pseudo_tokens=4, length=2, kind="frozen"))
    nets["denoiser"] = dict(width=16, depth=2, heads=2, pseudo_tokens=4)
    found = plan.need(LM, "dglm", dict(latent=16, conditioned=False, **nets), {"data": 1}, **SIZES)
    # Two slots of the cache more, for the soft prompt.
    assert found["sampling"]["cache"] >= CACHE + 2 * 4 * 16 * 2 * 2 * 8 * 2
    nets["denoiser"] = dict(width=32, depth=2, heads=2, pseudo_tokens=4)
    wider = plan.need(LM, "dglm", dict(latent=16, conditioned=False, **nets), {"data": 1}, **SIZES)
    assert wider["sampling"]["control"] > found["sampling"]["control"]


def test_what_is_computed_again_is_not_saved():
    deep = dataclasses.replace(LM, depth=6)
    given = ("finetune", dict(kind="full"), {"data": 1})
    plain, again = (
        plan.need(dataclasses.replace(deep, remat=r), *given, **SIZES)["learning"]["saved"] for r in (False, True)
    )
    assert again < plain / 3


def test_a_mesh_divides():
    one = plan.need(LM, "finetune", dict(kind="full"), {"data": 1}, **SIZES)
    eight = plan.need(LM, "finetune", dict(kind="full"), {"fsdp": 4, "tensor": 2}, **SIZES)
    assert eight["learning"]["weights"] < one["learning"]["weights"] / 5  # norms and biases are on every device
    assert eight["learning"]["saved"] < one["learning"]["saved"] / 6
    assert eight["sampling"]["cache"] < one["sampling"]["cache"] / 6
    assert eight["sampling"]["logits"] == one["sampling"]["logits"] // 8
    deeper = plan.need(dataclasses.replace(LM, depth=4), "finetune", dict(kind="full"), {"data": 1}, **SIZES)
    rows = plan.need(LM, "finetune", dict(kind="full"), {"data": 8}, **SIZES)
    assert rows["learning"]["weights"] == one["learning"]["weights"]  # without fsdp they are on every device
    assert rows["learning"]["saved"] < one["learning"]["saved"] / 6
    assert deeper["learning"]["saved"] > 1.5 * one["learning"]["saved"]  # every layer keeps something


@pytest.fixture
def call(capsys):
    def run(*argv, code=0):
        found = cli.run(plan.main, argv, devices=False)
        out, err = capsys.readouterr()
        assert found == code, err
        return out, err

    return run


@pytest.mark.parametrize(("config", "label"), [("dexperts", "dexperts"), ("quark", "quark"), ("finetune", "positive")])
def test_every_method_of_a_configuration_is_planned(call, config, label):
    out, _ = call(f"--config=configs/{config}.py:tiny", "--lm=gpt2", "--mesh=data=2", "--batch=4")
    lines = out.splitlines()
    titles = [line for line in lines if line.startswith("gpt2, ")]
    assert any(label in t.split(", ")[1] for t in titles)
    assert all("2 devices (data=2), 4 rows an update" in t for t in titles)
    assert sum(line.startswith("fits: TPU v5e") for line in lines) == len(titles)


def test_a_method_whose_shapes_do_not_follow_from_its_settings_is_not_guessed(call):
    """The width of the latents of DGLM is that of an encoder, which its `fit` opens."""
    _, err = call("--config=configs/dglm.py:tiny", "--lm=gpt2", code=2)
    assert "give --method and --set" in err


def test_the_last_line_names_what_is_not_counted(call):
    """The experts of DExperts and the arms without a control of their own; a method that trains itself is counted."""
    last = {}
    for name in ("dexperts", "finetune", "compare_together"):
        last[name] = call(f"--config=configs/{name}.py:tiny", "--lm=gpt2")[0].splitlines()[-1]
    assert last["dexperts"].startswith("not counted: judges and rewards; fitting dexperts")
    assert "fitting" not in last["finetune"] and last["finetune"].startswith("not counted: judges and rewards")
    assert last["compare_together"].endswith("control follows from the settings (top_p, together)")
    assert call("--method=quark", "--lm=gpt2")[0].splitlines()[-1] == "not counted: judges and rewards"


def test_what_is_saved_grows_with_rows_and_not_with_weights():
    params = jax.eval_shape(LM.init, jax.random.key(0))
    control = jax.eval_shape(lambda k: plan.methods.get("finetune").init(LM, k), jax.random.key(0))
    one, two, four = (plan.residuals(LM, params, control, n, 8) for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)


def test_the_report_says_what_fits(call, tmp_path):
    out, _ = call("--lm=gpt2", "--set=kind=full", "--mesh=fsdp=8")
    assert "gpt2, quark, float32, 8 devices" in out and "fits: TPU v5e" in out and "a round of 64000" in out
    out, _ = call("--lm=llama-7b", "--set=kind=full", "--mesh=data=1")
    assert "fits: none of" in out
    lm = write_lm(tmp_path / "lm", context=64)
    out, _ = call(f"--lm={lm}", "--method=finetune", "--mesh=data=1", "--batch=8", "--rows=8")
    assert "fits: TPU v5e" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lm=gpt5"], "expected one of gpt2, gpt2-medium"),
        (["--mesh=data"], "--mesh=data: expected data=N or fsdp=N"),
        (["--mesh=tensor=2"], "--mesh=tensor=2: give data or fsdp a size"),
        (["--mesh=data=3"], "batch is 128, expected a multiple of 3"),
        (["--method=quirk"], "did you mean 'quark'"),
        (["--set=colour=1"], "--set does not suit quark"),
        (["--method=mdlm"], "mdlm completes prompts without the language model"),
        (["--config=configs/mdlm.py:nothing"], "expected one of"),
        (["--config=configs/mdlm.py:tiny"], "has no method whose control follows from its settings"),
        (["--hosts=auto"], "there is no flag --hosts"),
        (["--lm=gpt2", "--prompt=2000"], "context is 1024"),
        (["--config=configs/quirk.py"], "there is no configuration file configs/quirk.py"),
    ],
)
def test_bad_input_is_one_sentence(call, argv, words):
    out, err = call(*argv, code=2)
    assert out == "" and words in err and len(err.strip().splitlines()) == 1


def test_times_by_hand():
    """Bandwidth bound: reading weights and cache at 1 GB/s; compute bound: 2 · N · rows at 1 GFLOP/s."""
    wants = {"sampling": dict(weights=10**9, cache=0)}
    given = dict(samples=16, rows=16, new=10, prompt=0, steps=3, batch=8)
    slow, _ = plan.seconds(LM, wants, {"data": 1}, **given, rate=1e3, bandwidth=1.0)
    assert slow == pytest.approx(10.0)
    wants = {"sampling": dict(weights=0, cache=0)}
    sampling, learning = plan.seconds(LM, wants, {"data": 2}, **given, rate=1e-3, bandwidth=1.0)
    assert sampling == pytest.approx(10 * 2 * PARAMS * 16 / 2 / 1e9)
    assert learning == pytest.approx(3 * 8 * PARAMS * 8 * 10 / 2 / 1e9)


def test_unknown_settings_are_refused():
    with pytest.raises(InputError, match="unexpected keyword argument"):
        plan.need(LM, "steer", dict(colour=1), {"data": 1}, **SIZES)
