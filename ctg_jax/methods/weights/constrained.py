"""Fine-tuning under a constraint (attribute-controlled fine-tuning, Meng et al. 2024): texts of people are learned from
while the model stays close to the nearest distribution that satisfies the constraint.

    L(θ) = CE on texts of people + weight KL(q ‖ p_θ),   q(y) = p_θ̄(y) 1[c(y)] / Z

θ̄ is the model at the start of a round, and c any yes or no about a whole text, such as a reward at its threshold. An
oracle R learned from the model's own samples (NADO) divides q among tokens, q_t(v) ∝ p_θ̄(v) R(y_<t, v), so that

    KL(q ‖ p_θ) = E_{y ~ q} Σ_t KL(q_t ‖ p_θ,t)

has every term in closed form over the vocabulary, with the gradient p_θ - q_t at the logits. Each round samples,
teaches R, then changes θ. With weight 0 it is fine-tuning; where c always holds, R is constant and the KL holds the
model where it is. At decoding no guide is left, and `scale` interpolates between the frozen model and the tuned one.

Which texts the sum over tokens runs over, the weight and the number of rounds are not known from the abstract of the
paper, so they are settings: `on` "samples" are the model's own, weighted by 1[c] over its mean, and "corpus" the texts
of people. The paper also describes updates of R and θ in parallel, each with the other's of the round before; here one
follows the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ctg_jax import methods, rng
from ctg_jax.control import Chain
from ctg_jax.data.completions import continuations
from ctg_jax.learn import fitting, losses, oracle
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pool import Pool, batches, check_drawn, read
from ctg_jax.learn.rounds import explored, positive_from
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function
from ctg_jax.types import InputError, Sum

ON = ("samples", "corpus")

init, example, neutral = fitting.delta, fitting.example_delta, fitting.neutral_delta


def loss(lm: LM, *, weight: float = 1.0, on: str = "samples") -> losses.LossFn:
    """Cross-entropy of texts of people plus `weight` · KL(q_t ‖ p_θ,t) at the tokens of a text, the sum of two means
    over tokens.

    params is the change of weights, frozen = {"params": those of the LM, "target": the control that makes q of it};
    the batch has `human` (the text of people after each prompt), and with on="samples" `completion` (a sample of the
    model) and `near` float32 [B], the weight of each sample.

    Raises:
      InputError: another `on`, a weight that is negative.
    """
    if on not in ON:
        raise InputError(f"on is {on!r}, expected one of {', '.join(ON)}.")
    if not weight >= 0:
        raise InputError(f"weight is {weight}, expected a number from 0 up.")

    def far(z, q, tokens):
        return losses.next_token(z, tokens), losses.kl(lax.stop_gradient(q), z)

    def both(params, frozen, batch, keys):
        return tuple(read(lm, frozen["params"], batch, keys, c) for c in (params, frozen["target"]))

    def total(params, frozen, batch, keys):
        human = {**batch, "completion": batch["human"], "written": batch["human_written"]}
        if on == "corpus":
            nll, gap = reduced(both(params, frozen, human, keys), far, human["completion"])
            rows, written = jnp.ones(len(gap)), human["written"]
        else:
            nll = reduced(read(lm, frozen["params"], human, keys, params), losses.next_token, human["completion"])
            gap = reduced(both(params, frozen, batch, keys), far, batch["completion"])[1]
            rows, written = batch["near"], batch["written"]
        ce, count = losses.masked_sum(nll, human["written"])
        apart, tokens = losses.masked_sum(rows[:, None] * gap, written)
        value = ce + weight * apart * count / jnp.maximum(tokens, 1.0)
        return Sum(value, count, {"cross_entropy": (ce, count), "divergence": (apart, tokens)})

    return total


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact],
    rounds: int = 3,
    explore: Mapping[str, Any] | None = None,
    threshold: float | str = "judge",
    guide: Mapping[str, Any] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Rounds of explore → score → teach the oracle → learn, each from the samples of the model as it is.

    Args:
      lm: the language model. data: texts of people and their prompts, see `ctg_jax.data.completions.continuations`.
      rewards: the first decides c.
      rounds: how many. explore: settings of `ctg_jax.stages.sampling.sample`, without a filter.
      threshold: reward from which c is 1; "judge": the reward's own, "median": that of the samples of a round.
      guide: settings of the stage `constrained_oracle`, such as kind and training.
      seed: of samples and of training. settings: of the stage `constrained`.

    Raises:
      InputError: no reward, greedy samples or a filter, and what the stages raise.
    """
    check_drawn(explore or {}, "constrained")
    check_settings(constrained, settings)
    check_settings(constrained_oracle, guide or {})
    limit = positive_from(threshold, rewards)
    taught = None
    for turn in explored(root, rounds, lm=lm, data=data, rewards=rewards, explore=explore, seed=seed):
        common = {"seed": turn.seed, "threshold": limit}
        given = dict(lm=lm, pool=turn.pools)
        before = turn.proposal
        taught = stage(root, constrained_oracle, dict(guide or {}) | common, **given, start_from=taught, policy=before)
        own = settings | common
        turn.proposal = stage(root, constrained, own, **given, data=data, guide=taught, start_from=before)
    return turn.proposal


