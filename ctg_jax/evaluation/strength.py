"""The strength at which a control is as far from the base as one asks: the KL per token as a function of the strength,
and a search for the strength that needs few evaluations.

A strength is a leaf, so that every evaluation runs the program of the first.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import rng, tree
from ctg_jax.control import STRENGTHS, Chain, Control, leaves, strength_of, with_strength
from ctg_jax.controls import constraints
from ctg_jax.data.messages import Messages, is_messages
from ctg_jax.data.tokenizer import Tokenizer, pad_rows
from ctg_jax.decode.checks import check_finite, check_rows
from ctg_jax.decode.reading import read_rows
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import Read, reduced
from ctg_jax.types import InputError, Params, Prompts

log = logging.getLogger(__name__)
MOST = 12  # evaluations of a search
STRIDE = 16.0  # factor between two strengths of a search, at most
DIGITS = 5  # of a strength, so that it is written down as it was tried


class Unreached(InputError):
    """No strength of the control has the KL that was asked for; tried: all (strength, KL) that were evaluated."""

    def __init__(self, message: str, tried: Sequence[tuple[float, float]]):
        super().__init__(message)
        self.tried = tuple(tried)


class Divergence:
    """KL(controlled ‖ base) in nats per token, over the tokens of given texts: after each prefix of a text, the KL of
    the distributions of its next token, exact over the vocabulary.

    Args:
      lm, params, tokenizer: as `ctg_jax.run.stage.open_lm` returns them.
      texts: strings, of which the first `prompt` tokens are the prompt, and conversations that end with an answer of
        the assistant, whose tokens are those that count.
      tokens: read of a text behind its prompt, at most. batch: rows of a compiled batch; all batches have one shape.
      prompt: tokens of a string that are its prompt, the beginning token included. A control that acts on the prompt
        alone has hardly anything to act on where that is one token.
      cond: what controls compute from their prompts: it is called with those of the texts, the first `prompt` tokens
        of strings and conversations as they are, and returns entries of `prompts.cond`, name -> array with a row for
        each.

    Raises:
      InputError: no texts, a prompt, a batch or a number of tokens that is no whole number above 0, or a text with
        nothing behind its prompt.
    """

    def __init__(
        self,
        lm: LM,
        params: Params,
        tokenizer: Tokenizer,
        texts: Sequence[str | Messages],
        *,
        tokens: int = 64,
        batch: int = 16,
        prompt: int = 1,
        cond: Callable[[list[str | Messages]], Mapping[str, np.ndarray]] | None = None,
    ):
        if not len(texts):
            raise InputError("there are no texts to measure the KL on: give at least one")
        for name, value in dict(prompt=prompt, tokens=tokens, batch=batch).items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}, expected a whole number of at least 1")
        self.lm, self.params, self._known = lm, params, tokenizer.known(lm.vocab)
        heads, tails = zip(*(_parts(tokenizer, text, i, prompt, tokens) for i, text in enumerate(texts)))
        found = {} if cond is None else cond(_beginnings(tokenizer, texts, heads))
        batch = min(batch, len(texts))
        size = max(map(len, heads)), max(map(len, tails))
        self._batches = []
        for at in range(0, len(texts), batch):
            rows = list(range(at, min(at + batch, len(texts))))
            rows += rows[:1] * (batch - len(rows))
            head, mask = pad_rows([heads[i] for i in rows], size[0], 0, left=True)
            tail, written = pad_rows([tails[i] for i in rows], size[1], 0, left=False)
            written[len(texts) - at :] = False  # rows that only fill the batch
            own = {name: jnp.asarray(values[rows]) for name, values in found.items()} if found else None
            keys = rng.per_example(jax.random.key(0), rows)
            prompts = Prompts(jnp.asarray(head), jnp.asarray(mask), keys, own)
            self._batches.append((prompts, jnp.asarray(tail), jnp.asarray(written)))
        base = constraints.only(self._known, Control())
        self._base = [read_rows(lm, params, p, tail, base) for p, tail, _ in self._batches]

    def __call__(self, control: Control) -> float:
        """The KL of a control, in nats per token.

        Raises:
          InputError: the texts do not fit in the context with what the control adds; logits that are not finite.
        """
        control = constraints.only(self._known, control)
        total = count = 0.0
        for (prompts, tail, written), base in zip(self._batches, self._base):
            check_rows(self.lm, prompts, control, tail.shape[1], tail, written)
            kl = _kl(self.lm, self.params, base, prompts, tail, written, control)
            check_finite(kl)
            total += float(np.asarray(kl, np.float64).sum())
            count += float(np.asarray(written).sum())
        return total / count


@partial(jax.jit, static_argnames=("lm",))
def _kl(
    lm: LM, params: Params, base: Read, prompts: Prompts, tail: jax.Array, written: jax.Array, control: Control
) -> jax.Array:
    """float32 [B, N]: the KL of each position, 0 for padding."""

    def divergence(z, other, written):
        p, q = jax.nn.log_softmax(z), jax.nn.log_softmax(other)
        return jnp.where(written, jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0.0)

    return reduced((read_rows(lm, params, prompts, tail, control), base), divergence, written)


def _beginnings(
    tokenizer: Tokenizer, texts: Sequence[str | Messages], heads: Sequence[list[int]]
) -> list[str | Messages]:
    """The prompts of the texts; conversations as they are, whose answer is left out by what reads them as prompts."""
    return [text if is_messages(text) else tokenizer.decode([head])[0] for text, head in zip(texts, heads)]


def _parts(
    tokenizer: Tokenizer, text: str | Messages, number: int, prompt: int, most: int
) -> tuple[list[int], list[int]]:
    """(prompt, completion) of a text, as ids."""
    if is_messages(text):
        if text[-1]["role"] != "assistant":
            raise InputError(f"text {number + 1} is a conversation without an answer at its end, which is what counts")
        found = tokenizer.chat.encode(text)
        head, tail = found.ids[: found.answer.start], found.ids[found.answer]
    else:
        ids = tokenizer.begun(tokenizer.encode([text])[0])
        head, tail = ids[:prompt], ids[prompt:]
    if not head or not tail:
        raise InputError(
            f"text {number + 1} is too short for a prompt of {prompt} and a token behind it, whose KL is measured: "
            "give longer texts or a smaller prompt"
        )
    return head, tail[:most]


def dial(control: Control, leaf: str | None = None) -> tuple[float, Callable[[float], Control]]:
    """(the present strength, a function that gives the control at another one).

    A chain has the strength of its first part that has one, and the others keep their ratios to it. A strength of 0,
    which has no direction, counts as 1.

    Args:
      leaf: the path of a leaf to turn in place of the strength, such as `delta/scale` of a control whose strength
        chooses one of a few codes.

    Raises:
      InputError: no strength, a strength for each row, no such leaf.
    """
    if leaf is not None:
        found = tree.flatten(control)
        if leaf not in found or np.ndim(found[leaf]):
            numbers = ", ".join(sorted(name for name, x in found.items() if np.ndim(x) == 0)) or "none"
            raise InputError(f"leaf is {leaf!r}, expected a single number of the control: {numbers}.")
        return float(found[leaf]), lambda value: tree.map_with_path(
            lambda path, x: jnp.asarray(value, jnp.float32) if path == leaf else x, control
        )
    found = [x for part in leaves(control) if (x := strength_of(part)) is not None]
    if not found:
        raise InputError(f"{type(control).__name__} has no strength: expected a leaf called {' or '.join(STRENGTHS)}.")
    if any(np.ndim(x) for x in found):
        raise InputError("the strength is one number for each row, expected a single one: calibrate it before.")
    first = next((float(x) for x in found if float(x)), None)

    def turned(part: Control, value: float) -> Control:
        if isinstance(part, Chain):
            return part.replace(parts=tuple(turned(p, value) for p in part.parts))
        own = strength_of(part)
        if own is None:
            return part
        return with_strength(part, value if first is None else float(own) / first * value)

    return (1.0 if first is None else first), partial(turned, control)


@dataclasses.dataclass(frozen=True)
class Solved:
    """A strength and the KL there, nats per token; tried: all (strength, KL) that were evaluated, in order."""

    strength: float
    kl: float
    tried: tuple[tuple[float, float], ...]


def solve(
    kl: Callable[[float], float], target: float, start: float = 1.0, *, tolerance: float = 0.02, most: int = MOST
) -> Solved:
    """The strength at which `kl` is within the share `tolerance` of `target`.

    The logarithm of the KL is nearly linear in that of the strength (of slope 2 where the control is weak), so the
    search is one by secants in these coordinates. Once the target is enclosed, an end that stays is given half its
    weight (the Illinois rule), which cannot leave the bracket.

    Args:
      kl: nats per token at a strength; it grows with the size of the strength around the answer.
      target: nats per token, above 0.
      start: where to begin; the answer has its sign.
      most: evaluations.

    Raises:
      InputError: a target that is not above 0. Unreached: a KL that is not reached, with what was reached instead.
    """
    if not (isinstance(target, int | float) and math.isfinite(target) and target > 0):
        raise InputError(f"kl is {target!r}, expected nats per token above 0.")
    sign, x = math.copysign(1.0, start), abs(start) or 1.0
    tried: list[tuple[float, float]] = []
    ends: dict[bool, list[float]] = {}  # whether above the target -> [log strength, log KL / target] of the last there
    side = None
    while len(tried) < most:
        value = float(f"{sign * x:.{DIGITS}g}")
        found = kl(value)
        tried.append((value, found))
        log.info("strength %g: KL %.4g nats per token, asked for %.4g", value, found, target)
        if abs(found / target - 1) <= tolerance:
            return Solved(value, found, tuple(tried))
        here = [math.log(abs(value)), math.log(max(found, 1e-12) / target)]
        was, side = side, here[1] > 0
        before, ends[side] = ends.get(side), here
        if len(ends) == 2:
            if was == side:
                ends[not side][1] *= 0.5
            (a, below), (b, above) = ends[False], ends[True]
            x = math.exp(a + (b - a) * below / (below - above))
        else:
            slope = 2.0
            if before is not None and here[0] != before[0]:
                slope = min(8.0, max(0.5, (here[1] - before[1]) / (here[0] - before[0])))
            x = math.exp(here[0] + min(math.log(STRIDE), max(-math.log(STRIDE), -1.05 * here[1] / slope)))
    raise Unreached(_missed(tried, target), tried)


def _missed(tried: Sequence[tuple[float, float]], target: float) -> str:
    """What to say where the target was not reached."""
    most, least = (pick(tried, key=lambda t: t[1]) for pick in (max, min))
    asked = f"kl is {target:g} nats per token"
    if most[1] < target:
        return f"{asked}, but the control reaches at most {most[1]:.4g}, at strength {most[0]:g}: ask for less"
    if least[1] > target:
        return f"{asked}, but the control is already at {least[1]:.4g} at strength {least[0]:g}: ask for more"
    below = max((t for t in tried if t[1] < target), key=lambda t: t[1])
    above = min((t for t in tried if t[1] > target), key=lambda t: t[1])
    return (
        f"{asked}, but the KL jumps from {below[1]:.4g} at strength {below[0]:g} to {above[1]:.4g} at {above[0]:g}: "
        "the strength chooses among a few settings; name a leaf that moves the control continuously"
    )
