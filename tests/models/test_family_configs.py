"""What config.json means in each family: older and newer keys, sizes that were published, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctg_jax import tree
from ctg_jax.control import IDENTITY
from ctg_jax.decode import loop
from ctg_jax.learn import losses
from ctg_jax.mesh.plan import Plan
from ctg_jax.mesh.rules import DECODER
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.hf.decoders import DECODERS
from ctg_jax.models.pattern import Layer, shortest
from ctg_jax.models.rope import frequencies
from ctg_jax.types import InputError, Prompts, Sampling

BASE = dict(vocab_size=37, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=24)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64)


def _read(config):
    return DECODERS[config["model_type"]].read(config, set())


# -- keys of before transformers 5


OLD = {
    "gemma3_text": dict(
        head_dim=8, sliding_window=4, sliding_window_pattern=3, rope_theta=5e5, rope_local_base_freq=50.0
    ),
    "gemma3_text, scaled": dict(head_dim=8, rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma2": dict(head_dim=8, sliding_window=4, rope_theta=500.0),
    "mistral": dict(sliding_window=4, rope_theta=1e6),
    "qwen2": dict(
        **dict(use_sliding_window=True, sliding_window=4, max_window_layers=4, rope_theta=1e6),
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "qwen2, no window": dict(use_sliding_window=False, sliding_window=32768, max_window_layers=3),
    "qwen3": dict(head_dim=16, rope_theta=1e6, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "smollm3": dict(no_rope_layers=[1, 1, 0] * 2, rope_theta=5e6),
    "olmo2": dict(rope_theta=5e5),
    "phi3": dict(sliding_window=7, rope_theta=500.0),
    "phi3, longrope": dict(
        **dict(original_max_position_embeddings=16, partial_rotary_factor=0.5),
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
    ),
    "stablelm": dict(partial_rotary_factor=0.5, rope_theta=500.0),
}


@pytest.mark.parametrize("name", OLD)
def test_older_keys_mean_what_transformers_makes_of_them(name):
    """A config.json of before transformers 5 is read as the one that transformers 5 writes for it."""
    transformers = pytest.importorskip("transformers")
    family = name.partition(",")[0]
    kinds = {"gemma3_text": "Gemma3Text", "smollm3": "SmolLM3", "stablelm": "StableLm"}
    kind = kinds.get(family, family.title())
    old = {"model_type": family, **BASE, **OLD[name]}
    new = json.loads(getattr(transformers, f"{kind}Config")(**json.loads(json.dumps(old))).to_json_string())
    assert "rope_parameters" in new
    assert _read(old) == _read(new)


def test_patterns():
    near, far = Layer(window=4), Layer()
    assert shortest((near, near, far) * 2) == (near, near, far)
    assert shortest((near, near, far, near)) == (near, near, far)  # a remainder
    assert shortest((far, far, near)) == (far, far, near)
    gemma = _read({"model_type": "gemma3_text", **BASE, "head_dim": 8})
    assert [layer.window for layer in gemma.pattern] == [4096] * 5 + [None]
    assert [layer.theta for layer in gemma.pattern] == [1e4] * 5 + [None] and gemma.rope_theta == 1e6


def test_longrope_reads_rows_of_the_original_context_with_the_short_factors():
    short, long = (1.0, 1.5, 2.0, 2.5), (4.0, 5.0, 6.0, 7.0)
    lm = _read(
        {
            **{"model_type": "phi3", **BASE, "original_max_position_embeddings": 16, "num_hidden_layers": 1},
            "rope_scaling": {"rope_type": "longrope", "short_factor": list(short), "long_factor": list(long)},
        }
    )
    magnitude = np.sqrt(1 + np.log(4) / np.log(16))
    assert lm.context == 16 and lm.rope_scaling == ("longrope", 16, 64, magnitude, short, long)
    for context, factors in ((16, short), (64, long)):
        freq, found = frequencies(8, 1e4, lm.rope_scaling, context)
        np.testing.assert_allclose(freq, 1e4 ** (-np.arange(4) / 4) / factors, rtol=1e-6)
        assert found == magnitude


def test_the_scale_of_embeddings_is_rounded_to_their_dtype():
    """As in `transformers`: in bfloat16 the root of 24 is 4.90625."""
    lm = _read({"model_type": "gemma2", **BASE, "head_dim": 8, "hidden_size": 24})
    table = jax.random.normal(jax.random.key(0), (37, 24))
    for dtype, scale in ((jnp.float32, np.sqrt(24)), (jnp.bfloat16, 4.90625)):
        words = table.astype(dtype)
        found = lm.embed({"embed": {"tokens": words}}, jnp.arange(37))
        np.testing.assert_array_equal(found, (words * jnp.asarray(scale, dtype)).astype(lm.dtype))
    assert float(jnp.asarray(np.sqrt(24), jnp.bfloat16)) == 4.90625


# -- what is refused


REFUSED = [
    ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
    ("gemma3_text", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0"),
    ("gemma3_text", dict(rope_parameters={"rope_type": "default"}), "rope_parameters holds 'rope_type'"),
    ("gemma3_text", dict(layer_types=["full_attention"]), "expected 'full_attention' or 'sliding_attention' for each"),
    ("gemma2", dict(layer_types=["chunked_attention"] * 6), "chunked_attention"),
    ("llama", dict(sliding_window=8), "sliding_window is 8, which models of type 'llama' do not obey"),
    ("mistral", dict(layer_types=["sliding_attention"] * 6), "layer_types are"),
    ("qwen3", dict(layer_types=["sliding_attention"] * 6), "sliding_window is missing"),
    ("qwen2", dict(rope_scaling={"rope_type": "mrope", "mrope_section": [1]}), "rope type is 'mrope'"),
    ("olmo2", dict(clip_qkv=8.0), "clip_qkv is 8.0"),
    ("phi3", dict(attention_bias=True), "attention_bias is True"),
    (
        "llama",
        dict(rope_scaling={"type": "yarn", "factor": 2.0, "short_factor": [1.0]}),
        "rotary setting 'short_factor'",
    ),
    ("stablelm", dict(partial_rotary_factor=0.125), "0.125 of 8 features rotate, expected an even number"),
    ("opt", dict(ffn_dim=24, do_layer_norm_before=False), "do_layer_norm_before is False"),
    ("opt", dict(ffn_dim=24, word_embed_proj_dim=16), "word_embed_proj_dim is 16, expected 32"),
    ("gptj", dict(n_embd=32, n_head=4, n_layer=1, rotary_dim=None), "rotary_dim is None, expected an even number"),
    ("gptj", dict(n_embd=32, n_head=4, n_layer=1, rotary_dim=4, tie_word_embeddings=True), "has a bias"),
]


@pytest.mark.parametrize("family, changes, words", REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_settings_that_would_be_dropped_are_refused(family, changes, words):
    with pytest.raises(InputError) as caught:
        _read({"model_type": family, **BASE, **changes})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mixtral"},
        {"model_type": "qwen3_moe"},
        {"model_type": "gpt_oss"},
        {"model_type": "new", "num_local_experts": 8},
    ],
    ids=lambda c: c["model_type"],
)
def test_mixtures_of_experts_are_refused_by_name(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = rf"model_type is '{config['model_type']}', a mixture of experts, .* dense model, of one of gpt2, llama"
    with pytest.raises(InputError, match=words):
        hf.load(tmp_path)


def test_the_text_model_of_a_gemma_3_that_reads_images(tmp_path):
    lm = Transformer(
        **dict(vocab=37, width=16, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=24, context=64),
        **dict(family="gemma3_text", norm="rms_plus_one", norm_eps=1e-6, qk_norm="head", gated=True, embed_scaled=True),
        **dict(norms=("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"), positions="rotary", rotary_dim=8),
        **dict(rope_theta=1e6, pattern=(Layer(4, theta=1e4), Layer()), bias_attn=False, bias_out=False, bias_mlp=False),
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    hf.save(tmp_path, lm, params)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": config, "vision_config": {"model_type": "siglip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = load_file(tmp_path / "model.safetensors")
    vision = {"vision_tower.patches.weight": np.zeros((2, 2), np.float32)}
    for stem in ("language_model.model.", "model.language_model."):
        renamed = {name.replace("model.", stem, 1): x for name, x in tensors.items()}
        save_file(renamed | vision, tmp_path / "model.safetensors")
        back, read = hf.load(tmp_path)
        assert back == lm
        jax.tree.map(np.testing.assert_array_equal, params, read)


# -- published sizes


def _sizes(vocab, width, mlp, depth, heads, kv, **more):
    sizes = dict(vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_hidden_layers=depth)
    return sizes | dict(num_attention_heads=heads, num_key_value_heads=kv) | more


PUBLISHED = {  # name -> (parameters in billions, config.json)
    "Qwen2.5-72B": (72.7, dict(model_type="qwen2", **_sizes(152064, 8192, 29568, 80, 64, 8))),
    "Qwen3-32B": (32.8, dict(model_type="qwen3", **_sizes(151936, 5120, 25600, 64, 64, 8, head_dim=128))),
    "Mistral-7B": (7.24, dict(model_type="mistral", **_sizes(32000, 4096, 14336, 32, 32, 8))),
    "gemma-2-27b": (
        27.2,
        dict(model_type="gemma2", **_sizes(256000, 4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144)),
    ),
    "gemma-3-27b": (
        27.0,
        dict(
            model_type="gemma3",
            text_config=_sizes(
                **dict(vocab=262208, width=5376, mlp=21504, depth=62, heads=32, kv=16, head_dim=128),
                **dict(sliding_window=1024, query_pre_attn_scalar=168),
                rope_scaling={"rope_type": "linear", "factor": 8.0},
            ),
        ),
    ),
    "phi-4": (14.7, dict(model_type="phi3", **_sizes(100352, 5120, 17920, 40, 40, 10, max_position_embeddings=16384))),
    "OLMo-2-32B": (32.2, dict(model_type="olmo2", **_sizes(100352, 5120, 27648, 64, 40, 8))),
    "SmolLM3-3B": (3.08, dict(model_type="smollm3", **_sizes(128256, 2048, 11008, 36, 16, 4))),
    "stablelm-2-12b": (
        12.1,
        dict(
            model_type="stablelm",
            **_sizes(100352, 5120, 13824, 40, 32, 8, use_parallel_residual=True, qk_layernorm=True),
        ),
    ),
    "gpt-j-6b": (6.05, dict(model_type="gptj", vocab_size=50400, n_embd=4096, n_layer=28, n_head=16)),
    "opt-66b": (65.7, dict(model_type="opt", ffn_dim=36864, **_sizes(50272, 9216, 0, 64, 72, 72))),
}


@pytest.mark.parametrize("depth", [3, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_members_fit_on_paper(name, depth):
    """eval_shape of init, generate and the gradient of a loss over a mesh of 4 x 2: no array is made. Decoding is
    unrolled, so the default run traces three layers of it."""
    billions, config = PUBLISHED[name]
    lm = dataclasses.replace(_read(config), dtype="bfloat16", param_dtype="bfloat16")
    plan = Plan(axes={"data": 4, "tensor": 2}, rules=DECODER)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    size = tree.size_bytes(params) / 2
    assert abs(size / 1e9 - billions) < 0.006 * billions, size
    assert plan.bytes_per_device(params) < 1.01 * 2 * size / 8 + 2**22  # norms are replicated
    batch = {k: jax.ShapeDtypeStruct((8, 16), t) for k, t in (("tokens", jnp.int32), ("mask", bool))}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    few = dataclasses.replace(lm, depth=depth or lm.depth)
    with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):
        loss = losses.lm_loss(lm)
        grad = jax.eval_shape(jax.grad(lambda p, b: loss(p, None, b, None).total), params, batch)
        made = jax.eval_shape(
            lambda p, b, k: loop.loop(few, p, Prompts(b["tokens"], b["mask"], k), IDENTITY, Sampling(max_new=4)),
            *(jax.eval_shape(few.init, jax.random.key(0)), batch, keys),
        )
    assert jax.tree.map(jnp.shape, grad) == jax.tree.map(jnp.shape, params)
    assert made.tokens.shape == (8, 4)
