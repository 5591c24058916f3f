"""Soft prompts from latents: a network, and a change of the language model, that are trained to make the model write
the text that a latent is the embedding of (the prompt generator of Lovelace et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import struct

from ctg_jax import rng
from ctg_jax.control import Control
from ctg_jax.controls.conditions import condition
from ctg_jax.controls.delta import Delta
from ctg_jax.controls.vectors import joined
from ctg_jax.data.completions import completions
from ctg_jax.learn import embeddings, fitting, latent_diffusion, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.learn.pool import read
from ctg_jax.models import diffusion, samplers
from ctg_jax.models.denoiser import Trunk
from ctg_jax.models.diffusion import Schedule
from ctg_jax.models.latent_net import LatentNet
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage_function
from ctg_jax.types import Params, Sum

# The noise of training, which makes the prompter forgive errors of the latents it is given later.
NOISE = Schedule("cosine", 3.0)


@struct.dataclass
class LatentPrompt(Control):
    """A soft prompt, behind the prompt, that makes the language model write what a latent means.

    As a control it reads the latents from `prompts.cond["latent"]`, standardised, float [B, Z], and the log-SNR to
    which they are noised first from `prompts.cond["gamma"]`, float [B].

    Attributes:
      prompter: the parameters of `net`.
      delta: a change of the weights of the language model, or None.
      net: the network that maps a latent to a soft prompt.
    """

    prompter: Params
    delta: Delta | None
    net: LatentNet = struct.field(pytree_node=False)

    def weights(self, params):
        return params if self.delta is None else self.delta.weights(params)

    def init(self, prompts, length):
        latent, gamma = condition(prompts, "latent"), condition(prompts, "gamma")
        return self.soft_tokens(latent, gamma, rng.named(prompts.keys, "said"))

    def added(self):
        return self.net.prompt

    def prompt(self, x, mask, state):
        return joined(x, mask, state, after=True)

    def soft_tokens(self, latent: jax.Array, gamma: jax.Array, keys: jax.Array) -> jax.Array:
        """Soft tokens float32 [B, P, D] for latents [B, Z], which are first noised to log-SNR γ [B] with `keys` [B]."""
        z = diffusion.noised(latent, gamma, samplers.noise(keys, latent.shape[1:]))
        return self.net.apply(self.prompter, z, gamma)


def init(
    lm: LM, key: jax.Array, latent: int, *, width: int = 256, depth: int = 4, heads: int = 4, pseudo_tokens: int = 16,
    spread: int = 4, length: int = 8, slots: bool = True, kind: str = "lora", rank: int = 8, **trunk: Any,
) -> LatentPrompt:  # fmt: skip
    """An untrained `LatentPrompt`.

    Args:
      lm: the language model. latent: Z.
      width, depth, heads: of the transformer of the network. trunk: further settings of `Trunk`.
      pseudo_tokens, spread, slots: see `LatentNet`. length: P, the number of soft tokens.
      kind: what is trained of the language model: nothing ("frozen"), a change of low rank ("lora", with `rank`) or a
        change of all weights ("full").
    """
    shape = Trunk(width=width, depth=depth, heads=heads, positions=pseudo_tokens + length * slots, **trunk)
    sizes = dict(pseudo_tokens=pseudo_tokens, spread=spread, slots=slots)
    net = LatentNet(shape, latent=latent, out=lm.width, prompt=length, **sizes)
    delta = None if kind == "frozen" else fitting.delta(lm, rng.stream(key, "delta"), kind=kind, rank=rank)
    return LatentPrompt(net.init(rng.stream(key, "prompter")), delta, net)


@stage_function("embeddings.prompter", revision=1)
def train_prompter(
    run: Run,
    *,
    lm: Artifact,
    latents: Artifact,
    net: Mapping[str, Any] | None = None,
    new: int = 32,
    prefix: int = 48,
    training: Training = Training(steps=2000, rate=1e-3, warmup=100, schedule="cosine", save_every=200),
    seed: int = 0,
) -> None:
    """Stage: trains a `LatentPrompt` on the next-token loss of each continuation, after its prefix and the soft prompt
    of its own latent, which is noised by `NOISE` at a uniform time.

    Args:
      latents: an artifact of `embeddings.encode`.
      net: settings of `init`.
      new: tokens of a continuation at most; longer ones are cut.
      prefix: tokens of a prefix at most; texts with longer ones are left out.
      training: how it is trained. seed: of initial values, batches and noise.

    Raises:
      InputError: no prefix is short enough, and what training raises.
    """
    model, params, tokenizer = open_lm(lm)
    x = embeddings.arrays(latents)[0]
    control = init(model, rng.stream(jax.random.key(seed), "init"), x.shape[1], **(net or {}))
    options = dict(batch=training.batch, prompt=prefix, new=new, seed=seed, fields=("latent",))
    batches = completions(embeddings.pieces(latents, tokenizer, prefix), tokenizer, **options)
    mean, deviation = latent_diffusion.moments(x)
    frozen = {"params": params, "mean": mean, "deviation": deviation}
    control = fitting.train(
        run, control, loss(model), frozen, batches, training, trained=r"prompter/.*|delta/changes/.*", seed=seed
    )
    checkpoint.save(run.path / "state", control)
    run.discard("steps")
    run.record(net=dict(net or {}), latent=int(x.shape[1]))


def loss(lm: LM) -> losses.LossFn:
    """Cross-entropy per token of the continuation, given the noised latent; params is a `LatentPrompt`.

    frozen has "params", those of the language model, and the latents' "mean" and "deviation", float32 [Z].
    """

    def total(params, frozen, batch, keys):
        t = jax.vmap(lambda key: jax.random.uniform(rng.stream(key, "time")))(keys)
        latent = (batch["latent"] - frozen["mean"][None]) / frozen["deviation"][None]
        cond = {"latent": latent, "gamma": NOISE.log_snr(t)}
        text = read(lm, frozen["params"], batch, keys, params, cond)
        nll = reduced(text, losses.next_token, batch["completion"])
        ce, weight = losses.masked_sum(nll, batch["written"])
        return Sum(ce, weight, {"cross_entropy": (ce, weight)})

    return total
