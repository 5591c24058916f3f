"""The documents name tests that exist, every method has a page, and the site builds strictly (a slow test)."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ctg_jax import methods
from ctg_jax.evaluation import smooth
from ctg_jax.report import meaning

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("pages", HERE / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_a_page_made_of_its_own_words(pages, name):
    page, module = pages[f"methods/{name}.md"], methods.get(name)
    assert module.__doc__.strip().splitlines()[0] in page
    assert f"::: {module.__name__}." in page and f"({name}.md)" in pages["methods/index.md"]
    config = HERE / "configs" / f"{name}.py"
    assert not config.exists() or config.read_text().strip() in page


def test_what_was_measured_and_what_differs_is_found(pages):
    quark = pages["methods/quark.md"]
    assert "| quark | highest | 0.686" in quark and "results.md#can-a-model-be-conditioned-on-its-reward" in quark
    assert "results/rewards.md#quark-a-real-lm-on-negative-prompts" in quark  # the complete record
    assert "the paper's" in quark and "`Objective`" in quark
    assert "| quark" not in pages["methods/gdc.md"]


def test_the_laws_and_how_to_cite(pages):
    assert "## A row alone is the row in its batch" in pages["laws.md"]
    assert "@software{ctg_jax," in pages["cite.md"] and "{2026}" in pages["cite.md"]


def named_tests(text):
    """(file, test) of every `file::test` in a text; a `::test` without a file is in the file before it."""
    file = None
    for found, test in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", text):
        file = found or file
        yield file, test


def test_every_fault_has_tests_that_exist():
    text = (HERE / "docs" / "faults.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 29))
    assert all("tests/" in row.split("|")[-2] for row in rows)
    known = {}
    for file, test in named_tests(text):
        if file not in known:
            tree = ast.parse((HERE / file).read_text("utf-8"))
            known[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert test in known[file], f"docs/faults.md names {file}::{test}, which does not exist"
    assert len(known) > 20


def test_every_method_has_usage_and_the_site_has_notebooks_and_scripts(pages):
    for name in methods.names():
        page = pages[f"methods/{name}.md"].split("## Usage")[1].split("\n## ")[0]
        assert f"ctg.{name}." in page or f"ctg fit {name} " in page or "lm.write(" in page, name
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            ast.parse(block)
    assert "ctg.steer.from_pairs(lm, pairs)" in pages["methods/steer.md"]
    assert "--reward mine.py:score" in pages["methods/quark.md"]
    assert "## fit.py" in pages["scripts.md"]
    assert "![output](1_the_idea-0.png)" in pages["notebooks/1_the_idea.md"]


def test_every_figure_of_a_report_is_in_the_glossary():
    text = (HERE / "docs" / "glossary.md").read_text("utf-8")
    named = set(re.findall(r"`([^`]+)`", text))
    for pattern, _, _ in meaning._MEANING:
        assert any(re.fullmatch(pattern, name) for name in named), pattern
    assert {f"NAME/{name}" for name in smooth.MEANING} <= named


def test_the_lines_beside_other_libraries_are_counted_again():
    """Statements and names of the README's first program, as docs/peers.md says how."""
    first = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.DOTALL)[1]
    nodes = list(ast.walk(ast.parse(first)))
    statements = sum(isinstance(node, ast.stmt) for node in nodes)
    called = {node.func.attr for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names} | called
    page = (HERE / "docs" / "peers.md").read_text("utf-8")
    rows = [
        [int(x) for x in re.findall(r"\| (\d+)(?= \|)", line)] for line in page.splitlines() if "statements" in line
    ]
    assert f"a whole program: statements | {statements} |" in page and f"the same: names | {len(names)} |" in page
    assert all(row[0] == min(row) for row in rows if row)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(pages, tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert (tmp_path / "methods" / "quark" / "index.html").is_file()


@pytest.mark.slow
def test_the_code_about_chat_models_runs(tmp_path, monkeypatch):
    from tests.data.chats import write_chat_lm

    page = (HERE / "docs" / "chat.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    hub = '"HuggingFaceTB/SmolLM2-360M-Instruct"'
    assert len(blocks) == 3 and hub in blocks[0]
    monkeypatch.chdir(tmp_path)
    write_chat_lm(tmp_path / "lm", "qwen", context=192)
    names = {}
    for block in blocks:
        exec(compile(block.replace(hub, '"lm"'), "docs/chat.md", "exec"), names)
    assert len(names["answers"]) == 2 and names["samples"].tokens.shape == (2, 20)
    conversation = names["conversation"]
    assert names["last_prompt_token"] == conversation.role("assistant").argmax() - 1
