"""PPO with a KL penalty per token: the reinforcement learning of Ziegler et al. 2019 and Ouyang et al. 2022, whose
optimum is p · exp(r / β) / Z; with calibrated rewards, that of InfAlign (Balashankar et al. 2024).

Where samples are drawn under a filter, such as a temperature, policy and p are the models under that filter: a ratio of
probabilities that did not draw the samples is not an importance weight, and its gradient is biased.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ctg_jax import methods, rng
from ctg_jax.control import IDENTITY, Chain
from ctg_jax.learn import calibrate as calibration
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.critics import advantages
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pool import FIXED, Pool, batches, check_drawn, drawing_filter, read
from ctg_jax.learn.rounds import adapted, explored
from ctg_jax.models.heads import value_head, values
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, Sum

init, example, neutral = fitting.delta, fitting.example_delta, fitting.neutral_delta


def token_rewards(reward: jax.Array, old: jax.Array, base: jax.Array, mask: jax.Array, beta: jax.Array) -> jax.Array:
    """Rewards float32 [B, N]: -β (log π_old - log p) at every token, and the reward [B] of the text at the last one."""
    end = mask & ~jnp.concatenate([mask[:, 1:], jnp.zeros_like(mask[:, :1])], axis=1)
    return jnp.where(mask, -beta * (old - base), 0.0) + jnp.where(end, reward[:, None], 0.0)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What `loss` is made of: the section `objective`.

    Attributes:
      clip: how far a ratio of probabilities counts on either side of 1.
      gamma, lam: of the advantages, see `advantages`.
      value: weight of half the squared error of the values.
      entropy: weight of the entropy, which is subtracted.
    """

    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    value: float = 0.5
    entropy: float = 0.0


def loss(lm: LM, objective: Objective = Objective()) -> losses.LossFn:
    """The clipped objective (Schulman et al. 2017, eq. 7) per token, with the terms of `objective`.

    params = {"policy": Delta, "value": `heads.value_head`}; frozen = {"params": those of the LM, "old": params at the
    start of the round, "beta": float32 [], "filter": the control that the samples were drawn under after the policy,
    optional}; the batch has `reward` float32 [B].
    """

    clip, gamma, lam, value, entropy = dataclasses.astuple(objective)

    def policy(params, frozen, batch, keys, reduce):
        control = Chain((params["policy"], frozen.get("filter", IDENTITY)))
        text = read(lm, frozen["params"], batch, keys, control)
        hidden = text.hidden[:, text.hidden.shape[1] - batch["completion"].shape[1] :]
        return values(params["value"], hidden), reduced(text, reduce, batch["completion"])

    def total(params, frozen, batch, keys):
        mask, completion = batch["written"], batch["completion"]
        before, old = jax.tree.map(lax.stop_gradient, policy(frozen["old"], frozen, batch, keys, _logp))
        text = read(lm, frozen["params"], batch, keys, frozen.get("filter", IDENTITY))
        base = lax.stop_gradient(reduced(text, _logp, completion))
        rewards = token_rewards(batch["reward"], old, base, mask, frozen["beta"])
        advantage = advantages(rewards, before, mask, gamma=gamma, lam=lam)
        now, (logp, spread) = policy(params, frozen, batch, keys, lambda z, x: (_logp(z, x), losses.entropy(z)))
        ratio = jnp.exp(jnp.where(mask, logp - old, 0.0))
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
        total, weight = losses.masked_sum(-gain, mask)
        error, _ = losses.masked_sum(0.5 * jnp.square(now - (advantage + before)), mask)
        free, _ = losses.masked_sum(spread, mask)
        far, _ = losses.masked_sum(old - base, mask)
        clipped, _ = losses.masked_sum(jnp.abs(ratio - 1) > clip, mask)
        metrics = {"value_error": error, "entropy": free, "kl": far, "clipped": clipped}
        return Sum(total + value * error - entropy * free, weight, {k: (v, weight) for k, v in metrics.items()})

    return total


