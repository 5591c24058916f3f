"""Masked diffusion models in Hugging Face's layout: MDLM (Sahoo et al. 2024) and LLaDA (Nie et al. 2025).

Both become the denoiser that `ctg_jax.models.masked` reads: a `Transformer` with `causal=False` whose last token is the
mask. The modules of MDLM read the time, but the published models are trained without it ("time_conditioning" is false):
the embedding of time 0 scales, shifts and gates every block by constants, which are multiplied into the weights here.
LLaDA's mask is a token in the middle of its vocabulary; its row is copied to the end, and the token itself is never
written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ctg_jax.models.decoder import Transformer
from ctg_jax.models.hf import family_of, nested, resolve
from ctg_jax.models.hf.family import BUFFERS, expect, expect_plain, read_sizes
from ctg_jax.models.hf.tensors import Checkpoint, Table, dense, tensor
from ctg_jax.types import InputError, Params

Config = Mapping[str, Any]
NEVER = -1e30  # the bias of a token that is never written
TIME_WAVES = 256  # of MDLM's embedding of the time
EPS = 1e-5  # of MDLM's norms


def read_mdlm(config: Config, checkpoint: Checkpoint) -> tuple[Transformer, Params]:
    """The denoiser of a config.json of `model_type` "mdlm", and its parameters on the host.

    Raises:
      InputError: a model that reads the time, and what `Checkpoint.check` raises.
    """
    expect(config, time_conditioning=False)
    names = dict(vocab_size="vocab_size", hidden_size="hidden_dim", num_hidden_layers="n_blocks")
    names |= dict(num_attention_heads="n_heads", max_position_embeddings="model_length")
    sizes = read_sizes(config, num_key_value_heads=None, intermediate_size=None, head_dim=None, **names)
    net = Transformer(
        **sizes, positions="rotary", rotary_dim=sizes["head_dim"], norm="layer", norm_eps=EPS, activation="gelu_new",
        bias_attn=False, bias_out=False, bias_head=True, tied=False, causal=False,
    )  # fmt: skip
    d, f, c, b = net.width, net.mlp_width, config["cond_dim"], "backbone.blocks.{}"
    scale = {f"layers/{ours}/scale": tensor(net, f"{b}.{theirs}.weight", d) for ours, theirs in _NORMS.items()}
    table: Table = {
        "embed/tokens": tensor(net, "backbone.vocab_embed.embedding", net.vocab, d),
        **scale,
        **dense(net, "layers/attn/qkv", f"{b}.attn_qkv", 3 * d, d, False),
        **dense(net, "layers/attn/out", f"{b}.attn_out", d, d, False),
        **dense(net, "layers/mlp/up", f"{b}.mlp.0", f, d, True),
        **dense(net, "layers/mlp/down", f"{b}.mlp.2", d, f, True),
        "norm/scale": tensor(net, "backbone.output_layer.norm_final.weight", d),
        **dense(net, "head", "backbone.output_layer.linear", net.vocab, d, True),
        **dense(net, "time/in", "backbone.sigma_map.mlp.0", c, TIME_WAVES, True),
        **dense(net, "time/out", "backbone.sigma_map.mlp.2", c, c, True),
        **dense(net, "layers/moves", f"{b}.adaLN_modulation", 6 * d, c, True),
        **dense(net, "moves", "backbone.output_layer.adaLN_modulation", 2 * d, c, True),
    }
    x = _read(checkpoint, table)
    time = _moved(x, "time/out", _silu(_moved(x, "time/in", np.repeat([1.0, 0.0], TIME_WAVES // 2))))
    moves = np.split(_moved(x, "layers/moves", _silu(time)), 6, axis=-1)  # [L, D] each
    shift, scale = np.split(_moved(x, "moves", _silu(time)), 2, axis=-1)
    for norm, at in (("attn_norm", 0), ("mlp_norm", 3)):
        x[f"layers/{norm}/bias"] = moves[at]
        x[f"layers/{norm}/scale"] = x[f"layers/{norm}/scale"] * (1 + moves[at + 1])
    x["layers/attn/out/kernel"] = x["layers/attn/out/kernel"] * moves[2][:, :, None]
    x["layers/mlp/down/kernel"] = x["layers/mlp/down/kernel"] * moves[5][:, :, None]
    x["layers/mlp/down/bias"] = x["layers/mlp/down/bias"] * moves[5]
    x |= {"norm/bias": shift, "norm/scale": x["norm/scale"] * (1 + scale)}
    return net, {name: value for name, value in x.items() if "time/" not in name and "moves/" not in name}


_NORMS = {"attn_norm": "norm1", "mlp_norm": "norm2"}


def read_llada(config: Config, checkpoint: Checkpoint) -> tuple[Transformer, Params]:
    """The denoiser of a config.json of `model_type` "llada", and its parameters on the host.

    Raises:
      InputError: a setting that the model cannot express, and what `Checkpoint.check` raises.
    """
    expect(
        config, block_type="llama", block_group_size=1, layer_norm_type="rms", activation_type="silu", rope=True,
        alibi=False, include_bias=False, include_qkv_bias=False, attention_layer_norm=False, input_emb_norm=False,
        scale_logits=False, weight_tying=False, multi_query_attention=None, rope_scaling=None,
    )  # fmt: skip
    expect_plain(config)
    rows = config.get("embedding_size") or config["vocab_size"]
    names = dict(hidden_size="d_model", num_hidden_layers="n_layers", num_attention_heads="n_heads")
    names |= dict(num_key_value_heads="n_kv_heads", intermediate_size="mlp_hidden_size")
    sizes = read_sizes(config, head_dim=None, max_position_embeddings="max_sequence_length", **names)
    shape = {name: size for name, size in sizes.items() if name != "head_dim"} | dict(vocab=rows + 1)
    net = Transformer.llama(
        **shape, norm_eps=config["rms_norm_eps"], rope_theta=config["rope_theta"], bias_head=True, causal=False
    )
    d, f, q, kv, b = net.width, net.mlp_width, net.width, net.kv_heads * net.head_dim, "model.transformer.blocks.{}"
    table: Table = {
        "embed/tokens": tensor(net, "model.transformer.wte.weight", rows, d),
        **{f"layers/{ours}/scale": tensor(net, f"{b}.{theirs}.weight", d) for ours, theirs in _RMS.items()},
        **dense(net, "layers/attn/qkv", [f"{b}.{x}_proj" for x in "qkv"], [q, kv, kv], d, False),
        **dense(net, "layers/attn/out", f"{b}.attn_out", d, q, False),
        **dense(net, "layers/mlp/gate", f"{b}.ff_proj", f, d, False),
        **dense(net, "layers/mlp/up", f"{b}.up_proj", f, d, False),
        **dense(net, "layers/mlp/down", f"{b}.ff_out", d, f, False),
        "norm/scale": tensor(net, "model.transformer.ln_f.weight", d),
        "head/kernel": tensor(net, "model.transformer.ff_out.weight", rows, d),
    }
    x, mask = _read(checkpoint, table), config["mask_token_id"]
    if not isinstance(mask, int) or not 0 <= mask < rows:
        raise InputError(f"config.json: mask_token_id is {mask!r}, expected a token of the {rows} in the vocabulary.")
    x["embed/tokens"] = np.concatenate([x["embed/tokens"], x["embed/tokens"][mask][None]])
    x["head/kernel"] = np.concatenate([x["head/kernel"], np.zeros((1, d), np.float32)])
    x["head/bias"] = np.where(np.isin(np.arange(rows + 1), [mask, rows]), NEVER, 0.0).astype(np.float32)
    return net, x


_RMS = {"attn_norm": "attn_norm", "mlp_norm": "ff_norm"}
FAMILIES: dict[str, Callable[[Config, Checkpoint], tuple[Transformer, Params]]] = {
    "mdlm": read_mdlm,
    "llada": read_llada,
}


def _read(checkpoint: Checkpoint, table: Table) -> dict[str, np.ndarray]:
    """All leaves of a table, float32."""
    checkpoint.check(table, BUFFERS)
    return {
        path: np.array(checkpoint.read(leaf, [slice(None)] * len(leaf.shape), "float32"))
        for path, leaf in table.items()
    }


def _moved(x: Mapping[str, np.ndarray], layer: str, vector: np.ndarray) -> np.ndarray:
    return x[f"{layer}/kernel"] @ vector.astype(np.float32) + x[f"{layer}/bias"]


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def load_masked(path_or_id: str | os.PathLike, *, dtype: str = "float32") -> tuple[Transformer, Params]:
    """A masked diffusion model of one of `FAMILIES`, as a network with `causal=False` whose last token is the mask, and
    its parameters with stacked layers.

    Args:
      path_or_id: a folder, or a hub id. dtype: of parameters and computation, whatever the file's.

    Raises:
      InputError: no such folder or hub id; a family that is not one of these; quantised weights; a setting of
        config.json that the network cannot express; a tensor that is missing, of another shape, or read by nothing.
    """
    folder = resolve(path_or_id)
    read, config = family_of(folder, FAMILIES, "masked diffusion model")
    try:
        net, leaves = read(config, Checkpoint(folder))
    except KeyError as e:
        raise InputError(f"{folder / 'config.json'}: the entry {e.args[0]!r} is missing, the model needs it.") from e
    net = dataclasses.replace(net, dtype=jnp.dtype(dtype).name, param_dtype=jnp.dtype(dtype).name)
    return net, nested({path: jnp.asarray(x, dtype) for path, x in leaves.items()})
