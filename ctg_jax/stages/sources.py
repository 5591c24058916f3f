"""The stages that experiments start from: `load_data`, and `load_lm`, which imports a language model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ctg_jax.data import load
from ctg_jax.data.labels import is_label, of_field, relabelled
from ctg_jax.data.messages import asked, has_messages, under
from ctg_jax.data.sources import content
from ctg_jax.run.identity import digest_model, model_content
from ctg_jax.run.stage import Artifact, Run, Session, open_artifact, stage, stage_function, write_jsonl
from ctg_jax.types import InputError

log = logging.getLogger(__name__)


def _source_content(source: str, settings: Mapping[str, Any], sha256: Any) -> str | None:
    return content(source, settings["split"], sha256)


@stage_function("load_data", contents={"source": _source_content})
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
    text: str | Mapping[str, str] = "text",
    labels: Mapping[str, Any] | None = None,
    chat: bool = False,
    system: str | None = None,
) -> None:
    """Stage: copies records of a source into data.jsonl, so that later stages read the same ones if the source changes.
    A local file is identified by its content: an edited one is another source, the same one at another path is not.

    Args:
      source: "bundled:reviews", "jsonl:PATH", "csv:PATH", "text:PATH", "hf:NAME" or "tfds:NAME"; see `ctg_jax.data`.
      split: name of the split.
      limit: the largest number of records to keep (of each value of `balance`, where given).
      where: keep records whose fields have these values, e.g. {"label": 1}.
      words: cut every text to its first `words` words, as a prompt; shorter texts are left out.
      balance: a field; records are kept `limit` for each of its values, in the order of the source. With "label",
        records without one (missing or -1) are left out and counted in a warning.
      skip: the number of matching records to leave out first (of each value of `balance`).
      text: the field that holds the text, dotted where it is inside another: "prompt", "prompt.text". Or templates of
        fields, {"prompt": "{concepts} =", "text": "{concepts} = {sentence}", "keywords": "concepts"}, which make data
        to text, lengths ("{words} words:") or the last word ("{last} |") prompts; see `ctg_jax.data.recast`. The
        other settings see the fields that they make.
      labels: name of a label -> its number; records with other labels are left out. Methods read numbers. Where the
        label is in another field, {FIELD: {name: number}}; where that holds a number, {FIELD: [bound, …]}, and the
        label is how many of the bounds it reaches, so that [0.5] makes 1 of a score from 0.5 on. `where` and
        `balance` see the label that a field gives.
      chat: make the prompt of each record the message of a user, which the chat template of the LM writes out.
      system: a system prompt, for records with messages and with `chat`.

    The field `prompt` of a record, as in the bundled reviews, is the part of its text that is the prompt; with `words`
    or `text` the text itself is the prompt. The prompt of a record with `messages` is these.

    Raises:
      InputError: no record matches; a record has no text in that field; `words` for messages, `chat` for records that
        have messages, or `system` for such as have none or one of their own.
    """
    rows: list[dict[str, Any]] = []
    seen: dict[Any, int] = {}
    unlabelled = unnamed = 0
    records = load(source, split, text=text)
    for i in range(len(records)):
        row = records[i]
        if of_field(labels) and (row := relabelled(row, labels)) is None:
            unnamed += 1
            continue
        if any(row.get(k) != v for k, v in (where or {}).items()):
            continue
        if labels is not None and not of_field(labels) and (row := relabelled(row, labels)) is None:
            unnamed += 1
            continue
        if not isinstance(row["text"], str):
            raise InputError(
                f"{source} split {split!r}: record {i} has no string under {text!r}; name the field of text"
            )
        if words is not None or (isinstance(text, str) and text != "text"):
            if words is not None and has_messages(row):
                raise InputError(f"words is {words}, but record {i} of {source} has messages, which are not cut")
            row.pop("prompt", None)
            row.pop("messages", None)
        if words is not None:
            parts = row["text"].split()
            if len(parts) <= words:
                continue
            row = {**row, "text": " ".join(parts[:words]), "reference": row["text"]}
        if balance == "label" and not is_label(row.get("label")):
            unlabelled += 1
            continue
        if chat or system:
            row = _chat(row, chat, system, f"record {i} of {source}")
        group = row.get(balance) if balance else None
        seen[group] = seen.get(group, 0) + 1
        if seen[group] > skip and (limit is None or seen[group] <= skip + limit):
            rows.append(row)
        elif limit is not None and balance is None and seen[group] > skip + limit:
            break
    if not rows:
        wanted = f" with {dict(where)}" if where else ""
        raise InputError(f"{source} split {split!r} has no record{wanted}: expected at least one")
    if unlabelled:
        log.warning("%s split %r: %d records have no label (missing or -1) and are left out", source, split, unlabelled)
    if unnamed:
        log.info("%s split %r: left out %d of %d, whose label is in none of labels", source, split, unnamed, i + 1)
    if empty := [i for i, row in enumerate(rows) if not row["text"].strip() and not has_messages(row)]:
        found = (len(empty), len(rows), empty[0])
        log.warning("%s split %r: the text of %d of %d records is empty, first of record %d", source, split, *found)
    write_jsonl(run.path / "data.jsonl", rows)
    run.record(records=len(rows))


def _chat(row: dict[str, Any], chat: bool, system: str | None, where: str) -> dict[str, Any]:
    """The record as a conversation under a system prompt."""
    if has_messages(row) == chat:
        raise InputError(
            f"chat is True, but {where} has messages already: leave chat out" if chat
            else f"system is {system[:40]!r}, but {where} has no messages: set chat=True too"
        )  # fmt: skip
    messages = asked(row.get("prompt", row["text"]), system) if chat else under(row["messages"], system)
    return {**row, "messages": messages}


@stage_function("load_lm", contents={"source": model_content})
def load_lm(run: Run, *, source: str, dtype: str = "float32") -> None:
    """Imports a language model from a directory in Hugging Face layout or from the hub. Nothing is copied: the
    artifact holds the resolved path and a digest of the files, which `open_lm` compares. The same files in another
    directory are the same language model.

    Args:
      source: the directory, or a hub id.
      dtype: of its weights and its computation, "float32" or "bfloat16", independent of the files'. What is learned,
        sums of losses and optimizer states are float32 in both.

    Raises:
      InputError: another dtype, no such directory, no network for a hub id, a pickled checkpoint, another family, a
        tokenizer with more ids than the model has tokens.
    """
    from ctg_jax.data.ids import check_sizes
    from ctg_jax.data.tokenizer import load_tokenizer
    from ctg_jax.models import hf

    check_dtype(dtype)
    path = hf.resolve(source)
    lm = hf.check(path)  # finds what is wrong with the files now, not in the middle of an experiment
    check_sizes(load_tokenizer(str(path)), lm, source)
    run.record(lm=str(path.absolute()), fingerprint=digest_model(path, run.session.sha256))


def language_model(root: Session, source: str, dtype: str | None = None) -> Artifact:
    """The LM artifact that a user names: itself, or the import of a directory or of a hub id.

    Args:
      dtype: of an LM that is imported; None: `default_dtype`.

    Raises:
      InputError: a dtype for an artifact, which has its own; what `open_artifact` and `load_lm` raise.
    """
    if (Path(source) / "spec.json").exists():
        if dtype:
            raise InputError(f"dtype is {dtype}, but {source} is an artifact, which has its own: leave it out")
        return open_artifact(source, root)
    path = Path(source).expanduser()
    named = str(path.absolute()) if path.exists() else source
    return stage(root, load_lm, {"source": named, "dtype": dtype or default_dtype()})


def default_dtype() -> str:
    """The dtype of a language model where a configuration gives none: "float32" on a CPU, which computes in it faster,
    and "bfloat16" on an accelerator. It becomes a setting of the stage, and so part of what identifies an artifact."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def check_dtype(dtype: str) -> None:
    """InputError unless the dtype is one that weights may have."""
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}, expected 'float32' or 'bfloat16'")
