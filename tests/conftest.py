"""A hostile environment: eight simulated devices, rank promotion raises, warnings are errors, the hub is offline."""

import os

os.environ["NPROC"] = "16"  # XLA sizes its thread pool by it; with 8 devices fewer than 16 can deadlock collectives
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import shutil
import tempfile

import jax

# Programs compiled once serve every test and worker of one run: the first process to come here names the folder.
FIRST = "CTG_TEST_COMPILED" not in os.environ
COMPILED = os.environ.setdefault("CTG_TEST_COMPILED", tempfile.mkdtemp(prefix="ctg_jax_tests_") if FIRST else "")
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)

from pathlib import Path

import pytest

if jax.default_backend() != "cpu":  # laws and parity compare digits, so products are in float32
    jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_unconfigure(config):
    if FIRST:
        shutil.rmtree(COMPILED, ignore_errors=True)


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


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs are shared inside a file and dropped after it, so that the suite stays within 6 GB."""
    yield
    jax.clear_caches()
