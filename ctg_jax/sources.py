"""The stages that everything starts from: `load_data`, and the two that make a language model, `load_lm`, `pretrain`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax.stage import Artifact, Run, digest_lm, write_jsonl
from ctg_jax.types import InputError, Sum


def load_data(
    run: Run,
    *,
    source: str,
    split: str = "train",
    limit: int | None = None,
    where: Mapping[str, Any] | None = None,
    words: int | None = None,
    balance: str | None = None,
    skip: int = 0,
) -> None:
    """Copies records of a source into data.jsonl, so that later stages read the same ones for ever.

    Args:
      source: "bundled:reviews", "jsonl:PATH", "hf:NAME" or "tfds:NAME"; see `ctg_jax.data`.
      split: name of the split.
      limit: keep at most so many records (of each value of `balance`, where given).
      where: keep records whose fields have these values, e.g. {"label": 1}.
      words: cut every text to its first so many words (prompts); shorter texts are left out.
      balance: a field; records are kept `limit` for each of its values, in the order of the source.
      skip: leave out so many matching records first (of each value of `balance`).

    Raises:
      InputError: no record matches.
    """
    from ctg_jax import data

    rows: list[dict[str, Any]] = []
    seen: dict[Any, int] = {}
    records = data.load(source, split)
    for i in range(len(records)):
        row = records[i]
        if any(row.get(k) != v for k, v in (where or {}).items()):
            continue
        if words is not None:
            parts = row["text"].split()
            if len(parts) <= words:
                continue
            row = {**row, "text": " ".join(parts[:words]), "reference": row["text"]}
        group = row.get(balance) if balance else None
        seen[group] = seen.get(group, 0) + 1
        if seen[group] > skip and (limit is None or seen[group] <= skip + limit):
            rows.append(row)
        elif limit is not None and balance is None and seen[group] > skip + limit:
            break
    if not rows:
        wanted = f" with {dict(where)}" if where else ""
        raise InputError(f"{source} split {split!r} has no record{wanted}: expected at least one")
    write_jsonl(run.path / "data.jsonl", rows)
    run.record(records=len(rows), digest=records.digest)


def load_lm(run: Run, *, source: str) -> None:
    """Imports a language model from a directory in Hugging Face layout or from the hub. Nothing is copied: the
    artifact holds the resolved path and a digest of the files, which `open_lm` compares.

    Raises:
      InputError: no such directory, no network for a hub id, a pickled checkpoint, another family.
    """
    from ctg_jax.models import hf

    path = Path(hf.resolve(source))
    hf.load_config(path)
    run.record(lm=str(path.absolute()), fingerprint=digest_lm(path))


def next_token_loss(params, frozen, batch, keys) -> Sum:
    """Summed negative log-likelihood of tokens [B, T] given those before them; padding has mask False."""
    lm = frozen["lm"]
    tokens, mask = batch["tokens"], batch["mask"]
    out = lm.apply(params, lm.embed(params, tokens), mask)
    logp = jax.nn.log_softmax(out.logits[:, :-1].astype(jnp.float32), axis=-1)
    nll = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
    real = (mask[:, 1:] & mask[:, :-1]).astype(jnp.float32)
    total, weight = jnp.sum(nll * real), jnp.sum(real)
    return Sum(total=total, weight=weight, metrics={"loss": (total, weight)})
