"""Texts revised by a second model: prompts that hold drafts, what is written after them, and the original prompts
again, so that judges read the revised texts as they read the drafts."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax import rng
from ctg_jax.data.messages import has_messages
from ctg_jax.run.stage import Artifact, Run, stage, stage_function, write_jsonl
from ctg_jax.stages import sampling
from ctg_jax.types import InputError

TEMPLATE = "{drafts}\n=>{prompt}"
_FIELDS = ("drafts", "prompt")


def filled(template: str, prompt: str, texts: Sequence[str]) -> str:
    """The prompt that holds drafts: {drafts} is each of them behind its prompt, in lines of their own.

    Raises:
      InputError: a template without {drafts}, or with a field that is none of {drafts} and {prompt}.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as e:
        raise InputError(f"template {template!r} is malformed ({e}): write {{drafts}} and {{prompt}}") from None
    if unknown := [name for name in fields if name not in _FIELDS]:
        raise InputError(f"template {template!r} names {unknown[0]!r}, expected {{drafts}} and {{prompt}}")
    if "drafts" not in fields:
        raise InputError(f"template {template!r} lacks {{drafts}}: the model would not see what it is to revise")
    return template.format(drafts="\n".join(prompt + text for text in texts), prompt=prompt)


@stage_function("revise")
def revise(run: Run, *, samples: Artifact, template: str = TEMPLATE, drafts: int = 1, seed: int | None = None) -> None:
    """Stage: writes data.jsonl, a prompt for the corrector for every `drafts` samples of a prompt, with the rows of
    these samples under `of`.

    Args:
      samples: what a stage wrote to samples.jsonl. template: see `filled`.
      drafts: samples that one prompt holds. seed: of their order; None: as they are.

    Raises:
      InputError: samples of conversations, a number of drafts that does not divide that of the samples of a prompt, and
        what `filled` raises.
    """
    rows = samples.rows("samples.jsonl")
    if any(map(has_messages, rows)):
        raise InputError(f"{samples.path.name} holds conversations, and only texts are revised: use prompts of text")
    made = [
        {"prompt": head, "text": head, "of": group}
        for group in groups(rows, drafts, seed)
        for head in [filled(template, rows[group[0]]["prompt"], [rows[i]["text"] for i in group])]
    ]
    write_jsonl(run.path / "data.jsonl", made)
    run.record(records=len(made))


def groups(rows: Sequence[Mapping[str, Any]], size: int, seed: int | None = None) -> list[list[int]]:
    """The places of the samples of each prompt, `size` at a time, in the order of the seed where there is one.

    Raises:
      InputError: size below 1, or one that does not divide the number of samples of a prompt.
    """
    of: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        of.setdefault(row["prompt_id"], []).append(i)
    if size < 1 or any(len(places) % size for places in of.values()):
        raise InputError(f"drafts is {size}, expected a divisor of {len(next(iter(of.values())))}, the samples of each")
    found = [places[k : k + size] for places in of.values() for k in range(0, len(places), size)]
    if seed is not None:
        generator = np.random.default_rng(seed)
        found = [[group[i] for i in generator.permutation(size)] for group in found]
    return found


@stage_function("restored")
def restored(run: Run, *, lm: Artifact, samples: Artifact, prompts: Artifact, revised: Artifact) -> None:
    """Stage: writes samples.jsonl, what `revised` holds behind the prompts of `samples`; `prompts` is what `revise`
    made of these, and `lm` what wrote them. `sample` counts the revised texts of a prompt, and `draft` is the first
    text that each was made of.
    """
    rows, heads, out, count = samples.rows("samples.jsonl"), prompts.rows("data.jsonl"), [], {}
    for row in revised.rows("samples.jsonl"):
        of = rows[heads[row["prompt_id"]]["of"][0]]
        number = count[of["prompt_id"]] = count.get(of["prompt_id"], -1) + 1
        out.append({**of, **row, "prompt_id": of["prompt_id"], "prompt": of["prompt"], "sample": number})
        out[-1]["draft"] = of["text"]
    write_jsonl(run.path / "samples.jsonl", out)
    run.record(likelihood=True, filter={})


def corrected(
    root: Any,
    *,
    lm: Artifact,
    corrector: Artifact,
    samples: Artifact,
    turns: int = 1,
    drafts: int = 1,
    template: str = TEMPLATE,
    strength: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """The samples after `turns` revisions by a corrector; with 0, the samples themselves.

    Args:
      samples: the first texts. turns: revisions, each of what the one before wrote; with several drafts only one.
      drafts, template: see `revise`. strength: of the corrector. seed: each turn draws with a seed of its own.
      settings: of `stages.sampling.sample`, such as max_new.

    Raises:
      InputError: turns below 0, or several turns with several drafts.
    """
    if turns < 0 or (turns > 1 and drafts > 1):
        raise InputError(f"turns is {turns} with {drafts} drafts, expected at least 0, and at most 1 of several.")
    for turn in range(turns):
        prompts = stage(root, revise, {"template": template, "drafts": drafts}, samples=samples)
        drawn = {**settings, "n": 1, "seed": rng.derived_seed(seed, "revision", turn), "strengths": [strength]}
        written = stage(root, sampling.sample, drawn, lm=lm, prompts=prompts, controls=[corrector])
        samples = stage(root, restored, {}, lm=lm, samples=samples, prompts=prompts, revised=written)
    return samples
