"""The subcommands of `ctg`.

ctg write "The food was" --lm=google/gemma-3-270m
ctg fit steer --lm=google/gemma-3-270m --data=jsonl:texts.jsonl --out=cheerful
ctg compare --config=compare_sentiment.py:tiny
ctg NAME --help
"""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import ctg_jax
from ctg_jax.run.stage import nearest
from experiments import cli

COMMANDS = {  # name -> the script, a module of this folder
    "write": "generate",
    "fit": "fit",
    "run": "main",
    "compare": "compare",
    "ablate": "ablate",
    "report": "collect",
    "latents": "latents",
    "plan": "plan",
    "project": "project",
}
ON_PAPER = ("plan", "project")  # run on no device


def main(argv: Sequence[str]) -> int:
    """Runs one subcommand and returns its exit code; see `cli.run`."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(__doc__.strip() + "\n\nSubcommands:\n" + "\n".join(f"  {name:8}  {about(name)}" for name in COMMANDS))
        return 0
    if argv[0] == "--version":
        print(ctg_jax.__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"ctg has no subcommand {argv[0]!r}{nearest(argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    script = importlib.import_module(f"experiments.{COMMANDS[argv[0]]}")
    return cli.run(script.main, argv[1:], devices=argv[0] not in ON_PAPER)


def about(name: str) -> str:
    """The first sentence of the docstring of a script, which is not imported."""
    file = Path(__file__).with_name(f"{COMMANDS[name]}.py")
    text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())
