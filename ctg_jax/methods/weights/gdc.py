"""GDC (Khalifa et al. 2021): the distribution closest to the LM in which features occur at given rates; and the
KL-adaptive distributional policy gradient that turns it into a policy.

Where every prompt has a normaliser of its own (`per_prompt`, Korbak et al. 2022a), a share such as .8 is that of all
texts together: prompts after which a feature is frequent have it more often, others less. The paper's unconditional
generation is the case of one empty prompt, for which the model reads its beginning token. The paper's tasks are single
words, lists of words, and classes with the share of each; `configs/gdc.py` has them.

Korbak et al. 2022a is "Controlling Conditional Language Models without Catastrophic Forgetting", 2022b is "On
Reinforcement Learning and Distribution Matching for Fine-Tuning Language Models with no Catastrophic Forgetting".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import methods, rng
from ctg_jax.control import Chain
from ctg_jax.learn import experience, fitting, losses
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pool import POSITIVE, Pool, batches, check_drawn, drawing_filter, log_probabilities, read
from ctg_jax.learn.rounds import explored
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function
from ctg_jax.stages.judges import open_judge
from ctg_jax.types import InputError, Sum

init, example, neutral = fitting.delta, fitting.example_delta, fitting.neutral_delta


def loss(lm: LM, baseline: float | None = None) -> losses.LossFn:
    """-w(x) log π(x) per sequence: its gradient is that of KL(p ‖ π) where w = P / (Z q) and q drew x (Parshakova et
    al. 2019; Khalifa et al. 2021, algorithm 1). The batch has `weight` float32 [B]; frozen = {"params"}.

    Args:
      baseline: adds π(x) / q(x), at most this number, to each term: the off-policy baseline of Korbak et al. 2022b.
        The gradient becomes (π / q - w) ∇ log π, which is the same on average, since the mean of (π / q) ∇ log π under
        q is 0; but it is 0 for every text where π = P / Z, so that none becomes likelier than the target has it. The
        batch then has `logp` float32 [B], log q. None: no baseline.

    Raises:
      InputError: a baseline that is not above 0.
    """
    if baseline is not None and not baseline > 0:
        raise InputError(f"samples.baseline is {baseline}, expected a number above 0, such as 10, or None")

    def total(params, frozen, batch, keys):
        text = read(lm, frozen["params"], batch, keys, params)
        nll = reduced(text, losses.next_token, batch["completion"])
        nll = jnp.sum(jnp.where(batch["written"], nll, 0.0), axis=1)
        rows = jnp.any(batch["written"], axis=1)
        weight = batch["weight"]
        if baseline is not None:
            weight = weight - jnp.exp(jnp.minimum(-jax.lax.stop_gradient(nll) - batch["logp"], math.log(baseline)))
        value, count = losses.masked_sum(weight * nll, rows)
        return Sum(value, count, {"nll": (losses.masked_sum(nll, rows)[0], count)})

    return total


def multipliers(
    features: np.ndarray,
    moments: Sequence[float],
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """λ float64 [F] for which samples with weights w · exp(λ · φ) have the given mean features: self-normalised
    importance sampling (Khalifa et al. 2021, section 2.2), solved as the convex dual by Newton's method.

    Where each of C groups has a normaliser Z_c of its own, the dual is Σ_c log Z_c(λ) / C - λ · μ, and the mean feature
    is the mean over groups.

    Args:
      features: φ of samples of the base, float [n, F].
      moments: the mean that each feature should have, μ.
      weights: [n], of pointwise constraints; 1 by default.
      groups: [n], the group of each sample, such as its prompt; None: all are one. A group without weight is left out.

    Raises:
      InputError: a moment outside what the samples reach.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    phi, mu = np.asarray(features, np.float64), np.asarray(moments, np.float64)
    w = np.ones(len(phi)) if weights is None else np.asarray(weights, np.float64)
    groups = np.zeros(len(phi), int) if groups is None else np.asarray(groups)
    phi, w, groups = phi[w > 0], w[w > 0], groups[w > 0]
    parts = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    for f in range(phi.shape[1]):
        low, high = (np.mean([pick(phi[at, f]) for at in parts] or [np.nan]) for pick in (np.min, np.max))
        if not low < mu[f] < high:
            raise InputError(
                f"moment {f} is {mu[f]:g} and the feature is between {low:g} and {high:g} in {len(phi)} samples of "
                "the base: ask for a value between them, or sample more"
            )

    def dual(lam):
        value, slope, curve = -lam @ mu, -mu, np.zeros((len(mu), len(mu)))
        for at in parts:
            log_w = phi[at] @ lam + np.log(w[at])
            total = logsumexp(log_w)
            p = np.exp(log_w - total)
            mean = p @ phi[at]
            value += total / len(parts)
            slope = slope + mean / len(parts)
            curve += ((phi[at] * p[:, None]).T @ phi[at] - np.outer(mean, mean)) / len(parts)
        return value, slope, curve

    found = minimize(
        lambda x: dual(x)[0],
        np.zeros(len(mu)),
        jac=lambda x: dual(x)[1],
        hess=lambda x: dual(x)[2],
        method="trust-exact",
    )
    if np.abs(dual(found.x)[1]).max() > 1e-4:
        raise InputError(
            f"no weights of the {len(phi)} samples have the moments {mu.tolist()}: they contradict each other, or the "
            "base has too few such samples"
        )
    return found.x


