"""Diffusion-guided language model (Lovelace et al. 2024): diffusion proposes what the continuation should mean, a
vector of a sentence encoder, pushed by linear classifiers; a prompter turns it into a soft prompt that makes the
language model say it.

Known differences from the authors' code: all rows are drawn at once, and by a solver of second order in few steps; the
classifiers' gradient does not run back through the denoiser unless `through` is set (docs/design.md says why); their
likelihood is averaged over the noise, not their loss; the language model is changed by LoRA unless `kind` is
"full" or "frozen", and only continuations are trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import rng
from ctg_jax.control import Control
from ctg_jax.controls.conditions import condition
from ctg_jax.controls.delta import Delta
from ctg_jax.controls.vectors import joined
from ctg_jax.data.completions import completions
from ctg_jax.learn import embeddings, fitting, latent_diffusion, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.learn.pool import logits
from ctg_jax.models import diffusion, samplers
from ctg_jax.models.denoiser import LatentNet, Trunk
from ctg_jax.models.diffusion import Schedule
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, Params, Sum

PROMPTER_NOISE = Schedule("cosine", 3.0)


@dataclasses.dataclass(frozen=True)
class Draw:
    """How latents are drawn; static.

    Attributes:
      sampler, steps, schedule: see `samplers.sample`.
      average: noisy copies of the estimate that the classifiers read; 0 is the estimate alone.
      through: whether guidance runs back through the denoiser, as the authors' does; see `samplers.guided`.
      signal: α² of the latent that the prompter reads; below 1 it forgives errors of the diffusion.
    """

    sampler: str = "dpm++"
    steps: int = 20
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    average: int = 0
    through: bool = False
    signal: float = 0.95


@struct.dataclass
class Said(Control):
    """A soft prompt after the prompt that makes the language model say a latent.

    Attributes:
      prompter: parameters of the network latent -> soft prompt.
      delta: a change of weights of the language model, or None.
      net: the network.

    Alone it says `prompts.cond["latent"]`, standardised, float [B, Z], noised to `prompts.cond["gamma"]` [B].
    """

    prompter: Params
    delta: Delta | None
    net: LatentNet = struct.field(pytree_node=False)

    def weights(self, params):
        return params if self.delta is None else self.delta.weights(params)

    def init(self, prompts, length):
        latent, gamma = condition(prompts, "latent"), condition(prompts, "gamma")
        return self.speak(latent, gamma, rng.named(prompts.keys, "said"))

    def added(self):
        return self.net.prompt

    def prompt(self, x, mask, state):
        return joined(x, mask, state, after=True)

    def speak(self, latent: jax.Array, gamma: jax.Array, keys: jax.Array) -> jax.Array:
        """Soft tokens float32 [B, P, D] of latents [B, Z] that are noised to γ [B] first."""
        z = diffusion.noised(latent, gamma, samplers.noise(keys, latent.shape[1:]))
        return self.net.apply(self.prompter, z, gamma)


@struct.dataclass
class Proposal(Control):
    """Draws a latent for each row by guided diffusion, and says it.

    Attributes:
      score: parameters of the denoiser, which predicts v.
      said: how a latent is said.
      mean, deviation: float32 [Z] of the latents.
      probes, biases: float32 [A, Z], [A]: logistic regressions on latents of length one, one for each attribute.
      weights_of: float32 [A]: the weight of each attribute; a negative one asks for its absence.
      scale: float32 [] or [B]: of the guidance; 0 is none, to the bit.
      free: float32 []: weight of the prefix in classifier-free guidance; 1 is none.
      net, draw: the denoiser and how it is sampled.
      reads: None, or the name of the entry of `prompts.cond` with the embedding of the prefix, float [B, Z].
      cond: None, or the name of an entry float [B, A] of `prompts.cond` that multiplies the weights.
    """

    score: Params
    said: Said
    mean: jax.Array
    deviation: jax.Array
    probes: jax.Array
    biases: jax.Array
    weights_of: jax.Array
    scale: jax.Array
    free: jax.Array
    net: LatentNet = struct.field(pytree_node=False)
    draw: Draw = struct.field(pytree_node=False, default=Draw())
    reads: str | None = struct.field(pytree_node=False, default=None)
    cond: str | None = struct.field(pytree_node=False, default=None)

    def weights(self, params):
        return self.said.weights(params)

    def init(self, prompts, length):
        z = self.latent(prompts)
        gamma = jnp.full(z.shape[:1], np.log(self.draw.signal / (1 - self.draw.signal)), jnp.float32)
        return self.said.speak(z, gamma, rng.named(prompts.keys, "said"))

    def added(self):
        return self.said.added()

    def prompt(self, x, mask, state):
        return self.said.prompt(x, mask, state)

    def latent(self, prompts) -> jax.Array:
        """A standardised latent float32 [B, Z] for each row, of length one where it is not standardised."""
        keys = rng.named(prompts.keys, "latent")
        estimate = self._clean(None)
        if self.reads is not None:
            context = condition(prompts, self.reads)
            if context.shape[1] != self.net.context:
                raise InputError(
                    f"prompts.cond[{self.reads!r}] has width {context.shape[1]}, but the denoiser reads embeddings of "
                    f"width {self.net.context}: use the encoder it was trained with."
                )
            estimate = samplers.classifier_free(self._clean(context), estimate, self.free)
        if self.probes.shape[0]:
            weights = jnp.broadcast_to(self.weights_of[None], (keys.shape[0], self.probes.shape[0]))
            if self.cond is not None:
                weights = weights * condition(prompts, self.cond)
            energy = samplers.averaged(
                lambda x, gamma: self.energy(x, weights), rng.named(keys, "average"), self.draw.average, _deviation
            )
            estimate = samplers.guided(estimate, energy, self.scale, through=self.draw.through)
        x = samplers.sample(
            estimate, keys, self.mean.shape, schedule=self.draw.schedule, steps=self.draw.steps,
            sampler=self.draw.sampler,
        )  # fmt: skip
        return (self._unit(x) - self.mean[None]) / self.deviation[None]

    def energy(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        """Weighted losses of the attributes asked for, float32 [B], at standardised latents [B, Z]; weights [B, A]."""
        z = self._unit(x) @ self.probes.T + self.biases[None]
        return jnp.sum(jnp.abs(weights) * jax.nn.softplus(-jnp.sign(weights) * z), axis=1)

    def _unit(self, x):
        raw = x * self.deviation[None] + self.mean[None]
        return raw / jnp.sqrt(jnp.sum(raw**2, axis=1, keepdims=True) + 1e-12)

    def _clean(self, context):
        def estimate(z, gamma):
            return diffusion.clean("v", self.net.apply(self.score, z, gamma, context), z, gamma)

        return estimate


def _deviation(gamma: jax.Array) -> jax.Array:
    """σ: how far the clean latent may be from its estimate, if latents are standard normal."""
    return diffusion.alpha_sigma(gamma)[1]


def init(
    lm: LM,
    key: jax.Array,
    *,
    latent: int,
    denoiser: Mapping[str, Any] | None = None,
    prompter: Mapping[str, Any] | None = None,
    attributes: int = 0,
    draw: Mapping[str, Any] | None = None,
    conditioned: bool = True,
    cond: str | None = None,
) -> Proposal:
    """A proposal whose networks are random and whose guides say nothing.

    Args:
      latent: Z. denoiser: settings of `latent_diffusion.network`; prompter: those of `said`. attributes: A.
      draw: settings of `Draw`, `schedule` being a kind.
      conditioned: whether the denoiser reads the prefix, under the name "context". cond: see `Proposal`.
    """
    net = latent_diffusion.network(latent, **(denoiser or {}))
    draw = dict(draw or {})
    if "schedule" in draw:
        draw["schedule"] = Schedule(draw["schedule"])
    return Proposal(
        score=net.init(rng.stream(key, "score")),
        said=said(lm, rng.stream(key, "said"), latent, **(prompter or {})),
        mean=jnp.zeros(latent),
        deviation=jnp.ones(latent),
        probes=jnp.zeros((attributes, latent)),
        biases=jnp.zeros(attributes),
        weights_of=jnp.ones(attributes),
        scale=jnp.ones(()),
        free=jnp.ones(()),
        net=net,
        draw=Draw(**draw),
        reads="context" if conditioned else None,
        cond=cond,
    )


def said(
    lm: LM, key: jax.Array, latent: int, *, width: int = 256, depth: int = 4, heads: int = 4, tokens: int = 16,
    spread: int = 4, length: int = 8, kind: str = "lora", rank: int = 8,
) -> Said:  # fmt: skip
    """How latents are said, untrained: `length` soft tokens; kind is "frozen", "lora" or "full", what happens to the
    language model."""
    trunk = Trunk(width=width, depth=depth, heads=heads, positions=tokens + length)
    net = LatentNet(trunk, latent=latent, out=lm.width, prompt=length, tokens=tokens, spread=spread)
    delta = None if kind == "frozen" else fitting.delta(lm, rng.stream(key, "delta"), kind=kind, rank=rank)
    return Said(net.init(rng.stream(key, "prompter")), delta, net)


def example(lm: LM, key: jax.Array) -> Proposal:
    """A loud prompter and a guide, three steps, for the laws."""
    small = dict(width=8, depth=1, heads=2, tokens=2, spread=2)
    control = init(
        lm, key, latent=4, denoiser=small, prompter=small | dict(length=2, kind="frozen"), attributes=1,
        draw=dict(steps=3), conditioned=False,
    )  # fmt: skip
    out = control.said.prompter["out"]
    loud = {**control.said.prompter, "out": {**out, "kernel": out["kernel"] * 50}}
    probes = jax.random.normal(rng.stream(key, "probe"), (1, 4))
    return control.replace(said=control.said.replace(prompter=loud), probes=probes)


def neutral(control: Proposal) -> None:
    """Unguided latents are said too: there is no neutral element."""
    return None


def fit(
    root,
    *,
    lm: Artifact,
    data: Artifact,
    encode: Mapping[str, Any] | None = None,
    prompter: Mapping[str, Any] | None = None,
    denoiser: Mapping[str, Any] | None = None,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
    weights: Mapping[str, float] | None = None,
    **hp: Any,
) -> Artifact:
    """encode → prompter, denoiser, probes → one control.

    Args:
      data: texts, with the labels that attributes read.
      encode: settings of `embeddings.encode`; prompter: of `speak`; denoiser: of `latent_diffusion.denoise`.
      attributes: name -> settings of `embeddings.probe`.
      weights: name -> weight of an attribute; by default 1, the sign says which side. hp: of `propose`.
    """
    attributes = dict(attributes or {"positive": {}})
    unknown = sorted(set(weights or {}) - set(attributes))
    if unknown:
        raise InputError(
            f"weights names the attribute {unknown[0]!r}, which is not among the attributes {sorted(attributes)}: add "
            "it there or leave it out"
        )
    latents = stage(root, embeddings.encode, encode or {}, lm=lm, data=data)
    parts = dict(
        prompter=stage(root, speak, prompter or {}, lm=lm, latents=latents),
        denoiser=stage(root, latent_diffusion.denoise, denoiser or {}, latents=latents),
        probes=[
            stage(root, embeddings.probe, {"name": name, **settings}, latents=latents)
            for name, settings in sorted(attributes.items())
        ],
    )
    wanted = [float((weights or {}).get(name, 1.0 if weights is None else 0.0)) for name in sorted(attributes)]
    return stage(root, propose, {"weights": wanted, **hp}, lm=lm, latents=latents, **parts)


@stage_function("dglm.prompter")
def speak(
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
    """Stage: trains how latents are said: the next-token loss of each continuation after its prefix and the soft prompt
    of its own latent, noised as `PROMPTER_NOISE` says at a time drawn evenly.

    Args:
      net: settings of `said`. new, prefix: tokens of a continuation and of a prefix at most; longer ones are cut, or
        left out. training: how it is trained. seed: of initial values, batches and noise.
    """
    model, params, tokenizer = open_lm(lm)
    x = embeddings.arrays(latents)[0]
    control = said(model, rng.stream(jax.random.key(seed), "init"), x.shape[1], **(net or {}))
    options = dict(batch=training.batch, prompt=prefix, new=new, seed=seed, fields=("latent",))
    batches = completions(embeddings.pieces(latents, tokenizer, prefix), tokenizer, **options)
    mean, deviation = latent_diffusion.moments(x)
    frozen = {"params": params, "mean": mean, "deviation": deviation}
    control = fitting.train(
        run, control, said_loss(model), frozen, batches, training, trained=r"prompter/.*|delta/changes/.*", seed=seed
    )
    checkpoint.save(run.path / "state", control)
    run.discard("steps")
    run.record(net=dict(net or {}), latent=int(x.shape[1]))


def said_loss(lm: LM) -> losses.LossFn:
    """Cross-entropy of the continuation after its noised latent, per token; params is a `Said`."""

    def total(params, frozen, batch, keys):
        t = jax.vmap(lambda key: jax.random.uniform(rng.stream(key, "time")))(keys)
        latent = (batch["latent"] - frozen["mean"][None]) / frozen["deviation"][None]
        cond = {"latent": latent, "gamma": PROMPTER_NOISE.log_snr(t)}
        z = logits(lm, frozen["params"], batch, keys, params, cond)
        ce, weight = losses.masked_sum(losses.next_token(z, batch["completion"]), batch["written"])
        return Sum(ce, weight, {"cross_entropy": (ce, weight)})

    return total


@stage_function("dglm")
def propose(
    run: Run,
    *,
    lm: Artifact,
    latents: Artifact,
    prompter: Artifact,
    denoiser: Artifact,
    probes: Sequence[Artifact],
    weights: Sequence[float],
    draw: Mapping[str, Any] | None = None,
    free: float = 1.0,
) -> None:
    """Stage: the parts as one control.

    Args:
      weights: of the probes, in their order. draw: settings of `Draw`. free: weight of classifier-free guidance.

    Raises:
      InputError: parts that were made with different encoders.
    """
    version = latents.spec["version"]
    found = [embeddings.coefficients(p, version) for p in probes]
    hp = dict(
        latent=prompter.spec["latent"], denoiser=denoiser.spec["net"], prompter=prompter.spec["net"],
        attributes=len(probes), draw=dict(draw or {}),
    )  # fmt: skip
    model = open_lm(lm)[0]
    like = jax.eval_shape(lambda key: init(model, key, **hp), jax.random.key(0))
    mean, deviation = latent_diffusion.moments(embeddings.arrays(latents)[0])
    width = mean.shape[0]
    control = like.replace(
        score=denoiser.load(like.score),
        said=prompter.load(like.said),
        mean=mean,
        deviation=deviation,
        probes=jnp.asarray(np.stack([w for w, _ in found]) if found else np.zeros((0, width)), jnp.float32),
        biases=jnp.asarray([b for _, b in found], jnp.float32),
        weights_of=jnp.asarray(weights, jnp.float32),
        scale=jnp.ones(()),
        free=jnp.float32(free),
    )
    checkpoint.save(run.path / "state", control)
    run.record(method="dglm", init=hp, encoder=latents.spec["encoder"], version=version)


def conditions(control: Artifact, lm: Artifact, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """What the rows of `texts` bring in `prompts.cond`: the embedding of each prompt."""
    embed = embeddings.embedder(lm, embeddings.encoder_of(control))
    if embed.version != control.spec["version"]:
        raise InputError(
            f"{control.path.name} was made with the encoder {control.spec['version']}, but {control.spec['encoder']} "
            f"now holds {embed.version}: restore it, or fit the control again"
        )
    return {"context": embed(list(texts))}
