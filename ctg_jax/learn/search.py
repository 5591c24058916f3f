"""Search: of several candidates that a language model writes, those that a reward or a critic prefers, looked at when
they are whole or after every few tokens; and beam search, which prefers the likeliest.

| plan | what it is |
|---|---|
| n | the best of n (Stiennon et al. 2020) |
| n, accept | the first of n that is good enough, and the best where none is: rejection |
| n, temperature | one of n, drawn ∝ exp(value / temperature): for large n from p(y) exp(value / temperature) / Z |
| n, segment | the best of n blocks of `segment` tokens, again and again: controlled decoding (Mudgal et al. 2024) |
| n, beams, segment | the best beams go on after every few tokens, each in n ways (RankGen, Krishna et al. 2022) |
| beams, penalty | beam search, without a reward |

Controlled decoding asks a critic (`methods.critic`) for V of the tokens so far; its KL to the base is at most log n -
(n - 1) / n nats for each block. With segment 1 and a large n it tends to the token-wise form, ∝ p exp(V / temperature).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ctg_jax import io, methods, rng
from ctg_jax.control import IDENTITY, Control
from ctg_jax.controls import constraints
from ctg_jax.data.messages import Messages, prompt_of, shown
from ctg_jax.data.tokenizer import to_prompts
from ctg_jax.decode import loop, strategies
from ctg_jax.decode.beam import beam_search
from ctg_jax.decode.checks import check_finite
from ctg_jax.io import dumps, json_line, loads, write_text
from ctg_jax.learn import calibrate
from ctg_jax.learn.critics import Watch
from ctg_jax.run.stage import Artifact, Run, stage_function, write_jsonl
from ctg_jax.stages import sampling
from ctg_jax.stages.judges import open_judge
from ctg_jax.stages.sampling import Options
from ctg_jax.types import InputError

PARTIAL = "values.partial"  # lines of prompt, text and value, while a stage runs
Value = Callable[[Sequence[str], Sequence[str]], Any]  # a reward: (prompts, texts so far) -> numbers [n]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How candidates are drawn and chosen: the section `plan` of a configuration.

    Attributes:
      n: candidates drawn from each beam.
      beams: kept after each look.
      segment: tokens between two looks; 0: the whole completion.
      accept: take the first candidate with at least this value, where there is one.
      temperature: 0, keep the best; else beams are drawn without replacement ∝ exp(value / temperature).
      likelihood: the weight of the mean log-probability per token, nats, beside the value.
      penalty: of beam search, whose score is the log-probability over (tokens) ^ penalty; None: a reward chooses.
    """

    n: int = 10
    beams: int = 1
    segment: int = 0
    accept: float | None = None
    temperature: float = 0.0
    likelihood: float = 0.0
    penalty: float | None = None

    def check(self, rewards: int) -> None:
        """
        Raises:
          InputError: numbers out of their range, settings that cannot be combined, beam search with a reward, or
            another plan without one; `rewards` is their number, a critic included.
        """
        if self.n < 1 or self.beams < 1 or self.segment < 0 or self.temperature < 0:
            raise InputError(
                f"plan has n={self.n}, beams={self.beams}, segment={self.segment} and temperature={self.temperature}: "
                "expected at least 1, 1, 0 and 0."
            )
        if self.penalty is not None:
            if rewards or self != Plan(n=self.n, beams=self.beams, penalty=self.penalty):
                raise InputError(
                    "plan has a penalty, which makes it beam search: it has only beams beside it, and no rewards."
                )
            return
        if rewards != 1:
            raise InputError(f"a search chooses by one reward or critic, not {rewards}: set penalty for beam search.")
        if self.beams > 1 and not self.segment:
            raise InputError(f"plan has beams={self.beams} without a segment, which are only more candidates: set n.")
        if self.accept is not None and (self.beams > 1 or self.temperature):
            raise InputError("plan has accept with beams or a temperature: expected it alone, with n and segment.")

    @property
    def rows(self) -> int:
        """The rows that one completion takes."""
        return self.beams if self.penalty is not None else self.beams * self.n


