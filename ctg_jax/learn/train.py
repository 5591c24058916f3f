"""Training: one step for every layout, and a loop that resumes exactly where it was interrupted.

Losses return sums, so gradients of any split of a batch (devices, accumulation) add up exactly, whatever the masks;
the mean of per-device means does not. Randomness is addressed by (key, step, example id), never by layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from ctg_jax import rng, tree
from ctg_jax.learn.losses import LossFn
from ctg_jax.mesh import layout, processes
from ctg_jax.mesh.plan import Plan
from ctg_jax.run import checkpoint, store
from ctg_jax.run.metrics import Writer
from ctg_jax.types import InputError, PyTree, Sum

# Steps in flight before the loop waits for one. On simulated CPU devices about 33 unsynchronised steps with
# collectives deadlock; on any device it bounds how late a NaN is noticed.
IN_FLIGHT = 16


class TrainingError(InputError):
    """Training cannot continue; the message names the step, the reason, and where the last good state is kept."""


@struct.dataclass
class TrainState:
    """Everything that changes while training.

    Attributes:
      step: int32 [], updates made.
      params: what is learned: a Control, or the parameters of an LM.
      opt_state: of optax.
      key: a typed PRNG key [], never advanced; step and example id are folded in.
      ema: exponential moving average of params in float32 (see `averaged`), or None.
      ok: bool [], False once a loss or gradient was not finite; the state then stays as it was before that step.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    key: jax.Array
    ema: PyTree = None
    ok: jax.Array = struct.field(default_factory=lambda: jnp.ones((), bool))


def init_state(params: PyTree, tx: optax.GradientTransformation, key: jax.Array, *, ema: bool = False) -> TrainState:
    """A state at step 0. `ema` keeps a moving average of the parameters.

    Raises:
      InputError: a leaf of params is not of floating type and so cannot be trained.
    """
    for path, x in tree.flatten(params).items():
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise InputError(
                f"params: {path!r} has type {jnp.result_type(x)}, expected floating numbers; keep it in a static "
                "field or in `frozen`"
            )
    params = jax.tree.map(jnp.asarray, params)
    average = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key, average)


def averaged(ema: PyTree, params: PyTree, step: jax.Array, decay: float) -> PyTree:
    """The moving average after one more update, float32: d · ema + (1 - d) · params with d = min(decay, (1 + n) /
    (10 + n)) after n earlier updates.

    The decay is warmed up (as in TensorFlow's ExponentialMovingAverage), so that the average spans about a tenth of the
    run until that is longer than 1 / (1 - decay) updates. With a constant decay of 0.999 the random start would still
    weigh 0.905 after 100 updates and 0.135 after 2,000; here it weighs 2e-13 after 100. Division by 1 - decay^n, as in
    Adam, would remove the start as well, but leaves a nearly uniform average over all of a short run, its first and
    worst updates included.

    Args:
      step: int32 [], n. decay: the decay of a long run.
    """
    n = step.astype(jnp.float32)
    d = jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))
    return jax.tree.map(lambda a, b: d * a + (1 - d) * b.astype(jnp.float32), ema, params)


