"""`pretrain`: a small language model from random weights, with a tokenizer of its own."""

from __future__ import annotations

import jax

from ctg_jax import rng
from ctg_jax.data import Source, pipeline
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.mesh import layout
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.identity import digest_model
from ctg_jax.run.stage import Artifact, Run, stage_function
from ctg_jax.stages.sources import check_dtype
from ctg_jax.types import InputError


@stage_function("pretrain")
def pretrain(
    run: Run,
    *,
    data: Artifact,
    vocab: int = 1024,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    context: int = 128,
    tied: bool = True,
    dtype: str = "float32",
    pack: bool = True,
    training: Training = Training(
        steps=1000, rate=2e-3, warmup=50, schedule="cosine", final=0.1, decay=0.01, save_every=200, log_every=20
    ),
    seed: int = 0,
) -> None:
    """Stage: a GPT-2 and a byte-level BPE tokenizer, both trained on data.jsonl, in state/ in Hugging Face layout.

    Args:
      vocab: size of the vocabulary. width, depth, heads, context: shape of the model; the MLP is 4 times as wide.
      tied: whether the unembedding is the embedding, as in GPT-2. Tying draws words with the same contexts together,
        antonyms among them, and a small model that is trained briefly then learns late what tells them apart.
      dtype: as of `load_lm`; while the model is trained, and in its files, the weights are float32.
      pack: whether to fill rows with one text after the other; False gives each text a row of its own, cut at
        `training.tokens`, so that it is read from position 0 with no other text before it.
      training: how it is trained; rows have `training.tokens` tokens.
      seed: of weights and of the order of the data.

    Raises:
      InputError: an unknown dtype, a width that `heads` does not divide, rows longer than the context.
    """
    from ctg_jax.data.tokenizer import load_tokenizer, train_bpe
    from ctg_jax.models import hf

    check_dtype(dtype)
    if width % heads:
        raise InputError(f"width is {width}, which heads={heads} does not divide: choose a multiple of it")
    records = data.rows("data.jsonl")
    folder = run.path / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        train_bpe((r["text"] for r in records), vocab).save(folder)
    tokenizer = load_tokenizer(str(folder))
    lm = Transformer(
        family="gpt2", vocab=tokenizer.vocab, width=width, depth=depth, heads=heads, kv_heads=heads,
        head_dim=width // heads, mlp_width=4 * width, context=context, tied=tied, dtype=dtype, remat=layout.remat(),
    )  # fmt: skip
    losses.check_rows(lm, training.tokens)
    params = lm.init(rng.stream(jax.random.key(seed), "init"))
    source = Source(data.id, "all", records)
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, pack=pack)
    params = fitting.train(run, params, losses.lm_loss(lm), None, batches, training, seed=seed, progress=True)
    (run.path / "state").mkdir(exist_ok=True)
    tokenizer.save(run.path / "state")
    hf.save(run.path / "state", lm, params, tokens={"eos_token_id": tokenizer.eos, "bos_token_id": tokenizer.bos})
    run.record(lm=None, fingerprint=digest_model(run.path / "state", run.session.sha256))
    run.discard("tokenizer", "steps")
