"""The bundled corpus as a TensorFlow Datasets builder, prepared as ArrayRecord files without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path

from ctg_jax.data import reviews
from ctg_jax.io import sha256_of
from ctg_jax.types import InputError

SPLITS = {"train": 40_000, "validation": 4_000, "test": 4_000}  # disjoint ranges of one corpus, in this order
SEED = 0
RELEASE = "1.0.0"


def _builder(folder: Path):
    """The TensorFlow Datasets builder that writes the corpus below `folder`. The class is defined here because its base
    class is, and TensorFlow Datasets is imported only when the corpus is prepared."""
    import tensorflow_datasets as tfds

    class Reviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Reviews of known sentiment, topic, insults, length and formality; see `ctg_jax.data.reviews`."""

        VERSION = tfds.core.Version(RELEASE)

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Reviews written by a grammar, with attributes that can be read back exactly.",
                features=tfds.features.FeaturesDict(
                    {
                        "text": tfds.features.Text(),
                        "prompt": tfds.features.Text(),
                        "label": tfds.features.ClassLabel(names=reviews.LABELS),
                        "topic": tfds.features.ClassLabel(names=reviews.TOPICS),
                        "toxic": tfds.features.ClassLabel(names=("clean", "toxic")),
                        "length": tfds.features.ClassLabel(names=reviews.LENGTHS),
                        "formal": tfds.features.ClassLabel(names=("informal", "formal")),
                    }
                ),
                disable_shuffling=True,  # record i of the file is review i of the corpus
            )

        def _split_generators(self, dl_manager):
            start, splits = 0, {}
            for name, size in SPLITS.items():
                splits[name] = self._generate_examples(start, size)
                start += size
            return splits

        def _generate_examples(self, start: int, size: int):
            for i in range(size):
                yield i, reviews.generate(start + i, SEED)

    return Reviews(data_dir=folder, file_format="array_record")


def prepare(cache_dir: str | Path) -> Path:
    """The folder of the prepared corpus under `cache_dir`, written on the first call.

    The folder's name holds a fingerprint of the grammar and the splits, so after a change nobody reads old files. It
    is written under a temporary name and renamed, so a reader sees all of it or nothing and two writers do no harm.

    Raises:
      InputError: `cache_dir` cannot be written.
    """
    content = f"{reviews.digest()} {SEED} {SPLITS} {RELEASE}"
    target = Path(cache_dir) / f"reviews-{sha256_of(content)[:12]}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".reviews-", dir=target.parent))
    except OSError as e:
        raise InputError(f"cache_dir {str(cache_dir)!r} cannot be written ({e.strerror}): give another folder") from e
    try:
        builder = _builder(work)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare()  # seconds; its progress bars would say "download"
        try:
            os.rename(builder.data_dir, target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same bytes
                raise
    except OSError as e:
        raise InputError(f"cache_dir {str(cache_dir)!r} cannot be written ({e.strerror}): give another folder") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
