"""Real weights: MiniLM and yelp-gpt2-mini against torch, stories260K against its known text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax.data.tokenizer import load_tokenizer, pad_rows
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer


def _torch():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


# -- MiniLM (BERT family, sentence-transformers folder)


def _pairs(data_dir, count):
    import csv

    with open(data_dir / "stsb" / "stsb-en-dev.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.reader(f))
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]
    return [a for a, _, _ in rows], [b for _, b, _ in rows], np.array([float(s) for _, _, s in rows])


def _embed(encoder, params, tokenizer, texts, batch=100):
    """Embeddings [n, E] in the order of the texts; long and short ones apart, lengths in steps of 16."""
    rows = [r[: encoder.context] for r in tokenizer.encode(texts, special=True)]
    order = np.argsort([len(r) for r in rows], kind="stable")
    out = np.zeros((len(rows), encoder.embed_width), np.float32)
    for i in range(0, len(order), batch):
        some = order[i : i + batch]
        length = -(-max(len(rows[j]) for j in some) // 16) * 16
        tokens, mask = pad_rows([rows[j] for j in some], length, encoder.pad, left=False)
        out[some] = encoder.embed(params, tokens, mask)
    return out


def test_minilm_embeddings_are_those_of_torch(data_dir):
    torch, transformers = _torch()
    folder = data_dir / "models" / "all-MiniLM-L6-v2"
    encoder, params = hf.load_encoder(folder)
    assert (encoder.pooling, encoder.unit, encoder.context, encoder.project) == ("mean", True, 256, 0)
    texts = _pairs(data_dir, 30)[0]
    ours = _embed(encoder, params, load_tokenizer(folder), texts, batch=30)
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    some = inputs["attention_mask"][:, :, None].float()
    theirs = torch.nn.functional.normalize((hidden * some).sum(1) / some.sum(1)).numpy()
    cosine = (ours * theirs).sum(1).min()
    print(f"MiniLM: smallest cosine {cosine:.8f}, largest difference {np.abs(ours - theirs).max():.2e}")
    assert cosine >= 0.99999
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def _spearman(data_dir, count):
    import scipy.stats

    folder = data_dir / "models" / "all-MiniLM-L6-v2"
    encoder, params = hf.load_encoder(folder)
    first, second, human = _pairs(data_dir, count)
    out = _embed(encoder, params, load_tokenizer(folder), first + second)
    value = scipy.stats.spearmanr((out[: len(first)] * out[len(first) :]).sum(1), human).statistic
    print(f"MiniLM: STS-B dev Spearman {value:.4f} on {len(human)} pairs")
    return value


def test_minilm_sentence_similarity(data_dir):
    assert _spearman(data_dir, 300) > 0.80


@pytest.mark.slow
def test_minilm_sentence_similarity_on_all_pairs(data_dir):
    assert _spearman(data_dir, None) > 0.85


# -- yelp-gpt2-mini


def _totals(logits, tokens, mask):
    """Summed log-probability, in float64, of the tokens after the first."""
    logits = np.asarray(logits, np.float64)[:, :-1]
    top = logits.max(-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logp, np.asarray(tokens)[:, 1:, None], 2)[..., 0]
    return (chosen * mask[:, 1:]).sum()


def test_yelp_perplexity_is_that_of_torch(data_dir):
    """Pooled per-token perplexity of 150 dev sentences, each between two <|endoftext|>, padded on the left."""
    torch, transformers = _torch()
    folder = data_dir / "models" / "yelp-gpt2-mini"
    lm, params = hf.load(folder)
    tokenizer = load_tokenizer(folder)
    with open(data_dir / "yelp" / "dev.jsonl", encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for line in f][:150]
    rows = [[tokenizer.eos, *r, tokenizer.eos] for r in tokenizer.encode(texts)]
    rows.sort(key=len)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    apply = jax.jit(lambda p, t, m: lm.apply(p, lm.embed(p, t), m).logits)
    ours = theirs = count = 0.0
    for i in range(0, len(rows), 50):
        some = rows[i : i + 50]
        length = -(-len(some[-1]) // 16) * 16
        tokens, mask = pad_rows(some, length, tokenizer.eos, left=True)
        after = mask & (np.cumsum(mask, 1) > 1)  # not the first token of a row, which nothing predicts
        ours += _totals(apply(params, tokens, mask), tokens, after)
        positions = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
        with torch.no_grad():
            logits = model(
                torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(), position_ids=positions
            ).logits.numpy()
        theirs += _totals(logits, tokens, after)
        count += after.sum()
    ppl, expected = np.exp(-ours / count), np.exp(-theirs / count)
    print(f"yelp-gpt2-mini: perplexity {ppl:.5f}, torch {expected:.5f}, relative {abs(ppl / expected - 1):.1e}")
    assert abs(ppl / expected - 1) <= 1e-4
    assert 20 < ppl < 40


# -- stories260K (llama2.c format: github.com/karpathy/llama2.c)

GOLDEN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high"
)


def _read_llama2c(file):
    """The decoder and parameters of a llama2.c version-0 file: seven int32 sizes, then float32 tensors.

    llama2.c rotates neighbouring features (2i, 2i+1); here feature i turns with i + H/2. Reordering the rows of each
    query and key head turns one into the other.
    """
    width, mlp, depth, heads, kv_heads, vocab, context = (int(x) for x in np.fromfile(file, "<i4", 7))
    flat, at = np.fromfile(file, "<f4", offset=28), 0
    tied, vocab, h = vocab > 0, abs(vocab), width // heads

    def take(*shape):
        nonlocal at
        out = flat[at : at + int(np.prod(shape))].reshape(shape)
        at += out.size
        return out

    def halves(w, n):
        return w.reshape(depth, n, h // 2, 2, width).swapaxes(2, 3).reshape(depth, n * h, width)

    tokens = take(vocab, width)
    attn_norm = take(depth, width)
    q, k = halves(take(depth, heads * h, width), heads), halves(take(depth, kv_heads * h, width), kv_heads)
    v = take(depth, kv_heads * h, width)
    out = take(depth, width, heads * h)
    mlp_norm = take(depth, width)
    gate, down, up = take(depth, mlp, width), take(depth, width, mlp), take(depth, mlp, width)
    norm = take(width)
    take(context, h)  # tables of cosines and sines, unused
    params = {
        "embed": {"tokens": tokens},
        "layers": {
            "attn_norm": {"scale": attn_norm},
            "attn": {"qkv": {"kernel": np.concatenate([q, k, v], 1)}, "out": {"kernel": out}},
            "mlp_norm": {"scale": mlp_norm},
            "mlp": {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": {"kernel": down}},
        },
        "norm": {"scale": norm},
    }
    if not tied:
        params["head"] = {"kernel": take(vocab, width)}
    assert at == flat.size
    lm = Transformer.llama(
        vocab=vocab, width=width, depth=depth, heads=heads, kv_heads=kv_heads, mlp_width=mlp, context=context,
        tied=tied, norm_eps=1e-5,
    )  # fmt: skip
    return lm, jax.tree.map(jnp.asarray, params)


def _read_pieces(file, vocab):
    data, at, pieces = file.read_bytes(), 4, []
    for _ in range(vocab):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return pieces


def test_stories260k_tells_its_story(data_dir, tmp_path):
    """Greedy from BOS, to the letter; also after a trip through a Hugging Face folder."""
    folder = data_dir / "models" / "stories260K"
    lm, params = _read_llama2c(folder / "stories260K.bin")
    assert sum(x.size for x in jax.tree.leaves(params)) == 260_032
    pieces = _read_pieces(folder / "tokenizer.bin", lm.vocab)
    hf.save(tmp_path, lm, params)
    again, reread = hf.load(tmp_path)
    assert again == lm
    jax.tree.map(np.testing.assert_array_equal, params, reread)

    from ctg_jax.decode.loop import generate
    from ctg_jax.types import Prompts, Sampling

    prompts = Prompts(
        tokens=jnp.ones((1, 1), jnp.int32), mask=jnp.ones((1, 1), bool), keys=jax.random.split(jax.random.key(0), 1)
    )
    samples = generate(lm, reread, prompts, sampling=Sampling(max_new=100, greedy=True))
    text = b"".join(pieces[t] for t in np.asarray(samples.tokens)[0]).decode().lstrip()
    print(text)
    assert text.startswith(GOLDEN)
