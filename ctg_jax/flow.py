"""The stages that use controls and samples: `sample`, `fit_judge`, `evaluate`; with `ctg_jax.sources` and the `fit` of
the methods they are every experiment."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from ctg_jax import methods
from ctg_jax.control import IDENTITY, Chain, Control
from ctg_jax.decode import generate
from ctg_jax.methods import truncate
from ctg_jax.stage import Artifact, Run, open_lm, read_jsonl, write_jsonl
from ctg_jax.types import InputError, Sampling

_ROWS_PER_PROMPT = 1 << 16  # example ids: prompt * this + number of the sample, so that more samples keep the first


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
    `methods.truncate` after them, or before them with `filter_first` (the order of the DExperts paper).

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
    filters = (truncate.init(model, **filter),) if filter else ()
    return Chain((*filters, *parts) if filter_first else (*parts, *filters))


def same_lm(control: Artifact, lm: Artifact) -> None:
    """InputError where a control was fitted on another language model than `lm`."""
    fitted = control.spec.get("fingerprints", {}).get("lm")
    if fitted is not None and fitted != lm.fingerprint:
        raise InputError(
            f"{control.path.name} was fitted on another language model (fingerprint {fitted[:12]}) than "
            f"{lm.path.name} ({lm.fingerprint[:12]}): use the one it was fitted on, or fit it again"
        )


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

    Batches have one shape, so one program is compiled. A sample depends on the seed, its prompt's number and its own
    number only; an interrupted stage goes on behind its last whole batch.

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
        *opened(lm), texts, control, n=n, max_new=max_new, greedy=greedy, batch=batch, seed=seed, skip=len(rows)
    )
    bar = tqdm(total=total, initial=len(rows), desc=run.path.name, unit="sample", disable=None, leave=False)
    with open(partial, "a", encoding="utf-8") as f, bar:
        for new in batches:
            for row in new:
                if "label" in records[row["prompt_id"]]:
                    row["prompt_label"] = records[row["prompt_id"]]["label"]
            f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new))
            f.flush()
            rows += new
            bar.update(len(new))
    # The first batch waited for the compiler: it is given the pace of the others.
    later = [row["seconds"] for row in rows[min(batch, total) :]]
    for row in rows[: min(batch, total)]:
        row["seconds"] = float(np.median(later)) if later else row["seconds"]
    write_jsonl(run.path / "samples.jsonl", rows)
    partial.unlink()


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
) -> Iterator[list[dict[str, Any]]]:
    """Batches of the records of `sample`: `n` completions of each text, in order, without the first `skip`, which is
    a multiple of `batch`. All batches have one shape. Raises InputError as `check_prompts` does."""
    from ctg_jax.data.tokenizer import to_prompts

    check_prompts(model, tokenizer, texts, max_new)
    work = [(i, j) for i in range(len(texts)) for j in range(n)]
    batch = min(batch, len(work))
    length = max(map(len, tokenizer.encode(list(texts)))) + int(tokenizer.adds_bos)
    end = () if tokenizer.eos is None else (tokenizer.eos,)
    sampling = Sampling(max_new=max_new, eos=end, pad=tokenizer.pad or 0, greedy=greedy)
    for at in range(skip, len(work), batch):
        part = work[at : at + batch]
        full = part + [part[0]] * (batch - len(part))
        ids = np.asarray([i * _ROWS_PER_PROMPT + j for i, j in full])
        prompts = to_prompts(tokenizer, [texts[i] for i, _ in full], seed, ids=ids, length=length)
        started = time.monotonic()
        out = generate(model, params, prompts, control, sampling)
        tokens, mask, logp = (np.asarray(x) for x in (out.tokens, out.mask, out.logp))
        seconds = (time.monotonic() - started) / len(part)
        kept = [row[real].tolist() for row, real in zip(tokens, mask)]
        written = tokenizer.decode(kept[: len(part)])
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


def check_prompts(model, tokenizer, texts: Sequence[str], max_new: int) -> None:
    """InputError where there are no prompts, one is empty or none of its tokens can be read, or one is too long."""
    if not texts:
        raise InputError("the list of prompts is empty: give at least one prompt")
    for i, ids in enumerate(tokenizer.encode(list(texts))):
        if not texts[i].strip() or not ids:
            raise InputError(f"prompt {i + 1} is empty: give at least one word")
        if len(ids) + int(tokenizer.adds_bos) + max_new > model.context:
            raise InputError(
                f"prompt {i + 1} has {len(ids)} tokens and {max_new} new ones are asked for, but the model's context "
                f"is {model.context}: shorten the prompt or ask for fewer"
            )


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


def fit_judge(
    run: Run,
    *,
    kind: str,
    data: Artifact | None = None,
    encoder: str | None = None,
    heldout: Artifact | None = None,
    name: str = "positive",
    target: int = 1,
    reads: str = "text",
) -> None:
    """A scorer of texts, kept in state/ with its accuracy on held-out texts in metrics.jsonl.

    Args:
      kind: "oracle" (the grammar of the bundled reviews; exact), "bag" (bag of words), "probe" (linear probe on the
        sentence encoder `encoder`), or "classifier" (the imported sequence classifier `encoder`).
      data, heldout: texts with labels, to fit and to test on.
      name: what reports call it; target: the label whose probability it gives.
      reads: "text" for the continuation alone, "both" for prompt and continuation.
    """
    from ctg_jax.rewards import BagOfWords, LinearProbe, sentence_embedder

    if kind in ("bag", "probe"):
        if data is None:
            raise InputError(f"a judge of kind {kind!r} is fitted on texts with labels, and no data were given")
        rows = data.rows("data.jsonl")
        texts, labels = [r["text"] for r in rows], [r["label"] for r in rows]
        if kind == "bag":
            judge = BagOfWords.fit(texts, labels, name=name, target=target, reads=reads)
        else:
            judge = LinearProbe.fit(
                sentence_embedder(encoder), texts, labels, name=name, target=target, reads=reads, strength=1.0
            )
        judge.save(run.path / "state")
    run.record(judge={"kind": kind, "encoder": encoder, "name": name, "target": target, "reads": reads})
    judge = open_judge(Artifact(run.path, ""))
    row: dict[str, Any] = {"name": name, "version": judge.version}
    if heldout is not None:
        rows = heldout.rows("data.jsonl")
        texts, labels = [r["text"] for r in rows], np.asarray([r["label"] for r in rows])
        said = judge([""] * len(texts), texts) >= judge.threshold
        row |= {"accuracy": float(np.mean(said == (labels == target))), "heldout": len(texts)}
    run.log(**row)


@lru_cache(maxsize=4)
def open_judge(artifact: Artifact) -> Any:
    """The reward that `fit_judge` made."""
    from ctg_jax.rewards import BagOfWords, LinearProbe, SequenceClassifier, reviews_oracle, sentence_embedder

    spec = artifact.spec["judge"]
    kind, options = spec["kind"], {k: spec[k] for k in ("name", "target", "reads")}
    if kind == "oracle":
        return reviews_oracle("sentiment", **options)
    if kind == "bag":
        return BagOfWords.load(artifact.path / "state")
    if kind == "probe":
        return LinearProbe.load(artifact.path / "state", sentence_embedder(spec["encoder"]))
    if kind == "classifier":
        return SequenceClassifier.load(spec["encoder"], **options)
    raise InputError(f"kind is {kind!r}; a judge is one of oracle, bag, probe, classifier")


def evaluate(
    run: Run,
    *,
    samples: Artifact,
    judges: Sequence[Artifact] = (),
    lm: Artifact | None = None,
    lm_name: str = "base",
    seed: int = 0,
    resamples: int = 1000,
) -> None:
    """Writes the figures of one set of samples to metrics.jsonl: one row per figure with name, value, low, high, n.

    Args:
      judges: what `fit_judge` made. lm: the language model of the perplexity, `lm_name` in the report.
      seed, resamples: of the bootstrap over prompts.
    """
    from ctg_jax import evaluation

    fluency = None
    if lm is not None:
        model, params, tokenizer = open_lm(lm)
        fluency = evaluation.LMScorer(model, params, tokenizer, name=lm_name)
    rewards = [open_judge(j) for j in judges]
    figures = evaluation.evaluate(
        samples.rows("samples.jsonl"), rewards, fluency=fluency, seed=seed, resamples=resamples
    )
    run.record(
        judges={r.name: r.version for r in rewards},
        perplexity=None if fluency is None else f"{lm_name}: {evaluation.FIELD.perplexity}",
    )
    for name, figure in figures.items():
        run.log(name=name, **figure.as_json())
