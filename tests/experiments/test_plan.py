"""The planner: bytes that can be counted by hand, what a mesh divides, bad input."""

import dataclasses

import jax
import pytest

from ctg_jax.models.transformer import Transformer
from ctg_jax.types import InputError
from experiments import plan
from tests.experiments.tiny_lm import write_lm

SIZES = dict(batch=8, prompt=3, new=5, rows=16)
LM = Transformer.gpt2(vocab=64, width=16, depth=2, heads=2, context=32)
# Embeddings (64 + 32) · 16; a block: 12 · 16² + 13 · 16 with biases and norms; the last norm.
PARAMS = 96 * 16 + 2 * (12 * 256 + 13 * 16) + 32


def test_bytes_by_hand():
    found = plan.need(LM, "finetune", dict(kind="full"), {"data": 1}, **SIZES)
    assert found.weights == found.merged == 4 * PARAMS
    # The change, its gradient, two moments; the strength has them too; step, two counts, ok; a key of two words.
    assert 4 * (4 * PARAMS) <= found.control <= 4 * (4 * PARAMS) + 64
    assert found.cache == 2 * 4 * 16 * 2 * 2 * 8 * 8 + 16 * 8 + 16 * 4 + 4
    assert plan.need(LM, "steer", {}, {"data": 1}, **SIZES).merged == 0  # it leaves the weights alone


def test_a_mesh_divides():
    one = plan.need(LM, "finetune", dict(kind="full"), {"data": 1}, **SIZES)
    eight = plan.need(LM, "finetune", dict(kind="full"), {"data": 4, "tensor": 2}, **SIZES)
    assert eight.weights < one.weights / 5  # norms and biases are on every device
    assert eight.saved < one.saved / 6
    assert eight.cache < one.cache / 6
    deeper = plan.need(dataclasses.replace(LM, depth=4), "finetune", dict(kind="full"), {"data": 1}, **SIZES)
    assert deeper.saved > 1.5 * one.saved  # every layer keeps something


def test_what_is_saved_grows_with_rows_and_not_with_weights():
    params = jax.eval_shape(LM.init, jax.random.key(0))
    control = jax.eval_shape(lambda k: plan.methods.get("finetune").init(LM, k), jax.random.key(0))
    one, two, four = (plan.residuals(LM, params, control, n, 8) for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)


def test_the_report_says_what_fits(capsys, tmp_path):
    assert plan.main(["--lm=gpt2-large", "--set", "kind=full", "--mesh=data=8"]) == 0
    out = capsys.readouterr().out
    assert "gpt2-large, quark, float32, 8 devices" in out and "fits: TPU v5e" in out and "a round of 64000" in out
    assert plan.main(["--lm=llama-70b", "--dtype=bfloat16", "--set", "kind=full", "--mesh=data=8"]) == 0
    assert "fits: none of" in capsys.readouterr().out
    assert plan.main([f"--lm={write_lm(tmp_path / 'lm')}", "--method=steer", "--mesh=data=1", "--batch=8"]) == 0
    assert "fits: TPU v5e" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lm=gpt5"], "expected one of gpt2, gpt2-medium"),
        (["--mesh=data"], "--mesh has 'data', expected KEY=VALUE"),
        (["--mesh=data=3"], "batch is 128, expected a multiple of 3"),
        (["--method=quirk"], "did you mean 'quark'"),
        (["--set", "colour=1"], "--set does not suit quark"),
    ],
)
def test_bad_input_is_one_sentence(capsys, argv, words):
    assert plan.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.strip().splitlines()) == 1


def test_times_by_hand():
    """Bandwidth bound: reading weights and cache at 1 GB/s; compute bound: 2 · N · rows at 1 GFLOP/s."""
    wants = plan.Need(weights=10**9, control=0, merged=0, saved=0, cache=0)
    given = dict(samples=16, rows=16, new=10, prompt=0, steps=3, batch=8)
    slow, _ = plan.seconds(LM, wants, {"data": 1}, **given, rate=1e3, bandwidth=1.0)
    assert slow == pytest.approx(10.0)
    wants = dataclasses.replace(wants, weights=0)
    sampling, learning = plan.seconds(LM, wants, {"data": 2}, **given, rate=1e-3, bandwidth=1.0)
    assert sampling == pytest.approx(10 * 2 * PARAMS * 16 / 2 / 1e9)
    assert learning == pytest.approx(3 * 8 * PARAMS * 8 * 10 / 2 / 1e9)


def test_unknown_settings_are_refused():
    with pytest.raises(InputError, match="unexpected keyword argument"):
        plan.need(LM, "steer", dict(colour=1), {"data": 1}, **SIZES)
