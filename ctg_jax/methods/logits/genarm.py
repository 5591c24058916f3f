"""GenARM: language models that were trained as rewards guide another one token by token (Xu et al. 2025).

    z' = z + alpha Σ_k share_k log π_k(v | x, y_<t)

Each π_k is an autoregressive reward model: r_k(x, y) = Σ_t log π_k(y_t | x, y_<t), with the loss of Bradley & Terry on
pairs of texts,

    -log σ(β (r(x, y⁺) - r(x, y⁻)))

π_k is the base model with a change of its weights, or a small model with the base's tokenizer. One pass of π_k scores
every next token, and several of them, one for each preference, are mixed while decoding:

    control = methods.load(genarm.fit(root, lm=lm, data=data, rewards=[polite, short]), model)
    control = control.replace(share=jnp.array([0.8, 0.2]))

The result is p Π_k π_k^(alpha share_k), normalised at every step, so alpha is 1/β of KL-regularised reinforcement
learning, 1 by default; alpha 0 is the base model. The authors' code divides the exponents by their sum and samples at
the temperature 1 / (1 + alpha), which is the same distribution at temperature 1: truncation and temperature follow this
control in a chain as usual. Log-likelihoods are sums over tokens, with no reference model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import methods, rng
from ctg_jax.control import Control
from ctg_jax.controls.conditions import condition, per_row
from ctg_jax.controls.streams import Stream, check_vocabulary
from ctg_jax.data.ids import check_shared
from ctg_jax.learn import fitting, losses, preferences
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.pool import Pool, batches, nats
from ctg_jax.learn.pretrain import small_lm
from ctg_jax.learn.rounds import explored
from ctg_jax.models.lm import LM
from ctg_jax.models.record import of_record, record
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.support import removed
from ctg_jax.types import InputError, Sum


@struct.dataclass
class GenArm(Control):
    """z + alpha Σ_k share_k log softmax(r_k). A token that the control of a stream removed keeps the logit it has.

    Attributes:
      rewards: K streams. Tokens at the end of their vocabularies that the base lacks are left out.
      alpha: float32 [] or, per row, [B]; 0 is the base model.
      share: float32 [K], the part of `alpha` that each reward model has.
      shares: None, or the name of a float [B, K] entry of `prompts.cond` that takes the place of `share`.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    rewards: tuple[Stream, ...]
    alpha: jax.Array
    share: jax.Array
    shares: str | None = struct.field(pytree_node=False, default=None)
    cond: str | None = struct.field(pytree_node=False, default=None)

    def check(self, prompts):
        for stream in self.rewards:
            stream.check(prompts)

    def init(self, prompts, length):
        share = self.share[None]
        if self.shares is not None:
            share = condition(prompts, self.shares).astype(jnp.float32)
            wanted = (prompts.tokens.shape[0], len(self.rewards))
            if share.shape != wanted:
                raise InputError(f"prompts.cond[{self.shares!r}] has shape {share.shape}, expected {wanted}.")
        alpha = per_row(self.alpha, prompts, self.cond)
        strengths = tuple(alpha * share[:, k].reshape(-1, 1, 1) for k in range(len(self.rewards)))
        return strengths, tuple(stream.init(prompts, length) for stream in self.rewards)

    def readers(self):
        named = ((f"reward model {k + 1}", stream) for k, stream in enumerate(self.rewards))
        return tuple(reader for name, stream in named for reader in stream.readers(name))

    def logits(self, z, h, tokens, mask, state):
        size, after, out = z.shape[-1], [], z
        for k, (stream, strength, reading) in enumerate(zip(self.rewards, *state)):
            check_vocabulary(f"Reward model {k + 1}", stream.lm.vocab, size, larger=True)
            r, _, reading = stream.read(tokens, mask, z.shape[1], reading)
            r = r[..., :size]
            after.append(reading)
            out = out + strength * jnp.where(removed(r), 0.0, jax.nn.log_softmax(r, axis=-1))
        return out, (state[0], tuple(after))


