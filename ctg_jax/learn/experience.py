"""The experience loop: prompts → sample → score → pool → reduce → learn, the inside of every method that learns from
what a model writes. Sampling, scoring and learning are stages; a method's stage of learning begins by reducing the
pool, and methods differ in how they reduce it and in what they learn from it.

The pool is the sequence of what `score` wrote, a Parquet file for each round: a new round adds a file and copies none.
Only batches reach a device.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import evaluation, rng
from ctg_jax.control import IDENTITY, Chain, Control
from ctg_jax.controls import constraints
from ctg_jax.data import Source
from ctg_jax.data.completions import Completions, completions
from ctg_jax.data.pipeline import Batches
from ctg_jax.data.tokenizer import Tokenizer
from ctg_jax.decode import loop
from ctg_jax.learn import calibrate, losses
from ctg_jax.methods.logits import truncate
from ctg_jax.models.lm import LM
from ctg_jax.run import stage
from ctg_jax.run.stage import Artifact, Run
from ctg_jax.stages import sampling
from ctg_jax.stages.judges import open_judge
from ctg_jax.types import InputError, Params, Prompts

POOL = "pool.parquet"
# Filters that leave every token a probability, and with them those that remove tokens whatever their probabilities are.
POSITIVE = ("temperature", "repetition_penalty")
FIXED = (*POSITIVE, "banned", "min_length", "eos", "no_repeat_ngram")


def explore(
    root: Any,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact],
    control: Artifact | None = None,
    strength: float | None = None,
    round: int = 0,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Samples of the prompts in `data` under a control (None: the frozen model), scored: one more file of the pool.

    Args:
      strength: of the control; None: as fitted.
      round: number of this file. seed: of all rounds; each draws with a seed derived from it.
      **settings: of `ctg_jax.stages.sampling.sample`, such as n and max_new.
    """
    drawn = rng.derived_seed(seed, "explore", round)
    settings = {**settings, "seed": drawn, "strengths": [] if control is None else [strength]}
    controls = [] if control is None else [control]
    samples = stage.stage(root, sampling.sample, settings, lm=lm, prompts=data, controls=controls)
    return stage.stage(root, score, {"round": round}, samples=samples, rewards=list(rewards), lm=lm)


