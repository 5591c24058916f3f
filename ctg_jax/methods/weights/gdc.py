"""GDC (Khalifa et al. 2021): the distribution closest to the LM in which features occur at given rates; and the
KL-adaptive distributional policy gradient that turns it into a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import methods, rng
from ctg_jax.control import Chain
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pool import POSITIVE, Pool, batches, check_drawn, drawing_filter, log_probabilities, read
from ctg_jax.learn.rounds import explored
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.stages.judges import open_judge
from ctg_jax.types import InputError, Sum

init, example, neutral = fitting.delta, fitting.example_delta, fitting.neutral_delta


def loss(lm: LM) -> losses.LossFn:
    """-w(x) log π(x) per sequence: its gradient is that of KL(p ‖ π) where w = P / (Z q) and q drew x (Parshakova et
    al. 2019; Khalifa et al. 2021, algorithm 1). The batch has `weight` float32 [B]; frozen = {"params"}."""

    def total(params, frozen, batch, keys):
        text = read(lm, frozen["params"], batch, keys, params)
        nll = reduced(text, losses.next_token, batch["completion"])
        nll = jnp.sum(jnp.where(batch["written"], nll, 0.0), axis=1)
        rows = jnp.any(batch["written"], axis=1)
        value, count = losses.masked_sum(batch["weight"] * nll, rows)
        return Sum(value, count, {"nll": (losses.masked_sum(nll, rows)[0], count)})

    return total


def multipliers(features: np.ndarray, moments: Sequence[float], weights: np.ndarray | None = None) -> np.ndarray:
    """λ float64 [F] for which samples with weights w · exp(λ · φ) have the given mean features: self-normalised
    importance sampling (Khalifa et al. 2021, section 2.2), solved as the convex dual by Newton's method.

    Args:
      features: φ of samples of the base, float [n, F].
      moments: the mean that each feature should have.
      weights: [n], of pointwise constraints; 1 by default.

    Raises:
      InputError: a moment outside what the samples reach.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    phi, mu = np.asarray(features, np.float64), np.asarray(moments, np.float64)
    w = np.ones(len(phi)) if weights is None else np.asarray(weights, np.float64)
    phi, w = phi[w > 0], w[w > 0]
    for f in range(phi.shape[1]):
        low, high = phi[:, f].min(initial=np.inf), phi[:, f].max(initial=-np.inf)
        if not low < mu[f] < high:
            raise InputError(
                f"moment {f} is {mu[f]:g} and the feature is between {low:g} and {high:g} in {len(phi)} samples of "
                "the base: ask for a value between them, or sample more"
            )

    def dual(lam):
        log_w = phi @ lam + np.log(w)
        p = np.exp(log_w - logsumexp(log_w))
        return logsumexp(log_w) - lam @ mu, p @ phi - mu, (phi * p[:, None]).T @ phi - np.outer(p @ phi, p @ phi)

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
    group without any mass has weights 0."""
    groups = np.zeros(len(log_p), int) if groups is None else np.unique(groups, return_inverse=True)[1]
    ratio = np.exp(np.asarray(log_p, np.float64) - log_q)
    mean = np.bincount(groups, ratio) / np.bincount(groups)
    return np.divide(ratio, mean[groups], out=np.zeros_like(ratio), where=mean[groups] > 0)


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
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Rounds of explore → score → learn. Samples are drawn by the proposal, which becomes the policy after each round
    that brought the policy closer to the target than the proposal is.

    Args:
      moments: name of a reward -> share of texts that should reach its threshold; 1 for all of them.
      lm, data, rewards, rounds, explore, seed: see `quark.fit`. settings: of the stage `gdc`. Of the filters those that
        leave every token a probability may be there (`POSITIVE`): a text that cannot be drawn has no weight.

    Raises:
      InputError: moments of rewards that are not there, rounds below 1, greedy samples, or another filter.
    """
    check_drawn(explore or {}, "gdc", POSITIVE)
    policy = None
    for turn in explored(root, rounds, lm=lm, data=data, rewards=rewards, explore=explore, seed=seed):
        given = {"pool": turn.pools[0], "base": turn.seen[0], "rewards": list(rewards), "start_from": policy}
        own = settings | {"moments": dict(moments), "seed": turn.seed}
        policy = stage(root, gdc, own, lm=lm, **given)
        turn.proposal = policy if policy.spec["closer"] else turn.proposal
    return policy


