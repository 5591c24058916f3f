"""The optimizer, AdamW or Adafactor, and schedules of its learning rate."""

from __future__ import annotations

import re

import optax

from ctg_jax import tree
from ctg_jax.types import InputError, PyTree

SLOW = 1e-2  # of the rate, for the leaves that `optimizer` is told to change slowly


def schedule(
    rate: float, kind: str = "constant", *, warmup: int = 0, steps: int | None = None, final: float = 0.0
) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `rate`, then "constant", "linear" or "cosine" to `final * rate`.

    Raises:
      InputError: an unknown kind; a decaying one without `steps`, the number of steps in all, above `warmup`.
    """
    if kind not in ("constant", "linear", "cosine"):
        raise InputError(f"schedule is {kind!r}, expected 'constant', 'linear' or 'cosine'")
    if kind != "constant" and (steps is None or steps <= warmup):
        raise InputError(f"schedule {kind!r} needs steps above warmup={warmup}, found steps={steps}")
    if kind == "constant":
        after = optax.constant_schedule(rate)
    elif kind == "linear":
        after = optax.linear_schedule(rate, final * rate, steps - warmup)
    else:
        after = optax.cosine_decay_schedule(rate, steps - warmup, final)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def optimizer(
    rate: float | optax.Schedule = 1e-3,
    *,
    clip: float | None = 1.0,
    decay: float = 0.0,
    decayed: str = r"(?!.*(norm|bias)).*",
    trained: str = ".*",
    slow: str | None = None,
    algorithm: str = "adam",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), or Adafactor (Shazeer & Stern 2018), after clipping by the global norm.

    Args:
      rate: a learning rate or a `schedule`.
      clip: largest norm of the gradient of all trained leaves together, or None.
      decay: decoupled weight decay, on leaves whose path matches `decayed`: an update takes off rate · decay of them.
      decayed: regular expression for whole paths; norms and biases are left out by default.
      trained: regular expression for whole paths; other leaves keep their values and need no moments.
      slow: regular expression for whole paths of leaves at `SLOW` times the rate. Vectors of a prompt learn at rates at
        which the softmax of a gate beside them leaves all but one entry nothing within a few updates, for good.
      algorithm: "adam", or "adafactor", whose update is `rate` times a direction of root mean square 1 at most.
      b1, b2, eps: of Adam.

    Raises:
      InputError: another algorithm.
    """
    if algorithm not in ("adam", "adafactor"):
        raise InputError(f"algorithm is {algorithm!r}, expected 'adam' or 'adafactor'")
    if algorithm == "adam":
        tx = optax.adamw(rate, b1, b2, eps, weight_decay=decay, mask=lambda p: _matching(p, decayed))
    else:
        # Given a rate, optax.adafactor would take off `decay` of a weight in every update, whatever the rate is.
        tx = optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False),
            optax.add_decayed_weights(-decay, lambda p: _matching(p, decayed)),
            optax.scale_by_learning_rate(rate, flip_sign=False),
        )
    tx = tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)
    if slow is not None:
        tx = optax.chain(tx, optax.masked(optax.scale(SLOW), lambda p: _matching(p, slow)))
    if trained == ".*":
        return tx
    return optax.partition({True: tx, False: optax.set_to_zero()}, lambda p: _matching(p, trained))


def _matching(params: PyTree, pattern: str) -> PyTree:
    return tree.map_with_path(lambda path, x: re.fullmatch(pattern, path) is not None, params)