def importance(log_p: np.ndarray, log_q: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """P / (Z q) float64 [n] of samples of q, with Z estimated on them (in each group apart, where groups are given); a
    group without any mass has weights 0. Differences are taken from the largest of a group, so none overflows."""
    groups = np.zeros(len(log_p), int) if groups is None else np.unique(groups, return_inverse=True)[1]
    gap = np.asarray(log_p, np.float64) - log_q
    top = np.full(groups.max() + 1, -np.inf)
    np.maximum.at(top, groups, gap)
    ratio = np.exp(gap - np.where(np.isfinite(top), top, 0.0)[groups])
    mean = np.bincount(groups, ratio) / np.bincount(groups)
    return np.divide(ratio, mean[groups], out=np.zeros_like(ratio), where=mean[groups] > 0)


def held_out(prompts: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool [n]: which samples the policy does not learn from, so that they can tell whether it is nearer to the target:
    those of a random share of the prompts, at least one; where there are fewer than four prompts, every k-th sample.

    Args:
      prompts: [n], the prompt of each sample. share: between 0 and 1. seed: of the choice.

    Raises:
      InputError: another share; fewer than two samples.
    """
    prompts = np.asarray(prompts)
    if not 0 < share < 1:
        raise InputError(f"held is {share}, expected a share between 0 and 1, such as 0.25")
    if len(prompts) < 2:
        raise InputError(f"the pool has {len(prompts)} sample, expected at least 2: one is held out")
    distinct = np.unique(prompts)
    if len(distinct) < 4:
        every = max(2, round(1 / share))
        return np.arange(len(prompts)) % every == min(every, len(prompts)) - 1
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    return np.isin(prompts, np.random.default_rng(seed).choice(distinct, count, replace=False))


def energies(pool: Pool, names: Sequence[str], moments: Sequence[float], thresholds, lam=()) -> np.ndarray:
    """log P(x) float64 [n]: log a(x) + log b(x) + λ · φ(x), up to Z. A feature is 1 where its reward reaches the
    threshold; a moment of 1 is pointwise (b), others are distributional (λ in their order)."""
    log_p = pool.column("base").astype(np.float64)
    rest = iter(lam)
    for name, moment, threshold in zip(names, moments, thresholds, strict=True):
        phi = pool.column(f"reward_{name}") >= threshold
        log_p = np.where(phi, log_p, -np.inf) if moment == 1 else log_p + next(rest) * phi
    return log_p


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact],
    moments: Mapping[str, float],
    rounds: int = 4,
    explore: Mapping[str, Any] | None = None,
    base_samples: int = 16,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Rounds of explore → score → learn. Samples are drawn by the proposal, which becomes the policy after each round
    that brought the policy closer to the target than the proposal is.

    Args:
      moments: name of a reward -> share of texts that should reach its threshold; 1 for all of them.
      base_samples: of each prompt, at least, from which λ is solved where prompts have normalisers of their own; where
        `explore` draws fewer, the frozen model draws this number once.
      lm, data, rewards, rounds, explore, seed: see `quark.fit`. settings: of the stage `gdc`. Of the filters those that
        leave every token a probability may be there (`POSITIVE`): a text that cannot be drawn has no weight.

    Raises:
      InputError: moments of rewards that are not there, rounds below 1, greedy samples, or another filter.
    """
    check_settings(gdc, settings)
    check_drawn(explore or {}, "gdc", POSITIVE)
    drawn, policy, base = dict(explore or {}), None, None
    few = drawn.get("n", base_samples) < base_samples and settings.get("per_prompt", True)
    if few and any(moment < 1 for moment in moments.values()):
        drawn |= {"n": base_samples, "seed": rng.derived_seed(seed, "base", 0)}
        base = experience.explore(root, lm=lm, data=data, rewards=rewards, **drawn)
    for turn in explored(root, rounds, lm=lm, data=data, rewards=rewards, explore=explore, seed=seed):
        given = {"pool": turn.pools[0], "base": base or turn.seen[0], "rewards": list(rewards), "start_from": policy}
        own = settings | {"moments": dict(moments), "seed": turn.seed}
        policy = stage(root, gdc, own, lm=lm, **given)
        turn.proposal = policy if policy.spec["closer"] else turn.proposal
    return policy


@dataclasses.dataclass(frozen=True)
class Samples:
    """How the stage `gdc` uses samples: the section `samples`.

    Attributes:
      limit: largest weight, or None.
      held: the share of prompts whose samples decide, see `held_out`.
      passes: over the samples that have a weight, at most; fewer updates than `training.steps` are made where they
        would be more. None: no limit.
      baseline: see `loss`; texts of weight 0 are learned from as well, wherever their prompt has others.
    """

    limit: float | None = None
    held: float = 0.25
    passes: float | None = 2.0
    baseline: float | None = None


@stage_function("gdc", revision=1)
def gdc(
    run: Run,
    *,
    lm: Artifact,
    pool: Artifact,
    base: Artifact,
    rewards: Sequence[Artifact],
    moments: Mapping[str, float],
    start_from: Artifact | None = None,
    per_prompt: bool = True,
    samples: Samples = Samples(),
    adapter: Adapter = Adapter(),
    training: Training = Training(steps=100, warmup=0),
    seed: int = 0,
) -> None:
    """Stage: λ from samples of the base, weights of the proposal's samples, one round of learning, and whether the
    policy is now closer to the target than the proposal (`closer` in spec.json). That is decided on samples which the
    policy did not learn from; on its own it always looks close. metrics.jsonl has both gaps, KL(p ‖ π) - KL(p ‖ q).

    Args:
      pool: samples of the proposal, scored. base: samples of the frozen model, scored. start_from: the policy so far.
      moments: see `fit`.
      per_prompt: whether each prompt has a Z of its own, so that every prompt counts the same (Korbak et al. 2022a);
        False: one Z.
      samples: how those of the pool are used.
      adapter: the change of weights. training: how it is trained.
      seed: of initial values, batches and training.

    Raises:
      InputError: an unknown reward, `passes` with one schedule over several rounds, no sample of the pool has the
        features, samples that `fit` would not draw, and what `multipliers` raises.
    """
    for part in (pool, base):
        check_drawn(part.spec["drawn"], "gdc", POSITIVE)
    model, params, tokenizer = open_lm(lm)
    judges = [open_judge(a) for a in rewards]
    thresholds = {j.name: j.threshold for j in judges}
    for name, moment in moments.items():
        if name not in thresholds:
            raise InputError(f"moments names {name!r}, expected one of the rewards {', '.join(thresholds)}")
        if not 0 < moment <= 1:
            raise InputError(f"the moment of {name!r} is {moment}, expected above 0 and at most 1")
    asked = (list(moments), list(moments.values()), [thresholds[n] for n in moments])
    origin, drawn = Pool.open([base]), Pool.open([pool])
    soft = [(n, m) for n, m in moments.items() if m < 1]
    lam = np.zeros(0)
    if soft:
        phi = np.stack([origin.column(f"reward_{n}") >= thresholds[n] for n, _ in soft], axis=1)
        # The samples of the base were drawn under the filter: weights make them samples of the base itself.
        groups = origin.column("prompt_id") if per_prompt else None
        own = importance(energies(origin, *asked, lam=np.zeros(len(soft))), origin.column("logp"), groups)
        lam = multipliers(phi, [m for _, m in soft], own, groups)
    log_q = drawn.column("logp").astype(np.float64)
    groups = drawn.column("prompt_id") if per_prompt else np.zeros(len(drawn), int)
    weight = importance(energies(drawn, *asked, lam=lam), log_q, groups)
    if not weight.any():
        raise InputError(
            f"none of the {len(weight)} samples has what moments asks for: raise n, or start from a control"
        )
    weight = weight if samples.limit is None else np.minimum(weight, samples.limit)
    if samples.baseline is None:  # rows of weight 0 are left out, and the others represent all
        used = np.flatnonzero(weight)
        scale = len(used) / len(weight)
    else:
        used, scale = np.flatnonzero(np.isin(groups, groups[weight > 0])), 1.0
    chosen = drawn.with_(weight=(weight * scale).astype(np.float32)).take(used)
    held_back = held_out(chosen.column("prompt_id"), samples.held, seed)
    learned = chosen.take(np.flatnonzero(~held_back))
    if samples.passes is not None and training.rounds > 1:
        raise InputError(
            f"samples.passes is {samples.passes:g} and training.rounds {training.rounds}: one schedule over all rounds "
            "needs as many updates in each, so set passes to None"
        )
    if samples.passes is not None:
        most = max(1, math.ceil(samples.passes * len(learned) / training.batch))
        training = dataclasses.replace(training, steps=min(training.steps, most))
    policy = init(model, rng.stream(jax.random.key(seed), "init"), **vars(adapter))
    policy = policy if start_from is None else methods.load(start_from, model)
    fields = ("weight",) if samples.baseline is None else ("weight", "logp")
    rows = batches(learned, tokenizer, batch=training.batch, seed=seed, fields=fields)
    policy = fitting.train(
        run, policy, loss(model, samples.baseline), {"params": params}, rows, training.at(adapter.rate),
        trained="changes/.*", seed=seed, start_from=start_from,
    )  # fmt: skip
    # The next proposal is the policy under the filter.
    new = Chain((policy, drawing_filter([pool], model)))
    log_pi = log_probabilities(model, params, chosen, tokenizer, new, batch=training.batch)
    mass = weight[used]  # with a baseline those held out may have none, and then say that nothing is closer
    nearer = mass * (log_q[used] - log_pi)
    gap, own_gap = (float(nearer[at].sum() / max(mass[at].sum(), 1e-30)) for at in (held_back, ~held_back))
    run.record(closer=gap < 0, gap=gap, lam=dict(zip([n for n, _ in soft], lam.tolist())))
    effective = float(weight.sum() ** 2 / np.square(weight).sum())
    run.log(kl_gap=gap, kl_gap_learned=own_gap, effective=effective, used=len(used), updates=training.steps)
    fitting.keep(run, policy, "gdc", vars(adapter))
