"""Self-Control (Cai et al. 2024, "Self-Control of LLM Behaviors by Compressing Suffix Gradient into Prefix
Controller").

The model judges its own text: behind what it wrote comes a question, and S = σ((z_yes − z_no) / τ) at the answer is the
score. *Suffix gradient* (kind="suffix"): the states of the prompt's tokens after every block move up the gradient of S,
each token's cut to length 1, by the first of η, 2η, 4η, … whose text, written greedily and judged by the model as it
is, has a score that is higher by 0.01; this is repeated until no step helps. The search is part of `Control.init`, so
it runs for any prompt, row by row, inside the compiled program. *Prefix controller* (kind="prefix"): keys and values of
every layer learn to give the prompt's tokens the states that the shifts gave them, so that decoding costs no search.

As in the authors' code: τ = 10, three tries at factor 2, gradients at the edited states, squared error over blocks and
tokens; η = 0.5 is that of their README. Differences: the gradient is that of S, which their code has as `binary` (its
default is the cross-entropy of the answer); states are those after blocks, theirs of the last one are normed; the
prefix is plain keys and values, not a gated adapter with 128 vectors; the prompts whose score rose are kept, not those
whose gradient is short.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import methods, rng
from ctg_jax.control import Control
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.parts import Parts, parts
from ctg_jax.controls.selection import AtPositions, Positions
from ctg_jax.controls.streams import Stream
from ctg_jax.controls.vectors import Shift, shifted
from ctg_jax.data.messages import prompt_of
from ctg_jax.data.tokenizer import to_prompts
from ctg_jax.decode import loop
from ctg_jax.decode.rows import is_end
from ctg_jax.learn import fitting, losses
from ctg_jax.learn.fitting import Training, divided
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, Prompts, Sampling, Sum

KINDS = ("suffix", "prefix")
ENOUGH = 0.01  # by how much a score has to rise


@struct.dataclass
class SelfControl(AtPositions):
    """h + scale · G after every block for the tokens of a prompt, with a G that raises the score of the model's text.

    Attributes:
      reader: the frozen model, which writes and judges.
      question: float32 [S, D], the embedded tokens of the question.
      answer: float32 [V], 1 for the answer that is wanted, −1 for the other one, and 0.
      rate, temperature: float32 [], η and τ.
      scale: float32 [] or, per row, [B]; 0 leaves the model's logits exactly as they are.
      new, ends: tokens of the text that is judged, at most, and the ids that end it; the question follows its last one.
      turns, tries: of the search; each try writes a text.
      positions: the tokens that are edited, of those of the prompt.
    """

    reader: Stream
    question: jax.Array
    answer: jax.Array
    rate: jax.Array
    temperature: jax.Array
    scale: jax.Array
    new: int = struct.field(pytree_node=False, kw_only=True)
    turns: int = struct.field(pytree_node=False, default=3)
    tries: int = struct.field(pytree_node=False, default=3)
    ends: tuple[int, ...] = struct.field(pytree_node=False, default=())
    positions: Positions = struct.field(pytree_node=False, default=Positions("prompt"))

    def init(self, prompts, length):
        shift, _ = self.search(prompts)
        return per_row(self.scale, prompts, None), shift, self.positions.begin(prompts)

    def hidden(self, h, site, pos, state):
        return shifted(self.positions, h, site, pos, state)

    def search(self, prompts: Prompts) -> tuple[jax.Array, jax.Array]:
        """G float32 [B, L, T, D] of prompts [B, T], and the scores [B, 2] of the text without and with it.

        Raises:
          InputError: the stream is not bound; prompt, text and question do not fit in the context.
        """
        lm = self.reader.lm
        if not self.reader.bound:
            raise InputError("The model is asked before it has weights: call Control.bind first, as decoding does.")
        size = prompts.tokens.shape[1] + self.new + self.question.shape[0]
        if size > lm.context or self.question.shape[1] != lm.width:
            raise InputError(
                f"prompt, text and question take {size} positions and are of width {self.question.shape[1]}, but the "
                f"model has a context of {lm.context} and width {lm.width}: shorten them, or fit it on this model."
            )
        own = jax.lax.stop_gradient(self)
        bare = prompts.replace(cond=None)
        nothing = jnp.zeros((len(prompts.keys), lm.depth, prompts.tokens.shape[1], lm.width), jnp.float32)
        text = own.write(bare, nothing)
        begin = nothing, text, own.judge(bare, text, nothing), jnp.ones(len(prompts.keys), bool)

        def turn(carry, _):
            shift, text, score, active = carry
            slope = jax.grad(lambda d: jnp.sum(own.judge(bare, text, shift + d)))(nothing)
            slope = slope / jnp.maximum(jnp.linalg.norm(slope, axis=-1, keepdims=True), 1.0)

            def attempt(best, step):
                moved = shift + step * slope
                found = own.write(bare, moved)
                value = own.judge(bare, found, nothing)
                better = active & ~best[3] & (value > score + ENOUGH)
                return tuple(jax.vmap(jnp.where)(better, *x) for x in zip((moved, found, value, better), best)), None

            steps = own.rate * 2.0 ** jnp.arange(own.tries)
            best, _ = jax.lax.scan(attempt, (shift, text, score, jnp.zeros_like(active)), steps)
            return best, None

        (shift, _, score, _), _ = jax.lax.scan(turn, begin, None, length=self.turns)
        return shift, jnp.stack([begin[2], score], axis=1)

    def write(self, prompts: Prompts, shift: jax.Array) -> jax.Array:
        """int32 [B, N]: the likeliest text behind prompts under a shift."""
        control = Shift(shift, jnp.ones(()), self.positions)
        lm, params = self.reader.lm, self.reader.params
        sampling = Sampling(max_new=self.new, eos=self.ends, greedy=True)
        return loop.loop(lm, params, prompts, control, sampling).tokens

    def judge(self, prompts: Prompts, text: jax.Array, shift: jax.Array) -> jax.Array:
        """S float32 [B] of texts int32 [B, N] behind prompts, as the model under a shift sees it."""
        lm, params = self.reader.lm, self.reader.params
        question = jnp.broadcast_to(self.question[None], (len(prompts.keys), *self.question.shape))
        x = lm.embed(params, jnp.concatenate([prompts.tokens, text], axis=1))
        x = jnp.concatenate([x, question.astype(x.dtype)], axis=1)
        written = jnp.cumsum(is_end(text, self.ends), axis=1) == 0  # without the end and what follows it
        mask = jnp.concatenate([prompts.mask, written, jnp.ones(question.shape[:2], bool)], axis=1)
        control = Shift(shift, jnp.ones(()), self.positions)
        z = lm.apply(params, x, mask, control=control, state=control.init(prompts, x.shape[1]), last=1).logits[:, 0]
        return jax.nn.sigmoid(jnp.einsum("bv,v->b", z, self.answer, precision="highest") / self.temperature)


def init(
    lm: LM,
    key: jax.Array,
    *,
    kind: str = "suffix",
    length: int = 8,
    new: int = 20,
    turns: int = 3,
    tries: int = 3,
    rate: float = 0.5,
    temperature: float = 10.0,
    ends: Sequence[int] = (),
) -> Control:
    """A control without a question, or a random prefix.

    Args:
      kind: "suffix" or "prefix". length: tokens of the question, or vectors of the prefix.
      new, turns, tries, rate, temperature, ends: of the kind "suffix", see `SelfControl`.

    Raises:
      InputError: an unknown kind, a number that is not above 0.
    """
    check_kind(kind)
    numbers = dict(length=length, new=new, turns=turns, tries=tries, rate=rate, temperature=temperature)
    for name, value in numbers.items():
        if not value > 0:
            raise InputError(f"{name} is {value}, expected a number above 0.")
    if kind == "prefix":
        shape = (lm.depth, lm.kv_heads, lm.head_dim)
        return Parts(**parts(key, 2 * lm.depth * lm.kv_heads * lm.head_dim, shared=length), shape=shape)
    question, answer = jnp.zeros((length, lm.width), jnp.float32), jnp.zeros((lm.vocab,), jnp.float32)
    leaves = question, answer, *(jnp.float32(x) for x in (rate, temperature, 1.0))
    return SelfControl(Stream(lm=lm, of="frozen"), *leaves, new=new, turns=turns, tries=tries, ends=tuple(ends))


def check_kind(kind: str) -> None:
    """InputError where there is no kind of that name."""
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}.")


def example(lm: LM, key: jax.Array) -> SelfControl:
    """A random question about two tokens and large steps, for the laws."""
    control = init(lm, key, length=2, new=3, turns=1, tries=2, rate=20.0, temperature=1.0)
    answer = control.answer.at[jnp.array([3, 4])].set(jnp.array([1.0, -1.0]))
    return control.replace(question=jax.random.normal(key, control.question.shape), answer=answer)


def neutral(control: Control) -> SelfControl | None:
    """Strength 0; a prefix has none."""
    return control.replace(scale=jnp.zeros_like(control.scale)) if isinstance(control, SelfControl) else None


def fit(root, *, lm: Artifact, data: Artifact, kind: str = "suffix", **settings: Any) -> Artifact:
    """The search for any prompt, in the stage `self_control`, or the prefix that is learned from what it finds for the
    prompts of `data`, in two stages more: `shifts` and `distil`.

    Raises:
      InputError: an unknown kind, a setting that no stage of it has, and what the stages raise.
    """
    check_kind(kind)
    asking, finding, learning = divided(settings, self_control, shifts, distil)
    if kind == "suffix" and (unused := finding | learning):
        raise InputError(f"{', '.join(unused)}: settings of the kind 'prefix', but kind is 'suffix'; leave them out.")
    asked = stage(root, self_control, asking, lm=lm)
    if kind == "suffix":
        return asked
    return stage(root, distil, learning, lm=lm, found=stage(root, shifts, finding, lm=lm, data=data, asked=asked))


@stage_function("self_control", revision=1)
def self_control(
    run: Run,
    *,
    lm: Artifact,
    question: str,
    answers: tuple[str, str] = (" Yes", " No"),
    new: int = 20,
    turns: int = 3,
    tries: int = 3,
    rate: float = 0.5,
    temperature: float = 10.0,
) -> None:
    """Stage: a control of the kind "suffix" for a question.

    Args:
      question: what follows the model's text, with all that separates them, up to the answer.
      answers: the one that is wanted and the other; their first tokens are compared.
      new, turns, tries, rate, temperature: see `SelfControl`.

    Raises:
      InputError: an empty question, answers that are not two texts or have one first token, and what `init` raises.
    """
    model, params, tokenizer = open_lm(lm)
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"question is {question!r}, expected the text of a question.")
    if isinstance(answers, str) or len(answers) != 2 or not all(isinstance(x, str) and x.strip() for x in answers):
        raise InputError(f"answers is {answers!r}, expected two texts: the answer that is wanted and the other one.")
    (ids,) = tokenizer.encode_after(["a"], [question])
    (yes, *_), (no, *_) = tokenizer.encode_after([question, question], list(answers))
    if yes == no:
        raise InputError(f"answers is {tuple(answers)}, whose first tokens are the same: choose others.")
    search = dict(new=new, turns=turns, tries=tries, rate=rate, temperature=temperature)
    options = search | dict(length=len(ids), ends=tokenizer.ends)
    control = init(model, jax.random.key(0), **options)
    answer = control.answer.at[jnp.asarray([yes, no])].set(jnp.asarray([1.0, -1.0]))
    control = control.replace(question=model.embed(params, jnp.asarray([ids]))[0].astype(jnp.float32), answer=answer)
    checkpoint.save(run.path / "state", control)
    run.record(method="self_control", init=options)


@stage_function("self_control.shifts", how=("batch",))
def shifts(
    run: Run, *, lm: Artifact, data: Artifact, asked: Artifact, limit: int = 400, batch: int = 16, tokens: int = 32
) -> None:
    """Stage: the shifts of the prompts whose score rises, {"shift" [N, L, T, D], "tokens" and "mask" [N, T]}, which
    take 4 · N · L · T · D bytes; metrics.jsonl has the mean score before and after, and how many rose.

    Args:
      asked: of the stage `self_control`. limit: prompts. batch: prompts that are searched for at once.
      tokens: longer prompts are left out; T is the longest of the others.

    Raises:
      InputError: no prompt is short enough, or no score rises; what the search raises.
    """
    model, params, tokenizer = open_lm(lm)
    params = model.unstack(params)
    control = methods.load(asked, model).bind(params, params)
    every = [prompt_of(row) for row in data.rows("data.jsonl")]
    sizes = list(map(len, tokenizer.encode_prompts(every)))
    short = [p for p, size in zip(every, sizes) if size <= tokens][: max(1, limit)]
    if not short:
        raise InputError(f"tokens is {tokens}, and every prompt of {data.path} is longer: raise it.")
    search = jax.jit(lambda control, prompts: control.search(prompts))
    found, size = [], max(size for size in sizes if size <= tokens)
    for at in range(0, len(short), batch):
        part = short[at : at + batch]
        full = to_prompts(tokenizer, part + [part[0]] * (batch - len(part)), seed=0, length=size)
        shift, scores = (np.asarray(x)[: len(part)] for x in search(control, full))
        found.append((shift, np.asarray(full.tokens)[: len(part)], np.asarray(full.mask)[: len(part)], scores))
    shift, ids, mask, scores = (np.concatenate(x) for x in zip(*found))
    rose, (before, after) = scores[:, 1] > scores[:, 0], scores.mean(axis=0).tolist()
    run.log(prompts=len(rose), rose=int(rose.sum()), before=before, after=after)
    if not rose.any():
        missed = f"no score of {len(rose)} prompts rises (mean {before:.3f})"
        raise InputError(f"{missed}: ask another question, or raise rate or tries.")
    checkpoint.save(run.path / "state", {"shift": shift[rose], "tokens": ids[rose], "mask": mask[rose]})


def loss(lm: LM) -> losses.LossFn:
    """The mean squared error of the states of prompts after all blocks behind a prefix, params, from those under a
    shift. A batch has tokens, mask [B, T] and shift [B, L, T, D]; frozen = {"params": those of the LM}."""

    def total(params: Parts, frozen: Mapping[str, Any], batch: dict[str, Any], keys: jax.Array) -> Sum:
        prompts = Prompts(batch["tokens"], batch["mask"], keys)
        size = batch["tokens"].shape[1]

        def states(control):
            x = lm.embed(frozen["params"], prompts.tokens)
            state = control.init(prompts, size)
            out = lm.apply(frozen["params"], x, prompts.mask, control=control, state=state, tap=lambda h: h, last=1)
            return out.taps[1:-1].astype(jnp.float32)

        goal = jax.lax.stop_gradient(states(Shift(batch["shift"], jnp.ones(()))))
        error = jnp.mean(jnp.square(states(params) - goal), axis=(0, 3))
        sums = jnp.sum(jnp.where(prompts.mask, error, 0.0)), jnp.sum(prompts.mask, dtype=jnp.float32)
        return Sum(*sums, {"error": sums})

    return total


def batches(arrays: Mapping[str, np.ndarray], batch: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of arrays [N, …], each epoch in an order of its own; batches run across epochs."""
    generator, size = np.random.default_rng(rng.derived_seed(seed, "prompts")), len(arrays["mask"])
    waiting = np.zeros(0, int)
    while True:
        while len(waiting) < batch:
            waiting = np.concatenate([waiting, generator.permutation(size)])
        rows, waiting = waiting[:batch], waiting[batch:]
        yield {name: x[rows] for name, x in arrays.items()} | {"ids": rows}


@stage_function("self_control.distil")
def distil(
    run: Run,
    *,
    lm: Artifact,
    found: Artifact,
    vectors: int = 16,
    training: Training = Training(steps=300, batch=16, rate=9e-3, warmup=120),
    seed: int = 0,
) -> None:
    """Stage: a prefix of `vectors` keys and values that learns the shifted states of the stage `shifts`.

    Args:
      training: how it is trained; the authors' rate is 9e-3, with a warm-up over 0.4 of the updates.
      seed: of initial values and of the order of prompts.
    """
    model, params, _ = open_lm(lm)
    options = dict(kind="prefix", length=vectors)
    control = init(model, rng.stream(jax.random.key(seed), "init"), **options)
    arrays = {name: np.asarray(x) for name, x in found.load().items()}
    control = fitting.train(
        run, control, loss(model), {"params": params}, batches(arrays, training.batch, seed), training,
        trained="shared", seed=seed,
    )  # fmt: skip
    fitting.keep(run, control, "self_control", options)
