"""Figures of samples and of models, each with a bootstrap interval over prompts."""

from ctg_jax.evaluation.agreement import auc, bleu, spearman
from ctg_jax.evaluation.bootstrap import Bootstrap, Figure
from ctg_jax.evaluation.factor import Factor, harmonic, held_out
from ctg_jax.evaluation.figures import FIELD, Protocol, attribute, summary
from ctg_jax.evaluation.fluency import kl_figure, kl_to_base, token_repetition
from ctg_jax.evaluation.likelihood import LMScorer, log_probabilities
from ctg_jax.evaluation.perplexity import Perplexity
from ctg_jax.evaluation.protocol import evaluate, score
from ctg_jax.evaluation.similarity import cosine, mauve, similarity
from ctg_jax.evaluation.smooth import smooth_control
from ctg_jax.evaluation.text import coverage, distinct, diversity, ngrams, repetition, self_bleu, unique_words

__all__ = [
    "FIELD",
    "Bootstrap",
    "Factor",
    "Figure",
    "LMScorer",
    "Perplexity",
    "Protocol",
    "attribute",
    "auc",
    "bleu",
    "cosine",
    "coverage",
    "distinct",
    "diversity",
    "evaluate",
    "harmonic",
    "held_out",
    "kl_figure",
    "kl_to_base",
    "log_probabilities",
    "mauve",
    "ngrams",
    "repetition",
    "score",
    "self_bleu",
    "similarity",
    "smooth_control",
    "spearman",
    "summary",
    "token_repetition",
    "unique_words",
]
