"""A second model that revises what the first one wrote: Self-Correct (Welleck et al. 2023) and LMCor (Vernikos et al.
2024).

Self-Correct (`kind="correct"`): samples of the frozen model are scored, and each is paired with better ones of the same
prompt, drawn ∝ exp(alpha (v' - v) + beta s), v their rewards and s their likeness, which is 1 minus the edit distance
of their words over the longer one. A change of weights learns to write the better text behind a prompt that holds the
worse one. In each later round the corrector revises the samples, and what it wrote joins the pool. The optimum of a
round is the law of the pairs.

LMCor (`kind="combine"`): behind a prompt that holds several samples of the frozen model, in a random order, the
corrector learns the text that a person wrote after that prompt.

A corrector acts on prompts that hold drafts: `learn.revision.corrected` makes them, draws from it, and puts the
original prompts back. As a control on other prompts it is a change of weights like LoRA. It reads prompt and draft
again, so a revision costs two to three samples.

Differences from the papers: likeness and template are not those of the authors, who choose them for each task; a share
`keep` of pairs of a best text with itself teaches the corrector to leave good texts alone; no feedback is read. For
LMCor the samples must be of texts that the frozen model was not fitted on, else they are better than those at test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ctg_jax import methods, rng
from ctg_jax.data.completions import continuations
from ctg_jax.learn import experience, fitting, losses
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.improving import improving
from ctg_jax.learn.pool import Pool, batches, nats
from ctg_jax.learn.preferences import likeness
from ctg_jax.learn.revision import TEMPLATE, corrected, filled, groups
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function
from ctg_jax.stages import sampling
from ctg_jax.types import InputError, Sum

KINDS = ("correct", "combine")

init, example, neutral = fitting.delta, fitting.example_delta, fitting.neutral_delta


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What the corrector learns from: the section `pairs` of a configuration.

    Attributes:
      alpha, beta: the weights of gain and likeness; see `learn.improving.law`.
      draws: corrections of each text that can be improved. keep: see `learn.improving.improving`.
      drafts: samples that a prompt of LMCor holds.
      template: of the corrector's prompts, see `learn.revision.filled`.
    """

    alpha: float = 1.0
    beta: float = 1.0
    draws: int = 1
    keep: float = 0.1
    drafts: int = 5
    template: str = TEMPLATE


