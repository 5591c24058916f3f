"""The pool of a method that learns from samples: records on disk, batches of them, and what their log-probabilities may
be taken for.

A pool is the sequence of what `ctg_jax.learn.experience.score` wrote, a Parquet file for each round: a new round adds
a file and copies none. Only batches reach a device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import evaluation, rng
from ctg_jax.control import IDENTITY, Chain, Control
from ctg_jax.controls import truncate
from ctg_jax.data import Source
from ctg_jax.data.completions import Completions, completions
from ctg_jax.data.messages import prompt_of, shown
from ctg_jax.data.pipeline import Batch, Batches
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.decode import reading
from ctg_jax.learn import losses
from ctg_jax.mesh import layout
from ctg_jax.models.lm import LM
from ctg_jax.models.positions import Read, reduced
from ctg_jax.run.stage import Artifact
from ctg_jax.stages.sampling import truncation
from ctg_jax.types import InputError, Params, Prompts

POOL = "pool.parquet"
STATES = "states.npy"

# Filters that leave every token a probability, and with them those that remove tokens whatever their probabilities are.
POSITIVE = ("temperature", "repetition_penalty")
FIXED = (*POSITIVE, "banned", "min_length", "eos", "no_repeat_ngram")


def check_drawn(drawn: Mapping[str, Any], what: str, allowed: Collection[str] | None = ()) -> None:
    """InputError where samples that were drawn in this way are not what a method may take them for.

    Args:
      drawn: `greedy` and `filter`, as in the settings of `explore` and in what `score` records.
      what: the method or setting that reads their log-probabilities.
      allowed: options of the filter that it takes into account; None: all of them.
    """
    if drawn.get("greedy"):
        raise InputError(f"{what} needs samples with a probability, but explore has greedy=True: set it to False")
    wrong = [] if allowed is None else [k for k, v in truncation(drawn.get("filter")).items() if v and k not in allowed]
    if wrong:
        usable = f"only {', '.join(allowed)} may be there" if allowed else "no filter may be there"
        raise InputError(
            f"{what} needs the probability of every text, but explore has a filter with {', '.join(wrong)}: {usable}"
        )


def drawing_filter(pools: Sequence[Artifact], lm: LM) -> Chain:
    """The filter that the samples of these pools were drawn under: the same control that follows the policy in
    `ctg_jax.stages.sampling.build`, so that log-probabilities under policy and filter are those of what drew them.

    Raises:
      InputError: the pools were drawn under different filters.
    """
    first, *others = (pool.spec["drawn"]["filter"] for pool in pools)
    if any(other != first for other in others):
        raise InputError(f"the pools were drawn under the filters {[first, *others]}: expected one for all of them")
    return jax.tree.map(jnp.asarray, truncate.rules(lm, **first))


class Pool(Sequence):
    """The samples of several rounds as records, read from disk; `column` gives one field of all of them, and `with_`
    the same records with one more field."""

    def __init__(self, table: Any, more: Mapping[str, np.ndarray] | None = None):
        self._table, self._more = table, dict(more or {})

    @classmethod
    def open(cls, rounds: Sequence[Artifact]) -> Pool:
        """The pool of the artifacts that `score` made."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        return cls(pa.concat_tables([pq.read_table(a.path / POOL, memory_map=True) for a in rounds]).combine_chunks())

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        (row,) = self._table.slice(i, 1).to_pylist()
        return row | {name: values[i] for name, values in self._more.items()}

    def column(self, name: str) -> np.ndarray:
        """[n], one field of every record."""
        return self._more[name] if name in self._more else self._table[name].to_numpy()

    def has(self, name: str) -> bool:
        """Whether the records have a field."""
        return name in self._more or name in self._table.column_names

    def importance(self, limit: float) -> np.ndarray:
        """p / q float32 [n] of every record, at most `limit`, over their mean: the weights with which samples of q,
        what drew them, stand for samples of the frozen model p."""
        gap = self.column("base").astype(np.float64) - self.column("logp")
        ratio = np.exp(np.minimum(gap, np.log(limit)))
        return (ratio / ratio.mean()).astype(np.float32)

    def threshold(self, given: float | str) -> float:
        """The reward from which a sample is positive: a number as it is, or "median" for that of this pool.

        Raises:
          InputError: another string.
        """
        if isinstance(given, str) and given != "median":
            raise InputError(f"threshold is {given!r}, expected a number, 'median' or, for fit, 'judge'.")
        return float(np.median(self.column("reward"))) if given == "median" else given

    def prompts(self) -> list[Any]:
        """The prompt of every record: its text, or its messages."""
        texts = list(self.column("prompt"))
        if not self.has("messages"):
            return texts
        return [text if found is None else found for text, found in zip(texts, self._table["messages"].to_pylist())]

    def with_(self, **columns: np.ndarray) -> Pool:
        """The same records with more fields, each [n]."""
        return Pool(self._table, {**self._more, **columns})

    def take(self, indices: np.ndarray) -> Pool:
        """Some of the records."""
        return Pool(self._table.take(np.asarray(indices)), {k: v[indices] for k, v in self._more.items()})


