"""The house rules of docs/design.md, read off the source: imports go down only, and some libraries have one home."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ctg_jax"
LAYERS = [
    {"types", "tree", "rng", "files", "hosts", "store", "support"},
    {"control", "constraints", "bricks", "parallel", "layout", "checkpoint", "metrics"},
    {"models"},
    {
        "data",
        "decode",
        "strategies",
        "losses",
        "train",
        "rewards",
        "evaluation",
        "artifact",
        "identity",
        "stage",
        "sources",
        "report",
        "judging",
        "invert",
        "calibrate",
    },
    {"methods", "flow", "experience", "embeddings", "latent_diffusion"},
    {"latents", "reconstruct"},
]
HOMES = {  # library -> the parts of the package that may import it
    "flax.linen": {"models"},
    "orbax": {"checkpoint"},
    "ml_collections": set(),
    "absl": set(),
    "torch": set(),
    "tensorflow": set(),
    "pickle": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer(name):
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{a.name}" for a in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down_and_libraries_stay_home(file):
    here = part(file)
    if here == "__init__":
        return
    assert layer(here) is not None, f"{here} belongs to no layer: add it to LAYERS and to docs/design.md"
    for name in imported(file):
        if name.startswith("ctg_jax."):
            other = name.split(".")[1]
            if layer(other) is not None:
                assert layer(other) <= layer(here), f"{here} imports {name} from a layer above it"
        for library, homes in HOMES.items():
            if name == library or name.startswith(library + "."):
                assert here in homes, f"{here} imports {name}, which belongs to {homes or 'no part of the package'}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_stay_readable_and_read_no_environment(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert file.stem not in {"utils", "helpers", "base", "common"}
    assert "os.environ" not in text and "getenv" not in text
