"""The one check of lengths: whether a language model, and whatever reads along with it, can read a row.

Everything that reads a model calls it on the host, or while it is traced. A position past the end of a table of
positions would otherwise be clamped to the last one, and a wrong number would follow without an error.
"""

from __future__ import annotations

import jax
import numpy as np

from ctg_jax.control import IDENTITY, Control
from ctg_jax.models.lm import LM
from ctg_jax.types import InputError, Prompts


def room(lm: LM, control: Control = IDENTITY) -> tuple[int, str]:
    """(the number of tokens of a row that `lm` and every model of the control can read, what limits it): the context of
    each model, less the tokens that controls add there. A prefix takes no positions, and so no room."""
    models = (("model", lm.context, control.added()), *control.readers())
    name, context, added = min(models, key=lambda model: model[1] - model[2])
    limit = f"the {name}'s context is {context}"
    return context - added, f"{limit}, of which controls take {added}" if added else limit


def check_reads(lm: LM, tokens: int, what: str, control: Control = IDENTITY) -> None:
    """InputError where `lm` under `control` has no room for the longest row.

    Args:
      tokens: the number of tokens of that row that are read. The last token of a completion is not.
      what: the beginning of the message: the input and its length.
    """
    most, limit = room(lm, control)
    if tokens > most:
        raise InputError(f"{what}, but {limit}: shorten it, or use a model with a longer context.")


def check_lengths(
    lm: LM,
    prompts: Prompts,
    new: int,
    control: Control = IDENTITY,
    name: str = "max_new",
    written: jax.Array | None = None,
) -> None:
    """`check_reads` of prompts and their completions; padding counts only while it is not known (inside `jit`).

    Args:
      prompts: [B, T].
      new: tokens of a completion. name: what the message calls them.
      written: bool [B, new], which tokens of each completion are no padding; None: all.

    Raises:
      InputError: also where the batch is empty.
    """
    batch, t = prompts.tokens.shape
    if batch == 0 or t == 0:
        raise InputError(f"prompts has shape {prompts.tokens.shape}, expected at least one row and one token.")
    if new < 1:
        raise InputError(f"{name} is {new}, expected at least 1.")
    sizes, more = (
        np.full(batch, most) if mask is None or isinstance(mask, jax.core.Tracer) else np.asarray(mask).sum(1)
        for mask, most in ((prompts.mask, t), (written, new))
    )
    row = int(np.argmax(sizes + more))
    what = f"The longest prompt has {sizes[row]} tokens and {name} is {more[row]}"
    check_reads(lm, int(sizes[row] + more[row]) - 1, what, control)
