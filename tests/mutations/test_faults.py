"""Every one-line fault of `faults.py` is caught by one of its tests; the lines that it changes exist."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.mutations.faults import FAULTS
from tests.mutations.runner import ROOT, faulty


def test_every_fault_changes_one_line_and_names_tests_that_exist():
    assert len(FAULTS) >= 30 and len({f.name for f in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        source = (ROOT / fault.file).read_text("utf-8")
        changed = faulty(source, fault)
        assert changed != source
        compile(changed, fault.file, "exec")
        for test in fault.tests:
            file, name = test.split("::")
            assert re.search(rf"^def {name.partition('[')[0]}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE), test


@pytest.mark.slow
def test_every_fault_is_caught():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.mutations.runner"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(FAULTS)
    missed = [row for row in found if row["code"] != 1]
    assert not missed, f"{len(found) - len(missed)} of {len(found)} faults are caught; not: {missed}"
