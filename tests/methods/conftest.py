"""A language model of a few thousand weights, and labelled texts, as artifacts."""

import json

import pytest

from ctg_jax.learn.pretrain import pretrain
from ctg_jax.run.stage import stage
from ctg_jax.stages import sources

GOOD = ["good good fun", "nice good day", "fun and nice", "good nice fun day", "so good so nice", "nice fun"]
BAD = ["bad bad sad", "awful bad day", "sad and awful", "bad awful sad day", "so bad so sad", "awful sad"]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """(root, lm, data): an untrained LM, and texts with labels 0 and 1."""
    root = tmp_path_factory.mktemp("small")
    rows = [{"text": t, "label": i} for pair in zip(BAD, GOOD) for i, t in enumerate(pair)]
    (root / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = stage(root, sources.load_data, dict(source=f"jsonl:{root / 'texts.jsonl'}", split="all"))
    shape = dict(
        vocab=270, width=16, depth=1, heads=2, context=64, training=dict(tokens=16, batch=4, steps=2, warmup=1)
    )
    return root, stage(root, pretrain, shape, data=data), data
