"""The projection: times that can be worked out by hand, and what it must say of more chips."""

import dataclasses

import pytest

from ctg_jax.models.decoder import Transformer
from experiments import project

LM = Transformer.llama(
    vocab=64,
    width=32,
    depth=2,
    heads=8,
    kv_heads=8,
    mlp_width=64,
    context=1024,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
CHIP = project.Chip(tflops=1e-6, memory=1, bandwidth=1e-3, tensor=1e-6, data=1e-6)
KERNELS = 2 * (4 * 32 * 32 + 3 * 32 * 64)


def test_products_by_hand():
    tokens = project.ROWS * project.LENGTH
    want = 6 * tokens * (KERNELS + 64 * 32) + 12 * 2 * project.ROWS * project.LENGTH**2 * 32
    assert project.flops(LM, project.ROWS, project.LENGTH) == want
    work, _, _ = project.training(LM, CHIP, 8, "data")
    assert work == pytest.approx(want / 0.5e6)


def test_data_parallel_sends_the_gradient_of_the_change_whatever_the_rows(monkeypatch):
    _, once, none = project.training(LM, CHIP, 8, "data")
    change = 2 * 8 * (4 * 32 + 32 + 32 + 3 * (32 + 64)) + 1  # rank 8: qkv, out; up, gate, down; the strength
    assert none == 0
    assert once == pytest.approx(2 * 7 / 8 * 4 * change / 1e3, rel=1e-3)
    monkeypatch.setattr(project, "ROWS", 2 * project.ROWS)
    assert project.training(LM, CHIP, 8, "data")[1] == once


def test_split_weights_are_gathered_twice_and_their_gradients_scattered():
    _, found, _ = project.training(LM, CHIP, 8, "FSDP")
    blocks = 2 * 2 * KERNELS * 7 / 8
    head = 2 * 64 * 32 * 7 / 8
    gradients = 4 * KERNELS * 7 / 8  # of the kernels that the change is merged into
    lookup = 2 * 7 / 8 * project.ROWS * project.LENGTH * 32 * 2
    assert found == pytest.approx((blocks + head + gradients + lookup) / 1e3, rel=1e-3)


def test_a_token_by_hand():
    """Reading the weights and 32 rows of cache at 0.6 of 1 MB/s; nothing is sent where nothing is split."""
    token, sent = project.decoding(LM, dataclasses.replace(CHIP, tflops=1.0), "data")
    weights = 2 * (KERNELS + 2 * 64 * 32 + 5 * 32)
    cache = 2 * 2 * 32 * 64 * 32 * 2
    assert sent == 0 and token == pytest.approx((weights + cache) / 0.6e6)
    assert project.decoding(LM, CHIP, "FSDP × tensor 8")[1] > 0


def test_rows_of_the_table():
    row = project.project("gpt2", "TPU v5e", 256, "data")
    more = project.project("gpt2", "H100", 4096, "data")
    assert row["fits"] and 0.9 < row["train_share"][0] <= row["train_share"][1] <= 1
    assert more["train_tok_s"][0] > 16 * row["train_tok_s"][0] and row["decode_share"] == 1
    assert project.project("gpt2", "TPU v5e", 4096, "data") is None  # a pod is smaller
    assert project.project("gpt2", "H100", 64, "FSDP × tensor 8") is None  # twelve heads
    assert project.project("gpt2", "H100", 512, "FSDP") is None  # a width of 768
