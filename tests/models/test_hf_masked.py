"""Masked diffusion models of the hub: random ones in MDLM's and LLaDA's layout against the authors' arithmetic, written
out in NumPy, and every file that is refused. The published weights themselves were not at hand."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ctg_jax import methods
from ctg_jax.learn import infilling
from ctg_jax.learn.pretrain import pretrain
from ctg_jax.methods import mdlm
from ctg_jax.models import masked
from ctg_jax.models.hf.masked import load_masked
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sampling, sources
from ctg_jax.types import InputError

ROW = np.array([[3, 9, 1, 9, 4], [9, 9, 2, 0, 5]])
MDLM = dict(
    model_type="mdlm", vocab_size=10, model_length=16, hidden_dim=8, cond_dim=6, n_blocks=2, n_heads=2, dropout=0.1,
    time_conditioning=False,
)  # fmt: skip
LLADA = dict(
    model_type="llada", vocab_size=10, embedding_size=10, d_model=8, n_heads=4, n_kv_heads=2, n_layers=2,
    mlp_hidden_size=12, max_sequence_length=16, rope_theta=500000.0, rms_norm_eps=1e-5, mask_token_id=9,
    weight_tying=False, include_bias=False, block_type="llama", activation_type="silu", layer_norm_type="rms",
    multi_query_attention=None, rope=True,
)  # fmt: skip


def mdlm_weights(draw):
    def w(*shape):
        return draw.normal(size=shape).astype(np.float32)

    out = {"vocab_embed.embedding": w(10, 8), "sigma_map.mlp.0.weight": w(6, 256) / 8, "sigma_map.mlp.0.bias": w(6)}
    out |= {"sigma_map.mlp.2.weight": w(6, 6), "sigma_map.mlp.2.bias": w(6), "rotary_emb.inv_freq": w(2)}
    for i in range(2):
        b = f"blocks.{i}"
        out |= {f"{b}.norm1.weight": w(8), f"{b}.norm2.weight": w(8), f"{b}.attn_qkv.weight": w(24, 8)}
        out |= {f"{b}.attn_out.weight": w(8, 8), f"{b}.mlp.0.weight": w(32, 8), f"{b}.mlp.0.bias": w(32)}
        out |= {f"{b}.mlp.2.weight": w(8, 32), f"{b}.mlp.2.bias": w(8)}
        out |= {f"{b}.adaLN_modulation.weight": w(48, 6), f"{b}.adaLN_modulation.bias": w(48)}
    o = "output_layer"
    out |= {f"{o}.norm_final.weight": w(8), f"{o}.linear.weight": w(10, 8), f"{o}.linear.bias": w(10)}
    out |= {f"{o}.adaLN_modulation.weight": w(16, 6), f"{o}.adaLN_modulation.bias": w(16)}
    return {f"backbone.{name}": value for name, value in out.items()}


def llada_weights(draw):
    def w(*shape):
        return draw.normal(size=shape).astype(np.float32)

    out = {"wte.weight": w(10, 8), "ln_f.weight": w(8), "ff_out.weight": w(10, 8)}
    for i in range(2):
        b = f"blocks.{i}"
        out |= {f"{b}.attn_norm.weight": w(8), f"{b}.ff_norm.weight": w(8), f"{b}.q_proj.weight": w(8, 8)}
        out |= {f"{b}.k_proj.weight": w(4, 8), f"{b}.v_proj.weight": w(4, 8), f"{b}.attn_out.weight": w(8, 8)}
        out |= {f"{b}.ff_proj.weight": w(12, 8), f"{b}.up_proj.weight": w(12, 8), f"{b}.ff_out.weight": w(8, 12)}
    return {f"model.transformer.{name}": value for name, value in out.items()}


def silu(x):
    return x / (1 + np.exp(-x))


def turned(x, theta):
    """x [B, T, heads, H], rotated by halves."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] / theta ** (np.arange(half) / half)[None]
    cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attended(q, k, v):
    """[B, T, heads, H], every token to every token."""
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    score = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(score - score.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", p / p.sum(-1, keepdims=True), v).reshape(*q.shape[:2], -1)


def mdlm_logits(w, x):
    """The forward pass of the authors' `DITBackbone` at time 0, models/dit.py."""
    w = {name.removeprefix("backbone."): value.astype(np.float64) for name, value in w.items()}
    waves = np.concatenate([np.ones(128), np.zeros(128)])
    time = w["sigma_map.mlp.2.weight"] @ silu(w["sigma_map.mlp.0.weight"] @ waves + w["sigma_map.mlp.0.bias"])
    c = silu(time + w["sigma_map.mlp.2.bias"])

    def norm(x, weight):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight

    def moves(name):
        return w[f"{name}.adaLN_modulation.weight"] @ c + w[f"{name}.adaLN_modulation.bias"]

    h = w["vocab_embed.embedding"][x]
    for i in range(2):
        b = f"blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = np.split(moves(b), 6)
        qkv = (norm(h, w[f"{b}.norm1.weight"]) * (1 + scale) + shift) @ w[f"{b}.attn_qkv.weight"].T
        q, k, v = np.moveaxis(qkv.reshape(*x.shape, 3, 2, 4), 2, 0)
        h = h + gate * (attended(turned(q, 1e4), turned(k, 1e4), v) @ w[f"{b}.attn_out.weight"].T)
        y = (norm(h, w[f"{b}.norm2.weight"]) * (1 + scale2) + shift2) @ w[f"{b}.mlp.0.weight"].T + w[f"{b}.mlp.0.bias"]
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        h = h + gate2 * (y @ w[f"{b}.mlp.2.weight"].T + w[f"{b}.mlp.2.bias"])
    shift, scale = np.split(moves("output_layer"), 2)
    y = norm(h, w["output_layer.norm_final.weight"]) * (1 + scale) + shift
    return y @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


def llada_logits(w, x):
    """The forward pass of the authors' `LLaDAModel` with blocks of the kind "llama", modeling_llada.py."""
    w = {name.removeprefix("model.transformer."): value.astype(np.float64) for name, value in w.items()}

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight

    h = w["wte.weight"][x]
    for i in range(2):
        b = f"blocks.{i}"
        y = norm(h, w[f"{b}.attn_norm.weight"])
        q, k, v = (
            (y @ w[f"{b}.{name}_proj.weight"].T).reshape(*x.shape, heads, 2)
            for name, heads in (("q", 4), ("k", 2), ("v", 2))
        )
        h = h + attended(turned(q, 5e5), turned(k, 5e5), v) @ w[f"{b}.attn_out.weight"].T
        y = norm(h, w[f"{b}.ff_norm.weight"])
        gate, up = silu(y @ w[f"{b}.ff_proj.weight"].T), y @ w[f"{b}.up_proj.weight"].T
        h = h + (gate * up) @ w[f"{b}.ff_out.weight"].T
    return norm(h, w["ln_f.weight"]) @ w["ff_out.weight"].T


def folder(path, config, weights):
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_model_in_the_layout_of_mdlm_equals_the_authors_arithmetic(tmp_path):
    weights = mdlm_weights(np.random.default_rng(0))
    net, params = load_masked(folder(tmp_path, MDLM, weights))
    assert net.vocab == 10 and not net.causal and net.context == 16
    found = masked.denoise(net, params, jnp.asarray(ROW))
    np.testing.assert_allclose(found, mdlm_logits(weights, ROW), rtol=2e-4, atol=2e-4)


def test_a_model_in_the_layout_of_llada_equals_the_authors_arithmetic(tmp_path):
    """The mask is token 6 there and the last one here; neither is written."""
    weights, config = llada_weights(np.random.default_rng(1)), LLADA | dict(mask_token_id=6)
    net, params = load_masked(folder(tmp_path, config, weights))
    assert net.vocab == 11 and not net.causal and net.kv_heads == 2
    theirs = np.where(ROW == 9, 6, ROW)
    found = np.asarray(masked.denoise(net, params, jnp.asarray(np.where(ROW == 9, 10, ROW))))
    real = [i for i in range(10) if i != 6]
    np.testing.assert_allclose(found[..., real], llada_logits(weights, theirs)[..., real], rtol=2e-4, atol=2e-4)
    assert (found[..., [6, 10]] < -1e29).all()


@pytest.mark.parametrize(
    "make, change, words",
    [
        (mdlm_weights, dict(time_conditioning=True), "time_conditioning is True, only False is supported"),
        (mdlm_weights, dict(hidden_dim=16), "has shape [10, 8], config.json asks for [10, 16]"),
        (mdlm_weights, dict(model_type="gpt2"), "is 'gpt2', no masked diffusion model that is supported; expected one"),
        (mdlm_weights, dict(cond_dim=None), "the entry 'cond_dim' is missing"),
        (mdlm_weights, dict(quantization_config=dict(quant_method="bnb")), "the weights are quantised (bnb)"),
        (llada_weights, dict(rope_scaling=dict(factor=4)), "rope_scaling is {'factor': 4}, only None is supported"),
        (llada_weights, dict(clip_qkv=8.0), "clip_qkv is 8.0, which models of type 'llada' do not obey"),
        (llada_weights, dict(rope=False), "rope is False, only True is supported"),
        (llada_weights, dict(mask_token_id=10), "mask_token_id is 10, expected a token of the 10 in the vocabulary"),
        (llada_weights, dict(mask_token_id="6"), "mask_token_id is '6', expected a token of the 10 in the vocabulary"),
        (llada_weights, dict(n_layers=1), "has no place in the model of config.json"),
        (llada_weights, dict(n_layers=3), "is missing from its safetensors files"),
    ],
)
def test_files_that_are_refused(tmp_path, make, change, words):
    config = (MDLM if make is mdlm_weights else LLADA) | change
    config = {name: value for name, value in config.items() if value is not None or name not in change}
    with pytest.raises(InputError) as error:
        load_masked(folder(tmp_path, config, make(np.random.default_rng(0))))
    assert words in str(error.value), str(error.value)


def test_a_published_network_completes_and_fills_texts_as_a_trained_one(tmp_path):
    """With the tokenizer of a small language model whose vocabulary is one token smaller."""
    data = stage(tmp_path, sources.load_data, dict(source="bundled:reviews", split="validation", limit=8))
    shape = dict(
        vocab=270, width=16, depth=1, heads=2, context=32, training=dict(tokens=16, batch=4, steps=2, warmup=1)
    )
    lm = stage(tmp_path, pretrain, shape, data=data)
    vocab = open_lm(lm)[0].vocab
    draw = np.random.default_rng(0)
    weights = mdlm_weights(draw)
    for name, rows in (("vocab_embed.embedding", (vocab + 1, 8)), ("output_layer.linear.weight", (vocab + 1, 8))):
        weights[f"backbone.{name}"] = draw.normal(size=rows).astype(np.float32)
    weights["backbone.output_layer.linear.bias"] = np.zeros(vocab + 1, np.float32)
    source = str(folder(tmp_path / "published", MDLM | dict(vocab_size=vocab + 1), weights))
    made = mdlm.fit(tmp_path, lm=lm, data=data, source=source, length=12, guide=dict(classes=0))
    control = methods.load(made, open_lm(lm)[0])
    assert control.start is None  # rows of packed texts begin with the token of an empty prompt
    assert control.net.context == 12 and control.mask == vocab and not control.net.causal
    x = jnp.asarray(draw.integers(0, vocab + 1, (2, 12)))
    np.testing.assert_allclose(
        masked.denoise(control.net, control.params, x), mdlm_logits(weights, np.asarray(x)), rtol=2e-3, atol=2e-3
    )
    (row,) = next(infilling.fill(*sampling.opened(lm), ["a ___ b"], control, sampling.Options(), infilling.Blanks()))
    assert row["text"].startswith("a") and row["text"].endswith(" b")
    small = str(folder(tmp_path / "small", MDLM, mdlm_weights(draw)))
    with pytest.raises(InputError, match=rf"has 9 tokens beside its mask and .* has {vocab}: give the language model"):
        mdlm.fit(tmp_path, lm=lm, data=data, source=small)
    with pytest.raises(InputError, match="length is 99, expected from 2 to 16, the tokens that the model reads"):
        mdlm.fit(tmp_path, lm=lm, data=data, source=source, length=99)