def init(
    lm: LM,
    key: jax.Array,
    *,
    models: int = 1,
    small: Mapping[str, Any] | None = None,
    adapter: Mapping[str, Any] | None = None,
    alpha: float = 1.0,
    share: Sequence[float] | None = None,
    shares: str | None = None,
    cond: str | None = None,
) -> GenArm:
    """Reward models that have learned nothing.

    Args:
      models: K, their number.
      small: the fields of a decoder that each reward model is a change of; None: the base model.
      adapter: settings of `learn.fitting.delta`.
      alpha, shares, cond: see `GenArm`.
      share: K numbers; None: 1/K each.

    Raises:
      InputError: models below 1, alpha or a share that is not finite, another number of shares, a small model with
        fewer tokens than the base.
    """
    if models < 1:
        raise InputError(f"models is {models}, expected at least 1.")
    share = [1 / models] * models if share is None else share
    if not isinstance(alpha, jax.Array) and not np.all(np.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}, expected a finite number.")
    if len(share) != models or not np.all(np.isfinite(share)):
        raise InputError(f"share is {list(share)}, expected {models} finite numbers, one for each reward model.")
    reader = lm if small is None else of_record(small)
    check_vocabulary("The small model", reader.vocab, lm.vocab, larger=True)
    streams = []
    for k in range(models):
        a, b = jax.random.split(rng.stream(key, f"model {k}"))
        own = None if small is None else reader.init(a)
        streams.append(Stream(own, fitting.delta(reader, b, **(adapter or {})), lm=reader))
    return GenArm(tuple(streams), jnp.asarray(alpha, jnp.float32), jnp.asarray(share, jnp.float32), shares, cond)


def example(lm: LM, key: jax.Array) -> GenArm:
    """Two random changes of weights, for the laws."""
    control = init(lm, key, models=2, adapter={"rank": 2}, share=(0.7, 0.3))
    changed = zip(control.rewards, jax.random.split(key))
    return control.replace(rewards=tuple(s.replace(control=fitting.example_delta(lm, k)) for s, k in changed))


