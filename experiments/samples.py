"""The samples of an arm at each of its strengths, and the control that they are drawn under."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ctg_jax import methods
from ctg_jax.learn import experience
from ctg_jax.learn.consensus import chosen
from ctg_jax.learn.revision import corrected
from ctg_jax.learn.search import searched
from ctg_jax.run.stage import Artifact, stage
from ctg_jax.stages import controls, sampling, sources
from ctg_jax.stages.strengths import calibrate
from ctg_jax.studies.label_transfer import direction
from experiments.arms import Arm, BestOf, Consensus, Corrected, Direction, Made, MethodArm, Searched, Together
from experiments.inputs import rewards

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
    parts, values = parts_of(root, lm, arm, arms)
    if isinstance(arm, Consensus):
        for n in arm.consensus:
            settings = {**common, **arm.sampling, "strengths": values, "n": n * common.get("n", 1)}
            samples = stage(root, sampling.sample, settings, lm=lm, prompts=prompts, controls=parts)
            yield float(n), stage(root, chosen, {"n": n, "similarity": arm.similarity}, samples=samples), parts, values
        return
    at = getattr(arm, "strengths", None) or (None,)
    if getattr(arm, "kl", None):
        found = [artifact.spec["strength"] for artifact in calibrated(root, lm, levels, arm, arms)]
        at = [strength for strength in found if strength is not None]
    for strength in at:
        strengths = [strength if value is None else value * (1.0 if strength is None else strength) for value in values]
        settings = {**common, **arm.sampling, "strengths": strengths}
        if isinstance(arm, Searched):
            chooses = [control_of(root, lm, arms[arm.critic])] if arm.critic else rewards(root, arm)
            yield strength, found_by_search(root, lm, prompts, settings, arm, parts, chooses), parts, strengths
            continue
        samples = stage(root, sampling.sample, settings, lm=lm, prompts=prompts, controls=parts)
        yield strength, samples, parts, strengths


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


def parts_of(root: str, lm: Artifact, arm: Arm, arms: Mapping[str, Arm]) -> tuple[list[Artifact], list[float | None]]:
    """(the controls of an arm, their strengths in its chain, None outside a chain)."""
    if isinstance(arm, (Together, Searched, Consensus)):
        chain = sorted(arm.chain.items())
        return [control_of(root, lm, arms[label]) for label, _ in chain], [float(value) for _, value in chain]
    return ([control_of(root, lm, arm)], [None]) if isinstance(arm, MethodArm) else ([], [])


def calibrated(
    root: str, lm: Artifact, levels: Mapping[str, Any], arm: Arm, arms: Mapping[str, Arm]
) -> Iterator[Artifact]:
    """What `stages.strengths.calibrate` found for each `kl` of an arm, on the texts of the section `calibrate`."""
    parts, values = parts_of(root, lm, arm, arms)
    settings = dict(levels)
    data = stage(root, sources.load_data, settings.pop("data"))
    for kl in arm.kl:
        given = settings | {"kl": kl, "strengths": values}
        found = stage(root, calibrate, given, lm=lm, data=data, controls=parts)
        found.check_finished()
        yield found


def found_by_search(
    root: str, lm: Artifact, prompts: Artifact, settings: Mapping[str, Any], arm: Searched, parts: list[Artifact],
    chooses: list[Artifact],
) -> Artifact:  # fmt: skip
    """The samples of a search, with the settings of `sample` but for those that it does not have."""
    settings = {key: value for key, value in settings.items() if key not in ("greedy", "truncate_first")}
    inputs = {"rewards": chooses, "controls": parts}
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
