"""A tokenizer of the Llama kind: its normaliser writes a space before a text, its decoder removes one."""

import json

from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ctg_jax.data import Tokenizer

CONTROL = ["<unk>", "<s>", "</s>"]


def llama_like(texts, vocab: int = 340, bos: bool = True) -> Tokenizer:
    """Byte-pair encoding of words with byte fallback, trained on texts; with `bos`, sequences begin with `<s>`."""
    core = Core(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training: no token holds two words
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(parts)
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=CONTROL + fallback, show_progress=False)
    core.train_from_iterator(texts, trainer)
    written = json.loads(core.to_str())
    written["added_tokens"] = [t for t in written["added_tokens"] if t["content"] in CONTROL]
    written["pre_tokenizer"] = None
    core = Core.from_str(json.dumps(written))
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(core, bos="<s>", eos="</s>")
