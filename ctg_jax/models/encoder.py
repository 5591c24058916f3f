"""One text encoder: BERT, RoBERTa, DistilBERT, the T5 encoder, and classifiers and sentence encoders on them.

BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019), DistilBERT (Sanh et al. 2019), T5 (Raffel et al. 2020),
Sentence-BERT (Reimers and Gurevych 2019), Sentence-T5 (Ni et al. 2022). A model is a value of `Encoder`, a frozen
hashable configuration that holds no arrays, so it is a static argument of `jax.jit`. Parameters are a nested dict
with layers stacked [L, …] and dense kernels stored (out, in):

    {"embed": {"tokens": [V, D], "positions": [R, D]?, "types": [Y, D]?, "norm": {"scale", "bias"}?},
     "relative": [buckets, heads]?,                                       T5: the position bias all layers share
     "layers": {"attn_norm", "attn": {"qkv", "out"}, "mlp_norm", "mlp": {"up", "gate"?, "down"}},
     "norm": {"scale"}?,                                                  T5: the final norm
     "project": {"kernel", "bias"?}?,                                     dense layer after pooling
     "head": {"dense": {"kernel", "bias"}, "out": {"kernel", "bias"}?}?}  classification head; BERT's pooler
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax.models.attention import attend
from ctg_jax.models.heads import ClassHead, activation
from ctg_jax.models.layers import Dense, Mlp, Norm, param
from ctg_jax.types import InputError, Params

HEADS = {"bert": "tanh", "roberta": "tanh", "distilbert": "relu"}  # family -> activation of its classification head
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Configuration and pure functions of a text encoder.

    Attributes:
      family: bert, roberta, distilbert or t5; it decides only how the model is named in files.
      vocab, width, depth, heads, head_dim, mlp_width: V, D, L, heads, H and the width of the MLP.
      context: longest input in tokens the model was trained for.
      position_rows: rows R of the learned position table; 0 means relative positions (T5).
      position_start: row of the first token (RoBERTa counts from pad + 1).
      types: rows Y of the token type table (BERT), 0 for none.
      pad: id of the padding token.
      norm, norm_eps: "layer" or "rms", and its epsilon.
      pre_norm: norms before each block with one at the end (T5), not after each block (BERT).
      activation, gated: of the MLP.
      bias: dense layers of the blocks have biases.
      scaled: attention scores are divided by sqrt(H); T5 leaves it to the weights.
      buckets, max_distance: of the relative position bias.
      pooling: "mean" over real tokens or "cls", the first real token.
      project: width of the dense layer after pooling, 0 for none; `project_bias`, `project_activation` of it.
      unit: embeddings are scaled to length one.
      head: activation of the head's dense layer, "" for no head. Without labels it is BERT's unused pooler.
      labels: names of the classes, () for no classifier.
      problem: what the logits mean, one of `PROBLEMS`: classes that exclude each other (a softmax), classes that do
        not (a logistic function of each), or values; "" for no classifier.
      dtype, param_dtype: of the computation and of the parameters that `init` makes.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    head_dim: int
    mlp_width: int
    context: int
    family: str = "bert"
    position_rows: int = 0
    position_start: int = 0
    types: int = 0
    pad: int = 0
    norm: str = "layer"
    norm_eps: float = 1e-12
    pre_norm: bool = False
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    scaled: bool = True
    buckets: int = 32
    max_distance: int = 128
    pooling: str = "mean"
    project: int = 0
    project_bias: bool = False
    project_activation: str = ""
    unit: bool = False
    head: str = ""
    labels: tuple[str, ...] = ()
    problem: str = ""
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def bias_mlp(self) -> bool:
        """The name under which the shared `Mlp` reads whether its layers have biases."""
        return self.bias

    @property
    def embed_width(self) -> int:
        """Width of what `embed` returns."""
        return self.project or self.width

    def init(self, key: jax.Array) -> Params:
        """Random parameters."""
        return _init(self, key)

    def apply(self, params: Params, tokens: jax.Array, mask: jax.Array, types: jax.Array | None = None) -> jax.Array:
        """Hidden states [B, T, D] of tokens int [B, T] with mask bool [B, T] and token types int [B, T] (or all 0).

        Padding may be on either side: positions count real tokens only, so a row does not depend on it. The states of
        masked tokens have no meaning.

        Raises:
          InputError: T is longer than the position table.
        """
        return _run(self, "hidden", params, tokens, mask, types)

    def embed(self, params: Params, tokens: jax.Array, mask: jax.Array, types: jax.Array | None = None) -> jax.Array:
        """Sentence embeddings float32 [B, E] with E = `embed_width`: pooled, projected and scaled as configured."""
        return _run(self, "embed", params, tokens, mask, types)

    def classify(self, params: Params, tokens: jax.Array, mask: jax.Array, types: jax.Array | None = None) -> jax.Array:
        """Class logits float32 [B, C].

        Raises:
          InputError: the encoder has no classifier.
        """
        if not self.labels:
            raise InputError(
                "encoder: it has no classification head, classify needs one; load a …ForSequenceClassification model."
            )
        return _run(self, "classify", params, tokens, mask, types)


def classifier(encoder: Encoder, params: Params, labels: tuple[str, ...], key: jax.Array) -> tuple[Encoder, Params]:
    """An encoder as a classifier of texts into classes that exclude each other, with a last layer that has learned
    nothing: it keeps the weights of the encoder and of BERT's pooler, and the rest of the head is drawn from `key`. The
    projection after pooling, which a classifier does not use, is left out.

    Raises:
      InputError: fewer than two labels, or a family whose classifiers have no common form (T5).
    """
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise InputError(f"labels is {list(labels)}; expected the names of two classes or more, all different.")
    if encoder.family not in HEADS:
        raise InputError(
            f"encoder: the family {encoder.family!r} has no classifier; expected one of {', '.join(HEADS)}."
        )
    changed = dict(head=HEADS[encoder.family], labels=tuple(labels), problem=PROBLEMS[0])
    tuned = dataclasses.replace(encoder, **changed, project=0, project_bias=False, project_activation="", unit=False)
    head = tuned.init(key)["head"]
    if encoder.head and not encoder.labels:
        head = head | {"dense": params["head"]["dense"]}
    kept = {name: value for name, value in params.items() if name != "project"}
    return tuned, kept | {"head": head}


@partial(jax.jit, static_argnums=0)
def _init(encoder, key):
    ids = jnp.zeros((1, 1), jnp.int32)
    return _Network(encoder).init(key, ids, ids == 0, ids, method="everything")["params"]


@partial(jax.jit, static_argnums=(0, 1))
def _run(encoder, method, params, tokens, mask, types):
    limit = encoder.position_rows - encoder.position_start
    if encoder.position_rows and tokens.shape[1] > limit:
        raise InputError(
            f"tokens: {tokens.shape[1]} tokens a row, the encoder has {limit} positions; truncate the texts."
        )
    types = jnp.zeros_like(tokens) if types is None else types
    return _Network(encoder).apply({"params": params}, tokens, mask, types, method=method)


def position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """T5's bucket int32 [T, T] of each (query, key) distance, both directions (Raffel et al. 2020, section 2.1):
    half of the buckets for each sign, half of those exact, the rest logarithmic up to `max_distance`."""
    index = np.arange(length)
    distance = index[None, :] - index[:, None]
    half = buckets // 2
    exact = half // 2
    far = np.abs(distance)
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    log = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return (half * (distance > 0) + np.where(far < exact, far, log)).astype(np.int32)


class _Attention(nn.Module):
    config: Encoder

    @nn.compact
    def __call__(self, x, mask, bias):
        """x [B·T, D], mask bool [B, T], bias float32 [heads, T, T] or None -> [B·T, D]."""
        c = self.config
        batch, length = mask.shape
        qkv = Dense(3 * c.heads * c.head_dim, c, c.bias, name="qkv")(x)
        q, k, v = jnp.unstack(qkv.reshape(batch, length, 3, c.heads, c.head_dim), axis=2)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        mixed = attend(q, k, v, mask[:, None, :], bias, None if c.scaled else 1.0).reshape(batch * length, -1)
        return Dense(c.width, c, c.bias, name="out")(mixed)


class _Block(nn.Module):
    config: Encoder

    @nn.compact
    def __call__(self, x, mask, bias):
        c = self.config
        attn_norm, attn = Norm(c, name="attn_norm"), _Attention(c, name="attn")
        mlp_norm, mlp = Norm(c, name="mlp_norm"), Mlp(c, name="mlp")
        if c.pre_norm:
            x = x + attn(attn_norm(x), mask, bias)
            x = x + mlp(mlp_norm(x))
        else:
            x = attn_norm(x + attn(x, mask, bias))
            x = mlp_norm(x + mlp(x))
        return x, None


class _Embed(nn.Module):
    config: Encoder

    @nn.compact
    def __call__(self, tokens, mask, types):
        c = self.config
        tables = {"tokens": (c.vocab, tokens)}
        if c.position_rows:
            tables["positions"] = (c.position_rows, jnp.maximum(jnp.cumsum(mask, 1) - 1, 0) + c.position_start)
        if c.types:
            tables["types"] = (c.types, types)
        x = 0.0
        for name, (rows, index) in tables.items():
            table = param(self, name, nn.initializers.normal(0.02), (rows, c.width), c.param_dtype)
            x = table[index].astype(c.dtype) + x
        x = x.reshape(-1, c.width)
        return x if c.pre_norm else Norm(c, name="norm")(x)


class _Network(nn.Module):
    config: Encoder

    def setup(self):
        c = self.config
        scan = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.depth,
        )
        self.input, self.layers = _Embed(c, name="embed"), scan(c)
        if not c.position_rows:
            self.relative = param(self, "relative", nn.initializers.normal(0.02), (c.buckets, c.heads), c.param_dtype)
        if c.pre_norm:
            self.norm = Norm(c)
        if c.project:
            self.dense = Dense(c.project, c, c.project_bias, name="project")
        if c.head:
            self.head = ClassHead(c)

    def hidden(self, tokens, mask, types):
        c = self.config
        x, bias = self.input(tokens, mask, types), None
        if not c.position_rows:
            where = position_buckets(tokens.shape[1], c.buckets, c.max_distance)
            bias = jnp.moveaxis(self.relative.astype(jnp.float32)[where], -1, 0)
        x, _ = self.layers(x, mask, bias)
        if c.pre_norm:
            x = self.norm(x)
        return x.reshape(*tokens.shape, c.width)

    def embed(self, tokens, mask, types):
        c = self.config
        x = self.hidden(tokens, mask, types)
        if c.pooling == "cls":
            x = _first(x, mask).astype(jnp.float32)
        else:
            some = mask[:, :, None].astype(jnp.float32)
            x = (x.astype(jnp.float32) * some).sum(1) / jnp.maximum(some.sum(1), 1.0)
        if c.project:
            x = self.dense(x)
            x = activation(c.project_activation)(x)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) if c.unit else x

    def classify(self, tokens, mask, types):
        return self.head(_first(self.hidden(tokens, mask, types), mask)).astype(jnp.float32)

    def everything(self, tokens, mask, types):
        """Touches every parameter, so that `init` makes them all."""
        return self.embed(tokens, mask, types), self.classify(tokens, mask, types) if self.config.head else None


def _first(x, mask):
    """The state [B, D] of each row's first real token."""
    return jnp.take_along_axis(x, jnp.argmax(mask, 1)[:, None, None], axis=1)[:, 0]
