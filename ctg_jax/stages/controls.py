"""The stage that makes a control without training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax

from ctg_jax import methods
from ctg_jax.run import checkpoint
from ctg_jax.run.identity import local_models
from ctg_jax.run.stage import Artifact, Run, open_lm, stage_function


@stage_function("made", revision=1, contents={"init": local_models})
def made(run: Run, *, lm: Artifact, method: str, init: Mapping[str, Any] | None = None, seed: int = 0) -> None:
    """Stage: saves a control that needs no training: what `methods.maker` of its method returns.

    Args:
      lm: the language model that the control is made for.
      method: the name of the method.
      init: settings of that function. One with a parameter `tokenizer` is given that of the model as well.
      seed: of the key that it is given.

    Raises:
      InputError: an unknown method, one that has to be fitted, and what its `make` or `init` raises.
    """
    settings, make = dict(init or {}), methods.maker(method)
    model, _, tokenizer = open_lm(lm)
    reads = {"tokenizer": tokenizer} if "tokenizer" in inspect.signature(make).parameters else {}
    control = make(model, jax.random.key(seed), **reads, **settings)
    checkpoint.save(run.path / "state", control)
    run.record(method=method, init=settings)
