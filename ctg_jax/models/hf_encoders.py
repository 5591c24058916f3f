"""Encoders in Hugging Face's layout: BERT, RoBERTa, DistilBERT and T5, with sentence-transformers' extra folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctg_jax.models.encoder import Encoder
from ctg_jax.models.hf_decoders import Config, Family, activation, expect
from ctg_jax.models.tensors import Checkpoint, Table, dense, norm, tensor
from ctg_jax.types import InputError


def _labels(c: Config) -> tuple[str, ...]:
    """Names of the classes, by index, if the model is a sequence classifier."""
    if not any(a.endswith("ForSequenceClassification") for a in c.get("architectures") or ()):
        return ()
    names = c.get("id2label") or {str(i): f"LABEL_{i}" for i in range(c.get("num_labels", 2))}
    return tuple(names[k] for k in sorted(names, key=int))


def _write_labels(e: Encoder, name: str) -> dict[str, Any]:
    if not e.labels:
        return {"architectures": [f"{name}Model"]}
    return {
        "architectures": [f"{name}ForSequenceClassification"],
        "id2label": {str(i): x for i, x in enumerate(e.labels)},
        "label2id": {x: i for i, x in enumerate(e.labels)},
    }


def _classifier(e: Encoder, hidden: str, out: str) -> Table:
    names = dense(e, "head/dense", hidden, e.width, e.width, True) if e.head else {}
    return names | (dense(e, "head/out", out, len(e.labels), e.width, True) if e.labels else {})


def _embeddings(e: Encoder, stem: str) -> Table:
    names = {
        "embed/tokens": tensor(e, f"{stem}.word_embeddings.weight", e.vocab, e.width),
        "embed/positions": tensor(e, f"{stem}.position_embeddings.weight", e.position_rows, e.width),
        **norm(e, "embed/norm", f"{stem}.LayerNorm"),
    }
    if e.types:
        names["embed/types"] = tensor(e, f"{stem}.token_type_embeddings.weight", e.types, e.width)
    return names


# -- BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019)


def _bert_read(c: Config, checkpoint: Checkpoint, family: str = "bert") -> Encoder:
    expect(c, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    labels, pad = _labels(c), c.get("pad_token_id") or 0
    rows = c["max_position_embeddings"]
    start = pad + 1 if family == "roberta" else 0
    pooled = labels or f"{family}.pooler.dense.weight" in checkpoint
    return Encoder(
        family=family,
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"],
        mlp_width=c["intermediate_size"],
        context=rows - start,
        position_rows=rows,
        position_start=start,
        types=c.get("type_vocab_size", 2),
        pad=pad,
        norm_eps=c.get("layer_norm_eps", 1e-12),
        activation=activation(c, "hidden_act", "gelu"),
        head="tanh" if pooled else "",
        labels=labels,
    )


def _roberta_read(c: Config, checkpoint: Checkpoint) -> Encoder:
    return _bert_read({"pad_token_id": 1, **c}, checkpoint, "roberta")


def _bert_write(e: Encoder) -> dict[str, Any]:
    return {
        "vocab_size": e.vocab,
        "hidden_size": e.width,
        "num_hidden_layers": e.depth,
        "num_attention_heads": e.heads,
        "intermediate_size": e.mlp_width,
        "max_position_embeddings": e.position_rows,
        "type_vocab_size": e.types,
        "pad_token_id": e.pad,
        "layer_norm_eps": e.norm_eps,
        "hidden_act": e.activation,
        **_write_labels(e, {"bert": "Bert", "roberta": "Roberta"}[e.family]),
    }


def _bert_names(e: Encoder) -> Table:
    d, f, h = e.width, e.mlp_width, f"{e.family}.encoder.layer.{{}}"
    qkv = [f"{h}.attention.self.{x}" for x in ("query", "key", "value")]
    pooler = f"{e.family}.pooler.dense"
    return {
        **_embeddings(e, f"{e.family}.embeddings"),
        **dense(e, "layers/attn/qkv", qkv, [d, d, d], d, True),
        **dense(e, "layers/attn/out", f"{h}.attention.output.dense", d, d, True),
        **norm(e, "layers/attn_norm", f"{h}.attention.output.LayerNorm"),
        **dense(e, "layers/mlp/up", f"{h}.intermediate.dense", f, d, True),
        **dense(e, "layers/mlp/down", f"{h}.output.dense", d, f, True),
        **norm(e, "layers/mlp_norm", f"{h}.output.LayerNorm"),
        **(
            _classifier(e, "classifier.dense", "classifier.out_proj")
            if e.family == "roberta" and e.labels
            else _classifier(e, pooler, "classifier")
        ),
    }


# -- DistilBERT (Sanh et al. 2019)


def _distilbert_read(c: Config, checkpoint: Checkpoint) -> Encoder:
    labels = _labels(c)
    return Encoder(
        family="distilbert",
        vocab=c["vocab_size"],
        width=c["dim"],
        depth=c["n_layers"],
        heads=c["n_heads"],
        head_dim=c["dim"] // c["n_heads"],
        mlp_width=c["hidden_dim"],
        context=c["max_position_embeddings"],
        position_rows=c["max_position_embeddings"],
        pad=c.get("pad_token_id") or 0,
        activation=activation(c, "activation", "gelu"),
        head="relu" if labels else "",
        labels=labels,
    )


def _distilbert_write(e: Encoder) -> dict[str, Any]:
    return {
        "vocab_size": e.vocab,
        "dim": e.width,
        "n_layers": e.depth,
        "n_heads": e.heads,
        "hidden_dim": e.mlp_width,
        "max_position_embeddings": e.position_rows,
        "pad_token_id": e.pad,
        "activation": e.activation,
        **_write_labels(e, "DistilBert"),
    }


def _distilbert_names(e: Encoder) -> Table:
    d, f, h = e.width, e.mlp_width, "distilbert.transformer.layer.{}"
    return {
        **_embeddings(e, "distilbert.embeddings"),
        **dense(e, "layers/attn/qkv", [f"{h}.attention.{x}_lin" for x in "qkv"], [d, d, d], d, True),
        **dense(e, "layers/attn/out", f"{h}.attention.out_lin", d, d, True),
        **norm(e, "layers/attn_norm", f"{h}.sa_layer_norm"),
        **dense(e, "layers/mlp/up", f"{h}.ffn.lin1", f, d, True),
        **dense(e, "layers/mlp/down", f"{h}.ffn.lin2", d, f, True),
        **norm(e, "layers/mlp_norm", f"{h}.output_layer_norm"),
        **_classifier(e, "pre_classifier", "classifier"),
    }


# -- the encoder of T5 (Raffel et al. 2020)


def _t5_read(c: Config, checkpoint: Checkpoint) -> Encoder:
    gate, _, act = c.get("feed_forward_proj", "relu").rpartition("-")
    act = "gelu_new" if (gate, act) == ("gated", "gelu") else act  # the paper's GELU is the approximate one
    return Encoder(
        family="t5",
        vocab=c["vocab_size"],
        width=c["d_model"],
        depth=c["num_layers"],
        heads=c["num_heads"],
        head_dim=c["d_kv"],
        mlp_width=c["d_ff"],
        context=c.get("n_positions", 512),
        pad=c.get("pad_token_id") or 0,
        norm="rms",
        norm_eps=c.get("layer_norm_epsilon", 1e-6),
        pre_norm=True,
        activation=activation({"feed_forward_proj": act}, "feed_forward_proj", "relu"),
        gated=gate == "gated",
        bias=False,
        scaled=False,
        buckets=c.get("relative_attention_num_buckets", 32),
        max_distance=c.get("relative_attention_max_distance", 128),
    )


def _t5_write(e: Encoder) -> dict[str, Any]:
    act = "gelu" if e.gated and e.activation == "gelu_new" else e.activation
    return {
        "architectures": ["T5EncoderModel"],
        "vocab_size": e.vocab,
        "d_model": e.width,
        "num_layers": e.depth,
        "num_heads": e.heads,
        "d_kv": e.head_dim,
        "d_ff": e.mlp_width,
        "n_positions": e.context,
        "pad_token_id": e.pad,
        "layer_norm_epsilon": e.norm_eps,
        "feed_forward_proj": f"gated-{act}" if e.gated else act,
        "relative_attention_num_buckets": e.buckets,
        "relative_attention_max_distance": e.max_distance,
        "is_encoder_decoder": False,
    }


def _t5_names(e: Encoder) -> Table:
    d, f, n = e.width, e.mlp_width, e.heads * e.head_dim
    attn, mlp = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    up, ff = "wi_1" if e.gated else "wi", f"{mlp}.DenseReluDense"
    return {
        "embed/tokens": tensor(e, "shared.weight", e.vocab, d),
        "relative": tensor(e, bias, e.buckets, e.heads),
        **norm(e, "layers/attn_norm", f"{attn}.layer_norm"),
        **dense(e, "layers/attn/qkv", [f"{attn}.SelfAttention.{x}" for x in "qkv"], [n, n, n], d, False),
        **dense(e, "layers/attn/out", f"{attn}.SelfAttention.o", d, n, False),
        **norm(e, "layers/mlp_norm", f"{mlp}.layer_norm"),
        **(dense(e, "layers/mlp/gate", f"{ff}.wi_0", f, d, False) if e.gated else {}),
        **dense(e, "layers/mlp/up", f"{ff}.{up}", f, d, False),
        **dense(e, "layers/mlp/down", f"{ff}.wo", d, f, False),
        **norm(e, "norm", "encoder.final_layer_norm"),
    }


_OLD = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))

ENCODERS = {
    "bert": Family(_bert_read, _bert_write, _bert_names, prefix="bert.", aliases=_OLD),
    "roberta": Family(_roberta_read, _bert_write, _bert_names, prefix="roberta.", aliases=_OLD),
    "distilbert": Family(_distilbert_read, _distilbert_write, _distilbert_names, prefix="distilbert."),
    "t5": Family(
        _t5_read, _t5_write, _t5_names, aliases=(("encoder.embed_tokens.", "shared."),), ignored=r"^decoder\."
    ),
}


# -- sentence-transformers (Reimers and Gurevych 2019): modules.json names a chain of folders

_ACTIVATIONS = {"Identity": "", "Tanh": "tanh", "GELU": "gelu", "ReLU": "relu"}
_TYPE = "sentence_transformers.models."


def read_sentence(folder: Path) -> tuple[dict[str, Any], Path | None]:
    """Fields of `Encoder` that a sentence-transformers folder sets, and the folder of its dense layer if any.

    Raises:
      InputError: a chain other than Transformer, Pooling (mean or cls), Dense?, Normalize?.
    """
    modules = read_json(folder / "modules.json") if (folder / "modules.json").is_file() else []
    kinds = [m["type"].rpartition(".")[2] for m in modules]
    if modules and kinds not in (
        ["Transformer", "Pooling", *d, *n] for d in ([], ["Dense"]) for n in ([], ["Normalize"])
    ):
        raise InputError(
            f"{folder / 'modules.json'}: the modules are {', '.join(kinds)}, "
            "expected Transformer, Pooling, and perhaps Dense and Normalize, in this order."
        )
    fields, project = {"unit": "Normalize" in kinds}, None
    for module, kind in zip(modules, kinds):
        if kind == "Pooling":
            file = folder / module["path"] / "config.json"
            c = read_json(file)
            modes = [k.removeprefix("pooling_mode_") for k, v in c.items() if k.startswith("pooling_mode_") and v]
            names = {"mean_tokens": "mean", "cls_token": "cls"}
            if len(modes) != 1 or modes[0] not in names:
                raise InputError(f"{file}: pooling is {' and '.join(modes)}, expected one of mean_tokens, cls_token.")
            fields["pooling"] = names[modes[0]]
        elif kind == "Dense":
            project = folder / module["path"]
            c = read_json(project / "config.json")
            act = c.get("activation_function", "Identity").rpartition(".")[2]
            if act not in _ACTIVATIONS:
                raise InputError(
                    f"{project / 'config.json'}: activation_function is {act}, expected one of "
                    f"{', '.join(_ACTIVATIONS)}."
                )
            fields |= {"project": c["out_features"], "project_bias": c.get("bias", True)}
            fields["project_activation"] = _ACTIVATIONS[act]
    return fields, project


def sentence_length(folder: Path) -> int | None:
    """The longest input, in tokens, that sentence-transformers allows itself for this model."""
    file = folder / "sentence_bert_config.json"
    return read_json(file).get("max_seq_length") if file.is_file() else None


def projection(e: Encoder) -> Table:
    """The name table of the dense layer after pooling, which lies in a file of its own."""
    return dense(e, "project", "linear", e.project, e.width, e.project_bias) if e.project else {}


def write_sentence(e: Encoder) -> dict[str, Any]:
    """The JSON files, by path, that make a folder a sentence-transformers model."""
    kinds = ["Transformer", "Pooling", *(["Dense"] if e.project else []), *(["Normalize"] if e.unit else [])]
    paths = [f"{i}_{k}" if i else "" for i, k in enumerate(kinds)]
    modules = [{"idx": i, "name": str(i), "path": p, "type": _TYPE + k} for i, (p, k) in enumerate(zip(paths, kinds))]
    modes = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "", "mean_sqrt_len_tokens": ""}
    pooling = {f"pooling_mode_{k}": e.pooling == v for k, v in modes.items()}
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": e.context, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": e.width, **pooling},
    }
    if e.project:
        module = {
            "": "linear.Identity",
            "tanh": "activation.Tanh",
            "gelu": "activation.GELU",
            "relu": "activation.ReLU",
        }
        files["2_Dense/config.json"] = {
            "in_features": e.width,
            "out_features": e.project,
            "bias": e.project_bias,
            "activation_function": f"torch.nn.modules.{module[e.project_activation]}",
        }
    return files


def read_json(file: Path) -> Any:
    """The content of a JSON file; InputError naming it if it is missing or malformed."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise InputError(f"{file}: the file is missing, the model's folder must hold it.") from e
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: it cannot be read as JSON ({e}).") from e
