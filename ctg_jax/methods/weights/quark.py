"""Quark (Lu et al. 2022): sample, sort by reward into quantiles, learn to write each quantile on its reward token, and
decode on the token of the best one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax import methods, rng
from ctg_jax.controls import bricks
from ctg_jax.controls.bricks import Coded
from ctg_jax.learn import calibrate, experience, losses
from ctg_jax.methods.weights import finetune
from ctg_jax.models.lm import LM
from ctg_jax.run import stage
from ctg_jax.run.stage import Artifact, Run, open_lm
from ctg_jax.types import InputError, Sum

DIRECTIONS = ("reference_policy", "policy_reference")


def init(
    lm: LM, key: jax.Array, *, tokens: int = 5, kind: str = "lora", rank: int = 8, targets: str | None = None
) -> Coded:
    """Random reward tokens and a change of weights that is zero.

    Args:
      tokens: K, reward tokens.
      kind, rank, targets: "lora" or "full", and of what; see `finetune.delta`.
    """
    delta = finetune.delta(lm, rng.stream(key, "delta"), kind=kind, rank=rank, targets=targets)
    return bricks.coded(rng.stream(key, "codes"), delta, lm.width, tokens)


def example(lm: LM, key: jax.Array) -> Coded:
    """Three loud tokens and a LoRA, decoding on the second token, for the laws."""
    control = bricks.coded(key, finetune.example(lm, key), lm.width, 3, deviation=1.0)
    return control.replace(scale=jnp.float32(0.5))


def neutral(control: Coded) -> None:
    """A reward token has no neutral element."""
    return None


def start(control: Coded, params: Any, key: jax.Array) -> Coded:
    """The control with reward tokens drawn from the statistics of the embeddings: their mean and their deviation in
    each dimension."""
    words = params["embed"]["tokens"].astype(jnp.float32)
    noise = jax.random.normal(key, control.codes.shape)
    return control.replace(codes=jnp.mean(words, axis=0)[None] + jnp.std(words, axis=0)[None] * noise)


def loss(
    lm: LM, *, kl: float = 0.05, direction: str = "reference_policy", entropy: float = 0.06, unlikelihood: float = 0.0
) -> losses.LossFn:
    """Per response token: cross-entropy on the reward token `batch["bin"]`, plus `kl` · KL to the frozen model over the
    whole vocabulary, minus `entropy` · entropy (Lu et al. 2022), plus `unlikelihood` times the
    token-level unlikelihood of what the response has said before (Welleck et al. 2020).

    params is the control, frozen = {"params": those of the LM, "kl": float32 [] that multiplies `kl`, optional}.

    Args:
      direction: "reference_policy" is KL(frozen ‖ policy), the paper's; "policy_reference" the other, the code's.
    """
    if direction not in DIRECTIONS:
        raise InputError(f"direction is {direction!r}, expected one of {', '.join(DIRECTIONS)}.")

    def total(params, frozen, batch, keys):
        control = params.replace(cond="bin")
        z = experience.logits(lm, frozen["params"], batch, keys, control, {"bin": batch["bin"]})
        base = jax.lax.stop_gradient(experience.logits(lm, frozen["params"], batch, keys))
        pair = (base, z) if direction == "reference_policy" else (z, base)
        ce, weight = losses.masked_sum(losses.next_token(z, batch["completion"]), batch["written"])
        far, _ = losses.masked_sum(losses.kl(*pair), batch["written"])
        free, _ = losses.masked_sum(losses.entropy(z), batch["written"])
        value = ce + frozen.get("kl", 1.0) * kl * far - entropy * free
        metrics = {"cross_entropy": (ce, weight), "kl": (far, weight), "entropy": (free, weight)}
        if unlikelihood:
            said, _ = losses.masked_sum(losses.unlikelihood(z, *experience.repeats(batch)), batch["written"])
            value, metrics = value + unlikelihood * said, metrics | {"unlikelihood": (said, weight)}
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
    **hp: Any,
) -> Artifact:
    """Rounds of explore → score → learn; the first explores with the frozen model, the others on the best token.

    Args:
      data: prompts. rewards: the first is learned from.
      rounds: how often.
      explore: settings of `ctg_jax.stages.sampling.sample`, such as n (samples of a prompt) and max_new.
      pool: "all" sorts the samples of all rounds again, "last" those of the last.
      target_kl: nats per token that the KL coefficient aims at, see `experience.adapted`; None leaves it fixed.
      seed: of samples and of training. hp: of `quark`.

    Raises:
      InputError: another `pool`, rounds below 1, or a `target_kl` with greedy samples or a filter.
    """
    if pool not in ("all", "last"):
        raise InputError(f"pool is {pool!r}, expected 'all' or 'last'.")
    if rounds < 1:
        raise InputError(f"rounds is {rounds}, expected at least 1.")
    if target_kl is not None:
        experience.check_drawn(explore or {}, "target_kl")
    control, seen, factor = None, [], 1.0
    for r in range(rounds):
        seen.append(
            experience.explore(
                root, lm=lm, data=data, rewards=rewards, control=control, round=r, seed=seed, **(explore or {})
            )
        )
        if target_kl is not None and r:
            factor = experience.adapted(factor, seen[-1], target_kl)
        given = {"pool": seen if pool == "all" else seen[-1:], "start_from": control}
        settings = {**hp, "seed": rng.derived_seed(seed, "learn", r)}
        settings |= {} if target_kl is None else {"kl_factor": factor}
        control = stage.stage(root, quark, settings, lm=lm, **given)
    return control


@stage.stage_function("quark", how=("save_every",))
def quark(
    run: Run,
    *,
    lm: Artifact,
    pool: Sequence[Artifact],
    start_from: Artifact | None = None,
    tokens: int = 5,
    best_only: bool = False,
    strata: bool = False,
    kind: str = "lora",
    rank: int = 8,
    targets: str | None = None,
    kl: float = 0.05,
    kl_factor: float = 1.0,
    direction: str = "reference_policy",
    entropy: float = 0.06,
    unlikelihood: float = 0.0,
    steps: int = 200,
    batch: int = 32,
    rate: float | None = None,
    warmup: int = 20,
    schedule: str = "constant",
    seed: int = 0,
    save_every: int = 100,
) -> None:
    """Stage: one round of learning on a pool that is sorted anew.

    Args:
      pool: rounds of samples, by `experience.score`. start_from: the control of the round before, or None.
      tokens: K, quantiles and reward tokens. best_only: learn from the best quantile alone (an ablation).
      strata: batches hold every quantile in equal parts; else samples are drawn uniformly.
      kind, rank, targets: of the change of weights.
      kl, kl_factor, direction, entropy, unlikelihood: of the loss; kl is multiplied by kl_factor.
      steps, batch, rate, warmup, schedule: of the optimizer, which starts anew in every round.

    Raises:
      InputError: fewer samples than quantiles, all rewards equal, and what `init`, `loss` and training raise.
    """
    model, params, tokenizer = open_lm(lm)
    key = jax.random.key(seed)
    hp = dict(tokens=tokens, kind=kind, rank=rank, targets=targets)
    if start_from is None:
        control = start(init(model, rng.stream(key, "init"), **hp), params, rng.stream(key, "tokens"))
    else:
        control = methods.load(start_from, model)
    samples = experience.Pool.open(pool)
    samples = samples.with_(bin=calibrate.bins(samples.column("reward"), tokens))
    if best_only:
        samples = samples.take((samples.column("bin") == tokens - 1).nonzero()[0])
    batches = experience.batches(
        samples, tokenizer, batch=batch, seed=seed, fields=("bin",), strata="bin" if strata else None
    )
    objective = loss(model, kl=kl, direction=direction, entropy=entropy, unlikelihood=unlikelihood)
    frozen = {"params": params, "kl": jnp.float32(kl_factor)}
    control = finetune.learn(
        run, control, objective, frozen, batches, trained=r"delta/changes/.*|codes", steps=steps,
        rate=rate or finetune.RATES[kind], warmup=warmup, schedule=schedule, seed=seed, save_every=save_every,
    )  # fmt: skip
    finetune.keep(run, control, "quark", hp)
