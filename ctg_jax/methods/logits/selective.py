"""Selective token generation: each token comes from the language model or from an adapter beside it, and a policy that
is learned by reinforcement chooses between the two (Jo et al. 2022).

    q = (1 - scale g) p + scale g p_A,   p_A = softmax(E (h + W c)),   g = σ(select · c)

h is the base's final state and E a copy of its output layer that is trained. c is a context of h: "mlp", two layers on
h alone, or "stream", a transformer of one block that reads every token with its h. `scale` 0 is the base model, 1 the
method. A filter in front of the control acts on p and on p_A.

The reward of a whole text is learned from by the policy gradient with a baseline V(c). The authors draw the choice and
then the token, and their gradient is that of log g(choice) + log p_choice(token), so a token that the base gave teaches
g alone (kind "joint"). Here a sample is the token, and kind "marginal", the default, uses log q(token): it is the mean
of the former over the choices that may have given the token, so its variance is smaller. For "joint" the choice is
drawn from its posterior given the token, as good as drawing it before. Both can be clipped as in PPO.

The authors' context is an LSTM of two layers and 512 units, whose place "stream" takes; their selector gives two logits
to a softmax, of which σ of the difference is the same. Their ablations (the larger of the two distributions, a random
choice) and beam search are left out. Their base is fine-tuned on the few texts beforehand, with `finetune` here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ctg_jax import methods, rng
from ctg_jax.control import IDENTITY, Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.streams import Stream, check_vocabulary, log_probabilities, mixture
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.learn.pool import Pool, batches, check_drawn, read
from ctg_jax.learn.rounds import explored
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.heads import unembedding, value_head, values
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import Read, reduced
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, check_settings, open_lm, stage, stage_function
from ctg_jax.stages.sources import load_data
from ctg_jax.support import remove, removed
from ctg_jax.types import InputError, Params, Sum

CONTEXTS = ("mlp", "stream")
LEARNED = r"policy/(head|layers|stream|select)/.*|policy/(move|project)|value/.*"


@struct.dataclass
class Selective(Control):
    """(1 - scale g) p + scale g p_A.

    Attributes:
      head: E, the parameters that the model's `unembed` reads.
      move: W float32 [D, C].
      select: the head {"kernel": float32 [C], "bias": float32 []} of the log-odds of g.
      scale: float32 [] or, per row, [B], from 0, the base model, to 1.
      layers: of the context "mlp", {"0": {"weight": float32 [D, C], "offset": [C]}, "1": {"weight": [C, C], …}}.
      stream: of the context "stream", with final states [B, T, C]; project: float32 [C, D], makes inputs of it of h.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `scale` row by row.
      lm: the model whose `unembed` reads `head`.
    """

    head: Params
    move: jax.Array
    select: dict[str, jax.Array]
    scale: jax.Array
    layers: dict[str, dict[str, jax.Array]] | None = None
    stream: Stream | None = None
    project: jax.Array | None = None
    cond: str | None = struct.field(pytree_node=False, default=None)
    lm: LM = struct.field(pytree_node=False, kw_only=True)

    def check(self, prompts):
        if self.stream is not None:
            self.stream.check(prompts)

    def readers(self):
        return () if self.stream is None else self.stream.readers("context")

    def init(self, prompts, length):
        reading = () if self.stream is None else self.stream.init(prompts, length)
        return per_row(self.scale, prompts, self.cond), reading

    def context(self, h, tokens, mask, new, reading):
        """(c float32 [B, M, C] after the last M = `new` tokens, the next reading); the other arguments are those of
        `logits`."""
        if self.stream is not None:
            extra = h.astype(jnp.float32) @ self.project.T
            _, c, reading = self.stream.read(tokens, mask, new, reading, extra=extra)
            return c[:, c.shape[1] - new :].astype(jnp.float32), reading
        x = h[:, h.shape[1] - new :].astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        for n in range(len(self.layers)):
            layer = self.layers[str(n)]
            x = jnp.tanh(x @ layer["weight"] + layer["offset"][None, None])
        return x, reading

    def moved(self, h: jax.Array, c: jax.Array) -> jax.Array:
        """h + W c float32 [B, M, D], of which E makes the adapter's logits; h [B, S, D], of which the last M count."""
        return h[:, h.shape[1] - c.shape[1] :].astype(jnp.float32) + c @ self.move.T

    def odds(self, c: jax.Array) -> jax.Array:
        """The log-odds float32 [B, M] of g."""
        return c @ self.select["kernel"] + self.select["bias"]

    def logits(self, z, h, tokens, mask, state):
        strength, reading = state
        c, reading = self.context(h, tokens, mask, z.shape[1], reading)
        check_vocabulary("The adapter", self.lm.vocab, z.shape[-1])
        own = self.lm.unembed(self.head, self.moved(h, c))
        p, adapted = log_probabilities(z), log_probabilities(remove(own, removed(z)))
        g = strength * jax.nn.sigmoid(self.odds(c))[..., None]
        return z + mixture(p, adapted, g) - p, (strength, reading)


