"""Runs the tests of each fault with the fault in place, and prints a line for each: {"number", "name", "code"}, with
the code that pytest returns, 1 where a test failed.

    python -m tests.mutations.runner [NUMBER …]

Files on disk are not touched: each fault is applied while its module is imported, in a process of its own that is
forked after the large libraries are imported.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

from tests.mutations.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]


def faulty(source: str, fault: Fault) -> str:
    """The source with the fault.

    Raises:
      ValueError: it does not hold the line exactly once.
    """
    if source.count(fault.old) != 1:
        raise ValueError(f"{fault.file} holds {fault.old!r} {source.count(fault.old)} times, expected once")
    return source.replace(fault.old, fault.new)


def put_in(fault: Fault) -> None:
    """Lets the import of the file of a fault compile the source with it."""
    target, plain = str(ROOT / fault.file), SourceFileLoader.get_code

    def get_code(self, name):
        if self.path != target:
            return plain(self, name)
        return compile(faulty(Path(target).read_text("utf-8"), fault), target, "exec", dont_inherit=True)

    SourceFileLoader.get_code = get_code


def code_of(fault: Fault) -> int:
    """What pytest returns for the tests of a fault, in a process of its own."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = 70
        try:
            import pytest

            put_in(fault)
            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *fault.tests]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(argv: list[str]) -> None:
    import grain  # noqa: F401
    import jax  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import pytest  # noqa: F401
    import scipy.optimize  # noqa: F401

    os.chdir(ROOT)
    for number in map(int, argv) if argv else range(len(FAULTS)):
        fault = FAULTS[number]
        print(json.dumps({"number": number, "name": fault.name, "code": code_of(fault)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
