"""Activations of conversations: which tokens are read, contrastive pairs, and a push from the last prompt token on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.control import Chain
from ctg_jax.controls.selection import Positions
from ctg_jax.controls.vectors import SoftPrompt
from ctg_jax.data import Tokenizer
from ctg_jax.decode import loop
from ctg_jax.learn import activations
from ctg_jax.methods import cav, steer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sources
from ctg_jax.types import InputError
from tests.data.chats import assistant, chat_tokenizer, system, user, write_chat_lm

LM = worlds.tiny()
PARAMS = worlds.lively(LM)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("chat"), "llama3")


@pytest.fixture(scope="module")
def small_chat(tmp_path_factory):
    """(root, lm, function from records to a data artifact)."""
    root = tmp_path_factory.mktemp("chats")
    lm = stage(root, sources.load_lm, {"source": str(write_chat_lm(root / "lm", "llama3"))})

    def data(name, rows):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return stage(root, sources.load_data, dict(source=f"jsonl:{root / f'{name}.jsonl'}", split="all"))

    return root, lm, data


def test_what_is_read_of_a_conversation(tokenizer):
    chats = [[user("how was the food"), assistant("good")], [system("be brief"), user("x"), assistant("the food was")]]
    model = worlds.tiny(vocab=tokenizer.vocab)
    whole = [tokenizer.chat.encode(messages) for messages in chats]
    read = {
        how: next(activations.batches(model, tokenizer, chats, 3, 40, how))
        for how in ("mean", "last", "prompt", "assistant")
    }
    for i, found in enumerate(whole):
        ids, answer = np.asarray(found.ids), found.answer
        for tokens, mask, weight, pooled in read.values():
            assert tokens[i][mask[i]].tolist() == ids[: answer.stop].tolist()  # nothing behind the answer
            assert weight.tolist() == [1, 1, 0] and not pooled[2].any()
        of = {how: found[3][i] for how, found in read.items()}
        assert np.array_equal(of["mean"], read["mean"][1][i]) and np.array_equal(of["last"], of["mean"])
        assert np.flatnonzero(of["prompt"]).tolist() == [answer.start - 1]
        assert np.flatnonzero(of["assistant"]).tolist() == list(range(answer.start, answer.stop))
    prompts = [messages[:-1] for messages in chats]
    tokens, mask, _, pooled = next(activations.batches(model, tokenizer, prompts, 2, 40, "prompt"))
    for i, ids in enumerate(tokenizer.encode_prompts(prompts)):
        assert tokens[i][mask[i]].tolist() == ids and np.flatnonzero(pooled[i]).tolist() == [len(ids) - 1]


def test_pooled_states_are_those_of_the_tokens(tokenizer):
    chats = [[user("how was the food"), assistant("the food was good")]]
    model = worlds.tiny(vocab=tokenizer.vocab)
    params = worlds.lively(model)
    tokens, mask, weight, _ = next(activations.batches(model, tokenizer, chats, 1, 40))
    states = model.apply(params, model.embed(params, tokens), mask, tap=lambda h: h, last=1).taps[:, 0]
    answer = tokenizer.chat.encode(chats[0]).answer
    for how, wanted in (
        ("prompt", states[:, answer.start - 1]),
        ("assistant", states[:, answer].mean(axis=1)),
        ("last", states[:, answer.stop - 1]),
    ):
        *_, read = next(activations.batches(model, tokenizer, chats, 1, 40, how))
        found = activations.moments(model, params, tokens, mask, jnp.array([1]), weight, read, classes=2, how=how)
        np.testing.assert_allclose(found.total[1], wanted, rtol=1e-4, atol=1e-4)


def test_sides_of_pairs():
    asked = [user("x")]
    records = [
        {"messages": asked, "positive": "yes", "negative": "no"},
        {"positive": [system("kind"), *asked], "negative": [system("rude"), *asked]},
        {"positive": "good", "negative": "bad"},
    ]
    with_, without = activations.sides(records, 1, True, "x")
    assert with_ == [[*asked, assistant("yes")], [system("kind"), *asked], "good"]
    assert without == [[*asked, assistant("no")], [system("rude"), *asked], "bad"]
    labelled = [{"messages": asked, "text": "x", "label": 1}, {"text": "plain", "label": 0}]
    assert activations.sides(labelled, 1, False, "x") == ([asked], ["plain"])


def test_a_vector_of_contrastive_pairs(small_chat):
    root, lm, data = small_chat
    model, params, tokenizer = open_lm(lm)
    answers = [("the food was good", "be brief"), ("good", "a b")]
    pairs = [{"messages": [user(q)], "positive": a, "negative": b} for q, (a, b) in zip(("x", "how was"), answers)]
    settings = dict(kind="pairs", pool="assistant", sites="all", tokens=48, positions="answer")
    fitted = steer.fit(root, lm=lm, data=data("pairs", pairs), **settings)
    control = methods.load(fitted, model)

    def state(messages):
        found = tokenizer.chat.encode(messages)
        ids = jnp.asarray([found.ids])
        taps = model.apply(params, model.embed(params, ids), jnp.ones_like(ids, bool), tap=lambda h: h, last=1).taps
        return np.asarray(taps[:, 0, found.answer]).mean(axis=1)

    sides = [[state([*r["messages"], assistant(r[side])]) for r in pairs] for side in ("positive", "negative")]
    np.testing.assert_allclose(control.vector, np.mean(sides[0], 0) - np.mean(sides[1], 0), atol=1e-4)
    assert control.positions == Positions("answer")
    with pytest.raises(InputError, match="steer has no setting 'pols'; did you mean 'pool'"):
        steer.fit(root, lm=lm, data=data("pairs", pairs), pols="last")


def test_prompts_with_labels_are_read_where_the_assistant_would_answer(small_chat):
    root, lm, data = small_chat
    rows = [{"messages": [user(text)], "label": i % 2} for i, text in enumerate(["food", "a b", "good food", "be a"])]
    fitted = steer.fit(root, lm=lm, data=data("prompts", rows), pool="prompt", sites="all")
    assert np.isfinite(methods.load(fitted, open_lm(lm)[0]).vector).all()
    probed = cav.fit(root, lm=lm, data=data("prompts", rows * 3), pool="prompt", tokens=32)
    assert np.isfinite(methods.load(probed, open_lm(lm)[0]).vector).all()


def test_bad_readings(tokenizer):
    model = worlds.tiny(vocab=tokenizer.vocab)
    read = lambda texts, length, how: next(activations.batches(model, tokenizer, texts, 2, length, how))  # noqa: E731
    for texts, length, how, words in (
        (["plain"], 40, "prompt", "pool is 'prompt', but a text has no such part"),
        ([[user("x")]], 40, "assistant", "the last message of a conversation is not the assistant's"),
        ([[user("x"), assistant("good food")]], 8, "last", "has 17 tokens, but only 8 are read: raise tokens"),
        ([[user("x"), assistant(" ")]], 40, "last", r"message 2 \(assistant\) is empty"),
    ):
        with pytest.raises(InputError, match=words):
            read(texts, length, how)
    with pytest.raises(InputError, match="has no chat template"):
        next(activations.batches(model, Tokenizer(tokenizer._core), [[user("x")]], 2, 40))


def test_a_push_from_the_last_prompt_token_on():
    control = steer.example(LM, jax.random.key(0)).replace(positions=Positions("answer"))
    prompts, completion = worlds.prompts([[1, 2, 3], [4, 5]]), jnp.array([[1, 2], [3, 4]])
    seen = {}

    def run(control, *front):
        return np.asarray(loop.forward(LM, PARAMS, prompts, completion, Chain((*front, control))))

    base, pushed, everywhere = run(steer.neutral(control)), run(control), run(control.replace(positions=Positions()))
    seen = [np.abs(a - b).max() for a, b in ((base, pushed), (pushed, everywhere))]
    assert min(seen) > 1e-3
    # One token is its own prompt's last: both push the same.
    short = worlds.prompts([[1], [4]])
    both = (control.replace(positions=Positions(part)) for part in ("all", "answer"))
    one = [loop.forward(LM, PARAMS, short, completion, c) for c in both]
    np.testing.assert_allclose(*one, atol=1e-5)
    # Behind a soft prompt it acts where it acts alone: a soft prompt of the first token's embedding is that token.
    soft = SoftPrompt(LM.embed(PARAMS, jnp.array([7, 8])))
    hard = worlds.prompts([[7, 8, 1, 2, 3], [7, 8, 4, 5]])
    wanted = loop.forward(LM, PARAMS, hard, completion, control)
    np.testing.assert_allclose(run(control, soft), wanted, rtol=1e-4, atol=1e-4)
