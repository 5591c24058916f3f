"""Completions in pieces, for terminals and notebooks: the text of `sampling.complete`, while it is written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ctg_jax.control import Control
from ctg_jax.controls import constraints
from ctg_jax.data import stops
from ctg_jax.data.messages import Messages
from ctg_jax.decode import strategies
from ctg_jax.stages.sampling import Options, check_prompts
from ctg_jax.types import InputError


def stream(
    model: Any,
    params: Any,
    tokenizer: Any,
    text: str | Messages,
    control: Control,
    options: Options,
    *,
    index: tuple[int, int] = (0, 0),
    cond: Mapping[str, np.ndarray] | None = None,
    length: int | None = None,
) -> Iterator[str]:
    """Yields one completion in pieces, as soon as they are decoded. Joined they are the text of `complete`.

    Args:
      options: all but `n` and `batch`, which are not read.
      index: the numbers of the prompt and of the sample, which select the random numbers.
      cond: entries of `prompts.cond`, name -> array with the row of this text.
      length: to which the prompt is padded, in tokens; by default not at all.

    Raises:
      InputError: a control that writes rows together; what `check_prompts` and `strategies.stream` raise.
    """
    from ctg_jax.data.tokenizer import to_prompts

    check_prompts(model, tokenizer, [text], options.max_new, control)
    if not strategies.of(control).apart:
        raise InputError("this control writes completions in groups, so one alone cannot be streamed: do not stream")
    control = constraints.only(tokenizer.known(model.vocab), control)
    (head,) = tokenizer.encode_prompts([text])
    own = dict(cond) if cond else None
    prompts = to_prompts(tokenizer, [text], options.seed, ids=[index], length=length, cond=own)
    drawing = options.sampling(tokenizer)
    tokens = (int(token[0]) for token in strategies.stream(model, params, prompts, control, drawing))
    shown = ""
    for piece in tokenizer.decode_stream(head, itertools.takewhile(lambda token: token not in drawing.eos, tokens)):
        text = stops.cut(shown + piece, options.stop)
        yield text[len(shown) :]
        if any(stop in text for stop in options.stop):
            return
        shown = text