def search(
    model: Any,
    params: Any,
    tokenizer: Any,
    texts: Sequence[str | Messages],
    value: Value | Control | None,
    control: Control = IDENTITY,
    *,
    plan: Plan = Plan(),
    options: Options = Options(),  # noqa: B008 (frozen)
    cond: Mapping[str, np.ndarray] | None = None,
    skip: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """Yields batches of the records of `sampling.sample`, `options.n` completions of each text, in order, without
    `logp`: that of a text is not that of the best of several. `value` is that of the text, `candidates` how many whole
    ones it was chosen from, and `drawn` the tokens that were drawn for it. Equal texts of a prompt have one value.

    The candidates of a completion are the samples that `sampling.complete` draws with a larger n: candidate c of
    sample j is sample j · beams · n + c, so that the best of n is the best of those. A beam that has ended competes
    once. After a look the first copy of a beam draws on with its own random numbers, the others with new ones.

    Args:
      model, params, tokenizer: as of `sampling.complete`.
      value: scores of prompts and texts so far, higher is better; or a critic, whose values of the tokens so far they
        are (`critics.Watch`); None for beam search.
      plan: how to search. options: n, max_new, batch (rows) and seed.
      cond: entries of `prompts.cond`, name -> array with a row for each text.
      skip: leave out this many completions at the beginning, a multiple of `batch_of(plan, options, texts)`.

    Raises:
      InputError: what `Plan.check` and `sampling.check_prompts` raise; a control that replaces the decode loop; a value
        that is no finite number for each candidate.
    """
    plan.check(int(value is not None))
    if strategies.of(control) is not strategies.PLAIN:
        raise InputError(
            f"{type(control).__name__} completes prompts in place of the decode loop, which a search pauses: use sample"
        )
    sampling.check_prompts(model, tokenizer, texts, options.max_new, control)
    control = constraints.only(tokenizer.known(model.vocab), control)
    value = Watch(value, model, params) if isinstance(value, Control) else value
    work = [(i, j) for i in range(len(texts)) for j in range(options.n)]
    heads, groups = tokenizer.encode_prompts(texts), batch_of(plan, options, texts)
    words = _Words(tokenizer, texts, heads)
    for at in range(skip, len(work), groups):
        part = work[at : at + groups]
        full = part + [part[0]] * (groups - len(part))
        each = 1 if plan.penalty is not None else plan.rows
        ids = [(i, j * plan.rows + c) for i, j in full for c in range(each)]
        rows = [i for i, _ in ids]
        own = {name: values[rows] for name, values in cond.items()} if cond else None
        prompts = to_prompts(
            tokenizer, [texts[i] for i in rows], options.seed, ids=ids, length=max(map(len, heads)), cond=own
        )
        started = time.monotonic()
        decoder = (model, params, prompts, control, options.sampling(tokenizer))
        if plan.penalty is not None:
            best = [h[0] for h in beam_search(*decoder, beams=plan.beams, penalty=plan.penalty)]
            size = plan.beams * max(len(h.tokens) for h in best)
            found = [(h.tokens, round(h.score, 5), plan.beams, size) for h in best]
        else:
            found = _looked(decoder, full, words, value, plan, options.seed)
        seconds = (time.monotonic() - started) / len(part)
        yield [
            {
                "prompt_id": i,
                "sample": j,
                "prompt": shown(texts[i]),
                **({} if isinstance(texts[i], str) else {"messages": texts[i]}),
                "text": words.text(i, tokens),
                "tokens": list(tokens),
                "value": score,
                "candidates": candidates,
                "drawn": drawn,
                "seconds": seconds,
            }
            for (i, j), (tokens, score, candidates, drawn) in zip(part, found)
        ]


def batch_of(plan: Plan, options: Options, texts: Sequence[Any]) -> int:
    """The number of completions that are searched for at once: those whose candidates fill a batch of rows."""
    return min(max(1, options.batch // plan.rows), len(texts) * options.n)


class _Words:
    """The texts of tokens behind prompts."""

    def __init__(self, tokenizer: Any, texts: Sequence[str | Messages], heads: Sequence[Sequence[int]]):
        self.tokenizer, self.heads, self.shown = tokenizer, heads, [shown(t) for t in texts]

    def text(self, prompt: int, tokens: Sequence[int]) -> str:
        body = self.tokenizer.before_end(tokens)
        return self.tokenizer.decode_after([self.heads[prompt]], [body])[0]


def _looked(decoder, work, words, value, plan: Plan, seed: int) -> list[tuple]:
    """(tokens, value, whole candidates, tokens drawn) of the completion that each (prompt, sample) of `work` gets."""
    model, params, prompts, control, drawing = decoder
    d, keys = loop.begin(model, params, prompts, control, drawing), prompts.keys
    steps, rows, look = plan.segment or drawing.max_new, plan.rows, 0
    known: dict[tuple[int, str], float] = {}
    copies, drawn = np.zeros(len(prompts.tokens), bool), np.zeros(len(work), int)
    before = np.zeros(len(prompts.tokens), int)
    valued = value.begin(prompts, drawing.max_new, steps) if isinstance(value, Watch) else None
    while True:
        d = loop.extend(model, params, d, keys, control, drawing, steps)
        check_finite(d.logp)
        tokens, mask, logp = (np.asarray(x) for x in (d.tokens, d.mask, d.logp))
        sizes, ended = mask.sum(1), np.asarray(d.done)
        drawn += (sizes - before).reshape(len(work), rows).sum(1)
        if isinstance(value, Watch):
            valued = value.read(valued, tokens, mask, look, steps)
            values = np.asarray(valued.v, np.float64)
        else:
            texts = [words.text(work[r // rows][0], tokens[r, :size].tolist()) for r, size in enumerate(sizes)]
            values = _valued(value, [work[r // rows][0] for r in range(len(texts))], texts, words.shown, known)
        scores = values + plan.likelihood * logp.sum(1) / np.maximum(sizes, 1)
        scores = np.where(copies, -np.inf, scores).reshape(len(work), rows)
        last = int(d.t) >= drawing.max_new or bool(ended.all())
        keep = 1 if last else plan.beams
        chosen = [_chosen(s, keep, plan, seed, (*work[g], look)) for g, s in enumerate(scores)]
        if last:
            at = [g * rows + best[0] for g, best in enumerate(chosen)]
            sound = (~copies).reshape(len(work), rows).sum(1)
            return [
                (tuple(tokens[r, : sizes[r]].tolist()), float(values[r]), int(sound[g]), int(drawn[g]))
                for g, r in enumerate(at)
            ]
        index = np.concatenate([np.repeat(g * rows + best, plan.n) for g, best in enumerate(chosen)])
        d, keys, valued = loop.choose((d, keys, valued), index)
        copies = np.tile(np.arange(plan.n) > 0, len(index) // plan.n) & ended[index]
        keys, before = _renewed(keys, look, plan.n), sizes[index]
        look += 1


def _valued(
    value: Value,
    prompts: Sequence[int],
    texts: Sequence[str],
    shown: Sequence[str],
    known: dict[tuple[int, str], float],
) -> np.ndarray:
    """float64 [n]: the value of each text behind its prompt; `known` holds what was asked for before."""
    new = [pair for pair in dict.fromkeys(zip(prompts, texts)) if pair not in known]
    if new:
        found = np.asarray(value([shown[i] for i, _ in new], [text for _, text in new]), np.float64)
        if found.shape != (len(new),):
            raise InputError(f"the value of {len(new)} candidates has shape {found.shape}, expected a number for each.")
        if len(bad := np.flatnonzero(~np.isfinite(found))):
            raise InputError(
                f"the value of {len(bad)} of {len(new)} candidates is not finite, first {found[bad[0]]} for "
                f"{new[bad[0]][1][:60]!r}: expected a finite number for every text."
            )
        known |= zip(new, found.tolist())
    return np.asarray([known[pair] for pair in zip(prompts, texts)])


def _chosen(scores: np.ndarray, keep: int, plan: Plan, seed: int, where: tuple[int, int, int]) -> np.ndarray:
    """The places int [keep] of the candidates of one completion that go on; -inf marks what does not compete. Where
    fewer compete, the best is kept several times."""
    if plan.accept is not None and np.any(scores >= plan.accept):
        return np.flatnonzero(scores >= plan.accept)[:1]
    if plan.temperature:
        generator = np.random.default_rng([rng.derived_seed(seed, "search"), *where])
        scores = scores / plan.temperature + generator.gumbel(size=scores.shape)
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])][:keep]
    return np.concatenate([order, np.repeat(order[:1], keep - len(order))])


def _renewed(keys: jax.Array, look: int, n: int) -> jax.Array:
    """The keys [B] of beams that stand n times each: the first copy keeps its own, the others get new ones."""
    numbers = np.tile(np.arange(n), len(keys) // n)
    new = jax.vmap(lambda key, j: jax.random.fold_in(jax.random.fold_in(key, look), j))(keys, numbers)
    data = np.where((numbers == 0)[:, None], jax.random.key_data(keys), jax.random.key_data(new))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))


def kept(value: Value, path: Path) -> Value:
    """The same values, each of which is on disk before the next are asked for."""
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []  # the last line may be half a line
    known = {(prompt, text): score for prompt, text, score in map(loads, lines)}
    write_text(path, "".join(line + "\n" for line in lines))

    def asked(prompts, texts):
        pairs = list(zip(prompts, texts))
        if new := [pair for pair in pairs if pair not in known]:
            scores = np.asarray(value([p for p, _ in new], [t for _, t in new]), np.float64).tolist()
            with open(path, "a", encoding="utf-8") as f:
                f.write("".join(dumps([*pair, score]) + "\n" for pair, score in zip(new, scores, strict=True)))
            known.update(zip(new, scores))
        return [known[pair] for pair in pairs]

    return asked


@stage_function("searched", how=("batch",))
def searched(
    run: Run,
    *,
    lm: Artifact,
    prompts: Artifact,
    rewards: Sequence[Artifact] = (),
    controls: Sequence[Artifact] = (),
    strengths: Sequence[float | None] = (),
    filter: Mapping[str, Any] | None = None,
    plan: Plan = Plan(),
    n: int = 1,
    max_new: int = 20,
    batch: int = 64,
    seed: int = 0,
) -> None:
    """Stage: writes samples.jsonl, `n` completions of every prompt that a search found; see `search` for the records.

    An interrupted stage continues after its last whole batch. No text is scored twice after the same prompt.

    Args:
      lm, prompts, controls, strengths, filter, n, max_new, batch, seed: as of `sampling.sample`.
      rewards: the scorer that chooses, or a fitted critic; none for beam search.
      plan: how to search.

    Raises:
      InputError: what `search` and `sampling.build` raise.
    """
    records = prompts.rows("data.jsonl")
    texts = [prompt_of(r) for r in records]
    plan.check(len(rewards))
    judge = rewards[0] if rewards else None
    if judge is not None:
        critic = "method" in judge.spec
        judge = methods.load(judge, sampling.opened(lm)[0]) if critic else kept(open_judge(judge), run.path / PARTIAL)
    control = sampling.build(lm, controls, strengths, filter)
    options = Options(n=n, max_new=max_new, batch=batch, seed=seed)
    partial, size = run.path / "partial.jsonl", batch_of(plan, options, texts)
    rows, cond = io.whole_batches(partial, size, len(texts) * n), sampling.conditions(controls, lm, texts, records)
    more = dict(plan=plan, options=options, cond=cond, skip=len(rows))
    found = search(*sampling.opened(lm), texts, judge, control, **more)
    with open(partial, "a", encoding="utf-8") as f:
        for new in found if len(rows) < len(texts) * n else ():
            for row in new:
                row |= sampling.carried(records[row["prompt_id"]])
            f.write("".join(map(json_line, new)))
            f.flush()
            rows += new
    write_jsonl(run.path / "samples.jsonl", rows)
    run.discard(partial.name, PARTIAL)
    looks, plain = -(-max_new // (plan.segment or max_new)), plan == Plan(n=plan.n, segment=plan.segment)
    bound = looks * calibrate.best_of_n_kl(plan.n) if plain else None
    run.record(likelihood=False, kl_bound=bound, drawn=sum(row["drawn"] for row in rows))
