"""The notebooks as they are kept: with the address of the repository, and with small outputs.

    python notebooks/keep.py             writes the address into README's badge and each notebook's badge and first cell
    python notebooks/keep.py --run       runs each notebook too and keeps what it prints and draws (needs nbclient)
    python notebooks/keep.py --run 2_*   of the notebooks with such names alone

The address is `repository-code` in CITATION.cff: change it there and run the first command.
"""

import argparse
import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
CITATION = HERE.parent / "CITATION.cff"
ROOT = '"runs/notebooks"'  # where the notebooks keep what they compute
MOST = 200_000  # characters of the outputs of one notebook
FIRST = """\
# On Colab this cell installs the library; in a checkout, or where it is installed, it downloads nothing.
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = "{address}"
checkout = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "ctg_jax" / "door").is_dir()), None)
if checkout:
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
elif importlib.util.find_spec("ctg_jax") is None:
    tpu = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    extra = "[gpu]" if shutil.which("nvidia-smi") else "[tpu]" if tpu else ""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"ctg_jax{{extra}} @ git+{{REPOSITORY}}"], check=True)

from ctg_jax.door.command import folder

sys.path.insert(0, str(folder()))  # where the library keeps its configurations"""


def address() -> str:
    """The address of the repository, from CITATION.cff."""
    return re.search(r'^repository-code: "(.+)"$', CITATION.read_text("utf-8"), re.MULTILINE)[1]


def badge(name: str, address: str) -> str:
    """The link that opens a notebook on Colab, as a picture."""
    place = f"{address.removeprefix('https://github.com/')}/blob/main/notebooks/{name}.ipynb"
    return (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{place})"
    )


def addressed(notebook: dict, name: str, address: str) -> dict:
    """A notebook with the badge under its title and the first cell for this address."""
    title, _, rest = "".join(notebook["cells"][0]["source"]).partition("\n")
    rest = re.sub(r"^\s*\[!\[Open in Colab.*\n", "", rest)
    _written(notebook["cells"][0], f"{title}\n\n{badge(name, address)}\n\n{rest.strip()}")
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    _written(first, FIRST.format(address=address))
    return notebook


def _written(cell: dict, text: str) -> None:
    cell["source"] = text.splitlines(keepends=True)


def outputs(cells: list[dict]) -> list[list[dict]]:
    """The outputs of each cell that are kept: what it printed, its pictures, and the text or table of its value.
    Progress and warnings, which go to stderr, are not."""
    kept = []
    for cell in cells:
        mine = []
        for out in cell.get("outputs", []):
            if out["output_type"] == "stream" and out["name"] == "stdout":
                if mine and mine[-1]["output_type"] == "stream":
                    mine[-1]["text"] += out["text"]
                else:
                    mine.append({"output_type": "stream", "name": "stdout", "text": out["text"]})
            elif out["output_type"] in ("display_data", "execute_result"):
                data = {k: v for k, v in out["data"].items() if k in ("text/plain", "text/html", "image/png")}
                mine.append({"output_type": "display_data", "data": data, "metadata": {}})
        kept.append(mine)
    return kept


def executed(file: Path, root: str = ROOT) -> list[list[dict]]:
    """Runs a notebook from the first cell to the last, and gives the outputs that are kept of each cell.

    root: the Python text that takes the place of the folder in which notebooks keep what they compute.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(ROOT, root)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    return outputs(notebook.cells)


def saved(file: Path, notebook: dict) -> None:
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the notebooks and keep their outputs")
    parser.add_argument("names", nargs="*", default=["*"], help="patterns of names; all by default")
    asked = parser.parse_args()
    readme = HERE.parent / "README.md"
    line = badge("1_the_idea", address())
    readme.write_text(re.sub(r"\[!\[Open in Colab.*", lambda _: line, readme.read_text("utf-8")), encoding="utf-8")
    for file in sorted({f for name in asked.names for f in HERE.glob(f"{name.removesuffix('.ipynb')}.ipynb")}):
        notebook = addressed(json.loads(file.read_text("utf-8")), file.stem, address())
        saved(file, notebook)
        if asked.run:
            for cell, mine in zip(notebook["cells"], executed(file)):
                if cell["cell_type"] == "code":
                    cell["outputs"] = mine
            saved(file, notebook)
        print(file)


if __name__ == "__main__":
    main()
