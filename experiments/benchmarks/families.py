"""Every model family against `transformers`: the largest difference of logits, on tiny random models in float32.

    python experiments/benchmarks/families.py [--only=gemma2 …] [--json=FILE]

Prints the table of docs/models.md. Rows are longer than the windows of attention, and ragged. The columns:

  logits       one full row, without padding, against `transformers`
  left-padded  its beginnings in the same batch, padded on the left, against `transformers`
  cached       the same batch read in pieces through the cache, against `transformers`
  prefix       the same under a control with a prefix: cached, and padded, against one full row without a cache
  hidden       the same under a control that edits the stream after and inside a block
  saved        after `hf.save`, read by `transformers`, against the model of before
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import flags
from flax import struct

from ctg_jax.control import IDENTITY, Control
from ctg_jax.io import write_json
from ctg_jax.models import hf
from ctg_jax.models.lm import write_prefix
from experiments import cli

VOCAB, LENGTH, PIECE, WINDOW = 37, 12, 3, 4
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24)
MODERN = dict(SIZES, max_position_embeddings=32, num_key_value_heads=2)
GPT = dict(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=3, n_head=2)
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 16},
    **{"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "partial_rotary_factor": 0.5},
}
GEMMA = dict(MODERN, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=6)
LOCAL = {
    "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}

# name -> (class of the configuration, its settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT),
    "gptj": ("GPTJConfig", dict(GPT, rotary_dim=4)),
    "opt": ("OPTConfig", dict(MODERN, ffn_dim=24)),
    "gpt_neox": ("GPTNeoXConfig", dict(SIZES, max_position_embeddings=32)),
    "stablelm": ("StableLmConfig", dict(MODERN, use_qkv_bias=True, partial_rotary_factor=0.5)),
    "stablelm, parallel, QK norm": (
        "StableLmConfig",
        dict(MODERN, partial_rotary_factor=0.5, use_parallel_residual=True, qk_layernorm=True),
    ),
    "llama": ("LlamaConfig", dict(MODERN, rope_parameters=LLAMA3)),
    "mistral": ("MistralConfig", dict(MODERN, sliding_window=WINDOW)),
    "qwen2": ("Qwen2Config", dict(MODERN, rope_parameters=YARN)),
    "qwen2, upper layers with a window": (
        "Qwen2Config",
        dict(MODERN, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    ),
    "qwen3": ("Qwen3Config", dict(MODERN, head_dim=8, tie_word_embeddings=True)),
    "olmo2": ("Olmo2Config", MODERN),
    "smollm3": ("SmolLM3Config", dict(MODERN, no_rope_layer_interval=2)),
    "smollm3, window": (
        "SmolLM3Config",
        dict(MODERN, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=WINDOW),
    ),
    "phi3": ("Phi3Config", dict(MODERN, sliding_window=WINDOW)),
    "phi3, longrope, partial (Phi-4-mini)": (
        "Phi3Config",
        dict(MODERN, hidden_size=32, original_max_position_embeddings=16, rope_parameters=LONG),
    ),
    "gemma2": (
        "Gemma2Config",
        dict(GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        dict(
            **{**GEMMA, "num_hidden_layers": 4},
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=LOCAL,
        ),
    ),
}
COLUMNS = ("logits", "left-padded", "cached", "prefix", "hidden", "saved")


@struct.dataclass
class Acts(Control):
    """Adds a vector to the stream at two sites, and holds a prefix; either may be None."""

    vector: jax.Array | None = None
    keys: jax.Array | None = None  # [2, L, K, P, H]
    sites: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def prefix(self, state):
        if self.keys is None:
            return None
        k, v = self.keys
        return tuple(jnp.broadcast_to(a[:, None], (len(k), 3, *k.shape[1:])) for a in (k, v))

    def hidden(self, h, site, pos, state):
        if self.vector is None:
            return h
        on = sum((jnp.asarray(site) == s).astype(h.dtype) for s in self.sites)
        return h + on * self.vector.reshape(1, 1, -1)


def build(name: str, folder: Path) -> torch.nn.Module:
    """A model with every weight random (biases and norms too, which start at 0 and 1), saved in `folder`."""
    torch.manual_seed(0)
    kind, settings = FAMILIES[name]
    config = getattr(transformers, kind)(**{**IDS, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [3, T]: a row, and two beginnings of it that are padded on the left."""
    row = np.random.default_rng(0).integers(2, VOCAB, LENGTH)
    pads = (0, 2, 5)
    tokens = np.stack([np.r_[np.ones(p, int), row[: LENGTH - p]] for p in pads])
    return tokens, np.arange(LENGTH)[None, :] >= np.array(pads)[:, None]


