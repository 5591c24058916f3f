"""Beam search: the likeliest whole completions that keeping a few partial ones finds (Graves 2012; Wu et al. 2016,
section 7, without the coverage penalty)."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ctg_jax.control import IDENTITY, Control
from ctg_jax.decode import loop
from ctg_jax.decode.checks import check_finite
from ctg_jax.models.lm import LM
from ctg_jax.support import REMOVED
from ctg_jax.types import InputError, Params, Prompts, Sampling


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A whole completion: its tokens with the one that ends it, their log-probabilities (nats), and its score, their
    sum over (number of tokens) ^ penalty."""

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    score: float


def beam_search(
    lm: LM,
    params: Params,
    prompts: Prompts,
    control: Control = IDENTITY,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    *,
    beams: int = 4,
    penalty: float = 1.0,
) -> list[list[Hypothesis]]:
    """The `beams` best completions of each prompt under `control`, best first; fewer where there are fewer.

    Every step keeps the `beams` likeliest partial completions of a prompt. Those of the `beams` likeliest extensions
    that end are whole, and a prompt is finished when it has `beams` whole ones and the likeliest partial one would not
    be better than the worst of them with the tokens that it has now; what is not whole after `max_new` tokens competes
    as it is. This is the rule of `transformers` with early_stopping=False, whose `length_penalty` is `penalty`. The
    keys of the prompts are not read, and `sampling.greedy` plays no part.

    Raises:
      InputError: beams below 1, and what `decode.generate` raises.
    """
    if beams < 1:
        raise InputError(f"beams is {beams}, expected at least 1.")
    count, new = len(prompts.tokens), sampling.max_new
    d = loop.begin(lm, params, loop.choose(prompts, np.repeat(np.arange(count), beams)), control, sampling)
    params, control = loop.ready(lm, params, control)
    live = [[_Partial((), (), 0.0)] for _ in range(count)]
    whole: list[list[Hypothesis]] = [[] for _ in range(count)]
    done = [False] * count
    most = beams * (1 + max(1, len(sampling.eos) + len(sampling.stop)))  # `beams` of them, at least, do not end
    for t in range(new):
        sums = np.full((count, beams), -np.inf, np.float32)
        for i, partials in enumerate(live):
            sums[i, : len(partials)] = [p.total for p in partials]
        check_finite(jnp.max(d.z, axis=1, keepdims=True))
        totals, rows, tokens = (np.asarray(x) for x in _likeliest(d.z, jnp.asarray(sums), beams, most))
        source, token = np.repeat(np.arange(count) * beams, beams), np.full(count * beams, sampling.pad)
        for i in range(count):
            if done[i]:
                continue
            kept = []
            for rank in range(totals.shape[1]):
                if not np.isfinite(totals[i, rank]):  # no partial completion, or a token that was removed
                    continue
                parent = live[i][rows[i, rank]]
                one = parent.with_(int(tokens[i, rank]), float(totals[i, rank]))
                if _ends(one.tokens, sampling):
                    if rank < beams:
                        whole[i].append(one.whole(penalty))
                elif len(kept) < beams:
                    place = i * beams + len(kept)
                    source[place], token[place] = i * beams + rows[i, rank], one.tokens[-1]
                    kept.append(one)
            whole[i] = sorted(whole[i], key=lambda h: -h.score)[:beams]
            live[i] = kept
            best = max((p.whole(penalty).score for p in kept), default=-np.inf)
            done[i] = not kept or (len(whole[i]) >= beams and best <= whole[i][-1].score)
        if all(done) or t + 1 == new:
            break
        d = _onward(lm, params, d, jnp.asarray(source), jnp.asarray(token, jnp.int32), control)
    for i in range(count):
        rest = [] if done[i] else [p.whole(penalty) for p in live[i]]
        whole[i] = sorted(whole[i] + rest, key=lambda h: -h.score)[:beams]
    return whole


@dataclasses.dataclass(frozen=True)
class _Partial:
    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    total: float

    def with_(self, token: int, total: float) -> _Partial:
        return _Partial((*self.tokens, token), (*self.logp, total - self.total), total)

    def whole(self, penalty: float) -> Hypothesis:
        return Hypothesis(self.tokens, self.logp, self.total / len(self.tokens) ** penalty)


def _ends(tokens: tuple[int, ...], sampling: Sampling) -> bool:
    return tokens[-1] in sampling.eos or any(tokens[-len(stop) :] == tuple(stop) for stop in sampling.stop)


@partial(jax.jit, static_argnames=("beams", "most"))
def _likeliest(z, sums, beams, most):
    """(totals, rows within a prompt, tokens), [G, most] each, of the likeliest extensions of sums [G, beams] by
    the tokens of z [G · beams, V], best first; -inf for what is impossible."""
    count, vocab = sums.shape[0], z.shape[-1]
    logp = jnp.where(z <= REMOVED / 2, -jnp.inf, jax.nn.log_softmax(z, axis=-1))
    every = (logp.reshape(count, beams, vocab) + sums[:, :, None]).reshape(count, beams * vocab)
    totals, at = lax.top_k(every, min(most, beams * vocab))
    return totals, at // vocab, at % vocab


@partial(jax.jit, static_argnames=("lm",))
def _onward(lm, params, d, source, token, control):
    """The rows `source` of a decoding, each with one more token that is written and read."""
    d = loop.choose(d, source)
    d = d.replace(
        t=d.t + 1,
        tokens=lax.dynamic_update_slice(d.tokens, token[:, None], (0, d.t)),
        mask=lax.dynamic_update_slice(d.mask, jnp.ones((len(token), 1), bool), (0, d.t)),
    )
    return loop.read(lm, params, d, control)
