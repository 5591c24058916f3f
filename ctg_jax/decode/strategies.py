"""Decoding strategies: how prompts become completions under a control.

A control names its strategy in the class attribute `strategy`; one that has none is decoded token by token (`PLAIN`).
Whatever completes prompts calls `run`, so every strategy is checked, split over processes and devices, and streamed in
the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax.control import Chain
from ctg_jax.controls import constraints
from ctg_jax.decode import loop
from ctg_jax.decode.checks import check_rows, finite
from ctg_jax.decode.rows import by_rows, is_end
from ctg_jax.models.lm import LM
from ctg_jax.types import InputError, Params, Prompts, Samples, Sampling


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way to complete prompts. Frozen and hashable: it is a static argument of compiled programs.

    Attributes:
      likelihood: whether `Samples.logp` is the log-probability of the text under what drew it.
      apart: whether rows do not read each other, so that they may be completed on several devices.
    """

    likelihood: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    def check(self, lm: LM, prompts: Prompts, control: Any, sampling: Sampling) -> None:
        """Checks a request on the host, where the values of arrays are known.

        Raises:
          InputError: this strategy cannot serve it.
        """

    def __call__(self, lm: LM, params: Params, prompts: Prompts, control: Any, sampling: Sampling) -> Samples:
        """Completions of prompts [B, T]. Pure: it may be called inside `jit` and `shard_map`."""
        raise NotImplementedError

    def stream(
        self, lm: LM, params: Params, prompts: Prompts, control: Any, sampling: Sampling
    ) -> Iterator[np.ndarray]:
        """Yields the new tokens in order, int32 [B] each; all at the end where text is not written left to right."""
        yield from np.asarray(self(lm, params, prompts, control, sampling).tokens).T


@dataclasses.dataclass(frozen=True)
class Plain(Strategy):
    """Token by token from the controlled next-token distribution of the language model: the loop of `decode`."""

    def check(self, lm, prompts, control, sampling):
        check_rows(lm, prompts, control, sampling.max_new)

    def __call__(self, lm, params, prompts, control, sampling):
        return loop.loop(lm, params, prompts, control, sampling)

    def stream(self, lm, params, prompts, control, sampling):
        return loop.stream(lm, params, prompts, control, sampling)


PLAIN = Plain()


def of(control: Any) -> Strategy:
    """The strategy of a control: its own, or `PLAIN`.

    Raises:
      InputError: a chain in which a control with a strategy of its own has company. It replaces the decode loop, so the
        other controls would have no weights, states or logits to act on.
    """
    control = constraints.apart(control)[1]
    if not isinstance(control, Chain):
        return getattr(control, "strategy", PLAIN)
    if own := [part for part in control.parts if of(part) is not PLAIN]:
        raise InputError(
            f"{type(own[0]).__name__} completes prompts in place of the decode loop, without a next-token "
            "distribution, so no other control and no filter can act on it: give it alone, and set filter to {}"
        )
    return PLAIN


def run(
    lm: LM,
    params: Params,
    prompts: Prompts,
    control: Any,
    sampling: Sampling,
    devices: Sequence[jax.Device] = (),
) -> Samples:
    """Completions of prompts by the strategy of `control`, rows split as `layout.run_rows` does.

    Args:
      devices: of this process, for rows of their own; see `layout.accelerators`.

    Raises:
      InputError: what `of` and the `check` of the strategy raise, and logits or vectors that are not finite.
    """
    strategy = of(control)
    strategy.check(lm, prompts, control, sampling)
    return finite(by_rows(strategy, lm, params, prompts, control, sampling, devices, split=strategy.apart))


def stream(lm: LM, params: Params, prompts: Prompts, control: Any, sampling: Sampling) -> Iterator[np.ndarray]:
    """Yields the new tokens that `run` would give, int32 [B] each, as soon as the strategy of `control` has them.

    Raises:
      InputError: what `of` and the `check` of the strategy raise.
    """
    strategy = of(control)
    strategy.check(lm, prompts, control, sampling)
    return strategy.stream(lm, params, prompts, control, sampling)


def cut(tokens: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """(tokens int32 [B, N], mask bool [B, N]) of whole rows, cut behind the first end token or stop sequence of each
    as `decode.generate` cuts them: `mask` is True up to the cut and `sampling.pad` is written behind it."""
    end = is_end(tokens, sampling.eos)
    for stop in sampling.stop:
        last = len(stop) - 1
        hit = jnp.ones(tokens.shape, bool).at[:, :last].set(False)
        for back, token in enumerate(reversed(stop)):
            hit &= jnp.roll(tokens == token, back, axis=1)
        end |= hit
    mask = jnp.cumsum(end, axis=1) - end == 0
    return jnp.where(mask, tokens, sampling.pad), mask


def check_row(prompts: Prompts, new: int, length: int) -> None:
    """InputError where the longest prompt and `new` tokens do not fit a row of `length` tokens of a model that was
    trained on rows of one length."""
    longest = int(np.asarray(prompts.mask).sum(1).max())
    if longest + new > length:
        raise InputError(
            f"The longest prompt has {longest} tokens and max_new is {new}, but rows of {length} tokens were trained "
            "on: shorten them or fit with a larger length."
        )
