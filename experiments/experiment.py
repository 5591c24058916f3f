"""A configuration as stages: load → fit → sample → evaluate, for one method or many on the same prompts.

lm        {"source": DIRECTORY or hub id} or {"pretrain": settings, "data": settings of `load_data`}
prompts   settings of `load_data`
sample    settings of `sample`; its `filter` holds for every method that has none of its own
judges    name -> settings of `fit_judge`, with `data` and `heldout` as settings of `load_data`
evaluate  settings of `evaluate`, with `references` as settings of `load_data` and `fluency` as a section like lm; with
          `human`, settings of `load_data` for texts cut to `words`, also their perplexity under each method
methods   label -> {"method": name, "fit": its settings, "data": settings of `load_data`, "strengths": (…),
          "filter": settings of `truncate`, "filter_first": bool, "rewards": name -> settings of `fit_judge`,
          "best_of": (n, …)}, all but `method` optional; methods learn from `rewards` on the prompts in `data`;
          with `best_of`, each sample is the best of n by the first of the rewards, n taking the place of strengths;
          with "direction", settings of `latents.direction`, latent vectors become one control, from label 0 to 1;
          or {"chain": other label -> its strength, "strengths": (…), …}: those controls together, each at its own
          strength times that of the chain
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from ctg_jax import experience, flow, judging, latents, methods, sources
from ctg_jax.stage import Artifact, nearest, stage
from ctg_jax.types import InputError

_KEYS = ("title", "lm", "prompts", "sample", "judges", "evaluate", "methods")
_METHOD_KEYS = (
    "method",
    "fit",
    "data",
    "strengths",
    "filter",
    "filter_first",
    "rewards",
    "best_of",
    "direction",
    "chain",
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the table: a method at a strength, its samples and its figures; and, where the method has several
    strengths, how smoothly it is controlled over all of them."""

    label: str
    method: str
    strength: float | None
    samples: Artifact
    figures: Artifact
    smooth: Artifact | None = None
    seed: int = 0  # of the samples
    rounds: Artifact | None = None  # what a method that learns from its own samples sampled, round by round
    human: Artifact | None = None  # the perplexity of human text under it


def run(root: str, config: ConfigDict) -> list[Cell]:
    """All stages of a configuration; finished ones are not run again.

    Raises:
      InputError: an unknown section or setting (with the nearest name), and what the stages raise.
    """
    settings = config.to_dict()
    check(settings)
    lm = language_model(root, settings["lm"])
    prompts = stage(root, sources.load_data, settings["prompts"])
    judges = [judge(root, name, options) for name, options in settings["judges"].items()]
    measure = dict(settings["evaluate"])
    human = measure.pop("references", None)
    human = stage(root, sources.load_data, human) if human else None
    written = measure.pop("human", None)
    written = stage(root, sources.load_data, written) if written else None
    other = measure.pop("fluency", None)
    given = dict(judges=judges, lm=lm, references=human, fluency=language_model(root, other) if other else None)
    seed = settings["sample"].get("seed", 0)
    cells = []
    # ConfigDict sorts by name; what learns nothing is shown first, as the line to compare with.
    arms = sorted(settings["methods"].items(), key=lambda item: (_name(item[1]) != "truncate", item[0]))
    for label, arm in arms:
        mine = []
        for strength, samples, chain in sampled(root, lm, prompts, settings["sample"], arm, settings["methods"]):
            unscored = "best_of" in arm or ("method" in arm and methods.writes(arm["method"]))
            own = {"kl": False} if unscored else {}  # its samples are of no distribution that can be scored
            figures = stage(root, judging.evaluate, {**measure, **own}, samples=samples, **given)
            read = None
            if written is not None and not unscored:
                options = {key: measure[key] for key in ("seed", "resamples") if key in measure}
                read = stage(
                    root, flow.human, options | {"strengths": chain[1]}, lm=lm, data=written, controls=chain[0]
                )
            mine.append(Cell(label, _name(arm), strength, samples, figures, seed=seed, human=read))
        smooth = smoothness(root, mine, measure)
        rounds = sampled_rounds(root, lm, arm, measure)
        cells += [dataclasses.replace(cell, smooth=smooth, rounds=rounds) for cell in mine]
    return cells


def sampled_rounds(root: str, lm: Artifact, arm: dict[str, Any], measure: dict[str, Any]) -> Artifact | None:
    """The rounds of a method that learned from rewards; None for others."""
    if "rewards" not in arm or "best_of" in arm or not (pools := experience.history(fitted(root, lm, arm))):
        return None
    options = {key: measure[key] for key in ("seed", "resamples") if key in measure}
    return stage(root, experience.rounds, options, pools=pools)


def smoothness(root: str, cells: list[Cell], measure: dict[str, Any]) -> Artifact | None:
    """How smoothly one method is controlled over its strengths; None where it has fewer than two."""
    swept = [cell for cell in cells if cell.strength is not None]
    if len(swept) < 2:
        return None
    options = {key: measure[key] for key in ("seed", "resamples") if key in measure}
    settings = {"strengths": [cell.strength for cell in swept], **options}
    return stage(root, judging.smooth, settings, figures=[cell.figures for cell in swept])


