"""Decoders in Hugging Face's layout. A family is a configuration read, a configuration written and a name table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ctg_jax.models.decoder import Transformer
from ctg_jax.models.hf.tensors import Checkpoint, Table, dense, norm, tensor
from ctg_jax.types import InputError

Config = Mapping[str, Any]

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Family:
    """How a model family is stored.

    Attributes:
      read: (config.json, checkpoint) -> model configuration; InputError for what the model cannot express.
      write: model configuration -> config.json.
      names: model configuration -> name table.
      prefix, aliases: see `tensors.Checkpoint`.
      ignored: pattern of tensors that are no weights, or weights of parts that are not wanted. Any other tensor that
        nothing reads is an error.
      embedding, head: names of the two tensors that are one where weights are tied; a decoder's.
    """

    read: Callable[[Config, Checkpoint], Any]
    write: Callable[[Any], dict[str, Any]]
    names: Callable[[Any], Table]
    prefix: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: str = r"$^"
    embedding: str = ""
    head: str = ""


def expect(config: Config, **values: Any) -> None:
    """InputError for a switch of config.json that is set to something the model cannot express."""
    for key, value in values.items():
        if config.get(key, value) != value:
            raise InputError(f"config.json: {key} is {config[key]!r}, only {value!r} is supported.")


def tied(config: Config, checkpoint: Checkpoint, default: bool, embedding: str, head: str) -> bool:
    """Whether the unembedding is the embedding: as config.json says, unless the file holds both and they differ; then
    the file's head is a weight of its own, as in `transformers`."""
    both = embedding in checkpoint and head in checkpoint
    return config.get("tie_word_embeddings", default) and not (both and not checkpoint.equal(embedding, head))


def activation(config: Config, key: str, default: str) -> str:
    name = config.get(key, default)
    if name not in ACTIVATIONS:
        raise InputError(f"config.json: {key} is {name!r}, expected one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _read_rope(c: Config, partial: float) -> tuple[dict[str, Any], float]:
    """`rope_theta` and `rope_scaling`, and the share of a head's features that rotates (`partial` where the rotary
    settings do not say), from `rope_parameters` (transformers 5) or the older keys.

    In `transformers` a `rope_scaling` takes the place of all `rope_parameters`. Where that gives other numbers than the
    two together, the file is ambiguous and refused.
    """
    old, new = c.get("rope_scaling") or {}, c.get("rope_parameters") or {}
    found = _rope(c, old or new, partial)
    if old and _rope(c, {**new, **old}, partial) != found:
        raise InputError(
            f"config.json: rope_scaling is {dict(old)} beside rope_parameters {dict(new)}, which disagree; "
            "keep the one that the weights were trained with."
        )
    return found


def _rope(c: Config, found: Config, partial: float) -> tuple[dict[str, Any], float]:
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_LLAMA3}
    if unknown := set(found) - known:
        raise InputError(f"config.json: the rotary setting {min(unknown)!r} is not one of {', '.join(sorted(known))}.")
    bases = {c[k] for k in ("rope_theta", "rotary_emb_base") if c.get(k) is not None}
    if len(bases) > 1 and "rope_theta" not in found:
        raise InputError(f"config.json: rope_theta is {c['rope_theta']}, but rotary_emb_base {c['rotary_emb_base']}.")
    theta = found.get("rope_theta", min(bases, default=10000.0))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = ("linear", float(found["factor"]))
    elif kind == "llama3":
        scaling = ("llama3", *(float(found[k]) for k in _LLAMA3))
    else:
        raise InputError(f"config.json: rope type is {kind!r}, expected 'default', 'linear' or 'llama3'.")
    share = found.get("partial_rotary_factor", partial)
    return {"rope_theta": float(theta), "rope_scaling": scaling}, float(share)


def _write_rope(lm: Transformer, **more: Any) -> dict[str, Any]:
    kind, *values = lm.rope_scaling or ("default",)
    scaling = dict(zip(_LLAMA3, values))
    if kind == "llama3":
        scaling[_LLAMA3[3]] = int(scaling[_LLAMA3[3]])
    return {"rope_parameters": {"rope_type": kind, "rope_theta": lm.rope_theta, **scaling, **more}}


# -- GPT-2 (Radford et al. 2019)


_GPT2 = ("transformer.wte.weight", "lm_head.weight")