class States(Sequence):
    """The final states of the frozen model at every token of a pool's completions, as scoring left them: row i is
    float32 [N, D], zeros behind its tokens, with N the length of the longest completion. Rows stay on disk until they
    are read.

    Args:
      rows: the states of each completion, float32 [its length, D], such as parts of memory maps.
    """

    def __init__(self, rows: Sequence[np.ndarray]):
        self._rows, self._longest = rows, max(map(len, rows))

    @classmethod
    def open(cls, rounds: Sequence[Artifact]) -> States:
        """Those of the artifacts that `score` made with `states`, in the order of `Pool.open`."""
        rows: list[np.ndarray] = []
        for artifact in rounds:
            tokens = Pool.open([artifact]).column("tokens")
            ends = np.cumsum([len(t) for t in tokens])
            rows += np.split(np.asarray(np.load(artifact.path / STATES, mmap_mode="r")), ends)[:-1]
        return cls(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, np.ndarray):
            return States([self._rows[j] for j in i])
        row = self._rows[i]
        return np.concatenate([row, np.zeros((self._longest - len(row), row.shape[1]), row.dtype)])


def positive(rewards: np.ndarray, threshold: float) -> np.ndarray:
    """bool [n]: which rewards [n] are at least the threshold.

    Raises:
      InputError: all of them are on one side, from which two classes cannot be learned.
    """
    found = rewards >= threshold
    if found.all() or not found.any():
        raise InputError(
            f"all {len(found)} samples are on one side of the threshold {threshold:g}: set threshold, raise n or take "
            "another reward"
        )
    return found


def batches(
    pool: Sequence, tokenizer: Tokenizer, *, batch: int, seed: int, fields=(), strata=None, also: str | None = None
) -> Batches:
    """Batches of a pool's prompts and completions, as long as the longest of each; see `ctg_jax.data.completions`."""
    prompt, new = _lengths(pool, tokenizer)
    if also is not None:
        new = max(new, _lengths(pool, tokenizer, also)[1])
    options = dict(batch=batch, prompt=prompt, new=new, seed=seed, fields=fields, strata=strata, also=also)
    return completions(Source("the pool", "all", pool), tokenizer, **options)


def _lengths(pool: Sequence, tokenizer: Tokenizer, field: str = "tokens") -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest completion."""
    prompts = pool.prompts() if isinstance(pool, Pool) else [prompt_of(r) for r in pool]
    tokens = pool.column(field) if isinstance(pool, Pool) else [r[field] for r in pool]
    distinct = list({p if isinstance(p, str) else shown(p): p for p in prompts}.values())
    longest = max(map(len, tokenizer.encode_prompts(distinct)))
    return longest, max(map(len, tokens))


def annotated(
    pool: Pool,
    tokenizer: Tokenizer,
    fn: Callable[[Any, Any, tuple[Batch, jax.Array]], Mapping[str, jax.Array]],
    static: Any,
    whole: Any,
    *,
    batch: int,
) -> dict[str, np.ndarray]:
    """What `fn(static, whole, (rows, keys))` says of every token of the pool's completions: name -> array [n, N] that
    `with_` takes and `batches` pads no further, N being the length of the longest completion.

    Args:
      fn, static, whole: see `layout.run_rows`. rows: those of `batches`, in the order of the pool.
      batch: rows of a compiled batch.
    """
    prompt, new = _lengths(pool, tokenizer)
    rows = Completions(Source("the pool", "all", pool), tokenizer, prompt, new)
    found: list[Mapping[str, np.ndarray]] = []
    with layout.split_activations(layout.mesh_of(whole)):
        for at in range(0, len(pool), batch):
            part = [rows[i] for i in range(at, min(at + batch, len(pool)))]
            full = {name: np.stack([r[name] for r in part + part[:1] * (batch - len(part))]) for name in part[0]}
            keys = rng.per_example(jax.random.key(0), full["ids"])
            out = layout.run_rows(fn, static, whole, (full, keys))
            found.append({name: np.asarray(x)[: len(part)] for name, x in out.items()})
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def read(
    lm: LM, params: Params, batch: Mapping[str, Any], keys: jax.Array, control: Control = IDENTITY, cond: Any = None
) -> Read:
    """The prompts and completions of a batch, read through exactly the hooks of `generate`; `positions.reduced` gives
    what a loss needs of the logits."""
    prompts = Prompts(batch["tokens"], batch["mask"], keys, cond)
    return reading.read(lm, params, prompts, batch["completion"], control)


def nats(
    lm: LM, params: Params, batch: Mapping[str, Any], keys: jax.Array, control: Control, name: str, real: str
) -> jax.Array:
    """-log p float32 [B, N] of each token of the completions `batch[name]`, 0 where `batch[real]` is False; of a pair,
    one completion at a time."""
    text = read(lm, params, {**batch, "completion": batch[name]}, keys, control)
    return jnp.where(batch[real], reduced(text, losses.next_token, batch[name]), 0.0)


def repeats(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """(tokens int [B, T + N], candidates bool [B, N, T + N]) for `losses.unlikelihood`: what prompt and completion have
    held before each token of the completion."""
    tokens = jnp.concatenate([batch["tokens"], batch["completion"]], axis=1)
    mask = jnp.concatenate([batch["mask"], batch["written"]], axis=1)
    return tokens, losses.earlier_tokens(tokens, mask, batch["completion"].shape[1])


def log_probabilities(
    lm: LM, params: Params, pool: Pool, tokenizer: Tokenizer, control: Control = IDENTITY, *, batch: int = 32
) -> np.ndarray:
    """The log-probability of each completion of a pool under a control, float64 [n]; see
    `ctg_jax.evaluation.likelihood`."""
    heads = tokenizer.encode_prompts(pool.prompts())
    return evaluation.log_probabilities(lm, params, tokenizer, heads, pool.column("tokens"), control, batch=batch)
