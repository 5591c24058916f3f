"""A language model of a few thousand parameters on disk, in Hugging Face layout."""

import jax

from ctg_jax.data import train_bpe
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer

TEXTS = ["the food was good and we liked it", "the room was bad and we left early", "a long wait for a small plate"]


def write_lm(folder, *, vocab=270, width=16, seed=0, context=32):
    tokenizer = train_bpe(TEXTS * 20, vocab)
    lm = Transformer(
        family="gpt2", vocab=tokenizer.vocab, width=width, depth=2, heads=2, kv_heads=2, head_dim=width // 2,
        mlp_width=2 * width, context=context,
    )  # fmt: skip
    hf.save(folder, lm, jax.jit(lm.init)(jax.random.key(seed)), tokens={"eos_token_id": tokenizer.eos})
    tokenizer.save(folder)
    return folder
