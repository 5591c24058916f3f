"""Controls in the files of other libraries: there and back, and against a merge by hand or the library itself."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds
from safetensors.numpy import save_file

from ctg_jax.controls.delta import lora
from ctg_jax.controls.interchange import read_peft, write_peft
from ctg_jax.controls.operators import Probe
from ctg_jax.controls.selection import Positions, positions
from ctg_jax.methods import steer
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError

GPT2 = worlds.tiny(vocab=13)
LLAMA = Transformer.llama(vocab=13, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24, context=32)


def changed(lm, targets=r"layers/.*/kernel", rank=2):
    delta = lora(jax.random.key(1), jax.eval_shape(lm.init, jax.random.key(0)), rank, targets)
    changes = {path: c | {"b": 0.3 * jax.random.normal(jax.random.key(i), c["b"].shape)}
               for i, (path, c) in enumerate(delta.changes.items())}  # fmt: skip
    return delta.replace(changes=changes, scale=jnp.float32(0.7))


def same(a, b, lm):
    params = lm.init(jax.random.key(3))
    old, new = (d.weights(params) for d in (a, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), old, new)
    assert any(float(jnp.abs(x - y).max()) > 1e-3 for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(new)))


@pytest.mark.parametrize("lm", [GPT2, LLAMA], ids=["one fused module", "three modules in one kernel"])
def test_there_and_back(lm, tmp_path):
    for targets in (r"layers/.*/kernel", "layers/attn/qkv/kernel"):
        delta = changed(lm, targets)
        write_peft(tmp_path / "a", lm, delta, base="tiny")
        same(delta, read_peft(tmp_path / "a", lm), lm)


def test_an_adapter_of_one_module_by_hand(tmp_path):
    """v_proj of layer 1 alone: ΔW = 4 / 2 · B A in the rows of the values of the fused kernel."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 16)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
    settings = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["v_proj"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    save_file({name.format("A"): a, name.format("B"): b}, tmp_path / "adapter_model.safetensors")
    params = LLAMA.init(jax.random.key(0))
    moved = read_peft(tmp_path, LLAMA).weights(params)
    gap = moved["layers"]["attn"]["qkv"]["kernel"] - params["layers"]["attn"]["qkv"]["kernel"]
    wanted = np.zeros((2, 32, 16), np.float32)
    wanted[1, 24:] = 2 * b @ a
    np.testing.assert_allclose(gap, wanted, atol=1e-5)
    settings["use_rslora"] = True
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    stable = read_peft(tmp_path, LLAMA).weights(params)["layers"]["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose(stable - params["layers"]["attn"]["qkv"]["kernel"], wanted * 2**0.5, atol=1e-5)
    for pattern, share in ((r"layers\.[1-3]\.self_attn\.v_proj", 0.5), (r"layers\.0\.self_attn\.v_proj", 1)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | dict(alpha_pattern={pattern: 2})))
        scaled = read_peft(tmp_path, LLAMA).weights(params)["layers"]["attn"]["qkv"]["kernel"]
        gap = scaled - params["layers"]["attn"]["qkv"]["kernel"]
        np.testing.assert_allclose(gap, share * wanted * 2**0.5, atol=1e-5)
    for change, words in (
        (dict(use_dora=True), "use_dora is True, which is more than a low-rank change"),
        (dict(peft_type="IA3"), "with peft_type 'LORA'"),
        (dict(alora_invocation_tokens=[5]), r"alora_invocation_tokens is \[5\], which is more than"),
        (dict(lora_alpha=None), "lora_alpha None, expected a number"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=words):
            read_peft(tmp_path, LLAMA)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="changes no kernel of this model"):
        read_peft(tmp_path, GPT2)
    with pytest.raises(InputError, match=r"but the kernel is \(8, 32\)"):
        read_peft(tmp_path, dataclasses.replace(LLAMA, width=32, head_dim=4))
    save_file({name.format("A"): a}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"no tensor .*lora_B\.weight, which its other half needs"):
        read_peft(tmp_path, LLAMA)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft
@pytest.mark.parametrize("lm", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_peft_gives_the_logits_of_the_control(lm, tmp_path):
    """The adapter that is written, in peft; and the one that peft writes, read back."""
    reason = "peft is no requirement of the project: its adapters are also compared with merges by hand above"
    peft, torch = (pytest.importorskip(name, reason=reason) for name in ("peft", "torch"))
    import transformers

    params = worlds.lively(lm)
    hf.save(tmp_path / "lm", lm, params)
    delta = changed(lm)
    write_peft(tmp_path / "a", lm, delta, base=str(tmp_path / "lm"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    tokens = np.array([[1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        theirs = model(torch.as_tensor(tokens)).logits.numpy()
    ours = lm.apply(delta.weights(params), lm.embed(params, jnp.asarray(tokens)), jnp.ones((1, 6), bool)).logits
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    model.save_pretrained(tmp_path / "b")
    same(delta, read_peft(tmp_path / "b", lm), lm)


def test_a_merged_model_is_one_that_transformers_reads(tmp_path):
    """A change of weights, merged and saved: the same weights come back, with a complete configuration."""
    params, delta = worlds.lively(LLAMA), changed(LLAMA)
    merged = delta.weights(params)
    hf.save(tmp_path, LLAMA, merged, tokens={"eos_token_id": 2})
    again, back = hf.load(tmp_path)
    assert again == LLAMA
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, back)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["eos_token_id"] == 2


def test_control_vectors(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is an extra of its own, for control vectors alone")
    control = steer.example(worlds.tiny(depth=3), jax.random.key(0))
    lm = worlds.tiny(depth=3)
    gate = jnp.array([0, 0.5, 1, 0, 0])
    control = control.replace(gate=gate, scale=jnp.float32(2))
    steer.write_gguf(tmp_path / "v.gguf", control, lm)
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(str(tmp_path / "v.gguf")).tensors}
    assert sorted(tensors) == ["direction.0", "direction.1"]  # the outputs of blocks 0 and 1 are sites 1 and 2
    np.testing.assert_allclose(tensors["direction.0"], control.vector[1])
    found = steer.read_gguf(tmp_path / "v.gguf", lm)
    assert found.gate.tolist() == [0, 1, 1, 0, 0]
    np.testing.assert_allclose(found.gate[:, None] * found.vector, 2 * gate[:, None] * control.vector, atol=1e-6)
    with pytest.raises(InputError, match="is another model's"):
        steer.read_gguf(tmp_path / "v.gguf", dataclasses.replace(lm, width=32))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(operator="rotate"), "expected operator 'add', one scale"),
        (dict(cond="much"), "expected operator 'add', one scale"),
        (dict(positions=Positions("answer")), "expected positions 'all', no probe"),
        (dict(probe=Probe(jnp.zeros((5, 16)), jnp.zeros(5))), "expected positions 'all', no probe"),
    ],
)
def test_what_a_control_vector_cannot_say(tmp_path, change, words):
    lm = worlds.tiny(depth=3)
    control = steer.example(lm, jax.random.key(0)).replace(**change)
    with pytest.raises(InputError, match=words):
        steer.write_gguf(tmp_path / "v.gguf", control, lm)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match=r"expected adapter_config\.json with peft_type"):
        read_peft(tmp_path, GPT2)
    full = changed(GPT2).replace(changes={"layers/attn/qkv/kernel": {"full": jnp.zeros((2, 48, 16))}})
    with pytest.raises(InputError, match="changes layers/attn/qkv/kernel densely"):
        write_peft(tmp_path, GPT2, full)
    for delta in (changed(GPT2).replace(scale=jnp.ones(2)), full.replace(changes={})):
        with pytest.raises(InputError, match="changes no kernel, or has a strength for each row"):
            write_peft(tmp_path, GPT2, delta)
    vectors = steer.example(GPT2, jax.random.key(0))  # acts behind the final norm as well
    inner = vectors.replace(gate=vectors.gate.at[-1].set(0))
    for control in (vectors, inner.replace(positions=positions("prompt"))):
        with pytest.raises(InputError, match="added to the outputs of blocks at every token: expected positions 'all'"):
            steer.write_gguf(tmp_path / "v.gguf", control, GPT2)
    with pytest.raises(InputError, match="at one strength to all rows"):
        steer.write_gguf(tmp_path / "v.gguf", inner.replace(cond="s"), GPT2)
