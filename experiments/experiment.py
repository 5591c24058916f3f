"""A configuration as stages: load → fit → sample → evaluate, for one or several methods on the same prompts.

lm        {"source": DIRECTORY or hub id} or {"pretrain": settings, "data": settings of `load_data`}; with "dtype", or
          without it (or None) float32 on a CPU and bfloat16 on an accelerator
prompts   settings of `load_data`
sample    settings of `sample`; its `filter` is that of every arm without one of its own
judges    name -> settings of `fit_judge`, with `data` and `heldout` as settings of `load_data`; `heldout` may also be
          name -> settings of `load_data`, for several sets. `train` in place of `encoder` trains a classifier; it holds
          settings of the stage `classifier`, with `data` as one or, by names, several settings of `load_data`
evaluate  settings of `evaluate`, with `references` as settings of `load_data` and `fluency` as a section like lm; with
          `human`, settings of `load_data` for texts cut to `words`, also their perplexity under each method. Figures
          that need a likelihood (`kl`, `human`) are left out for arms without one
methods   label -> settings of an arm, see `experiments.arms`
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from ctg_jax import methods
from ctg_jax.learn import experience, rounds
from ctg_jax.learn.classifier import classifier
from ctg_jax.learn.pretrain import pretrain
from ctg_jax.learn.revision import corrected
from ctg_jax.learn.search import searched
from ctg_jax.run.session import Session
from ctg_jax.run.stage import Artifact, UnfinishedError, nearest, stage
from ctg_jax.stages import controls, judges, sampling, sources
from ctg_jax.stages.strengths import calibrate
from ctg_jax.studies.label_transfer import direction
from ctg_jax.types import InputError
from experiments.arms import Arm, BestOf, Corrected, Direction, Fitted, Made, MethodArm, Searched, Together, read

log = logging.getLogger("ctg_jax.experiment")
_KEYS = ("title", "calibrate", "lm", "prompts", "sample", "judges", "evaluate", "methods")
_OPTIONAL = 2  # the first of them


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table: an arm at one strength.

    Attributes:
      label, arm, strength: the arm, and one of its strengths; None where it has none.
      samples, figures: what `sample` and `evaluate` left.
      controls: its controls.
      smooth: how smoothly the arm is controlled over its strengths, where it has several.
      seed: of the samples.
      rounds: the figures of each round, for a method that learns from its own samples.
      human: the perplexity of human text under it.
    """

    label: str
    arm: Arm
    strength: float | None
    samples: Artifact
    figures: Artifact
    controls: tuple[Artifact, ...] = ()
    smooth: Artifact | None = None
    seed: int = 0
    rounds: Artifact | None = None
    human: Artifact | None = None


def run(root: str, config: ConfigDict) -> list[Result]:
    """Runs all stages of a configuration, except those that are finished, and returns the rows of the table.

    A dry run comes first, so that a setting which a stage refuses is named before any stage has run.

    Raises:
      InputError: an unknown section or setting (with the nearest name), and what the stages raise.
    """
    settings = config.to_dict()
    arms, session = check(settings), Session.of(root)
    if session.pending is None:
        _rehearse(session.dry_run(), settings, arms)
        check_data(root, settings, arms)
    fixed = _fixed(root, settings)
    rows = []
    for number, (label, arm) in enumerate(arms.items(), 1):
        if session.pending is None:
            log.info("arm %d of %d: %s%s", number, len(arms), label, _strengths(arm))
        rows += _rows(root, settings, fixed, label, arm, arms)
    return rows


def _rehearse(trial: Session, settings: Mapping[str, Any], arms: Mapping[str, Arm]) -> None:
    """Asks for every stage in a dry run, as far as an arm gets without the contents of a stage that has not run."""
    fixed = _fixed(trial, settings)
    for label, arm in arms.items():
        try:
            _rows(trial, settings, fixed, label, arm, arms)
        except UnfinishedError:
            continue
        except InputError as e:
            raise InputError(f"methods.{label}: {e}") from None


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """What all arms share: the artifacts that `sample` and `evaluate` are given, and settings of `evaluate`."""

    lm: Artifact
    prompts: Artifact
    given: Mapping[str, Any]
    measure: Mapping[str, Any]
    written: Artifact | None


