"""Every model family on tiny random models of `transformers`: the same numbers here, there, and there again."""

import pytest

from ctg_jax.models.hf.decoders import DECODERS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from experiments.benchmarks import families  # noqa: E402, it imports torch

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", [n for n in families.FAMILIES if n not in ("gpt2", "llama", "gpt_neox")])
def test_parity_and_export(name):
    """Rows longer than the windows, ragged and padded on the left. Models of three more families are in
    test_hf_parity.py."""
    found = families.measure(name, ("both",) if name in ("gemma3_text", "smollm3, window") else ())
    assert max(found.values()) <= TOLERANCE, found
    assert found["saved"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_column(name):
    found = families.measure(name)
    assert set(found) == set(families.COLUMNS)
    assert max(found.values()) <= TOLERANCE, found


def test_every_family_is_measured():
    measured = {name.partition(",")[0] for name in families.FAMILIES}
    assert measured == set(DECODERS) - {"gemma3"}  # which is a gemma3_text inside a model of images
