"""The stages `sample` and `human`, and what they are made of: the chain of controls, and completions of prompts under
it; with `ctg_jax.sources`, `ctg_jax.judging` and the `fit` of the methods it is every experiment."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctg_jax import constraints, evaluation, layout, methods
from ctg_jax.control import IDENTITY, Chain, Control
from ctg_jax.decode import check_finite, generate
from ctg_jax.methods import truncate
from ctg_jax.models.lengths import check_reads, room
from ctg_jax.stage import Artifact, Run, open_lm, read_jsonl, stage_function, write_jsonl
from ctg_jax.types import InputError, Samples, Sampling

# What the record of a prompt says about its samples: field there -> field here; judging reads the last two.
_CARRIED = {"label": "prompt_label", "source": "source", "keywords": "keywords"}


@lru_cache(maxsize=2)
def opened(lm: Artifact) -> tuple[Any, Any, Any]:
    """(lm, params with unstacked layers, tokenizer); kept, since the stages of an experiment use the same one."""
    model, params, tokenizer = open_lm(lm)
    return model, jax.jit(model.unstack)(params), tokenizer


def build(
    lm: Artifact,
    controls: Sequence[Artifact] = (),
    strengths: Sequence[float | None] = (),
    filter: Mapping[str, Any] | None = None,
    filter_first: bool = False,
) -> Control:
    """The chain that decodes: control artifacts in their order at their strengths (None: as fitted), and the options of
    `methods.truncate` after them, or before them with `filter_first` (the order of the DExperts paper). `eos` of
    `filter` is by default every id that ends a text of this LM.

    Raises:
      InputError: a control that was fitted on another LM; a strength that is not finite; numbers that do not match.
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
    if writer(controls, filter) is not generate:
        return parts[0]
    filters = (truncate.init(model, **{"eos": opened(lm)[2].ends, **filter}),) if filter else ()
    return Chain((*filters, *parts) if filter_first else (*parts, *filters))


def writer(controls: Sequence[Artifact], filter: Mapping[str, Any] | None = None) -> Callable[..., Samples]:
    """What completes prompts under these controls: `decode.generate`, or the `write` of a method that is no control of
    the language model but writes by itself, such as a diffusion model.

    Raises:
      InputError: such a model together with controls or with a filter, which have nowhere to act.
    """
    alone = [a for a in controls if "method" in a.spec and methods.writes(a.spec["method"])]
    if not alone:
        return generate
    name = alone[0].spec["method"]
    if len(controls) > 1:
        raise InputError(f"{name} writes without the language model, so no other control can act on it: give it alone")
    if filter:
        raise InputError(f"filter is {dict(filter)}, but {name} has no next-token distribution: set filter to {{}}")
    return methods.get(name).write


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
    control, write = build(lm, controls, strengths, filter, filter_first), writer(controls, filter)
    partial = run.path / "partial.jsonl"
    total = len(texts) * n
    rows = _whole_batches(partial, min(batch, total), total)
    batches = complete(
        *opened(lm), texts, control, n=n, max_new=max_new, greedy=greedy, batch=batch, seed=seed, skip=len(rows),
        write=write, cond=conditions(controls, lm, texts), devices=_devices(),
    )  # fmt: skip
    bar = tqdm(total=total, initial=len(rows), desc=run.path.name, unit="sample", disable=None, leave=False)
    with open(partial, "a", encoding="utf-8") as f, bar:
        for new in batches:
            for row in new:
                record = records[row["prompt_id"]]
                row |= {new: record[old] for old, new in _CARRIED.items() if old in record}
            f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new))
            f.flush()
            rows += new
            bar.update(len(new))
    # The first batch waited for the compiler: it is given the pace of the others.
    later = [row["seconds"] for row in rows[min(batch, total) :]]
    for row in rows[: min(batch, total)]:
        row["seconds"] = float(np.median(later)) if later else row["seconds"]
    write_jsonl(run.path / "samples.jsonl", rows)
    run.discard(partial.name)


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

    No rule that leaves tokens out, such as top-p, takes part: under it human text has probability 0.

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
    model, params, tokenizer = open_lm(lm)
    reader = evaluation.LMScorer(model, params, tokenizer, batch=batch, control=build(lm, controls, strengths))
    heads = tokenizer.encode_prompts([r.get("prompt", r["text"]) for r in records])
    most = room(model, reader.control)[0] - 1
    nats, tokens = reader.ids(heads, continuations(records, tokenizer, min(length, most)))
    boot = evaluation.Bootstrap(range(len(records)), seed=seed, resamples=resamples)
    run.log(name="human_perplexity", **evaluation.Perplexity("pooled").figure(boot, nats, tokens).as_json())


