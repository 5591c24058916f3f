"""Files without torch: round trips, sharded loads that read each byte once, and every kind of bad folder."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from ctg_jax import tree
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.encoder import Encoder
from ctg_jax.models.hf.decoders import DECODERS
from ctg_jax.models.hf.tensors import Checkpoint
from ctg_jax.types import InputError

GPT2 = Transformer.gpt2(vocab=24, width=16, depth=2, heads=4, context=8)
LLAMA = Transformer.llama(vocab=24, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24, context=8)
NEOX = dataclasses.replace(
    GPT2, family="gpt_neox", activation="gelu", positions="rotary", rotary_dim=2, parallel=True, tied=False
)
SENTENCE = Encoder(
    vocab=24, width=8, depth=2, heads=2, head_dim=4, mlp_width=12, context=9, family="t5", norm="rms", norm_eps=1e-6,
    pre_norm=True, activation="relu", bias=False, scaled=False, project=6, project_activation="tanh", unit=True,
)  # fmt: skip


def _params(model, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(jnp.dtype(dtype)), shapes)


@pytest.fixture
def folder(tmp_path):
    """A good GPT-2 folder to spoil."""
    hf.save(tmp_path / "model", GPT2, _params(GPT2))
    return tmp_path / "model"


def _edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lm", [GPT2, LLAMA, NEOX], ids=lambda m: m.family)
def test_round_trip(lm, dtype, tmp_path):
    params = _params(lm, dtype)
    hf.save(tmp_path, lm, params)
    back, read = hf.load(tmp_path, dtype=dtype)
    assert back == dataclasses.replace(lm, dtype=dtype, param_dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, params, read)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]  # no temporary file is left


def test_sentence_transformers_round_trip(tmp_path):
    params = _params(SENTENCE)
    hf.save(tmp_path, SENTENCE, params)
    back, read = hf.load_encoder(tmp_path)
    assert back == SENTENCE
    jax.tree.map(np.testing.assert_array_equal, params, read)
    assert list(load_file(tmp_path / "2_Dense" / "model.safetensors")) == ["linear.weight"]


def _mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def _shardings(abstract):
    """Kernels cut over both axes, layers and all; the rest replicated."""
    mesh = _mesh()
    specs = {
        "layers/attn/qkv/kernel": ("model", "data", None),
        "layers/attn/out/kernel": (None, "model", "data"),
        "layers/mlp/up/kernel": (None, ("data", "model"), None),
        "layers/attn/qkv/bias": (None, "data"),
        "embed/tokens": ("data", "model"),
    }
    return tree.map_with_path(lambda p, x: NamedSharding(mesh, PartitionSpec(*specs.get(p, ()))), abstract)


@pytest.mark.parametrize("lm", [GPT2, LLAMA, NEOX], ids=lambda m: m.family)
def test_sharded_load_reads_each_element_once(lm, tmp_path, monkeypatch):
    params = _params(lm)
    hf.save(tmp_path, lm, params)
    read, elements = Checkpoint.read, {}

    def count(self, leaf, index, dtype):
        out = read(self, leaf, index, dtype)
        elements.setdefault(leaf, []).append(out.size)
        return out

    monkeypatch.setattr(Checkpoint, "read", count)
    _, placed = hf.load(tmp_path, shardings=_shardings)
    jax.tree.map(np.testing.assert_array_equal, params, placed)
    expected = tree.flatten(_shardings(params))
    for path, leaf in tree.flatten(placed).items():
        assert leaf.sharding == expected[path]
    for path, leaf in DECODERS[lm.family].names(lm).items():
        assert sum(elements[leaf]) == np.prod(leaf.shape), path
    kernel = DECODERS[lm.family].names(lm)["layers/attn/qkv/kernel"]
    assert elements[kernel] == [np.prod(kernel.shape) // 8] * 8

    _, given = hf.load(tmp_path, shardings=_shardings(params))  # a tree instead of a function
    jax.tree.map(np.testing.assert_array_equal, params, given)
    lacking = {k: v for k, v in _shardings(params).items() if k != "embed"}
    with pytest.raises(InputError, match=r"shardings: leaf embed/.* is on one side only"):
        hf.load(tmp_path, shardings=lacking)


def test_sharded_load_runs(tmp_path):
    """Logits of parameters that were placed over eight devices are those of one device."""
    hf.save(tmp_path, LLAMA, _params(LLAMA))
    tokens = jnp.arange(12).reshape(2, 6)
    outs = []
    for shardings in (None, _shardings):
        lm, params = hf.load(tmp_path, shardings=shardings)
        outs.append(jax.jit(lambda p, lm=lm: lm.apply(p, lm.embed(p, tokens), tokens >= 0).logits)(params))
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-4, atol=1e-4)


def test_rope_scaling_of_old_and_new_configurations(tmp_path):
    scaled = dataclasses.replace(LLAMA, rope_theta=500.0, rope_scaling=("llama3", 8.0, 1.0, 4.0, 4.0))
    hf.save(tmp_path, scaled, _params(scaled))
    assert hf.load(tmp_path)[0] == scaled
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    old = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    assert hf.load(tmp_path)[0] == scaled
    _edit(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    assert hf.load(tmp_path)[0].rope_scaling == ("linear", 2.0)
    _edit(tmp_path, rope_scaling={"rope_type": "mrope", "factor": 2.0})
    with pytest.raises(InputError, match="rope type is 'mrope'"):
        hf.load(tmp_path)


def _refused(folder, *words, load=hf.load, **more):
    """One sentence that holds all the words."""
    with pytest.raises(InputError) as caught:
        load(folder, **more)
    text = str(caught.value)
    assert "\n" not in text and all(w in text for w in words), text


def test_missing_folder_and_unreachable_hub(tmp_path):
    _refused(tmp_path / "nothing", "nothing", "no such folder")
    _refused("./nothing", "no such folder")
    _refused("some-org/some-model", "some-org/some-model", "hub", "network")


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    _refused(folder, "no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    _refused(folder, "pytorch_model.bin", "pickle", "safetensors")


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_weights(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    _refused(folder, str(file), "truncated")


def test_missing_wrong_and_surplus_tensors(folder):
    file = folder / "model.safetensors"
    good = load_file(file)
    save_file({k: v for k, v in good.items() if k != "transformer.h.1.mlp.c_fc.bias"}, file)
    _refused(folder, "transformer.h.1.mlp.c_fc.bias", "missing")
    save_file(good | {"transformer.wte.weight": np.zeros((23, 16), np.float32)}, file)
    _refused(folder, str(file), "transformer.wte.weight", "[23, 16]", "[24, 16]")
    save_file(good | {"transformer.h.0.attn.bias": np.zeros((1, 1, 8, 8), np.float32)}, file)
    hf.load(folder)  # the causal mask that old files hold
    save_file(good | {"transformer.h.0.adapter.weight": np.zeros((2, 2), np.float32)}, file)
    _refused(folder, "adapter.weight", "no place")
    save_file(good, file)
    _edit(folder, n_layer=1)
    _refused(folder, "transformer.h.1.", "another depth")
    _edit(folder, n_layer=3)
    _refused(folder, "transformer.h.2.ln_1.weight", "missing")


def test_weights_of_another_family(folder, tmp_path):
    hf.save(tmp_path / "llama", LLAMA, _params(LLAMA))
    (folder / "config.json").write_bytes((tmp_path / "llama" / "config.json").read_bytes())
    _refused(folder, "model.embed_tokens.weight", "missing")


def test_configurations_that_are_refused(folder):
    _refused(folder, "config.json", "'gpt2'", "bert, roberta, distilbert, t5", load=hf.load_encoder)
    _edit(folder, scale_attn_by_inverse_layer_idx=True)
    _refused(folder, "scale_attn_by_inverse_layer_idx", "True")
    _edit(folder, scale_attn_by_inverse_layer_idx=False, activation_function="mish")
    _refused(folder, "'mish'", "gelu_new")
    _edit(folder, activation_function="gelu", n_head=None)
    _refused(folder, "config.json", "'n_head' is missing")
    _edit(folder, n_head=4)
    _refused(folder, "dtype is 'float33'", dtype="float33")
    _edit(folder, model_type="falcon", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    _refused(folder, "config.json", "'falcon'", "gpt2, llama, gpt_neox")
    (folder / "config.json").write_text("{")
    _refused(folder, "config.json", "JSON")
    (folder / "config.json").unlink()
    _refused(folder, "config.json", "missing")


def test_index_of_sharded_files(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    index = folder / "model.safetensors.index.json"
    weights = {n: f for f, part in shards.items() for n in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    jax.tree.map(np.testing.assert_array_equal, _params(GPT2), hf.load(folder)[1])
    (folder / "b.safetensors").unlink()
    _refused(folder, "b.safetensors", "missing")
    index.write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
    _refused(folder, "index.json", "outside")
    index.write_text("{}")
    _refused(folder, "index.json", "weight_map")


def test_sentence_transformers_that_are_refused(tmp_path):
    hf.save(tmp_path, SENTENCE, _params(SENTENCE))
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    _refused(tmp_path, str(file), "max_tokens", "mean_tokens", load=hf.load_encoder)
    modules = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps(modules[:1] + modules[2:]))
    _refused(tmp_path, "modules.json", "Transformer, Dense, Normalize", load=hf.load_encoder)


def test_save_refuses_what_would_come_back_as_another_model(tmp_path):
    params = _params(GPT2)
    with pytest.raises(InputError, match="norm is 'rms', which the family 'gpt2' cannot express"):
        other = dataclasses.replace(GPT2, norm="rms")
        hf.save(tmp_path, other, _params(other))
    with pytest.raises(InputError, match="leaf norm/scale is missing"):
        hf.save(tmp_path, GPT2, params | {"norm": {"bias": params["norm"]["bias"]}})
    with pytest.raises(InputError, match=r"leaf embed/tokens has shape \(3, 3\)"):
        hf.save(tmp_path, GPT2, params | {"embed": params["embed"] | {"tokens": np.zeros((3, 3))}})
    with pytest.raises(InputError, match="family is 'bloom'"):
        hf.save(tmp_path, dataclasses.replace(GPT2, family="bloom"), params)
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        hf.save(tmp_path / "file", GPT2, params)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    """The disk fills up in the middle of the weights: the model that stood there before still does."""
    hf.save(tmp_path, GPT2, _params(GPT2))
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        hf.save(tmp_path, GPT2, jax.tree.map(np.zeros_like, _params(GPT2)))
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
