"""Decoders of the years before Llama: GPT-2, GPT-J and OPT."""

from __future__ import annotations

from typing import Any

from ctg_jax.models.decoder import Transformer
from ctg_jax.models.hf.family import Config, activation, decoder, expect, expect_plain, read_sizes, tied, write_sizes
from ctg_jax.models.hf.tensors import Checkpoint, Leaf, Part, Table, dense, norm, tensor
from ctg_jax.types import InputError

# Names of GPT-2 and GPT-J for the sizes of a model, see `read_sizes`.
_SIZES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": None,
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "head_dim": None,
}

# -- GPT-2 (Radford et al. 2019)


_GPT2 = ("transformer.wte.weight", "lm_head.weight")


def _gpt2_read(c: Config, checkpoint: Checkpoint) -> Transformer:
    expect_plain(c)
    expect(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return Transformer(
        **read_sizes({"n_inner": None, "n_positions": 1024, **c}, **_SIZES),
        family="gpt2",
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        activation=activation(c, "activation_function", "gelu_new"),
        tied=tied(c, checkpoint, True, *_GPT2),
    )


def _gpt2_write(lm: Transformer) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        **write_sizes(lm, **_SIZES),
        "layer_norm_epsilon": lm.norm_eps,
        "activation_function": lm.activation,
        "tie_word_embeddings": lm.tied,
    }


def _gpt2_names(lm: Transformer) -> Table:
    d, f, h, flip = lm.width, lm.mlp_width, "transformer.h.{}", {"transposed": True}
    out = {
        "embed/tokens": tensor(lm, "transformer.wte.weight", lm.vocab, d),
        "embed/positions": tensor(lm, "transformer.wpe.weight", lm.context, d),
        **norm(lm, "layers/attn_norm", f"{h}.ln_1"),
        **dense(lm, "layers/attn/qkv", f"{h}.attn.c_attn", 3 * d, d, True, **flip),
        **dense(lm, "layers/attn/out", f"{h}.attn.c_proj", d, d, True, **flip),
        **norm(lm, "layers/mlp_norm", f"{h}.ln_2"),
        **dense(lm, "layers/mlp/up", f"{h}.mlp.c_fc", f, d, True, **flip),
        **dense(lm, "layers/mlp/down", f"{h}.mlp.c_proj", d, f, True, **flip),
        **norm(lm, "norm", "transformer.ln_f"),
    }
    return out | ({} if lm.tied else dense(lm, "head", "lm_head", lm.vocab, d, False))


# -- GPT-J (Wang and Komatsuzaki 2021)


_GPTJ = ("transformer.wte.weight", "lm_head.weight")


def _gptj_read(c: Config, checkpoint: Checkpoint) -> Transformer:
    expect_plain(c)
    expect(c, rope_scaling=None, rope_parameters=None)
    sizes, rotary = read_sizes({"n_inner": None, "n_positions": 2048, **c}, **_SIZES), c.get("rotary_dim", 64)
    if rotary is None or rotary % 2 or rotary > sizes["head_dim"]:
        raise InputError(f"config.json: rotary_dim is {rotary}, expected an even number up to {sizes['head_dim']}.")
    if tied(c, checkpoint, False, *_GPTJ):
        raise InputError("config.json: tie_word_embeddings is True, but the unembedding of GPT-J has a bias.")
    return Transformer(
        **sizes,
        family="gptj",
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        norms=("attn_norm",),
        activation=activation(c, "activation_function", "gelu_new"),
        positions="rotary",
        rotary_dim=rotary,
        parallel=True,
        bias_attn=False,
        bias_out=False,
        bias_head=True,
        tied=False,
    )


def _gptj_write(lm: Transformer) -> dict[str, Any]:
    return {
        "architectures": ["GPTJForCausalLM"],
        **write_sizes(lm, **_SIZES),
        "rotary_dim": lm.rotary_dim,
        "layer_norm_epsilon": lm.norm_eps,
        "activation_function": lm.activation,
        "tie_word_embeddings": lm.tied,
    }