def init(
    lm: LM,
    key: jax.Array,
    *,
    context: str = "mlp",
    width: int = 512,
    scale: float = 1.0,
    cond: str | None = None,
) -> Selective:
    """A control with an output layer of zeros, whose place a copy of the base's takes in training; W and the selector
    are zero, so that g is ½.

    Args:
      context: "mlp" or "stream".
      width: C, the size of a context.
      scale, cond: see `Selective`.

    Raises:
      InputError: another context, width below 1, scale outside 0 … 1.
    """
    if context not in CONTEXTS:
        raise InputError(f"context is {context!r}, expected one of {', '.join(CONTEXTS)}.")
    if width < 1:
        raise InputError(f"width is {width}, expected at least 1.")
    if not isinstance(scale, jax.Array) and not np.all((np.asarray(scale) >= 0) & (np.asarray(scale) <= 1)):
        raise InputError(f"scale is {scale}, expected a number from 0 to 1.")
    shapes = unembedding(jax.eval_shape(lm.init, key))
    head = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    rest = (jnp.zeros((lm.width, width)), value_head(width), jnp.asarray(scale, jnp.float32))
    a, b = jax.random.split(key)
    if context == "mlp":
        sizes = zip((a, b), (lm.width, width))
        layers = {
            str(n): {"weight": jax.random.normal(k, (i, width)) / np.sqrt(i), "offset": jnp.zeros(width)}
            for n, (k, i) in enumerate(sizes)
        }
        return Selective(head, *rest, layers=layers, cond=cond, lm=lm)
    small = Transformer.gpt2(vocab=lm.vocab, context=lm.context, width=width, depth=1, heads=math.gcd(width, 8))
    project = 0.02 * jax.random.normal(b, (width, lm.width))
    return Selective(head, *rest, stream=Stream(small.init(a), lm=small), project=project, cond=cond, lm=lm)


def example(lm: LM, key: jax.Array) -> Selective:
    """Random weights of all parts, with a stream as its context, for the laws."""
    keys = jax.random.split(key, 4)
    control = init(lm, keys[0], context="stream", width=8)
    stream = control.stream.replace(params=jax.tree.map(lambda x: 4 * x, control.stream.params))
    head = jax.tree.map(lambda x: 0.3 * jax.random.normal(keys[1], x.shape), control.head)
    select = {**control.select, "kernel": 0.1 * jax.random.normal(keys[2], control.select["kernel"].shape)}
    move = jax.random.normal(keys[3], control.move.shape)
    return control.replace(head=head, select=select, move=move, stream=stream, project=20 * control.project)


def neutral(control: Selective) -> Selective:
    """Strength 0."""
    return control.replace(scale=jnp.zeros_like(control.scale))


@dataclasses.dataclass(frozen=True)
class Objective:
    """What `loss` is made of: the section `objective`.

    Attributes:
      kind: "marginal", log q of the token, or "joint", that of a choice drawn from its posterior and of the token.
      clip: how far a ratio of probabilities counts on either side of 1 (the authors: 0.2); None: the plain gradient,
        which is right while the policy is close to the one that drew the samples.
      value: weight of half the squared error of V.

    Raises:
      InputError: another kind, clip that is not positive.
    """

    kind: str = "marginal"
    clip: float | None = None
    value: float = 0.5

    def __post_init__(self):
        if self.kind not in ("marginal", "joint"):
            raise InputError(f"kind is {self.kind!r}, expected 'marginal' or 'joint'.")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip is {self.clip}, expected a positive number or None.")


def loss(lm: LM, objective: Objective = Objective()) -> losses.LossFn:
    """The policy gradient with a baseline, per token: -(r - V(c)) log π, or the clipped ratio of PPO in place of log π.

    params = {"policy": Selective, "value": `heads.value_head`}, the policy at `scale` 1; frozen = {"params": those of
    the LM, "old": params at the start of the round, which is read only where `clip` is set}; the batch has `reward`
    float32 [B], the reward of a text, which counts for each of its tokens.
    """

    def policy(params, frozen, batch, keys):
        """log g and log (1 - g), log p and log p_A of the token, float32 [B, N] each, and c [B, N, C]."""
        text, completion = read(lm, frozen["params"], batch, keys, params["policy"]), batch["completion"]
        control = text.control
        c, _ = control.context(text.hidden, text.tokens, text.mask, completion.shape[1], text.state[1])
        adapted = Read(control.head, control.moved(text.hidden, c), lm=lm)

        def chances(z, own, token):
            return -losses.next_token(z, token), -losses.next_token(own, token)

        p, own = reduced((text.replace(control=IDENTITY, state=()), adapted), chances, completion)
        odds = control.odds(c)
        return jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds), p, own, c

    def total(params, frozen, batch, keys):
        mask, reward = batch["written"], batch["reward"][:, None].astype(jnp.float32)
        *now, c = policy(params, frozen, batch, keys)
        before = now if objective.clip is None else policy(frozen["old"], frozen, batch, keys)[:4]
        before = lax.stop_gradient(before)
        chosen = None
        if objective.kind == "joint":
            u = jax.vmap(lambda key: jax.random.uniform(key, mask.shape[1:]))(rng.named(keys, "choice"))
            chosen = jnp.log(u) < before[0] + before[3] - _chance(before, None)
        logp, v = _chance(now, chosen), values(params["value"], c)
        advantage = lax.stop_gradient(reward - v)
        gain = advantage * logp
        if objective.clip is not None:
            ratio = jnp.exp(jnp.where(mask, logp - _chance(before, chosen), 0.0))
            bounded = jnp.clip(ratio, 1 - objective.clip, 1 + objective.clip)
            gain = jnp.minimum(ratio * advantage, bounded * advantage)
        out, weight = losses.masked_sum(-gain, mask)
        error, _ = losses.masked_sum(0.5 * jnp.square(v - reward), mask)
        share, _ = losses.masked_sum(jnp.exp(now[0]), mask)
        return Sum(out + objective.value * error, weight, {"value_error": (error, weight), "adapter": (share, weight)})

    return total


