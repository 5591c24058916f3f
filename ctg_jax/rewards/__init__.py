"""Rewards: functions from prompts and texts to float32 [n], higher is better, that run locally and carry a version.

A metric is a reward that nobody optimises. Text is the border: a reward never sees the tokens of the model that it
judges, so two tokenizers never meet.
"""

from ctg_jax.rewards.bag import BagOfWords
from ctg_jax.rewards.check import Reward, TextReward, checked
from ctg_jax.rewards.classifier import SequenceClassifier
from ctg_jax.rewards.diversity import diversity
from ctg_jax.rewards.embed import Embedder, sentence_embedder
from ctg_jax.rewards.function import FunctionReward, code_of, function_content, named
from ctg_jax.rewards.lexicon import Lexicon, read_weights, read_words, reviews_oracle
from ctg_jax.rewards.preference import PreferenceModel
from ctg_jax.rewards.probe import LinearProbe

__all__ = [
    "BagOfWords",
    "Embedder",
    "FunctionReward",
    "Lexicon",
    "LinearProbe",
    "PreferenceModel",
    "Reward",
    "SequenceClassifier",
    "TextReward",
    "checked",
    "code_of",
    "diversity",
    "function_content",
    "named",
    "read_weights",
    "read_words",
    "reviews_oracle",
    "sentence_embedder",
]