def _gptj_names(lm: Transformer) -> Table:
    d, f, h, n, r = lm.width, lm.mlp_width, "transformer.h.{}", lm.head_dim, lm.rotary_dim
    # The file rotates features 2i and 2i + 1 of a head together; the model, features i and i + r / 2.
    halves = [x for a in range(0, d, n) for x in ((a, r // 2, 2), (a + 1, r // 2, 2), (a + r, n - r, 1)) if x[1]]
    parts = [(x, cut) for x in "qk" for cut in halves] + [("v", (0, d, 1))]
    qkv = tuple(Part(f"{h}.attn.{x}_proj.weight", (d, d), a, k, step=step) for x, (a, k, step) in parts)
    return {
        "embed/tokens": tensor(lm, "transformer.wte.weight", lm.vocab, d),
        **norm(lm, "layers/attn_norm", f"{h}.ln_1"),
        "layers/attn/qkv/kernel": Leaf(qkv, lm.depth),
        **dense(lm, "layers/attn/out", f"{h}.attn.out_proj", d, d, False),
        **dense(lm, "layers/mlp/up", f"{h}.mlp.fc_in", f, d, True),
        **dense(lm, "layers/mlp/down", f"{h}.mlp.fc_out", d, f, True),
        **norm(lm, "norm", "transformer.ln_f"),
        **dense(lm, "head", "lm_head", lm.vocab, d, True),
    }


# -- OPT (Zhang et al. 2022)


_OPT_SIZES = {"num_key_value_heads": None, "intermediate_size": "ffn_dim", "head_dim": None}
_OPT = ("model.decoder.embed_tokens.weight", "lm_head.weight")
_OFFSET = 2  # positions start at this row of the table; no token reads the rows before it


def _opt_read(c: Config, checkpoint: Checkpoint) -> Transformer:
    expect_plain(c)
    c = {"max_position_embeddings": 2048, **c}
    sizes = read_sizes(c, **_OPT_SIZES)
    d = sizes["width"]
    expect(c, do_layer_norm_before=True, _remove_final_layer_norm=False, layer_norm_elementwise_affine=True)
    if (c.get("word_embed_proj_dim") or d) != d:
        raise InputError(f"config.json: word_embed_proj_dim is {c['word_embed_proj_dim']}, expected {d}, the width.")
    bias = c.get("enable_bias", True)
    return Transformer(
        **sizes,
        family="opt",
        activation=activation(c, "activation_function", "relu"),
        bias_attn=bias,
        bias_out=bias,
        bias_mlp=bias,
        tied=tied(c, checkpoint, True, *_OPT),
    )


def _opt_write(lm: Transformer) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        **write_sizes(lm, **_OPT_SIZES),
        "word_embed_proj_dim": lm.width,
        "activation_function": lm.activation,
        "enable_bias": lm.bias_attn,
        "tie_word_embeddings": lm.tied,
    }


def _opt_names(lm: Transformer) -> Table:
    d, f, stem, bias = lm.width, lm.mlp_width, "model.decoder", lm.bias_attn
    h = f"{stem}.layers.{{}}"
    qkv = [f"{h}.self_attn.{x}_proj" for x in "qkv"]
    positions = Part(f"{stem}.embed_positions.weight", (lm.context + _OFFSET, d), _OFFSET, lm.context)
    out = {
        "embed/tokens": tensor(lm, f"{stem}.embed_tokens.weight", lm.vocab, d),
        "embed/positions": Leaf((positions,)),
        **norm(lm, "layers/attn_norm", f"{h}.self_attn_layer_norm"),
        **dense(lm, "layers/attn/qkv", qkv, [d, d, d], d, bias),
        **dense(lm, "layers/attn/out", f"{h}.self_attn.out_proj", d, d, bias),
        **norm(lm, "layers/mlp_norm", f"{h}.final_layer_norm"),
        **dense(lm, "layers/mlp/up", f"{h}.fc1", f, d, bias),
        **dense(lm, "layers/mlp/down", f"{h}.fc2", d, f, bias),
        **norm(lm, "norm", f"{stem}.final_layer_norm"),
    }
    return out | ({} if lm.tied else dense(lm, "head", "lm_head", lm.vocab, d, False))


GPT = {
    "gpt2": decoder(_gpt2_read, _gpt2_write, _gpt2_names, "transformer.", *_GPT2),
    "gptj": decoder(_gptj_read, _gptj_write, _gptj_names, "transformer.", *_GPTJ),
    "opt": decoder(_opt_read, _opt_write, _opt_names, "model.", *_OPT),
}
