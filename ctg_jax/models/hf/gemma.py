"""Gemma 2 (Gemma Team 2024) and the text model of Gemma 3 (Gemma Team 2025)."""

from __future__ import annotations

from typing import Any

from ctg_jax.models.decoder import Transformer
from ctg_jax.models.hf.family import (
    BUFFERS,
    Config,
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
from ctg_jax.models.hf.llama import NAMES, gated_names
from ctg_jax.models.hf.rotary import read_rope, rope_parameters, write_rope
from ctg_jax.models.hf.tensors import Checkpoint
from ctg_jax.types import InputError

_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_COMMON = dict(
    **dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8),
    **dict(num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096),
)
_GEMMA2 = _COMMON | dict(
    vocab_size=256000, max_position_embeddings=8192, final_logit_softcapping=30.0, attn_logit_softcapping=50.0
)
_GEMMA3 = _COMMON | dict(vocab_size=262208, max_position_embeddings=131072, final_logit_softcapping=None)
_OBEYED = ("sliding_window", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping")


def _read(c: Config, checkpoint: Checkpoint, **more: Any) -> Transformer:
    sizes = read_sizes(c)
    bias = c.get("attention_bias", False)
    query = c["query_pre_attn_scalar"]
    common = dict(
        norm="rms_plus_one",
        norm_eps=c.get("rms_norm_eps", 1e-6),
        norms=tuple(_NORMS),
        activation=activation(c, "hidden_activation", "gelu_pytorch_tanh"),
        gated=True,
        positions="rotary",
        rotary_dim=sizes["head_dim"],
        bias_attn=bias,
        bias_out=bias,
        bias_mlp=False,
        query_dim=None if query == sizes["head_dim"] else query,
        logit_cap=c["final_logit_softcapping"],
        embed_scaled=True,
        tied=tied(c, checkpoint, True, *NAMES),
    )
    return Transformer(**(sizes | common | more))


def _write(lm: Transformer, architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        **write_sizes(lm),
        "rms_norm_eps": lm.norm_eps,
        "hidden_activation": "gelu_pytorch_tanh" if lm.activation == "gelu_new" else lm.activation,
        "attention_bias": lm.bias_attn,
        "query_pre_attn_scalar": lm.query_dim or lm.head_dim,
        "final_logit_softcapping": lm.logit_cap,
        "tie_word_embeddings": lm.tied,
        **write_window(lm),
    }


def _read_gemma2(c: Config, checkpoint: Checkpoint) -> Transformer:
    c = {**_GEMMA2, **c}
    expect_plain(c, *_OBEYED, "attn_logit_softcapping")
    rope, share = read_rope(c, c.get("partial_rotary_factor") or 1.0, c["max_position_embeddings"])
    expect({"partial_rotary_factor": share}, partial_rotary_factor=1.0)
    kinds = pattern(sliding(c, lambda i: (i + 1) % 2), c["sliding_window"])
    return _read(c, checkpoint, family="gemma2", pattern=kinds, attn_cap=c["attn_logit_softcapping"], **rope)


def _write_gemma2(lm: Transformer) -> dict[str, Any]:
    return _write(lm, "Gemma2ForCausalLM") | {"attn_logit_softcapping": lm.attn_cap, **write_rope(lm)}


def _read_gemma3(c: Config, checkpoint: Checkpoint) -> Transformer:
    c = {**_GEMMA3, **c}
    expect_plain(c, *_OBEYED)
    given = dict(c.get("rope_parameters") or {})
    if odd := set(given) - {"full_attention", "sliding_attention"}:
        raise InputError(
            f"config.json: rope_parameters holds {min(odd)!r}, expected 'full_attention' and 'sliding_attention'."
        )
    bases = {"full_attention": c.get("rope_theta") or 1e6, "sliding_attention": c.get("rope_local_base_freq") or 1e4}
    full, local = ({"rope_theta": bases[k], **(given.get(k) or {})} for k in bases)
    found = {"rope_parameters": {**full, **(c.get("rope_scaling") or {})}}
    if len({v for k, v in found["rope_parameters"].items() if k in ("type", "rope_type")}) > 1:
        raise InputError(f"config.json: the rotary settings are {found['rope_parameters']}, which are of two types.")
    rope, share = read_rope(found, 1.0, c["max_position_embeddings"])
    near, part = read_rope({"rope_parameters": local}, 1.0, c["max_position_embeddings"])
    expect({"partial_rotary_factor": share * part}, partial_rotary_factor=1.0)
    if near["rope_scaling"] is not None:
        raise InputError(f"config.json: sliding_attention rotates by {local}, only an unscaled base is supported.")
    every = c.get("sliding_window_pattern") or 6
    kinds = pattern(sliding(c, lambda i: (i + 1) % every), c["sliding_window"], theta=near["rope_theta"])
    return _read(c, checkpoint, family="gemma3_text", qk_norm="head", pattern=kinds, **rope)


def _write_gemma3(lm: Transformer) -> dict[str, Any]:
    theta = next((layer.theta for layer in layers(lm) if layer.theta is not None), 1e4)
    ropes = {
        "full_attention": rope_parameters(lm),
        "sliding_attention": {"rope_type": "default", "rope_theta": theta},
    }
    return _write(lm, "Gemma3ForCausalLM") | {"rope_parameters": ropes}


def _read_both(c: Config, checkpoint: Checkpoint) -> Transformer:
    """The text model of a Gemma 3 that also reads images; it is exported as a text model."""
    whole = {k: c[k] for k in ("tie_word_embeddings",) if k in c}
    return _read_gemma3({**whole, **c["text_config"]}, checkpoint)


def _names(lm):
    return gated_names(lm, _NORMS)


GEMMA = {
    "gemma2": decoder(_read_gemma2, _write_gemma2, _names, "model.", *NAMES),
    "gemma3_text": decoder(_read_gemma3, _write_gemma3, _names, "model.", *NAMES),
    "gemma3": decoder(
        *(_read_both, _write_gemma3, _names, "model.", *NAMES),
        ignored=rf"{BUFFERS}|^(model\.)?(vision_tower|multi_modal_projector)\.",
        aliases=(
            ("model.language_model.", "model."),
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ),
    ),
}
