"""Encoders in Hugging Face's layout: BERT, RoBERTa, DistilBERT and the encoder of T5."""

from __future__ import annotations

from typing import Any

from ctg_jax.models.encoder import PROBLEMS, Encoder
from ctg_jax.models.hf.family import Config, Family, activation, expect
from ctg_jax.models.hf.tensors import Checkpoint, Table, dense, norm, tensor
from ctg_jax.types import InputError


def _labels(c: Config) -> tuple[str, ...]:
    """Names of the classes, by index, if the model is a sequence classifier."""
    if not any(a.endswith("ForSequenceClassification") for a in c.get("architectures") or ()):
        return ()
    names = {int(k): v for k, v in (c.get("id2label") or {}).items()}
    names = names or {i: f"LABEL_{i}" for i in range(c.get("num_labels", 2))}
    if set(names) != set(range(len(names))):
        raise InputError(f"config.json: id2label names the classes {sorted(names)}, expected 0 to {len(names) - 1}.")
    return tuple(names[i] for i in range(len(names)))


def _problem(c: Config) -> str:
    """What the outputs of a classifier mean, see `Encoder.problem`: by `problem_type`; for a cross-encoder without one
    by the activation that sentence-transformers gives its single output; else by the number of labels. The same as
    the text-classification pipeline of `transformers`."""
    labels, given = _labels(c), c.get("problem_type")
    if given not in (None, *PROBLEMS):
        raise InputError(f"config.json: problem_type is {given!r}, expected one of {', '.join(PROBLEMS)}.")
    if given or len(labels) != 1:
        return given if labels and given else PROBLEMS[0] if labels else ""
    path = (c.get("sentence_transformers") or {}).get("activation_fn") or c.get("sbert_ce_default_activation_function")
    kinds = {"Sigmoid": "multi_label_classification", "Identity": "regression"}
    name = (path or "Sigmoid").rpartition(".")[2]
    if name not in kinds:
        raise InputError(f"config.json: the activation of the output is {path}, expected one of {', '.join(kinds)}.")
    return kinds[name]


def _write_labels(e: Encoder, name: str) -> dict[str, Any]:
    if not e.labels:
        return {"architectures": [f"{name}Model"]}
    return {
        "architectures": [f"{name}ForSequenceClassification"],
        "id2label": {str(i): x for i, x in enumerate(e.labels)},
        "label2id": {x: i for i, x in enumerate(e.labels)},
        "problem_type": e.problem,
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
        problem=_problem(c),
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
        problem=_problem(c),
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

# Weights of heads for other tasks (masked words, the next sentence, tags, answers), and tables of positions.
_HEADS = r"^(cls|lm_head|classifier|pre_classifier|qa_outputs|vocab_(transform|layer_norm|projector))\.|position_ids$"

ENCODERS = {
    "bert": Family(_bert_read, _bert_write, _bert_names, "bert.", _OLD, _HEADS),
    "roberta": Family(_roberta_read, _bert_write, _bert_names, "roberta.", _OLD, rf"{_HEADS}|^(roberta\.)?pooler\."),
    "distilbert": Family(_distilbert_read, _distilbert_write, _distilbert_names, "distilbert.", ignored=_HEADS),
    "t5": Family(
        _t5_read, _t5_write, _t5_names, aliases=(("encoder.embed_tokens.", "shared."),), ignored=r"^(decoder|lm_head)\."
    ),
}
