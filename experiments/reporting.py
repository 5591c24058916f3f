"""The results of an experiment as the rows of a report."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import ctg_jax
from ctg_jax import report
from ctg_jax.door.model import BREAKS
from ctg_jax.evaluation import Figure
from ctg_jax.mesh import processes
from ctg_jax.run.session import Session
from ctg_jax.run.stage import Artifact
from ctg_jax.stages.judges import how_right
from experiments import cli, inputs, roots
from experiments.experiment import Result, check, unreached

log = logging.getLogger("ctg_jax.report")


def write(root: str, spec: str, config: ConfigDict, results: Sequence[Result]) -> Path:
    """Writes the report of one experiment, shows its table and returns the path of report.html."""
    folder = folder_of(root, spec, config.to_dict(), [result.figures.id for result in results])
    rows = [_row(c) for c in results]
    missed = unreached(root, config)
    if processes.first():
        log.info("%s", report.terminal(rows))
        for sentence in filter(None, [broken(results), *missed]):
            log.warning("%s", sentence)
    turns = [row for c in results for row in _rounds(c)]
    return _write(folder, root, spec, config, rows, [_smooth(c) for c in results], turns, results, not_reached(missed))


def not_reached(sentences: Sequence[str]) -> dict[str, str]:
    """What a report says of the strengths that were not found, from the sentences of `experiment.unreached`."""
    return {"kl that is not reached": "; ".join(dict.fromkeys(sentences))} if sentences else {}


def broken(results: Sequence[Result]) -> str:
    """A sentence about the arms whose strength breaks the text: with more than `BREAKS` times the highest perplexity of
    the arms without control. Empty where there is none, or nothing to compare with."""
    found = [(result, _perplexity(result)) for result in results]
    plain = max((value for result, value in found if not result.controls and value is not None), default=None)
    if plain is None:
        return ""
    names = [
        f"{r.label}{'' if r.strength is None else f' at {r.strength:g}'} ({value:.0f})"
        for r, value in found
        if r.controls and value is not None and value > BREAKS * plain
    ]
    if not names:
        return ""
    return (
        f"perplexity is more than {BREAKS:g} times the {plain:.1f} without control for {', '.join(names)}: the text is "
        "likely broken, so take a smaller strength"
    )


def _perplexity(result: Result) -> float | None:
    return next((row["value"] for row in result.figures.metrics() if row.get("name") == "perplexity"), None)


def folder_of(root: str, spec: str, *settings: Any) -> Path:
    """The folder of a report: the name of its configuration and a digest of `settings`, the JSON values that the report
    depends on, so that no two sets of settings share a folder."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return Path(root) / "reports" / f"{name_of(spec)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def grid_folder(root: str, spec: str, config: ConfigDict, sweep: Sequence[dict[str, Any]]) -> Path:
    """The folder of the report of a grid. It does not depend on which cells are finished."""
    settings = config.to_dict()
    ids = inputs.ids(root, settings, check(settings))
    return folder_of(root, spec, settings, ids, {"sweep": list(sweep)})


def write_grid(
    folder: Path,
    root: str,
    spec: str,
    config: ConfigDict,
    results: Sequence[tuple[dict[str, Any], Result]],
    about: dict[str, str] | None = None,
) -> Path:
    """Writes the report of a grid into `folder` (see `grid_folder`), from pairs of changed settings and a result. A
    setting of one method is a column of that method's rows alone, and a result that several settings share is shown
    once.
    `about`: more facts for the report."""
    rows, smooth, turns, seen = [], [], [], {}
    for changes, result in results:
        if result.figures.id in seen:
            continue
        seen[result.figures.id] = result
        columns = {}
        for key, value in changes.items():
            section, _, rest = key.partition(".")
            label, _, setting = rest.partition(".")
            if section == "methods" and label == result.label and setting != "strengths":
                columns[setting] = value
            elif section != "methods":
                columns[key] = value
        rows.append({**columns, **_row(result)})
        smooth.append(_smooth(result) and {**columns, **_smooth(result)})
        turns += [{**columns, **row} for row in _rounds(result)]
    return _write(folder, root, spec, config, rows, smooth, turns, list(seen.values()), about)


def _row(result: Result) -> dict[str, Any]:
    row = report.row(result.figures, result.samples, method=result.label, strength=result.strength, seed=result.seed)
    if result.human is not None:
        row["figures"] |= report.row(result.human)["figures"]
    return row


def _smooth(result: Result) -> dict[str, Any] | None:
    if result.smooth is None:
        return None
    return {**report.row(result.smooth, method=result.label, seed=result.seed), "smooth": result.smooth.id}


def _rounds(result: Result) -> list[dict[str, Any]]:
    """A row for each round of a method that learned from its own samples; `rounds` identifies it."""
    found: dict[int, dict[str, Figure]] = {}
    for row in result.rounds.metrics() if result.rounds else ():
        found.setdefault(row["round"], {})[row["name"]] = Figure.from_json(row)
    return [
        {"method": result.label, "seed": result.seed, "round": r, "figures": figures, "rounds": (result.rounds.id, r)}
        for r, figures in found.items()
    ]


def _commit() -> str | None:
    """The commit of this checkout, with -dirty where files differ from it; None where there is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def version() -> str:
    """The version of the library, and the commit where it runs from a checkout."""
    commit = _commit()
    return ctg_jax.__version__ + (f", commit {commit}" if commit else "")


def name_of(spec: str) -> str:
    """The name that the files of an experiment begin with: FILE-ARGUMENT for `FILE.py:ARGUMENT`."""
    file, _, argument = spec.partition(":")
    return "-".join(filter(None, (Path(file).stem, argument)))


def overrides(spec: str, config: ConfigDict) -> dict[str, Any]:
    """The dotted settings in which a configuration differs from its file."""
    file, now = (dict(_flat(settings.to_dict())) for settings in (cli.config_of(spec), config))
    gone = {key: "(removed)" for key in file if key not in now}
    return gone | {key: value for key, value in now.items() if key not in file or file[key] != value}


def provenance(root: str, artifact: Artifact) -> str:
    """How an artifact was made: the stages that it depends on, except those of the language model, newest first, each
    with its completed settings; of stages that ran several times, such as the rounds of a method, the newest."""
    found: dict[str, list[Artifact]] = {}
    waiting = [artifact]
    while waiting:
        one = waiting.pop(0)
        stages = found.setdefault(one.path.name.rpartition("-")[0], [])
        if one in stages:
            continue
        stages.append(one)
        for name, ids in one.spec["inputs"].items():
            if name != "lm" and ids:
                waiting += [_by_id(root, id) for id in ([ids] if isinstance(ids, str) else ids)]
    return "; ".join(
        f"{ran[0].path.name}{f' and {len(ran) - 1} more' * (len(ran) > 1)} {json.dumps(ran[0].spec['config'])}"
        for ran in found.values()
    )


def _by_id(root: str, id: str) -> Artifact:
    (path,) = Path(root).absolute().glob(f"*-{id}")
    return Artifact(path, id, Session.of(root))


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _arms(root: str, config: ConfigDict, results: Sequence[Result]) -> dict[str, str]:
    """arm -> its settings, how its controls were made, and where its samples are."""
    facts: dict[str, str] = {}
    for label in dict.fromkeys(result.label for result in results):
        mine = [result for result in results if result.label == label]
        controls = dict.fromkeys(c for result in mine for c in result.controls)
        made = "".join(f"made by {provenance(root, c)}; " for c in controls)
        at = {True: "", False: " at {:g}"}
        samples = (c.samples.path.name + at[c.strength is None].format(c.strength or 0) for c in mine)
        settings = json.dumps(config.to_dict()["methods"][label])
        facts[f"arm {label!r}"] = f"settings {settings}; {made}samples {', '.join(samples)}"
    return facts


def _heldout(root: str, config: ConfigDict) -> dict[str, str]:
    """Judge or reward -> its accuracy and AUC on each of its sets of held-out texts, where it has several."""
    found = {}
    for name, settings in inputs.scorers(config.to_dict()):
        measured = [row for artifact in inputs.heldout(root, name, settings).values() for row in artifact.metrics()]
        rows = [row for row in measured if "accuracy" in row]
        if rows:
            found[f"{name!r} on held-out texts"] = "; ".join(f"{row['name']}: {how_right(row)} texts" for row in rows)
    return found


def _own(results: Sequence[Result]) -> dict[str, str]:
    """The number of judged texts that are in the words of an oracle's own corpus."""
    specs = [result.figures.spec for result in results]
    total = sum(spec["judged"] for spec in specs)
    counts = {name: sum(spec["own"].get(name, 0) for spec in specs) for spec in specs for name in spec["own"]}
    return {f"texts in the words of the corpus of {n!r}": f"{k} of {total} judged" for n, k in counts.items()}


def _write(
    folder: Path,
    root: str,
    spec: str,
    config: ConfigDict,
    rows: list[dict],
    smooth: list,
    turns: list[dict],
    results: Sequence[Result],
    more: dict[str, str] | None = None,
) -> Path:
    if not processes.first():
        return None
    settings = config.to_dict()
    facts = results[0].figures.spec
    changed = overrides(spec, config)
    about = {"strengths that break the text": sentence} if (sentence := broken(results)) else {}
    about |= {"configuration": spec, "settings changed": json.dumps(changed) if changed else "none"}
    about |= {name: facts[name] for name in ("relevance", "encoder") if facts[name]}
    about["language model"] = _by_id(root, facts["inputs"]["lm"]).path.name
    sections = ("lm", "prompts", "sample", "judges", "evaluate")
    about |= _heldout(root, config) | _own(results) | {name: json.dumps(settings[name]) for name in sections}
    about |= _arms(root, config, results) | (more or {})
    # The results of one method share their smoothness and their rounds.
    swept = {row.pop("smooth"): row for row in smooth if row}
    learned = {row.pop("rounds"): row for row in turns}
    page = report.write(
        folder,
        rows,
        title=settings.get("title", Path(spec.partition(":")[0]).stem),
        scorers=facts["judges"],
        perplexity=facts["perplexity"],
        about=about | {"ctg_jax": version()},
        smooth=list(swept.values()),
        turns=list(learned.values()),
    )
    roots.keep_files(root, folder)
    return page
