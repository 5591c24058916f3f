"""NADO: a sequence-level oracle, divided among the tokens of a text by a model of its own samples (Meng et al. 2022).

    q(v | y_<t) ∝ p(v | y_<t) R(y_<t, v),   R(y_≤t) = P(c = 1 | y_≤t) under p
    z' = z + alpha log σ(r)

c is any yes or no about a whole text. R is learned from samples of p with their c, as r, the log-odds for every next
token. With the exact R the result is p(y) 1[c(y)] / Z, the closest to p of all that satisfy c. The loss is binary
cross-entropy at every token, and a regularisation that holds because R is an expectation under p:

    Σ_v p(v | y_≤t) R(y_≤t, v) = R(y_≤t)

r is a linear head on the final states of the base ("head"), of a small language model that reads the text ("stream"),
or of a small one that reads the states of the base besides ("mixed", as in the authors' lexical experiments). The head
begins at 0, where R is ½ everywhere and alpha changes nothing; alpha 0 is the base model. Everything is in log space,
and nothing is divided by a learned R, since the softmax normalises.

The authors' GPT-2 script applies σ twice, so no probability that it learns exceeds ½, and its lexical script shifts
mask and regularisation by one token; neither is repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax import methods, rng
from ctg_jax.learn import fitting
from ctg_jax.learn.fitting import Training
from ctg_jax.learn.oracle import Nado, init, loss, teach
from ctg_jax.learn.pool import POSITIVE, Pool, check_drawn
from ctg_jax.learn.rounds import explored, positive_from
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function


def example(lm: LM, key: jax.Array) -> Nado:
    """A random head on a small random model that reads the base's states, for the laws."""
    a, b = jax.random.split(key)
    control = init(lm, a, kind="mixed", shape=dict(width=8, depth=1, heads=2))
    scorer = control.scorer.replace(params=jax.tree.map(lambda x: 4 * x, control.scorer.params))
    kernel = jax.random.normal(b, control.value["kernel"].shape)
    return control.replace(value={**control.value, "kernel": kernel}, scorer=scorer, project=20 * control.project)


def neutral(control: Nado) -> Nado:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact],
    rounds: int = 1,
    explore: Mapping[str, Any] | None = None,
    threshold: float | str = "judge",
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Rounds of explore → score → learn from the samples of all rounds. The first draws from the frozen model, the
    others under the control of the round before, because texts that satisfy c may be rare.

    Args:
      lm: the language model. data: prompts. rewards: the first decides c.
      rounds: how many. explore: settings of `ctg_jax.stages.sampling.sample`, such as n and max_new.
      threshold: reward from which c is 1; "judge": the reward's own, "median": that of the pool.
      seed: of samples and of training. settings: of the stage `nado`.

    Raises:
      InputError: no reward, greedy samples, a filter that leaves tokens no probability, and what the stage raises.
    """
    check_drawn(explore or {}, "nado", POSITIVE)
    check_settings(nado, settings)
    limit = positive_from(threshold, rewards)
    given = dict(lm=lm, data=data, rewards=rewards, explore=explore, pool="all", seed=seed)
    for turn in explored(root, rounds, **given):
        own = settings | {"seed": turn.seed, "threshold": limit}
        turn.proposal = stage(root, nado, own, lm=lm, pool=turn.pools, start_from=turn.proposal)
    return turn.proposal


@stage_function("nado")
def nado(
    run: Run,
    *,
    lm: Artifact,
    pool: Sequence[Artifact],
    start_from: Artifact | None = None,
    threshold: float | str = "median",
    kind: str = "head",
    shape: Mapping[str, int] | None = None,
    weight: float = 1.0,
    divergence: str = "forward",
    limit: float = 10.0,
    training: Training = Training(),
    seed: int = 0,
) -> None:
    """Stage: one round of learning R from a pool.

    Args:
      pool: rounds of samples, by `experience.score`, each weighted by p / q, where q is what drew it.
      start_from: the control of the round before, or None.
      threshold: a number, or "median" of the rewards.
      kind, shape: see `init`. weight, divergence: of the loss. limit: the largest p / q.
      training: how it is trained; each round has a new optimizer, unless `training.rounds` is above 1.
      seed: of initial values, batches and training.

    Raises:
      InputError: all samples on one side of the threshold, and what `init`, `loss` and training raise.
    """
    model, params, tokenizer = open_lm(lm)
    samples = Pool.open(pool)
    made = dict(kind=kind, shape=shape)
    key = rng.stream(jax.random.key(seed), "init")
    control = init(model, key, **made) if start_from is None else methods.load(start_from, model)
    control = teach(
        run, control, loss(model, weight=weight, divergence=divergence), params, tokenizer, samples,
        threshold=threshold, importance=samples.importance(limit), training=training, seed=seed,
        start_from=start_from,
    )  # fmt: skip
    fitting.keep(run, control, "nado", made)
