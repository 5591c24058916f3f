"""GPT-NeoX with Pythia, and StableLM: LayerNorm and heads that rotate in part."""

from __future__ import annotations

from typing import Any

from ctg_jax.models.decoder import Transformer
from ctg_jax.models.hf.family import Config, activation, decoder, expect_plain, read_sizes, tied, write_sizes
from ctg_jax.models.hf.llama import NAMES, PRE, gated_names
from ctg_jax.models.hf.rotary import read_rope, write_rope
from ctg_jax.models.hf.tensors import Checkpoint, Leaf, Part, Table, dense, norm, tensor
from ctg_jax.types import InputError

# -- GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023)


_NEOX_SIZES = {"num_key_value_heads": None, "head_dim": None}
_NEOX = ("gpt_neox.embed_in.weight", "embed_out.weight")


def _neox_read(c: Config, checkpoint: Checkpoint) -> Transformer:
    c = {"max_position_embeddings": 2048, **c}
    expect_plain(c)
    sizes = read_sizes(c, **_NEOX_SIZES)
    rope, share = read_rope(c, c.get("rotary_pct", 0.25), sizes["context"])
    bias = c.get("attention_bias", True)
    return Transformer(
        **sizes,
        family="gpt_neox",
        norm_eps=c.get("layer_norm_eps", 1e-5),
        activation=activation(c, "hidden_act", "gelu"),
        positions="rotary",
        rotary_dim=int(sizes["head_dim"] * share),
        parallel=c.get("use_parallel_residual", True),
        bias_attn=bias,
        bias_out=bias,
        tied=tied(c, checkpoint, False, *_NEOX),
        **rope,
    )


def _neox_write(lm: Transformer) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        **write_sizes(lm, **_NEOX_SIZES),
        "layer_norm_eps": lm.norm_eps,
        "hidden_act": lm.activation,
        "rotary_pct": lm.rotary_dim / lm.head_dim,
        "use_parallel_residual": lm.parallel,
        "attention_bias": lm.bias_attn,
        "tie_word_embeddings": lm.tied,
        **write_rope(lm, partial_rotary_factor=lm.rotary_dim / lm.head_dim),
    }


def _neox_names(lm: Transformer) -> Table:
    d, f, h, n = lm.width, lm.mlp_width, "gpt_neox.layers.{}", lm.head_dim
    # The file keeps query, key and value of a head together; the model, all queries, all keys, all values.
    blocks = [((3 * head + part) * n, n) for part in range(3) for head in range(lm.heads)]
    qkv = f"{h}.attention.query_key_value"
    out = {
        "embed/tokens": tensor(lm, "gpt_neox.embed_in.weight", lm.vocab, d),
        **norm(lm, "layers/attn_norm", f"{h}.input_layernorm"),
        **dense(lm, "layers/attn/qkv", qkv, 3 * d, d, lm.bias_attn, blocks=blocks),
        **dense(lm, "layers/attn/out", f"{h}.attention.dense", d, d, lm.bias_out),
        **norm(lm, "layers/mlp_norm", f"{h}.post_attention_layernorm"),
        **dense(lm, "layers/mlp/up", f"{h}.mlp.dense_h_to_4h", f, d, True),
        **dense(lm, "layers/mlp/down", f"{h}.mlp.dense_4h_to_h", d, f, True),
        **norm(lm, "norm", "gpt_neox.final_layer_norm"),
    }
    return out | ({} if lm.tied else dense(lm, "head", "embed_out", lm.vocab, d, False))


# -- StableLM (Bellagente et al. 2024)


_STABLELM = dict(num_key_value_heads=32, max_position_embeddings=4096, partial_rotary_factor=0.25)


def _stablelm_read(c: Config, checkpoint: Checkpoint) -> Transformer:
    c = {**_STABLELM, **c, "head_dim": None}  # always hidden_size / num_attention_heads
    expect_plain(c, "qk_layernorm")
    sizes = read_sizes(c)
    rope, share = read_rope(c, c["partial_rotary_factor"], sizes["context"])
    rotary = int(sizes["head_dim"] * share)
    if rotary % 2:
        raise InputError(f"config.json: {share} of {sizes['head_dim']} features rotate, expected an even number.")
    parallel = c.get("use_parallel_residual", False)
    given = dict(
        family="stablelm",
        norm_eps=c.get("layer_norm_eps", 1e-5),
        norms=("attn_norm",) if parallel else ("attn_norm", "mlp_norm"),
        qk_norm="heads" if c.get("qk_layernorm") else None,
        activation=activation(c, "hidden_act", "silu"),
        gated=True,
        positions="rotary",
        rotary_dim=rotary,
        parallel=parallel,
        bias_attn=c.get("use_qkv_bias", False),
        bias_out=False,
        bias_mlp=False,
        tied=tied(c, checkpoint, False, *NAMES),
    )
    return Transformer(**(sizes | given | rope))


def _stablelm_write(lm: Transformer) -> dict[str, Any]:
    return {
        "architectures": ["StableLmForCausalLM"],
        **write_sizes(lm),
        "layer_norm_eps": lm.norm_eps,
        "hidden_act": lm.activation,
        "use_qkv_bias": lm.bias_attn,
        "qk_layernorm": lm.qk_norm == "heads",
        "use_parallel_residual": lm.parallel,
        "tie_word_embeddings": lm.tied,
        **write_rope(lm, partial_rotary_factor=lm.rotary_dim / lm.head_dim),
    }


def _stablelm_names(lm: Transformer) -> Table:
    out = gated_names(lm, PRE)
    if lm.qk_norm == "heads":
        for x, heads in (("q", lm.heads), ("k", lm.kv_heads)):
            names = [f"model.layers.{{}}.self_attn.{x}_layernorm.norms.{i}.weight" for i in range(heads)]
            parts = tuple(Part(name, (lm.head_dim,), 0, lm.head_dim) for name in names)
            out[f"layers/attn/{x}_norm/scale"] = Leaf(parts, lm.depth)
    return out


NEOX = {
    "gpt_neox": decoder(_neox_read, _neox_write, _neox_names, "gpt_neox.", *_NEOX),
    "stablelm": decoder(_stablelm_read, _stablelm_write, _stablelm_names, "model.", *NAMES),
}
