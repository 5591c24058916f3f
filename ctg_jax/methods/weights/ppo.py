"""PPO with a KL penalty per token: the reinforcement learning of Ziegler et al. 2019 and Ouyang et al. 2022, whose
optimum is p · exp(r / β) / Z; with calibrated rewards, that of InfAlign (Balashankar et al. 2024).

Two settings of `objective.advantage` need no values and compare the samples of a prompt with each other instead:
"leave_one_out" is RLOO (Ahmadian et al. 2024), with the same optimum; "group" is GRPO (Shao et al. 2024). GRPO divides
by the deviation of each prompt's rewards and has the KL in its loss, where the gradient of the paper's estimator is
that of KL(p ‖ π), so its optimum is another one: after one token π = β p / (λ - r / σ), λ such that π sums to 1.

Where samples are drawn under a filter, such as a temperature, policy and p are the models under that filter: a ratio of
probabilities that did not draw the samples is not an importance weight, and its gradient is biased.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import methods, rng
from ctg_jax.control import IDENTITY, Chain
from ctg_jax.data.completions import continuations
from ctg_jax.data.pipeline import Batch
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.learn import calibrate as calibration
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.critics import advantages
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pool import FIXED, Pool, annotated, batches, check_drawn, drawing_filter, nats, read
from ctg_jax.learn.rounds import adapted, explored
from ctg_jax.models.heads import value_head, values
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run import checkpoint
from ctg_jax.run.identity import section
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function
from ctg_jax.types import InputError, Params, PyTree, Sum

ADVANTAGES = ("values", "group", "leave_one_out")
FIELDS = ("old", "base", "before", "goal", "advantage")

init, example, neutral = fitting.delta, fitting.example_delta, fitting.neutral_delta


def token_rewards(reward: jax.Array, old: jax.Array, base: jax.Array, mask: jax.Array, beta: jax.Array) -> jax.Array:
    """Rewards float32 [B, N]: -β (log π_old - log p) at every token, and the reward [B] of the text at the last one."""
    end = mask & ~jnp.concatenate([mask[:, 1:], jnp.zeros_like(mask[:, :1])], axis=1)
    return jnp.where(mask, -beta * (old - base), 0.0) + jnp.where(end, reward[:, None], 0.0)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What `loss` is made of: the section `objective`.

    Attributes:
      advantage: "values", generalised advantages with a learned value of each token (PPO); "group", the reward less the
        mean of its prompt, over the deviation there (GRPO); "leave_one_out", the reward and penalty of the whole text
        less the mean of the prompt's other samples (RLOO).
      clip: how far a ratio of probabilities counts on either side of 1.
      gamma, lam: of the generalised advantages, see `advantages`.
      value: weight of half the squared error of the values. value_clip: how far a value may move from what it was at
        the start of the round before the error of the nearer bound counts, if it is larger; None: no bound.
      entropy: weight of the entropy, which is subtracted.
      normalise: subtract from the rewards their mean in the pool and divide by their deviation σ. The optimum is then
        p · exp(r / (σ β)), so that one β suits rewards of any scale; but σ changes with the policy from round to round.
      whiten: the same for the advantages of all tokens of the pool.
      pretraining: weight of the next-token loss on human continuations of the prompts, nats per token (PPO-ptx, Ouyang
        et al. 2022, eq. 2).
    """

    advantage: str = "values"
    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    value: float = 0.5
    value_clip: float | None = None
    entropy: float = 0.0
    normalise: bool = False
    whiten: bool = False
    pretraining: float = 0.0

    def __post_init__(self):
        if self.advantage not in ADVANTAGES:
            raise InputError(f"advantage is {self.advantage!r}, expected one of {', '.join(ADVANTAGES)}.")


