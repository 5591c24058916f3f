"""What the tests of the scripts share."""

import pytest

from experiments import cli
from tests.experiments.tiny_lm import write_lm


@pytest.fixture(autouse=True, scope="module")
def no_compilation_cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "keep_compiled", lambda: None)
        yield


@pytest.fixture(scope="session")
def lm_dir(tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("lm"))