def check(settings: dict[str, Any]) -> None:
    """Refuses unknown sections and unknown settings of methods before anything runs."""
    for key in settings:
        if key not in _KEYS:
            raise InputError(f"the configuration has an unknown section {key!r}{nearest(key, _KEYS)}")
    for key in _KEYS[1:]:
        if key not in settings:
            raise InputError(f"the configuration lacks the section {key!r}")
    for label, arm in settings["methods"].items():
        for key in arm:
            if key not in _METHOD_KEYS:
                raise InputError(f"methods.{label} has no setting {key!r}{nearest(key, _METHOD_KEYS)}")
        for other in arm.get("chain", ()):
            if other not in settings["methods"] or "chain" in settings["methods"][other]:
                known = [name for name, arm in settings["methods"].items() if "chain" not in arm]
                raise InputError(f"methods.{label}.chain names {other!r}, which is no method{nearest(other, known)}")
        if "chain" not in arm:
            fit = inspect.signature(getattr(methods.get(arm["method"]), "fit", lambda **any: None)).parameters
            for key in arm.get("fit", ()):
                if key not in fit and not any(p.kind is p.VAR_KEYWORD for p in fit.values()):
                    raise InputError(f"methods.{label}.fit has no setting {key!r}{nearest(key, fit)}")


def language_model(root: str, settings: dict[str, Any]) -> Artifact:
    """The LM artifact: imported from `source` where that is given, else pretrained from random weights."""
    dtype = {"dtype": settings["dtype"]} if "dtype" in settings else {}
    if settings.get("source"):
        return stage(root, sources.load_lm, {"source": settings["source"], **dtype})
    if "pretrain" not in settings:
        raise InputError("the section lm has neither source nor pretrain: give lm.source a directory or a hub id")
    return stage(
        root, sources.pretrain, {**settings["pretrain"], **dtype}, data=stage(root, sources.load_data, settings["data"])
    )


def judge(root: str, name: str, settings: dict[str, Any]) -> Artifact:
    """A scorer, fitted on its own data."""
    settings = dict(settings)
    given = {key: settings.pop(key, None) for key in ("data", "heldout")}
    inputs = {key: stage(root, sources.load_data, value) for key, value in given.items() if value}
    return stage(root, judging.fit_judge, {"name": name, **settings}, **inputs)


def fitted(root: str, lm: Artifact, arm: dict[str, Any]) -> Artifact | None:
    """The control artifact of one method; None for one that learns nothing."""
    module = methods.get(arm["method"])
    if not hasattr(module, "fit"):
        return None
    data = stage(root, sources.load_data, arm["data"])
    more = {"rewards": rewards(root, arm)} if "rewards" in arm else {}
    control = module.fit(root, lm=lm, data=data, **more, **arm.get("fit", {}))
    if "direction" in arm:
        control = stage(root, latents.direction, arm["direction"], lm=lm, train=data, vectors=control)
    return control


def _name(arm: dict[str, Any]) -> str:
    return "chain" if "chain" in arm else arm["method"]


def rewards(root: str, arm: dict[str, Any]) -> list[Artifact]:
    """The scorers that a method learns from."""
    return [judge(root, name, options) for name, options in arm["rewards"].items()]


def sampled(
    root: str,
    lm: Artifact,
    prompts: Artifact,
    common: dict[str, Any],
    arm: dict[str, Any],
    others: dict[str, dict[str, Any]],
) -> Iterator[tuple[float | None, Artifact, tuple[list[Artifact], list[float | None]]]]:
    """(strength, samples, (controls, their strengths)) of one method at each of its strengths; `others` are the methods
    a chain may name."""
    if "best_of" in arm:
        yield from best_of(root, lm, prompts, common, arm)
        return
    if "chain" in arm:
        found = [(fitted(root, lm, others[label]), float(value)) for label, value in sorted(arm["chain"].items())]
    else:
        found = [(fitted(root, lm, arm), None)]
    found = [(control, value) for control, value in found if control is not None]
    controls = [control for control, _ in found]
    own = {key: arm[key] for key in ("filter", "filter_first") if key in arm}
    for strength in arm.get("strengths", (None,)):
        strengths = [
            strength if value is None else value * (1.0 if strength is None else strength) for _, value in found
        ]
        settings = {**common, **own, "strengths": strengths}
        samples = stage(root, flow.sample, settings, lm=lm, prompts=prompts, controls=controls)
        yield strength, samples, (controls, strengths)


def best_of(
    root: str, lm: Artifact, prompts: Artifact, common: dict[str, Any], arm: dict[str, Any]
) -> Iterator[tuple[float, Artifact, tuple[list, list]]]:
    """(n, samples, no controls), each sample the best of n of the frozen model; larger n draw more of the same ones."""
    own = {key: arm[key] for key in ("filter",) if key in arm}
    for n in arm["best_of"]:
        settings = {**common, **own, "n": n * common.get("n", 1)}
        samples = stage(root, flow.sample, settings, lm=lm, prompts=prompts)
        scored = stage(root, experience.score, {}, samples=samples, rewards=rewards(root, arm), lm=lm)
        yield float(n), stage(root, experience.best, {"n": n}, scored=scored), ([], [])