def _fixed(root: str, settings: Mapping[str, Any]) -> _Fixed:
    lm = language_model(root, settings["lm"])
    prompts = stage(root, sources.load_data, settings["prompts"])
    judged = [judge(root, name, options) for name, options in settings["judges"].items()]
    measure = dict(settings["evaluate"])
    human = measure.pop("references", None)
    human = stage(root, sources.load_data, human) if human else None
    written = measure.pop("human", None)
    written = stage(root, sources.load_data, written) if written else None
    other = measure.pop("fluency", None)
    fluency = language_model(root, other) if other else None
    for name, options in scorers(settings):
        heldout(root, name, options)
    return _Fixed(lm, prompts, dict(judges=judged, lm=lm, references=human, fluency=fluency), measure, written)


def _rows(
    root: str, settings: Mapping[str, Any], fixed: _Fixed, label: str, arm: Arm, arms: Mapping[str, Arm]
) -> list[Result]:
    """The rows of one arm."""
    mine, likely, measure = [], _likelihood(arm, arms), fixed.measure
    seed = settings["sample"].get("seed", 0)
    common, levels = settings["sample"], settings.get("calibrate")
    for strength, samples, made, strengths in sampled(root, fixed.lm, fixed.prompts, common, arm, arms, levels):
        options = measure if likely else {key: value for key, value in measure.items() if key != "kl"}
        figures = stage(root, judges.evaluate, options, samples=samples, **fixed.given)
        read = None
        if fixed.written is not None and likely:
            options = {"strengths": strengths, **_bootstrap(measure)}
            read = stage(root, sampling.human_perplexity, options, lm=fixed.lm, data=fixed.written, controls=made)
        mine.append(Result(label, arm, strength, samples, figures, tuple(made), seed=seed, human=read))
    smooth = smoothness(root, mine, measure)
    rounds = sampled_rounds(root, fixed.lm, arm, measure)
    return [dataclasses.replace(result, smooth=smooth, rounds=rounds) for result in mine]


def check_data(root: str, settings: dict[str, Any], arms: Mapping[str, Arm]) -> None:
    """Reads all data of an experiment before anything else runs, so that what is wrong with them is told at once.

    Raises:
      InputError: what `load_data` raises; labels that are texts, where a method reads numbers.
    """
    stage(root, sources.load_data, settings["prompts"])
    for section in (settings["evaluate"].get("references"), settings["evaluate"].get("human"), _levels(settings)):
        if section:
            stage(root, sources.load_data, section)
    for _, options in scorers(settings):
        for key in ("data", "heldout"):
            found = options.get(key) or {}
            for one in found.values() if several(found) else [found] * bool(found):
                stage(root, sources.load_data, one)
    for label, arm in arms.items():
        if not getattr(arm, "data", None):
            continue
        data = stage(root, sources.load_data, arm.data)
        check_labels(data, f"methods.{label}.data", f"--config.methods.{label}.data.")


def check_labels(data: Artifact, where: str, flag: str) -> None:
    """InputError where labels are texts, since methods read numbers.

    where, flag: what holds the data, and the beginning of the setting that names the labels, for the message.
    """
    texts = {row["label"] for row in data.rows("data.jsonl") if isinstance(row.get("label"), str)}
    if texts:
        known = ", ".join(f"{name!r}: {i}" for i, name in enumerate(sorted(texts)[:4]))
        raise InputError(
            f'{where} has labels that are texts, and methods read numbers: give {flag}labels="{{{known}}}", with 1 '
            "for the texts with the attribute"
        )


def inputs(root: str, config: ConfigDict) -> list[str]:
    """Ids of the language models, data, judges and rewards that a configuration starts from. No stage runs."""
    settings = config.to_dict()
    measure = settings["evaluate"]
    sections = [settings["prompts"], measure.get("references"), measure.get("human"), _levels(settings)]
    root = Session.of(root).dry_run()
    found = [language_model(root, settings["lm"])]
    found += [language_model(root, measure["fluency"])] if measure.get("fluency") else []
    found += [judge(root, name, options) for name, options in settings["judges"].items()]
    for arm in check(settings).values():
        sections.append(getattr(arm, "data", None))
        found += rewards(root, arm)
    return [a.id for a in found] + [stage(root, sources.load_data, s).id for s in sections if s]


