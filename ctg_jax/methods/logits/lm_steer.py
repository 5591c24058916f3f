"""LM-Steer: a linear map of the output word embeddings, e → (I + s ε W) e with W = P1 P2ᵀ, steers a frozen language
model (Han et al. 2024, "Word Embeddings Are Steers for Language Models").

It is applied where it is cheapest, to the state c that the unembedding sees: c → c + s ε (c P1) P2ᵀ gives the same
logits.
One map is learned for both directions, from texts with signed labels: `fit`. `add` composes maps, `transfer` carries
one to another model in closed form, `words` and `highlight` read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import rng
from ctg_jax.controls.conditions import per_row
from ctg_jax.controls.selection import AtPositions, Positions
from ctg_jax.controls.selection import positions as selected
from ctg_jax.data.labels import labelled
from ctg_jax.data.pipeline import pipeline
from ctg_jax.data.sources import Source
from ctg_jax.data.tokenizer import Tokenizer, pad_rows
from ctg_jax.decode import loop
from ctg_jax.learn import fitting, lists, losses
from ctg_jax.learn.fitting import Training
from ctg_jax.models.heads import vocabulary
from ctg_jax.models.lm import LM
from ctg_jax.run.stage import Artifact, Run, open_lm, stage, stage_function
from ctg_jax.types import InputError, Params, Prompts

Model = tuple[LM, Params, Tokenizer]  # what `open_lm` returns


@struct.dataclass
class LMSteer(AtPositions):
    """c + scale · epsilon · (c P1) P2ᵀ at site L + 1, the state after the final norm.

    Attributes:
      p1, p2: float32 [D, R].
      scale: float32 [] or, per row, [B]; 0 leaves the model's logits exactly as they are.
      site: L + 1 of the model; the layer scan never reaches it, so it comes as an `int`.
      epsilon: what the step of a learned map of norm 1 is.
      fixed: the number of the last columns of p1 and p2 that are the dummy steer of the authors' code: they act at
        strength 1 regardless of `scale`, and absorb what the texts have in common. 0 for none.
      cond: None, or the name of a float [B] entry of `prompts.cond` that multiplies `scale` row by row.
      positions: the tokens after which it acts, see `ctg_jax.controls.selection`.
    """

    p1: jax.Array
    p2: jax.Array
    scale: jax.Array
    site: int = struct.field(pytree_node=False, kw_only=True)
    epsilon: float = struct.field(pytree_node=False, default=1e-3)
    fixed: int = struct.field(pytree_node=False, default=0)
    cond: str | None = struct.field(pytree_node=False, default=None)
    positions: Positions = struct.field(pytree_node=False, default=Positions())

    def init(self, prompts, length):
        strength = per_row(self.scale, prompts, self.cond)
        if self.fixed:
            steered = jnp.repeat(strength, self.p1.shape[1] - self.fixed, axis=2)
            strength = jnp.concatenate([steered, jnp.ones((*strength.shape[:2], self.fixed))], axis=2)
        return strength, self.positions.begin(prompts)

    def hidden(self, h, site, pos, state):
        if not isinstance(site, int) or site != self.site:
            return h
        width = self.p1.shape[0]
        if width != h.shape[-1]:
            raise InputError(
                f"The LM-Steer has width {width}, but the model's is {h.shape[-1]}: it was fitted on another model; "
                "see lm_steer.transfer."
            )
        strength, placed = state
        strength = self.positions.within(strength, pos, placed)
        inner = (h.astype(jnp.float32).reshape(-1, width) @ self.p1).reshape(*h.shape[:2], -1) * strength
        push = (inner.reshape(-1, self.p2.shape[1]) @ self.p2.T).reshape(h.shape)
        return h + (self.epsilon * push).astype(h.dtype)


def init(
    lm: LM,
    key: jax.Array,
    *,
    rank: int = 1000,
    epsilon: float = 1e-3,
    deviation: float = 0.01,
    fixed: int = 0,
    cond: str | None = None,
    positions: Any = "all",
) -> LMSteer:
    """A map that is almost nothing, at strength 1.

    Args:
      lm: the frozen model. key: of P1 and P2, normal with the standard deviation `deviation`.
      rank: R of the map, or the width D where that is less.
      epsilon, fixed, cond, positions: see `LMSteer`; `fixed` columns are added to the R.

    Raises:
      InputError: a rank below 1, and what `ctg_jax.controls.selection.positions` raises.
    """
    if rank < 1:
        raise InputError(f"rank is {rank}, expected at least 1.")
    shape = (lm.width, min(rank, lm.width) + fixed)
    p1, p2 = (deviation * jax.random.normal(k, shape, jnp.float32) for k in jax.random.split(key))
    static = dict(site=lm.depth + 1, epsilon=epsilon, fixed=fixed, cond=cond, positions=selected(positions))
    return LMSteer(p1, p2, jnp.ones(()), **static)


def example(lm: LM, key: jax.Array) -> LMSteer:
    """A large random map of rank 4, for the laws."""
    return init(lm, key, rank=4, epsilon=0.05, deviation=1.0)


def neutral(control: LMSteer) -> LMSteer:
    """Strength 0, without the dummy steer, which has no strength."""
    kept = control.p1.shape[1] - control.fixed
    return control.replace(
        p1=control.p1[:, :kept], p2=control.p2[:, :kept], fixed=0, scale=jnp.zeros_like(control.scale)
    )


def loss(lm: LM, *, l2: float = 0.0) -> losses.LossFn:
    """Next-token loss under a steer whose strength is the field `value` [B] of the batch, padding left out (the
    authors' code trains on it), plus `l2` · (‖P1‖² + ‖P2‖²) per token."""
    plain = losses.control_loss(lm)

    def signed(params, frozen, batch, keys):
        out = plain(params, frozen, batch | {"cond": {"value": batch["value"]}}, keys)
        if not l2:
            return out
        size = jnp.sum(jnp.square(params.p1)) + jnp.sum(jnp.square(params.p2))
        metrics = {"cross_entropy": (out.total, out.weight)} | out.metrics
        return out.replace(total=out.total + l2 * out.weight * size, metrics=metrics)

    return signed


def fit(root, *, lm: Artifact, data: Artifact, **settings: Any) -> Artifact:
    """Trains an LM-Steer on the records of `data`; the settings are those of the stage `lm_steer`."""
    return stage(root, lm_steer, settings, lm=lm, data=data)


from_pairs, from_texts = lists.learners(fit)


@stage_function("lm_steer")
def lm_steer(
    run: Run,
    *,
    lm: Artifact,
    data: Artifact,
    values: Sequence[float] = (-1.0, 1.0),
    rank: int = 1000,
    epsilon: float = 1e-3,
    deviation: float = 0.01,
    dummy: str = "drop",
    l2: float = 1e-6,
    cond: str | None = None,
    training: Training = Training(steps=1000, rate=1e-2, warmup=0, save_every=200),
    seed: int = 0,
) -> None:
    """Stage: trains one map at all its strengths together: each text is read at the value of its label.

    Args:
      lm, data: an LM artifact, and records with `text` and a whole `label` from 0; those without one are left out and
        counted in a warning.
      values: the strength at which texts of label 0, 1, … are read; for grades, such as (-1, -.5, 0, .5, 1).
      rank, epsilon, deviation, cond: see `init`.
      dummy: a second map at strength 1 learns what all texts have in common: "drop" it after training, so that
        strength 0 is the model itself; "keep" it, as the authors do; or "none".
      l2: weight of ‖P1‖² + ‖P2‖². training: how it is trained.
      seed: of initial values and of the order of texts.

    Raises:
      InputError: a label without a value, texts of one value only, an unknown `dummy`, or what training raises.
    """
    if dummy not in ("none", "drop", "keep"):
        raise InputError(f"dummy is {dummy!r}, expected 'none', 'drop' or 'keep'.")
    source = Source(str(data.path), "", valued(data.rows("data.jsonl"), values, str(data.path)))
    model, params, tokenizer = open_lm(lm)
    fixed = 0 if dummy == "none" else min(rank, model.width)
    hp = dict(rank=rank, epsilon=epsilon, deviation=deviation)
    control = init(model, rng.stream(jax.random.key(seed), "init"), **hp, fixed=fixed, cond="value")
    batches = pipeline(source, tokenizer, batch=training.batch, length=training.tokens, seed=seed, fields=("value",))
    control = fitting.train(
        run, control, loss(model, l2=l2), {"params": params}, batches, training, trained="p1|p2", seed=seed
    )
    control = control.replace(cond=cond)
    if dummy != "keep":
        control = neutral(control).replace(scale=control.scale)
    fitting.keep(run, control, "lm_steer", {**hp, "fixed": control.fixed, "cond": cond})


def valued(records: Sequence[dict], values: Sequence[float], where: str) -> list[dict]:
    """The records that have a label, with a field `value`, the strength of their label; see `lm_steer`."""
    kept = labelled(records, where, classes=len(values))
    out = [{**r, "value": float(values[r["label"]])} for r in kept]
    if len({r["value"] for r in out}) < 2:
        raise InputError(f"values is {list(values)}, which gives all texts of {where} one value: a steer needs two.")
    return out


def add(a: LMSteer, b: LMSteer) -> LMSteer:
    """One LM-Steer that does what both do, each at its present strength: W = s_a W_a + s_b W_b, by joining their
    columns. `Chain((a, b))` is (I + A)(I + B) and so differs from this I + A + B by the small product A B.

    Raises:
      InputError: steers of different models, with different `cond`, a strength per row, or a dummy steer.
    """
    same = [(name, getattr(a, name), getattr(b, name)) for name in ("site", "cond", "positions")]
    for what, x, y in (("width", len(a.p1), len(b.p1)), *same):
        if x != y:
            raise InputError(f"The {what} of the first steer is {x!r} and of the second {y!r}: only equal ones add up.")
    if a.scale.ndim or b.scale.ndim or a.fixed or b.fixed:
        raise InputError("A steer with a strength per row or a dummy steer cannot be added: use a Chain.")
    p1 = jnp.concatenate([a.scale * a.p1, b.scale * (b.epsilon / a.epsilon) * b.p1], axis=1)
    return a.replace(p1=p1, p2=jnp.concatenate([a.p2, b.p2], axis=1), scale=jnp.ones(()))


def transfer(steer: LMSteer, source: Model, target: Model, *, limit: int | None = None) -> LMSteer:
    """The same steer for another language model: with e' ≈ M e and e ≈ A e' over the words that both
    vocabularies hold, W' = M W A, so P1' = M P1 and P2' = Aᵀ P2. Exact where the embeddings are linear images.

    M and A are least-squares solutions in which every word's relative error counts alike; the authors find them by
    gradient descent and use one for both sides.

    Args:
      steer: fitted on the source. source, target: (lm, params, tokenizer), as `open_lm` gives them.
      limit: how many shared words are used, the first in the order of the source's ids (in a byte-pair vocabulary the
        frequent ones).

    Raises:
      InputError: a steer of another width than the source's, or fewer shared words than either width.
    """
    (_, from_params, from_words), (lm, to_params, to_words) = source, target
    e, f = (np.asarray(vocabulary(p), np.float64) for p in (from_params, to_params))
    if len(steer.p1) != e.shape[1]:
        raise InputError(f"The steer has width {len(steer.p1)} and the source model {e.shape[1]}: it is another's.")
    ids = [(i, to_words.id(from_words.token(i))) for i in range(min(len(e), from_words.vocab))]
    ids = np.array([(i, j) for i, j in ids if j is not None and j < len(f)][:limit]).reshape(-1, 2)
    need = max(e.shape[1], f.shape[1])
    if len(ids) < need:
        raise InputError(f"The models share {len(ids)} words, expected at least {need}, the larger of their widths.")
    e, f = e[ids[:, 0]], f[ids[:, 1]]

    def least_squares(x, y):  # [from, to] of y ≈ x map
        weight = 1 / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-12)
        return np.linalg.lstsq(weight * x, weight * y, rcond=None)[0]

    p1 = least_squares(e, f).T @ np.asarray(steer.p1, np.float64)
    p2 = least_squares(f, e) @ np.asarray(steer.p2, np.float64)
    return steer.replace(p1=jnp.asarray(p1, jnp.float32), p2=jnp.asarray(p2, jnp.float32), site=lm.depth + 1)


