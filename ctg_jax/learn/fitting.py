"""What the methods that train have in common: how updates are made (`Training`), what learns (`Adapter`), the training
inside a stage (`train`), and the end of such a stage (`keep`)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ctg_jax import rng
from ctg_jax.control import Control
from ctg_jax.controls.codes import Coded
from ctg_jax.controls.delta import EVERYTHING, KERNELS, Delta, full, lora
from ctg_jax.learn import losses, optimizer
from ctg_jax.learn import train as training_loop
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.identity import how, nearest
from ctg_jax.run.stage import Artifact, Run
from ctg_jax.types import InputError, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Training:
    """How a stage makes its updates: the section `training` of a configuration. The defaults of a stage are its own.

    Attributes:
      steps: updates in all.
      batch: rows of an update, over all devices.
      tokens: tokens of a text; longer ones are cut. Stages that learn from samples or pairs do not read it.
      rate: the learning rate; None: one that suits what learns.
      warmup: updates over which the rate rises from 0; one fewer than `steps` at most.
      schedule: what follows: "constant", "linear" or "cosine" (`ctg_jax.learn.optimizer.schedule`).
      final: the share of `rate` at which "linear" and "cosine" end.
      decay: decoupled weight decay.
      clip: the largest norm of a gradient, or None.
      algorithm: "adam", or "adafactor" (Shazeer & Stern 2018), which keeps a row and a column of second moments for
        each kernel of at least 128 x 128 instead of two numbers for each weight.
      b2, eps: of Adam.
      rounds: of a method that learns in rounds, their number where all of them share one optimizer and one schedule of
        `rounds · steps` updates; 1: each round begins again with both.
      accumulate: the parts that a batch is run in, one after the other: less memory, the same gradient.
      ema: the decay of a moving average, which is kept in place of the last values (`ctg_jax.learn.train.averaged`);
        None: the last values are kept. In a method with rounds each begins at the average of the one before, which
        also drew its samples.
      save_every: updates between checkpoints; 0 for none but the last.
      log_every: updates between rows of metrics.jsonl.
    """

    steps: int = 200
    batch: int = 32
    tokens: int = 64
    rate: float | None = None
    warmup: int = 20
    schedule: str = "constant"
    final: float = 0.0
    decay: float = 0.0
    clip: float | None = 1.0
    algorithm: str = "adam"
    b2: float = 0.999
    eps: float = 1e-8
    rounds: int = 1
    accumulate: int = 1
    ema: float | None = None
    save_every: int = how(100)
    log_every: int = how(1)

    def at(self, rate: float) -> Training:
        """The same at this learning rate, where it has none of its own."""
        return self if self.rate is not None else dataclasses.replace(self, rate=rate)

    def rates(self) -> optax.Schedule:
        """The learning rate by update.

        Raises:
          InputError: steps or rounds below 1, no rate, an unknown schedule.
        """
        for name in ("steps", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if self.rate is None:
            raise InputError("rate is None, expected a learning rate.")
        steps = self.steps * self.rounds
        warmup = min(self.warmup, steps - 1)
        return optimizer.schedule(self.rate, self.schedule, warmup=warmup, steps=steps, final=self.final)

    def optimizer(self, trained: str = ".*", **options: Any) -> optax.GradientTransformation:
        """The optimizer of the leaves whose paths match `trained`; options are those of `ctg_jax.learn.optimizer`."""
        own = dict(clip=self.clip, decay=self.decay, algorithm=self.algorithm, b2=self.b2, eps=self.eps)
        options = own | dict(trained=trained) | options
        return optimizer.optimizer(self.rates(), **options)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What learns in a frozen language model: the section `adapter` of a configuration.

    Attributes:
      kind: "lora", a change of low rank (Hu et al. 2021), or "full", a change of all weights; for `finetune` also
        "prompt", a soft prompt (Lester et al. 2021).
      rank: of LoRA.
      targets: a regular expression for whole paths of the parameters to change; None: the kernels of every block
        (LoRA) or everything (full).
    """

    kind: str = "lora"
    rank: int = 8
    targets: str | None = None

    @property
    def rate(self) -> float:
        """A learning rate that suits small models."""
        return {"lora": 2e-3, "full": 1e-4, "prompt": 1e-1}.get(self.kind, 1e-3)


def delta(lm: LM, key: jax.Array, *, kind: str = "lora", rank: int = 8, targets: str | None = None) -> Delta:
    """A change of weights that is zero; the settings are those of `Adapter`.

    Raises:
      InputError: a kind that is neither "lora" nor "full".
    """
    params = jax.eval_shape(lm.init, key)
    if kind == "lora":
        return lora(key, params, rank, targets or KERNELS)
    if kind == "full":
        return full(params, targets or EVERYTHING)
    raise InputError(f"kind is {kind!r}, expected 'lora' or 'full'.")