def torch_logits(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    with torch.no_grad():
        given = dict(attention_mask=torch.tensor(mask).long(), position_ids=positions)
        return model(torch.tensor(tokens), **given, use_cache=False).logits.numpy()


def whole(lm, params, tokens, mask, control=IDENTITY) -> np.ndarray:
    """Logits [B, T, V], without a cache."""
    read = jax.jit(lambda p, c: lm.apply(p, lm.embed(p, tokens), mask, control=c).logits)
    return np.asarray(read(params, control))


def cached(lm, params, tokens, mask, control=IDENTITY) -> np.ndarray:
    """The same through the cache, `PIECE` tokens at a time."""
    batch, length = tokens.shape

    @jax.jit
    def read(params, control):
        prefix = control.prefix(())
        p = 0 if prefix is None else prefix[0].shape[3]
        cache = lm.init_cache(params, batch, p + length)
        cache = cache if prefix is None else write_prefix(cache, prefix)

        def step(cache, piece):
            out = lm.apply(params, lm.embed(params, piece[0]), piece[1], cache, control)
            return out.cache, out.logits

        pieces = [jnp.asarray(x).reshape(batch, -1, PIECE).swapaxes(0, 1) for x in (tokens, mask)]
        return jax.lax.scan(step, cache, tuple(pieces))[1]

    z = np.asarray(read(lm.unstack(params), control))
    return z.swapaxes(0, 1).reshape(batch, length, -1)


def apart(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """The largest difference where the mask is set."""
    return float(np.abs(np.where(mask[..., None], a - b, 0)).max())


def controlled(lm, params, control) -> float:
    """The largest difference, under a control, between one full row and its padded beginnings, cached or not."""
    tokens, mask = rows()
    one = whole(lm, params, tokens, mask, control)
    assert apart(one, whole(lm, params, tokens, mask), mask) > 0.05, "the control does something"
    worst = apart(cached(lm, params, tokens, mask, control), one, mask)
    for z, m in zip(one[1:], mask[1:]):
        worst = max(worst, float(np.abs(z[m] - one[0][: m.sum()]).max()))
    return worst


def measure(name: str, columns: tuple[str, ...] = COLUMNS) -> dict[str, float]:
    """The largest difference of each column."""
    tokens, mask = rows()
    out = {}
    with tempfile.TemporaryDirectory() as there, tempfile.TemporaryDirectory() as here:
        model = build(name, Path(there))
        theirs = torch_logits(model, tokens, mask)
        assert np.std(theirs) > 0.05, "the scale of the logits gives a tolerance its meaning"
        lm, params = hf.load(there)
        ours = whole(lm, params, tokens, mask)
        out["logits"] = apart(ours[:1], theirs[:1], mask[:1])
        out["left-padded"] = apart(ours[1:], theirs[1:], mask[1:])
        if "cached" in columns:
            out["cached"] = apart(cached(lm, params, tokens, mask), theirs, mask)
        key = jax.random.key(0)
        shape = (2, lm.depth, lm.kv_heads, 2, lm.head_dim)
        keys, vector = jax.random.normal(key, shape), jax.random.normal(key, (lm.width,))
        sites = (1, lm.depth + 3)  # after block 1, and inside block 2
        if "prefix" in columns:
            out["prefix"] = controlled(lm, params, Acts(keys=keys))
        if "hidden" in columns:
            out["hidden"] = controlled(lm, params, Acts(vector=vector, sites=sites))
        if "both" in columns:
            out["both"] = controlled(lm, params, Acts(vector=vector, sites=sites, keys=keys))
        hf.save(here, lm, params)
        again = transformers.AutoModelForCausalLM.from_pretrained(here, attn_implementation="eager").eval()
        assert type(again) is type(model)
        out["saved"] = apart(torch_logits(again, tokens, mask), theirs, mask)
        assert hf.load(here)[0] == lm
    return out


def define(fv):
    flags.DEFINE_multi_enum("only", None, list(FAMILIES), "the families that are measured", flag_values=fv)
    flags.DEFINE_string("json", None, "also write the differences to this file", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| family | " + " | ".join(COLUMNS) + " |\n|---|" + "--:|" * len(COLUMNS))
    found = {}
    for name in args.only or FAMILIES:
        found[name] = measure(name)
        print(f"| {name} | " + " | ".join(f"{found[name][c]:.1e}" for c in COLUMNS) + " |", flush=True)
    if args.json:
        write_json(Path(args.json), found)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
