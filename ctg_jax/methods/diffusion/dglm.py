"""Diffusion-guided language model (DGLM, Lovelace et al. 2024).

A diffusion model, guided by linear classifiers, draws what the continuation should mean: the embedding of it by a
sentence encoder. A prompter turns this latent into a soft prompt that makes the language model write the text.

Known differences from the authors' code: all rows are drawn at once, by a second-order solver in few steps; the
gradient of the classifiers does not run back through the denoiser unless `through` is set (see docs/design.md); the
likelihood of the classifiers is averaged over the noise, not their loss unless `mean` is "loss", and over noise of
deviation σ unless `noise` is "ratio"; the language model is changed by LoRA unless `kind` is "full" or "frozen"; and
only continuations are trained on. Networks of the authors' shape are those of `PAPER` in configs/dglm.py.
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
from ctg_jax.learn import embeddings, latent_diffusion, latent_prompt
from ctg_jax.learn.attributes import coefficients, fit_attribute
from ctg_jax.learn.latent_prompt import LatentPrompt
from ctg_jax.models import diffusion, samplers
from ctg_jax.models.diffusion import Schedule
from ctg_jax.models.latent_net import LatentNet
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.stages import sampling
from ctg_jax.types import InputError, Params


@dataclasses.dataclass(frozen=True)
class Draw:
    """How latents are drawn (static).

    Attributes:
      sampler, steps, schedule: see `samplers.sample`.
      average: number of noisy copies of the estimate over which the classifiers are averaged; 0: the estimate itself.
      noise: their deviation: σ, that of the clean latent around its estimate if latents are standard normal
        ("posterior"), or σ / α ("ratio"), as the authors have it.
      mean: see `samplers.averaged`.
      through: whether the gradient of the classifiers runs back through the denoiser, as it does in the authors' code;
        see `samplers.guided`.
      signal: α² of the latent that the prompter reads; below 1, the prompter forgives errors of the diffusion.
    """

    sampler: str = "dpm++"
    steps: int = 20
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    average: int = 0
    noise: str = "posterior"
    mean: str = "likelihood"
    through: bool = False
    signal: float = 0.95

    def __post_init__(self):
        if self.noise not in ("posterior", "ratio"):
            raise InputError(f"noise is {self.noise!r}, expected posterior or ratio.")

    def deviation(self, gamma: jax.Array) -> jax.Array:
        """Of the noise around the estimate, float32 of the shape of γ."""
        alpha, sigma = diffusion.alpha_sigma(gamma)
        return sigma if self.noise == "posterior" else sigma / alpha


@struct.dataclass
class Proposal(Control):
    """Draws a latent for each row by guided diffusion, and makes the language model write what it means.

    Attributes:
      score: parameters of the denoiser, which predicts v.
      soft_prompt: turns a latent into soft tokens.
      mean, deviation: float32 [Z], of the latents.
      probes, biases: float32 [A, Z] and [A]: for each attribute a logistic regression on latents of unit length.
      weights_of: float32 [A], the weight of each attribute; a negative weight asks for its absence.
      scale: float32 [] or [B], the strength of the guidance; at 0 the result is exactly that without guidance.
      free: float32 [], the weight of the prefix in classifier-free guidance; 1 is the plain conditional model.
      net, draw: the denoiser and how it is sampled.
      reads: the name of the entry of `prompts.cond` that holds the embedding of the prefix, float [B, Z], or None.
      cond: the name of an entry float [B, A] of `prompts.cond` that multiplies the weights, or None.
    """

    score: Params
    soft_prompt: LatentPrompt
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

    cond_multiplies = False

    def weights(self, params):
        return self.soft_prompt.weights(params)

    def init(self, prompts, length):
        z = self.latent(prompts)
        gamma = jnp.full(z.shape[:1], np.log(self.draw.signal / (1 - self.draw.signal)), jnp.float32)
        return self.soft_prompt.soft_tokens(z, gamma, rng.named(prompts.keys, "said"))

    def added(self):
        return self.soft_prompt.added()

    def prompt(self, x, mask, state):
        return self.soft_prompt.prompt(x, mask, state)

    def latent(self, prompts) -> jax.Array:
        """A latent for each row, float32 [B, Z], standardised; before that it has unit length.

        Raises:
          InputError: the embeddings of the prefixes have another width than those of training, or are missing.
        """
        keys = rng.named(prompts.keys, "latent")
        estimate = self._clean(None)
        if self.reads is not None:
            context = condition(prompts, self.reads)
            if context.shape[1] != self.net.context:
                raise InputError(
                    f"prompts.cond[{self.reads!r}] has width {context.shape[1]}, but the denoiser reads embeddings of "
                    f"width {self.net.context}: use the encoder it was trained with."
                )
            context = (context - self.mean[None]) / self.deviation[None]  # as in `latent_diffusion.denoiser_loss`
            estimate = samplers.classifier_free(self._clean(context), estimate, self.free)
        if self.probes.shape[0]:
            weights = jnp.broadcast_to(self.weights_of[None], (keys.shape[0], self.probes.shape[0]))
            if self.cond is not None:
                weights = weights * condition(prompts, self.cond)
            energy = samplers.averaged(
                lambda x, gamma: self.energy(x, weights), rng.named(keys, "average"), self.draw.average,
                self.draw.deviation, self.draw.mean,
            )  # fmt: skip
            estimate = samplers.guided(estimate, energy, self.scale, through=self.draw.through)
        x = samplers.sample(
            estimate, keys, self.mean.shape, schedule=self.draw.schedule, steps=self.draw.steps,
            sampler=self.draw.sampler,
        )  # fmt: skip
        return (self._unit(x) - self.mean[None]) / self.deviation[None]

    def energy(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        """Weighted loss of the requested attributes, float32 [B], at standardised latents x [B, Z]; weights [B, A]."""
        z = self._unit(x) @ self.probes.T + self.biases[None]
        return jnp.sum(jnp.abs(weights) * jax.nn.softplus(-jnp.sign(weights) * z), axis=1)

    def _unit(self, x):
        raw = x * self.deviation[None] + self.mean[None]
        return raw / jnp.sqrt(jnp.sum(raw**2, axis=1, keepdims=True) + 1e-12)

    def _clean(self, context):
        def estimate(z, gamma):
            return diffusion.clean("v", self.net.apply(self.score, z, gamma, context), z, gamma)

        return estimate


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
    """A proposal with random networks and with probes that are zero.

    Args:
      latent: Z. attributes: A.
      denoiser: settings of `latent_diffusion.network`. prompter: settings of `latent_prompt.init`.
      draw: settings of `Draw`, with the name of a schedule for `schedule`.
      conditioned: whether the denoiser reads the embedding of the prefix, from `prompts.cond["context"]`.
      cond: see `Proposal`.
    """
    net = latent_diffusion.network(latent, **(denoiser or {}))
    draw = dict(draw or {})
    if "schedule" in draw:
        draw["schedule"] = Schedule(draw["schedule"])
    return Proposal(
        score=net.init(rng.stream(key, "score")),
        soft_prompt=latent_prompt.init(lm, rng.stream(key, "said"), latent, **(prompter or {})),
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


def example(lm: LM, key: jax.Array) -> Proposal:
    """A strong prompter and one probe, sampled in three steps, for the laws."""
    small = dict(width=8, depth=1, heads=2, pseudo_tokens=2, spread=2)
    control = init(
        lm, key, latent=4, denoiser=small, prompter=small | dict(length=2, kind="frozen"), attributes=1,
        draw=dict(steps=3), conditioned=False,
    )  # fmt: skip
    out = control.soft_prompt.prompter["out"]
    strong = {**control.soft_prompt.prompter, "out": {**out, "kernel": out["kernel"] * 50}}
    probes = jax.random.normal(rng.stream(key, "probe"), (1, 4))
    return control.replace(soft_prompt=control.soft_prompt.replace(prompter=strong), probes=probes)


def neutral(control: Proposal) -> None:
    """There is no neutral element: a latent that is drawn without guidance changes the text too."""
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
    own: Mapping[str, Any] | None = None,
    **hp: Any,
) -> Artifact:
    """Encodes texts, trains the prompter, the denoiser and the probes, and joins them in one control.

    Args:
      data: texts, with the labels that the attributes read.
      encode: settings of `embeddings.encode`. prompter: settings of `latent_prompt.train_prompter`.
      denoiser: settings of `latent_diffusion.denoise`.
      attributes: name -> settings of `attributes.fit_attribute`; None: "positive", from the field `label`.
      weights: name -> weight of an attribute, whose sign asks for its presence or absence; None: 1 for each.
      own: settings of `stages.sampling.sample`, for continuations by the language model itself: the prompter and the
        denoiser learn from what it writes behind the prefixes of the texts, so that drawn latents ask for what it
        finds likely, and only the probes learn from the texts themselves. None: all learn from the texts.
      hp: settings of `propose`.

    Raises:
      InputError: a weight of an unknown attribute, and what the stages raise.
    """
    attributes = dict(attributes or {"positive": {}})
    unknown = sorted(set(weights or {}) - set(attributes))
    if unknown:
        raise InputError(
            f"weights names the attribute {unknown[0]!r}, which is not among the attributes {sorted(attributes)}: add "
            "it there or leave it out"
        )
    encode = dict(encode or {})
    latents = stage(root, embeddings.encode, encode, lm=lm, data=data)
    # The probes come first: they are quick, and say what is wrong with the labels before any network is trained.
    probes = [
        stage(root, fit_attribute, {"name": name, **settings}, latents=latents)
        for name, settings in sorted(attributes.items())
    ]
    if own is not None:
        prompts = stage(root, embeddings.prefixes, {}, latents=latents)
        written = stage(root, sampling.sample, {"n": 1, **own}, lm=lm, prompts=prompts)
        read = {name: value for name, value in encode.items() if name not in ("words", "seed")}  # those of the cut
        latents = stage(root, embeddings.encode, read, lm=lm, data=written)
    parts = dict(
        prompter=stage(root, latent_prompt.train_prompter, prompter or {}, lm=lm, latents=latents),
        denoiser=stage(root, latent_diffusion.denoise, denoiser or {}, latents=latents),
        probes=probes,
    )
    wanted = [float((weights or {}).get(name, 1.0 if weights is None else 0.0)) for name in sorted(attributes)]
    return stage(root, propose, {"weights": wanted, **hp}, lm=lm, latents=latents, **parts)


@stage_function("dglm", revision=1)
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
    """Stage: joins the trained parts in one control.

    Args:
      weights: of the probes, in their order. draw: settings of `Draw`. free: see `Proposal`.

    Raises:
      InputError: the parts were made with different encoders.
    """
    version = latents.spec["version"]
    found = [coefficients(p, version) for p in probes]
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
        soft_prompt=prompter.load(like.soft_prompt),
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
    """The entries of `prompts.cond` for prompts with these texts: the embedding of each, float32 [n, Z].

    Raises:
      InputError: the encoder that the control was made with has changed since.
    """
    embed = embeddings.embedder(lm, embeddings.encoder_of(control))
    if embed.version != control.spec["version"]:
        raise InputError(
            f"{control.path.name} was made with the encoder {control.spec['version']}, but {control.spec['encoder']} "
            f"now holds {embed.version}: restore that encoder, or fit the control again"
        )
    return {"context": embed(list(texts))}
