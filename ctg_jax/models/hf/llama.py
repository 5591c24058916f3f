"""Llama and the families that are written like it: Mistral, Qwen 2 and 3, SmolLM3, OLMo 2, Phi-3 and Phi-4-mini."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ctg_jax.models.decoder import Transformer
from ctg_jax.models.hf.family import (
    Config,
    Family,
    activation,
    decoder,
    expect,
    expect_plain,
    layers,
    pattern,
    read_sizes,
    sliding,
    tied,
    write_sizes,
    write_window,
)
from ctg_jax.models.hf.rotary import read_rope, write_rope
from ctg_jax.models.hf.tensors import Checkpoint, Table, dense, norm, tensor

NAMES = ("model.embed_tokens.weight", "lm_head.weight")
PRE = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
POST = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}


def gated_names(lm: Transformer, norms: Mapping[str, str], fused: bool = False) -> Table:
    """The name table of decoders with a gated MLP.

    Args:
      norms: names of a block's norms in the file.
      fused: query, key and value are one tensor, and gate and up projection are another.
    """
    d, f, h = lm.width, lm.mlp_width, "model.layers.{}"
    q, kv = lm.heads * lm.head_dim, lm.kv_heads * lm.head_dim
    qkv, rows = [f"{h}.self_attn.{x}_proj" for x in "qkv"], [q, kv, kv]
    up = {"gate": dict(stems=f"{h}.mlp.gate_proj", rows=f), "up": dict(stems=f"{h}.mlp.up_proj", rows=f)}
    if fused:
        qkv, rows = [f"{h}.self_attn.qkv_proj"], [q + 2 * kv]
        up = {
            name: dict(stems=f"{h}.mlp.gate_up_proj", rows=2 * f, blocks=[(start, f)])
            for name, start in (("gate", 0), ("up", f))
        }
    out = {
        "embed/tokens": tensor(lm, "model.embed_tokens.weight", lm.vocab, d),
        **dense(lm, "layers/attn/qkv", qkv, rows, d, lm.bias_attn),
        **dense(lm, "layers/attn/out", f"{h}.self_attn.o_proj", d, q, lm.bias_out),
        **dense(lm, "layers/mlp/gate", columns=d, bias=lm.bias_mlp, **up["gate"]),
        **dense(lm, "layers/mlp/up", columns=d, bias=lm.bias_mlp, **up["up"]),
        **dense(lm, "layers/mlp/down", f"{h}.mlp.down_proj", d, f, lm.bias_mlp),
        **norm(lm, "norm", "model.norm"),
    }
    for name in lm.norms:
        out |= norm(lm, f"layers/{name}", f"{h}.{norms[name]}")
    if lm.qk_norm in ("head", "width"):
        sizes = (lm.head_dim, lm.head_dim) if lm.qk_norm == "head" else (q, kv)
        for name, size in zip(("q_norm", "k_norm"), sizes):
            out[f"layers/attn/{name}/scale"] = tensor(lm, f"{h}.self_attn.{name}.weight", size)
    return out | ({} if lm.tied else dense(lm, "head", "lm_head", lm.vocab, d, False))


def _family(
    name: str,
    architecture: str,
    defaults: Config,
    fields: Callable[[Config], dict[str, Any]],
    entries: Callable[[Transformer], dict[str, Any]],
    *,
    obeyed: tuple[str, ...] = (),
    norms: Mapping[str, str] = PRE,
    partial: bool = False,
    fused: bool = False,
) -> Family:
    """A family that differs from Llama in a few fields.

    Args:
      name, architecture: `model_type`, and the class of `transformers`.
      defaults: what entries that are left out mean.
      fields: config.json -> fields of `Transformer` beside the common ones.
      entries: the way back.
      obeyed: settings that `fields` reads, see `expect_plain`.
      norms, fused: see `gated_names`.
      partial: whether a part of a head may rotate.
    """

    def read(c: Config, checkpoint: Checkpoint) -> Transformer:
        c = {**defaults, **c}
        expect_plain(c, *obeyed)
        sizes = read_sizes(c)
        rope, share = read_rope(c, c.get("partial_rotary_factor") or 1.0, sizes["context"])
        if not partial:
            expect({"partial_rotary_factor": share}, partial_rotary_factor=1.0)
        bias = c.get("attention_bias", False)
        common = dict(
            family=name,
            norm="rms",
            norm_eps=c["rms_norm_eps"],
            norms=tuple(norms),
            activation=activation(c, "hidden_act", "silu"),
            gated=True,
            positions="rotary",
            rotary_dim=int(sizes["head_dim"] * share),
            bias_attn=bias,
            bias_out=bias,
            bias_mlp=c.get("mlp_bias", False),
            tied=tied(c, checkpoint, False, *NAMES),
        )
        return Transformer(**(sizes | common | rope | fields(c)))

    def write(lm: Transformer) -> dict[str, Any]:
        more = {"partial_rotary_factor": lm.rotary_dim / lm.head_dim} if partial else {}
        return {
            "architectures": [architecture],
            **write_sizes(lm),
            "rms_norm_eps": lm.norm_eps,
            "hidden_act": lm.activation,
            "tie_word_embeddings": lm.tied,
            **write_rope(lm, **more),
            **entries(lm),
        }

    return decoder(read, write, lambda lm: gated_names(lm, norms, fused), "model.", *NAMES)


def _biases(lm: Transformer) -> dict[str, Any]:
    return {"attention_bias": lm.bias_attn, "mlp_bias": lm.bias_mlp}


def _every_window(c: Config) -> dict[str, Any]:
    """A window for all layers."""
    return {"pattern": pattern([c.get("sliding_window") is not None] * c["num_hidden_layers"], c["sliding_window"])}


def _one_window(lm: Transformer) -> dict[str, Any]:
    return {"sliding_window": write_window(lm)["sliding_window"]}


def _qwen(c: Config) -> dict[str, Any]:
    window = c["sliding_window"] if c["use_sliding_window"] else None
    which = sliding(c, lambda i: window is not None and i >= c["max_window_layers"])
    return {"pattern": pattern(which, window)}


def _write_qwen(lm: Transformer) -> dict[str, Any]:
    found = write_window(lm)
    return found | {"use_sliding_window": found["sliding_window"] is not None}


def _smollm3(c: Config) -> dict[str, Any]:
    depth, every = c["num_hidden_layers"], c["no_rope_layer_interval"]
    turns = c["no_rope_layers"] or [int((i + 1) % every != 0) for i in range(depth)]
    turns = [bool(t) for t in turns[:depth]]
    which = sliding(c, lambda i: c["use_sliding_window"] and c["sliding_window"] is not None and not turns[i])
    return {"pattern": pattern(which, c["sliding_window"], turns)}


def _write_smollm3(lm: Transformer) -> dict[str, Any]:
    turns = [int(layer.rotary) for layer in layers(lm)]
    return _write_qwen(lm) | _biases(lm) | {"no_rope_layers": turns}


def _phi3(c: Config) -> dict[str, Any]:
    expect(c, attention_bias=False, mlp_bias=False)
    return _every_window(c)


_WINDOWS = ("sliding_window", "use_sliding_window", "layer_types")
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_SMOLLM3 = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
}
_PHI3 = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}

LLAMA_LIKE = {
    # Touvron et al. 2023
    "llama": _family(
        "llama",
        "LlamaForCausalLM",
        dict(max_position_embeddings=2048, rms_norm_eps=1e-6),
        lambda c: {},
        _biases,
    ),
    # Jiang et al. 2023
    "mistral": _family(
        "mistral",
        "MistralForCausalLM",
        dict(num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-6, sliding_window=4096),
        _every_window,
        _one_window,
        obeyed=("sliding_window",),
    ),
    # Yang et al. 2024, also Qwen 2.5
    "qwen2": _family(
        "qwen2",
        "Qwen2ForCausalLM",
        _QWEN,
        lambda c: {"bias_attn": True, "bias_out": False, **_qwen(c)},
        _write_qwen,
        obeyed=_WINDOWS,
    ),
    # Yang et al. 2025
    "qwen3": _family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_QWEN, "head_dim": 128},
        lambda c: {"qk_norm": "head", **_qwen(c)},
        lambda lm: {"attention_bias": lm.bias_attn, **_write_qwen(lm)},
        obeyed=_WINDOWS,
    ),
    # Bakouch et al. 2025
    "smollm3": _family(
        "smollm3",
        "SmolLM3ForCausalLM",
        _SMOLLM3,
        _smollm3,
        _write_smollm3,
        obeyed=(*_WINDOWS, "no_rope_layers"),
    ),
    # OLMo et al. 2025
    "olmo2": _family(
        "olmo2",
        "Olmo2ForCausalLM",
        dict(max_position_embeddings=2048, rms_norm_eps=1e-5),
        lambda c: {"qk_norm": "width"},
        lambda lm: {"attention_bias": lm.bias_attn},
        norms=POST,
    ),
    # Abdin et al. 2024, also Phi-4-mini
    "phi3": _family(
        "phi3",
        "Phi3ForCausalLM",
        _PHI3,
        _phi3,
        _one_window,
        obeyed=("sliding_window",),
        partial=True,
        fused=True,
    ),
}
