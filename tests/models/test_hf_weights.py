"""Files whose weights are not what config.json alone says: heads, surplus tensors, scaling, quantisation."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctg_jax.models import hf
from ctg_jax.types import InputError

torch = pytest.importorskip("torch")
torch_files = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = dict(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
LLAMA = dict(SIZES, max_position_embeddings=32, bos_token_id=0, eos_token_id=0)


def _json(file, **changes):
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in (old | changes).items() if v is not None}))


def _causal(folder, kind=transformers.LlamaForCausalLM, **more):
    torch.manual_seed(0)
    config = kind.config_class(**(LLAMA | more))
    kind(config).save_pretrained(folder)
    return folder


def _logits(folder):
    tokens = np.arange(1, 25)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    lm, params = hf.load(folder)
    ours = jax.jit(lambda p: lm.apply(p, lm.embed(p, tokens), tokens > 0).logits)(params)
    with torch.no_grad():
        return np.asarray(ours), model(torch.tensor(tokens)).logits.numpy()


def _agrees(folder):
    ours, theirs = _logits(folder)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    return ours


# -- heads and tensors


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTNeoX"])
def test_the_head_of_tied_weights(kind, tmp_path):
    cls = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")
    folder = _causal(tmp_path, cls, tie_word_embeddings=True, n_embd=16, n_layer=1, n_head=2)
    file, head = folder / "model.safetensors", "embed_out.weight" if kind == "GPTNeoX" else "lm_head.weight"
    tensors = load_file(file)
    (embed,) = (k for k, v in tensors.items() if v.shape == (300, 16))
    before = _agrees(folder)
    assert hf.load(folder)[0].tied

    once = {head if k == embed else k: v for k, v in tensors.items()}
    save_file(once, file, metadata={"format": "pt"})
    np.testing.assert_array_equal(_agrees(folder), before)
    assert hf.shape(folder).tied

    save_file(tensors | {head: tensors[embed]}, file, metadata={"format": "pt"})
    np.testing.assert_array_equal(_agrees(folder), before)
    assert hf.load(folder)[0].tied

    other = tensors[embed] + np.float32(0.1) * np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    save_file(tensors | {head: other}, file, metadata={"format": "pt"})
    assert np.abs(_agrees(folder) - before).max() > 0.05
    assert not hf.load(folder)[0].tied and not hf.shape(folder).tied


def test_tensors_that_nothing_reads(tmp_path):
    file = _causal(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    for name in ("score.weight", "v_head.summary.weight", "lm_head.bias", "model.layers.0.self_attn.q_norm.weight"):
        save_file(tensors | {name: np.zeros(3, np.float32)}, file)
        with pytest.raises(InputError, match=f"tensor {name} has no place"):
            hf.load(tmp_path)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32)}, file)
    hf.load(tmp_path)  # a table that old files hold


def test_heads_of_other_tasks_leave_an_encoder_alone(tmp_path):
    config = transformers.BertConfig(**SIZES, max_position_embeddings=32)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    hf.load_encoder(tmp_path)
    save_file(load_file(file) | {"bert.adapter.weight": np.zeros(3, np.float32)}, file)
    with pytest.raises(InputError, match=r"tensor bert\.adapter\.weight has no place"):
        hf.load_encoder(tmp_path)


def test_two_names_of_one_weight_must_agree(tmp_path):
    sizes = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    shared = tensors["shared.weight"]
    save_file(tensors | {"encoder.embed_tokens.weight": shared}, file)
    hf.load_encoder(tmp_path)
    save_file(tensors | {"encoder.embed_tokens.weight": shared + 1}, file)
    with pytest.raises(InputError, match=r"encoder\.embed_tokens\.weight and shared\.weight are one weight"):
        hf.load_encoder(tmp_path)


# -- scaling and quantisation


SCALED = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX"])
def test_rope_scaling_beside_rope_parameters(kind, tmp_path):
    folder = _causal(tmp_path, getattr(transformers, f"{kind}ForCausalLM"))
    before = _agrees(folder)
    _json(folder / "config.json", rope_scaling=SCALED)
    assert "rope_parameters" in json.loads((folder / "config.json").read_text())
    assert np.abs(_agrees(folder) - before).max() > 1e-4
    assert hf.load(folder)[0].rope_scaling == ("linear", 4.0)
    theta = {"rope_type": "default", "rope_theta": 500.0}
    if kind == "GPTNeoX":
        theta["partial_rotary_factor"] = 0.25
    _json(folder / "config.json", rope_parameters=theta)
    with pytest.raises(InputError, match=r"rope_scaling is .* beside rope_parameters .*disagree"):
        hf.load(folder)
    _json(folder / "config.json", rope_parameters={**theta, **SCALED}, rope_scaling=None)
    _agrees(folder)
    _json(folder / "config.json", rope_parameters=None, rope_scaling={**theta, "mscale": 2.0})
    with pytest.raises(InputError, match="rotary setting 'mscale' is not one of"):
        hf.load(folder)


def test_partly_rotary_llama_is_refused(tmp_path):
    folder = _causal(tmp_path)
    _json(folder / "config.json", partial_rotary_factor=0.5, rope_parameters=None)
    with pytest.raises(InputError, match=r"partial_rotary_factor is 0\.5"):
        hf.load(folder)


def test_quantised_weights_are_refused(tmp_path):
    folder = _causal(tmp_path)
    _json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    for load in (hf.load, hf.shape):
        with pytest.raises(InputError, match=r"quantization_config says that the weights are quantised \(gptq\)"):
            load(folder)
    _json(folder / "config.json", quantization_config=None)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="an adapter"):
        hf.load(folder)
    (folder / "adapter_config.json").unlink()
    tensors = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
    for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        changed = tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 16).to(dtype)}
        torch_files.save_file(changed, folder / "model.safetensors")
        with pytest.raises(InputError, match=f"model.layers.0.mlp.up_proj.weight holds {name}.*quantised"):
            hf.load(folder)
    torch_files.save_file({k: v.double() for k, v in tensors.items()}, folder / "model.safetensors")
    hf.load(folder)


def test_rules_of_generation_config_are_named(tmp_path):
    folder = _causal(tmp_path)
    _json(folder / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9, top_k=50, min_length=0)
    with pytest.warns(UserWarning, match=r"recommends temperature 0\.6, top_p 0\.9\. This is not applied"):
        hf.load(folder)
