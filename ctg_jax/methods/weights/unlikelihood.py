"""Unlikelihood training against repetition: of tokens, of sequences (Welleck et al. 2020), and with a policy gradient
(implicit unlikelihood, Lagutin et al. 2021); weights choose among them.

Every update sees a human continuation of a prompt and, where a term needs it, the model's own continuation of the same
prompt. The samples are those of the round, not of the update as in the papers: many short rounds come closest to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import methods, rng
from ctg_jax.control import Chain
from ctg_jax.data.completions import continuations
from ctg_jax.data.messages import unanswered
from ctg_jax.learn import calibrate, fitting, losses
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pool import Pool, batches, check_drawn, drawing_filter, log_probabilities, read, repeats
from ctg_jax.learn.rounds import explored
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run.identity import section
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function
from ctg_jax.stages import judges
from ctg_jax.types import InputError, Sum

init, example, neutral = fitting.delta, fitting.example_delta, fitting.neutral_delta


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the terms of `loss`, and the length of its n-grams: the section `objective`.

    Attributes:
      greedy: whether the policy may learn from greedy samples, as that of the authors' code does by default. Its
        gradient is then not that of the expected reward.
    """

    likelihood: float = 1.0
    token: float = 1.0
    sequence: float = 0.0
    policy: float = 0.0
    ngram: int = 4
    greedy: bool = False

    @property
    def sampled(self) -> bool:
        """Whether a term learns from the model's own samples."""
        return bool(self.sequence or self.policy)


def loss(lm: LM, objective: Objective = Objective()) -> losses.LossFn:
    """The mean over rows of a weighted sum of four terms, each the mean over the tokens of its continuation:

    likelihood   -log p of the human continuation
    token        -Σ log(1 - p(c)) over all earlier tokens c of prompt and human continuation (Welleck et al. 2020, eq.
                 4-5)
    sequence     -log(1 - p) of the own tokens that are part of an n-gram that the continuation held before, the prompt
                 not counted (eq. 7-8)
    policy       -advantage · log p of the own continuation (REINFORCE). `w`, by which a sample is less likely per token
                 than when it was drawn, at most 1, multiplies it: what is forgotten already is pushed no further

    params is the control, frozen = {"params": those of the LM, "filter": what samples were drawn under after `params`,
    optional}; the batch has `completion` (own), `human` and, for the policy, `advantage` and `drawn` (the
    log-probability of the sample when it was drawn), float32 [B]. In the policy term p is what draws, filter included.

    Raises:
      InputError: a negative weight, no positive one, or n-grams below one token.
    """
    likelihood, token, sequence, policy, ngram, _ = dataclasses.astuple(objective)
    weights = dict(likelihood=likelihood, token=token, sequence=sequence, policy=policy)
    if min(weights.values()) < 0 or not any(weights.values()):
        raise InputError(f"the weights are {weights}: expected none below 0 and at least one above it.")
    if ngram < 1:
        raise InputError(f"ngram is {ngram}, expected at least 1 token.")

    def total(params, frozen, batch, keys):
        terms = {}
        if likelihood or token:
            human = batch | {"completion": batch["human"], "written": batch["human_written"]}
            text, target = read(lm, frozen["params"], human, keys, params), human["completion"]
            if token:
                earlier, allowed = repeats(human)

                def pair(z, target, allowed):
                    return losses.next_token(z, target), losses.unlikelihood(z, earlier, allowed)

                nll, repeated = reduced(text, pair, target, allowed)
                terms["token"] = losses.row_mean(repeated, human["written"])
            else:
                nll = reduced(text, losses.next_token, target)
            terms["likelihood"] = losses.row_mean(nll, human["written"])
        if sequence or policy:
            own, real = batch["completion"], batch["written"]
            if sequence:
                text = read(lm, frozen["params"], batch, keys, params)
                itself = jnp.eye(own.shape[1], dtype=bool)[None] & losses.repeated(own, real, ngram)[:, :, None]
                again = reduced(text, lambda z, allowed: losses.unlikelihood(z, own, allowed), itself)
                terms["sequence"] = losses.row_mean(again, real)
            if policy:
                drawing = Chain((params, frozen["filter"])) if "filter" in frozen else params
                text = read(lm, frozen["params"], batch, keys, drawing)
                logp = -losses.row_mean(reduced(text, losses.next_token, own), real)
                drawn = batch["drawn"] / jnp.maximum(jnp.sum(real, axis=1), 1)
                w = jax.lax.stop_gradient(jnp.minimum(jnp.exp(logp - drawn), 1.0))
                terms["policy"] = -batch["advantage"] * w * logp
        value = sum(weights[name] * rows for name, rows in terms.items())
        count = jnp.float32(len(value))
        return Sum(jnp.sum(value), count, {name: (jnp.sum(rows), count) for name, rows in terms.items()})

    return total


