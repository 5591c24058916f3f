"""Learning from preferences: of two texts after one prompt the better becomes likelier than the other, measured against
a reference. DPO (Rafailov et al. 2023), IPO (Azar et al. 2024), SPIN (Chen et al. 2024), iREPO (Le et al. 2024) and
FIGA (Guo et al. 2024) are settings of one loss and of where the pairs come from.

    m = β [(log π(y⁺) - log ref(y⁺)) - (log π(y⁻) - log ref(y⁻))]

| method | `against` | `reference` | `objective` |
|---|---|---|---|
| DPO | "samples", or "data" | "base" | kind="logistic" |
| IPO | "samples", or "data" | "base" | kind="squared", β = τ |
| SPIN | "human" | "last" | kind="logistic" |
| iREPO | "samples" | "last" | kind="squared", target="difference" |
| FIGA | "samples", or "human" | not read | kind="edits" |

In one round with target="difference" the optimum of DPO and of iREPO is ref · exp(r / (temperature · β)) / Z, that of
SPIN ref · (p / q)^(1/β) / Z, with p what people write and q what is sampled. As β multiplies log-ratios of whole texts,
.1 holds texts of 20 tokens only loosely. Both texts of a pair can become less likely: `better` and `worse` in
metrics.jsonl say by how many nats each has changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import evaluation, methods, rng
from ctg_jax.control import IDENTITY
from ctg_jax.data.completions import continuations
from ctg_jax.data.messages import prompt_of
from ctg_jax.learn import fitting, losses, preferences
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.improving import improving
from ctg_jax.learn.pool import Pool, batches, nats
from ctg_jax.learn.rounds import explored
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function
from ctg_jax.stages import judges
from ctg_jax.types import InputError, Sum

KINDS = ("logistic", "squared", "hinge", "edits")
TARGETS = ("hard", "difference")
AGAINST = ("samples", "human", "data")
REFERENCES = ("base", "last")

init, example, neutral = fitting.delta, fitting.example_delta, fitting.neutral_delta


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss, and which pairs it learns from: the section `objective`.

    Attributes:
      kind: "logistic", -log σ(m), of which a soft target p makes p (-log σ(m)) + (1 - p) (-log σ(-m)); "squared",
        (m - target)²; "hinge", max(0, 1 - m); "edits", FIGA's loss of single tokens, see `loss`.
      target: "hard", the better text is better: 1 for "logistic" and 1/2 for "squared"; "difference", as much as its
        reward is higher, Δr / temperature, or its logistic function.
      temperature: of "difference".
      beta: β. IPO's τ is β too, since (m - 1/2)² = τ² (h - 1/(2τ))² for the difference h of log-ratios.
      anchor: weight of the next-token loss of the better text, nats per token.
      least: of two samples the rewards differ by more than this. most: pairs of a prompt, the furthest first; None:
        as many as its samples make.
      negative: of "edits": weight of the tokens that were removed. limit: nats above which such a token is left alone.
      alpha, similarity: of "edits" on samples, the weights of gain and likeness; see `learn.improving.law`.
    """

    kind: str = "logistic"
    target: str = "hard"
    temperature: float = 1.0
    beta: float = 0.1
    anchor: float = 0.0
    least: float = 0.0
    most: int | None = None
    negative: float = 0.5
    limit: float = 0.6
    alpha: float = 1.0
    similarity: float = 1.0

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("target", TARGETS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}.")
        for name in ("beta", "temperature"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number.")
        if self.target == "difference" and self.kind not in ("logistic", "squared"):
            raise InputError(f"target is 'difference', which kind {self.kind!r} does not read: take 'hard'.")

    def targets(self, gaps: np.ndarray) -> np.ndarray:
        """float32 [P], what m or its logistic function should be for rewards that differ by gaps [P]."""
        soft = np.asarray(gaps, np.float64) / self.temperature
        if self.target == "hard":
            soft = np.full(len(soft), np.inf if self.kind == "logistic" else 0.5)
        return (np.exp(-np.logaddexp(0, -soft)) if self.kind == "logistic" else soft).astype(np.float32)


def loss(lm: LM, objective: Objective = Objective()) -> losses.LossFn:
    """The mean over pairs of the loss of `objective`.

    params is the control, frozen = {"params": those of the LM}; the batch has `completion` (the better text) and
    `other`, by `batches(also="other")`, and `reference`, `other_reference`, log-probabilities of both texts under the
    reference, and `target`, float32 [B] each.

    With "edits" it has `new` and `removed`, bool [B, N], in their place: the mean over these tokens of -log p of the
    new ones and `negative` · log p of those removed whose -log p is at most `limit` (Guo et al. 2024, eq. 5 and the
    authors' code; without the limit it has no minimum).
    """
    o = objective

    def both(params, frozen, batch, keys):
        sides = (("completion", "written"), ("other", "other_written"))
        return [nats(lm, frozen["params"], batch, keys, params, *side) for side in sides]

    def pairs(params, frozen, batch, keys):
        better, worse = both(params, frozen, batch, keys)
        up = -jnp.sum(better, axis=1) - batch["reference"]
        down = -jnp.sum(worse, axis=1) - batch["other_reference"]
        m, target = o.beta * (up - down), batch["target"]
        if o.kind == "logistic":
            value = target * jax.nn.softplus(-m) + (1 - target) * jax.nn.softplus(m)
        else:
            value = jnp.square(m - target) if o.kind == "squared" else jax.nn.relu(1 - m)
        if o.anchor:
            value = value + o.anchor * losses.row_mean(better, batch["written"])
        weight = jnp.float32(len(m))
        metrics = {"margin": m, "accuracy": (m > 0).astype(jnp.float32), "better": up, "worse": down}
        return Sum(jnp.sum(value), weight, {name: (jnp.sum(x), weight) for name, x in metrics.items()})

    def edited(params, frozen, batch, keys):
        revised, initial = both(params, frozen, batch, keys)
        near = jax.lax.stop_gradient(initial) <= o.limit
        new, removed = batch["new"] & batch["written"], batch["removed"] & batch["other_written"] & near
        (up, some), (down, others) = losses.masked_sum(revised, new), losses.masked_sum(initial, removed)
        metrics = {"new": (up, some), "removed": (down, others)}
        return Sum(up - o.negative * down, some + (others if o.negative else 0.0), metrics)

    return edited if o.kind == "edits" else pairs


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact] = (),
    rounds: int = 1,
    explore: Mapping[str, Any] | None = None,
    pool: str = "last",
    against: str = "samples",
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Rounds of explore → score → pair → learn, each from the samples of the policy as it is.

    Args:
      lm: the language model.
      data: prompts; with "human" their texts as well, see `ctg_jax.data.completions.continuations`; with "data" records
        with a prompt, `chosen` and `rejected`, from which one round learns without samples.
      rewards: the first ranks samples; "human" and "data" need none.
      rounds: how many. explore: settings of `ctg_jax.stages.sampling.sample`, such as n and max_new.
      pool: "all" pairs the samples of all rounds, "last" those of the last.
      against: where pairs come from, "samples", "human" (a human text is better than a sample) or "data".
      seed: of samples and of training. settings: of the stage `preference`.

    Raises:
      InputError: another `against` or `pool`, no reward for "samples", more than one round for "data".
    """
    check_settings(preference, settings)
    if against not in AGAINST:
        raise InputError(f"against is {against!r}, expected one of {', '.join(AGAINST)}.")
    settings = settings | {"against": against}
    if against == "data":
        if rounds != 1:
            raise InputError(f"rounds is {rounds}, but the pairs of data are learned from once: set it to 1.")
        return stage(root, preference, settings | {"seed": rng.derived_seed(seed, "learn", 0)}, lm=lm, data=data)
    if against == "samples" and not rewards:
        raise InputError("no reward was given, which ranks samples: expected at least one scorer")
    if not rewards:
        rewards = [stage(root, judges.fit_judge, {"kind": "diversity", "name": "diversity"})]
    texts = {"data": data} if against == "human" else {}
    given = dict(lm=lm, data=data, rewards=rewards, explore=explore, pool=pool, seed=seed)
    for turn in explored(root, rounds, **given):
        inputs = dict(lm=lm, pool=turn.pools, start_from=turn.proposal) | texts
        turn.proposal = stage(root, preference, settings | {"seed": turn.seed}, **inputs)
    return turn.proposal


@stage_function("preference")
def preference(
    run: Run,
    *,
    lm: Artifact,
    pool: Sequence[Artifact] = (),
    data: Artifact | None = None,
    start_from: Artifact | None = None,
    against: str = "samples",
    reference: str = "base",
    objective: Objective = Objective(),
    adapter: Adapter = Adapter(),
    training: Training = Training(),
    seed: int = 0,
) -> None:
    """Stage: one round of learning from pairs.

    Args:
      pool: rounds of samples, by `experience.score`. data: human texts, or pairs, cut to the `tokens` of `training`.
      start_from: the control of the round before, or None. against: see `fit`.
      reference: "base", the frozen model; "last", the control of the round before.
      objective: of the loss. adapter: the change of weights. training: how it is trained, with pairs as rows.
      seed: of initial values, pairs, batches and training.

    Raises:
      InputError: another `reference`, no pair, and what `init` and training raise.
    """
    if reference not in REFERENCES:
        raise InputError(f"reference is {reference!r}, expected one of {', '.join(REFERENCES)}.")
    model, params, tokenizer = open_lm(lm)
    rows, gaps = paired(pool, data, tokenizer, against, objective, training.tokens, seed)
    run.record(pairs=len(rows))
    heads = tokenizer.encode_prompts([prompt_of(row) for row in rows])
    sides = [[list(row[name]) for row in rows] for name in ("tokens", "other")]
    key = rng.stream(jax.random.key(seed), "init")
    control = init(model, key, **vars(adapter)) if start_from is None else methods.load(start_from, model)
    if objective.kind == "edits":
        fields = dict(zip(("removed", "new"), changed(*sides[::-1], tokenizer.ends)))
    else:
        against_what = control if reference == "last" and start_from is not None else IDENTITY
        found = [
            evaluation.log_probabilities(model, params, tokenizer, heads, side, against_what, batch=training.batch)
            for side in sides
        ]
        fields = dict(zip(("reference", "other_reference"), found)) | {"target": objective.targets(gaps)}
    rows = [row | {name: values[i] for name, values in fields.items()} for i, row in enumerate(rows)]
    options = dict(batch=training.batch, seed=seed, fields=tuple(fields), also="other")
    control = fitting.train(
        run, control, loss(model, objective), {"params": params}, batches(rows, tokenizer, **options),
        training.at(adapter.rate), trained=r"changes/.*", seed=seed, start_from=start_from,
    )  # fmt: skip
    fitting.keep(run, control, "preference", vars(adapter))


def paired(
    pool: Sequence[Artifact], data: Artifact | None, tokenizer: Any, against: str, objective: Objective,
    length: int, seed: int,
) -> tuple[list[dict[str, Any]], np.ndarray]:  # fmt: skip
    """(records with `tokens`, the better text, and `other`; how much higher its reward is, float64 [P]).

    Args:
      against: as for `fit`. length: tokens of a text of `data`, at most. seed: of the draws of `improving`.

    Raises:
      InputError: no pair; a `preference` of a record that is not between 0 and 1.
    """
    if against == "data":
        rows = preferences.given(data, tokenizer, length)
        shares = np.asarray([row.get("preference", np.nan) for row in rows], float)
        if objective.target == "difference" and not ((shares > 0) & (shares < 1)).all():
            raise InputError(
                "target is 'difference', for which every record needs `preference`, the share of judges, between 0 and "
                "1, who prefer its chosen text"
            )
        soft = objective.target == "difference"
        gaps = np.log(shares / (1 - shares)) * objective.temperature if soft else np.ones(len(rows))
        return [row | {"other": row["rejected"]} for row in rows], gaps
    samples = Pool.open(pool)
    own, prompts = samples.column("tokens"), samples.column("prompt_id")
    if against == "human":
        human = continuations(data.rows("data.jsonl"), tokenizer, length)
        keep = [i for i in range(len(own)) if list(own[i]) != human[prompts[i]]]
        if not keep:
            raise InputError(
                f"each of the {len(own)} samples is the human text of its prompt: nothing is left to learn."
            )
        return [samples[i] | {"tokens": human[prompts[i]], "other": list(own[i])} for i in keep], np.ones(len(keep))
    rewards = samples.column("reward")
    if objective.kind == "edits":
        worse, better = improving(
            rewards, prompts, lambda i, j: preferences.likeness(own[i], own[j]),
            alpha=objective.alpha, beta=objective.similarity, seed=seed,
        )  # fmt: skip
    else:
        better, worse = preferences.ranked(rewards, prompts, least=objective.least, most=objective.most)
    rows = [samples[int(a)] | {"other": list(own[b])} for a, b in zip(better, worse)]
    return rows, rewards[better] - rewards[worse]


def changed(before: Sequence, after: Sequence, ends: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(removed, new), bool [P, N] each: `preferences.edits` of each pair of texts, padded to the longest of all. The
    end token of the text after counts as new."""
    size = max(map(len, [*before, *after]))
    out = np.zeros((2, len(before), size), bool)
    for i, (a, b) in enumerate(zip(before, after)):
        removed, new = preferences.edits(a, b)
        out[0, i, : len(a)], out[1, i, : len(b)] = removed, new
        if len(b) and b[-1] in ends:
            out[1, i, len(b) - 1] = True
    return out[0], out[1]
