"""Tiny random models built by `transformers`: the same numbers here, there, and there again after an export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.models import hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 37
IDS = {"bos_token_id": 0, "eos_token_id": 0}

DECODERS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=3, n_head=2, **IDS),
    "gpt2-untied-inner": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2, n_inner=24, tie_word_embeddings=False, **IDS
    ),
    "llama-grouped": lambda: _llama(),
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-bias-head": lambda: _llama(attention_bias=True, mlp_bias=True, head_dim=6),
    "llama-3": lambda: _llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        }
    ),
    "neox": lambda: _neox(),
    "neox-sequential": lambda: _neox(use_parallel_residual=False),
    "neox-no-bias-full-rotary": lambda: _neox(
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0},
    ),
}

ENCODERS = {
    "bert": lambda: (transformers.BertModel, transformers.BertConfig(**_bert())),
    "bert-classifier": lambda: (transformers.BertForSequenceClassification, transformers.BertConfig(**_bert())),
    "roberta": lambda: (transformers.RobertaModel, transformers.RobertaConfig(**_bert(pad_token_id=1))),
    "roberta-classifier": lambda: (
        transformers.RobertaForSequenceClassification,
        transformers.RobertaConfig(**_bert(pad_token_id=1, type_vocab_size=1, num_labels=3)),
    ),
    "distilbert": lambda: (transformers.DistilBertModel, transformers.DistilBertConfig(**_distilbert())),
    "distilbert-classifier": lambda: (
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig(**_distilbert(num_labels=4)),
    ),
    "t5": lambda: (transformers.T5EncoderModel, transformers.T5Config(**_t5())),
    "t5-gated": lambda: (transformers.T5EncoderModel, transformers.T5Config(**_t5(feed_forward_proj="gated-gelu"))),
}


def _llama(**more):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(intermediate_size=24, max_position_embeddings=32)
    return transformers.LlamaConfig(vocab_size=VOCAB, **sizes, **IDS, **more)


def _neox(**more):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return transformers.GPTNeoXConfig(vocab_size=VOCAB, max_position_embeddings=32, **sizes, **IDS, **more)


def _bert(**more):
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    return dict(vocab_size=VOCAB, max_position_embeddings=20, **sizes) | more


def _distilbert(**more):
    return dict(vocab_size=VOCAB, max_position_embeddings=20, dim=16, n_layers=2, n_heads=2, hidden_dim=24) | more


def _t5(**more):
    return dict(vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=24, num_layers=3, num_heads=2) | more


def _build(make, config, folder):
    """A model with every weight random (biases and norms too, which start at 0 and 1), saved in `folder`."""
    torch.manual_seed(0)
    model = make(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def _batch(length=9):
    """Tokens and mask [3, T]: a full row, a left-padded one, a shorter left-padded one."""
    tokens = np.random.default_rng(0).integers(2, VOCAB, (3, length))
    mask = np.arange(length)[None, :] >= np.array([0, 2, 5])[:, None]
    return np.where(mask, tokens, 1), mask


def _positions(mask, start=0):
    return torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0) + start)


def _logits(lm, params, tokens, mask):
    return jax.jit(lambda p, t, m: lm.apply(p, lm.embed(p, t), m).logits)(params, tokens, mask)


def _torch_logits(model, tokens, mask):
    with torch.no_grad():
        return model(
            torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), position_ids=_positions(mask)
        ).logits.numpy()


def _close(ours, theirs, mask, tolerance=1e-5):
    difference = np.abs(np.where(mask[..., None], np.asarray(ours) - theirs, 0)).max()
    assert difference <= tolerance, f"largest difference {difference:.2e}"
    assert np.std(theirs) > 0.05  # of a scale at which the tolerance means something


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_parity_and_export(name, tmp_path):
    config = DECODERS[name]()
    model = _build(transformers.AutoModelForCausalLM.from_config, config, tmp_path / "there")
    tokens, mask = _batch()
    theirs = _torch_logits(model, tokens, mask)
    lm, params = hf.load(tmp_path / "there")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(lm.init, jax.random.key(0)))
    _close(_logits(lm, params, tokens, mask), theirs, mask)

    hf.save(tmp_path / "here", lm, params, tokens=IDS)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "here").eval()
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    np.testing.assert_array_equal(_torch_logits(again, tokens, mask), theirs)
    lm_again, params_again = hf.load(tmp_path / "here")
    assert lm_again == lm
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_parity_and_export(name, tmp_path):
    make, config = ENCODERS[name]()
    model = _build(make, config, tmp_path / "there")
    tokens, mask = _batch()
    encoder, params = hf.load_encoder(tmp_path / "there")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(encoder.init, jax.random.key(0)))

    def run(model):
        args = dict(attention_mask=torch.tensor(mask).long())
        if not name.startswith(("t5", "distilbert")):  # DistilBERT takes no positions, T5 has none
            args["position_ids"] = _positions(mask, encoder.position_start)
        with torch.no_grad():
            return model(torch.tensor(tokens), **args)

    def first(model):
        """Torch reads the class off slot 0, which is padding where it stands on the left: rows one by one."""
        with torch.no_grad():
            return np.stack([model(torch.tensor(t[m])[None]).logits[0].numpy() for t, m in zip(tokens, mask)])

    def compare(model):
        if encoder.labels:
            assert len(encoder.labels) == model.config.num_labels
            _close(encoder.classify(params, tokens, mask), first(model), np.ones(3, bool))
        elif name == "distilbert":
            with torch.no_grad():
                for t, m, ours in zip(tokens, mask, encoder.apply(params, tokens, mask)):
                    _close(ours[m], model(torch.tensor(t[m])[None]).last_hidden_state[0].numpy(), m[m])
        else:
            _close(encoder.apply(params, tokens, mask), run(model).last_hidden_state.numpy(), mask)

    compare(model)
    hf.save(tmp_path / "here", encoder, params)
    again = make.from_pretrained(tmp_path / "here").eval()
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    compare(again)
    encoder_again, params_again = hf.load_encoder(tmp_path / "here")
    assert encoder_again == encoder
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


def test_bert_pairs_use_token_types(tmp_path):
    make, config = ENCODERS["bert-classifier"]()
    model = _build(make, config, tmp_path)
    encoder, params = hf.load_encoder(tmp_path)
    tokens = np.random.default_rng(0).integers(2, VOCAB, (3, 9))
    types = np.broadcast_to(np.arange(9) > 4, (3, 9)).astype(int)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), token_type_ids=torch.tensor(types)).logits.numpy()
    _close(encoder.classify(params, tokens, tokens > 0, types), theirs, np.ones(3, bool))


def test_t5_buckets_are_those_of_torch():
    from transformers.models.t5.modeling_t5 import T5Attention

    from ctg_jax.models.encoder import position_buckets

    for buckets, distance in ((32, 128), (16, 40)):
        index = torch.arange(700)
        theirs = T5Attention._relative_position_bucket(index[None, :] - index[:, None], True, buckets, distance)
        np.testing.assert_array_equal(position_buckets(700, buckets, distance), theirs.numpy())


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "neox"])
def test_sharded_half_precision_files(name, tmp_path):
    """Several bfloat16 files with an index load to the rounded weights; bfloat16 in, bfloat16 out, bit for bit."""
    model = _build(transformers.AutoModelForCausalLM.from_config, DECODERS[name](), tmp_path / "one")
    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    tokens, mask = _batch()
    lm, params = hf.load(tmp_path / "many")
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    # Read by torch again, for `to` also rounded its rotary frequencies.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32).eval()
    _close(_logits(lm, params, tokens, mask), _torch_logits(model, tokens, mask), mask)

    half, halves = hf.load(tmp_path / "many", dtype="bfloat16")
    assert half.dtype == half.param_dtype == "bfloat16"
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float32)), params, halves)
    hf.save(tmp_path / "back", half, halves)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(v.float(), model.state_dict()[k]) for k, v in again.state_dict().items())


def test_base_model_names_and_old_norm_names(tmp_path):
    """Checkpoints saved without their head lack the prefix; old BERT files say gamma and beta."""
    from safetensors.numpy import load_file, save_file

    model = _build(transformers.GPT2LMHeadModel, DECODERS["gpt2"](), tmp_path / "lm")
    model.transformer.save_pretrained(tmp_path / "base")
    assert "wte.weight" in load_file(tmp_path / "base" / "model.safetensors")
    (_, a), (_, b) = hf.load(tmp_path / "lm"), hf.load(tmp_path / "base")
    jax.tree.map(np.testing.assert_array_equal, a, b)

    make, config = ENCODERS["bert"]()
    _build(make, config, tmp_path / "bert")
    _, a = hf.load_encoder(tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(file)
    for new, was in old.items():
        tensors = {k.replace(new, was): v for k, v in tensors.items()}
    save_file(tensors, file)
    _, b = hf.load_encoder(tmp_path / "bert")
    jax.tree.map(np.testing.assert_array_equal, a, b)
