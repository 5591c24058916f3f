"""Notebooks: kept with small outputs and one address, and run from the first cell to the last (the long tests)."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
FILES = sorted((HERE / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def keep():
    spec = importlib.util.spec_from_file_location("keep", HERE / "notebooks" / "keep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_notebooks_are_kept_with_small_outputs(file, keep):
    """What they print and draw shows on a repository page; warnings, progress, errors and places do not."""
    notebook = json.loads(file.read_text("utf-8"))
    assert notebook["cells"][0]["cell_type"] == "markdown" and set(notebook["metadata"]) == {
        "kernelspec",
        "language_info",
    }
    for text in code(notebook):
        ast.parse(text)
    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", [])]
    assert all(out["output_type"] == "display_data" or out["name"] == "stdout" for out in outputs)
    assert any("image/png" in out.get("data", {}) for out in outputs), "no picture: python notebooks/keep.py --run"
    assert len(json.dumps(outputs)) < keep.MOST
    assert all(cell.get("execution_count") is None for cell in notebook["cells"])
    texts = json.dumps([{k: v for k, v in out.get("data", out).items() if k != "image/png"} for out in outputs])
    assert not re.search(r"/(home|tmp|root|work|Users)/", texts)


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_the_address_is_that_of_the_citation(file, keep):
    """It is written in one place; python notebooks/keep.py writes it into every notebook."""
    notebook = json.loads(file.read_text("utf-8"))
    title = "".join(notebook["cells"][0]["source"])
    assert code(notebook)[0] == keep.FIRST.format(address=keep.address())
    assert title.splitlines()[2] == keep.badge(file.stem, keep.address())
    moved = keep.addressed(notebook, file.stem, "https://github.com/else/where")
    assert "github/else/where/blob/main/notebooks" in "".join(moved["cells"][0]["source"])
    assert 'REPOSITORY = "https://github.com/else/where"' in code(moved)[0]
    assert keep.badge("1_the_idea", keep.address()) in (HERE / "README.md").read_text("utf-8")


@pytest.mark.parametrize("chip, extra", [("", ""), ("nvidia-smi", "[gpu]")])
def test_the_first_cell_installs_the_library_where_it_is_missing(tmp_path, monkeypatch, keep, chip, extra):
    """As on Colab: no checkout, nothing installed. What pip is asked for is compared; the install itself is pip's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    monkeypatch.setattr("shutil.which", lambda name: name if name == chip else None)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "ctg_jax" else find(name, *a))
    if chip == "":  # this machine may have a TPU
        monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    exec(compile(keep.FIRST.format(address="https://github.com/else/where"), "first cell", "exec"), {})
    assert [c[1:] for c in asked] == [
        ["-m", "pip", "install", "-q", f"ctg_jax{extra} @ git+https://github.com/else/where"]
    ]
    assert sys.path[0] == str(HERE)  # where this checkout keeps its configurations


def test_the_first_cell_installs_nothing_in_a_checkout(monkeypatch, keep):
    monkeypatch.chdir(HERE / "notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("something was installed"))
    exec(compile(keep.FIRST.format(address="nowhere"), "first cell", "exec"), {})
    assert Path.cwd() == HERE


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The notebooks share what they have in common, such as the language model."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_notebooks_run(file, root, monkeypatch, keep):
    for library in ("nbformat", "nbclient", "ipykernel", "pandas"):
        pytest.importorskip(library)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("NPROC", raising=False)
    notebook = json.loads(file.read_text("utf-8"))
    made = keep.executed(file, repr(str(root)))
    assert [bool(mine) for mine in made] == [bool(cell.get("outputs")) for cell in notebook["cells"]]
