"""A small copy of the bundled corpus, prepared once."""

import pytest

SMALL = {"train": 200, "validation": 40, "test": 60}


@pytest.fixture(scope="session")
def small_reviews(tmp_path_factory):
    """(cache folder, sizes) with a short bundled corpus in it."""
    from ctg_jax.data import builder

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "SPLITS", SMALL)
        builder.prepare(cache)
        yield cache
