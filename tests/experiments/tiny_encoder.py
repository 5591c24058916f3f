"""A sentence encoder of a few thousand parameters on disk, in Hugging Face layout, that reads whole words."""

import jax

from ctg_jax.models import hf
from ctg_jax.models.encoder import Encoder

WORDS = ["the", "a", "food", "room", "was", "is", "very", "so", "good", "fine", "kind", "bad", "rude", "cold"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT = Encoder(
    vocab=len(SPECIAL + WORDS), width=16, depth=2, heads=2, head_dim=8, mlp_width=32, context=16, position_rows=16,
    types=2, head="tanh",
)  # fmt: skip


def write_encoder(folder):
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers, processors

    core = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=16, **names).save_pretrained(folder)
    params = jax.tree.map(
        lambda x: 6 * x if x.ndim > 1 else x, jax.jit(BERT.init)(jax.random.key(0))
    )  # more than noise
    hf.save(folder, BERT, params)
    return folder
