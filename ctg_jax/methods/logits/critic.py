"""Critics, which tell the value of a text so far, look ahead at the likeliest next tokens (CriticControl and others).

    z'(v) = z(v) + alpha link(V(y, v), V(y))

for the `top` likeliest tokens v. The others keep their logits (rest "keep") or are removed (rest "drop", where alpha is
not 0). V is a linear head on the final state of a language model that reads along, the frozen base or a small model
with the base's tokenizer (RAD and value-augmented sampling), and one pass from its cache gives V of all candidates.
alpha 0 is the base model.

| system | link | rest, top, alpha | kind of loss |
|---|---|---|---|
| CriticControl (Kim et al. 2023) | "ratio", log σ(V') - log σ(V) | keep, 10, 1 | "gae", γ .99, λ .95 |
| FUDGE (Yang & Klein 2021) | "log", log σ(V') | drop, 200, 1 (topics: 4) | "bce" at every prefix |
| RAD (Deng & Raffel 2023) | "clip", V' between 0 and 1 | drop, 20, 30 | "weighted", squares that grow with the prefix |
| ARGS (Khanov et al. 2024) | "value", V' | drop, 10, 1 | "last", whole texts alone |
| controlled decoding by tokens (Mudgal et al. 2024) | "value", V' | keep | "mse", or "gae" with λ 0 (CD-Q) |
| value-augmented sampling (Han et al. 2024) | "centred", V' - its mean | keep, 20, 1 | "gae", γ 1, λ .95 |

With the exact V = logit P(c | prefix) and all tokens as candidates, "ratio" and "log" give p(y) P(c | y) / Z. With soft
values V = β log E[exp(r / β) | prefix], kind "soft", "value" at alpha 1/β gives p(y) exp(r(y) / β) / Z; with V = E[r |
prefix] each step is p exp(alpha V') normalised, which is not that optimum.

What differs here: probabilities go through one softmax (CriticControl's code has two more); candidates share a cache;
values belong to the prefix they are read after; log σ does not overflow; the clipping of CriticControl's value loss is
left out, as values are compared with those of the present head; rewards of ARGS and RAD are regressed on, not ranked.
Truncation and temperature follow in a chain. Controlled decoding by blocks chooses among samples by V, which is a
setting of `learn.search` and no control. A head with an output for each next token, which needs no look-ahead, is
`nado`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ctg_jax import methods, rng
from ctg_jax.control import Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.streams import Stream, check_vocabulary
from ctg_jax.data.ids import check_shared
from ctg_jax.data.pipeline import pipeline
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.critics import Objective, goals, of_label
from ctg_jax.learn.fitting import Training
from ctg_jax.learn.pool import POSITIVE, Pool, batches, check_drawn
from ctg_jax.learn.pretrain import small_lm
from ctg_jax.learn.rounds import explored, positive_from
from ctg_jax.models.heads import value_head
from ctg_jax.models.lengths import check_reads
from ctg_jax.models.lm import LM
from ctg_jax.models.record import of_record, record
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function
from ctg_jax.support import remove, removed
from ctg_jax.types import InputError, Prompts, Sum

LINKS = ("ratio", "log", "clip", "value", "centred")
RESTS = ("keep", "drop")


@struct.dataclass
class Critic(Control):
    """z + alpha link(V', V) of the candidates.

    Attributes:
      judge: the language model that reads along and looks ahead.
      value: the head {"kernel": float32 [D'], "bias": float32 []} on its states.
      alpha: float32 [] or, per row, [B]; 0 is the base model.
      top: K, the number of candidates. link, rest: see the module.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `alpha` row by row.
    """

    judge: Stream
    value: dict[str, jax.Array]
    alpha: jax.Array
    top: int = struct.field(pytree_node=False, default=10)
    link: str = struct.field(pytree_node=False, default="ratio")
    rest: str = struct.field(pytree_node=False, default="keep")
    cond: str | None = struct.field(pytree_node=False, default=None)

    @property
    def selects(self):
        return self.rest == "drop"

    def check(self, prompts):
        self.judge.check(prompts)

    def init(self, prompts, length):
        return per_row(self.alpha, prompts, self.cond), self.judge.init(prompts, length)

    def readers(self):
        return self.judge.readers("critic")

    def values(self, states):
        """V float32 [B, N] of states [B, N, D']."""
        return jnp.einsum("bnd,d->bn", states.astype(jnp.float32), self.value["kernel"]) + self.value["bias"]

    def logits(self, z, h, tokens, mask, state):
        strength, reading = state
        new, size = z.shape[1:]
        check_sizes(self.judge.lm, self.top, size)
        _, states, reading = self.judge.read(tokens, mask, new, reading)
        before = self.values(states[:, states.shape[1] - new :])
        found, candidates = lax.top_k(z, self.top)

        def ahead(position):
            tokens, back = position
            return self.values(self.judge.peek(tokens, reading, back)[1])

        after = lax.map(ahead, (jnp.moveaxis(candidates, 1, 0), jnp.arange(new)[::-1]))
        push = linked(self.link, jnp.moveaxis(after, 0, 1), before[..., None], ~removed(found))
        put = jax.vmap(jax.vmap(lambda at, x: jnp.zeros(size, x.dtype).at[at].set(x)))
        out = z + strength * put(candidates, push)
        if self.rest == "drop":
            out = remove(out, ~put(candidates, jnp.ones(candidates.shape, bool)) & (strength != 0))
        return out, (strength, reading)


def linked(link: str, after: jax.Array, before: jax.Array, real: jax.Array) -> jax.Array:
    """What is added for candidates [..., K], given V of prefix and candidate [..., K] and of the prefix [..., 1]; real:
    which of the candidates were not removed before."""
    if link == "ratio":
        return jax.nn.log_sigmoid(after) - jax.nn.log_sigmoid(before)
    if link == "log":
        return jax.nn.log_sigmoid(after)
    if link == "clip":
        return jnp.clip(after, 0.0, 1.0)
    if link == "centred":
        return after - jnp.mean(after, axis=-1, keepdims=True, where=real)
    return after


def check_sizes(judge: LM, top: int, vocab: int) -> None:
    """InputError where a vocabulary is too small for the critic or for K candidates."""
    check_vocabulary("The critic", judge.vocab, vocab, larger=True)
    if not 1 <= top <= vocab:
        raise InputError(f"top is {top}, but the vocabulary has {vocab} tokens: expected 1 to {vocab} candidates.")


def init(
    lm: LM,
    key: jax.Array,
    *,
    small: Mapping[str, Any] | None = None,
    top: int = 10,
    link: str = "ratio",
    rest: str = "keep",
    alpha: float = 1.0,
    cond: str | None = None,
) -> Critic:
    """A critic that gives every text the value 0.

    Args:
      small: the fields of a decoder that reads along; None: the frozen base model.
      top, link, rest, alpha, cond: see `Critic`.

    Raises:
      InputError: another link or rest, more candidates than tokens, alpha that is not finite, a small model with fewer
        tokens than the base.
    """
    for name, given, known in (("link", link, LINKS), ("rest", rest, RESTS)):
        if given not in known:
            raise InputError(f"{name} is {given!r}, expected one of {', '.join(known)}.")
    if not isinstance(alpha, jax.Array) and not np.all(np.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}, expected a finite number.")
    reader = lm if small is None else of_record(small)
    check_sizes(reader, top, lm.vocab)
    judge = Stream(None if small is None else reader.init(key), lm=reader, ahead=True)
    return Critic(judge, value_head(reader.width), jnp.asarray(alpha, jnp.float32), top, link, rest, cond)


def example(lm: LM, key: jax.Array) -> Critic:
    """A random head on the base, for the laws."""
    control = init(lm, key, top=5, link="ratio", rest="drop")
    return control.replace(value={**control.value, "kernel": 2 * jax.random.normal(key, (lm.width,))})


def neutral(control: Critic) -> Critic:
    """Strength 0, where nothing is removed."""
    return control.replace(alpha=jnp.zeros_like(control.alpha))


def loss(objective: Objective = Objective()) -> losses.LossFn:
    """The loss of V before the first token of a completion and after each, the weighted mean over prefixes.

    params is the control, frozen = {"params": those of the base}; the batch has `goal` float [B] and `importance` float
    [B]. Where it has no completions, the first token of a row is its prompt.
    """

    def total(params, frozen, batch, keys):
        v, real = of_prefixes(params, frozen["params"], batch, keys)
        error, weight = objective.errors(v, real, batch["goal"].astype(jnp.float32), batch["importance"])
        count = jnp.sum(weight)
        return Sum(jnp.sum(weight * error), count, {"value": (jnp.sum(weight * v), count)})

    return total


def of_prefixes(control: Critic, params: Any, batch: Mapping[str, Any], keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(V float32 [B, N + 1], which of them are real) before the first token of a completion [B, N] and after each."""
    tokens, mask = batch["tokens"], batch["mask"]
    text, written = batch.get("completion", tokens[:, 1:]), batch.get("written", mask[:, 1:])
    if "completion" not in batch:
        tokens, mask = tokens[:, :1], mask[:, :1]
    prompts = Prompts(tokens, mask, keys)
    judge = control.judge.replace(ahead=False).bind(params, params)  # nothing is looked ahead at, so without a cache
    tokens, mask = (jnp.concatenate(pair, axis=1) for pair in ((tokens, text), (mask, written)))
    check_reads(judge.lm, tokens.shape[1], f"The rows of training have {tokens.shape[1]} tokens", judge.control)
    count = text.shape[1] + 1
    _, states, _ = judge.read(tokens, mask, count, judge.init(prompts, tokens.shape[1] + 1))
    real = jnp.concatenate([jnp.ones_like(written[:, :1]), written], axis=1)
    return control.values(states[:, states.shape[1] - count :]), real


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact] = (),
    small: Mapping[str, Any] | None = None,
    rounds: int = 1,
    explore: Mapping[str, Any] | None = None,
    threshold: float | str = "judge",
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """With `rewards`, rounds of explore → score → learn from the samples of all rounds, the first drawn from the frozen
    model; without them, learning from the labelled texts of `data`, as FUDGE does.

    Args:
      lm: the language model. data: prompts, or texts with a label. rewards: the first is learned from.
      small: see `ctg_jax.learn.pretrain.small_lm`; the model is trained with the head. None: a head on `lm`.
      rounds, explore: of sampling. threshold: see `nado.fit`, for the goal "label".
      seed: of samples and of training. settings: of the stage `critic`.

    Raises:
      InputError: several rounds with rest "drop", samples without probabilities, and what the stage raises.
    """
    given = dict(lm=lm)
    if small is not None:
        given["small"] = small_lm(root, small, lm=lm, data=None if rewards else data)
    if not rewards:
        return stage(root, critic, settings | {"seed": seed}, data=data, **given)
    check_drawn(explore or {}, "critic", POSITIVE)
    if rounds > 1 and (settings.get("control") or {}).get("rest") == "drop":
        raise InputError(f"rounds is {rounds}, but rest 'drop' gives most texts no probability: set rounds to 1.")
    check_settings(critic, settings)
    limit = positive_from(threshold, rewards)
    for turn in explored(root, rounds, lm=lm, data=data, rewards=rewards, explore=explore, pool="all", seed=seed):
        own = settings | {"seed": turn.seed, "threshold": limit}
        turn.proposal = stage(root, critic, own, pool=turn.pools, start_from=turn.proposal, **given)
    return turn.proposal


@stage_function("critic")
def critic(
    run: Run,
    *,
    lm: Artifact,
    pool: Sequence[Artifact] = (),
    data: Artifact | None = None,
    small: Artifact | None = None,
    start_from: Artifact | None = None,
    label: int = 1,
    threshold: float | str = "median",
    control: Mapping[str, Any] | None = None,
    objective: Objective = Objective(),
    training: Training = Training(),
    seed: int = 0,
) -> None:
    """Stage: trains the head, and the small model where there is one, on samples or on labelled texts.

    Args:
      pool: rounds of samples, by `experience.score`, each weighted by p / q, where q is what drew it.
      data: texts with labels, in place of a pool; longer ones are cut to the `tokens` of `training`.
      small: the model that reads along, or None. start_from: the control of the round before, or None.
      label: the label of `data` that is wanted. threshold: a number, or "median" of the rewards.
      control: the other settings of `init`, such as link and top.
      objective: what is learned. training: how it is trained.
      seed: of initial values, batches and training.

    Raises:
      InputError: no text has the label, or all have it; rewards outside 0 … 1 for a kind or goal that needs
        probabilities; and what `init` and training raise.
    """
    model, params, tokenizer = open_lm(lm)
    made = fitting.divided(control or {}, init)[0]
    weights = None
    if small is not None:
        reader, weights, theirs = open_lm(small)
        check_shared(tokenizer, theirs, reader.vocab, small.path.name)
        made["small"] = record(reader)
    learner = init(model, rng.stream(jax.random.key(seed), "init"), **made)
    learner = learner.replace(judge=learner.judge.replace(params=weights))
    if start_from is not None:
        learner = methods.load(start_from, model)
    options = dict(batch=training.batch, seed=seed, fields=("goal", "importance"))
    if data is None:
        samples = Pool.open(pool)
        goal = goals(samples.column("reward"), objective, samples.threshold(threshold))
        rows = batches(samples.with_(goal=goal, importance=samples.importance(objective.limit)), tokenizer, **options)
    else:
        rows = pipeline(of_label(data, label), tokenizer, length=training.tokens, **options)
    learner = fitting.train(
        run, learner, loss(objective), {"params": params}, rows, training.at(1e-2 if small is None else 1e-3),
        trained=r"value/.*|judge/params/.*", seed=seed, start_from=start_from,
    )  # fmt: skip
    fitting.keep(run, learner, "critic", made)
