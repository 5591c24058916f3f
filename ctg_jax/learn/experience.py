"""One round of samples for a method that learns from them: `explore` draws samples and scores them, `score` is the
stage of scoring, and `best` keeps the best of every n samples. The rounds are in `ctg_jax.learn.rounds`, the records in
`ctg_jax.learn.pool`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctg_jax import evaluation, rng
from ctg_jax.data.messages import has_messages, prompt_of
from ctg_jax.io import dumps, loads
from ctg_jax.learn import calibrate
from ctg_jax.learn.pool import POOL, STATES, Pool
from ctg_jax.run import stage
from ctg_jax.run.stage import Artifact, Run
from ctg_jax.stages import sampling
from ctg_jax.stages.judges import open_judge
from ctg_jax.types import InputError


def explore(
    root: Any,
    *,
    lm: Artifact,
    data: Artifact,
    rewards: Sequence[Artifact],
    control: Artifact | None = None,
    strength: float | None = None,
    round: int = 0,
    states: bool = False,
    feedback: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Artifact:
    """Draws samples of the prompts in `data` under a control (None: the frozen model) and scores them.

    The artifact is one file of a pool.

    Args:
      strength: of the control; None: as fitted.
      round: the number of this round. states, feedback: see `score`.
      seed: of all rounds; each draws with one derived from it.
      **settings: of `ctg_jax.stages.sampling.sample`, such as n and max_new.
    """
    drawn = rng.derived_seed(seed, "explore", round)
    settings = {**settings, "seed": drawn, "strengths": [] if control is None else [strength]}
    controls = [] if control is None else [control]
    samples = stage.stage(root, sampling.sample, settings, lm=lm, prompts=data, controls=controls)
    given = dict(samples=samples, rewards=list(rewards), lm=lm, controls=controls)
    return stage.stage(root, score, {"round": round, "states": states, "feedback": feedback}, **given)


@stage.stage_function("score", revision=1, how=("batch",))
def score(
    run: Run,
    *,
    samples: Artifact,
    rewards: Sequence[Artifact],
    lm: Artifact,
    controls: Sequence[Artifact] = (),
    round: int = 0,
    states: bool = False,
    feedback: bool = False,
    batch: int = 256,
) -> None:
    """Stage: writes pool.parquet, for each sample its prompt_id, sample, round, prompt (and messages, where it is a
    conversation), text, tokens, `logp` under what drew it, `base` (its log-probability under the frozen model),
    `reward` (by the first of the rewards) and reward_<name> by each of them. spec.json records under `drawn` whether
    the samples are greedy and their filter.

    Both log-probabilities come from one function, which reads whole texts, so that their difference is 0 where nothing
    was changed. That of the sampler, which reads token by token, differs from both by the rounding of bfloat16; it is
    kept as `logp` where a control reads more than the tokens of the prompt, and where the texts were not drawn after
    these prompts under `controls`, such as revised ones (`ctg_jax.learn.revision.restored`).

    Args:
      controls: those under which the samples were drawn, in the order of the stage `sample`.
      states: whether to keep the frozen model's final states at every token as well, for methods that read it again
        (`pool.States`): 4 bytes for each of its dimensions and each token.
      feedback: whether pool.parquet has `feedback` too, what the first reward says in words is wrong with a sample.

    Equal texts after equal prompts are scored once. An interrupted stage continues after the last batch it scored.

    Raises:
      InputError: no reward, or one without `explain` that is asked for feedback; samples without log-probabilities, or
        drawn by a strategy without a likelihood; what a reward raises, such as a score that is not finite (what was
        scored is kept).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rewards:
        raise InputError("no reward was given: expected at least one scorer")
    rows = samples.rows("samples.jsonl")
    if any("logp" not in r for r in rows):
        raise InputError(f"{samples.path.name} has no log-probabilities: expected samples that the stage `sample` drew")
    if not samples.spec.get("likelihood", True):
        raise InputError(
            f"what drew {samples.path.name} gives no text a likelihood, which learning from samples needs: draw them "
            "with a method that decodes token by token"
        )
    judges = [open_judge(r) for r in rewards]
    names = [j.name for j in judges]
    if len(set(names)) < len(names):
        raise InputError(f"the rewards are called {names}: give each a name of its own")
    if feedback and not hasattr(judges[0], "explain"):
        raise InputError(
            f"feedback is asked for, and the reward {names[0]!r} says nothing of a text: give it `explain`"
        )
    scores = _scored(run, rows, judges, batch)
    prompts, how = [prompt_of(r) for r in rows], samples.spec["config"]
    model = stage.open_lm(lm)
    heads, tails = model[2].encode_prompts(prompts), [r["tokens"] for r in rows]
    kept = _Kept(run.path / f".{STATES}", tails, model[0].width) if states else None
    nats, _ = evaluation.LMScorer(*model).ids(heads, tails, kept)
    logp = np.asarray([r["logp"] for r in rows])
    rule = {name: how.get(name) or default for name, default in (("filter", {}), ("truncate_first", False))}
    drew = samples.spec["stage"] == "sample" and samples.spec["inputs"].get("controls", []) == [c.id for c in controls]
    if drew and not controls and not rule["filter"]:
        logp = -nats
    elif drew and not sampling.conditions(controls, lm, prompts[:1]):
        drawing = sampling.build(lm, controls, how.get("strengths") or (), **rule)
        logp = -evaluation.LMScorer(*model, control=drawing).ids(heads, tails)[0]
    table = {key: [r[key] for r in rows] for key in ("prompt_id", "sample", "prompt", "text", "tokens")}
    if any(map(has_messages, rows)):
        table["messages"] = [r.get("messages") for r in rows]
    table |= {
        "logp": logp.tolist(),
        "round": [round] * len(rows),
        "base": (-nats).tolist(),
        "reward": scores[:, 0].tolist(),
    }
    table |= {f"reward_{name}": scores[:, i].tolist() for i, name in enumerate(names)}
    if feedback:
        table["feedback"] = judges[0].explain(table["prompt"], table["text"])
    if kept is not None:
        kept.replace(run.path / STATES)
    new = run.path / f".{POOL}"
    pq.write_table(pa.table(table), new)
    new.replace(run.path / POOL)
    run.discard("scores.partial")
    size = sum(len(r["tokens"]) for r in rows)
    far = float(logp.sum() + nats.sum())
    figures = {f"reward_{name}": float(scores[:, i].mean()) for i, name in enumerate(names)}
    shares = {f"share_{j.name}": float((scores[:, i] >= j.threshold).mean()) for i, j in enumerate(judges)}
    run.log(round=round, samples=len(rows), tokens=size, kl_per_token=far / size, **figures, **shares)
    drawn = {"greedy": bool(how.get("greedy")), "filter": sampling.truncation(how.get("filter"))}
    run.record(rewards={j.name: j.version for j in judges}, drawn=drawn)


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
    kept = ("prompt_id", "prompt", "messages", "text", "tokens", "reward")
    rows = ({key: r[key] for key in kept if key in r} | {"sample": r["sample"] // n} for r in rows)
    stage.write_jsonl(run.path / "samples.jsonl", rows)
    run.record(kl_bound=calibrate.best_of_n_kl(n), likelihood=False)


class _Kept:
    """A file of final states float32 [tokens, D], one completion after the other, which is written a row at a time."""

    def __init__(self, path: Path, tails: Sequence[Sequence[int]], width: int):
        self.path, self.ends = path, np.cumsum([len(t) for t in tails])
        self.rows = np.lib.format.open_memmap(path, "w+", np.float32, (max(1, int(self.ends[-1])), width))

    def __call__(self, i: int, states: np.ndarray) -> None:
        self.rows[self.ends[i] - len(states) : self.ends[i]] = states

    def replace(self, path: Path) -> None:
        """Gives the whole file its name."""
        self.rows.flush()
        self.path.replace(path)


def _scored(run: Run, rows: list[dict[str, Any]], judges: Sequence[Any], batch: int) -> np.ndarray:
    """Scores float64 [n, rewards]; each batch is written to disk before the next one is scored."""
    from tqdm import tqdm

    distinct = list(dict.fromkeys((r["prompt"], r["text"]) for r in rows))
    partial = run.path / "scores.partial"
    done: list[list[float]] = []
    if partial.exists():
        for line in partial.read_bytes().split(b"\n"):
            found = loads(line[9:]) if line[:8].decode("latin-1") == _check(line[9:]) else None
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
    text = dumps(scores, allow_nan=True)
    return f"{_check(text.encode())} {text}\n"


def _check(text: bytes) -> str:
    return f"{zlib.crc32(text):08x}"
