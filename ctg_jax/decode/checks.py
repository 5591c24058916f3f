"""Checks before a language model reads rows, and after it has drawn or scored tokens. They run on the host, where
values are known; under `jit`, where arrays are traced, a check that needs values is skipped."""

from __future__ import annotations

import jax
import numpy as np

from ctg_jax import tree
from ctg_jax.control import Control
from ctg_jax.controls import constraints
from ctg_jax.data.ids import check_ids
from ctg_jax.models.lengths import check_lengths
from ctg_jax.models.lm import LM
from ctg_jax.types import InputError, Prompts, Samples


def check_rows(
    lm: LM,
    prompts: Prompts,
    control: Control,
    new: int,
    completion: jax.Array | None = None,
    written: jax.Array | None = None,
) -> None:
    """Everything that can be known before decoding or scoring.

    Args:
      new: tokens of a completion, N.
      completion: int32 [B, N] where completions are given, else None.
      written: bool [B, N], which tokens of each completion are no padding; None: all.

    Raises:
      InputError: the prompts, what controls add to them and the completions do not fit in the context of the LM or of a
        model that reads along (`check_lengths`); a token has no row in the LM; the control cannot read the prompts
        (`Control.check`); its rules cannot hold (`constraints.check`).
    """
    check_lengths(lm, prompts, new, control, "max_new" if completion is None else "the completion's length", written)
    tokens, mask, rest = (tree.concrete(x) for x in (prompts.tokens, prompts.mask, completion))
    if tokens is not None and mask is not None:
        check_ids(tokens[mask], lm.vocab, "prompts.tokens")
    if rest is not None:
        check_ids(rest, lm.vocab, "completion")
    control.check(prompts)
    constraints.check(control, lm.vocab, new)


def finite(out: Samples) -> Samples:
    """The samples themselves; raises InputError as `check_finite`."""
    check_finite(out.logp)
    return out


def check_finite(logp: jax.Array) -> None:
    """Raises InputError where a log-probability [B, N] is NaN."""
    if isinstance(logp, jax.core.Tracer):
        return
    if len(bad := np.argwhere(np.isnan(np.asarray(logp)))):
        row, step = bad[0]
        raise InputError(
            f"The logits of row {row}, new token {step + 1}, are not finite: parameters of the model or of a control "
            "hold NaN or infinity, or a control removed every token that Ban, Force or MinLength allows."
        )
