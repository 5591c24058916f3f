"""How likely texts are under a masked diffusion model, beside an autoregressive one."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from ctg_jax import methods, rng
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.evaluation.likelihood import log_probabilities
from ctg_jax.learn.diffusion_losses import filled
from ctg_jax.learn.fitting import matching
from ctg_jax.models import masked
from ctg_jax.run.stage import Artifact, Run, open_lm, stage_function


@stage_function("mdlm.bound", how=("batch",))
def bound(
    run: Run, *, lm: Artifact, data: Artifact, control: Artifact, draws: int = 16, batch: int = 32, seed: int = 0
) -> None:
    """Stage: measures how likely texts are, their ends included, in nats per token with a standard error.

    For the diffusion model the figure is an upper bound. For `lm` it is exact; `lm` reads its end token first, or just
    the beginning token of a row where its sequences have one. The tokens are the same for both, cut to the length of a
    row.

    Args:
      lm: the language model to compare with. data: the texts. control: an artifact of `mdlm`.
      draws: number of times drawn for each text, see `masked.nelbo`.
    """
    model, params, tokenizer = open_lm(lm)
    diffusion = methods.load(control, model)
    net, eos = diffusion.net, diffusion.eos
    given = int(tokenizer.adds_bos)  # tokens of a row that the language model does not have to predict
    source = Source(str(data.path), "all", matching(data, None))
    settings = dict(batch=batch, length=net.context, seed=seed, epochs=1, shuffle=False, drop_last=False)
    recover = partial(masked.recovery, net, diffusion.params)
    options = dict(draws=draws, block=net.block)
    estimate = jax.jit(lambda tokens, keys: masked.nelbo(recover, tokens, keys, diffusion.mask, **options))
    bounds, texts = [], []
    for rows in pipeline(source, tokenizer, **settings):
        sizes = rows["mask"].sum(axis=1)
        keys = rng.per_example(jax.random.key(seed), rows["ids"])
        found = np.asarray(estimate(filled(rows, eos), keys), np.float64)
        bounds += found[sizes > 0].tolist()
        texts += [row[:size].tolist() for row, size in zip(rows["tokens"], sizes) if size]
    prompts = [text[:1] if given else [eos] for text in texts]
    exact = -log_probabilities(model, params, tokenizer, prompts, [text[given:] for text in texts], batch=batch)
    tokens = np.asarray([len(text) for text in texts], np.float64)
    for name, nats in (("mdlm", np.asarray(bounds)), ("lm", exact)):
        mean = np.sum(nats) / tokens.sum()
        error = np.sqrt(np.sum((nats - mean * tokens) ** 2)) / tokens.sum()
        run.log(
            name=name, nats_per_token=mean, standard_error=error, perplexity=np.exp(mean),
            bits_per_token=mean / np.log(2), exact=name == "lm", tokens=int(tokens.sum()), texts=len(tokens),
        )  # fmt: skip
