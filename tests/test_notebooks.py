"""Notebooks: clean as they are kept, and run from the first cell to the last (the long tests)."""

import ast
import json
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
FILES = sorted((HERE / "notebooks").glob("*.ipynb"))


def code(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_notebooks_are_kept_clean(file):
    notebook = json.loads(file.read_text("utf-8"))
    cells = code(notebook)
    assert notebook["cells"][0]["cell_type"] == "markdown" and "REPOSITORY" in cells[0]
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    for text in cells:
        ast.parse(text)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The notebooks share what they have in common, such as the language model."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_notebooks_run(file, root, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("NPROC", raising=False)
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"runs/notebooks"', repr(str(root)))
    client = nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": HERE}}
    )
    client.execute()
    assert any(cell.get("outputs") for cell in notebook.cells)
