"""Click (Zheng et al. 2023): the LM samples, a reward decides which samples are bad, and each bad one is made less
likely, as a whole, than a good one of the same prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax import methods, rng
from ctg_jax.learn import fitting, losses, preferences
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pool import Pool, batches, nats
from ctg_jax.learn.rounds import explored, positive_from
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function
from ctg_jax.types import Sum

init, example, neutral = fitting.delta, fitting.example_delta, fitting.neutral_delta


def loss(lm: LM, *, margin: float = 15.0, gamma: float = 0.1) -> losses.LossFn:
    """Cross-entropy of the positive, nats per token, plus gamma · max(0, margin + NLL(positive) - NLL(negative)) with
    negative log-likelihoods summed over the sequence; the mean over pairs (Zheng et al. 2023, section 2).

    params is the control, frozen = {"params": those of the LM}; the batch has `completion` (the positive) and
    `negative`, by `batches(also="negative")`. The authors' code takes the cross-entropy on texts of another
    corpus, where there is one, and over the tokens of all rows at once.

    Args:
      margin: nats by which the positive should be likelier (the authors' code: 15, for detoxification 20).
      gamma: weight of the hinge (the authors' code: 0.1 for sentiment, 0.3 for repetition, 0.5 for detoxification).
    """

    def total(params, frozen, batch, keys):
        base = frozen["params"]
        positive = nats(lm, base, batch, keys, params, "completion", "written")
        negative = nats(lm, base, batch, keys, params, "negative", "negative_written")
        gap = jnp.sum(negative, axis=1) - jnp.sum(positive, axis=1)
        hinge = jax.nn.relu(margin - gap)
        value = losses.row_mean(positive, batch["written"]) + gamma * hinge
        weight = jnp.float32(len(gap))
        metrics = {
            "cross_entropy": losses.masked_sum(positive, batch["written"]),
            "hinge": (jnp.sum(hinge), weight),
            "gap": (jnp.sum(gap), weight),
            "active": (jnp.sum(hinge > 0, dtype=jnp.float32), weight),
        }
        return Sum(jnp.sum(value), weight, metrics)

    return total


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact],
    rounds: int = 1,
    explore: Mapping[str, Any] | None = None,
    pool: str = "all",
    threshold: float | str = "judge",
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Rounds of explore → score → pair → learn; one, from the frozen model, is the paper's first iteration.

    Args:
      lm: the language model. data: prompts. rewards: the first decides what is positive.
      rounds: how many. explore: settings of `ctg_jax.stages.sampling.sample`, such as n and max_new.
      pool: "all" pairs the samples of all rounds, "last" those of the last.
      threshold: reward from which a sample is positive; "judge": the reward's own, "median": that of the pool.
      seed: of samples and of training. settings: of the stage `click`.

    Raises:
      InputError: no reward, another `pool`, rounds below 1, and what the stages raise.
    """
    check_settings(click, settings)
    limit = positive_from(threshold, rewards)
    given = dict(lm=lm, data=data, rewards=rewards, explore=explore, pool=pool, seed=seed)
    for turn in explored(root, rounds, **given):
        own = settings | {"seed": turn.seed, "threshold": limit}
        turn.proposal = stage(root, click, own, lm=lm, pool=turn.pools, start_from=turn.proposal)
    return turn.proposal


@stage_function("click")
def click(
    run: Run,
    *,
    lm: Artifact,
    pool: Sequence[Artifact],
    start_from: Artifact | None = None,
    threshold: float | str = "median",
    pair: str = "below",
    margin: float = 15.0,
    gamma: float = 0.1,
    adapter: Adapter = Adapter(),
    training: Training = Training(),
    seed: int = 0,
) -> None:
    """Stage: one round of learning from the pairs of a pool.

    Args:
      pool: rounds of samples, by `experience.score`. start_from: the control of the round before, or None.
      threshold: a number, or "median" of the rewards.
      pair: see `preferences.next_below`; likelihood is that under the frozen model.
      margin, gamma: of the loss. adapter: the change of weights.
      training: how it is trained, with pairs as rows; each round has a new optimizer, unless `training.rounds` is above
        1.
      seed: of initial values, batches and training.

    Raises:
      InputError: no pair, and what `next_below`, `init` and training raise.
    """
    samples = Pool.open(pool)
    rewards = samples.column("reward")
    limit = samples.threshold(threshold)
    given = (rewards, samples.column("base"), samples.column("prompt_id"))
    good, bad = preferences.next_below(*given, threshold=limit, pair=pair)
    run.record(pairs={"threshold": limit, "pairs": len(bad), "positives": int((rewards >= limit).sum())})
    model, params, tokenizer = open_lm(lm)
    key = rng.stream(jax.random.key(seed), "init")
    control = init(model, key, **vars(adapter)) if start_from is None else methods.load(start_from, model)
    records = samples.take(good).with_(negative=samples.column("tokens")[bad])
    rows = batches(records, tokenizer, batch=training.batch, seed=seed, also="negative")
    control = fitting.train(
        run, control, loss(model, margin=margin, gamma=gamma), {"params": params}, rows, training.at(adapter.rate),
        trained=r"changes/.*", seed=seed, start_from=start_from,
    )  # fmt: skip
    fitting.keep(run, control, "click", vars(adapter))
