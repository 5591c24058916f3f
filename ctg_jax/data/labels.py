"""Labels of records: which records have one, and whether it is a class."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ctg_jax.types import InputError

log = logging.getLogger(__name__)

Record = dict[str, Any]


def is_label(value: Any) -> bool:
    """Whether a value is a label: not None, not NaN, and not -1, which data sets write where the label is withheld (the
    test splits of GLUE, and everything that TensorFlow Datasets and Hugging Face `ClassLabel`s leave open)."""
    return value is not None and value == value and value != -1


def known(labels: Sequence[Any], where: str) -> list[int]:
    """The places of the labels that are labels. How many are not is logged as a warning.

    where: what holds them, for the message.

    Raises:
      InputError: there are values, but no label among them.
    """
    found = [i for i, label in enumerate(labels) if is_label(label)]
    if len(labels) and not found:
        raise InputError(
            f"{where}: none of the {len(labels)} texts has a label (all are missing or -1, which stands for no label): "
            "give labelled texts, with classes counted from 0"
        )
    if len(found) < len(labels):
        log.warning(
            "%s: %d of %d texts have no label (missing or -1) and are left out",
            where, len(labels) - len(found), len(labels),
        )  # fmt: skip
    return found


def labelled(records: Sequence[Record], where: str, field: str = "label", classes: int | None = None) -> list[Record]:
    """The records that have a label under `field`; how many have none is logged as a warning.

    Args:
      where: what holds the records, for messages.
      classes: C, where labels are classes from 0 to C - 1.

    Raises:
      InputError: no record has a label; a label that is no class.
    """
    kept = known([r.get(field) for r in records], where)
    for i in kept if classes is not None else ():
        check_class(records[i][field], classes, f"{field} of record {i} of {where}")
    return [records[i] for i in kept]


def of_all_classes(records: Sequence[Record], where: str, classes: int, field: str = "label") -> list[Record]:
    """`labelled` for a classifier, which learns nothing where it has not seen every class.

    Raises:
      InputError: what `labelled` raises, fewer than two classes, or no text has one of the labels 0 to classes - 1.
    """
    found = labelled(records, where, field, classes)
    if classes < 2:
        raise InputError(f"{where}: a classifier needs two classes or more, and there is {classes}: give texts of each")
    if missing := set(range(classes)) - {int(r[field]) for r in found}:
        raise InputError(
            f"{where}: none of the {len(found)} labelled texts has the {field} {min(missing)}, but a classifier of "
            f"{classes} classes learns from texts of each: give texts of all classes"
        )
    return found


def mentioned(record: Record, options: Sequence[str], field: str, where: str) -> int:
    """The class of a record by what its text under `field` holds: 0 where it holds none of `options`, or else the
    number of the first that it holds, counted from 1. "food[Chinese]" reads the meaning representations of E2E.

    Raises:
      InputError: the record has no text there; `where` is what it is called.
    """
    text = record.get(field)
    if not isinstance(text, str):
        raise InputError(f"{where} has no text under {field!r}: name the field that says what its text is about")
    return next((i for i, option in enumerate(options, 1) if option in text), 0)


def check_class(value: Any, classes: int, what: str) -> None:
    """InputError unless a value is a whole number from 0 to classes - 1."""
    if not isinstance(value, int) or not 0 <= value < classes:
        raise InputError(f"{what} is {value!r}, but there are {classes} classes: expected 0 to {classes - 1}")


def of_field(labels: Mapping[str, Any] | None) -> bool:
    """Whether the setting `labels` of `load_data` names the field that holds the label."""
    return bool(labels) and any(isinstance(rule, Mapping | Sequence) for rule in labels.values())


def relabelled(record: Record, labels: Mapping[str, Any]) -> Record | None:
    """The record with the label that the setting `labels` of `load_data` gives it, or None where it gives none: the
    field holds another name, or no number.

    Raises:
      InputError: `labels` names several fields, or bounds that are no ascending numbers.
    """
    (field, rule), *more = labels.items() if of_field(labels) else [("label", labels)]
    if more or isinstance(rule, str):
        raise InputError(
            f"labels is {dict(labels)}, expected numbers by name, or these or a list of bounds for one field"
        )
    value = record.get(field)
    if isinstance(rule, Mapping):
        label = rule.get(str(value))
    else:
        if not rule or not all(isinstance(x, int | float) for x in rule) or sorted(rule) != list(rule):
            raise InputError(f"labels has {list(rule)} for {field!r}, expected ascending bounds, such as [0.5]")
        label = sum(value >= bound for bound in rule) if isinstance(value, int | float) else None
    return None if label is None else {**record, "label": label}