@dataclasses.dataclass(frozen=True)
class Step:
    """A train step: `step(state, frozen, batch) -> (state, metrics)`. See `make_step`."""

    __name__ = "train_step"  # what profilers and compilation logs call it

    loss: LossFn
    tx: optax.GradientTransformation
    axis: str | None = None
    accumulate: int = 1
    ema: float = 0.999

    def over(self, axis: str | None) -> Step:
        """The same step, summing over a named axis: what `Plan.compile` asks for."""
        return dataclasses.replace(self, axis=axis)

    def __call__(self, state: TrainState, frozen: PyTree, batch: Mapping[str, Any]) -> tuple[TrainState, dict]:
        if "ids" not in batch:
            raise InputError(f"the batch has {sorted(batch)} and lacks 'ids', int [B], the ids of its examples")
        keys = rng.per_example(jax.random.fold_in(state.key, state.step), batch["ids"])
        sums, grads = self._gradients(state.params, frozen, batch, keys)
        if self.axis is not None:
            sums, grads = jax.lax.psum((sums, grads), self.axis)
        weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
        grads = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, state.params)
        norm = optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        metrics = {name: total / jnp.where(w > 0, w, 1.0) for name, (total, w) in sums.metrics.items()}
        metrics |= {"loss": sums.total / weight, "weight": sums.weight, "grad_norm": norm}

        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else averaged(state.ema, params, state.step, self.ema)
        ok = state.ok & jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        new = (state.step + 1, params, opt_state, ema)
        old = (state.step, state.params, state.opt_state, state.ema)
        step, params, opt_state, ema = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
        return TrainState(step, params, opt_state, state.key, ema, ok), metrics | {"ok": ok}

    def _gradients(self, params, frozen, batch, keys) -> tuple[Sum, PyTree]:
        """The sums of the batch and float32 gradients of their total."""

        def total(params, batch, keys):
            s = self.loss(params, frozen, batch, keys)
            return s.total, s

        def one(batch, keys):
            (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params, batch, keys)
            return jax.tree.map(lambda x: x.astype(jnp.float32), (sums, grads))

        if self.accumulate == 1:
            return one(batch, keys)
        rows, n = len(keys), self.accumulate
        if rows % n:
            raise InputError(f"accumulate is {n} and does not divide the {rows} rows of a batch on one device")
        # Rows i, i + n, … of each part, so that a batch split over devices stays where it is.
        parts = jax.tree.map(lambda x: x.reshape(rows // n, n, *x.shape[1:]).swapaxes(0, 1), (dict(batch), keys))
        shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        sums, _ = jax.lax.scan(lambda acc, part: (jax.tree.map(jnp.add, acc, one(*part)), None), zeros, parts)
        return sums


def make_step(
    loss: LossFn,
    tx: optax.GradientTransformation,
    *,
    axis: str | None = None,
    accumulate: int = 1,
    ema: float = 0.999,
) -> Step:
    """A train step for `Plan.compile` and `loop`.

    Metrics are float32 []: `loss`, `weight`, `grad_norm` (before clipping), the means of the loss's own metrics, and
    `ok`. A step whose loss or gradient is not finite changes nothing but `state.ok`.

    Args:
      loss: returns a `Sum`; its gradient is divided by the weight of the whole batch.
      tx: see `optimizer`.
      axis: a named axis to sum over (`pmap`), or None (`jit`).
      accumulate: the number of parts that a batch is run in; the result is that of the whole batch, with less memory.
      ema: decay of the moving average, where the state keeps one; see `averaged`.
    """
    return Step(loss, tx, axis, accumulate, ema)


def loop(
    run_dir: str | Path,
    state: TrainState,
    step: Step,
    batches: Iterator[Mapping[str, Any]],
    *,
    steps: int,
    save_every: int,
    frozen: PyTree = None,
    log_every: int = 1,
    keep: int = 2,
    progress: bool = True,
    plan: Plan | None = None,
    boards: Sequence[str] = (),
) -> TrainState:
    """Trains until `state.step == steps`, from the last whole checkpoint in `run_dir` where there is one.

    A run that was killed at any moment and started again ends with exactly the same parameters, and the same
    `metrics.jsonl` with each step once. Files: `run_dir/steps/<step>/` (checkpoints) and `run_dir/metrics.jsonl`.

    Args:
      run_dir: made where it is missing.
      state: where a new run starts; copied, so the caller's arrays stay valid.
      step: from `make_step`.
      batches: dicts of numpy arrays, leaves [B, …], the same in every process, which takes its rows. With
        `get_state() -> dict` and `set_state(dict)` it resumes at the exact batch; without them, the batches already
        used are skipped.
      steps: updates in all.
      save_every: steps between checkpoints; the last step is always saved. 0 saves only that.
      frozen: what the loss only reads.
      log_every: steps between rows of metrics.jsonl, each the metrics of that step's batch.
      keep: how many checkpoints to keep.
      progress: show a progress bar.
      plan: how the state is placed on devices, during training and afterwards; None: as the layout of the run asks
        (`layout.training`), and afterwards as its other arrays.
      boards: where the figures are drawn as well, see `ctg_jax.run.metrics.Writer`.

    Raises:
      TrainingError: a loss or gradient that is not finite; the last good state is saved first.
      InputError: the batches end before `steps`; a checkpoint that does not fit.
    """
    run_dir = Path(run_dir)
    folder = run_dir / "steps"
    own, plan = plan is None, plan or layout.training(getattr(batches, "size", None))
    found = checkpoint.load_last(folder, state, plan.shardings(state))
    if found:
        at, state, meta = found
        checkpoint.prune_after(folder, at)  # damaged ones, reported above
        _resume(batches, meta.get("data"), at)
    else:
        at = int(state.step)
        state = jax.tree.map(jnp.copy, state)
        state = processes.everywhere(state, plan.shardings(state))
    with Writer(run_dir / "metrics.jsonl", at, boards) as writer:
        if at >= steps:
            return layout.to_local(state, plan) if own else state
        frozen = processes.everywhere(frozen, plan.shardings(frozen))
        run = _Run(folder, writer, log_every, keep, steps, at, progress)
        compiled = plan.compile(step.over, state, frozen)
        with run.bar:
            for n in range(at + 1, steps + 1):
                batch = next(batches, None)
                if batch is None:
                    run.settle(state)
                    run.save(state)
                    raise InputError(
                        f"batches ended after {n - 1} steps and steps is {steps}: let the data repeat or train for "
                        "fewer steps"
                    )
                state, metrics = compiled(state, frozen, plan.put(processes.rows(batch)))
                run.pending.append((n, metrics, _position(batches)))
                saving = n == steps or (save_every and n % save_every == 0)
                if saving or len(run.pending) >= IN_FLIGHT:
                    run.settle(state)
                if saving:
                    run.save(state)
    return layout.to_local(state, plan) if own else state


@dataclasses.dataclass
class _Run:
    """What one call of `loop` carries: metrics not yet looked at, and where the data stood at the last good step."""

    folder: Path
    writer: Writer
    log_every: int
    keep: int
    steps: int
    at: int
    progress: bool

    def __post_init__(self):
        from tqdm import tqdm

        self.pending: list[tuple[int, dict, Any]] = []
        self.data: Any = None
        self.bar = tqdm(
            total=self.steps, initial=self.at, disable=None if self.progress else True, desc=self.folder.parent.name
        )

    def settle(self, state: TrainState) -> None:
        """Waits for the steps in flight and writes their rows; at one that is not finite, saves and stops."""
        done, self.pending = self.pending, []
        for n, metrics, data in done:
            values = {name: np.asarray(x) for name, x in metrics.items()}
            if not values.pop("ok"):
                self._stop(state, n, values)
            self.at, self.data = n, data
            if n % self.log_every == 0 or n == self.steps:
                self.writer.write(n, values)
            self.bar.update(1)
            self.bar.set_postfix(loss=f"{float(values['loss']):.4g}", refresh=False)

    def save(self, state: TrainState) -> None:
        """Writes the checkpoint of the last step that was looked at, and drops old ones."""
        if self.at in checkpoint.saved_steps(self.folder):
            return  # where this run started
        meta = {} if self.data is None else {"data": self.data}
        path = checkpoint.step_path(self.folder, self.at)
        checkpoint.save(path, state, meta)
        checkpoint.prune(self.folder, self.keep)
        store.step_saved(path)

    def _stop(self, state: TrainState, n: int, values: dict[str, np.ndarray]) -> None:
        self.save(state.replace(ok=jnp.ones_like(state.ok)))
        raise TrainingError(
            f"training stopped at step {n}: loss is {float(values['loss'])} and the gradient's norm "
            f"{float(values['grad_norm'])}; the last good state, step {self.at}, is kept in "
            f"{checkpoint.step_path(self.folder, self.at)}; lower the learning rate or look at the data"
        )


def _position(batches: Any) -> Any:
    get: Callable[[], Any] | None = getattr(batches, "get_state", None)
    return get() if get else None


def _resume(batches: Any, data: Any, step: int) -> None:
    """Moves the batches to where they stood after `step` of them."""
    if data is not None and hasattr(batches, "set_state"):
        batches.set_state(data)
        return
    for _ in range(step):
        if next(batches, None) is None:
            raise InputError(f"batches ended before the {step} that were used already: the data has changed")
