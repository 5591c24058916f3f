"""One decoder-only transformer; GPT-2, Llama, Gemma and the other families are values of its frozen configuration.

Parameters are a plain dict. Layers are stacked, leaves [L, …], and scanned; decoding reads the unstacked layout
(`Transformer.unstack`), because a scan over stacked weights copies each layer's weights at every token. Dense
kernels are (out, in), contracted on their last axis, and act on (B·T, D): both are measurably faster, the first
where decoding is bound by reading weights, the second in the backward pass.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ctg_jax import tree
from ctg_jax.control import IDENTITY, Control, overrides
from ctg_jax.mesh.plan import split
from ctg_jax.models.block import Block
from ctg_jax.models.layers import ACTIVATIONS, Norm, matmul
from ctg_jax.models.lm import Cache, Out, Tap, blocks_of, check_depth
from ctg_jax.models.pattern import Layer, views, visible
from ctg_jax.models.rope import angles, frequencies, own_frequencies
from ctg_jax.types import InputError, Params

NORMS = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder-only language model; see `ctg_jax.models.lm.LM` for the protocol it follows.

    Attributes:
      family: which Hugging Face family it is exported as, a key of `ctg_jax.models.hf.decoders.DECODERS`.
      vocab, width, depth, heads, kv_heads, head_dim, mlp_width, context: sizes V, D, L, query heads, K, H, F, and
        the number of positions.
      norm: "layer", "rms", or "rms_plus_one" (RMSNorm whose weight is added to one, Gemma), with `norm_eps`.
      norms: the norms of a block, of `NORMS`: before attention and MLP, or after them ("post"), or both.
      qk_norm: the norm of queries and keys before they rotate: None, "head" (each head, one weight for all; Qwen 3),
        "heads" (each head, a weight for each; StableLM) or "width" (all heads together; OLMo 2).
      activation: a key of `ACTIVATIONS`; gated: whether the MLP multiplies by a gate (SwiGLU).
      positions: "learned", "rotary" (the first `rotary_dim` features of a head, base `rope_theta`), or "none".
      rope_scaling: of the rotary frequencies, see `ctg_jax.models.rope.frequencies`.
      pattern: the kinds of layers, repeated over the depth: layer i is pattern[i mod its length].
      parallel: attention and MLP read the same input (GPT-NeoX), and the same norm of it where `norms` has no
        "mlp_norm" (GPT-J).
      bias_attn, bias_out, bias_mlp, bias_head: biases of the fused qkv, attention output, MLP and unembedding.
      query_dim: scores are divided by its root; None: by that of `head_dim`.
      attn_cap, logit_cap: bounds c of the soft cap c tanh(x / c) of scores and of logits (Gemma 2), or None.
      embed_scaled: embeddings are multiplied by sqrt(D), rounded to their dtype (Gemma).
      tied: the unembedding is the embedding.
      dtype: of activations and products ("float32", "bfloat16"); norms, softmax and logits are float32.
      param_dtype: of initialised parameters.
      remat: recompute each block in the backward pass.
      causal: a token attends to itself and those before it; False: to every token of its row, as the denoiser of a
        diffusion model does. Such a network reads whole rows, so it has no cache.
      block: with causal=False, the size of the blocks of a row: a token attends to its own block and those before it;
        0: the row is one block.
      paired: with `block`, rows are a text followed by another version of it, see `ctg_jax.models.pattern.visible`.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context: int
    family: str = "gpt2"
    norm: str = "layer"
    norm_eps: float = 1e-5
    norms: tuple[str, ...] = ("attn_norm", "mlp_norm")
    qk_norm: str | None = None
    activation: str = "gelu_new"
    gated: bool = False
    positions: str = "learned"
    rotary_dim: int = 0
    rope_theta: float = 10000.0
    rope_scaling: tuple | None = None
    pattern: tuple[Layer, ...] = (Layer(),)
    parallel: bool = False
    bias_attn: bool = True
    bias_out: bool = True
    bias_mlp: bool = True
    bias_head: bool = False
    query_dim: int | None = None
    attn_cap: float | None = None
    logit_cap: float | None = None
    embed_scaled: bool = False
    tied: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False
    causal: bool = True
    block: int = 0
    paired: bool = False

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise InputError(f"kv_heads must divide heads, found {self.kv_heads} and {self.heads}.")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}.")
        if unknown := set(self.norms) - set(NORMS):
            raise InputError(f"norms holds {min(unknown)!r}, expected some of {', '.join(NORMS)}.")
        if self.qk_norm not in (None, "head", "heads", "width"):
            raise InputError(f"qk_norm is {self.qk_norm!r}, expected None, 'head', 'heads' or 'width'.")
        if self.positions == "rotary" and not 0 < self.rotary_dim + self.rotary_dim % 2 <= self.head_dim:
            raise InputError(f"rotary_dim is {self.rotary_dim}, expected 1 to {self.head_dim}, the features of a head.")
        if self.bias_head and self.tied:
            raise InputError("bias_head is True where tied is, expected an unembedding of its own: set tied=False.")
        if not self.pattern or any(layer.window is not None and layer.window < 1 for layer in self.pattern):
            raise InputError(f"pattern is {self.pattern}, expected at least one layer, and windows of at least 1.")
        if not self.causal and any(layer.window for layer in self.pattern):
            raise InputError("pattern has a window, which a network with causal=False cannot have.")
        if self.block < 0 or (self.block and self.causal) or (self.paired and not self.block):
            raise InputError(f"block is {self.block}, expected 0, or with causal=False a number of tokens.")

    @classmethod
    def gpt2(cls, *, vocab=50257, width=768, depth=12, heads=12, context=1024, **more) -> Transformer:
        """GPT-2 (Radford et al. 2019); the defaults are GPT-2 small."""
        sizes = dict(kv_heads=heads, head_dim=width // heads, mlp_width=4 * width)
        return cls(vocab=vocab, width=width, depth=depth, heads=heads, context=context, **(sizes | more))

    @classmethod
    def llama(cls, *, vocab, width, depth, heads, kv_heads, mlp_width, context, **more) -> Transformer:
        """Llama (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, grouped-query attention, no biases."""
        shape = dict(family="llama", norm="rms", activation="silu", gated=True, positions="rotary", tied=False)
        shape |= dict(bias_attn=False, bias_out=False, bias_mlp=False, head_dim=width // heads)
        given = dict(vocab=vocab, width=width, depth=depth, heads=heads, kv_heads=kv_heads)
        given |= dict(mlp_width=mlp_width, context=context)
        merged = shape | given | more
        return cls(**({"rotary_dim": merged["head_dim"]} | merged))

    # -- parameters

    def init(self, key: jax.Array) -> Params:
        """Random parameters: normals of deviation 0.02, residual outputs scaled by 1/sqrt(2L) (GPT-2)."""
        k_embed, k_pos, k_layers, k_head = jax.random.split(key, 4)
        dtype = jnp.dtype(self.param_dtype)
        normal = jax.nn.initializers.normal(0.02)
        embed = {"tokens": normal(k_embed, (self.vocab, self.width), dtype)}
        if self.positions == "learned":
            embed["positions"] = normal(k_pos, (self.context, self.width), dtype)

        def layer(k):
            x = jnp.zeros((1, 1, self.width), self.dtype)
            mask = jnp.ones((1, 1, 1), bool)
            rope = self._rope(self.pattern[0], jnp.zeros((1, 1), jnp.int32))
            return Block(self).init(k, x, mask, rope, None, None, None)["params"]

        norm = Norm(self).init(key, jnp.zeros((1, self.width), self.dtype))["params"]
        params = {"embed": embed, "layers": jax.vmap(layer)(jax.random.split(k_layers, self.depth)), "norm": norm}
        if not self.tied:
            params["head"] = {"kernel": normal(k_head, (self.vocab, self.width), dtype)}
        if self.bias_head:
            params["head"]["bias"] = jnp.zeros((self.vocab,), dtype)
        return params

    def unstack(self, params: Params) -> Params:
        if isinstance(params["layers"], tuple):
            return params
        return {**params, "layers": tree.unstack(params["layers"])}

    def above(self, params: Params | None, site: int) -> tuple[Transformer, Params | None]:
        positions = "none" if self.positions == "learned" else self.positions  # the stream holds them already
        turn = site % len(self.pattern)
        pattern = self.pattern[turn:] + self.pattern[:turn]
        upper = dataclasses.replace(self, depth=self.depth - site, positions=positions, pattern=pattern)
        return upper, params and {**params, "layers": self.unstack(params)["layers"][site:]}

    def init_cache(self, params: Params, batch: int, length: int) -> Cache:
        if not self.causal:
            raise InputError("a network with causal=False reads whole rows and has no cache: call apply without one.")
        shape = (batch, self.kv_heads, length, self.head_dim)

        def empty():
            return tuple(jnp.zeros(shape, self.dtype) for _ in range(self.depth))

        return Cache(
            k=empty(),
            v=empty(),
            mask=jnp.zeros((batch, length), bool),
            length=jnp.zeros((), jnp.int32),
            offset=jnp.zeros((batch,), jnp.int32),
        )

    # -- computation

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        x = params["embed"]["tokens"][tokens]
        return (x * jnp.asarray(math.sqrt(self.width), x.dtype) if self.embed_scaled else x).astype(self.dtype)

    def unembed(self, params: Params, h: jax.Array) -> jax.Array:
        """Logits float32 [..., V] of final hidden states [..., D]."""
        kernel = params["embed"]["tokens"] if self.tied else params["head"]["kernel"]
        z = matmul(h, kernel, self.dtype, out=jnp.float32)
        if self.bias_head:
            z = z + params["head"]["bias"].astype(jnp.float32).reshape((1,) * (z.ndim - 1) + (-1,))
        if self.logit_cap is not None:
            z = self.logit_cap * jnp.tanh(z / self.logit_cap)
        return split(z, "data", None, "tensor")

    def apply(
        self,
        params: Params,
        x: jax.Array,
        mask: jax.Array,
        cache: Cache | None = None,
        control: Control = IDENTITY,
        state: Any = (),
        tap: Tap | None = None,
        last: int | None = None,
        beside: bool = False,
        tap_heads: Tap | None = None,
    ) -> Out:
        tap = tap or (lambda h: None)
        if (found := blocks_of(params)) != self.depth:
            raise InputError(
                f"A language model of {self.depth} blocks was given parameters of {found}: a control that reads along "
                "was fitted on another model, or model and parameters do not belong together."
            )
        pos = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        if cache is None:
            allowed = mask[:, None, :] & visible(self, x.shape[1])[None]
            pos = pos % (x.shape[1] // 2) if self.paired else pos
            prefix, slots = control.prefix(state), pos
            if prefix is not None:
                check_depth("The control's prefix has keys and values for", len(prefix[0]), self.depth)
        else:
            prefix = None  # already in the cache, see `ctg_jax.decode.loop.prefill`
            written = jnp.sum(cache.mask, axis=1, dtype=jnp.int32) - cache.offset  # slots of a prefix
            if beside:  # all at the next position; the last column is each token itself
                pos = jnp.broadcast_to(cache.offset[:, None], x.shape[:2])
                cache_mask = jnp.pad(cache.mask, ((0, 0), (0, 1)), constant_values=True)
                allowed = jnp.broadcast_to(cache_mask[:, None], (*x.shape[:2], cache_mask.shape[1]))
            else:
                pos = pos + cache.offset[:, None]
                cache_mask = lax.dynamic_update_slice(cache.mask, mask, (0, cache.length))
                s, t = jnp.arange(cache_mask.shape[1]), cache.length + jnp.arange(x.shape[1])
                allowed = cache_mask[:, None, :] & (t[None, :, None] >= s[None, None, :])
            slots = jnp.cumsum(cache_mask, axis=1, dtype=jnp.int32) - 1 - written[:, None]

        if self.positions == "learned":
            # Padding may lie past the table; its value is never attended to.
            x = x + params["embed"]["positions"].astype(x.dtype)[jnp.minimum(pos, self.context - 1)]
        x = control.hidden(split(x.astype(self.dtype), "data", None, None), 0, pos, state)
        first = tap(x)

        block, view = Block(self), views(self.pattern, allowed, pos, slots, self._rope)
        length = None if cache is None else cache.length
        acts = tap_heads is not None or overrides(control, "heads")

        def run(x, layer, site, past):
            def between(h):
                return control.hidden(h, self.depth + 1 + site, pos, state)

            read = []

            def heads(y):
                y = control.heads(y, site, pos, state)
                read.append(tap_heads and tap_heads(y))
                return y

            edit = heads if acts else None
            x, kv = block.apply({"params": layer}, x, *view(site), past, length, between, beside, edit)
            x = split(x, "data", None, None)
            return control.hidden(x, site, pos, state), kv, *(read or [None])

        scanned = cache is None and isinstance(params["layers"], dict)
        if scanned and not self.remat:
            # Saving only what the dense layers made, and not every intermediate, is a third faster on a CPU.
            dense = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            run = jax.checkpoint(run, policy=dense, prevent_cse=False)
        elif self.remat:
            run = jax.checkpoint(run, prevent_cse=not scanned, static_argnums=() if scanned else (2,))

        layers = params["layers"]
        if scanned:

            def body(x, layer_site_prefix):
                layer, site, pre = layer_site_prefix
                x, _, y = run(x, layer, site, pre)
                return x, (tap(x), y)

            x, (taps, tapped) = lax.scan(body, x, (layers, jnp.arange(1, self.depth + 1), prefix))
        else:
            layers = layers if isinstance(layers, tuple) else tree.unstack(layers)
            ks, vs, taps, tapped = [], [], [], []
            for i, layer in enumerate(layers):
                if cache is not None:
                    past = (cache.k[i], cache.v[i])
                else:
                    past = None if prefix is None else (prefix[0][i], prefix[1][i])
                x, (k, v), y = run(x, layer, i + 1, past)
                ks.append(k)
                vs.append(v)
                taps.append(tap(x))
                tapped.append(y)
            tapped = tree.stack(tapped) if tapped else None  # no layer above the last site
            if cache is not None and not beside:
                cache = cache.replace(
                    k=tuple(ks),
                    v=tuple(vs),
                    mask=cache_mask,
                    length=cache.length + x.shape[1],
                    offset=cache.offset + jnp.sum(mask, axis=1, dtype=jnp.int32),
                )

        x = Norm(self).apply({"params": params["norm"]}, x)
        x = control.hidden(x, self.depth + 1, pos, state)
        if scanned:
            taps = jax.tree.map(lambda a, b, c: jnp.concatenate([a[None], b, c[None]]), first, taps, tap(x))
        else:
            taps = tree.stack([first, *taps, tap(x)])
        seen = x if last is None else x[:, x.shape[1] - last :]
        return Out(logits=self.unembed(params, seen), hidden=x, cache=cache, taps=taps, heads=tapped)

    def _rope(self, kind: Layer, pos: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """(cos, sin), each float32 [B, T, rotary_dim / 2], or None without rotary positions. Where `kind` does not
        rotate they are 1 and 0, which change nothing."""
        if self.positions != "rotary":
            return None
        if kind.theta is None:
            freq, magnitude = frequencies(self.rotary_dim, self.rope_theta, self.rope_scaling, self.context)
        else:
            freq, magnitude = own_frequencies(self.rotary_dim, kind.theta)
        return angles(pos, freq, magnitude) if kind.rotary else angles(pos, 0 * freq, 1.0)
