"""The stages `sample` and `human`, and what they are made of: the chain of controls, and completions of prompts under
it; with `ctg_jax.stages.sources`, `ctg_jax.stages.judges` and the `fit` of the methods it is every experiment."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax import evaluation, methods
from ctg_jax.control import IDENTITY, Chain, Control
from ctg_jax.controls import constraints, truncate
from ctg_jax.decode import strategies
from ctg_jax.io import json_line
from ctg_jax.mesh import layout
from ctg_jax.models.lengths import check_reads, room
from ctg_jax.run.stage import Artifact, Run, open_lm, read_jsonl, stage_function, write_jsonl
from ctg_jax.types import InputError, Sampling

# What the record of a prompt says about its samples: field there -> field here; judging reads the last two.
_CARRIED = {"label": "prompt_label", "source": "source", "keywords": "keywords"}


def opened(lm: Artifact) -> tuple[Any, Any, Any]:
    """(lm, params with unstacked layers, tokenizer), which the session keeps."""
    return open_lm(lm, unstacked=True)


def build(
    lm: Artifact,
    controls: Sequence[Artifact] = (),
    strengths: Sequence[float | None] = (),
    filter: Mapping[str, Any] | None = None,
    filter_first: bool = False,
) -> Control:
    """The chain that decodes: control artifacts in their order at their strengths (None: as fitted), and the options of
    `controls.truncate` after them, or before them with `filter_first` (the order of the DExperts paper). `eos` of
    `filter` is by default every id that ends a text of this LM.

    Raises:
      InputError: a control that was fitted on another LM; a strength that is not finite; numbers that do not match; a
        control that replaces the decode loop together with others or with a filter.
    """
    if len(strengths) != len(controls):
        raise InputError(f"{len(strengths)} strengths were given for {len(controls)} controls: give one for each")
    model = opened(lm)[0]
    parts = []
    for artifact, strength in zip(controls, strengths):
        same_lm(artifact, lm)
        control = methods.load(artifact, model)
        if strength is not None:
            control = methods.with_strength(control, strength)
        parts.append(control)
    filters = (truncate.rules(model, **{"eos": opened(lm)[2].ends, **filter}),) if filter else ()
    chain = (*filters, *parts) if filter_first else (*parts, *filters)
    control = chain[0] if len(chain) == 1 else Chain(chain)
    strategies.of(control)
    return control


def conditions(controls: Sequence[Artifact], lm: Artifact, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """What controls read for each row that is made from the text of its prompt, name -> [n, …]: the `conditions` of the
    methods that have them, such as the embedding of the prompt."""
    found: dict[str, np.ndarray] = {}
    for artifact in controls:
        make = getattr(methods.get(artifact.spec["method"]), "conditions", None)
        found |= make(artifact, lm, texts) if make else {}
    return found


def same_lm(control: Artifact, lm: Artifact) -> None:
    """InputError where a control was fitted on another language model than `lm`."""
    fitted = control.spec.get("fingerprints", {}).get("lm")
    if fitted is not None and fitted != lm.fingerprint:
        raise InputError(
            f"{control.path.name} was fitted on another language model (fingerprint {fitted[:12]}) than "
            f"{lm.path.name} ({lm.fingerprint[:12]}): use the one it was fitted on, or fit it again"
        )


@stage_function("sample", how=("batch",))
def sample(
    run: Run,
    *,
    lm: Artifact,
    prompts: Artifact,
    controls: Sequence[Artifact] = (),
    strengths: Sequence[float | None] = (),
    filter: Mapping[str, Any] | None = None,
    filter_first: bool = False,
    n: int = 25,
    max_new: int = 20,
    greedy: bool = False,
    batch: int = 64,
    seed: int = 0,
) -> None:
    """Writes samples.jsonl: `n` completions of every prompt, records with prompt_id, prompt, text, tokens, logp,
    seconds (the row's share of the wall clock without compilation).

    Batches have one shape, so one program is compiled, and their rows are split over the accelerators of this machine.
    A sample depends on the seed, its prompt's number and its own number only, which address its random numbers, so that
    more samples keep the first; an interrupted stage goes on behind its
    last whole batch.

    Raises:
      InputError: no prompts, an empty prompt, one that does not fit in the context, and what `build` raises.
    """
    from tqdm import tqdm

    records = prompts.rows("data.jsonl")
    texts = [r.get("prompt", r.get("text", "")) for r in records]
    control = build(lm, controls, strengths, filter, filter_first)
    partial = run.path / "partial.jsonl"
    total = len(texts) * n
    rows = _whole_batches(partial, min(batch, total), total)
    batches = complete(
        *opened(lm), texts, control, n=n, max_new=max_new, greedy=greedy, batch=batch, seed=seed, skip=len(rows),
        cond=conditions(controls, lm, texts),
    )  # fmt: skip
    bar = tqdm(total=total, initial=len(rows), desc=run.path.name, unit="sample", disable=None, leave=False)
    with open(partial, "a", encoding="utf-8") as f, bar:
        for new in batches:
            for row in new:
                record = records[row["prompt_id"]]
                row |= {new: record[old] for old, new in _CARRIED.items() if old in record}
            f.write("".join(map(json_line, new)))
            f.flush()
            rows += new
            bar.update(len(new))
    # The first batch waited for the compiler: it is given the pace of the others.
    later = [row["seconds"] for row in rows[min(batch, total) :]]
    for row in rows[: min(batch, total)]:
        row["seconds"] = float(np.median(later)) if later else row["seconds"]
    write_jsonl(run.path / "samples.jsonl", rows)
    run.discard(partial.name)
    run.record(likelihood=strategies.of(control).likelihood)


@stage_function("human_perplexity", how=("batch",))
def human(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    controls: Sequence[Artifact] = (),
    strengths: Sequence[float | None] = (),
    length: int = 64,
    batch: int = 32,
    seed: int = 0,
    resamples: int = 1000,
) -> None:
    """Stage: what control costs where people wrote. Writes the perplexity of the controlled LM on human continuations
    of the prompts in `data`, over all their tokens, to metrics.jsonl under the name human_perplexity.

    No rule that leaves tokens out, such as top-p, takes part: under it human text has probability 0. The figure is not
    known (NaN) under a strategy without a likelihood.

    Args:
      data: texts and their prompts, see `ctg_jax.data.completions.continuations`.
      length: tokens of a continuation, at most; the LM must have room for them behind one token of the prompt.
      controls, strengths: see `build`.
      seed, resamples: of the bootstrap over texts.

    Raises:
      InputError: what `build` and `continuations` raise.
    """
    from ctg_jax.data.completions import continuations

    records = data.rows("data.jsonl")
    control = build(lm, controls, strengths)
    if not strategies.of(control).likelihood:
        run.log(name="human_perplexity", **evaluation.Figure(math.nan, math.nan, math.nan, 0).as_json())
        return
    model, params, tokenizer = open_lm(lm)
    reader = evaluation.LMScorer(model, params, tokenizer, batch=batch, control=control)
    heads = tokenizer.encode_prompts([r.get("prompt", r["text"]) for r in records])
    most = room(model, reader.control)[0] - 1
    nats, tokens = reader.ids(heads, continuations(records, tokenizer, min(length, most)))
    boot = evaluation.Bootstrap(range(len(records)), seed=seed, resamples=resamples)
    run.log(name="human_perplexity", **evaluation.Perplexity("pooled").figure(boot, nats, tokens).as_json())


def complete(
    model: Any,
    params: Any,
    tokenizer: Any,
    texts: Sequence[str],
    control: Control = IDENTITY,
    *,
    n: int = 1,
    max_new: int = 20,
    greedy: bool = False,
    batch: int = 64,
    seed: int = 0,
    skip: int = 0,
    stop: Sequence[str] = (),
    cond: Mapping[str, np.ndarray] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Batches of the records of `sample`: `n` completions of each text, in order, without the first `skip`, which is
    a multiple of `batch`. All batches have one shape, and the strategy of the control completes them.
    Ids that are no token of the tokenizer have no probability.

    Args:
      stop: a completion ends with the token that completes the first of these texts.
      cond: what the texts bring for controls, name -> [n, …].

    Raises:
      InputError: what `check_prompts` and `strategies.run` raise.
    """
    from ctg_jax.data.tokenizer import to_prompts

    check_prompts(model, tokenizer, texts, max_new, control)
    control = constraints.only(tokenizer.known(model.vocab), control)
    work = [(i, j) for i in range(len(texts)) for j in range(n)]
    batch = min(batch, len(work))
    heads = tokenizer.encode_prompts(texts)
    length = max(map(len, heads))
    sampling = _sampling(tokenizer, max_new, greedy, stop)
    devices = layout.accelerators()
    params, control = layout.replicated((params, control), devices[: math.gcd(batch, len(devices))])
    for at in range(skip, len(work), batch):
        part = work[at : at + batch]
        full = part + [part[0]] * (batch - len(part))
        rows = [i for i, _ in full]
        own = {name: values[rows] for name, values in cond.items()} if cond else None
        prompts = to_prompts(tokenizer, [texts[i] for i in rows], seed, ids=full, length=length, cond=own)
        started = time.monotonic()
        out = strategies.run(model, params, prompts, control, sampling, devices)
        tokens, mask, logp = (np.asarray(x) for x in (out.tokens, out.mask, out.logp))
        seconds = (time.monotonic() - started) / len(part)
        kept = [row[real].tolist() for row, real in zip(tokens, mask)]
        if stop:
            kept = [row[: _until(tokenizer, heads[i], row, stop)] for (i, _), row in zip(full, kept)]
            mask = np.arange(mask.shape[1]) < np.asarray([len(row) for row in kept])[:, None]
        bodies = [tokenizer.before_end(ids) for ids in kept[: len(part)]]
        written = tokenizer.decode_after([heads[i] for i, _ in part], bodies)
        yield [
            {
                "prompt_id": i,
                "sample": j,
                "prompt": texts[i],
                "text": written[r],
                "tokens": kept[r],
                "logp": round(float(logp[r][mask[r]].sum()), 5),
                "seconds": seconds,
            }
            for r, (i, j) in enumerate(part)
        ]


def stream(
    model: Any,
    params: Any,
    tokenizer: Any,
    text: str,
    control: Control = IDENTITY,
    *,
    index: tuple[int, int] = (0, 0),
    max_new: int = 20,
    greedy: bool = False,
    seed: int = 0,
    stop: Sequence[str] = (),
    cond: Mapping[str, np.ndarray] | None = None,
) -> Iterator[str]:
    """The pieces of one completion as they are written; together they are the text of `complete`.

    Args:
      index: numbers of the prompt and of the sample, which choose what is drawn.
      cond: what this text brings for controls, name -> [1, …].
    """
    from ctg_jax.data.tokenizer import to_prompts

    check_prompts(model, tokenizer, [text], max_new, control)
    control = constraints.only(tokenizer.known(model.vocab), control)
    (head,) = tokenizer.encode_prompts([text])
    prompts = to_prompts(tokenizer, [text], seed, ids=[index], cond=dict(cond) if cond else None)
    sampling = _sampling(tokenizer, max_new, greedy, stop)
    tokens = (int(token[0]) for token in strategies.stream(model, params, prompts, control, sampling))
    shown = ""
    for piece in tokenizer.decode_stream(head, itertools.takewhile(lambda token: token not in sampling.eos, tokens)):
        yield piece
        shown += piece
        if any(text in shown for text in stop):
            return


def _sampling(tokenizer: Any, max_new: int, greedy: bool, stop: Sequence[str]) -> Sampling:
    """How rows end: where a text of `stop` is written in the tokens it encodes to, decoding ends with it; `_until`
    finds it in other tokens too."""
    spelled = tuple(tuple(ids) for ids in tokenizer.encode(list(stop)) if ids) if stop else ()
    return Sampling(max_new=max_new, eos=tokenizer.ends, pad=tokenizer.pad or 0, greedy=greedy, stop=spelled)


def _until(tokenizer: Any, head: Sequence[int], row: Sequence[int], stop: Sequence[str]) -> int:
    """How many tokens of a completion there are up to the one that completes a text of `stop`; all where none is."""
    texts = tokenizer.decode_after([head] * len(row), [row[: k + 1] for k in range(len(row))])
    return next((k + 1 for k, text in enumerate(texts) if any(s in text for s in stop)), len(row))


def check_prompts(model, tokenizer, texts: Sequence[str], max_new: int, control: Control = IDENTITY) -> None:
    """InputError where there are no prompts, one is empty or none of its tokens can be read, or one is too long for
    `model` and what else reads it under `control`."""
    if not texts:
        raise InputError("the list of prompts is empty: give at least one prompt")
    for i, ids in enumerate(tokenizer.encode_prompts(texts)):
        if not texts[i].strip() or not ids:
            raise InputError(f"prompt {i + 1} is empty: give at least one word")
        if strategies.of(control) is strategies.PLAIN:  # others check the rows that they were trained on
            what = f"prompt {i + 1} has {len(ids)} tokens and max_new is {max_new}"
            check_reads(model, len(ids) + max_new - 1, what, control)


def _whole_batches(partial, batch: int, total: int) -> list[dict]:
    """Rows of an interrupted attempt, cut back to whole batches, in the file too."""
    if not partial.exists():
        return []
    text = partial.read_text("utf-8")
    partial.write_text(text[: text.rfind("\n") + 1], "utf-8")  # the last row may be half a row
    rows = read_jsonl(partial)
    rows = rows if len(rows) == total else rows[: len(rows) // batch * batch]
    write_jsonl(partial, rows)
    return rows
