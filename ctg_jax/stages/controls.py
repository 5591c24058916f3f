"""The stage that makes a control without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from ctg_jax import methods
from ctg_jax.io import dumps, sha256_of
from ctg_jax.run import checkpoint
from ctg_jax.run.identity import Sha256, model_content
from ctg_jax.run.stage import Artifact, Run, open_lm, stage_function


def _local_models(init: Mapping[str, Any], settings: Mapping[str, Any], sha256: Sha256) -> str | None:
    """What identifies settings that name folders with models, by the content of the folders; None where none does."""
    found = {name: model_content(v, None, sha256) for name, v in init.items() if isinstance(v, str)}
    local = {name: content for name, content in found.items() if content is not None}
    return sha256_of(dumps(dict(init) | local, sort_keys=True)) if local else None


@stage_function("made", contents={"init": _local_models})
def made(run: Run, *, lm: Artifact, method: str, init: Mapping[str, Any] | None = None, seed: int = 0) -> None:
    """Stage: saves a control that needs no training: what `methods.maker` of its method returns.

    Args:
      lm: the language model that the control is made for.
      method: the name of the method.
      init: settings of that function.
      seed: of the key that it is given.

    Raises:
      InputError: an unknown method, one that has to be fitted, and what its `make` or `init` raises.
    """
    settings, make = dict(init or {}), methods.maker(method)
    control = make(open_lm(lm)[0], jax.random.key(seed), **settings)
    checkpoint.save(run.path / "state", control)
    run.record(method=method, init=settings)
