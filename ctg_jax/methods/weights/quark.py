"""Quark (Lu et al. 2022): sample, sort by reward into quantiles, learn to write each quantile on its reward token, and
decode on the token of the best one.

With classes by thresholds in place of quantiles this is negative-aware training (Wang et al. 2024) and, where the
reward also says in words what is wrong with a text, LeTI (Wang et al. 2023); see `Sorting`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import methods, rng
from ctg_jax.controls.codes import Coded, coded
from ctg_jax.learn import calibrate, fitting, losses
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pool import STATES, Pool, States, batches, check_drawn, read, repeats
from ctg_jax.learn.rounds import adapted, explored, positive_from
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import Read, reduced
from ctg_jax.run.identity import section
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function
from ctg_jax.types import InputError, Sum

DIRECTIONS = ("reference_policy", "policy_reference")
TOKENS = 5  # the K of the paper


def init(
    lm: LM, key: jax.Array, *, tokens: int = TOKENS, kind: str = "lora", rank: int = 8, targets: str | None = None
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

    params is the control, frozen = {"params": those of the LM}. The batch may have `states` float32 [B, N, D], the
    frozen model's final states at the tokens of the response, which is then not read under it again.

    Raises:
      InputError: an unknown direction.
    """
    kl, direction, entropy, unlikelihood = dataclasses.astuple(objective)
    if direction not in DIRECTIONS:
        raise InputError(f"direction is {direction!r}, expected one of {', '.join(DIRECTIONS)}.")

    def total(params, frozen, batch, keys):
        control = params.replace(cond="bin")
        text = read(lm, frozen["params"], batch, keys, control, {"bin": batch["bin"]})
        if "states" in batch:
            both = (text, Read(frozen["params"], batch["states"], lm=lm))
        else:
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
        value = ce + kl * far - entropy * free
        if unlikelihood:
            value = value + unlikelihood * metrics["unlikelihood"][0]
        return Sum(value, weight, metrics)

    return total


@dataclasses.dataclass(frozen=True)
class Sorting:
    """How samples get their reward tokens: the section `sorting`.

    Attributes:
      thresholds: None, by quantiles of the pool; otherwise ascending rewards, of which there is one fewer than tokens:
        a sample gets the token of the number of them that its reward reaches. `fit` also takes "judge", the one
        threshold of the reward itself: failures and successes.
      best_only: learn from the samples of the best token alone (an ablation).
      strata: whether batches hold every token in equal parts; otherwise samples are drawn uniformly.
      feedback: whether a sample is learned behind what its reward says of it (`explain`), on a line of its own before
        the prompt; where that is empty, the prompt is as it is. Decoding has none.
    """

    thresholds: tuple[float, ...] | str | None = None
    best_only: bool = False
    strata: bool = False
    feedback: bool = False

    def check(self, count: int) -> None:
        """InputError where the thresholds are not ascending numbers, one fewer than `count` tokens."""
        if self.thresholds is None:
            return
        try:
            at = np.asarray(self.thresholds, np.float64)
        except (TypeError, ValueError):
            at = np.zeros(())
        if at.ndim != 1 or len(at) != count - 1 or not (np.isfinite(at).all() and (np.diff(at) > 0).all()):
            raise InputError(
                f"sorting.thresholds is {self.thresholds!r}, expected {count - 1} ascending numbers, one fewer than "
                f"tokens ({count})"
            )

    def tokens(self, rewards: np.ndarray, count: int, seed: int) -> np.ndarray:
        """The token int32 [n] of each reward, 0 the worst of `count`; `seed` orders equal rewards.

        Raises:
          InputError: a token without a sample, and what `check` and `calibrate.bins` raise.
        """
        self.check(count)
        if self.thresholds is None:
            return calibrate.bins(rewards, count, seed)
        at = np.asarray(self.thresholds, np.float64)
        found = np.searchsorted(at, calibrate.finite(rewards), side="right").astype(np.int32)
        empty = np.flatnonzero(np.bincount(found, minlength=count) == 0)
        if len(empty):
            raise InputError(
                f"none of the {len(found)} samples is in class {empty[0]} of the thresholds {at.tolist()}: set "
                "sorting.thresholds, raise n or take another reward"
            )
        return found