@stage.stage_function("score", how=("batch",))
def score(
    run: Run, *, samples: Artifact, rewards: Sequence[Artifact], lm: Artifact, round: int = 0, batch: int = 256
) -> None:
    """Stage: writes pool.parquet, for each sample its prompt_id, sample, round, prompt, text, tokens, `logp` under what
    drew it, `base` (its log-probability under the frozen model), `reward` (by the first of the rewards) and
    reward_<name> by each of them. spec.json records under `drawn` whether the samples are greedy and their filter.

    Equal texts after equal prompts are scored once, and so is everything else: an interrupted stage goes on behind
    its last batch.

    Raises:
      InputError: no reward; samples without log-probabilities; what a reward raises, such as a score that is not finite
        (what was scored is kept).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rewards:
        raise InputError("no reward was given: expected at least one scorer")
    rows = samples.rows("samples.jsonl")
    if any("logp" not in r for r in rows):
        raise InputError(f"{samples.path.name} has no log-probabilities: expected samples that `flow.sample` drew")
    judges = [open_judge(r) for r in rewards]
    names = [j.name for j in judges]
    if len(set(names)) < len(names):
        raise InputError(f"the rewards are called {names}: give each a name of its own")
    scores = _scored(run, rows, judges, batch)
    base = evaluation.LMScorer(*stage.open_lm(lm))
    nats, _ = base.ids(base.tokenizer.encode_prompts([r["prompt"] for r in rows]), [r["tokens"] for r in rows])
    table = {key: [r[key] for r in rows] for key in ("prompt_id", "sample", "prompt", "text", "tokens", "logp")}
    table |= {"round": [round] * len(rows), "base": (-nats).tolist(), "reward": scores[:, 0].tolist()}
    table |= {f"reward_{name}": scores[:, i].tolist() for i, name in enumerate(names)}
    new = run.path / f".{POOL}"
    pq.write_table(pa.table(table), new)
    new.replace(run.path / POOL)
    run.discard("scores.partial")
    size = sum(len(r["tokens"]) for r in rows)
    far = sum(r["logp"] for r in rows) + float(nats.sum())
    figures = {f"reward_{name}": float(scores[:, i].mean()) for i, name in enumerate(names)}
    shares = {f"share_{j.name}": float((scores[:, i] >= j.threshold).mean()) for i, j in enumerate(judges)}
    run.log(round=round, samples=len(rows), tokens=size, kl_per_token=far / size, **figures, **shares)
    how = samples.spec["config"]
    drawn = {"greedy": bool(how.get("greedy")), "filter": dict(how.get("filter") or {})}
    run.record(rewards={j.name: j.version for j in judges}, drawn=drawn)


def check_drawn(drawn: Mapping[str, Any], what: str, allowed: Collection[str] | None = ()) -> None:
    """InputError where samples that were drawn in this way are not what a method may take them for.

    Args:
      drawn: `greedy` and `filter`, as in the settings of `explore` and in what `score` records.
      what: the method or setting that reads their log-probabilities.
      allowed: options of the filter that it takes into account; None: all of them.
    """
    if drawn.get("greedy"):
        raise InputError(f"{what} needs samples with a probability, but explore has greedy=True: set it to False")
    wrong = [] if allowed is None else [k for k, v in (drawn.get("filter") or {}).items() if v and k not in allowed]
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
    return jax.tree.map(jnp.asarray, truncate.init(lm, **first))


@stage.stage_function("best_of")
def best(run: Run, *, scored: Artifact, n: int = 4) -> None:
    """Stage: writes samples.jsonl, the best of every n samples of each prompt by the reward: the reference that needs
    no training (Stiennon et al. 2020). They have no `logp`: that of a sample among n is not that of the best of them.

    Raises:
      InputError: n below 1, or one that does not divide the number of samples of each prompt.
    """
    pool = Pool.open([scored])
    count = int(pool.column("sample").max()) + 1
    if n < 1 or count % n:
        raise InputError(f"n is {n}, expected a divisor of {count}, the samples of each prompt")
    groups = pool.column("prompt_id") * (count // n) + pool.column("sample") // n
    rows = (pool[int(i)] for i in calibrate.best_of(pool.column("reward"), groups))
    kept = ("prompt_id", "prompt", "text", "tokens", "reward")
    stage.write_jsonl(
        run.path / "samples.jsonl", [{key: r[key] for key in kept} | {"sample": r["sample"] // n} for r in rows]
    )
    run.record(kl_bound=calibrate.best_of_n_kl(n), likelihood=False)


def _scored(run: Run, rows: list[dict[str, Any]], judges: Sequence[Any], batch: int) -> np.ndarray:
    """Scores float64 [n, rewards]; each batch is on disk before the next is asked for."""
    from tqdm import tqdm

    distinct = list(dict.fromkeys((r["prompt"], r["text"]) for r in rows))
    partial = run.path / "scores.partial"
    done: list[list[float]] = []
    if partial.exists():
        for line in partial.read_bytes().split(b"\n"):
            found = json.loads(line[9:]) if line[:8].decode("latin-1") == _check(line[9:]) else None
            if not found:
                break  # half a line, or a damaged one: what follows is scored again
            done.append(found)
        stage.write_text(partial, "".join(map(_line, done)))
    bar = tqdm(total=len(distinct), initial=len(done), desc=run.path.name, unit="text", disable=None, leave=False)
    with open(partial, "a", encoding="utf-8") as f, bar:
        for at in range(len(done), len(distinct), batch):
            prompts, texts = zip(*distinct[at : at + batch])
            new = np.stack([j(list(prompts), list(texts)) for j in judges], axis=1).astype(float).tolist()
            f.write("".join(map(_line, new)))
            f.flush()
            done += new
            bar.update(len(new))
    at = {pair: i for i, pair in enumerate(distinct)}
    return np.asarray([done[at[r["prompt"], r["text"]]] for r in rows])


def _line(scores: list[float]) -> str:
    text = json.dumps(scores)
    return f"{_check(text.encode())} {text}\n"


def _check(text: bytes) -> str:
    return f"{zlib.crc32(text):08x}"


def adapted(coefficient: float, pool: Artifact, target: float) -> float:
    """A KL coefficient for the next round: larger where the samples of a round lie further from the base than `target`,
    nats per token, and smaller where they lie nearer, by a fifth at most (the proportional controller of Ziegler et al.
    2019, with a gain of 1 since it acts once a round and theirs, of 0.1, at every batch). The samples must be those of
    the policy alone (`check_drawn`): under a filter they are far from the base before anything is learned."""
    error = pool.metrics()[0]["kl_per_token"] / target - 1
    return coefficient * (1 + min(max(error, -0.2), 0.2))


def history(control: Artifact) -> list[Artifact]:
    """The rounds of samples that a control learned from, itself and those before it, oldest first."""
    found: dict[str, Artifact] = {}
    while control is not None:
        inputs = control.spec["inputs"]
        ids = inputs.get("pool") or []
        for id in [ids] if isinstance(ids, str) else ids:
            found[id] = stage.open_artifact(control.path.with_name(f"score-{id}"))
        before = inputs.get("start_from")
        name = control.path.name.rpartition("-")[0]
        control = None if before is None else stage.open_artifact(control.path.with_name(f"{name}-{before}"))
    return sorted(found.values(), key=lambda a: a.spec["config"]["round"])


@stage.stage_function("rounds")
def rounds(run: Run, *, pools: Sequence[Artifact], seed: int = 0, resamples: int = 1000) -> None:
    """Stage: what each round sampled, as rows of metrics.jsonl with round, name, value, low, high, n: the reward, KL to
    the base in nats per token, perplexity under the base, dist-2."""
    for artifact in pools:
        pool = Pool.open([artifact])
        boot = evaluation.Bootstrap(pool.column("prompt_id"), seed=seed, resamples=resamples)
        texts = pool.column("text").tolist()
        size = np.asarray([len(t) for t in pool.column("tokens")], np.float64)
        base = pool.column("base").astype(np.float64)
        figures = {
            "reward": boot.mean(pool.column("reward")),
            "KL to base": boot.ratio(pool.column("logp") - base, size),
            "perplexity": boot.transform(lambda x, n: np.exp(x / n), -base, size),
            "dist-2": boot.mean_of_prompts(lambda rows, t=texts: evaluation.distinct([t[i] for i in rows], 2)),
        }
        at = artifact.spec["config"]["round"]
        for name, figure in figures.items():
            run.log(round=at, name=name, **figure.as_json())


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

    def with_(self, **columns: np.ndarray) -> Pool:
        """The same records with more fields, each [n]."""
        return Pool(self._table, {**self._more, **columns})

    def take(self, indices: np.ndarray) -> Pool:
        """Some of the records."""
        return Pool(self._table.take(np.asarray(indices)), {k: v[indices] for k, v in self._more.items()})


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
    prompts = pool.column("prompt") if isinstance(pool, Pool) else [r["prompt"] for r in pool]
    tokens = pool.column(field) if isinstance(pool, Pool) else [r[field] for r in pool]
    longest = max(map(len, tokenizer.encode_prompts(list(dict.fromkeys(prompts)))))
    return longest, max(map(len, tokens))


def logits(
    lm: LM, params: Params, batch: Mapping[str, Any], keys: jax.Array, control: Control = IDENTITY, cond: Any = None
) -> jax.Array:
    """Controlled logits float32 [B, N, V] of the completions of a batch, through exactly the hooks of `generate`."""
    prompts = Prompts(batch["tokens"], batch["mask"], keys, cond)
    return loop.forward(lm, params, prompts, batch["completion"], control)


def repeats(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """(tokens int [B, T + N], candidates bool [B, N, T + N]) for `losses.unlikelihood`: what prompt and completion have
    said before each token of the completion."""
    tokens = jnp.concatenate([batch["tokens"], batch["completion"]], axis=1)
    mask = jnp.concatenate([batch["mask"], batch["written"]], axis=1)
    return tokens, losses.said_before(tokens, mask, batch["completion"].shape[1])


def log_probabilities(
    lm: LM, params: Params, pool: Pool, tokenizer: Tokenizer, control: Control = IDENTITY, *, batch: int = 32
) -> np.ndarray:
    """log-probability float64 [n] of each completion of a pool under a control, in its order."""
    rows = Completions(Source("the pool", "all", pool), tokenizer, *_lengths(pool, tokenizer))
    control = constraints.only(tokenizer.known(lm.vocab), control)
    out = np.zeros(len(pool))
    for at in range(0, len(pool), batch):
        some = [rows[min(i, len(pool) - 1)] for i in range(at, at + batch)]
        b = {name: np.stack([r[name] for r in some]) for name in some[0]}
        keys = rng.per_example(jax.random.key(0), jnp.asarray(b["ids"]))
        prompts = Prompts(jnp.asarray(b["tokens"]), jnp.asarray(b["mask"]), keys)
        completion, written = jnp.asarray(b["completion"]), jnp.asarray(b["written"])
        logp = loop.score(lm, params, prompts, completion, control, written)
        found = np.asarray(logp, np.float64).sum(1)
        out[at : at + batch] = found[: len(out) - at]
    return out
