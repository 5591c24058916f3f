"""`choose`: the layer, or any other setting, and the strength at which a control does best on held-out prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ctg_jax.data.messages import Messages
from ctg_jax.door.calibrate import calibrate
from ctg_jax.door.inputs import prompts_of
from ctg_jax.door.mix import Mix, mix_of
from ctg_jax.door.model import Model, check_model
from ctg_jax.evaluation.strength import Unreached
from ctg_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Choice:
    """A candidate at one KL.

    Attributes:
      name: of the candidate. control: it, at its strength. strength, kl: that strength, and the KL there.
      score: the mean score of its texts. error: the standard error of that mean over prompts.
    """

    name: Any
    control: Mix
    strength: float
    kl: float
    score: float
    error: float


def choose(
    candidates: Mapping[Any, Any],
    lm: Model,
    prompts: Sequence[str | Messages],
    score: Callable[[str], float],
    *,
    texts: Sequence[str | Messages],
    kl: Sequence[float] = (0.1, 0.3, 1.0),
    n: int = 4,
    tokens: int = 64,
    prompt: int = 1,
    **options: Any,
) -> list[Choice]:
    """All candidates at every KL, the best first: each is brought to that KL on ordinary texts (`calibrate`) and writes
    on from the same prompts with the same random numbers, and a score of its texts decides. So candidates are compared
    where they change the model equally, and none by its raw strength.

        found = ctg.choose({block: ctg.steer.from_pairs(lm, pairs, sites=block) for block in (6, 9, 12)}, lm, prompts,
                           score, texts=held_out, kl=(0.1, 0.3))
        lm.write(others, control=found[0].control)

    Args:
      candidates: name -> control, such as one for each layer.
      lm: the language model, as `load` returns it.
      prompts: held out; the texts that a control was fitted on flatter it.
      score: what a text is worth, such as the probability that a classifier gives to the attribute. A score that
        fluency does not enter favours strong controls; the KL bounds how far they go.
      texts: ordinary texts, on which the KL is measured.
      kl: nats per token; a candidate that does not reach one of them is left out there.
      tokens, prompt: see `calibrate`; candidates that act on different parts of a text need a `prompt` of more tokens.
      n: completions of each prompt. options: of `Model.write`.

    Raises:
      InputError: no candidate, a score that is no finite number, a KL that no candidate reaches, and what `calibrate`
        and `write` raise.
    """
    check_model(lm)
    if not isinstance(candidates, Mapping) or not candidates:
        raise InputError(f"candidates is {candidates!r:.60}, expected a dictionary of controls by their names")
    prompts_of(prompts, options.get("system"))
    found: list[Choice] = []
    missed: list[str] = []
    for name, candidate in candidates.items():
        mix = mix_of(candidate, f"candidate {name!r}")
        for level in kl:
            try:
                at = calibrate(mix, lm, texts, kl=level, tokens=tokens, prompt=prompt)
            except Unreached as e:
                missed.append(f"candidate {name!r}: {e}")
                continue
            except InputError as e:
                raise InputError(f"candidate {name!r}: {e}") from None
            written = lm.write(prompts, at.control, n=n, **options)
            means = np.array([np.mean([_scored(score, text) for text in row]) for row in written])
            error = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else float("nan")
            found.append(Choice(name, at.control, at.strength, at.kl, float(means.mean()), error))
    if not found:
        raise InputError(missed[0])
    return sorted(found, key=lambda choice: -choice.score)


def _scored(score: Callable[[str], float], text: str) -> float:
    value = score(text)
    if not np.ndim(value) == 0 or not np.isfinite(value):
        raise InputError(f"score gives {value!r:.40} for {text!r:.40}, expected a finite number")
    return float(value)