def loss(lm: LM) -> losses.LossFn:
    """-log p(y' | template) per token of the completions. params is the control, frozen = {"params": those of the
    LM}."""

    def total(params, frozen, batch, keys):
        each = nats(lm, frozen["params"], batch, keys, params, "completion", "written")
        return Sum(*losses.masked_sum(each, batch["written"]))

    return total


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact] = (),
    kind: str = "correct",
    rounds: int = 2,
    explore: Mapping[str, Any] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Draws samples, and trains a corrector on them.

    Args:
      lm: the language model. data: prompts; for "combine" also what people wrote after them.
      rewards: the first is learned from by "correct"; "combine" reads none.
      kind: "correct" or "combine".
      rounds: of "correct"; all but the first begin with revisions of the samples by the corrector as it is.
      explore: settings of `sample`, such as n, the samples of each prompt. seed: of all rounds.
      settings: of the stage `correct`.

    Raises:
      InputError: an unknown kind, rounds below 1, "correct" without a reward, and what the stages raise.
    """
    check_settings(correct, settings)
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}, expected 'correct' or 'combine'.")
    if rounds < 1:
        raise InputError(f"rounds is {rounds}, expected at least 1.")
    if kind == "correct" and not rewards:
        raise InputError("no reward was given: a corrector of kind 'correct' learns from one; give rewards.")
    drawn = {"n": 10 if kind == "correct" else 5, **(explore or {}), "seed": rng.derived_seed(seed, "explore")}
    samples = stage(root, sampling.sample, drawn, lm=lm, prompts=data)
    if kind == "combine":
        return stage(root, correct, settings | {"seed": seed}, lm=lm, samples=samples, data=data)
    more = {key: value for key, value in drawn.items() if key not in ("n", "seed")}
    template = dict(settings.get("pairs") or {}).get("template", TEMPLATE)
    pools, learned = [], None
    for number in range(rounds):
        found = samples
        if learned is not None:
            again = {**more, "template": template, "seed": rng.derived_seed(seed, "revise", number)}
            found = corrected(root, lm=lm, corrector=learned, samples=samples, **again)
        pools.append(stage(root, experience.score, {"round": number}, samples=found, rewards=list(rewards), lm=lm))
        own = settings | {"seed": rng.derived_seed(seed, "correct", number)}
        learned = stage(root, correct, own, lm=lm, pool=list(pools), start_from=learned)
    return learned


@stage_function("correct")
def correct(
    run: Run,
    *,
    lm: Artifact,
    pool: Sequence[Artifact] = (),
    samples: Artifact | None = None,
    data: Artifact | None = None,
    start_from: Artifact | None = None,
    pairs: Pairs = Pairs(),
    adapter: Adapter = Adapter(),
    training: Training = Training(steps=200, batch=16, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: trains a corrector on pairs of a pool, or on samples and what people wrote.

    Args:
      pool: what `experience.score` made in each round; or else
      samples, data: samples of the prompts in `data`, and these records.
      start_from: the corrector of the round before.
      pairs: how pairs are made. adapter: the change of weights. training: how it is trained.
      seed: of pairs, initial values and batches.

    Raises:
      InputError: no text has a better one, a prompt of conversations, and what `filled` and training raise.
    """
    model, params, tokenizer = open_lm(lm)
    made = vars(adapter)
    key = rng.stream(jax.random.key(seed), "init")
    control = init(model, key, **made) if start_from is None else methods.load(start_from, model)
    if pool:
        rows = improved(Pool.open(pool), tokenizer, pairs, seed)
    else:
        rows = combined(samples, data, tokenizer, pairs, seed)
    control = fitting.train(
        run, control, loss(model), {"params": params}, batches(rows, tokenizer, batch=training.batch, seed=seed),
        training.at(adapter.rate), trained=r"changes/.*", seed=seed, start_from=start_from,
    )  # fmt: skip
    run.record(pairs=len(rows))
    fitting.keep(run, control, "correct", made)


def improved(samples: Pool, tokenizer: Any, pairs: Pairs, seed: int = 0) -> list[dict[str, Any]]:
    """Records of a corrector's prompt and of the better text's tokens behind it, with its end where it ended."""
    if any(not isinstance(p, str) for p in samples.prompts()):
        raise InputError("the samples are of conversations, and only texts are corrected: use prompts of text")
    prompts, texts, tokens = (samples.column(name) for name in ("prompt", "text", "tokens"))
    words = [text.split() for text in texts]
    first, second = improving(
        samples.column("reward"), samples.column("prompt_id"), lambda i, j: likeness(words[i], words[j]),
        alpha=pairs.alpha, beta=pairs.beta, draws=pairs.draws, keep=pairs.keep, seed=seed,
    )  # fmt: skip
    heads = [filled(pairs.template, prompts[i], [texts[i]]) for i in first]
    ends = [[t for t in list(tokens[j])[-1:] if int(t) in tokenizer.ends] for j in second]
    tails = tokenizer.encode_after(heads, [texts[j] for j in second])
    rows = [{"prompt": head, "text": head, "tokens": [*tail, *end]} for head, tail, end in zip(heads, tails, ends)]
    return [row for row in rows if row["tokens"]]


def combined(samples: Artifact, data: Artifact, tokenizer: Any, pairs: Pairs, seed: int = 0) -> list[dict[str, Any]]:
    """Records of prompts that hold several samples and of what people wrote after the original ones, cut to the length
    of the longest sample in tokens."""
    rows, records = samples.rows("samples.jsonl"), data.rows("data.jsonl")
    most = max(len(row["tokens"]) for row in rows)
    written = continuations(records, tokenizer, most)
    made = []
    for group in groups(rows, pairs.drafts, seed):
        drafts = [rows[i] for i in group]
        head = filled(pairs.template, drafts[0]["prompt"], [draft["text"] for draft in drafts])
        made.append({"prompt": head, "text": head, "tokens": written[drafts[0]["prompt_id"]]})
    return made