def advantages(rewards: Sequence[float], prompts: Sequence[int]) -> np.ndarray:
    """float64 [n]: each reward minus the mean of its prompt, or of all where a prompt has one sample; over the
    deviation of all that, so that a weight means the same for every reward. 0 where all rewards are equal."""
    rewards, prompts = calibrate.finite(rewards), np.asarray(prompts)
    _, at, count = np.unique(prompts, return_inverse=True, return_counts=True)
    mean = np.bincount(at, rewards) / count
    out = rewards - np.where(count > 1, mean, rewards.mean())[at]
    return out / out.std() if out.std() > 0 else out


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact] = (),
    rounds: int = 1,
    explore: Mapping[str, Any] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Rounds of explore → score → learn; nothing is sampled where neither `sequence` nor `policy` has a weight.

    Args:
      lm: the language model. data: texts and their prompts, see `ctg_jax.data.completions.continuations`.
      rewards: the policy learns from the first; without any, it is the diversity of 3-grams.
      rounds: how many. explore: settings of `ctg_jax.stages.sampling.sample`.
      seed: of samples and of training. settings: of the stage `unlikelihood`.

    Raises:
      InputError: rounds below 1, or a policy gradient of greedy samples.
    """
    check_settings(unlikelihood, settings)
    objective = section(Objective(), settings.get("objective"), "objective of unlikelihood")
    if objective.policy and not objective.greedy:
        check_drawn(explore or {}, "policy", None)
    if objective.sampled and not rewards:
        rewards = [stage(root, judges.fit_judge, {"kind": "diversity", "name": "diversity"})]
    given = dict(lm=lm, data=data)
    more = dict(rewards=rewards, explore=explore, sampled=objective.sampled, seed=seed)
    for turn in explored(root, rounds, **given, **more):
        own = settings | {"seed": turn.seed}
        turn.proposal = stage(root, unlikelihood, own, **given, pool=turn.pools, start_from=turn.proposal)
    return turn.proposal


@stage_function("unlikelihood")
def unlikelihood(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    pool: Sequence[Artifact] = (),
    start_from: Artifact | None = None,
    objective: Objective = Objective(),
    length: int = 64,
    adapter: Adapter = Adapter(),
    training: Training = Training(),
    seed: int = 0,
) -> None:
    """Stage: one round of learning from texts and, where a term needs them, own samples of their prompts.

    Args:
      data: see `fit`. pool: the samples of the round, by `experience.score`. start_from: as for `quark`.
      objective: of the loss. length: tokens of a human continuation.
      adapter: the change of weights. training: how it is trained.
      seed: of initial values, batches and training.

    Raises:
      InputError: no samples for a term that needs them, greedy ones for the policy, and what `loss`, `continuations`
        and training raise.
    """
    model, params, tokenizer = open_lm(lm)
    value = loss(model, objective)
    key = rng.stream(jax.random.key(seed), "init")
    control = init(model, key, **vars(adapter)) if start_from is None else methods.load(start_from, model)
    frozen = {"params": params}
    records = data.rows("data.jsonl")
    human = continuations(records, tokenizer, length)
    if objective.sampled:
        if not pool:
            raise InputError("sequence and policy learn from the model's own samples, and the pool is empty.")
        samples = Pool.open(pool)
        at = samples.column("prompt_id")
        tails = np.empty(len(at), object)
        tails[:] = [human[i] for i in at]
        samples = samples.with_(human=tails)
        if objective.policy:
            for part in pool if not objective.greedy else ():
                check_drawn(part.spec["drawn"], "policy", None)
            frozen["filter"] = drawing_filter(pool, model)
            drawing = Chain((control, frozen["filter"]))
            drawn = log_probabilities(model, params, samples, tokenizer, drawing, batch=training.batch)
            samples = samples.with_(advantage=advantages(samples.column("reward"), at), drawn=drawn)
    else:
        samples = [{"prompt": r["text"], **unanswered(r), "tokens": t, "human": t} for r, t in zip(records, human)]
    fields = ("advantage", "drawn") if objective.policy else ()
    rows = batches(samples, tokenizer, batch=training.batch, seed=seed, fields=fields, also="human")
    control = fitting.train(
        run, control, value, frozen, rows, training.at(adapter.rate), trained=r"changes/.*", seed=seed,
        start_from=start_from,
    )  # fmt: skip
    fitting.keep(run, control, "unlikelihood", vars(adapter))