@stage_function("gdc")
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
    limit: float | None = None,
    adapter: Adapter = Adapter(),
    training: Training = Training(steps=100, warmup=0),
    seed: int = 0,
) -> None:
    """Stage: λ from samples of the base, weights of the proposal's samples, one round of learning, and whether the
    policy is now closer to the target than the proposal (`closer` in spec.json).

    Args:
      pool: samples of the proposal, scored. base: samples of the frozen model, scored. start_from: the policy so far.
      moments: see `fit`.
      per_prompt: whether each prompt has a Z of its own, so that every prompt counts the same (Korbak et al. 2022);
        False: one Z.
      limit: largest weight, or None.
      adapter: the change of weights. training: how it is trained.
      seed: of initial values, batches and training.

    Raises:
      InputError: an unknown reward, no sample of the pool has the features, samples that `fit` would not draw, and what
        `multipliers` raises.
    """
    for drawn in (pool, base):
        check_drawn(drawn.spec["drawn"], "gdc", POSITIVE)
    model, params, tokenizer = open_lm(lm)
    judges = [open_judge(a) for a in rewards]
    thresholds = {j.name: j.threshold for j in judges}
    for name, moment in moments.items():
        if name not in thresholds:
            raise InputError(f"moments names {name!r}, expected one of the rewards {', '.join(thresholds)}")
        if not 0 < moment <= 1:
            raise InputError(f"the moment of {name!r} is {moment}, expected above 0 and at most 1")
    asked = (list(moments), list(moments.values()), [thresholds[n] for n in moments])
    origin, samples = Pool.open([base]), Pool.open([pool])
    soft = [(n, m) for n, m in moments.items() if m < 1]
    lam = np.zeros(0)
    if soft:
        phi = np.stack([origin.column(f"reward_{n}") >= thresholds[n] for n, _ in soft], axis=1)
        # The samples of the base were drawn under the filter: weights make them samples of the base itself.
        own = importance(energies(origin, *asked, lam=np.zeros(len(soft))), origin.column("logp"))
        lam = multipliers(phi, [m for _, m in soft], own)
    log_q = samples.column("logp").astype(np.float64)
    weight = importance(energies(samples, *asked, lam=lam), log_q, samples.column("prompt_id") if per_prompt else None)
    if not weight.any():
        raise InputError(
            f"none of the {len(weight)} samples has what moments asks for: raise n, or start from a control"
        )
    weight = weight if limit is None else np.minimum(weight, limit)
    used = np.flatnonzero(weight)
    scale = len(used) / len(weight)  # rows of weight 0 are left out, and the others represent all
    chosen = samples.with_(weight=(weight * scale).astype(np.float32)).take(used)
    policy = init(model, rng.stream(jax.random.key(seed), "init"), **vars(adapter))
    policy = policy if start_from is None else methods.load(start_from, model)
    rows = batches(chosen, tokenizer, batch=training.batch, seed=seed, fields=("weight",))
    policy = fitting.train(
        run, policy, loss(model), {"params": params}, rows, training.at(adapter.rate), trained="changes/.*", seed=seed
    )
    # The next proposal is the policy under the filter.
    new = Chain((policy, drawing_filter([pool], model)))
    log_pi = log_probabilities(model, params, chosen, tokenizer, new, batch=training.batch)
    share = weight[used] / weight.sum()
    gap = float(share @ (log_q[used] - log_pi))  # KL(p ‖ π) - KL(p ‖ q)
    run.record(closer=gap < 0, gap=gap, lam=dict(zip([n for n, _ in soft], lam.tolist())))
    run.log(kl_gap=gap, effective=float(weight.sum() ** 2 / np.square(weight).sum()), used=len(used))
    fitting.keep(run, policy, "gdc", vars(adapter))