def loss(lm: LM, objective: Objective = Objective()) -> losses.LossFn:
    """The clipped objective (Schulman et al. 2017, eq. 7) per token, with the terms of `objective`. Every token counts
    the same with values, every text with "group", whose tokens share its weight; "leave_one_out" sums over a text.

    params = {"policy": Delta, "value": `heads.value_head`}; frozen = {"params": those of the LM, "beta": float32 [],
    which "group" alone reads here, "filter": the control that the samples were drawn under after the policy, optional};
    the batch has the fields of `credited`, float32 [B, N] each, and `human` where `pretraining` has a weight.
    """
    o = objective

    def total(params, frozen, batch, keys):
        mask, completion = batch["written"], batch["completion"]
        control = Chain((params["policy"], frozen.get("filter", IDENTITY)))
        text = read(lm, frozen["params"], batch, keys, control)
        logp, spread = reduced(text, lambda z, x: (_logp(z, x), losses.entropy(z)), completion)
        ratio = jnp.exp(jnp.where(mask, logp - batch["old"], 0.0))
        gain = jnp.minimum(ratio * batch["advantage"], jnp.clip(ratio, 1 - o.clip, 1 + o.clip) * batch["advantage"])
        terms = {"gain": -gain, "entropy": spread, "clipped": jnp.abs(ratio - 1) > o.clip}
        value = -gain - o.entropy * spread
        if o.advantage == "group":
            apart = jnp.where(mask, batch["base"] - logp, 0.0)
            terms["kl"] = jnp.exp(apart) - apart - 1  # Shao et al. 2024, eq. 4
            value = value + frozen["beta"] * terms["kl"]
        if o.advantage == "values":
            now = values(params["value"], text.hidden[:, text.hidden.shape[1] - completion.shape[1] :])
            error = jnp.square(now - batch["goal"])
            if o.value_clip is not None:
                near = batch["before"] + jnp.clip(now - batch["before"], -o.value_clip, o.value_clip)
                error = jnp.maximum(error, jnp.square(near - batch["goal"]))
            terms["value_error"] = 0.5 * error
            value = value + o.value * terms["value_error"]
        metrics = {name: losses.masked_sum(x, mask) for name, x in terms.items() if name != "gain"}
        tokens, rows = jnp.sum(mask, axis=1, dtype=jnp.float32), jnp.any(mask, axis=1)
        by_row = jnp.sum(jnp.where(mask, value, 0.0), axis=1)
        by_row = by_row / jnp.maximum(tokens, 1.0) if o.advantage == "group" else by_row
        counts = tokens if o.advantage == "values" else jnp.where(rows, 1.0, 0.0)
        if o.pretraining:
            nll = nats(lm, frozen["params"], batch, keys, params["policy"], "human", "human_written")
            human = losses.row_mean(nll, batch["human_written"])
            metrics["human"] = losses.masked_sum(human, rows)
            by_row = by_row + o.pretraining * counts * human
        summed, weight = jnp.sum(by_row), jnp.sum(counts)
        return Sum(summed, weight, metrics)

    return total


def _logp(z, completion):
    return -losses.next_token(z, completion)


def judged(
    lm: LM, params: Params, samples: Pool, tokenizer: Tokenizer, state: PyTree, frozen: Mapping[str, Any],
    objective: Objective = Objective(), batch: int = 32,
) -> Pool:  # fmt: skip
    """The samples of a round with what its updates need of the policy that drew them, read once: the fields of
    `credited`, float32 [n, N] each.

    Args:
      samples: with `reward`. state: policy and value head at the start of the round. frozen: as for `loss`.
      objective: of the loss. batch: rows of a compiled batch.

    Raises:
      InputError: what `credited` raises.
    """
    given = ({**frozen, "params": params}, state)
    found = annotated(samples, tokenizer, at_start, lm, given, batch=batch)
    return samples.with_(
        **credited(samples.column("reward"), samples.column("prompt_id"), **found, objective=objective,
                   beta=float(frozen["beta"]))
    )  # fmt: skip


