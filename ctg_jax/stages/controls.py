"""The stage that makes a control without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from ctg_jax import methods
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage_function


@stage_function("made")
def made(run: Run, *, lm: Artifact, method: str, init: Mapping[str, Any] | None = None, seed: int = 0) -> None:
    """Stage: saves the control that the `make` of a method returns, or its `init` where it has no `make`, for controls
    that need no training.

    Args:
      lm: the language model that the control is made for.
      method: the name of the method.
      init: settings of that function.
      seed: of the key that it is given.

    Raises:
      InputError: an unknown method, and what its `make` or `init` raises.
    """
    settings, module = dict(init or {}), methods.get(method)
    control = getattr(module, "make", module.init)(open_lm(lm)[0], jax.random.key(seed), **settings)
    checkpoint.save(run.path / "state", control)
    run.record(method=method, init=settings)
