"""The stages `sample` and `human_perplexity`, and the functions that they share with the scripts and the front door:
`build` makes the chain of controls, `complete` completes prompts under it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np

from ctg_jax import evaluation, io, methods
from ctg_jax.control import IDENTITY, Chain, Control
from ctg_jax.controls import constraints, selection, truncate
from ctg_jax.data import stops
from ctg_jax.data.messages import Messages, is_messages, prompt_of, shown, unanswered
from ctg_jax.decode import speculate, strategies
from ctg_jax.io import json_line
from ctg_jax.mesh import layout
from ctg_jax.models.lengths import check_reads, room
from ctg_jax.run.stage import Artifact, Run, open_lm, stage_function, write_jsonl
from ctg_jax.types import InputError, Sampling

PROPOSED = "speculate"  # the option of a filter that says how many tokens are proposed at a time, see `build`

# Fields of the record of a prompt that its samples keep -> their names there; `judges.evaluate` reads the last two.
_CARRIED = {"label": "prompt_label", "source": "source", "keywords": "keywords"}


@dataclasses.dataclass(frozen=True)
class Options:
    """How prompts are completed.

    Attributes:
      n: completions of each prompt. max_new: tokens of a completion, at most.
      greedy: take the likeliest token instead of drawing one.
      batch: rows that are decoded at once; no sample depends on it. seed: of the random numbers.
      stop: a completion ends behind the first of these texts: its text there, its tokens with the one that completes
        that text.
      each: whether records hold the log-probability of each token as well, under `logps`.
      empty: whether a prompt may be empty: the model then continues the token with which its texts begin.
    """

    n: int = 1
    max_new: int = 20
    greedy: bool = False
    batch: int = 64
    seed: int = 0
    stop: Sequence[str] = ()
    each: bool = False
    empty: bool = False

    def sampling(self, tokenizer: Any) -> Sampling:
        """The same for the decode loop. A text of `stop` ends a row where it is spelled with the tokens that it encodes
        to; `stops.tokens_until` finds it in other spellings as well."""
        stop = stops.spellings(tokenizer, self.stop)
        pad = tokenizer.pad or 0
        return Sampling(max_new=self.max_new, eos=tokenizer.ends, pad=pad, greedy=self.greedy, stop=stop)


def opened(lm: Artifact) -> tuple[Any, Any, Any]:
    """(lm, params with unstacked layers, tokenizer), which the session keeps."""
    return open_lm(lm, unstacked=True)


def build(
    lm: Artifact,
    controls: Sequence[Artifact] = (),
    strengths: Sequence[float | None] = (),
    filter: Mapping[str, Any] | None = None,
    truncate_first: bool = False,
) -> Control:
    """The chain that decodes: control artifacts in their order at their strengths (None: as fitted), and the options of
    `controls.truncate` after them, or before them with `truncate_first` (the order of the DExperts paper). `eos` of
    `filter` is by default every id that ends a text of this LM. With `speculate` = k in `filter` the controls that act
    in another place than the logits propose k tokens at a time, which the others judge in one pass
    (`decode.speculate.split`); texts keep their distribution.

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
    return chained(lm, parts, filter, truncate_first)


def chained(
    lm: Artifact, parts: Sequence[Control], filter: Mapping[str, Any] | None = None, truncate_first: bool = False
) -> Control:
    """The same of controls that are loaded; see `build`.

    Raises:
      InputError: an option out of its range; a control that replaces the decode loop together with others, or where
        there is something to speculate about.
    """
    model, _, tokenizer = opened(lm)
    options, k = truncation(filter), (filter or {}).get(PROPOSED, 0)
    if not isinstance(k, int) or isinstance(k, bool):
        raise InputError(f"speculate is {k!r}, expected a whole number of tokens that are proposed at a time.")
    filters = (truncate.rules(model, **{"eos": tokenizer.ends, **options}),) if options else ()
    chain = (*filters, *parts) if truncate_first else (*parts, *filters)
    control = chain[0] if len(chain) == 1 else Chain(chain)
    strategies.of(control)
    return speculate.split(control, k) if k else control


