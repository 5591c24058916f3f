"""The layers that the decoder, the encoder and the denoiser share: products, norms and MLPs.

Every module reads its sizes from the frozen configuration it belongs to, `lm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ctg_jax.mesh.plan import split
from ctg_jax.types import InputError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


FEW = 4  # rows at most that a CPU multiplies one by one
PIECE = 2**18  # entries of a kernel at most that they are multiplied by at a time: 1 MB, which stays in a core's cache


def matmul(x: jax.Array, kernel: jax.Array, dtype, out=None) -> jax.Array:
    """x [..., in] times kernel [out, in] transposed, on (rows, in), summed in float32. On an accelerator float32 inputs
    are rounded as `jax_default_matmul_precision` says, except for a single row on a GPU; see
    `ctg_jax.mesh.layout.Layout.precision`.

    On a CPU a few rows are multiplied one by one by each piece of the kernel: for two rows or more XLA packs the kernel
    first, which on some processors takes thrice as long as reading it, and from the second row on the piece is in the
    cache."""
    dtype = jnp.dtype(dtype)
    rows, kernel = x.reshape(-1, x.shape[-1]).astype(dtype), kernel.astype(dtype)
    if len(rows) == 1 and jax.default_backend() == "gpu":
        # One row only reads the kernel, and a GPU's matrix units read it at a third of the speed of a plain sum.
        y = jnp.sum(kernel.astype(jnp.float32) * rows.astype(jnp.float32), axis=1)[None]
    elif dtype == jnp.float32:
        few = 1 < len(rows) <= FEW and kernel.size >= PIECE and jax.default_backend() == "cpu"
        y = _in_pieces(rows, kernel) if few else _products(rows, kernel)
    else:
        y = _rounded_products(rows, kernel)
    return y.astype(out or dtype).reshape(*x.shape[:-1], len(kernel))


def _products(x, w, over=(1, 1)):
    return lax.dot_general(x, w, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _in_pieces(x, w):
    """x [R, in] times w [out, in] transposed, float32 [R, out], row by row by equal pieces of w and by what is left of
    it, as a vocabulary may have no divisors. The gradient is that of one product: that of the slices would add up a
    whole kernel for each piece."""
    # A multiple of eight rows, so that each is summed as in the product of one row with the whole kernel.
    size = max(8, len(w) // -(-w.size // PIECE) // 8 * 8)
    count = len(w) // size

    def by(piece):
        return lax.map(lambda row: _products(row[None], piece)[0], x)

    y = lax.map(lambda i: by(lax.dynamic_slice_in_dim(w, i * size, size)), jnp.arange(count))  # [count, R, size]
    y = y.transpose(1, 0, 2).reshape(len(x), count * size)
    return jnp.concatenate([y, by(w[count * size :])], axis=1) if count * size < len(w) else y


@jax.custom_vjp
def _rounded_products(x, w):
    """x [R, in] times w [out, in] transposed, float32 [R, out]. Its cotangent, which is float32 as the sums are, is
    rounded to the dtype of x before the two products of the backward pass. Otherwise they would be products of float32,
    for which a GPU needs 1.4 times as long a training step."""
    return _products(x, w)


def _forward(x, w):
    return _products(x, w), (x, w)


def _backward(kept, g):
    x, w = kept
    g = g.astype(x.dtype)
    return _products(g, w, (1, 0)).astype(x.dtype), _products(g, x, (0, 0)).astype(w.dtype)


_rounded_products.defvjp(_forward, _backward)
_in_pieces.defvjp(_forward, _backward)


def param(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], dtype) -> jax.Array:
    """The parameter of a module, or where it has none yet, init(key, shape, dtype). Flax's own `Module.param` traces
    the initializer at every use to compare shapes, which costs a tenth of the wait for the first text.

    Raises:
      InputError: the parameter has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.dtype(dtype))
    found = module.get_variable("params", name)
    if jnp.shape(found) != shape:
        path = "/".join((*module.path, name))
        raise InputError(
            f"the parameter {path} has shape {jnp.shape(found)}, but the model's sizes give {shape}: the parameters "
            "are another model's."
        )
    return found


class Dense(nn.Module):
    """y = x Wᵀ + b with kernel (out, in); of parameters with `rows`, {"a": [R, r, in], "b": [R, out, r]}, also a
    low-rank change of each row, y_i + (x_i a_jᵀ) b_jᵀ with j = i modulo R, in float32. R is B, or the number of copies
    of a stream, whose rows are next to each other."""

    features: int
    lm: Any
    bias: bool
    scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        dtype = jnp.dtype(self.lm.param_dtype)
        init = jax.nn.initializers.normal(0.02 * self.scale)
        y = matmul(x, param(self, "kernel", init, (self.features, x.shape[-1]), dtype), self.lm.dtype)
        if self.has_variable("params", "rows"):
            rows = self.get_variable("params", "rows")
            own = x.astype(jnp.float32).reshape(-1, len(rows["a"]), *x.shape[1:])
            inner = jnp.einsum("knti,nri->kntr", own, rows["a"], precision="highest")
            change = jnp.einsum("kntr,nor->knto", inner, rows["b"], precision="highest")
            y = (y + change.reshape(y.shape)).astype(y.dtype)
        if self.bias:
            b = param(self, "bias", jax.nn.initializers.zeros, (self.features,), dtype)
            y = y + b.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class Norm(nn.Module):
    """The norm `lm.norm` over the last axis, in float32: LayerNorm ("layer"), RMSNorm ("rms"), or RMSNorm whose weight
    is added to one ("rms_plus_one").

    Attributes:
      bias: whether LayerNorm has one.
      each: a weight of its own for each entry of the axis before the last, stored flat.
    """

    lm: Any
    bias: bool = True
    each: bool = False

    @nn.compact
    def __call__(self, x):
        dtype = jnp.dtype(self.lm.param_dtype)
        own = x.shape[-2:] if self.each else x.shape[-1:]
        shape = (1,) * (x.ndim - len(own)) + own
        y = x.astype(jnp.float32)
        if self.lm.norm == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.lm.norm_eps)
        plus = self.lm.norm == "rms_plus_one"
        initial = jax.nn.initializers.zeros if plus else jax.nn.initializers.ones
        scale = param(self, "scale", initial, (math.prod(own),), dtype).astype(jnp.float32).reshape(shape)
        y = y * (1 + scale if plus else scale)
        if self.lm.norm == "layer" and self.bias:
            bias = param(self, "bias", jax.nn.initializers.zeros, (math.prod(own),), dtype)
            y = y + bias.astype(jnp.float32).reshape(shape)
        return y.astype(x.dtype)


class Mlp(nn.Module):
    """The feed-forward layer, gated or not."""

    lm: Any

    @nn.compact
    def __call__(self, x):
        lm, act = self.lm, ACTIVATIONS[self.lm.activation]
        y = Dense(lm.mlp_width, lm, lm.bias_mlp, name="up")(x)
        if lm.gated:
            y = act(Dense(lm.mlp_width, lm, lm.bias_mlp, name="gate")(x)) * y
        else:
            y = act(y)
        y = split(y, "data", None, "tensor")
        return Dense(lm.width, lm, lm.bias_mlp, 1 / math.sqrt(2 * lm.depth), name="down")(y)