def _gpt2_read(c: Config, checkpoint: Checkpoint) -> Transformer:
    expect(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    d, heads = c["n_embd"], c["n_head"]
    return Transformer(
        family="gpt2",
        vocab=c["vocab_size"],
        width=d,
        depth=c["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_dim=d // heads,
        mlp_width=c.get("n_inner") or 4 * d,
        context=c.get("n_positions", 1024),
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        activation=activation(c, "activation_function", "gelu_new"),
        tied=tied(c, checkpoint, True, *_GPT2),
    )


def _gpt2_write(lm: Transformer) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": lm.vocab,
        "n_embd": lm.width,
        "n_layer": lm.depth,
        "n_head": lm.heads,
        "n_inner": lm.mlp_width,
        "n_positions": lm.context,
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


# -- Llama (Touvron et al. 2023)


_LLAMA = ("model.embed_tokens.weight", "lm_head.weight")


def _llama_read(c: Config, checkpoint: Checkpoint) -> Transformer:
    rope, share = _read_rope(c, c.get("partial_rotary_factor", 1.0))
    expect({"partial_rotary_factor": share}, partial_rotary_factor=1.0)
    d, heads = c["hidden_size"], c["num_attention_heads"]
    head_dim = c.get("head_dim") or d // heads
    bias = c.get("attention_bias", False)
    return Transformer(
        family="llama",
        vocab=c["vocab_size"],
        width=d,
        depth=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp_width=c["intermediate_size"],
        context=c.get("max_position_embeddings", 2048),
        norm="rms",
        norm_eps=c.get("rms_norm_eps", 1e-6),
        activation=activation(c, "hidden_act", "silu"),
        gated=True,
        positions="rotary",
        rotary_dim=head_dim,
        bias_attn=bias,
        bias_out=bias,
        bias_mlp=c.get("mlp_bias", False),
        tied=tied(c, checkpoint, False, *_LLAMA),
        **rope,
    )


def _llama_write(lm: Transformer) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": lm.vocab,
        "hidden_size": lm.width,
        "num_hidden_layers": lm.depth,
        "num_attention_heads": lm.heads,
        "num_key_value_heads": lm.kv_heads,
        "head_dim": lm.head_dim,
        "intermediate_size": lm.mlp_width,
        "max_position_embeddings": lm.context,
        "rms_norm_eps": lm.norm_eps,
        "hidden_act": lm.activation,
        "attention_bias": lm.bias_attn,
        "mlp_bias": lm.bias_mlp,
        "tie_word_embeddings": lm.tied,
        **_write_rope(lm),
    }


def _llama_names(lm: Transformer) -> Table:
    d, f, h = lm.width, lm.mlp_width, "model.layers.{}"
    q, kv = lm.heads * lm.head_dim, lm.kv_heads * lm.head_dim
    qkv = [f"{h}.self_attn.{x}_proj" for x in "qkv"]
    out = {
        "embed/tokens": tensor(lm, "model.embed_tokens.weight", lm.vocab, d),
        **norm(lm, "layers/attn_norm", f"{h}.input_layernorm"),
        **dense(lm, "layers/attn/qkv", qkv, [q, kv, kv], d, lm.bias_attn),
        **dense(lm, "layers/attn/out", f"{h}.self_attn.o_proj", d, q, lm.bias_out),
        **norm(lm, "layers/mlp_norm", f"{h}.post_attention_layernorm"),
        **dense(lm, "layers/mlp/gate", f"{h}.mlp.gate_proj", f, d, lm.bias_mlp),
        **dense(lm, "layers/mlp/up", f"{h}.mlp.up_proj", f, d, lm.bias_mlp),
        **dense(lm, "layers/mlp/down", f"{h}.mlp.down_proj", d, f, lm.bias_mlp),
        **norm(lm, "norm", "model.norm"),
    }
    return out | ({} if lm.tied else dense(lm, "head", "lm_head", lm.vocab, d, False))


# -- GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023)


_NEOX = ("gpt_neox.embed_in.weight", "embed_out.weight")


def _neox_read(c: Config, checkpoint: Checkpoint) -> Transformer:
    d, heads = c["hidden_size"], c["num_attention_heads"]
    rope, share = _read_rope(c, c.get("rotary_pct", 0.25))
    bias = c.get("attention_bias", True)
    return Transformer(
        family="gpt_neox",
        vocab=c["vocab_size"],
        width=d,
        depth=c["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=d // heads,
        mlp_width=c["intermediate_size"],
        context=c.get("max_position_embeddings", 2048),
        norm_eps=c.get("layer_norm_eps", 1e-5),
        activation=activation(c, "hidden_act", "gelu"),
        positions="rotary",
        rotary_dim=int(d // heads * share),
        parallel=c.get("use_parallel_residual", True),
        bias_attn=bias,
        bias_out=bias,
        tied=tied(c, checkpoint, False, *_NEOX),
        **rope,
    )


def _neox_write(lm: Transformer) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": lm.vocab,
        "hidden_size": lm.width,
        "num_hidden_layers": lm.depth,
        "num_attention_heads": lm.heads,
        "intermediate_size": lm.mlp_width,
        "max_position_embeddings": lm.context,
        "layer_norm_eps": lm.norm_eps,
        "hidden_act": lm.activation,
        "rotary_pct": lm.rotary_dim / lm.head_dim,
        "use_parallel_residual": lm.parallel,
        "attention_bias": lm.bias_attn,
        "tie_word_embeddings": lm.tied,
        **_write_rope(lm, partial_rotary_factor=lm.rotary_dim / lm.head_dim),
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


# Causal masks and rotary tables, and the head of tied weights, which `tied` has found equal to the embedding.
_BUFFERS = r"(attn|attention)\.(masked_)?bias$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$"

DECODERS = {
    name: Family(read, write, names, prefix, ignored=f"{_BUFFERS}|^{head}$", embedding=embedding, head=head)
    for name, read, write, names, prefix, (embedding, head) in (
        ("gpt2", _gpt2_read, _gpt2_write, _gpt2_names, "transformer.", _GPT2),
        ("llama", _llama_read, _llama_write, _llama_names, "model.", _LLAMA),
        ("gpt_neox", _neox_read, _neox_write, _neox_names, "gpt_neox.", _NEOX),
    )
}
