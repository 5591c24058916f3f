"""What an experiment starts from, each a stage: language models, data, and judges with their held-out texts.

The sections of a configuration that are read here are described in `experiments.experiment`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ctg_jax.learn.classifier import classifier
from ctg_jax.learn.pretrain import pretrain
from ctg_jax.run.session import Session
from ctg_jax.run.stage import Artifact, stage
from ctg_jax.stages import judges, sources
from ctg_jax.types import InputError
from experiments.arms import Arm


def language_model(root: str, settings: dict[str, Any]) -> Artifact:
    """The LM artifact: imported from `source` where that is given, else pretrained from random weights."""
    dtype = {"dtype": settings.get("dtype") or sources.default_dtype()}
    if settings.get("source"):
        return stage(root, sources.load_lm, {"source": settings["source"], **dtype})
    if "pretrain" not in settings:
        raise InputError("the section lm has neither source nor pretrain: give lm.source a directory or a hub id")
    return stage(
        root, pretrain, {**settings["pretrain"], **dtype}, data=stage(root, sources.load_data, settings["data"])
    )


def judge(root: str, name: str, settings: dict[str, Any]) -> Artifact:
    """A scorer, fitted on its own data."""
    settings = dict(settings)
    given = {key: settings.pop(key, None) for key in ("data", "heldout")}
    if several(given["heldout"]):
        del given["heldout"]
    found = {key: stage(root, sources.load_data, value) for key, value in given.items() if value}
    train = settings.pop("train", None)
    if train is not None:
        if settings.pop("encoder", None):
            raise InputError(f"judge {name!r} has both encoder and train: the classifier is trained from train.encoder")
        found["encoder"] = trained(root, train)
    return stage(root, judges.fit_judge, {"name": name, **settings}, **found)


def trained(root: str, settings: Mapping[str, Any]) -> Artifact:
    """The classifier of a judge that is trained."""
    settings = dict(settings)
    data = settings.pop("data", None) or {}
    sets = [data[key] for key in sorted(data)] if several(data) else [data] * bool(data)
    return stage(root, classifier, settings, data=[stage(root, sources.load_data, one) for one in sets])


def several(settings: Mapping[str, Any] | None) -> bool:
    """Whether a section is name -> settings of `load_data`, for several sets of texts, and not the settings of one."""
    return bool(settings) and "source" not in settings


def heldout(root: str, name: str, settings: Mapping[str, Any]) -> dict[str, Artifact]:
    """How right a judge is on each of its sets of held-out texts, by their names; empty where it has not several."""
    sets = settings.get("heldout")
    if not several(sets):
        return {}
    scorer = judge(root, name, dict(settings))
    found = {key: stage(root, sources.load_data, value) for key, value in sorted(sets.items())}
    return {key: stage(root, judges.heldout, {"name": key}, judge=scorer, data=data) for key, data in found.items()}


def scorers(settings: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, settings) of the judges of a configuration, and of the rewards that its arms learn from or choose by."""
    yield from settings["judges"].items()
    seen = []
    for arm in settings["methods"].values():
        for name, options in (arm.get("rewards") or {}).items():
            if (name, options) not in seen:
                seen.append((name, options))
                yield name, options


def rewards(root: str, arm: Arm) -> list[Artifact]:
    """The scorers that an arm learns from or chooses by."""
    return [judge(root, name, options) for name, options in getattr(arm, "rewards", {}).items()]


def levels(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of `load_data` of the section `calibrate`, or None."""
    return (settings.get("calibrate") or {}).get("data")


def texts(settings: Mapping[str, Any], arms: Mapping[str, Arm]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where they are in the configuration, settings of `load_data`) of the prompts, the texts that figures compare
    with or calibrate on, and the texts that methods are fitted on, in this order."""
    measure = settings["evaluate"]
    yield "prompts", settings["prompts"]
    for where, found in (
        ("evaluate.references", measure.get("references")),
        ("evaluate.human", measure.get("human")),
        ("calibrate.data", levels(settings)),
        *((f"methods.{label}.data", getattr(arm, "data", None)) for label, arm in arms.items()),
    ):
        if found:
            yield where, found


def check_data(root: str, settings: Mapping[str, Any], arms: Mapping[str, Arm]) -> None:
    """Reads all data of an experiment before anything else runs, so that what is wrong with them is told at once.

    Raises:
      InputError: what `load_data` raises; labels that are texts, where a method reads numbers.
    """
    for where, found in texts(settings, arms):
        data = stage(root, sources.load_data, found)
        if where.startswith("methods."):
            check_labels(data, where, f"--config.{where}.")
    for _, options in scorers(settings):
        for found in (options.get("data"), options.get("heldout"), (options.get("train") or {}).get("data")):
            for one in found.values() if several(found) else [found] * bool(found):
                stage(root, sources.load_data, one)


def check_labels(data: Artifact, where: str, flag: str) -> None:
    """InputError where labels are texts, since methods read numbers.

    where, flag: what holds the data, and the beginning of the setting that names the labels, for the message.
    """
    named = {row["label"] for row in data.rows("data.jsonl") if isinstance(row.get("label"), str)}
    if named:
        known = ", ".join(f"{name!r}: {i}" for i, name in enumerate(sorted(named)[:4]))
        raise InputError(
            f'{where} has labels that are texts, and methods read numbers: give {flag}labels="{{{known}}}", with 1 '
            "for the texts with the attribute"
        )


def ids(root: str, settings: Mapping[str, Any], arms: Mapping[str, Arm]) -> list[str]:
    """Ids of the language models, data, judges and rewards that a configuration starts from. No stage runs."""
    root, fluency = Session.of(root).dry_run(), settings["evaluate"].get("fluency")
    found = [language_model(root, section) for section in (settings["lm"], fluency) if section]
    found += [judge(root, name, options) for name, options in settings["judges"].items()]
    for arm in arms.values():
        found += rewards(root, arm)
    found += [stage(root, sources.load_data, section) for _, section in texts(settings, arms)]
    return [artifact.id for artifact in found]