def behind_feedback(pool: Pool) -> np.ndarray:
    """The prompts object [n] of a pool, each behind the feedback on its sample.

    Raises:
      InputError: the pool has no feedback, or the prompts are conversations.
    """
    if not pool.has("feedback"):
        raise InputError("sorting.feedback is set, and the samples have none: score them with feedback=True")
    if pool.has("messages"):
        raise InputError("sorting.feedback is set, which needs prompts that are texts, and these are conversations")
    both = zip(pool.column("feedback"), pool.column("prompt"))
    return np.array([f"{words}\n{prompt}" if words else prompt for words, prompt in both], object)


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
    keep_states: bool = False,
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
      keep_states: whether scoring keeps the frozen model's final states at every token of the samples, so that updates
        need not read them under it again. The numbers are the same up to rounding. See `experience.score` for the size.
      seed: of samples and of training. settings: of the stage `quark`.

    Raises:
      InputError: another `pool`, rounds below 1, a `target_kl` with greedy samples or a filter, thresholds that do not
        fit `tokens`, or `keep_states` with feedback, behind which the frozen model has other states.
    """
    check_settings(quark, settings)
    if target_kl is not None:
        check_drawn(explore or {}, "target_kl")
    objective = section(Objective(), settings.get("objective"), "objective of quark")
    sorting = section(Sorting(), settings.get("sorting"), "sorting of quark")
    if sorting.thresholds == "judge":
        sorting = dataclasses.replace(sorting, thresholds=(positive_from("judge", rewards),))
        settings = settings | {"sorting": vars(sorting)}
    sorting.check(settings.get("tokens", TOKENS))
    if keep_states and sorting.feedback:
        raise InputError("keep_states is set, but with sorting.feedback samples are learned behind other prompts")
    given = dict(lm=lm, data=data, rewards=rewards, explore=explore, pool=pool, seed=seed)
    for turn in explored(root, rounds, **given, states=keep_states, feedback=sorting.feedback):
        if target_kl is not None and turn.number:
            objective = dataclasses.replace(objective, kl=adapted(objective.kl, turn.seen[-1], target_kl))
            settings = settings | {"objective": vars(objective)}
        own = settings | {"seed": turn.seed}
        turn.proposal = stage(root, quark, own, lm=lm, pool=turn.pools, start_from=turn.proposal)
    return turn.proposal


@stage_function("quark", revision=1)
def quark(
    run: Run,
    *,
    lm: Artifact,
    pool: Sequence[Artifact],
    start_from: Artifact | None = None,
    tokens: int = TOKENS,
    sorting: Sorting = Sorting(),
    adapter: Adapter = Adapter(),
    objective: Objective = Objective(),
    training: Training = Training(),
    seed: int = 0,
) -> None:
    """Stage: one round of learning on a pool that is sorted by its rewards.

    Args:
      pool: rounds of samples, by `experience.score`; the states that it kept are used, unless there is feedback.
      start_from: the control of the round before, or None.
      tokens: K, reward tokens, and quantiles or classes. sorting: of samples into them.
      adapter: the change of weights. objective: of the loss.
      training: how it is trained. Each round has a new optimizer and schedule; the paper's one of both for all is
        `training.rounds`, the number of rounds.
      seed: of initial values, batches and training.

    Raises:
      InputError: what `Sorting.tokens`, `behind_feedback`, `init`, `loss` and training raise.
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
    samples = samples.with_(bin=sorting.tokens(samples.column("reward"), tokens, seed))
    if sorting.thresholds is not None:
        run.record(classes=np.bincount(samples.column("bin")).tolist())
    if sorting.feedback:
        samples = samples.with_(prompt=behind_feedback(samples))
    if kept := not sorting.feedback and all((a.path / STATES).exists() for a in pool):
        samples = samples.with_(states=States.open(pool))
    if sorting.best_only:
        samples = samples.take((samples.column("bin") == tokens - 1).nonzero()[0])
    options = dict(batch=training.batch, seed=seed, strata="bin" if sorting.strata else None)
    rows = batches(samples, tokenizer, fields=("bin", "states") if kept else ("bin",), **options)
    control = fitting.train(
        run, control, loss(model, objective), {"params": params}, rows, training.at(adapter.rate),
        trained=r"delta/changes/.*|codes", seed=seed, start_from=start_from,
    )  # fmt: skip
    fitting.keep(run, control, "quark", made)