@stage_function("constrained_oracle")
def constrained_oracle(
    run: Run,
    *,
    lm: Artifact,
    pool: Sequence[Artifact],
    policy: Artifact | None = None,
    start_from: Artifact | None = None,
    threshold: float | str = "median",
    kind: str = "head",
    shape: Mapping[str, int] | None = None,
    weight: float = 1.0,
    divergence: str = "forward",
    training: Training = Training(),
    seed: int = 0,
) -> None:
    """Stage: the oracle R of the model as it is, learned from its samples.

    Args:
      pool: the samples of the round, by `experience.score`. policy: what drew them, None for the frozen model.
      start_from: the oracle of the round before, or None.
      threshold: a number, or "median" of the rewards.
      kind, shape, weight, divergence, training, seed: as of the stage `nado`.

    Raises:
      InputError: what `learn.oracle.teach` raises.
    """
    model, params, tokenizer = open_lm(lm)
    samples = Pool.open(pool)
    made = dict(kind=kind, shape=shape)
    key = rng.stream(jax.random.key(seed), "init")
    control = oracle.init(model, key, **made) if start_from is None else methods.load(start_from, model)
    params = params if policy is None else methods.load(policy, model).weights(params)
    objective = oracle.loss(model, weight=weight, divergence=divergence)
    control = oracle.teach(
        run, control, objective, params, tokenizer, samples, threshold=threshold, importance=np.ones(len(samples)),
        training=training, seed=seed, start_from=start_from,
    )  # fmt: skip
    fitting.keep(run, control, "nado", made)


@stage_function("constrained")
def constrained(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    pool: Sequence[Artifact],
    guide: Artifact,
    start_from: Artifact | None = None,
    threshold: float | str = "median",
    weight: float = 1.0,
    on: str = "samples",
    adapter: Adapter = Adapter(),
    training: Training = Training(),
    seed: int = 0,
) -> None:
    """Stage: one round of learning from texts of people and from the oracle.

    Args:
      data: see `fit`. pool: the samples of the round, by `experience.score`. guide: the oracle that they taught.
      start_from: the model that drew the samples, None for the frozen one.
      threshold: a number, or "median" of the rewards. weight, on: see `loss`.
      adapter: the change of weights. training: how it is trained; texts of people are cut to its `tokens`.
      seed: of initial values, batches and training.

    Raises:
      InputError: no sample satisfies the constraint, and what `loss`, `continuations` and training raise.
    """
    model, params, tokenizer = open_lm(lm)
    value = loss(model, weight=weight, on=on)
    samples = Pool.open(pool)
    good = samples.column("reward") >= samples.threshold(threshold)
    if not good.any():
        raise InputError(f"none of the {len(good)} samples satisfies the constraint: raise n, or set threshold.")
    key = rng.stream(jax.random.key(seed), "init")
    policy = init(model, key, **vars(adapter)) if start_from is None else methods.load(start_from, model)
    frozen = {"params": params, "target": Chain((policy, methods.load(guide, model)))}
    human = continuations(data.rows("data.jsonl"), tokenizer, training.tokens)
    tails = np.empty(len(samples), object)
    tails[:] = [human[i] for i in samples.column("prompt_id")]
    samples = samples.with_(human=tails, near=(good / good.mean()).astype(np.float32))
    rows = batches(samples, tokenizer, batch=training.batch, seed=seed, fields=("near",), also="human")
    policy = fitting.train(
        run, policy, value, frozen, rows, training.at(adapter.rate), trained=r"changes/.*", seed=seed,
        start_from=start_from,
    )  # fmt: skip
    run.record(constraint={"samples": len(good), "positives": int(good.sum())})
    fitting.keep(run, policy, "constrained", vars(adapter))
