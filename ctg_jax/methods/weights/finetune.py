"""Fine-tuning as a control: LoRA (Hu et al. 2021), all weights, or a soft prompt (Lester et al. 2021), on texts with an
attribute. The frozen model stays the reference, and the strength `scale` interpolates between the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ctg_jax import rng
from ctg_jax.control import Control
from ctg_jax.controls import bricks
from ctg_jax.controls.bricks import Delta, SoftPrompt
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import Batches, pipeline
from ctg_jax.data.sources import Source
from ctg_jax.learn import losses, train
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, PyTree

RATES = {"lora": 2e-3, "full": 1e-4, "prompt": 1e-1}  # learning rates that suit small models


def init(
    lm: LM,
    key: jax.Array,
    *,
    kind: str = "lora",
    rank: int = 8,
    targets: str | None = None,
    length: int = 16,
    choices: int | None = None,
) -> Delta | SoftPrompt:
    """A control that has learned nothing: a zero change of weights, or random vectors.

    Args:
      lm: the frozen model.
      key: for the random parts.
      kind: "lora", "full" or "prompt".
      rank: of LoRA.
      targets: a regular expression for whole paths of the parameters to change; None: the kernels of every block
        (LoRA) or everything (full).
      length: of the soft prompt.
      choices: number of soft prompts, of which `prompts.cond["label"]` names one for each row; None: one for all.
    """
    if kind == "prompt":
        vectors = bricks.soft_prompt(key, length, lm.width, choices)
        return SoftPrompt(vectors, None if choices is None else "label")
    params = jax.eval_shape(lm.init, key)
    if kind == "lora":
        return bricks.lora(key, params, rank, targets or bricks.KERNELS)
    if kind == "full":
        return bricks.full(params, targets or bricks.EVERYTHING)
    raise InputError(f"kind is {kind!r}, expected 'lora', 'full' or 'prompt'.")


def delta(lm: LM, key: jax.Array, *, kind: str = "lora", rank: int = 8, targets: str | None = None) -> Delta:
    """`init` of the methods that change weights and nothing else: kind is "lora" or "full"."""
    if kind not in ("lora", "full"):
        raise InputError(f"kind is {kind!r}, expected 'lora' or 'full'.")
    return init(lm, key, kind=kind, rank=rank, targets=targets)


def example(lm: LM, key: jax.Array) -> Delta:
    """A LoRA whose change is not zero, for the laws."""
    control = init(lm, key, rank=2)
    changes = {p: {"a": c["a"], "b": 0.5 * jax.random.normal(key, c["b"].shape)} for p, c in control.changes.items()}
    return control.replace(changes=changes)


def neutral(control: Delta | SoftPrompt) -> Delta | None:
    """Strength 0; a soft prompt has no neutral element."""
    return control.replace(scale=jnp.zeros_like(control.scale)) if isinstance(control, Delta) else None


def loss(lm: LM, *, kl: float = 0.0) -> losses.LossFn:
    """Next-token loss of the controlled model, plus `kl` · KL(controlled ‖ base) per token."""
    plain = losses.control_loss(lm, kl_weight=kl)

    def conditioned(params, frozen, batch, keys):
        cond = {"label": batch["label"]} if "label" in batch else None
        return plain(params, frozen, batch | {"cond": cond}, keys)

    return conditioned


def fit(root, *, lm: Artifact, data: Artifact, **hp: Any) -> Artifact:
    """Trains a control on the records of `data`; hyper-parameters are those of `finetune`."""
    return stage(root, finetune, hp, lm=lm, data=data)


@stage_function("finetune", how=("save_every",))
def finetune(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    where: Mapping[str, Any] | None = None,
    kind: str = "lora",
    rank: int = 8,
    targets: str | None = None,
    length: int = 16,
    choices: int | None = None,
    steps: int = 300,
    batch: int = 16,
    tokens: int = 64,
    rate: float | None = None,
    warmup: int = 20,
    schedule: str = "linear",
    decay: float = 0.0,
    kl: float = 0.0,
    seed: int = 0,
    save_every: int = 100,
) -> None:
    """Stage: next-token training of a control on records that match `where`.

    Args:
      lm, data: an LM artifact and a data artifact.
      where: keep records whose fields have these values, such as {"label": 1}.
      kind, rank, targets, length, choices: see `init`. With `choices`, records need a `label` from 0 to choices - 1;
        those without one are left out and counted in a warning.
      steps, batch, tokens: updates, texts in a batch, tokens of a text (longer ones are cut).
      rate: learning rate; None: one that suits the kind (`RATES`).
      warmup, schedule, decay: see `ctg_jax.learn.train.schedule` and `optimizer`.
      kl: weight of KL(controlled ‖ base) per token.
      seed: of initial values and of the order of texts.
      save_every: steps between checkpoints.

    Raises:
      InputError: no record matches, steps below 1, or what `init` raises.
    """
    records = matching(data, where)
    model, params, tokenizer = open_lm(lm)
    key = jax.random.key(seed)
    hp = dict(kind=kind, rank=rank, targets=targets, length=length, choices=choices)
    control = init(model, rng.stream(key, "init"), **hp)
    if kind == "prompt":  # embeddings of random tokens: Lester et al. 2021, section 2.2
        ids = jax.random.randint(rng.stream(key, "tokens"), control.vectors.shape[:-1], 0, model.vocab)
        drawn = model.embed(params, ids.reshape(1, -1))
        control = control.replace(vectors=drawn.astype(jnp.float32).reshape(control.vectors.shape))
    fields = () if choices is None else ("label",)
    if choices is not None:
        records = labelled(records, str(data.path), classes=choices)
    source = Source(str(data.path), str(where), records)
    batches = pipeline(source, tokenizer, batch=batch, length=tokens, seed=seed, fields=fields)
    control = learn(
        run, control, loss(model, kl=kl), {"params": params}, batches, trained=r"changes/.*|vectors", steps=steps,
        rate=rate or RATES[kind], warmup=warmup, schedule=schedule, decay=decay, seed=seed, save_every=save_every,
    )  # fmt: skip
    keep(run, control, "finetune", hp)


def matching(data: Artifact, where: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The records of a data artifact whose fields have the values of `where`; InputError where there is none."""
    records = [r for r in data.rows("data.jsonl") if all(r.get(k) == v for k, v in (where or {}).items())]
    if not records:
        raise InputError(f"where is {dict(where or {})}, which matches no record of {data.path}.")
    return records


