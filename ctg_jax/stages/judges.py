"""The stages that score: `fit_judge` makes a scorer of texts, `heldout` measures one on a set of labelled texts,
`evaluate` computes the figures of a set of samples, and `smooth` how smoothly a method is controlled over its
strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ctg_jax import rewards
from ctg_jax.data.messages import prompt_of
from ctg_jax.rewards.check import texts_and_labels
from ctg_jax.rewards.code import function_content
from ctg_jax.run.identity import model_content
from ctg_jax.run.stage import Artifact, Run, open_artifact, open_lm, stage_function, write_jsonl
from ctg_jax.types import InputError


@stage_function("fit_judge", revision=2, contents={"encoder": model_content, "function": function_content})
def fit_judge(
    run: Run,
    *,
    kind: str,
    data: Artifact | None = None,
    encoder: str | Artifact | None = None,
    heldout: Artifact | None = None,
    name: str = "positive",
    target: int | str = 1,
    reads: str = "text",
    problem: str | None = None,
    threshold: float | None = None,
    function: str | None = None,
    version: str = "",
) -> None:
    """Stage: a scorer of texts, kept in state/, with its accuracy on held-out texts in metrics.jsonl.

    Args:
      kind: the name of a module of `ctg_jax.rewards`: "oracle" (the grammar of the bundled reviews; exact on them),
        "bag" (bag of words), "probe" (linear probe on the sentence encoder `encoder`), "classifier" (the imported
        sequence classifier `encoder`), "diversity" (one minus the share of repeated 3-grams of words), "preference"
        (linear in the embeddings of `encoder`, fitted on comparisons: records with text, the chosen one, and rejected),
        "function" (your own, of prompt and text), "length" (minus the error in words or characters; `target` is the
        request, such as "12 words" or "between 5 and 9 words", and left out where each prompt holds its own),
        "lexicon" (1 where a text mentions one of the words of `target`, such as "rocket orbit", in any case; else 0),
        "rank" (how well a text continues its prompt, fitted on prompts and continuations of documents; see
        `ctg_jax.rewards.rank`), "instructions", "keywords" and "slots" (the shares of a prompt's instructions that a
        text follows, of its keywords that it mentions and of its slots that it realises; the first two read them in
        `data`, the records of the prompts).
      encoder: a folder or hub id, or what `ctg_jax.learn.classifier` trained.
      data, heldout: texts with labels, to fit and to test on (those without a label are left out and counted in a
        warning); or comparisons. The stage `heldout` measures a judge on further sets.
      function, version: "package.module:function", and a string to change when its scores change though its file does
        not. It is given prompt and text apart, and is identified by its file, not by the modules that this imports.
      name: its name in reports. target: the label whose probability it gives; of a classifier also the name of the
        label in config.json.
      reads: "text" for the continuation alone, "both" for prompt and continuation.
      problem, threshold: the meaning of a classifier's outputs, where its config.json does not give it, and the score
        from which a text has the attribute, where that is not the default of `SequenceClassifier`.

    Raises:
      InputError: an unknown kind, a setting that the kind does not read, data that are missing or have no labels,
        held-out texts for a classifier that gives values, which cannot be compared with labels, and what the scorer
        raises.
    """
    module = rewards.get(kind)
    facts = dict(kind=kind, name=name, target=target, reads=reads, problem=problem, threshold=threshold)
    if isinstance(encoder, Artifact):
        facts["trained"] = encoder.path.name
        encoder = str(_trained(encoder))
    given = dict(data=data, encoder=encoder, target=target, reads=reads, function=function, version=version)
    _check_settings(kind, module.SETTINGS, given | dict(problem=problem, threshold=threshold))
    if "data" in module.SETTINGS:
        if data is None:
            raise InputError(f"a judge of kind {kind!r} is fitted on data, and no data were given")
        settings = {"name": name, **given, "embedder": partial(rewards.open_embedder, run.session, encoder)}
        fitted = module.fit(data.rows("data.jsonl"), settings, str(data.path))
        fitted.save(run.path / "state")
    run.record(judge=facts)
    judge = _opened(Artifact(run.path, "", run.session))
    run.record(version=judge.version)
    measured = {} if heldout is None else _measured(judge, facts, heldout)
    run.log(name=name, version=judge.version, **measured)


def _measured(judge: Any, facts: Mapping[str, Any], data: Artifact) -> dict[str, Any]:
    """How right a judge is on held-out texts: the number of them, its accuracy, and the area under its ROC curve where
    they are of both classes; see `fit_judge` for what `facts` holds."""
    from ctg_jax import evaluation

    if getattr(judge, "values", False):
        raise InputError(
            f"heldout is given, but the judge {judge.name!r} gives values, which cannot be compared with labels"
        )
    rows, where, module = data.rows("data.jsonl"), str(data.path), rewards.get(facts["kind"])
    if hasattr(module, "accuracy"):
        return {"accuracy": module.accuracy(judge, rows, where), "heldout": len(rows)}
    texts, labels = texts_and_labels(rows, where)
    # The label that a class of a classifier which is given by its name has is its place among the classes.
    # A request in words, as of "length" and "lexicon", is no label: texts that follow it have label 1.
    label = getattr(judge, "target", 1) if isinstance(facts["target"], str) else facts["target"]
    scores, wanted, out = judge([""] * len(texts), texts), np.asarray(labels) == label, {}
    if getattr(judge, "own", None) is not None:  # on texts of its own corpus an oracle is right by construction
        foreign = np.asarray([not judge.own(text) for text in texts])
        scores, wanted, out = scores[foreign], wanted[foreign], {"own": int(np.sum(~foreign))}
    out["heldout"] = len(scores)
    if len(scores):
        out["accuracy"] = float(np.mean((scores >= judge.threshold) == wanted))
    if wanted.any() and not wanted.all():
        out["auc"] = evaluation.auc(scores, wanted)
    return out


@stage_function("heldout")
def heldout(run: Run, *, judge: Artifact, data: Artifact, name: str) -> None:
    """Stage: how right a judge is on one more set of held-out texts, a row with heldout (their number), accuracy and,
    for a judge of texts with labels, auc in metrics.jsonl.

    Args:
      judge: what `fit_judge` made. data: as its `heldout`. name: of the set, for reports.

    Raises:
      InputError: as `fit_judge` for its `heldout`.
    """
    run.log(name=name, **_measured(open_judge(judge), judge.spec["judge"], data))


def _check_settings(kind: str, known: Sequence[str], given: dict[str, Any]) -> None:
    """InputError for a setting that this kind would ignore or that it lacks.

    known: the settings that it reads.
    """
    defaults = dict(data=None, encoder=None, target=1, reads="text", function=None, version="")
    defaults |= dict(problem=None, threshold=None)
    for name, value in given.items():
        if name not in known and value != defaults[name]:
            shown = value.path.name if isinstance(value, Artifact) else value
            why = f"a judge of kind {kind!r} does not read it"
            if kind == "function" and name in ("reads", "target"):
                why = "a function is given prompt and text apart and returns its own score, so it decides both itself"
            raise InputError(f"{name} is {shown!r}, but {why}: leave {name} out")
    for name in ("encoder", "function"):
        if name in known and not given[name]:
            raise InputError(f"a judge of kind {kind!r} needs {name}, and none was given")


def open_judge(artifact: Artifact) -> Any:
    """The reward that `fit_judge` made, which the artifact's session keeps.

    Raises:
      InputError: it is another one than `fit_judge` measured, because a model or a file of code has changed since.
    """
    judge = artifact.session.keep("judge", artifact, lambda: _opened(artifact))
    was = artifact.spec["version"]
    if judge.version != was:
        raise InputError(
            f"{artifact.path.name} is {was}, but what it was made from is now {judge.version}: run the command again; "
            f"if that does not help, for a model that is named by a hub id, delete {artifact.path}"
        )
    return judge


def _opened(artifact: Artifact) -> Any:
    recorded = artifact.spec["judge"]
    settings = recorded | {name: artifact.given(name) for name in ("encoder", "function", "version")}
    if "trained" in recorded:
        found = artifact.session.root / recorded["trained"]
        settings["encoder"] = str(_trained(open_artifact(found, artifact.session)))
    settings["embedder"] = partial(rewards.open_embedder, artifact.session, settings["encoder"])
    return rewards.get(recorded["kind"]).load(artifact.path / "state", settings)


def _trained(artifact: Artifact) -> Path:
    """The folder of the classifier that the stage `classifier` of `ctg_jax.learn` made.

    Raises:
      InputError: the artifact is of another stage.
    """
    if artifact.spec["stage"] != "classifier":
        raise InputError(f"encoder is {artifact.path.name}: expected what the stage 'classifier' made, or a folder")
    return artifact.path / "state" / "classifier"


@stage_function("evaluate", contents={"embed": model_content})
def evaluate(
    run: Run,
    *,
    samples: Artifact,
    judges: Sequence[Artifact] = (),
    lm: Artifact | None = None,
    fluency: Artifact | None = None,
    references: Artifact | None = None,
    lm_name: str = "base",
    embed: str | None = None,
    kl: bool = False,
    seed: int = 0,
    resamples: int = 1000,
) -> None:
    """Stage: writes the figures of one set of samples to metrics.jsonl, as rows with name, value, low, high, n, and the
    score of every sample by every judge to scores.jsonl.

    Args:
      judges: what `fit_judge` made.
      lm: the language model of the perplexity, `lm_name` in the report, unless `fluency` is another one for that.
      embed: a sentence encoder, for relevance and similarity (see `ctg_jax.evaluation.score`); without one, relevance
        is read off `lm`.
      references: human texts (records with text), for mauve; needs `embed`.
      kl: estimate the KL from `lm`, which must be the model that the samples were drawn with, per token: the mean of
        log p - log p_lm over the samples, where p is what they were drawn from, truncation included.
      seed, resamples: of the bootstrap over prompts.

    Raises:
      InputError: references without an encoder; kl without the LM of the samples, of greedy samples, or of samples
        without a likelihood (of a diffusion model, or the best of n).
    """
    from ctg_jax import evaluation

    if references is not None and embed is None:
        raise InputError("references are compared by an encoder and none was given: set embed to a sentence encoder")
    rows = samples.rows("samples.jsonl")
    read_by = fluency or lm
    reader = None if read_by is None else evaluation.LMScorer(*open_lm(read_by), name=lm_name)
    if kl:
        _check_kl(samples, lm)
        rows = _with_kl(rows, reader if read_by is lm else evaluation.LMScorer(*open_lm(lm)))
    encoder = None if embed is None else rewards.open_embedder(run.session, embed)
    scorers = [open_judge(j) for j in judges]
    rows = evaluation.score(rows, scorers, fluency=reader, embed=encoder)
    features = None
    if references is not None:
        features = encoder([r["text"] for r in rows]), encoder([r["text"] for r in references.rows("data.jsonl")])
    thresholds = {r.name: r.threshold for r in scorers}
    figures = evaluation.summary(rows, thresholds, features, seed=seed, resamples=resamples)
    kept = ("prompt_id", "sample", "scores", "nats", "read", "relevance", "similarity", "kl")
    write_jsonl(run.path / "scores.jsonl", [{k: _finite(row[k]) for k in kept if k in row} for row in rows])
    oracles = [r for r in scorers if getattr(r, "own", None) is not None]
    run.record(
        judges={r.name: _with_accuracy(r.version, j) for r, j in zip(scorers, judges)},
        own={r.name: sum(r.own(row["text"]) for row in rows) for r in oracles},
        judged=len(rows),
        perplexity=None if reader is None else f"{reader.version}: {evaluation.FIELD.perplexity}",
        encoder=None if encoder is None else encoder.version,
        relevance=_relevance(encoder, reader) if "relevance" in figures else None,
    )
    for name, figure in figures.items():
        run.log(name=name, **figure.as_json())


@stage_function("smooth")
def smooth(
    run: Run, *, figures: Sequence[Artifact], strengths: Sequence[float], seed: int = 0, resamples: int = 1000
) -> None:
    """Stage: writes how smoothly one method is controlled to metrics.jsonl: <judge>/<figure> for every figure of
    `ctg_jax.evaluation.smooth_control`, and relevance over all strengths.

    Args:
      figures: what `evaluate` made of the samples at each of the `strengths`, by the same judges.

    Raises:
      InputError: numbers that do not match, evaluations by different scorers, and what `smooth_control` raises.
    """
    from ctg_jax import evaluation

    if len(figures) != len(strengths):
        raise InputError(f"{len(strengths)} strengths were given for {len(figures)} evaluations: give one for each")
    scorers = ("judges", "encoder", "relevance")
    for other in figures[1:]:
        if any(other.spec[k] != figures[0].spec[k] for k in scorers):
            raise InputError(f"{other.path.name} and {figures[0].path.name} were not scored alike: use the same judges")
    rows = [(float(s), row) for s, a in zip(strengths, figures) for row in a.rows("scores.jsonl")]
    at, prompts = [s for s, _ in rows], [row["prompt_id"] for _, row in rows]
    options = {"seed": seed, "resamples": resamples}
    for judge in figures[0].spec["judges"]:
        scores = [row["scores"][judge] for _, row in rows]
        for name, figure in evaluation.smooth_control(at, prompts, scores, **options).items():
            run.log(name=f"{judge}/{name}", **figure.as_json())
    known = [row.get("relevance") for _, row in rows]
    if any(x is not None for x in known):
        values = [np.nan if x is None else x for x in known]
        run.log(name="relevance", **evaluation.Bootstrap(prompts, **options).mean(values).as_json())
    run.record(**{k: figures[0].spec[k] for k in scorers})


def _check_kl(samples: Artifact, lm: Artifact | None) -> None:
    """InputError where the KL from `lm` cannot be estimated on the samples."""
    spec = samples.spec
    if not spec.get("likelihood", True):
        raise InputError(
            f"kl needs the likelihood of every sample, and what drew {samples.path.name} has none: set kl to False"
        )
    if lm is None or spec.get("fingerprints", {}).get("lm") != lm.fingerprint:
        raise InputError(f"kl needs the language model that wrote {samples.path.name}: give that one as lm")
    if spec["config"].get("greedy"):
        raise InputError(f"kl is estimated on samples and {samples.path.name} is greedy: sample, or set kl to False")


def _with_kl(rows: list[dict[str, Any]], base: Any) -> list[dict[str, Any]]:
    """The samples with "kl": their log-probability as drawn minus that under the LM alone, nats of all tokens."""
    nats, _ = base.ids(base.tokenizer.encode_prompts([prompt_of(r) for r in rows]), [r["tokens"] for r in rows])
    return [{**row, "kl": row["logp"] + float(x)} for row, x in zip(rows, nats)]


def _with_accuracy(version: str, judge: Artifact) -> str:
    """A judge's version with its accuracy on held-out texts, where that was measured; that of an oracle is its accuracy
    on the texts that are not in the words of its own corpus."""
    own = getattr(open_judge(judge), "own", None) is not None
    text = version + ", exact on texts of its own corpus and a count of cue words on any other" * own
    for row in judge.metrics():
        if "accuracy" in row:
            text += f", {how_right(row)} held-out texts" + " of others" * own
    return text


def how_right(row: Mapping[str, Any]) -> str:
    """Accuracy and area under the ROC curve of a judge as a report shows them, up to the number of texts."""
    area = f", AUC {row['auc']:.3f}" if "auc" in row else ""
    return f"accuracy {row['accuracy']:.3f}{area} on {row['heldout']}"


def _relevance(encoder: Any, fluency: Any) -> str:
    """How relevance was measured, for a report."""
    if encoder is not None:
        return f"cosine of the embeddings of prompt and continuation, {encoder.version}"
    return f"nats per token by which the prompt makes the continuation likelier, {fluency.version}"


def _finite(value: Any) -> Any:
    """None for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not np.isfinite(value) else value
