"""The decoders that are read and written, by the `model_type` of their config.json."""

from __future__ import annotations

from ctg_jax.models.hf.family import Config
from ctg_jax.models.hf.gemma import GEMMA
from ctg_jax.models.hf.gpt import GPT
from ctg_jax.models.hf.llama import LLAMA_LIKE
from ctg_jax.models.hf.neox import NEOX

_BY_NAME = {**GPT, **LLAMA_LIKE, **NEOX, **GEMMA}
DECODERS = {
    name: _BY_NAME[name]
    for name in (
        *("gpt2", "llama", "gpt_neox", "gptj", "opt", "stablelm", "mistral", "phi3"),
        *("qwen2", "qwen3", "olmo2", "smollm3", "gemma2", "gemma3_text", "gemma3"),
    )
}

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NAMES = ("mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3", "dbrx", "jamba", "llama4", "llama4_text", "qwen3_next")


def has_experts(config: Config) -> bool:
    """Whether config.json describes a mixture of experts."""
    name = str(config.get("model_type"))
    return "moe" in name or name in _NAMES or any(config.get(key) for key in _EXPERTS)