def truncation(filter: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a filter that change the distribution, those of `controls.truncate`: all but `speculate`."""
    return {name: value for name, value in (filter or {}).items() if name != PROPOSED}


def conditions(
    controls: Sequence[Artifact], lm: Artifact, texts: Sequence[str | Messages],
    records: Sequence[Mapping[str, Any]] = (),
) -> dict[str, np.ndarray]:  # fmt: skip
    """The entries of `prompts.cond` that methods compute from the texts of the prompts, such as their embeddings: name
    -> array [n, …]. The function `conditions` of a method's module computes them; messages it reads as `shown`, without
    an answer at their end. One with a parameter `records` is given the records of the prompts as well, without fields
    where there are none. Where a control selects by them, the roles of tokens are among them."""
    found: dict[str, np.ndarray] = {}
    texts = [unanswered({"messages": t})["messages"] if is_messages(t) else t for t in texts]
    for artifact in controls:
        if selection.asks_roles(artifact.spec.get("init")):
            found[selection.ROLE] = selection.roles(opened(lm)[2], texts)
        make = getattr(methods.get(artifact.spec["method"]), "conditions", None)
        if make is not None:
            fields = {"records": records or [{}] * len(texts)} if "records" in signature(make).parameters else {}
            found |= make(artifact, lm, [shown(t) for t in texts], **fields)
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
    truncate_first: bool = False,
    n: int = 25,
    max_new: int = 20,
    greedy: bool = False,
    batch: int = 64,
    seed: int = 0,
) -> None:
    """Stage: writes samples.jsonl, `n` completions of every prompt, as records with prompt_id, sample, prompt, text,
    tokens, logp (nats) and seconds (the row's share of the wall clock, without compilation).

    All batches have one shape, so that one program is compiled, and their rows are split over the accelerators of this
    machine. The random numbers of a sample depend on the seed, the number of its prompt and its own number alone, so
    that a larger `n` keeps the samples of a smaller one. An interrupted stage continues after its last whole batch.

    Args:
      lm, prompts: the language model, and records with `prompt`, `text` or `messages`. Where the prompt is empty, the
        model writes a whole text.
      controls, strengths, filter, truncate_first: see `build`.
      n, max_new, greedy, batch, seed: see `Options`.

    Raises:
      InputError: no prompts, an empty one where no token begins a text, one that does not fit in the context, and what
        `build` raises.
    """
    from tqdm import tqdm

    records = prompts.rows("data.jsonl")
    texts = [prompt_of(r) for r in records]
    control = build(lm, controls, strengths, filter, truncate_first)
    partial = run.path / "partial.jsonl"
    total = len(texts) * n
    rows = io.whole_batches(partial, min(batch, total), total)
    options = Options(n=n, max_new=max_new, greedy=greedy, batch=batch, seed=seed, empty=True)
    cond = conditions(controls, lm, texts, records)
    batches = complete(*opened(lm), texts, control, options, skip=len(rows), cond=cond)
    bar = tqdm(total=total, initial=len(rows), desc=run.path.name, unit="sample", disable=None, leave=False)
    with open(partial, "a", encoding="utf-8") as f, bar:
        for new in batches:
            for row in new:
                row |= carried(records[row["prompt_id"]])
            f.write("".join(map(json_line, new)))
            f.flush()
            rows += new
            bar.update(len(new))
    # The time of the first batch includes compilation, so its rows are given the median of the others.
    later = [row["seconds"] for row in rows[min(batch, total) :]]
    for row in rows[: min(batch, total)]:
        row["seconds"] = float(np.median(later)) if later else row["seconds"]
    write_jsonl(run.path / "samples.jsonl", rows)
    run.discard(partial.name)
    run.record(likelihood=strategies.of(control).likelihood)


def carried(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the samples of a prompt keep of its record, under the names that `judges.evaluate` reads."""
    return {new: record[old] for old, new in _CARRIED.items() if old in record}


@stage_function("human_perplexity", how=("batch",))
def human_perplexity(
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
    """Stage: what control costs on human text. Writes the perplexity of the controlled LM on human continuations of the
    prompts in `data`, over all their tokens, to metrics.jsonl under the name human_perplexity.

    There is no filter: under a rule that removes tokens, such as top-p, human text has probability 0.

    Args:
      data: texts and their prompts, see `ctg_jax.data.completions.continuations`.
      length: tokens of a continuation, at most; they must fit in the context after one token of the prompt.
      controls, strengths: see `build`.
      seed, resamples: of the bootstrap over texts.

    Raises:
      InputError: controls without a likelihood, and what `build` and `continuations` raise.
    """
    from ctg_jax.data.completions import continuations

    records = data.rows("data.jsonl")
    control = build(lm, controls, strengths)
    if not strategies.of(control).likelihood:
        raise InputError(
            f"{controls[0].path.name} gives no text a likelihood, so human text has no perplexity under it"
        )
    model, params, tokenizer = open_lm(lm)
    reader = evaluation.LMScorer(model, params, tokenizer, batch=batch, control=control)
    prompts = [prompt_of(unanswered(r)) for r in records]
    heads, cond = tokenizer.encode_prompts(prompts), conditions(controls, lm, prompts, records)
    most = room(model, reader.control)[0] - 1
    nats, tokens = reader.ids(heads, continuations(records, tokenizer, min(length, most)), cond=cond)
    boot = evaluation.Bootstrap(range(len(records)), seed=seed, resamples=resamples)
    run.log(name="human_perplexity", **evaluation.Perplexity("pooled").figure(boot, nats, tokens).as_json())


def complete(
    model: Any,
    params: Any,
    tokenizer: Any,
    texts: Sequence[str | Messages],
    control: Control = IDENTITY,
    options: Options = Options(),
    *,
    skip: int = 0,
    cond: Mapping[str, np.ndarray] | None = None,
    numbers: Sequence[int] | None = None,
    shape: tuple[int, int] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yields batches of the records of `sample`: `options.n` completions of each text, in order. All batches have one
    shape, and the strategy of the control completes them. Ids that are no token of the tokenizer have probability 0.

    Args:
      model, params, tokenizer: what `opened` returns.
      texts: the prompts. A record has messages under `messages`, and as text for readers under `prompt`.
      skip: leave out this many records at the beginning; a multiple of `options.batch`.
      cond: entries of `prompts.cond`, name -> array with a row for each text; see `conditions`.
      numbers: the number of each text, which selects its random numbers and is its `prompt_id`; by default 0, 1, …
      shape: (rows, tokens of a prompt) of a batch, in place of the smallest that holds the texts.

    Raises:
      InputError: what `check_prompts` and `strategies.run` raise.
    """
    from ctg_jax.data.tokenizer import to_prompts

    check_prompts(model, tokenizer, texts, options.max_new, control, options.empty)
    control = constraints.only(tokenizer.known(model.vocab), control)
    work = [(i, j) for i in range(len(texts)) for j in range(options.n)]
    numbers = range(len(texts)) if numbers is None else numbers
    heads = tokenizer.encode_prompts(texts)
    batch, length = shape or (min(options.batch, len(work)), max(map(len, heads)))
    sampling = options.sampling(tokenizer)
    devices = layout.accelerators()
    params, control = layout.replicated((params, control), devices[: math.gcd(batch, len(devices))])
    for at in range(skip, len(work), batch):
        part = work[at : at + batch]
        full = part + [part[0]] * (batch - len(part))
        rows = [i for i, _ in full]
        own = {name: values[rows] for name, values in cond.items()} if cond else None
        ids = [(numbers[i], j) for i, j in full]
        prompts = to_prompts(tokenizer, [texts[i] for i in rows], options.seed, ids=ids, length=length, cond=own)
        started = time.monotonic()
        out = strategies.run(model, params, prompts, control, sampling, devices)
        tokens, mask, logp = (np.asarray(x) for x in (out.tokens, out.mask, out.logp))
        seconds = (time.monotonic() - started) / len(part)
        kept = [row[real].tolist() for row, real in zip(tokens, mask)]
        if options.stop:
            ends = [stops.tokens_until(tokenizer, heads[i], row, options.stop) for (i, _), row in zip(full, kept)]
            kept = [row[:end] for row, end in zip(kept, ends)]
            mask = np.arange(mask.shape[1]) < np.asarray([len(row) for row in kept])[:, None]
        bodies = [tokenizer.before_end(ids) for ids in kept[: len(part)]]
        written = tokenizer.decode_after([heads[i] for i, _ in part], bodies)
        yield [
            {
                "prompt_id": numbers[i],
                "sample": j,
                "prompt": shown(texts[i]),
                **({} if isinstance(texts[i], str) else {"messages": texts[i]}),
                "text": stops.cut(written[r], options.stop),
                "tokens": kept[r],
                "logp": round(float(logp[r][mask[r]].sum()), 5),
                **({"logps": logp[r][mask[r]].tolist()} if options.each else {}),
                "seconds": seconds,
            }
            for r, (i, j) in enumerate(part)
        ]


def check_prompts(
    model, tokenizer, texts: Sequence[str | Messages], max_new: int, control: Control = IDENTITY, empty: bool = False
) -> None:
    """InputError where there are no prompts, one has no tokens or, unless `empty`, no text, or one is too long for
    `model` or for another model that reads it under `control`."""
    if not texts:
        raise InputError("the list of prompts is empty: give at least one prompt")
    for i, ids in enumerate(tokenizer.encode_prompts(texts)):
        if not ids or (not empty and isinstance(texts[i], str) and not texts[i].strip()):
            raise InputError(f"prompt {i + 1} is empty: give at least one word")
        if strategies.of(control) is strategies.PLAIN:  # others check the rows that they were trained on
            what = f"prompt {i + 1} has {len(ids)} tokens and max_new is {max_new}"
            check_reads(model, len(ids) + max_new - 1, what, control)
