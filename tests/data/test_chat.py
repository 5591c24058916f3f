"""Chat templates: the ids of `transformers`, which message a token is of, control tokens, and malformed messages."""

import json

import jax
import numpy as np
import pytest

from ctg_jax import generate
from ctg_jax.data import Source, load, load_tokenizer, pipeline, to_prompts
from ctg_jax.data.completions import Completions, continuations
from ctg_jax.data.messages import shown, unanswered
from ctg_jax.models import hf
from ctg_jax.types import InputError, Sampling
from tests.data.chats import FAMILIES, assistant, chat_tokenizer, core_of, system, user, write_chat_lm, write_tokenizer

THOUGHT = "<think>\nhm\n</think>\n\nyes"
CHATS = {
    "one": [user("how was the food")],
    "turns": [user("  how was\n\nthe food \n"), assistant(" good  \nand\n\n"), user("naïve café 🙂 東")],
    "answered": [user("be brief"), assistant("the food was good")],
    "reasoning": [user("x"), assistant("<think>\nhm\n</think>\n\nyes"), user("y"), assistant(THOUGHT)],
}
ENDS = {"gemma": "<end_of_turn>", "gemma3": "<end_of_turn>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>"}
ENDS |= {"llama2": "<|im_end|>", "reasoning": "<|im_end|>"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    return {name: write_tokenizer(root / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


# --- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_are_those_of_transformers(folders, tokenizers, family):
    transformers = pytest.importorskip("transformers")
    theirs, mine = transformers.AutoTokenizer.from_pretrained(folders[family]), tokenizers[family]
    under = [[system(" be brief "), *messages] for messages in CHATS.values()] if family != "gemma" else []
    for messages in [*CHATS.values(), *under]:
        for prompt in (False, True):
            wanted = theirs.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=prompt, return_dict=False
            )
            assert mine.chat.encode(messages, prompt=prompt).ids == wanted
            if prompt and messages[-1]["role"] == "user":
                assert mine.encode_prompts([messages]) == [wanted]


def test_the_beginning_token_comes_once(tokenizers):
    for family, begins in (("gemma", True), ("gemma3", True), ("llama3", True), ("qwen", False), ("llama2", False)):
        tokenizer = tokenizers[family]
        (ids,) = tokenizer.encode_prompts([CHATS["one"]])
        assert ids.count(tokenizer.bos) == begins == (ids[0] == tokenizer.bos)
        assert tokenizer.adds_bos == (family not in ("qwen",))
        p = to_prompts(tokenizer, [CHATS["one"], "how was the food"], seed=0)
        assert np.asarray(p.tokens)[0][np.asarray(p.mask)[0]].tolist() == ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_message_never_becomes_a_control_token(tokenizers, family):
    tokenizer, end = tokenizers[family], ENDS[family]
    control = [tokenizer.token(i) for i in (*tokenizer.ends, tokenizer.bos) if i is not None]
    text = "a " + " b ".join([*control, "</think>", end]) + "c"
    messages = [user(text), assistant(f"see {end} here"), user("x")]
    found, plain = tokenizer.chat.prompt(messages), tokenizer.chat.prompt([user("a"), assistant("b"), user("x")])
    controls = lambda c: [i for i, is_control in zip(c.ids, c.control) if is_control]  # noqa: E731
    assert controls(found) == controls(plain)
    of = lambda i: [t for t, m in zip(found.ids, found.message) if m == i]  # noqa: E731
    assert not set(of(0)) & ({*tokenizer.ends, tokenizer.bos, tokenizer.id("<|im_start|>")} - {None})
    assert tokenizer.decode_after([tokenizer.encode(["x"])[0]], [of(0)])[0].strip() == text  # and it is all there
    assert tokenizer.decode_after([tokenizer.encode(["x"])[0]], [of(1)])[0].strip() == f"see {end} here"


def test_tokens_of_the_template_that_are_not_special_are_read_in_answers_alone(tokenizers):
    tokenizer = tokenizers["reasoning"]
    found = tokenizer.chat.encode([user("<think> </think>"), assistant(THOUGHT)])
    for name in ("<think>", "</think>"):
        assert [int(m) for i, m in zip(found.ids, found.message) if i == tokenizer.id(name)] == [1]


# --- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3", "qwen", "llama3", "llama2"])
def test_each_token_has_a_role(tokenizers, family):
    tokenizer = tokenizers[family]
    messages = [system("be brief"), user("how was\n\nthe food"), assistant("the food was good")]
    found = tokenizer.chat.encode(messages)
    masks = [found.role(name) for name in ("template", "system", "user", "assistant")]
    assert np.sum(masks, axis=0).tolist() == [1] * len(found.ids)
    text = lambda mask: tokenizer.decode([np.asarray(found.ids)[mask]])[0].strip()  # noqa: E731
    assert [text(mask) for mask in masks[1:]] == [m["content"] for m in messages]
    ids = np.asarray(found.ids)
    assert ids[found.answer].tolist() == ids[masks[3]].tolist()
    learned = ids[found.learned].tolist()
    assert learned[:-1] == ids[found.answer].tolist() and learned[-1] == tokenizer.id(ENDS[family])
    prompt = tokenizer.chat.prompt(messages[:-1])
    assert prompt.ids == found.ids[: found.answer.start] and prompt.answer == slice(len(prompt.ids), len(prompt.ids))


def test_a_message_whose_beginning_the_template_cuts_off(tokenizers):
    tokenizer = tokenizers["reasoning"]
    thought = THOUGHT.replace("hm", "hm <|im_end|>")
    found = tokenizer.chat.encode([*CHATS["reasoning"][:-1], assistant(thought)])
    cut = [t for t, m in zip(found.ids, found.message) if m == 1]
    assert tokenizer.decode([cut]) == ["yes"]
    assert tokenizer.decode([found.ids[found.answer]], skip_special=False) == [thought]  # taken apart and put back
    assert found.ids[found.answer].count(tokenizer.id("<|im_end|>")) == 0


def test_a_weight_says_what_is_learned(tokenizers):
    tokenizer = tokenizers["llama3"]
    messages = [user("x") | {"weight": 1}, assistant("the food") | {"weight": 0}, user("y"), assistant("good")]
    found = tokenizer.chat.encode(messages)
    assert found.message[found.learned & (found.message >= 0)].tolist() == [0, 3]
    assert [tokenizer.token(i) for i in np.asarray(found.ids)[found.learned & found.control]] == ["<|eot_id|>"] * 2


def test_what_templates_of_other_kinds_close_an_answer_with(folders):
    """A space before the end, another message at once, nothing at all."""
    core, config, _ = core_of("qwen")
    closing = {
        "{% for m in messages %}{{ m.content }}{{ ' <|im_end|>' if m.role == 'assistant' else ' ' }}{% endfor %}": 2,
        "{% for m in messages %}{{ '<|im_start|>' }}{{ m.content }}{% endfor %}": 1,
        "{% for m in messages %}{{ m.content }}{{ ' ' }}{% endfor %}": 0,
    }
    from ctg_jax.data import Tokenizer

    for template, extra in closing.items():
        tokenizer = Tokenizer(core, eos=config["eos_token"], template=template)
        found = tokenizer.chat.encode([user("x"), assistant("good"), user("y")])
        answer = np.flatnonzero(found.message == 1)
        assert np.flatnonzero(found.learned).tolist() == list(range(answer[0], answer[-1] + 1 + extra))


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_conversations_is_each_alone_and_padded(tmp_path, tokenizers):
    """One model for all formats, so that one program serves them."""
    lm, params = hf.load(write_chat_lm(tmp_path, "gemma3"))
    sampling = Sampling(max_new=4, eos=tuple(range(3)))
    run = lambda *a, **kw: generate(lm, params, to_prompts(*a, seed=3, **kw), sampling=sampling)  # noqa: E731
    for family in ("gemma3", "qwen", "llama3"):
        chats = [[user("how was the food")], [system("be brief"), user("x")], CHATS["turns"]]
        whole = run(tokenizers[family], chats, length=90)
        for i, messages in enumerate(chats):
            alone = run(tokenizers[family], [messages], ids=[i], length=120)
            np.testing.assert_array_equal(alone.tokens[0], whole.tokens[i])
            np.testing.assert_allclose(alone.logp[0], whole.logp[i], atol=1e-5)


def test_training_rows_learn_the_assistant_alone(tokenizers):
    tokenizer = tokenizers["gemma"]
    records = [{"messages": CHATS["answered"]}, {"messages": [user("x"), assistant("good"), user("y"), assistant("a")]}]
    source = Source("x", "all", records)
    assert source[0]["text"] == "the food was good"
    batch = next(pipeline(source, tokenizer, batch=2, length=40, seed=0, shuffle=False))
    for row, real, learned, record in zip(*(batch[k] for k in ("tokens", "mask", "loss_mask")), records):
        wanted = tokenizer.chat.encode(record["messages"])
        assert row[real].tolist() == wanted.ids and learned[real].tolist() == wanted.learned.tolist()
        assert not learned[~real].any() and 0 < learned.sum() < real.sum() / 2
    packed = next(pipeline(source, tokenizer, batch=1, length=20, seed=0, shuffle=False, pack=True))
    first, second = (tokenizer.chat.encode(r["messages"]) for r in records)
    assert packed["tokens"][0].tolist() == (first.ids + second.ids)[:20]
    assert packed["loss_mask"][0].tolist() == [*first.learned, *second.learned][:20]
    with pytest.raises(InputError, match="training learns nothing of record 0: of its 18 tokens the first 6"):
        next(pipeline(source, tokenizer, batch=1, length=6, seed=0, shuffle=False, threads=0))
    mixed = Source("x", "all", [records[0], {"text": "plain"}])
    with pytest.raises(InputError, match="some records have messages and some have not, such as 'plain'"):
        next(pipeline(mixed, tokenizer, batch=2, length=40, seed=0, threads=0))


def test_completions_and_continuations_of_conversations(tokenizers):
    tokenizer = tokenizers["qwen"]
    record = {"messages": CHATS["answered"], "text": "the food was good"}
    prompt, (tail,) = unanswered(record), continuations([record], tokenizer, 30)
    assert prompt["messages"] == CHATS["answered"][:1]
    whole = tokenizer.chat.encode(CHATS["answered"]).ids
    head = tokenizer.encode_prompts([prompt["messages"]])[0]
    assert head + tail == whole[:-1] and tail[-1] == tokenizer.id("<|im_end|>")  # the last is a line break
    assert tokenizer.encode_after([prompt["messages"]], ["the food was good"]) == [tail[:-1]]
    plain = {"text": "the food", "prompt": "the"}
    assert continuations([plain, record], tokenizer, 30) == [*continuations([plain], tokenizer, 30), tail]
    row = Completions(Source("x", "all", [{**prompt, "tokens": tail}]), tokenizer, 60, 30)[0]
    assert row["tokens"][row["mask"]].tolist() == head and row["completion"][row["written"]].tolist() == tail
    with pytest.raises(InputError, match="record 0 of the data has no answer"):
        continuations([prompt], tokenizer, 30)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages, words",
    [
        ([], "messages is an empty list"),
        ("hello", "messages is 'hello', expected a list"),
        (user("x"), "expected a list of messages"),
        (["hello"], "message 1 is 'hello', expected"),
        ([{"role": "bot", "content": "x"}], "message 1 has the role 'bot', expected one of system, user, assistant"),
        ([{"content": "x"}], "message 1 has the role None"),
        ([user("x"), {"role": "assistant", "content": None}], r"message 2 \(assistant\) has the content None"),
        ([user([{"type": "text", "text": "x"}])], "expected a string"),
        ([user(" \n")], r"message 1 \(user\) is empty"),
        ([user("a\U000f0001b")], r"holds the private character U\+F0001"),
        ([user("x") | {"weight": 0.5}], "has the weight 0.5, expected 0 or 1"),
        ([user("x"), assistant("y")], "the last of 2 messages is the assistant's, but a prompt ends where"),
        ([assistant("x"), user("y")], "the chat template fails .*Conversation roles must alternate"),
        ([system("be brief"), user("x")], "takes no system prompt .*System role not supported"),
    ],
)
def test_malformed_messages(tokenizers, messages, words):
    with pytest.raises(InputError, match=words):
        tokenizers["gemma"].chat.prompt(messages)


def test_templates_that_fail_or_lose_a_message(tokenizers):
    core, config, _ = core_of("qwen")
    from ctg_jax.data import Tokenizer

    for template, words in (
        ("{% for m in messages %}{{ m.nothing.content }}{% endfor %}", "fails on these messages .UndefinedError"),
        ("{% for m in messages %}", "fails on these messages .TemplateSyntaxError"),
        ("{{ messages.append(1) }}", "fails on these messages .SecurityError"),
        ("{{ ().__class__.__mro__ }}", "fails on these messages .SecurityError"),
        ("{{ messages[-1].content }}", r"leaves out message 1 \(system\)"),
        ("{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}", "writes other text around"),
    ):
        tokenizer = Tokenizer(core, eos=config["eos_token"], template=template)
        with pytest.raises(InputError, match=words):
            tokenizer.chat.encode([system("be brief"), user("x")])


def test_where_the_template_is_found(tmp_path):
    folder = write_tokenizer(tmp_path / "a", "qwen")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    template = config.pop("chat_template")

    def given(value):
        file.write_text(json.dumps(config | ({} if value is None else {"chat_template": value})))
        return load_tokenizer(folder)

    with pytest.raises(InputError, match="messages were given, but this tokenizer has no chat template"):
        to_prompts(given(None), [[user("x")]], seed=0)
    assert (
        given([{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]).template == template
    )
    with pytest.raises(InputError, match="chat_template names tool_use, expected one named 'default'"):
        given([{"name": "tool_use", "template": "x"}])
    with pytest.raises(InputError, match="chat_template is 3, expected a text"):
        given(3)
    (folder / "chat_template.jinja").write_text("{{ 'other' }}" + template)
    tokenizer = given(template)
    assert tokenizer.template == "{{ 'other' }}" + template  # the file counts, as in transformers
    tokenizer.save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").template == tokenizer.template
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"chat_template\.jinja cannot be read"):
        given(template)


def test_another_template_is_another_model(tmp_path):
    from ctg_jax.run.identity import digest_model

    folder = write_tokenizer(tmp_path, "qwen")
    before = digest_model(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert digest_model(folder) != before


def test_records_with_malformed_messages(tmp_path):
    file = tmp_path / "chats.jsonl"
    lines = [{"messages": [user("x")]}, {"messages": [{"role": "bot", "content": "x"}]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"chats\.jsonl line 2 .*message 1 has the role 'bot'"):
        load(f"jsonl:{file}", "all")
    file.write_text(json.dumps({"positive": [user("x")], "negative": []}) + "\n")
    with pytest.raises(InputError, match="line 1"):
        load(f"jsonl:{file}", "all")
    with pytest.raises(InputError, match="malformed messages: message 1"):
        Source("x", "all", [{"messages": [{"role": "bot", "content": "x"}]}])


def test_a_conversation_as_people_read_it():
    assert shown([system("be brief"), user("x")]) == "system: be brief\nuser: x\nassistant: "


def test_an_end_that_the_file_does_not_call_special_is_none_in_a_text(tmp_path):
    core, config, _ = core_of("qwen")
    core.add_tokens(["<stop>"])
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [core.token_to_id("<stop>")]}))
    tokenizer = load_tokenizer(tmp_path)
    stop = tokenizer.id("<stop>")
    assert stop in tokenizer.ends and stop not in tokenizer.encode(["a <stop> b"])[0]
    assert stop not in tokenizer.chat.encode([user("a <stop> b"), assistant("<stop>")]).ids


def test_loading_one_tokenizer_after_another(tmp_path):
    """The chat format belongs to the tokenizer: two of them do not mix."""
    a, b = chat_tokenizer(tmp_path / "a", "qwen"), chat_tokenizer(tmp_path / "b", "llama3")
    first, second = (t.encode_prompts([CHATS["one"]])[0] for t in (a, b))
    assert first != second and a.encode_prompts([CHATS["one"]])[0] == first
    assert jax.tree.leaves(to_prompts(a, [CHATS["one"]], seed=0).tokens)[0].shape == (1, len(first))


def test_token_ids_under_negative_are_no_messages():
    """A pool keeps the ids of a worse sample under this name."""
    rows = Source("the pool", "all", [{"text": "a", "negative": ids} for ids in ([3, 4], np.asarray([3, 4]))])
    assert [list(row["negative"]) for row in rows] == [[3, 4], [3, 4]]
    with pytest.raises(InputError, match="malformed messages: message 1 is 'x'"):
        Source("pairs", "all", [{"text": "a", "negative": ["x"]}])
