"""The console command `ctg`: `ctg NAME …` runs the script of that name in `experiments/`.

A wheel carries `experiments/` and `configs/` inside the package, in `_scripts`, so that no module of these names is
installed; in a checkout they are beside the package. Only the process of this command, and those that it starts, find
them on their path.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """The folder of `experiments/` and `configs/`; SystemExit with a sentence where they are missing."""
    for place in (PACKAGE / "_scripts", PACKAGE.parent):
        if (place / "experiments" / "command.py").is_file():
            return place
    raise SystemExit(f"the scripts of ctg_jax are not beside {PACKAGE}: install the package again")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, by default that of the process, and returns the exit code."""
    place = folder()
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
    for name in ("experiments", "configs"):  # even where something else of that name is installed
        module = types.ModuleType(name)
        module.__path__ = [str(place / name)]
        if list(getattr(sys.modules.get(name), "__path__", ())) != module.__path__:
            sys.modules[name] = module
    return importlib.import_module("experiments.command").main(sys.argv[1:] if argv is None else list(argv))