def learn(
    run: Run,
    control: PyTree,
    loss: losses.LossFn,
    frozen: Mapping[str, Any],
    batches: Batches,
    *,
    trained: str,
    steps: int,
    rate: float,
    warmup: int = 20,
    schedule: str = "linear",
    decay: float = 0.0,
    seed: int = 0,
    save_every: int = 100,
) -> PyTree:
    """What `loss` made of a control: the inside of a stage, which goes on where it was cut short.

    Args:
      run: of the stage; checkpoints lie in its folder `steps` until `keep` removes them.
      control, loss, frozen, batches: what learns, and what it is given; see `ctg_jax.learn.train`.
      trained: regular expression for the paths of the leaves that learn.
      steps, rate, warmup, schedule, decay: of the optimizer. seed: of randomness in the loss.

    Raises:
      InputError: steps below 1, and what the training loop raises.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}, expected at least 1.")
    pace = train.schedule(rate, schedule, warmup=min(warmup, steps - 1), steps=steps)
    tx = train.optimizer(pace, decay=decay, trained=trained)
    state = train.init_state(control, tx, rng.stream(jax.random.key(seed), "train"))
    step = train.make_step(loss, tx)
    state = train.loop(
        run.path, state, step, batches, steps=steps, save_every=save_every, frozen=frozen, progress=False
    )
    return state.params


def keep(run: Run, control: Control, method: str, init: Mapping[str, Any]) -> None:
    """Ends a stage that trained: saves the control for `methods.load`, which calls the method's `init(lm, key, **init)`
    for its shapes, and marks the optimizer states, if there are any, as no longer needed."""
    run.record(method=method, init=dict(init))
    checkpoint.save(run.path / "state", control)
    run.discard("steps")