def neutral(control: GenArm) -> GenArm:
    """Strength 0."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))


def loss(lm: LM, *, beta: float = 0.05) -> losses.LossFn:
    """-log σ(β (r(y⁺) - r(y⁻))), r the log-likelihood of a whole text; the mean over pairs.

    params is the change of weights, frozen = {"params": those of `lm`, the model that is changed}; the batch has
    `completion` (the better text) and `rejected`, by `batches(also="rejected")`.

    Raises:
      InputError: beta is not positive.
    """
    if not beta > 0:
        raise InputError(f"beta is {beta}, expected a positive number.")

    def total(params, frozen, batch, keys):
        better, worse = (
            jnp.sum(nats(lm, frozen["params"], batch, keys, params, name, real), axis=1)
            for name, real in (("completion", "written"), ("rejected", "rejected_written"))
        )
        gap = beta * (worse - better)
        weight = jnp.float32(len(gap))
        metrics = {"gap": (jnp.sum(gap), weight), "accuracy": (jnp.sum(gap > 0, dtype=jnp.float32), weight)}
        return Sum(jnp.sum(-jax.nn.log_sigmoid(gap)), weight, metrics)

    return total


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact] = (),
    small: Mapping[str, Any] | None = None,
    rounds: int = 1,
    explore: Mapping[str, Any] | None = None,
    alpha: float = 1.0,
    share: Sequence[float] | None = None,
    shares: str | None = None,
    cond: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """A reward model for each of `rewards`, trained on pairs of samples that it ranks; without rewards one model,
    trained on the pairs of `data`.

    Args:
      lm: the language model.
      data: prompts; without rewards, records with a prompt, `chosen` and `rejected`.
      small: what the reward models change, see `ctg_jax.learn.pretrain.small_lm`; None: `lm`.
      rounds: rounds of sampling, the first by the frozen model and the others by the control of the round before; all
        samples are paired. The paper has one. explore: settings of `ctg_jax.stages.sampling.sample`.
      alpha, share, shares, cond: see `init`.
      seed: of samples and of training. settings: of the stage `genarm_reward`.

    Raises:
      InputError: what these stages raise.
    """
    reader = lm
    if small is not None:
        reader = small_lm(root, small, lm=lm, data=None if rewards else data)
    hp = dict(alpha=alpha, share=None if share is None else list(share), shares=shares, cond=cond)
    given = {} if small is None else {"small": reader}

    def combined(changes):
        return stage(root, genarm, hp, lm=lm, changes=changes, **given)

    if not rewards:
        settings = settings | {"seed": seed}
        return combined([stage(root, genarm_reward, settings, lm=lm, data=data, **given)])
    for turn in explored(root, rounds, lm=lm, data=data, rewards=rewards, explore=explore, pool="all", seed=seed):
        own = [settings | {"seed": turn.seed, "reward": reward.spec["config"]["name"]} for reward in rewards]
        turn.proposal = combined([stage(root, genarm_reward, one, lm=lm, pool=turn.pools, **given) for one in own])
    return turn.proposal


@stage_function("genarm_reward")
def genarm_reward(
    run: Run,
    *,
    lm: Artifact,
    pool: Sequence[Artifact] = (),
    data: Artifact | None = None,
    small: Artifact | None = None,
    reward: str = "",
    beta: float = 0.05,
    adapter: Adapter = Adapter(),
    training: Training = Training(),
    seed: int = 0,
) -> None:
    """Stage: one reward model, a change of the weights of `small` or of `lm`.

    Args:
      pool: rounds of samples, by `experience.score`, which `reward`, the name of one of their rewards, ranks.
      data: records for `preferences.given`, in place of a pool.
      beta: of the loss. adapter: the change of weights.
      training: how it is trained, with pairs as rows; the texts of `data` are cut to its `tokens`.
      seed: of initial values, batches and training.

    Raises:
      InputError: no pair, and what `loss` and training raise.
    """
    _, _, tokenizer = open_lm(lm)
    model, params, theirs = open_lm(lm if small is None else small)
    check_shared(tokenizer, theirs, model.vocab, (small or lm).path.name)
    if data is None:
        samples = Pool.open(pool)
        better, worse = preferences.ranked(samples.column(f"reward_{reward}"), samples.column("prompt_id"))
        records = samples.take(better).with_(rejected=samples.column("tokens")[worse])
    else:
        records = preferences.given(data, tokenizer, training.tokens)
    run.record(pairs=len(records))
    change = fitting.delta(model, rng.stream(jax.random.key(seed), "init"), **vars(adapter))
    rows = batches(records, tokenizer, batch=training.batch, seed=seed, also="rejected")
    change = fitting.train(
        run, change, loss(model, beta=beta), {"params": params}, rows, training.at(adapter.rate),
        trained=r"changes/.*", seed=seed,
    )  # fmt: skip
    fitting.keep(run, change, "finetune", vars(adapter))


@stage_function("genarm")
def genarm(
    run: Run, *, lm: Artifact, changes: Sequence[Artifact], small: Artifact | None = None, alpha: float = 1.0,
    share: Sequence[float] | None = None, shares: str | None = None, cond: str | None = None,
) -> None:  # fmt: skip
    """Stage: reward models become one control; see `init`. It holds no weights of the base."""
    model, params = open_lm(lm)[0], None
    hp = dict(models=len(changes), adapter=changes[0].spec["init"], alpha=alpha, share=share, shares=shares, cond=cond)
    reader = model
    if small is not None:
        reader, params, _ = open_lm(small)
        hp["small"] = record(reader)
    like = jax.eval_shape(lambda key: init(model, key, **hp), jax.random.key(0))
    streams = tuple(s.replace(params=params, control=methods.load(c, reader)) for s, c in zip(like.rewards, changes))
    share = [1 / len(changes)] * len(changes) if share is None else share
    control = like.replace(rewards=streams, alpha=jnp.float32(alpha), share=jnp.asarray(share, jnp.float32))
    checkpoint.save(run.path / "state", control)
    run.record(method="genarm", init=hp)