def words(
    steer: LMSteer,
    lm: LM,
    params: Params,
    tokenizer: Tokenizer,
    n: int = 10,
    *,
    dimensions: int = 5,
    texts: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """What the leading dimensions of a steer mean, in words. With W = Σ σ u vᵀ, a state c changes the
    logit of a word e by ε σ (c·u)(v·e): dimension by dimension, the words with the largest and smallest v·e.

    Args:
      steer, lm, params, tokenizer: the steer (its dummy part is left out) and its model.
      n: words for each side. dimensions: how many, the strongest first.
      texts: where given, `up` are the words that rise at positive strength in the mean context of these texts;
        otherwise which side is called up is arbitrary.

    Returns:
      Rows {"dimension", "strength": ε σ, "up": n words, "down": n words}, the most moved first.
    """
    kept = steer.p1.shape[1] - steer.fixed
    p1, p2 = (np.asarray(p, np.float64)[:, :kept] for p in (steer.p1, steer.p2))
    (q1, r1), (q2, r2) = np.linalg.qr(p1), np.linalg.qr(p2)
    u, sigma, v = np.linalg.svd(r1 @ r2.T)
    u, v = q1 @ u, q2 @ v.T
    if texts:
        rows = [tokenizer.begun(row)[: lm.context] for row in tokenizer.encode(texts)]
        tokens, mask = (jnp.asarray(x) for x in pad_rows(rows, max(map(len, rows)), 0, left=False))
        states = lm.apply(params, lm.embed(params, tokens), mask, last=1).hidden
        v = v * np.where(np.asarray(jnp.sum(states * mask[:, :, None], axis=(0, 1)), np.float64) @ u < 0, -1, 1)
    e = np.asarray(vocabulary(params), np.float64)[: tokenizer.vocab]
    out = []
    for d in range(min(dimensions, len(sigma))):
        order = np.argsort(e @ v[:, d], kind="stable")
        up, down = (tokenizer.token_texts(ids[:n]) for ids in (order[::-1], order))
        out.append({"dimension": d, "strength": steer.epsilon * float(sigma[d]), "up": up, "down": down})
    return out


def highlight(
    steer: LMSteer, lm: LM, params: Params, tokens: jax.Array, mask: jax.Array, strength: float = 1.0
) -> jax.Array:
    """The evidence of each token for the attribute, float32 [B, T]: its log-probability at +strength minus that at
    −strength, in nats. The sum over a text is the log-likelihood ratio of the two styles.

    tokens int [B, T], mask bool [B, T], padding on the right; the first token and padding score 0.
    `ctg_jax.report.spans` shows it.
    """
    batch = {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}
    targets, real = losses.predicted(batch)
    keys = jax.random.split(jax.random.key(0), len(targets))  # nothing is drawn
    prompts = Prompts(batch["tokens"][:, :1], batch["mask"][:, :1], keys)
    plus, minus = (
        loop.score(lm, params, prompts, targets, steer.replace(scale=jnp.float32(s), cond=None), real)
        for s in (strength, -strength)
    )
    return jnp.pad(plus - minus, ((0, 0), (1, 0)))
