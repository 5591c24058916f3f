"""Rounds of a method that learns from its own samples: explore, score, learn; what each round sampled, afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax import evaluation, rng
from ctg_jax.learn import experience
from ctg_jax.learn.pool import Pool
from ctg_jax.run import stage
from ctg_jax.run.stage import Artifact, Run
from ctg_jax.stages.judges import open_judge
from ctg_jax.types import InputError


@dataclasses.dataclass
class Round:
    """One round, after its samples were drawn and scored.

    Attributes:
      number: counted from 0.
      seed: of what is learned in this round.
      seen: the scored samples of all rounds so far, oldest first.
      pools: those of them to learn from.
      proposal: the control that drew the last samples, None for the frozen model. The method sets it to the one that
        draws the samples of the next round.
    """

    number: int
    seed: int
    seen: list[Artifact]
    pools: list[Artifact]
    proposal: Artifact | None


def explored(
    root: Any,
    count: int,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact],
    explore: Mapping[str, Any] | None = None,
    proposal: Artifact | None = None,
    pool: str = "last",
    sampled: bool = True,
    states: bool = False,
    feedback: bool = False,
    seed: int = 0,
) -> Iterator[Round]:
    """The rounds of a `fit`: before each is yielded, its samples are drawn and scored; the loop's body learns from them
    and sets `proposal`.

    Args:
      root: of all artifacts.
      count: how many rounds.
      lm, data, rewards: the language model, the prompts, and the scorers, of which methods learn from the first.
      explore: settings of `ctg_jax.stages.sampling.sample`, such as n (samples of a prompt) and max_new.
      proposal: the control that draws the samples of the first round; None: the frozen model does.
      pool: "all" gives the samples of all rounds to learn from, "last" those of the last.
      sampled: False draws nothing; `pools` are then empty. states, feedback: see `experience.score`.
      seed: of all rounds. Samples and learning of each round have seeds of their own, derived from it by name and
        number, so that no two rounds of any seeds share one.

    Raises:
      InputError: another `pool`, count below 1, and what `experience.explore` raises.
    """
    if pool not in ("all", "last"):
        raise InputError(f"pool is {pool!r}, expected 'all' or 'last'.")
    if count < 1:
        raise InputError(f"rounds is {count}, expected at least 1.")
    seen: list[Artifact] = []
    for number in range(count):
        if sampled:
            given = dict(lm=lm, data=data, rewards=rewards, control=proposal, states=states, feedback=feedback)
            seen = [*seen, experience.explore(root, **given, round=number, seed=seed, **(explore or {}))]
        pools = seen if pool == "all" else seen[-1:]
        round = Round(number, rng.derived_seed(seed, "learn", number), seen, pools, proposal)
        yield round
        proposal = round.proposal


def positive_from(threshold: float | str, rewards: Sequence[Artifact]) -> float | str:
    """The reward from which a sample is positive, for methods that learn from two classes of samples: `threshold`, or
    where it is "judge" that of the first reward.

    Raises:
      InputError: no reward.
    """
    if not rewards:
        raise InputError("no reward was given: expected at least one scorer")
    return float(open_judge(rewards[0]).threshold) if threshold == "judge" else threshold


def adapted(coefficient: float, pool: Artifact, target: float) -> float:
    """A KL coefficient for the next round: larger where the samples of a round are further from the base than `target`,
    nats per token, and smaller where they are nearer, by a fifth at most (the proportional controller of Ziegler et al.
    2019, with a gain of 1 since it acts once a round and theirs, of 0.1, at every batch). The samples must be those of
    the policy alone (`pool.check_drawn`): under a filter they are far from the base before anything is learned."""
    error = pool.metrics()[0]["kl_per_token"] / target - 1
    return coefficient * (1 + min(max(error, -0.2), 0.2))


def history(control: Artifact) -> list[Artifact]:
    """The scored samples that a control and those before it learned from, oldest round first."""
    found: dict[str, Artifact] = {}
    while control is not None:
        inputs = control.spec["inputs"]
        ids = inputs.get("pool") or []
        for id in [ids] if isinstance(ids, str) else ids:
            found[id] = stage.open_artifact(control.path.with_name(f"score-{id}"), control.session)
        before = inputs.get("start_from")
        name = control.path.name.rpartition("-")[0]
        earlier = control.path.with_name(f"{name}-{before}")
        control = None if before is None else stage.open_artifact(earlier, control.session)
    return sorted(found.values(), key=lambda a: a.spec["config"]["round"])


@stage.stage_function("rounds")
def summary(run: Run, *, pools: Sequence[Artifact], seed: int = 0, resamples: int = 1000) -> None:
    """Stage: what each round sampled, as rows of metrics.jsonl with round, name, value, low, high, n: the reward, KL to
    the base in nats per token, perplexity under the base, dist-2. Both are per drawn token, the end of a text included,
    since pools hold the log-probability of all that was drawn; the perplexity of `evaluate` leaves the end out."""
    for artifact in pools:
        pool = Pool.open([artifact])
        boot = evaluation.Bootstrap(pool.column("prompt_id"), seed=seed, resamples=resamples)
        texts = pool.column("text").tolist()
        size = np.asarray([len(t) for t in pool.column("tokens")], np.float64)
        base = pool.column("base").astype(np.float64)
        figures = {
            "reward": boot.mean(pool.column("reward")),
            "KL to base": boot.ratio(pool.column("logp") - base, size),
            "perplexity": boot.transform(lambda x, n: np.exp(x / n), -base, size),
            "dist-2": boot.mean_of_prompts(lambda rows, t=texts: evaluation.distinct([t[i] for i in rows], 2)),
        }
        at = artifact.spec["config"]["round"]
        for name, figure in figures.items():
            run.log(round=at, name=name, **figure.as_json())
