"""What the package needs to be imported, what an extra is asked for, and what setup.py declares."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ctg_jax import evaluation
from ctg_jax.data import load
from ctg_jax.evaluation.agreement import bleu
from ctg_jax.run.metrics import Writer
from ctg_jax.types import InputError, optional

ROOT = Path(__file__).parents[1]
# Imports every module of the package while only what the core needs is there: of all other distributions of this
# environment nothing can be imported, and the package itself may import none but these, whoever else needs them.
ALONE = """
import builtins, importlib, pkgutil, re, sys
from importlib import metadata

CORE = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors", "tokenizers")
named = lambda text: re.sub("[-_.]+", "-", re.match(r"[\\w.-]+", text)[0]).lower()
needed, todo = set(), [named(x) for x in CORE]
while todo:
    if (x := todo.pop()) not in needed:
        needed.add(x)
        try:
            todo += [named(r) for r in metadata.requires(x) or () if "extra ==" not in r]
        except metadata.PackageNotFoundError:
            pass  # for another platform or Python
others = {top for top, found in metadata.packages_distributions().items() if not needed & {named(x) for x in found}}
others -= {"ctg_jax"}
own = {"ctg_jax", "jax", "flax", "optax", "orbax", "numpy", "safetensors", "tokenizers", *sys.stdlib_module_names}
usual = builtins.__import__

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in others:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def strict(name, globals=None, locals=None, fromlist=(), level=0):
    who = (globals or {}).get("__name__", "")
    if level == 0 and who.partition(".")[0] == "ctg_jax" and name.partition(".")[0] not in own:
        raise ImportError(f"{who} imports {name} when it is imported")
    return usual(name, globals, locals, fromlist, level)

sys.meta_path.insert(0, Absent())
builtins.__import__ = strict
import ctg_jax
modules = [m.name for m in pkgutil.walk_packages(ctg_jax.__path__, "ctg_jax.")]
assert len(modules) > 60 and len(others) > 20, (modules, others)
for name in modules:
    importlib.import_module(name)
"""


def declared():
    """(install_requires, extras_require) of setup.py as names, without running it."""
    values = {}
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign):
            values[node.targets[0].id] = ast.literal_eval(node.value)
    name = lambda text: text.split(">")[0].split("[")[0]  # noqa: E731
    return {name(x) for x in values["CORE"]}, {k: {name(x) for x in v} for k, v in values["EXTRAS"].items()}


def test_every_module_can_be_imported_with_the_core_alone():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "module, extra, use",
    [
        ("datasets", "data", lambda tmp: load("hf:nobody/nothing", "train")),
        ("mauve", "metrics", lambda tmp: evaluation.mauve([[1.0]] * 60, [[1.0]] * 60, range(60))),
        ("nltk.stem.porter", "metrics", lambda tmp: evaluation.text.coverage("a dog", ["dogs"])),
        ("sacrebleu.metrics", "metrics", lambda tmp: bleu(["a"], ["a"])),
        ("tensorboardX", "tensorboard", lambda tmp: Writer(tmp / "metrics.jsonl", boards=["tensorboard"])),
        ("wandb", "wandb", lambda tmp: Writer(tmp / "metrics.jsonl", boards=["wandb"])),
    ],
)
def test_a_missing_library_is_answered_with_the_extra_that_installs_it(monkeypatch, tmp_path, module, extra, use):
    for name in [m for m in sys.modules if m.partition(".")[0] == module.partition(".")[0]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)  # as if it were not installed
    with pytest.raises(InputError, match=rf"{module} cannot be imported .*pip install 'ctg_jax\[{extra}\]'"):
        use(tmp_path)


def test_what_the_package_and_its_scripts_import_is_declared():
    core, extras = declared()
    tops = metadata.packages_distributions()
    standard = {"ctg_jax", "configs", "experiments", *sys.stdlib_module_names}
    asked = {}  # distributions -> a file that imports them
    for file in [*ROOT.glob("ctg_jax/**/*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("configs/*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for top in {n.partition(".")[0] for n in names} - standard:
                asked[frozenset(d.lower().replace("_", "-") for d in tops.get(top, [top]))] = (top, file.name)
    missing = [use for found, use in asked.items() if not found & (core | extras["slurm"])]
    assert not missing, f"imported and not in install_requires: {missing}"
    unused = core - set().union(*asked) - {"importlib-resources", "array-record"}  # what tensorflow-datasets needs
    assert not unused, f"in install_requires and imported nowhere: {unused}"


def test_the_extra_all_holds_every_feature_and_no_tool():
    core, extras = declared()
    assert {"datasets", "mauve-text", "nltk", "sacrebleu", "tensorboardx", "submitit"} <= {
        x.lower() for name in ("data", "metrics", "tensorboard", "slurm") for x in extras[name]
    }
    assert not core & {"datasets", "mauve-text", "nltk", "sacrebleu", "jaxtyping", "pandas"}
    assert {"tensorflow-datasets", "pyarrow"} <= core


def test_a_module_that_is_there_is_given():
    assert optional("json.decoder", "none").JSONDecoder
