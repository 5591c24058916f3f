"""Truncation and penalties as a method: the usual decoding options, with nothing to fit. See `controls.truncate`."""

from __future__ import annotations

import jax

from ctg_jax.control import Chain
from ctg_jax.controls.truncate import RepetitionPenalty, Temperature, TopP, Typical
from ctg_jax.controls.truncate import rules as init
from ctg_jax.models.lm import LM


def example(lm: LM, key: jax.Array) -> Chain:
    """Five rules at once, for the laws."""
    return init(lm, key, temperature=0.8, top_p=0.9, repetition_penalty=1.3, no_repeat_ngram=2, min_p=0.01)


def neutral(control: Chain) -> Chain:
    """The same rules where they change nothing; those without such a value are left out."""
    kinds = {Temperature: dict(t=1.0), TopP: dict(p=1.0), Typical: dict(p=1.0), RepetitionPenalty: dict(theta=1.0)}
    return Chain(tuple(c.replace(**kinds[type(c)]) for c in control.parts if type(c) in kinds))
