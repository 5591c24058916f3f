"""Small tokenizers with the chat templates of Gemma, Qwen and Llama 3, as their authors publish them; only branches for
tools and images are left out."""

import json

import jax
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core

from ctg_jax.data import load_tokenizer
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer

TEXTS = ["how was the food", "the food was good and we liked it", "be brief and kind", "user model assistant system"]
TEXTS = [*TEXTS, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "a b\n\nc  d", "naïve café 🙂"]

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
QWEN = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Qwen 3's way with reasoning: that of earlier turns is cut off, and that of the last one is taken apart and put back.
REASONING = r"""{%- for message in messages %}
    {%- set content = message.content %}
    {%- set reasoning = '' %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if loop.last and reasoning %}
        {%- set content = '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


def _words(control, prepend=False):
    """SentencePiece with byte fallback, Gemma's way; or with a space before every text, as Llama 2."""
    core = Core(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = [normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *space] if prepend else space)
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", *control, *fallback], show_progress=False)
    core.train_from_iterator(TEXTS * 5, trainer)
    written = json.loads(core.to_str())
    written["added_tokens"] = [t for t in written["added_tokens"] if not t["content"].startswith("<0x")]
    written["pre_tokenizer"] = None
    core = Core.from_str(json.dumps(written))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prepend else parts)
    return core


def _bytes(control):
    core = Core(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TEXTS * 5, trainer)
    core.add_special_tokens(control)
    return core


def _begins(core, bos):
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return core


def core_of(name):
    """(core, tokenizer_config, tokens that end a text) of a family."""
    if name in ("gemma", "gemma3"):
        core = _begins(_words(["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"]), "<bos>")
        core.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("  ", normalized=False)])
        config = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
        return core, config | dict(chat_template=GEMMA if name == "gemma" else GEMMA3), ["<eos>", "<end_of_turn>"]
    if name in ("qwen", "reasoning"):
        core = _bytes(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        core.add_tokens(["<think>", "</think>"])
        config = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
        return core, config | dict(chat_template=QWEN if name == "qwen" else REASONING), ["<|im_end|>", "<|endoftext|>"]
    if name == "llama3":
        names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        core = _begins(_bytes(names), "<|begin_of_text|>")
        config = dict(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", chat_template=LLAMA3)
        return core, config, ["<|end_of_text|>", "<|eot_id|>"]
    assert name == "llama2"  # a tokenizer of the older kind under ChatML; its tokens swallow the space behind them
    core = _begins(_words(["<s>", "</s>"], prepend=True), "<s>")
    ends = [AddedToken(t, special=True, normalized=False, rstrip=True) for t in ("<|im_start|>", "<|im_end|>")]
    core.add_special_tokens(ends)
    return core, dict(bos_token="<s>", eos_token="</s>", chat_template=QWEN), ["</s>", "<|im_end|>"]


FAMILIES = ("gemma", "gemma3", "qwen", "llama3", "llama2", "reasoning")


def write_tokenizer(folder, name):
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json of a family."""
    folder.mkdir(parents=True, exist_ok=True)
    core, config, ends = core_of(name)
    core.save(str(folder / "tokenizer.json"))
    config |= dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = [core.token_to_id(t) for t in ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


def chat_tokenizer(folder, name):
    return load_tokenizer(write_tokenizer(folder, name))


def write_chat_lm(folder, name, context=160):
    """A language model of a few thousand parameters with the tokenizer of a family."""
    write_tokenizer(folder, name)
    tokenizer = load_tokenizer(folder)
    lm = Transformer(
        family="gpt2", vocab=tokenizer.vocab, width=16, depth=2, heads=2, kv_heads=2, head_dim=8, mlp_width=32,
        context=context,
    )  # fmt: skip
    hf.save(folder, lm, jax.jit(lm.init)(jax.random.key(0)), tokens={"eos_token_id": list(tokenizer.ends)})
    write_tokenizer(folder, name)
    return folder


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}
