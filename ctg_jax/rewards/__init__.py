"""Rewards: functions from prompts and texts to float32 [n], higher is better, that run locally and carry a version.

A metric is a reward that nobody optimises. Rewards are given text, never the tokens of the model that they judge, so
they work with any tokenizer.

The kinds of judges (`ctg_jax.stages.judges.fit_judge`) are modules of this package, found by their file names; there is
no list to edit. The module of a kind has

    SETTINGS                       the settings of `fit_judge` that it reads, besides kind, name and heldout
    load(folder, settings)         the reward; `settings` are those of `fit_judge`, with `embedder`, a function without
                                   arguments that opens `encoder`, and `folder` is where it was saved
    fit(records, settings, where)  the reward fitted on the records of `data`, with `save(folder)`; only where SETTINGS
                                   has "data". `where` is what messages call the records
    accuracy(judge, records, where)  the accuracy on held-out records that are not texts with labels; optional
"""

import importlib
import pkgutil
from types import ModuleType

from ctg_jax.rewards.bag import BagOfWords
from ctg_jax.rewards.check import Reward, TextReward, checked
from ctg_jax.rewards.classifier import SequenceClassifier
from ctg_jax.rewards.code import code_of, function_content, named
from ctg_jax.rewards.diversity import diversity
from ctg_jax.rewards.embed import Embedder, open_embedder, sentence_embedder
from ctg_jax.rewards.function import FunctionReward
from ctg_jax.rewards.length import Length
from ctg_jax.rewards.lexicon import Lexicon, read_weights, read_words
from ctg_jax.rewards.oracle import reviews_oracle
from ctg_jax.rewards.preference import PreferenceModel
from ctg_jax.rewards.probe import LinearProbe
from ctg_jax.rewards.rank import RankScorer
from ctg_jax.types import InputError

__all__ = [
    "BagOfWords",
    "Embedder",
    "FunctionReward",
    "Length",
    "Lexicon",
    "LinearProbe",
    "PreferenceModel",
    "RankScorer",
    "Reward",
    "SequenceClassifier",
    "TextReward",
    "checked",
    "code_of",
    "diversity",
    "function_content",
    "get",
    "kinds",
    "named",
    "open_embedder",
    "read_weights",
    "read_words",
    "reviews_oracle",
    "sentence_embedder",
]


def kinds() -> list[str]:
    """The kinds of judges there are, by the names of their files."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return [name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "SETTINGS")]


def get(kind: str) -> ModuleType:
    """The module of a kind of judge; InputError where there is none."""
    if kind not in (known := kinds()):
        raise InputError(f"kind is {kind!r}; expected one of {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{kind}")
