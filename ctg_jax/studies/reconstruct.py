"""How much of a text its latent keeps.

DGLM's prompter writes continuations from the true latent, from one that the diffusion draws, or from that of another
text, and the language model writes some without a latent; all of them are compared with what people wrote. What the
true latent costs in perplexity is the least that a better diffusion could cost."""

from __future__ import annotations

import math

import numpy as np

from ctg_jax import evaluation, methods
from ctg_jax.control import IDENTITY, Chain
from ctg_jax.controls import truncate
from ctg_jax.learn import embeddings
from ctg_jax.run.stage import Artifact, Run, stage_function, write_jsonl
from ctg_jax.stages import sampling
from ctg_jax.types import InputError

LATENTS = ("own", "drawn", "other", "none")


@stage_function("dglm.reconstruct", revision=2, how=("batch",))
def reconstruct(
    run: Run,
    *,
    lm: Artifact,
    control: Artifact,
    latents: Artifact,
    latent: str = "own",
    top_p: float = 0.9,
    max_new: int = 24,
    batch: int = 64,
    seed: int = 0,
    resamples: int = 1000,
) -> None:
    """Stage: writes one continuation of each prefix to samples.jsonl, and measures how close it is to the true one by
    the cosine of their embeddings and by corpus BLEU-4, and its pooled perplexity under the language model alone, of
    the text without its end, as the evaluation counts it.

    Args:
      control: an artifact of `dglm.fit`. latents: held-out texts, encoded by `embeddings.encode` with the same encoder.
      latent: "own": the latent of the true continuation; "drawn": one that the diffusion draws for the prefix, without
        classifiers; "other": that of the next text; "none": no soft prompt.
      top_p: of nucleus sampling. max_new: new tokens at most.

    Raises:
      InputError: `latent` has another value, or the latents were made by another encoder.
    """
    if latent not in LATENTS:
        raise InputError(f"latent is {latent!r}, expected one of {', '.join(LATENTS)}")
    if latents.spec["version"] != control.spec["version"]:
        raise InputError(
            f"{latents.path.name} holds latents of {latents.spec['version']}, but {control.path.name} reads those of "
            f"{control.spec['version']}: encode the texts with that encoder"
        )
    opened = sampling.opened(lm)
    proposal = methods.load(control, opened[0])
    pieces, (x, contexts) = latents.rows("pieces.jsonl"), embeddings.arrays(latents)
    mean, deviation = np.asarray(proposal.mean), np.asarray(proposal.deviation)
    given = np.roll(x, -1, axis=0) if latent == "other" else x
    signal = proposal.draw.signal
    cond = {
        "latent": (given - mean) / deviation,
        "gamma": np.full(len(x), math.log(signal / (1 - signal)), np.float32),
    }
    if proposal.reads is not None:
        cond[proposal.reads] = contexts
    ways = {"none": IDENTITY, "drawn": methods.with_strength(proposal, 0.0)}
    writer = Chain((ways.get(latent, proposal.soft_prompt), truncate.rules(opened[0], top_p=top_p)))
    prompts, drawing = [p["prompt"] for p in pieces], sampling.Options(max_new=max_new, batch=batch, seed=seed)
    rows = [row for part in sampling.complete(*opened, prompts, writer, drawing, cond=cond) for row in part]
    write_jsonl(run.path / "samples.jsonl", rows)
    texts, wanted = [row["text"].strip() for row in rows], [p["continuation"] for p in pieces]
    found = embeddings.embedder(lm, embeddings.encoder_of(control))(texts)
    boot = evaluation.Bootstrap(range(len(rows)), seed=seed, resamples=resamples)
    run.log(name="cosine", **boot.mean(evaluation.cosine(found, x)).as_json())
    run.log(name="BLEU-4", **evaluation.bleu(texts, wanted, resamples, seed).as_json())
    likely = evaluation.LMScorer(*opened, batch=batch)(prompts, [row["text"] for row in rows])
    run.log(name="perplexity_pooled", **evaluation.Perplexity("pooled").figure(boot, *likely).as_json())
