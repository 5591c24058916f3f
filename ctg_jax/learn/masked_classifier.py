"""The classifier that guides masked diffusion: a logistic regression of a network's states on partly masked rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import rng
from ctg_jax.data.labels import is_label, of_all_classes
from ctg_jax.data.sources import Record
from ctg_jax.learn.diffusion_losses import filled
from ctg_jax.models import masked
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.heads import Head
from ctg_jax.rewards.logistic import fit_logistic
from ctg_jax.run.identity import how
from ctg_jax.types import InputError, Params


@dataclasses.dataclass(frozen=True)
class Regression:
    """How the classifier is fitted.

    Attributes:
      views: how many times each text is read, each time masked as it is at a random moment of its sampling: at a
        uniform time or, by a network of blocks, at a uniform time of a random block.
      inverse_l2: the inverse weight of the L2 penalty on standardised states, C in scikit-learn.
      heldout: the share of texts that the classifier does not see.
      margin: how far its accuracy on them must lie above that of always naming the most frequent class.
      limit: the most texts that are read, chosen at random by the seed; 0: all.
      batch: texts read at a time.
    """

    views: int = 4
    inverse_l2: float = 1e-3
    heldout: float = 0.1
    margin: float = 0.02
    limit: int = 0
    batch: int = how(64)

    def __post_init__(self):
        if self.views < 1 or self.inverse_l2 <= 0 or not 0 < self.heldout < 1 or self.batch < 1 or self.limit < 0:
            raise InputError(
                f"{self}: expected views and batch from 1, limit from 0, inverse_l2 above 0, heldout between 0 and 1."
            )

    def chosen(self, texts: Sequence[Any], seed: int) -> list[Any]:
        """At most `limit` of the texts, drawn without replacement by the seed, in their order."""
        if not self.limit or self.limit >= len(texts):
            return list(texts)
        kept = np.random.default_rng(seed).choice(len(texts), self.limit, replace=False)
        return [texts[i] for i in sorted(kept)]


def texts(records: Sequence[Record], where: str, classes: int | None) -> tuple[Sequence[Record], int]:
    """(records, C) that the classifier learns from: those with a label, of which there is one of each class.

    Args:
      records: those that have a label have it under `label`. where: what holds them, for messages.
      classes: C; None: the number found, and where no record has a label, 0. 0: no classifier; all records come back.

    Raises:
      InputError: what `of_all_classes` raises.
    """
    found = [r["label"] for r in records if is_label(r.get("label"))]
    if classes == 0 or (classes is None and not found):
        return records, 0
    classes = classes or 1 + max((label for label in found if isinstance(label, int)), default=0)
    return of_all_classes(records, where, classes), classes


def read(
    net: Transformer, params: Params, batches: Iterable[Mapping[str, Any]], eos: int, regression: Regression, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(`masked.features` float32 [views, N, F] of N texts, their labels int64 [N]).

    Args:
      batches: of `ctg_jax.data.pipeline`, with the field `label`, each text once. eos: fills rows behind their texts.
      seed: of the masks.
    """

    @jax.jit
    def one(params, tokens, keys):
        u = jax.vmap(lambda k: jax.random.uniform(k, (1 + tokens.shape[1],)))(keys)
        size = net.block or tokens.shape[1]
        count = -(-tokens.shape[1] // size)
        # The moment from 0, a row without masks, to the number of blocks; the last block is the first to be masked.
        moment = count * u[:, :1] - (count - 1 - jnp.arange(tokens.shape[1]) // size)[None]
        x = jnp.where(u[:, 1:] < moment, net.vocab - 1, tokens)
        return masked.features(net, params, net.embed(params, x))[0]

    found, labels = [], []
    for batch in batches:
        tokens, real = filled(batch, eos), batch["mask"].any(axis=1)
        keys = [
            rng.per_example(jax.random.fold_in(jax.random.key(seed), view), batch["ids"])
            for view in range(regression.views)
        ]
        found.append(np.stack([np.asarray(one(params, tokens, k)) for k in keys])[:, real])
        labels.append(np.asarray(batch["label"])[real])
    return np.concatenate(found, axis=1), np.concatenate(labels).astype(np.int64)


def fit(x: np.ndarray, labels: np.ndarray, regression: Regression, seed: int) -> tuple[Head, dict[str, float]]:
    """(a `linear_head`, its figures on held-out texts): a regression on standardised features, which `linear_head`
    reads as they are. The figures are `accuracy` over all views, `chance`, and `heldout`, the number of texts.

    Args:
      x: float32 [views, N, F]. labels: int64 [N]. seed: of the held-out texts.

    Raises:
      InputError: the accuracy does not lie `margin` above chance, or no text of a class is left to learn from.
    """
    heldout, inverse_l2, margin = regression.heldout, regression.inverse_l2, regression.margin
    held = np.random.default_rng(seed).permutation(len(labels)) < max(round(heldout * len(labels)), 1)
    classes = np.unique(labels)
    if set(labels[~held]) != set(classes):
        raise InputError(
            f"heldout is {heldout} of {len(labels)} texts, which leaves a class without a text to learn from: give more"
        )
    views, _, width = x.shape
    seen = x[:, ~held].reshape(-1, width)
    mean, deviation = seen.mean(0, dtype=np.float64), seen.std(0, dtype=np.float64)
    deviation = np.where(deviation > 1e-6, deviation, 1.0)
    coef, bias, _ = fit_logistic((seen - mean) / deviation, np.tile(labels[~held], views), inverse_l2, seed)
    if len(coef) == 1:  # two classes: scores of the second against the first
        coef, bias = np.concatenate([np.zeros_like(coef), coef]), np.concatenate([np.zeros_like(bias), bias])
    kernel = coef / deviation
    head = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias - kernel @ mean, jnp.float32)}
    scores = x[:, held] @ np.asarray(head["kernel"]).T + np.asarray(head["bias"])
    accuracy = float(np.mean(scores.argmax(axis=2) == labels[held]))
    chance = float(np.bincount(labels[held]).max() / held.sum())
    if accuracy < chance + margin:
        raise InputError(
            f"the classifier is right on {accuracy:.3f} of {held.sum()} held-out texts, where always naming their most "
            f"frequent class is right on {chance:.3f}: it would guide nowhere; train the network longer, give more "
            "texts, or set margin below 0 to keep it"
        )
    return head, {"accuracy": accuracy, "chance": chance, "heldout": int(held.sum())}
