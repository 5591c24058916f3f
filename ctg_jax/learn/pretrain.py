"""Small language models from random weights: `pretrain`, with a tokenizer of its own, and `sibling`, with that of
another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from ctg_jax import rng
from ctg_jax.data import Source, pipeline
from ctg_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.mesh import layout
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.identity import digest_model
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.stages.sources import check_dtype, load_data, load_lm
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
    _train(run, lm, tokenizer, Source(data.id, "all", records), training, seed, pack)
    run.discard("tokenizer", "steps")


@stage_function("sibling")
def sibling(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    width: int = 64,
    depth: int = 2,
    heads: int = 2,
    training: Training = Training(steps=1000, rate=5e-3, warmup=50, schedule="cosine", final=0.1, decay=0.01),
    seed: int = 0,
) -> None:
    """Stage: a GPT-2 with the vocabulary, the tokenizer and the context of another language model, so that the logits
    of the two can be combined; in state/ in Hugging Face layout.

    Args:
      lm: the other model. data: texts that the new one is trained on, each in a row of its own.
      width, depth, heads, training, seed: see `pretrain`.

    Raises:
      InputError: a width that `heads` does not divide, rows longer than the context.
    """
    model, _, tokenizer = open_lm(lm)
    if width % heads:
        raise InputError(f"width is {width}, which heads={heads} does not divide: choose a multiple of it")
    shape = dict(vocab=model.vocab, width=width, depth=depth, heads=heads, context=model.context)
    small = Transformer.gpt2(**shape, remat=layout.remat())
    _train(run, small, tokenizer, Source(data.id, "all", data.rows("data.jsonl")), training, seed, pack=False)
    run.discard("steps")


def small_lm(root, settings: Mapping[str, Any], *, lm: Artifact, data: Artifact | None) -> Artifact:
    """The small model that a method reads beside `lm`: one that exists, or a sibling of `lm`.

    Args:
      settings: those of `load_lm`, as {"source": "gpt2"}; or, without a source, those of `sibling`, and with them
        `texts`, the settings of `load_data` for what it is trained on.
      data: what it is trained on where there are no `texts`; None where a method has only prompts.

    Raises:
      InputError: nothing to train it on, and what these stages raise.
    """
    if "source" in settings:
        return stage(root, load_lm, settings)
    if "texts" not in settings and data is None:
        raise InputError(
            "small has neither a source nor texts, and the prompts of a method that learns from a reward are too short "
            "to learn a language from: name a model (source), or the settings of load_data for its texts."
        )
    own = {key: value for key, value in settings.items() if key != "texts"}
    texts = stage(root, load_data, settings["texts"]) if "texts" in settings else data
    return stage(root, sibling, own, lm=lm, data=texts)


def _train(
    run: Run, lm: Transformer, tokenizer: Tokenizer, source: Source, training: Training, seed: int, pack: bool
) -> None:
    """Trains `lm` from random weights and writes it with its tokenizer."""
    from ctg_jax.models import hf

    losses.check_rows(lm, training.tokens)
    params = lm.init(rng.stream(jax.random.key(seed), "init"))
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, pack=pack)
    params = fitting.train(run, params, losses.lm_loss(lm), None, batches, training, seed=seed)
    (run.path / "state").mkdir(exist_ok=True)
    tokenizer.save(run.path / "state")
    hf.save(run.path / "state", lm, params, tokens={"eos_token_id": tokenizer.eos, "bos_token_id": tokenizer.bos})
    run.record(lm=None, fingerprint=digest_model(run.path / "state", run.session.sha256))