def sampled_rounds(root: str, lm: Artifact, arm: Arm, measure: dict[str, Any]) -> Artifact | None:
    """The rounds of a method that learned from rewards; None for others."""
    if not isinstance(arm, Fitted) or not arm.rewards or not (pools := rounds.history(control_of(root, lm, arm))):
        return None
    return stage(root, rounds.summary, _bootstrap(measure), pools=pools)


def smoothness(root: str, results: list[Result], measure: dict[str, Any]) -> Artifact | None:
    """How smoothly one method is controlled over its strengths; None where it has fewer than two."""
    swept = [result for result in results if result.strength is not None]
    if len(swept) < 2:
        return None
    settings = {"strengths": [result.strength for result in swept], **_bootstrap(measure)}
    return stage(root, judges.smooth, settings, figures=[result.figures for result in swept])


def _strengths(arm: Arm) -> str:
    """The strengths of an arm, for the lines that tell what runs."""
    found = getattr(arm, "strengths", None)
    return f" at strength {', '.join(f'{s:g}' for s in found)}" if found else ""


def _bootstrap(measure: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `evaluate` that other figures with intervals share."""
    return {key: measure[key] for key in ("seed", "resamples") if key in measure}


def _likelihood(arm: Arm, arms: Mapping[str, Arm]) -> bool:
    """Whether the samples of an arm have a log-probability; in a chain, whether those of all its parts have one."""
    return arm.likelihood and all(arms[label].likelihood for label in getattr(arm, "chain", ()))


def check(settings: dict[str, Any]) -> dict[str, Arm]:
    """The arms; refuses unknown sections and unknown settings of arms before anything runs."""
    for key in settings:
        if key not in _KEYS:
            raise InputError(f"the configuration has an unknown section {key!r}{nearest(key, _KEYS)}")
    for key in _KEYS[_OPTIONAL:]:
        if key not in settings:
            raise InputError(f"the configuration lacks the section {key!r}")
    arms = read(settings["methods"])
    for label, arm in arms.items():
        if getattr(arm, "kl", None) and not _levels(settings):
            raise InputError(
                f"methods.{label} has kl, but there are no texts to find its strength on: give calibrate.data"
            )
    return arms


def _levels(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of `load_data` of the section `calibrate`, or None."""
    return (settings.get("calibrate") or {}).get("data")


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
    inputs = {key: stage(root, sources.load_data, value) for key, value in given.items() if value}
    train = settings.pop("train", None)
    if train is not None:
        if settings.pop("encoder", None):
            raise InputError(f"judge {name!r} has both encoder and train: the classifier is trained from train.encoder")
        inputs["encoder"] = trained(root, train)
    return stage(root, judges.fit_judge, {"name": name, **settings}, **inputs)


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


def control_of(root: str, lm: Artifact, arm: MethodArm) -> Artifact:
    """The control artifact of one method."""
    if isinstance(arm, Made):
        return stage(root, controls.made, {"method": arm.method, "init": arm.init}, lm=lm)
    data = stage(root, sources.load_data, arm.data)
    more = {"rewards": rewards(root, arm)} if arm.rewards else {}
    control = methods.get(arm.method).fit(root, lm=lm, data=data, **more, **arm.fit)
    if isinstance(arm, Direction):
        control = stage(root, direction, arm.direction, lm=lm, train=data, vectors=control)
    return control


def rewards(root: str, arm: Arm) -> list[Artifact]:
    """The scorers that an arm learns from or chooses by."""
    return [judge(root, name, options) for name, options in getattr(arm, "rewards", {}).items()]


Sampled = tuple[float | None, Artifact, list[Artifact], list[float | None]]


def sampled(
    root: str,
    lm: Artifact,
    prompts: Artifact,
    common: dict[str, Any],
    arm: Arm,
    arms: Mapping[str, Arm],
    levels: Mapping[str, Any] | None = None,
) -> Iterator[Sampled]:
    """(strength, samples, controls, their strengths) of one arm at each of its strengths; `arms` are those that a chain
    may name, and `levels` is the section `calibrate`."""
    if isinstance(arm, BestOf):
        yield from best_of(root, lm, prompts, common, arm)
        return
    if isinstance(arm, Corrected):
        yield from revised(root, lm, prompts, common, arm)
        return
    if isinstance(arm, (Together, Searched)):
        found = [(control_of(root, lm, arms[label]), float(value)) for label, value in sorted(arm.chain.items())]
    else:
        found = [(control_of(root, lm, arm), None)] if isinstance(arm, MethodArm) else []
    parts = [control for control, _ in found]
    values = [value for _, value in found]
    at = getattr(arm, "strengths", None) or (None,)
    if getattr(arm, "kl", None):
        at = [strength_at(root, lm, levels, parts, values, kl) for kl in arm.kl]
    for strength in at:
        strengths = [
            strength if value is None else value * (1.0 if strength is None else strength) for _, value in found
        ]
        settings = {**common, **arm.sampling, "strengths": strengths}
        if isinstance(arm, Searched):
            yield strength, found_by_search(root, lm, prompts, settings, arm, parts), parts, strengths
            continue
        samples = stage(root, sampling.sample, settings, lm=lm, prompts=prompts, controls=parts)
        yield strength, samples, parts, strengths


def strength_at(
    root: str, lm: Artifact, levels: Mapping[str, Any], parts: list[Artifact], values: list[float | None], kl: float
) -> float:
    """The strength of an arm at which its KL to the base is `kl` nats per token, on the texts of the section
    `calibrate`."""
    settings = dict(levels)
    data = stage(root, sources.load_data, settings.pop("data"))
    settings |= {"kl": kl, "strengths": values}
    found = stage(root, calibrate, settings, lm=lm, data=data, controls=parts)
    found.check_finished()
    return found.spec["strength"]


def found_by_search(
    root: str, lm: Artifact, prompts: Artifact, settings: Mapping[str, Any], arm: Searched, parts: list[Artifact]
) -> Artifact:
    """The samples of a search, with the settings of `sample` but for those that it does not have."""
    settings = {key: value for key, value in settings.items() if key not in ("greedy", "truncate_first")}
    inputs = {"rewards": rewards(root, arm), "controls": parts}
    return stage(root, searched, settings | {"plan": dict(arm.search)}, lm=lm, prompts=prompts, **inputs)


def revised(root: str, lm: Artifact, prompts: Artifact, common: dict[str, Any], arm: Corrected) -> Iterator[Sampled]:
    """(strength, samples, the corrector, its strength): samples of the frozen model after an arm's revisions."""
    control, settings = control_of(root, lm, arm), {**common, **arm.sampling}
    drawn = settings | {"n": settings.get("n", 1) * arm.correct.get("drafts", 1)}
    samples = stage(root, sampling.sample, drawn, lm=lm, prompts=prompts)
    template = dict(arm.fit.get("pairs") or {}).get("template")
    options = {key: value for key, value in settings.items() if key != "n"} | dict(arm.correct)
    options |= {"template": template} if template else {}
    for strength in arm.strengths or (None,):
        given = dict(lm=lm, corrector=control, samples=samples, strength=strength)
        yield strength, corrected(root, **given, **options), [control], [strength]


def best_of(root: str, lm: Artifact, prompts: Artifact, common: dict[str, Any], arm: BestOf) -> Iterator[Sampled]:
    """(n, samples, no controls, no strengths), each sample the best of n of the frozen model. A larger n extends the
    samples of a smaller one."""
    for n in arm.best_of:
        settings = {**common, **arm.sampling, "n": n * common.get("n", 1)}
        samples = stage(root, sampling.sample, settings, lm=lm, prompts=prompts)
        scored = stage(root, experience.score, {}, samples=samples, rewards=rewards(root, arm), lm=lm)
        yield float(n), stage(root, experience.best, {"n": n}, scored=scored), [], []
