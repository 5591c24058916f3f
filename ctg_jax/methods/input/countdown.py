"""Exact length: every token is read with the number of tokens that are left, and LoRA learns to end when none is.

The embedding of the token at distance n behind the prompt gets scale · table[L - n], where L is the length asked for,
counted in tokens without the one that ends the text. The last token of the prompt carries L itself, so that the first
token is chosen knowing it. `whole=False` counts from there (ORPE), `whole=True` adds the numbers to the tokens of the
prompt as well (LDPE); both are those of Butcher, O'Keefe and Titchener (2024). The table is that of sines and cosines,
as long as the embeddings of the model, and LoRA learns from texts of any lengths, each told its own. With `slack` a
text is told a bound that its length does not exceed instead (Max New Tokens++ of the same paper).

The loss is the likelihood of the texts of length L, so the optimum is the model's distribution given that length; where
the probability of ending does not depend on the words, the words stay as they are.

Differences from the paper: the bound is drawn uniformly from L to (1 + slack) L, since how the authors draw it was not
found. `scale` multiplies the table and the change of weights, so that 0 is the frozen model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import methods, rng
from ctg_jax.control import Control
from ctg_jax.controls.conditions import condition
from ctg_jax.controls.delta import Delta
from ctg_jax.data.completions import continuations
from ctg_jax.learn import fitting, losses, pool
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import reduced
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, Sum

log = logging.getLogger(__name__)


@struct.dataclass
class Countdown(Control):
    """Adds the number of tokens left to the embeddings, and the change of weights that was trained to read it.

    Attributes:
      delta: the change of weights.
      table: float32 [R + 1, D], row r for r tokens left; more are read as R.
      length: float32 [], the tokens asked for, the end token not counted.
      scale: float32 []; it multiplies the table and the change of weights.
      cond: None, or the name of a [B] entry of `prompts.cond` that holds each row's length instead.
      whole: whether the tokens before the last one of the prompt are told the number as well.
    """

    delta: Delta
    table: jax.Array
    length: jax.Array
    scale: jax.Array
    cond: str | None = struct.field(pytree_node=False, default=None)
    whole: bool = struct.field(pytree_node=False, default=False)

    cond_multiplies = False

    def weights(self, params):
        return self.delta.replace(scale=self.delta.scale * self.scale).weights(params)

    def init(self, prompts, length):
        batch = prompts.tokens.shape[0]
        asked = self.length if self.cond is None else condition(prompts, self.cond)
        asked = jnp.broadcast_to(jnp.round(jnp.asarray(asked, jnp.float32)).astype(jnp.int32), (batch,))
        return jnp.sum(prompts.mask, axis=1, dtype=jnp.int32), asked

    def check(self, prompts):
        asked = self.length if self.cond is None else condition(prompts, self.cond)
        if not isinstance(asked, jax.core.Tracer) and not np.all(np.asarray(asked) >= 0.5):
            raise InputError(f"the length asked for is {float(np.min(asked)):g}, expected at least 1 token.")

    def began(self, state, start, first):
        return start, state[1]

    def hidden(self, h, site, pos, state):
        if isinstance(site, int) and site != 0:
            return h
        start, asked = state
        written = pos - start[:, None] + 1
        left = jnp.clip(asked[:, None] - written, 0, self.table.shape[0] - 1)
        push = self.scale * self.table[left]
        told = jnp.ones(pos.shape, bool) if self.whole else written >= 0
        if not isinstance(site, int):
            told = told & (site == 0)
        return h + jnp.where(told[:, :, None], push, 0.0).astype(h.dtype)


def sinusoid(width: int, rows: int) -> jax.Array:
    """float32 [rows, width]: sin(r / 10000^(2i / width)) and cos of it in turn (Vaswani et al. 2017, section 3.5)."""
    angle = jnp.arange(rows)[:, None] / 10000.0 ** (2 * (jnp.arange(width) // 2) / width)[None]
    return jnp.where((jnp.arange(width) % 2 == 0)[None], jnp.sin(angle), jnp.cos(angle)).astype(jnp.float32)


def init(
    lm: LM,
    key: jax.Array,
    *,
    kind: str = "lora",
    rank: int = 8,
    targets: str | None = None,
    longest: int = 256,
    whole: bool = False,
    length: float = 20,
    cond: str | None = None,
) -> Countdown:
    """A countdown whose change of weights is zero.

    Args:
      kind, rank, targets: see `ctg_jax.learn.fitting.Adapter`.
      longest: R, the largest number that has a row of its own.
      whole, length, cond: see `Countdown`.

    Raises:
      InputError: longest or length below 1, or a length that no text of the model has.
    """
    if longest < 1 or length < 1:
        raise InputError(f"longest is {longest} and length is {length}, expected at least 1 of each.")
    if cond is None and length >= lm.context:
        raise InputError(f"length is {length}, but the model's context is {lm.context}: ask for fewer tokens.")
    delta = fitting.delta(lm, key, kind=kind, rank=rank, targets=targets)
    return Countdown(delta, sinusoid(lm.width, longest + 1), jnp.float32(length), jnp.ones(()), cond, whole)


def example(lm: LM, key: jax.Array) -> Countdown:
    """A countdown from 3 with a table that is as large as the embeddings, for the laws."""
    control = init(lm, key, rank=2, longest=8, length=3)
    return control.replace(delta=fitting.example_delta(lm, key), table=3 * control.table)


def neutral(control: Countdown) -> Countdown:
    """Strength 0."""
    return control.replace(scale=jnp.zeros_like(control.scale))


def bounds(keys: jax.Array, length: jax.Array, slack: float) -> jax.Array:
    """float32 [B]: for each row a whole number that is uniform from its length [B] to (1 + slack) times it, rounded up;
    keys [B]. With slack 0 the length itself."""
    most = jnp.ceil((1 + slack) * length - 1e-4)
    u = jax.vmap(lambda key: jax.random.uniform(key))(keys)
    return jnp.minimum(length + jnp.floor(u * (most - length + 1)), most)


def loss(lm: LM, *, slack: float = 0.0) -> losses.LossFn:
    """-log p(y_i | x, y_<i, B) per token of the completions, with B drawn by `bounds` from the field `asked` float32
    [B], the tokens of the completion without its end. params is the control, frozen = {"params": those of the LM}.

    Raises:
      InputError: slack below 0.
    """
    if not slack >= 0:
        raise InputError(f"slack is {slack}, expected at least 0.")

    def total(params, frozen, batch, keys):
        told = bounds(rng.named(keys, "bound"), batch["asked"].astype(jnp.float32), slack)
        text = pool.read(lm, frozen["params"], batch, keys, params.replace(cond="asked"), {"asked": told})
        return Sum(*losses.masked_sum(reduced(text, losses.next_token, batch["completion"]), batch["written"]))

    return total


def fit(root, *, lm: Artifact, data: Artifact, length: float | None = None, **settings: Any) -> Artifact:
    """Trains a countdown on the records of `data`.

    Args:
      length: tokens that the control asks for, for all rows. None: each row's are read from the entry "length" of
        `prompts.cond`. Whatever it is, the countdown is trained once.
      settings: of the stage `countdown`.
    """
    learned = stage(root, countdown, settings, lm=lm, data=data)
    return learned if length is None else stage(root, of_length, {"length": length}, lm=lm, learned=learned)


@stage_function("countdown")
def countdown(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    where: Mapping[str, Any] | None = None,
    words: int = 1,
    slack: float = 0.0,
    even: bool = False,
    learn_table: bool = False,
    adapter: Adapter = Adapter(),
    shape: Mapping[str, Any] | None = None,
    training: Training = Training(steps=300, batch=16, schedule="linear"),
    seed: int = 0,
) -> None:
    """Stage: trains the change of weights on texts that are each told their length.

    Args:
      lm, data: an LM artifact, and records with a `prompt` that their `text` begins with, or texts.
      where: keep records whose fields have these values.
      words: the prompt of a record that has none is its first words.
      slack: see `loss`. even: draw as many texts from each of the ranges 1, 2 to 3, 4 to 7, … of lengths.
      learn_table: whether the table is learned too.
      adapter: the change of weights. shape: settings of `init`, of which `longest` and `whole` matter here.
      training: how it is trained; texts of more than `tokens` tokens are left out, since they would be taught to end
        where they are cut, and are counted in a warning.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: a tokenizer without an end token, no text that fits in `training.tokens`, and what `init`, `loss` and
        training raise.
    """
    records = fitting.matching(data, where)
    model, params, tokenizer = open_lm(lm)
    made = vars(adapter) | dict(shape or {}) | {"cond": "length"}
    control = init(model, rng.stream(jax.random.key(seed), "init"), **made)
    embedded = model.embed(params, jnp.arange(model.vocab)[None]).astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(embedded)) / jnp.mean(jnp.square(control.table)))
    control = control.replace(table=control.table * size)
    rows = completed(records, tokenizer, words, training.tokens)
    if len(rows) < len(records):
        log.warning(
            "%s: %d of %d texts have more than %d tokens behind their prompt, or none, and are left out",
            data.path, len(records) - len(rows), len(records), training.tokens,
        )  # fmt: skip
    batches = pool.batches(
        rows, tokenizer, batch=training.batch, seed=seed, fields=("asked",), strata="range" if even else None
    )
    control = fitting.train(
        run, control, loss(model, slack=slack), {"params": params}, batches, training.at(adapter.rate),
        trained=r"delta/changes/.*|table" if learn_table else r"delta/changes/.*", seed=seed,
    )  # fmt: skip
    fitting.keep(run, control, "countdown", made)


@stage_function("countdown_of")
def of_length(run: Run, *, lm: Artifact, learned: Artifact, length: float) -> None:
    """Stage: the control that `countdown` trained, asking for this many tokens."""
    model, made = open_lm(lm)[0], {**learned.spec["init"], "length": length, "cond": None}
    jax.eval_shape(lambda key: init(model, key, **made), jax.random.key(0))  # refuses a length that cannot be
    control = methods.load(learned, model).replace(length=jnp.float32(length), cond=None)
    fitting.keep(run, control, "countdown", made)


def conditions(
    artifact: Artifact, lm: Artifact, texts: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """The length that each row asks for, float32 [n], where the control reads one: the field `tokens` of the prompt's
    record. Empty where the control has a length of its own, or no record has the field.

    Raises:
      InputError: a record without the field where others have it, or with other than a whole number from 1 to what the
        model's context holds.
    """
    name, most = artifact.spec["init"].get("cond"), open_lm(lm)[0].context - 1
    if name is None or not any("tokens" in record for record in records):
        return {}
    found = [record.get("tokens") for record in records]
    for i, asked in enumerate(found):
        if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= most:
            raise InputError(
                f"prompt {i + 1} asks for {asked!r:.40} tokens, expected a whole number from 1 to {most}, which the "
                "model's context holds."
            )
    return {name: np.asarray(found, np.float32)}


def completed(records: list[dict[str, Any]], tokenizer: Any, words: int, most: int) -> list[dict[str, Any]]:
    """Records with `prompt`, `tokens` (the rest of the text and its end, at most `most`), `asked` (the tokens without
    the end) and `range` (the largest power of 2 up to that, as its exponent).

    Raises:
      InputError: the tokenizer has no end token, words below 1, or no text is left.
    """
    if tokenizer.eos is None:
        raise InputError("the tokenizer of this language model has no token that ends a text, which a length needs.")
    if words < 1:
        raise InputError(f"words is {words}, expected at least 1 word of a prompt.")
    known = []
    for record in records:
        if "prompt" not in record and "reference" not in record and "messages" not in record:
            parts = record["text"].split()
            if len(parts) <= words:
                continue
            record = record | {"text": " ".join(parts), "prompt": " ".join(parts[:words])}
        known.append(record)
    tails = continuations(known, tokenizer, most + 1)
    rows = [
        {**r, "prompt": r.get("prompt", r["text"]), "tokens": t, "asked": len(t) - 1,
         "range": (len(t) - 1).bit_length() - 1}
        for r, t in zip(known, tails)
        if 1 < len(t) <= most and t[-1] in tokenizer.ends
    ]  # fmt: skip
    if not rows:
        raise InputError(f"no text has from 1 to {most - 1} tokens behind its prompt: raise training.tokens.")
    return rows