def _logp(z, completion):
    return -losses.next_token(z, completion)


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact],
    rounds: int = 4,
    explore: Mapping[str, Any] | None = None,
    beta: float = 0.05,
    target_kl: float | None = None,
    calibrate: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Rounds of explore → score → learn, each from the samples of the policy as it is.

    Args:
      lm: the language model. data: prompts. rewards: the first is learned from.
      beta: β, the KL penalty per nat. target_kl: nats per token that β aims at, see `rounds.adapted`; None leaves it
        fixed.
      calibrate: None, the reward as it is; n, its rank among the base's samples of the same prompt, transformed for
        decoding by the best of n (0: the rank itself). The base's samples are those of the first round.
      rounds, explore, seed: see `quark.fit`. settings: of the stage `ppo`. Of the filters those that do not look at
        probabilities may be there (`pool.FIXED`): tokens that top-p removes for the base, and not for the policy, are
        infinitely far from it.

    Raises:
      InputError: rounds below 1, greedy samples, or another filter.
    """
    check_drawn(explore or {}, "ppo", FIXED)
    if target_kl is not None:
        check_drawn(explore or {}, "target_kl")
    for turn in explored(root, rounds, lm=lm, data=data, rewards=rewards, explore=explore, seed=seed):
        if target_kl is not None and turn.number:
            beta = adapted(beta, turn.seen[-1], target_kl)
        own = settings | {"beta": beta, "seed": turn.seed, "calibrate_for": calibrate}
        base = None if calibrate is None else turn.seen[0]
        given = {"pool": turn.pools[0], "base": base, "start_from": turn.proposal}
        turn.proposal = stage(root, ppo, own, lm=lm, **given)
    return turn.proposal


@stage_function("ppo")
def ppo(
    run: Run,
    *,
    lm: Artifact,
    pool: Artifact,
    base: Artifact | None = None,
    start_from: Artifact | None = None,
    beta: float = 0.05,
    calibrate_for: int | None = None,
    normalise: bool = False,
    adapter: Adapter = Adapter(),
    objective: Objective = Objective(),
    training: Training = Training(steps=100, warmup=0),
    seed: int = 0,
) -> None:
    """Stage: one round of PPO on samples of the policy it starts from.

    Args:
      pool: what `experience.score` made of those samples. base: samples of the base, for calibration.
      start_from: the policy that drew the samples; None: the frozen model.
      beta, calibrate_for: see `fit`. normalise: rewards minus their mean, over their deviation, in this pool.
      adapter: the change of weights. objective: of the loss.
      training: how it is trained; steps · batch over the pool's size is the number of epochs.
      seed: of initial values, batches and training.

    Raises:
      InputError: all rewards are equal where they are normalised, samples that `fit` would not draw, and what training
        raises.
    """
    check_drawn(pool.spec["drawn"], "ppo", FIXED)
    model, params, tokenizer = open_lm(lm)
    made = vars(adapter)
    state = {"policy": init(model, rng.stream(jax.random.key(seed), "init"), **made), "value": value_head(model.width)}
    if start_from is not None:
        value = checkpoint.load(start_from.path / "value", value_head(model.width))
        state = {"policy": methods.load(start_from, model), "value": value}
    samples = Pool.open([pool])
    reward = calibration.finite(samples.column("reward"))
    if base is not None:
        origin = Pool.open([base])
        pairs = (samples.column("prompt_id"), origin.column("reward"), origin.column("prompt_id"))
        reward = calibration.transformed(calibration.rank_within(reward, *pairs), calibrate_for or 0)
    if normalise:
        if np.ptp(reward) == 0:
            raise InputError(
                f"all {len(reward)} rewards are {reward[0]:g}: there is nothing to learn; set normalise=False"
            )
        reward = (reward - reward.mean()) / reward.std()
    samples = samples.with_(reward=reward.astype(np.float32))
    rows = batches(samples, tokenizer, batch=training.batch, seed=seed, fields=("reward",))
    frozen = {"params": params, "old": state, "beta": jnp.float32(beta)}
    frozen["filter"] = drawing_filter([pool], model)
    state = fitting.train(
        run, state, loss(model, objective), frozen, rows, training.at(adapter.rate),
        trained=r"policy/changes/.*|value/.*", seed=seed,
    )  # fmt: skip
    checkpoint.save(run.path / "value", state["value"])
    fitting.keep(run, state["policy"], "ppo", made)