@partial(jax.jit, static_argnums=0)
def at_start(lm: LM, given: tuple[Mapping[str, Any], PyTree], rows: tuple[Batch, jax.Array]) -> dict[str, jax.Array]:
    """`old`, `base` and `before` of `credited`, float32 [B, N] each, and `mask`, of (frozen, state) as in `loss` and of
    a batch and its keys."""
    (frozen, state), (batch, keys) = given, rows
    filter, completion = frozen.get("filter", IDENTITY), batch["completion"]
    text = read(lm, frozen["params"], batch, keys, Chain((state["policy"], filter)))
    base = read(lm, frozen["params"], batch, keys, filter)
    before = values(state["value"], text.hidden[:, text.hidden.shape[1] - completion.shape[1] :])
    old, base = (reduced(x, _logp, completion) for x in (text, base))
    found = {"old": old, "base": base, "before": before}
    return {k: jnp.where(batch["written"], x, 0.0) for k, x in found.items()} | {"mask": batch["written"]}


def credited(
    reward: np.ndarray, prompts: np.ndarray, *, old: np.ndarray, base: np.ndarray, before: np.ndarray,
    mask: np.ndarray, objective: Objective = Objective(), beta: float,
) -> dict[str, np.ndarray]:  # fmt: skip
    """`old`, `base`, `before`, `advantage` and `goal`, what the values learn: float32 [n, N] each.

    Args:
      reward, prompts: [n], the reward and the prompt of each sample.
      old, base: [n, N], log-probabilities of the tokens under the policy that drew them and under the frozen model.
      before: [n, N], values at the start of the round. mask: bool [n, N], which tokens there are.
      objective: `advantage`, gamma, lam and whiten count here. beta: β, the KL penalty per nat.

    Raises:
      InputError: a prompt with one sample, where the samples of a prompt are compared.
    """
    if objective.advantage == "values":
        rewards = token_rewards(*(jnp.asarray(x, jnp.float32) for x in (reward, old, base)), jnp.asarray(mask), beta)
        advantage = np.asarray(advantages(rewards, before, mask, gamma=objective.gamma, lam=objective.lam))
    else:
        alone = objective.advantage == "leave_one_out"
        whole = reward - beta * np.where(mask, old - base, 0.0).sum(axis=1) if alone else reward
        advantage = np.where(mask, relative(whole, prompts, not alone)[:, None], 0.0)
    goal = before + advantage
    if objective.whiten:
        some = advantage[mask]
        advantage = np.where(mask, (advantage - some.mean()) / max(some.std(), 1e-8), 0.0)
    found = dict(old=old, base=base, before=before, goal=goal, advantage=advantage)
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