human.revision = 1


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
    write: Callable[..., Samples] = generate,
    cond: Mapping[str, np.ndarray] | None = None,
    devices: Sequence[jax.Device] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Batches of the records of `sample`: `n` completions of each text, in order, without the first `skip`, which is
    a multiple of `batch`. All batches have one shape. `write` is what completes a batch, with the signature of
    `generate`; `cond` what the texts bring for controls, name -> [n, …]. Each of `devices` (the default one where none
    are given) completes rows of its own, as many devices as divide a batch. Ids that are no token of the tokenizer have
    no probability. Raises InputError as `check_prompts` and `generate` do.
    """
    from ctg_jax.data.tokenizer import to_prompts

    check_prompts(model, tokenizer, texts, max_new, control if isinstance(control, Control) else IDENTITY)
    control = constraints.only(tokenizer.known(model.vocab), control)
    constraints.check(control, model.vocab, max_new)
    work = [(i, j) for i in range(len(texts)) for j in range(n)]
    batch = min(batch, len(work))
    heads = tokenizer.encode_prompts(texts)
    length = max(map(len, heads))
    sampling = Sampling(max_new=max_new, eos=tokenizer.ends, pad=tokenizer.pad or 0, greedy=greedy)
    used = tuple(devices[: math.gcd(batch, len(devices))])
    if len(used) > 1:
        params, control = jax.device_put((params, control), NamedSharding(_mesh(used), PartitionSpec()))
        write = _split(write, used)
    for at in range(skip, len(work), batch):
        part = work[at : at + batch]
        full = part + [part[0]] * (batch - len(part))
        rows = [i for i, _ in full]
        own = {name: values[rows] for name, values in cond.items()} if cond else None
        prompts = to_prompts(tokenizer, [texts[i] for i in rows], seed, ids=full, length=length, cond=own)
        started = time.monotonic()
        out = write(model, params, prompts, control, sampling)
        tokens, mask, logp = (np.asarray(x) for x in (out.tokens, out.mask, out.logp))
        check_finite(logp)  # of a program over devices, inside which nothing could be raised
        seconds = (time.monotonic() - started) / len(part)
        kept = [row[real].tolist() for row, real in zip(tokens, mask)]
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


def _devices() -> Sequence[jax.Device]:
    """The accelerators of this machine; none for a CPU, whose devices share its cores, and none where a mesh was asked
    for, over which `generate` spreads rows itself."""
    return () if jax.default_backend() == "cpu" or layout.island() else jax.local_devices()


def _mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    return Mesh(np.asarray(devices), ("data",))


@lru_cache(maxsize=8)
def _split(write: Callable[..., Samples], devices: tuple[jax.Device, ...]) -> Callable[..., Samples]:
    """`write` as one program over devices. Rows never meet: no device waits for the longest row of another."""
    rows, whole = PartitionSpec("data"), PartitionSpec()

    @partial(jax.jit, static_argnums=(0, 4))
    def split(model, params, prompts, control, sampling):
        def some(params, prompts, control):
            out = write(model, params, prompts, control, sampling)
            return out.replace(generated=out.generated[None])  # of each device

        specs = dict(in_specs=(whole, rows, whole), out_specs=rows)
        return jax.shard_map(some, mesh=_mesh(devices), check_vma=False, **specs)(params, prompts, control)

    return split


def check_prompts(model, tokenizer, texts: Sequence[str], max_new: int, control: Control = IDENTITY) -> None:
    """InputError where there are no prompts, one is empty or none of its tokens can be read, or one is too long for
    `model` and what else reads it under `control`."""
    if not texts:
        raise InputError("the list of prompts is empty: give at least one prompt")
    for i, ids in enumerate(tokenizer.encode_prompts(texts)):
        if not texts[i].strip() or not ids:
            raise InputError(f"prompt {i + 1} is empty: give at least one word")
        size = len(ids)
        check_reads(model, size + max_new - 1, f"prompt {i + 1} has {size} tokens and max_new is {max_new}", control)


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
