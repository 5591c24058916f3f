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
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ctg_jax.learn import rounds
from ctg_jax.run.session import Session
from ctg_jax.run.stage import Artifact, UnfinishedError, nearest, stage
from ctg_jax.stages import judges, sampling, sources
from ctg_jax.types import InputError
from experiments.arms import Arm, Fitted, read
from experiments.inputs import check_data, heldout, judge, language_model, levels, scorers
from experiments.samples import calibrated, control_of, sampled

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

    A dry run comes first, so that a setting which a stage refuses is named before any stage has run. An arm has no row
    for a `kl` that its control does not reach, see `unreached`.

    Raises:
      InputError: an unknown section or setting (with the nearest name), no row at all, and what the stages raise.
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
    if not rows:
        raise InputError("; ".join(unreached(root, config)) or "the section methods has no arm: give at least one")
    return rows


def unreached(root: str, config: ConfigDict) -> list[str]:
    """A sentence for each `kl` of a finished experiment that the control of an arm does not reach."""
    settings = config.to_dict()
    arms, trial = check(settings), Session.of(root).dry_run()
    lm, found = language_model(trial, settings["lm"]), []
    for label, arm in arms.items():
        if getattr(arm, "kl", None):
            tried = calibrated(trial, lm, settings["calibrate"], arm, arms)
            found += [f"{label}: {one.spec['unreached']}" for one in tried if one.spec["strength"] is None]
    return found


def _rehearse(trial: Session, settings: Mapping[str, Any], arms: Mapping[str, Arm]) -> None:
    """Asks for every stage in a dry run, as far as an arm gets without the contents of a stage that has not run."""
    fixed = _fixed(trial, settings)

    # An arm comes before those that name it, so that a message about it bears its own label.
    def names_others(item):
        return any(getattr(item[1], field, None) for field in ("chain", "critic"))

    for label, arm in sorted(arms.items(), key=names_others):
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
        if getattr(arm, "kl", None) and not levels(settings):
            raise InputError(
                f"methods.{label} has kl, but there are no texts to find its strength on: give calibrate.data"
            )
    return arms
