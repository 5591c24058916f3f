"""Quark (Lu et al. 2022): sample, sort by reward into quantiles, learn to write each quantile on its reward token, and
decode on the token of the best one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax import methods, rng
from ctg_jax.controls.codes import Coded, coded
from ctg_jax.learn import calibrate, fitting, losses
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pool import Pool, batches, check_drawn, read, repeats
from ctg_jax.learn.rounds import adapted, explored
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function
from ctg_jax.types import InputError, Sum

DIRECTIONS = ("reference_policy", "policy_reference")


def init(
    lm: LM, key: jax.Array, *, tokens: int = 5, kind: str = "lora", rank: int = 8, targets: str | None = None
) -> Coded:
    """Random reward tokens and a change of weights that is zero.

    Args:
      tokens: K, reward tokens.
      kind, rank, targets: of the change of weights, see `ctg_jax.learn.fitting.Adapter`.
    """
    delta = fitting.delta(lm, rng.stream(key, "delta"), kind=kind, rank=rank, targets=targets)
    return coded(rng.stream(key, "codes"), delta, lm.width, tokens)


def example(lm: LM, key: jax.Array) -> Coded:
    """Three loud tokens and a LoRA, decoding on the second token, for the laws."""
    control = coded(key, fitting.example_delta(lm, key), lm.width, 3, deviation=1.0)
    return control.replace(scale=jnp.float32(0.5))


def neutral(control: Coded) -> None:
    """A reward token has no neutral element."""
    return None


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of `loss`: the section `objective`.

    Attributes:
      kl: of the KL divergence between policy and frozen model over the whole vocabulary.
      direction: "reference_policy" is KL(frozen ‖ policy), the paper's; "policy_reference" the other, the code's.
      entropy: of the entropy, which is subtracted.
      unlikelihood: of the token-level unlikelihood of earlier tokens of prompt and response (Welleck et al. 2020).
    """

    kl: float = 0.05
    direction: str = "reference_policy"
    entropy: float = 0.06
    unlikelihood: float = 0.0


def loss(lm: LM, objective: Objective = Objective()) -> losses.LossFn:
    """Per token of the response: cross-entropy on the reward token `batch["bin"]`, plus the terms of `objective`.

    params is the control, frozen = {"params": those of the LM, "kl": float32 [] that multiplies `kl`, optional}.

    Raises:
      InputError: an unknown direction.
    """
    kl, direction, entropy, unlikelihood = dataclasses.astuple(objective)
    if direction not in DIRECTIONS:
        raise InputError(f"direction is {direction!r}, expected one of {', '.join(DIRECTIONS)}.")

    def total(params, frozen, batch, keys):
        control = params.replace(cond="bin")
        text = read(lm, frozen["params"], batch, keys, control, {"bin": batch["bin"]})
        both = (text, read(lm, frozen["params"], batch, keys))
        earlier, *allowed = repeats(batch) if unlikelihood else (None,)

        def terms(z, base, target, *allowed):
            base = jax.lax.stop_gradient(base)
            pair = (base, z) if direction == "reference_policy" else (z, base)
            values = {"cross_entropy": losses.next_token(z, target), "kl": losses.kl(*pair)}
            values |= {"entropy": losses.entropy(z)}
            return values | ({"unlikelihood": losses.unlikelihood(z, earlier, *allowed)} if unlikelihood else {})

        values = reduced(both, terms, batch["completion"], *allowed)
        metrics = {name: losses.masked_sum(x, batch["written"]) for name, x in values.items()}
        (ce, weight), (far, _), (free, _) = (metrics[name] for name in ("cross_entropy", "kl", "entropy"))
        value = ce + frozen.get("kl", 1.0) * kl * far - entropy * free
        if unlikelihood:
            value = value + unlikelihood * metrics["unlikelihood"][0]
        return Sum(value, weight, metrics)

    return total


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact],
    rounds: int = 4,
    explore: Mapping[str, Any] | None = None,
    pool: str = "all",
    target_kl: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Rounds of explore → score → learn; the first explores with the frozen model, the others on the best token.

    Args:
      lm: the language model. data: prompts. rewards: the first is learned from.
      rounds: how many.
      explore: settings of `ctg_jax.stages.sampling.sample`, such as n (samples of a prompt) and max_new.
      pool: "all" sorts the samples of all rounds again, "last" those of the last.
      target_kl: nats per token that the KL coefficient aims at, see `rounds.adapted`; None leaves it fixed.
      seed: of samples and of training. settings: of the stage `quark`.

    Raises:
      InputError: another `pool`, rounds below 1, or a `target_kl` with greedy samples or a filter.
    """
    check_settings(quark, settings)
    if target_kl is not None:
        check_drawn(explore or {}, "target_kl")
    given = dict(lm=lm, data=data, rewards=rewards, explore=explore, pool=pool, seed=seed)
    factor = 1.0
    for turn in explored(root, rounds, **given):
        own = settings | {"seed": turn.seed}
        if target_kl is not None:
            factor = adapted(factor, turn.seen[-1], target_kl) if turn.number else factor
            own["kl_factor"] = factor
        turn.proposal = stage(root, quark, own, lm=lm, pool=turn.pools, start_from=turn.proposal)
    return turn.proposal


@stage_function("quark", revision=1)
def quark(
    run: Run,
    *,
    lm: Artifact,
    pool: Sequence[Artifact],
    start_from: Artifact | None = None,
    tokens: int = 5,
    best_only: bool = False,
    strata: bool = False,
    adapter: Adapter = Adapter(),
    objective: Objective = Objective(),
    kl_factor: float = 1.0,
    training: Training = Training(),
    seed: int = 0,
) -> None:
    """Stage: one round of learning on a pool that is sorted by its rewards.

    Args:
      pool: rounds of samples, by `experience.score`. start_from: the control of the round before, or None.
      tokens: K, quantiles and reward tokens. best_only: learn from the best quantile alone (an ablation).
      strata: whether batches hold every quantile in equal parts; otherwise samples are drawn uniformly.
      adapter: the change of weights. objective: of the loss; its kl is multiplied by kl_factor.
      training: how it is trained. Each round has a new optimizer and schedule; the paper's one of both for all is
        `training.rounds`, the number of rounds.
      seed: of initial values, batches and training.

    Raises:
      InputError: fewer samples than quantiles, all rewards equal, and what `init`, `loss` and training raise.
    """
    model, params, tokenizer = open_lm(lm)
    key = jax.random.key(seed)
    made = vars(adapter) | {"tokens": tokens}
    if start_from is None:
        control = init(model, rng.stream(key, "init"), **made)
        control = fitting.like_words(control, model, params, rng.stream(key, "tokens"))
    else:
        control = methods.load(start_from, model)
    samples = Pool.open(pool)
    samples = samples.with_(bin=calibrate.bins(samples.column("reward"), tokens, seed))
    if best_only:
        samples = samples.take((samples.column("bin") == tokens - 1).nonzero()[0])
    options = dict(batch=training.batch, seed=seed, fields=("bin",), strata="bin" if strata else None)
    frozen = {"params": params, "kl": jnp.float32(kl_factor)}
    control = fitting.train(
        run, control, loss(model, objective), frozen, batches(samples, tokenizer, **options),
        training.at(adapter.rate), trained=r"delta/changes/.*|codes", seed=seed, start_from=start_from,
    )  # fmt: skip
    fitting.keep(run, control, "quark", made)