def relative(rewards: np.ndarray, prompts: np.ndarray, divided: bool) -> np.ndarray:
    """Advantages float64 [n] among the samples of each prompt: `divided`, the reward less their mean, over their
    deviation, 0 where they are equal (Shao et al. 2024); otherwise the reward less the mean of the other samples
    (Ahmadian et al. 2024).

    Raises:
      InputError: a prompt with one sample.
    """
    rewards = calibration.finite(rewards)
    _, at, count = np.unique(prompts, return_inverse=True, return_counts=True)
    if count.min() < 2:
        raise InputError(
            "a prompt has one sample, which has no other to be compared with: set explore.n to 2 or more, or "
            "objective.advantage to 'values'"
        )
    away = rewards - (np.bincount(at, rewards) / count)[at]
    if not divided:
        return away * (count / (count - 1))[at]
    deviation = np.sqrt(np.bincount(at, away**2) / count)[at]
    return np.divide(away, deviation, out=np.zeros_like(away), where=deviation > 0)


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
    calibrate: float | str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Rounds of explore → score → learn, each from the samples of the policy as it is.

    Args:
      lm: the language model. data: prompts. rewards: the first is learned from.
      beta: β, the KL penalty per nat. target_kl: nats per token that β aims at, see `rounds.adapted`; None leaves it
        fixed.
      calibrate: None, the reward as it is; otherwise its rank among the base's samples of the same prompt, transformed
        (`calibrate.transformed`): 0, the rank itself; t above 0 for decoding by the best of n, below 0 for the worst of
        n; "log". The paper has 10 and -10 for n = 4. The base's samples are those of the first round.
      rounds, explore, seed: see `quark.fit`. settings: of the stage `ppo`. Of the filters those that do not look at
        probabilities may be there (`pool.FIXED`): tokens that top-p removes for the base, and not for the policy, are
        infinitely far from it.

    Raises:
      InputError: rounds below 1, greedy samples, or another filter.
    """
    check_settings(ppo, settings)
    check_drawn(explore or {}, "ppo", FIXED)
    if target_kl is not None:
        check_drawn(explore or {}, "target_kl")
    objective = section(Objective(), settings.get("objective"), "objective of ppo")
    texts = data if objective.pretraining else None
    for turn in explored(root, rounds, lm=lm, data=data, rewards=rewards, explore=explore, seed=seed):
        if target_kl is not None and turn.number:
            beta = adapted(beta, turn.seen[-1], target_kl)
        own = settings | {"beta": beta, "seed": turn.seed, "calibrate_for": calibrate}
        base = None if calibrate is None else turn.seen[0]
        given = {"pool": turn.pools[0], "base": base, "data": texts, "start_from": turn.proposal}
        turn.proposal = stage(root, ppo, own, lm=lm, **given)
    return turn.proposal


@stage_function("ppo", revision=1)
def ppo(
    run: Run,
    *,
    lm: Artifact,
    pool: Artifact,
    base: Artifact | None = None,
    data: Artifact | None = None,
    start_from: Artifact | None = None,
    beta: float = 0.05,
    calibrate_for: float | str | None = None,
    adapter: Adapter = Adapter(),
    objective: Objective = Objective(),
    training: Training = Training(steps=100, warmup=0),
    seed: int = 0,
) -> None:
    """Stage: one round of PPO on samples of the policy it starts from. Where rewards are calibrated, spec.json has the
    `win_rates` of these samples against those of the base, alone and as the best and the worst of four.

    Args:
      pool: what `experience.score` made of those samples. base: samples of the base, for calibration.
      data: texts and their prompts, where `pretraining` has a weight; see `ctg_jax.data.completions.continuations`.
        They are cut to the `tokens` of `training`.
      start_from: the policy that drew the samples; None: the frozen model.
      beta, calibrate_for: see `fit`.
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
        ranks = calibration.rank_within(reward, *pairs)
        asked = {"one": (1, False), "best of 4": (4, False), "worst of 4": (4, True)}
        run.record(win_rates={name: calibration.win_rate(ranks, *given) for name, given in asked.items()})
        reward = calibration.transformed(ranks, calibrate_for or 0)
    if objective.normalise:
        if np.ptp(reward) == 0:
            raise InputError(
                f"all {len(reward)} rewards are {reward[0]:g}: there is nothing to learn; set normalise=False"
            )
        reward = (reward - reward.mean()) / reward.std()
    frozen = {"params": params, "beta": jnp.float32(beta), "filter": drawing_filter([pool], model)}
    samples = samples.with_(reward=reward.astype(np.float32))
    samples = judged(model, params, samples, tokenizer, state, frozen, objective, training.batch)
    also = None
    if objective.pretraining:
        human = continuations(data.rows("data.jsonl"), tokenizer, training.tokens)
        tails = np.empty(len(samples), object)
        tails[:] = [human[i] for i in samples.column("prompt_id")]
        samples, also = samples.with_(human=tails), "human"
    rows = batches(samples, tokenizer, batch=training.batch, seed=seed, fields=FIELDS, also=also)
    state = fitting.train(
        run, state, loss(model, objective), frozen, rows, training.at(adapter.rate),
        trained=r"policy/changes/.*|value/.*", seed=seed, start_from=start_from,
    )  # fmt: skip
    checkpoint.save(run.path / "value", state["value"])
    fitting.keep(run, state["policy"], "ppo", made)
