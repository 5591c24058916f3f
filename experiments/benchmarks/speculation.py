"""Speculative sampling beside decoding with the large model alone: tokens a round, time per token, and the gain.

    python experiments/benchmarks/speculation.py [--k=4 --k=8] [--apart=0 --apart=6] [--shape=gpt2|tiny]
                                                 [--repeats=5] [--json=FILE]

The large model has the shape of GPT-2 small. The draft has a sixth of its width and two layers, so its unembedding is
small too; it is the `lm` that decodes, and the rule of `Speculative` puts the logits of the large model in place of its
own. How well the two agree is set and not learned: the first two blocks of the large model compute what the draft does,
six times side by side, and the outputs of the other ten, which have random weights, are multiplied by `--apart`. At 0
the models are equal and every proposal is kept: the best case. `shared` is how much of their mass the distributions of
the next token share, a mean over the tokens of the prompts, which is the chance of a proposal to be kept (Leviathan et
al. 2023, section 3).

Texts are sampled. Both sides run on one pinned thread in alternation, and what is measured is the processor time of
the process.
"""

import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

os.environ.update(NPROC="1", OMP_NUM_THREADS="1")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ctg_jax import IDENTITY, Prompts, Sampling, rng
from ctg_jax.controls.experts import experts
from ctg_jax.controls.streams import Stream
from ctg_jax.decode import strategies
from ctg_jax.decode.speculate import Speculative
from ctg_jax.io import write_json
from ctg_jax.models.decoder import Transformer
from experiments import cli

TIMES = 6  # how often the draft's width is in that of the large model
BLOCKS, NORM = 6.0, 20.0  # of the draft's weights: with those of `init` every token would be about as likely
# Draft, and depth of the large model.
SHAPES = {
    "gpt2": (dict(width=128, depth=2, heads=2), 12),
    "tiny": (dict(vocab=64, width=16, depth=1, heads=2, context=128), 2),
}


def sharper(params):
    """Weights whose distributions have an entropy like those of a trained model, about 3.5 nats at GPT-2's vocabulary,
    and are not of the last token alone."""
    factors = dict(embed=1.0, layers=BLOCKS, norm=NORM)
    return {name: jax.tree.map(lambda x, f=factors[name]: f * x, part) for name, part in params.items()}


def widened(lm, params, depth, apart, key):
    """A model `TIMES` as wide whose first blocks compute what those of `lm` do, side by side, on equal copies of its
    residual stream. A product sums up as many equal parts, so its kernel is divided by `TIMES`; so is the last norm,
    since the unembedding is the embedding."""
    sizes = dict(width=TIMES * lm.width, depth=depth, heads=TIMES * lm.heads)
    large = Transformer.gpt2(vocab=lm.vocab, context=lm.context, **sizes)
    own = jax.jit(large.init)(key)

    def wide(path, x):
        name, at = path[-1].key, [p.key for p in path]
        parts = jnp.split(x, 3 if "qkv" in at else 1, axis=1)  # queries, keys and values lie behind one another
        x = jnp.concatenate([jnp.tile(a, (1, TIMES) + (1,) * (x.ndim - 2)) for a in parts], axis=1)
        return jnp.tile(x, (1, 1, TIMES)) / TIMES if name == "kernel" else x

    first = jax.tree_util.tree_map_with_path(wide, params["layers"])
    rest = jax.tree.map(lambda x: x[lm.depth :], own["layers"])
    for part, name in (("attn", "out"), ("mlp", "down")):
        rest[part][name] = jax.tree.map(lambda x: apart * x, rest[part][name])
    return large, {
        "embed": jax.tree.map(lambda x: jnp.tile(x, (1, TIMES)), params["embed"]),
        "layers": jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rest),
        "norm": jax.tree.map(lambda x: jnp.tile(x, TIMES) / TIMES, params["norm"]),
    }


def shared(models, tokens):
    """float: Σ min(p, q) of two models, each (lm, parameters), as a mean over the places of tokens [B, T]."""
    mask = jnp.ones(tokens.shape, bool)
    read = (lm.apply(params, lm.embed(params, tokens), mask).logits for lm, params in models)
    p, q = (jax.nn.softmax(z, axis=-1) for z in read)
    return float(jnp.mean(jnp.sum(jnp.minimum(p, q), axis=-1)))


def timed(f):
    start = time.process_time()
    f()
    return time.process_time() - start


def define(fv):
    flags.DEFINE_multi_integer("k", [2, 4, 8, 15], "tokens that the draft proposes in a round", 1, flag_values=fv)
    flags.DEFINE_multi_float("apart", [0.0, 6.0, 12.0], "of what only the large model computes", 0, flag_values=fv)
    flags.DEFINE_enum("shape", "gpt2", list(SHAPES), "of the models", flag_values=fv)
    flags.DEFINE_integer("batch", 1, "rows at once", 1, flag_values=fv)
    flags.DEFINE_integer("prompt", 32, "tokens of a prompt", 1, flag_values=fv)
    flags.DEFINE_integer("new", 64, "new tokens", 2, flag_values=fv)
    flags.DEFINE_integer("repeats", 5, "rounds of measurement", 1, flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    sizes, depth = SHAPES[args.shape]
    small = Transformer.gpt2(**sizes)
    draft = sharper(jax.jit(small.init)(jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, small.vocab - 1, (args.batch, args.prompt)).astype(np.int32)
    keys = rng.per_example(jax.random.key(1), jnp.arange(args.batch))
    prompts, sampling = Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), keys), Sampling(max_new=args.new)

    def run(lm, params, control=IDENTITY):
        return jax.block_until_ready(strategies.run(lm, params, prompts, control, sampling))

    rows, stacked, draft = [], draft, jax.jit(small.unstack)(draft)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, one thread; batch {args.batch}, {args.new} tokens")
    for apart in args.apart:
        large, params = widened(small, stacked, depth, apart, jax.random.key(2))
        params = jax.block_until_ready(jax.jit(large.unstack)(params))
        same = shared(((small, draft), (large, params)), prompts.tokens)
        rule = experts(Stream(params, lm=large), alpha=1.0)  # z + (z⁺ − z)
        for k in args.k:
            control = Speculative(rule, k=k)
            calls = [partial(run, *given) for given in ((small, draft, control), (large, params), (small, draft))]
            written = (args.new - 1) / (int(calls[0]().generated) - 1)
            for call in calls[1:]:
                call()
            found = np.array([[timed(call) for call in calls] for _ in range(args.repeats)])
            ours, alone, cheap = 1e3 * np.median(found, axis=0) / args.new
            row = dict(apart=apart, shared=same, k=k, tokens_a_round=written)
            row |= dict(ms_per_token=ours, alone=alone, draft=cheap)
            rows.append(row | dict(gain=statistics.median(found[:, 1] / found[:, 0])))
            print(
                f"apart {apart:4.1f} (shared {same:.2f}), k {k:2d}: {written:5.2f} of {k + 1} tokens a round, "
                f"{ours:6.1f} ms per token; alone {alone:.1f}, the draft {cheap:.1f}; gain {rows[-1]['gain']:.2f}",
                flush=True,
            )
    if args.json:
        write_json(Path(args.json), rows)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