def example_delta(lm: LM, key: jax.Array) -> Delta:
    """A LoRA of rank 2 that changes what the model writes, for the laws."""
    control = delta(lm, key, rank=2)
    changes = {p: {"a": c["a"], "b": 0.5 * jax.random.normal(key, c["b"].shape)} for p, c in control.changes.items()}
    return control.replace(changes=changes)


def neutral_delta(control: Delta) -> Delta:
    """Strength 0."""
    return control.replace(scale=jnp.zeros_like(control.scale))


def like_words(control: Coded, lm: LM, params: Params, key: jax.Array) -> Coded:
    """The control with codes drawn like embedded words, as the model reads them: normal, with their mean and their
    deviation in each dimension."""
    words = dataclasses.replace(lm, dtype="float32").embed(params, jnp.arange(lm.vocab))
    noise = jax.random.normal(key, control.codes.shape)
    return control.replace(codes=jnp.mean(words, axis=0)[None] + jnp.std(words, axis=0)[None] * noise)


def matching(data: Artifact, where: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The records of a data artifact whose fields have the values of `where`; InputError where there is none."""
    records = [r for r in data.rows("data.jsonl") if all(r.get(k) == v for k, v in (where or {}).items())]
    if not records:
        raise InputError(f"where is {dict(where or {})}, which matches no record of {data.path}.")
    return records


def divided(settings: Mapping[str, Any], *stages: Callable) -> list[dict[str, Any]]:
    """The settings of a `fit` with several stages: for each stage those that it has.

    Raises:
      InputError: a setting that none of them has.
    """
    known = [{n for n, p in inspect.signature(s).parameters.items() if p.kind is p.KEYWORD_ONLY} for s in stages]
    for name in settings:
        if not any(name in names for names in known):
            raise InputError(f"{stages[-1].__name__} has no setting {name!r}{nearest(name, set().union(*known))}")
    return [{name: value for name, value in settings.items() if name in names} for names in known]


def train(
    run: Run,
    learner: PyTree,
    loss: losses.LossFn,
    frozen: Mapping[str, Any],
    batches: Iterator[Mapping[str, Any]],
    training: Training,
    *,
    trained: str = ".*",
    seed: int = 0,
    tx: optax.GradientTransformation | None = None,
    start_from: Artifact | EllipsisType | None = ...,
) -> PyTree:
    """What the updates made of a control or of parameters; an interrupted stage continues from its last checkpoint.

    Args:
      run: of the stage. Checkpoints are in its folder `steps` until the stage is finished (`keep`).
      learner: what learns, at its start. loss, frozen, batches: see `ctg_jax.learn.train`.
      training: how the updates are made, with a learning rate.
      trained: a regular expression for the paths of the leaves that learn.
      seed: of the randomness in the loss.
      tx: an optimizer in place of `training.optimizer(trained)`.
      start_from: the artifact of the round before, whose optimizer continues where `training.rounds` is above 1, or
        None in the first round; left out by a stage that hands no optimizer on.

    Raises:
      InputError: steps below 1; `training.rounds` above 1 in a stage that hands no optimizer on, or below the number of
        this round; and what the training loop raises.
    """
    number = 1
    if training.rounds > 1:
        if start_from is ...:
            raise InputError(f"training.rounds is {training.rounds}, but no optimizer is handed on here: set it to 1.")
        number = 1 if start_from is None else start_from.spec.get("round", 1) + 1
        if number > training.rounds:
            raise InputError(
                f"training.rounds is {training.rounds}, and this is round {number}, beyond the end of the schedule: "
                "set it to the number of rounds."
            )
    tx = training.optimizer(trained) if tx is None else tx
    key = rng.stream(jax.random.key(seed), "train")
    state = training_loop.init_state(learner, tx, key, ema=training.ema is not None)
    averaging = {} if training.ema is None else {"ema": training.ema}
    if number > 1:
        state = state.replace(opt_state=checkpoint.load(start_from.path / "optimizer", state.opt_state))
    step = training_loop.make_step(loss, tx, accumulate=training.accumulate, **averaging)
    state = training_loop.loop(
        run.path, state, step, batches, steps=training.steps, save_every=training.save_every, frozen=frozen,
        log_every=training.log_every, boards=run.session.boards,
    )  # fmt: skip
    if training.rounds > 1:
        checkpoint.save(run.path / "optimizer", state.opt_state)
        run.record(round=number)
    return state.params if training.ema is None else state.ema


def keep(run: Run, control: Control, method: str, init: Mapping[str, Any]) -> None:
    """Ends a stage that trained: saves the control for `methods.load`, which calls the method's `init(lm, key, **init)`
    for its shapes, and marks the optimizer states, if there are any, as no longer needed."""
    run.record(method=method, init=dict(init))
    checkpoint.save(run.path / "state", control)
    run.discard("steps")
