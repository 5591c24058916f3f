"""Sharding rules, as tables: which dimensions of which leaves are split over which axes of a mesh; see `Plan.rules`."""

from __future__ import annotations

from jax.sharding import PartitionSpec

P = PartitionSpec
Rules = tuple[tuple[str, PartitionSpec], ...]

REPLICATED: Rules = ((".*", P()),)

# The decoder of `ctg_jax.models.decoder`, kernels (out, in): columns, then rows, are split over `tensor`
# (Shoeybi et al. 2019, Megatron-LM); the other side is split over `data` (fully sharded data parallel).
DECODER: Rules = (
    (r"embed/tokens|head/kernel", P("tensor", "data")),
    (r"embed/positions", P(None, "data")),
    (r"(.*/)?(attn/qkv|mlp/up|mlp/gate)/kernel", P("tensor", "data")),
    (r"(.*/)?(attn/qkv|mlp/up|mlp/gate)/bias", P("tensor")),
    (r"(.*/)?(attn/out|mlp/down)/kernel", P("data", "tensor")),
    (r"(.*/)?(attn/out|mlp/down)/bias", P()),
    (r"head/bias", P("tensor")),
    (r"(.*/)?(\w+_norm|norm)/(scale|bias)", P()),
)

# The encoders of `ctg_jax.models.encoder`: blocks as those of the decoder.
ENCODER: Rules = (
    (r"head/dense/kernel|project/kernel", P("tensor", "data")),
    (r"head/out/kernel", P(None, "data")),
    (r"embed/types|relative|(head/dense|head/out|project)/bias|embed/norm/(scale|bias)", P()),
    *DECODER,
)

# What is trained and is neither a language model nor a control (controls declare how their leaves are split): networks
# of diffusion, whose kernels are split to save memory for the optimizer's states, value heads and linear classifiers.
NETWORKS: Rules = (
    (r"(value|params|mu|nu)/(kernel|bias)", P()),
    (r"(score|prompter|net|guide|denoiser|in|out)/(.*/)?kernel", P("data", None)),
    (r"(score|prompter|net|guide|denoiser|in|out)/.*|given|raw|bins|tags", P()),
    (r"mean|deviation|probes|biases|z|basis|vectors?|codes|bias|scale", P()),
)


def whole_over_data(rules: Rules) -> Rules:
    """The rules without the axis `data`: weights are split over `tensor` alone."""
    return tuple((path, P(*(None if part == "data" else part for part in spec))) for path, spec in rules)
