"""`experiments/generate.py --chat`, and conversations through the stages of an experiment: load, fine-tune, sample,
score, judge."""

import json

import numpy as np
import pytest

from ctg_jax.learn import experience
from ctg_jax.learn.pool import Pool, batches
from ctg_jax.methods import finetune
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import judges, sampling, sources
from ctg_jax.types import InputError
from experiments import cli, generate
from tests.data.chats import assistant, system, user, write_chat_lm

QUESTIONS = ["how was the food", "was the food good"]


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    return write_chat_lm(tmp_path_factory.mktemp("chat"), "gemma3")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def lm(root, chat_dir):
    return stage(root, sources.load_lm, {"source": str(chat_dir)})


@pytest.fixture
def call(root, chat_dir, capsys):
    def run(*argv, model=chat_dir):
        code = cli.run(generate.main, [f"--lm={model}", f"--root={root}", "--max_new=4", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


def refused(result, words):
    code, out, err = result
    said = [line for line in err.splitlines() if not line.startswith(("stages:", "running"))]
    assert code == 2 and out == "" and len(said) == 1, (code, out, err)
    assert words in said[0], said[0]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_are_messages(call, tmp_path):
    code, out, _ = call(*QUESTIONS, "--chat", "--system=be brief", "--greedy")
    assert code == 0 and [line.split("assistant: ")[0] for line in out.splitlines()] == [
        f"system: be brief\\nuser: {q}\\n" for q in QUESTIONS
    ]
    rows = [{"messages": [system("be brief"), user(q)]} for q in QUESTIONS]
    file = write(tmp_path / "chats.jsonl", rows)
    assert call(f"--file={file}", "--greedy")[1] == out
    file = write(tmp_path / "users.jsonl", [{"messages": row["messages"][1:]} for row in rows])
    assert call(f"--file={file}", "--chat", "--system=be brief", "--greedy")[1] == out
    assert call(*QUESTIONS, "--chat", "--system=be brief", "--greedy", "--stream")[1] == out
    code, out, _ = call(QUESTIONS[0], "--chat", "--format=jsonl")
    row = json.loads(out)
    assert row["messages"] == [user(QUESTIONS[0])] and row["prompt"] == f"user: {QUESTIONS[0]}\nassistant: "


def test_bad_conversations(call, tmp_path, lm_dir):
    refused(call("a", "--system=be brief"), "add --chat")
    refused(call("a", "--chat", model=lm_dir), "this tokenizer has no chat template")
    refused(call("a", "", "--chat"), "prompt 2 is empty")
    file = write(tmp_path / "a.jsonl", [{"messages": [user("x"), assistant("y")]}])
    refused(call(f"--file={file}"), "the last of 2 messages is the assistant's")
    file = write(tmp_path / "b.jsonl", [{"messages": [{"role": "bot", "content": "x"}]}])
    refused(call(f"--file={file}"), "b.jsonl record 1: message 1 has the role 'bot'")
    file = write(tmp_path / "c.jsonl", [{"messages": [system("x"), user("y")]}])
    refused(call(f"--file={file}", "--chat", "--system=be brief"), "begin with a system prompt: leave out one")


def test_a_system_prompt_that_the_template_does_not_take(call, tmp_path):
    refused(call("a", "--chat", "--system=be brief", model=write_chat_lm(tmp_path, "gemma")), "takes no system prompt")


def test_conversations_are_trained_on_sampled_scored_and_judged(root, lm, tmp_path, monkeypatch):
    file = write(
        tmp_path / "train.jsonl",
        [{"messages": [user(q), assistant("the food was good")], "label": 1} for q in QUESTIONS] * 2,
    )
    data = stage(root, sources.load_data, dict(source=f"jsonl:{file}", split="all", system="be brief"))
    assert data.rows("data.jsonl")[0]["messages"][0] == system("be brief")
    training = dict(steps=2, batch=2, tokens=48, warmup=1)
    fitted = finetune.fit(root, lm=lm, data=data, adapter=dict(rank=2), training=training)
    tokenizer = open_lm(lm)[2]
    learned = sum(int(tokenizer.chat.encode(r["messages"]).learned.sum()) for r in data.rows("data.jsonl")[:2])
    assert [row["weight"] for row in fitted.metrics()] == [learned, learned]

    plain = write(tmp_path / "prompts.jsonl", [{"text": q} for q in QUESTIONS])
    prompts = stage(root, sources.load_data, dict(source=f"jsonl:{plain}", split="all", chat=True, system="be brief"))
    drawn = dict(n=2, max_new=4, batch=4, strengths=[0.0])
    samples = stage(root, sampling.sample, drawn, lm=lm, prompts=prompts, controls=[fitted])
    rows = samples.rows("samples.jsonl")
    assert [r["messages"][1]["content"] for r in rows] == [q for q in QUESTIONS for _ in range(2)]
    judge = stage(root, judges.fit_judge, dict(kind="diversity", name="diverse"))
    scored = stage(root, experience.score, {}, samples=samples, rewards=[judge], lm=lm)
    pool = Pool.open([scored])
    np.testing.assert_allclose(pool.column("base"), pool.column("logp"), atol=1e-3)  # read as it was drawn
    heads = tokenizer.encode_prompts([r["messages"] for r in rows])
    assert tokenizer.encode_prompts(pool.prompts()) == heads
    batch = next(batches(pool, tokenizer, batch=4, seed=0))
    assert sorted(t[m].tolist() for t, m in zip(batch["tokens"], batch["mask"])) == sorted(heads)
    figures = stage(root, judges.evaluate, dict(kl=True, resamples=20), samples=samples, judges=[judge], lm=lm)
    names = {row["name"]: row["value"] for row in figures.metrics()}
    assert abs(names["kl"]) < 1e-3
    human = stage(root, sampling.human_perplexity, dict(resamples=20), lm=lm, data=data)
    assert human.metrics()[0]["value"] > 1


def test_bad_settings_of_conversations(root, tmp_path):
    chats = write(tmp_path / "chats.jsonl", [{"messages": [system("x"), user("y")]}])
    texts = write(tmp_path / "texts.jsonl", [{"text": "a b c d"}])
    for settings, words in (
        (dict(source=f"jsonl:{texts}", system="be brief"), "has no messages: set chat=True too"),
        (dict(source=f"jsonl:{chats}", chat=True), "has messages already: leave chat out"),
        (dict(source=f"jsonl:{chats}", system="be brief"), "begin with a system prompt"),
        (dict(source=f"jsonl:{chats}", words=2), "words is 2, but record 0"),
    ):
        with pytest.raises(InputError, match=words):
            stage(root, sources.load_data, {"split": "all", **settings})
