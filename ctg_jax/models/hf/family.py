"""What all families share: the record `Family`, and the pieces of reading and writing a config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ctg_jax.models.decoder import Transformer
from ctg_jax.models.hf.tensors import Checkpoint, Table
from ctg_jax.models.pattern import Layer, shortest
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

# Settings that some families obey, and their values that change nothing. A family that does not obey one refuses it.
_SETTINGS = {
    **dict.fromkeys(("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), (None,)),
    **dict.fromkeys(("use_sliding_window", "use_bidirectional_attention", "qk_layernorm"), (None, False)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (None, 1)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "no_rope_layers"), (None,)),
}

# Causal masks, rotary tables and tables of positions that old files hold.
BUFFERS = r"(attn|attention)\.(masked_)?bias$|attn\.embed_positions$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$"


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


def decoder(read, write, names, prefix: str, embedding: str, head: str, ignored: str = BUFFERS, aliases=()) -> Family:
    """A family of decoders. A head beside tied weights may be in the file: `tied` has found it equal to the
    embedding."""
    ignored = f"{ignored}|^{head}$"
    return Family(read, write, names, prefix, aliases, ignored, embedding, head)


def expect(config: Config, **values: Any) -> None:
    """InputError for a switch of config.json that is set to something the model cannot express."""
    for key, value in values.items():
        if config.get(key, value) != value:
            raise InputError(f"config.json: {key} is {config[key]!r}, only {value!r} is supported.")


def expect_plain(config: Config, *obeyed: str) -> None:
    """InputError for a setting that other families obey and this one does not, so that none is dropped in silence."""
    for key, neutral in _SETTINGS.items():
        if key not in obeyed and config.get(key) not in neutral:
            raise InputError(
                f"config.json: {key} is {config[key]!r}, which models of type {config.get('model_type')!r} do not obey."
            )
    if "layer_types" not in obeyed and set(config.get("layer_types") or ()) - {"full_attention"}:
        raise InputError(f"config.json: layer_types are {config['layer_types']}, only 'full_attention' is supported.")


# Names of the sizes in config.json, and the fields of `Transformer` that hold them.
_SIZES = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "context",
    "head_dim": "head_dim",
}


def _entries(names: Mapping[str, str | None]) -> dict[str, str]:
    """Entry of config.json -> field, under the names that a family has of its own (None: it has no such entry)."""
    return {names.get(key, key): field for key, field in _SIZES.items() if names.get(key, key) is not None}


def read_sizes(c: Config, **names: str | None) -> dict[str, Any]:
    """The fields of the sizes of a model. Entries of heads may be left out. Where config.json holds None, each head has
    keys and values of its own, a head is its share of the width, and the MLP is four times as wide as the model.

    Args:
      names: entries that this family calls otherwise, or does not have (None).
    """
    optional = ("kv_heads", "head_dim")
    sizes = {field: c.get(key) if field in optional else c[key] for key, field in _entries(names).items()}
    width, heads = sizes["width"], sizes["heads"]
    usual = {"kv_heads": heads, "head_dim": width // heads, "mlp_width": 4 * width}
    return sizes | {field: sizes.get(field) or value for field, value in usual.items()}


def write_sizes(lm: Transformer, **names: str | None) -> dict[str, Any]:
    """The entries of config.json that `read_sizes` reads."""
    return {key: getattr(lm, field) for key, field in _entries(names).items()}


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


def sliding(config: Config, otherwise: Callable[[int], bool]) -> list[bool]:
    """Which layers have a window: as `layer_types` says, or `otherwise` for the number of a layer from 0."""
    depth, types = config["num_hidden_layers"], config.get("layer_types")
    if types is None:
        return [bool(otherwise(i)) for i in range(depth)]
    if len(types) != depth or set(types) - {"full_attention", "sliding_attention"}:
        raise InputError(
            f"config.json: layer_types are {types}, expected 'full_attention' or 'sliding_attention' for each of the "
            f"{depth} layers."
        )
    return [t == "sliding_attention" for t in types]


def pattern(which: list[bool], window: int | None, rotary: list[bool] | None = None, theta: float | None = None):
    """The pattern of layers, of which those in `which` have the window and, where it is given, the rotary base
    `theta`; `rotary`: the layers that rotate (None: all)."""
    if any(which) and window is None:
        raise InputError("config.json: sliding_window is missing, and there are layers that have a window.")
    turns = rotary or [True] * len(which)
    return shortest(
        tuple(Layer(window if w else None, bool(t), theta if w else None) for w, t in zip(which, turns, strict=True))
    )


def layers(lm: Transformer) -> list[Layer]:
    """The kind of every layer."""
    return [lm.pattern[i % len(lm.pattern)] for i in range(lm.depth)]


def write_window(lm: Transformer) -> dict[str, Any]:
    """`sliding_window` and `layer_types`."""
    windows = [layer.window for layer in layers(lm)]
    return {
        "sliding_window": max((w for w in windows if w is not None), default=None),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }
