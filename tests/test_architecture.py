"""The rules of docs/design.md, read off the source: imports go down only, libraries have one home, no hidden state."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ctg_jax"
TOP = {"__init__", "control", "io", "rng", "support", "tree", "types"}
ROOMS = [  # from the bottom to the top; a room imports itself and the rooms before it
    {"types"},
    {"tree", "rng", "io", "support"},
    {"control"},
    {"mesh"},
    {"models"},
    {"controls"},
    {"data"},
    {"decode"},
    {"run"},
    {"rewards", "evaluation", "report"},
    {"methods"},  # its __init__, which finds methods by name; the methods themselves are above `learn`
    {"stages"},
    {"learn"},
    {"methods/hidden", "methods/logits", "methods/input", "methods/weights", "methods/search", "methods/diffusion"},
    {"studies"},
    {"door"},
]
HOMES = {  # library -> the rooms that may import it
    "flax.linen": {"models"},
    "orbax": {"run"},
    "ml_collections": set(),
    "absl": set(),
    "torch": set(),
    "tensorflow": set(),
    "pickle": set(),
}
STATE_HOMES = {"ctg_jax/run/session.py", "ctg_jax/mesh/processes.py", "ctg_jax/mesh/layout.py"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(dotted):
    """The room of a dotted module name below ctg_jax."""
    parts = dotted.split(".")
    if parts[0] == "methods" and len(parts) > 1 and (PACKAGE / "methods" / parts[1]).is_dir():
        return f"methods/{parts[1]}"
    return parts[0]


def level(name):
    return next((i for i, names in enumerate(ROOMS) if name in names), None)


def dotted(file):
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{a.name}" for a in node.names)


def test_the_top_level_is_small():
    assert {p.stem for p in PACKAGE.glob("*.py")} == TOP


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_imports_go_down_and_libraries_stay_home(file):
    here = room(dotted(file))
    if here in ("__init__", ""):
        return
    assert level(here) is not None, f"{here} is in no room: add it to ROOMS and to docs/design.md"
    for name in imported(file):
        if name.startswith("ctg_jax."):
            other = room(name.removeprefix("ctg_jax."))
            if level(other) is not None:
                assert level(other) <= level(here), f"{here} imports {name} from a room above it"
        for library, homes in HOMES.items():
            if name == library or name.startswith(library + "."):
                assert here in homes, f"{here} imports {name}, which belongs to {homes or 'no part of the package'}"


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_files_stay_readable_and_read_no_environment(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    assert file.stem not in {"utils", "helpers", "base", "common"}
    assert "os.environ" not in text and "getenv" not in text


@pytest.mark.parametrize("folder", ["configs", "experiments"])
def test_scripts_and_configurations_stay_readable(folder):
    long = {
        f.name: n
        for f in (PACKAGE.parent / folder).rglob("*.py")
        if (n := len(f.read_text("utf-8").splitlines())) > 350
    }
    assert not long, f"split {long}"


def test_the_median_file_is_short():
    assert statistics.median(len(f.read_text(encoding="utf-8").splitlines()) for f in FILES) <= 150


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_functions_have_at_most_twelve_parameters(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            count = len([*a.posonlyargs, *a.args, *a.kwonlyargs])
            assert count <= 12, f"{node.name} has {count} parameters: group those that belong together in a record"


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_no_module_keeps_state(file):
    """Caches and context variables are only in the session and in what describes the devices."""
    if str(file.relative_to(ROOT)) in STATE_HOMES:
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.ImportFrom) else []
        names += [node.attr] if ast.unparse(node) in ("functools.cache", "functools.lru_cache") else []
        names += [node.attr] if getattr(node, "attr", None) == "ContextVar" else []
        found = {"lru_cache", "cache", "ContextVar"} & set(names)
        assert not found, f"{file.name}, line {node.lineno}: {found}"
        assert not isinstance(node, ast.Global), f"{file.name}, line {node.lineno}: global"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict | ast.List | ast.Set):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            filled = (isinstance(node.value, ast.Dict) and node.value.keys) or getattr(node.value, "elts", None)
            assert filled or getattr(target, "id", "") == "__all__", f"line {node.lineno}: it begins empty"


METHODS = {f.stem for f in (PACKAGE / "methods").rglob("*.py")} - {"__init__"}


@pytest.mark.parametrize("file", [f for f in FILES if "methods" not in f.parts or f.stem == "__init__"], ids=dotted)
def test_shared_code_knows_no_method(file):
    if "studies" in file.parts:
        return
    for name in imported(file):
        known = name.rpartition(".")[2] in ("get", "load", "names", "save", "with_strength")
        assert known or not name.startswith("ctg_jax.methods."), name


@pytest.mark.parametrize("file", [f for f in FILES if "methods" in f.parts and f.stem != "__init__"], ids=dotted)
def test_methods_use_no_other_methods_internals(file):
    for name in imported(file):
        if name.startswith("ctg_jax.methods."):
            parts = name.removeprefix("ctg_jax.methods.").split(".")
            assert not METHODS & set(parts), (
                f"{file.stem} imports {name}: what two methods share is in controls/ or learn/"
            )
