"""The stage that makes a control without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from ctg_jax import methods
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage_function
from ctg_jax.types import InputError


@stage_function("made")
def made(run: Run, *, lm: Artifact, method: str, init: Mapping[str, Any] | None = None, seed: int = 0) -> None:
    """Stage: saves a control that needs no training: what the `make` of a method returns, or its `init` where the method
    has neither `make` nor `fit`.

    Args:
      lm: the language model that the control is made for.
      method: the name of the method.
      init: settings of that function.
      seed: of the key that it is given.

    Raises:
      InputError: an unknown method, one that has to be fitted, and what its `make` or `init` raises.
    """
    settings, module = dict(init or {}), methods.get(method)
    if hasattr(module, "fit") and not hasattr(module, "make"):
        raise InputError(f"{method} has to be fitted: give it `fit` and data in place of `init`")
    control = getattr(module, "make", module.init)(open_lm(lm)[0], jax.random.key(seed), **settings)
    checkpoint.save(run.path / "state", control)
    run.record(method=method, init=settings)
