"""A hostile environment: eight simulated devices, rank promotion raises, warnings are errors, the hub is offline."""

import os

os.environ["NPROC"] = "16"  # XLA sizes its thread pool by it; with 8 devices fewer than 16 can deadlock collectives
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import gc

import jax

# A folder of compiled programs helps whoever runs the same file again. Within one run few programs are compiled twice,
# and writing all of them costs more than reading those few saves.
if "CTG_TEST_COMPILED" in os.environ:
    jax.config.update("jax_compilation_cache_dir", os.environ["CTG_TEST_COMPILED"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)

import sys
from pathlib import Path

import pytest

if jax.default_backend() != "cpu":  # laws and parity compare digits, so products are in float32
    jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_finish(session):
    """Tracing makes millions of short-lived objects. What collection left is never looked through again, and garbage is
    looked for rarely; `_forget_programs` does it after each file."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="long: run with --slow (make nightly)")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real corpora and models; tests that read it are skipped where it is not set."""
    root = os.environ.get("CTG_DATA_DIR")
    if not root:
        pytest.skip("CTG_DATA_DIR is not set: this test reads real corpora and models that are not part of the project")
    return Path(root)


def _gigabytes() -> float:
    """The memory that this process takes; infinite where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return float("inf")


def _drop_functions():
    """The programs of what the package compiles. Those of single operations stay."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "ctg_jax"]:
        for member in list(vars(sys.modules[name]).values()):
            if hasattr(member, "clear_cache"):
                member.clear_cache()


@pytest.fixture(autouse=True, scope="module")
def _forget_programs(request):
    """Files share the programs of single operations, which are most of those that a file needs. A file that patches
    something shares nothing, since what is patched may be read while programs are traced; and nothing is kept once a
    process takes so much memory that two would not stay within 6 GB."""
    patches = any("monkeypatch" in item.fixturenames for item in request.session.items if item.path == request.path)
    if patches:
        jax.clear_caches()
    yield
    if patches or _gigabytes() > 2:
        jax.clear_caches()
    else:
        _drop_functions()
    gc.collect()
