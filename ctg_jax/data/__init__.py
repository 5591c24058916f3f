"""Data: sources of text, tokenizers, the batch pipeline, and a corpus whose attributes are known."""

from ctg_jax.data.pipeline import Batches, pipeline
from ctg_jax.data.sources import Source, load
from ctg_jax.data.tokenizer import Tokenizer, load_tokenizer, to_prompts, train_bpe

__all__ = ["Batches", "Source", "Tokenizer", "load", "load_tokenizer", "pipeline", "to_prompts", "train_bpe"]