def _chance(parts: Sequence[jax.Array], chosen: jax.Array | None) -> jax.Array:
    """log q of a token, or, where `chosen` bool [B, N] says which distribution gave it, of that choice and the token.
    parts: log g, log (1 - g), log p and log p_A, float32 [B, N] each."""
    g, rest, p, own = parts
    return jnp.logaddexp(g + own, rest + p) if chosen is None else jnp.where(chosen, g + own, rest + p)


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact],
    rounds: int = 4,
    explore: Mapping[str, Any] | None = None,
    warm: Mapping[str, Any] | None = None,
    texts: Mapping[str, Any] | None = None,
    context: str = "mlp",
    width: int = 512,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Rounds of explore → score → learn, each from samples of the policy as it is.

    Args:
      lm: the language model. data: prompts. rewards: the first is learned from.
      rounds, explore: of sampling, see `quark.fit`.
      warm: None, or the section `training` of a first stage, which fits the mixture to texts.
      texts: settings of `load_data` for the texts of that stage; None: those of `data`.
      context, width: see `init`. seed: of samples and of training. settings: of the stage `selective`.

    Raises:
      InputError: greedy samples or a filter, under which the samples are not those of the policy; and what the stages
        raise.
    """
    check_drawn(explore or {}, "selective")
    check_settings(selective, settings)
    shape, begun = dict(context=context, width=width), None
    if warm is not None:
        held = data if texts is None else stage(root, load_data, texts)
        begun = stage(root, selective, shape | {"training": warm, "seed": seed}, lm=lm, data=held)
    given = dict(lm=lm, data=data, rewards=rewards, explore=explore, seed=seed, proposal=begun)
    for turn in explored(root, rounds, **given):
        own = settings | shape | {"seed": turn.seed}
        turn.proposal = stage(root, selective, own, lm=lm, pool=turn.pools[0], start_from=turn.proposal)
    return turn.proposal


@stage_function("selective")
def selective(
    run: Run,
    *,
    lm: Artifact,
    pool: Artifact | None = None,
    data: Artifact | None = None,
    start_from: Artifact | None = None,
    context: str = "mlp",
    width: int = 512,
    objective: Objective = Objective(),
    training: Training = Training(steps=100, warmup=0),
    seed: int = 0,
) -> None:
    """Stage: one round of learning from samples of the policy it starts from, or from texts by their likelihood.

    Args:
      pool: what `experience.score` made of those samples. data: texts in place of them.
      start_from: the policy that drew the samples; None: the base model, of which the adapter is a copy then.
      context, width: see `init`. objective: of the loss for samples.
      training: how it is trained; steps · batch over the pool's size is the number of epochs.
      seed: of initial values, batches and training.

    Raises:
      InputError: samples that `fit` would not draw, and what `init` and training raise.
    """
    model, params, tokenizer = open_lm(lm)
    made = dict(context=context, width=width)
    state = {"policy": init(model, rng.stream(jax.random.key(seed), "init"), **made), "value": value_head(width)}
    if start_from is None:
        head = jax.tree.map(lambda x: x.astype(jnp.float32), unembedding(params))
        state["policy"] = state["policy"].replace(head=head)
    else:
        value = checkpoint.load(start_from.path / "value", state["value"])
        state = {"policy": methods.load(start_from, model), "value": value}
    frozen, learned = {"params": params}, loss(model, objective)
    if pool is None:
        source = Source(str(data.path), "", data.rows("data.jsonl"))
        rows = pipeline(source, tokenizer, seed=seed, batch=training.batch, length=training.tokens)
        nats = losses.control_loss(model)
        learned = lambda params, *rest: nats(params["policy"], *rest)  # noqa: E731
    else:
        check_drawn(pool.spec["drawn"], "selective")
        rows = batches(Pool.open([pool]), tokenizer, batch=training.batch, seed=seed, fields=("reward",))
        frozen |= {} if objective.clip is None else {"old": state}
    state = fitting.train(run, state, learned, frozen, rows, training.at(1e-3), trained=LEARNED, seed=seed)
    checkpoint.save(run.path / "value", state["value"])
    fitting.keep(run, state["policy"], "selective", made)
