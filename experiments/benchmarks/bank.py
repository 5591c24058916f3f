"""Decoding speed with K distinct steering vectors in one batch, relative to K = 0, no control at all.

    python experiments/benchmarks/bank.py [--batch=256] [--kind=steer --kind=lora] [--repeats=3] [--json=FILE]

The model has the shape of GPT-2 small, or that of Gemma 3 270M with `--shape=gemma`, with random weights. A bank holds
as many entries as the largest K, and a row chooses one of the first K, so every K above 0 runs the same program. The
runs of a round follow one another, and ratios are taken within rounds, which survives the drift of a shared machine.
By default a run reads 4 tokens and writes 8, so that the 23 runs at GPT-2's shape take about four minutes on two CPU
cores, and eight at Gemma's; on an accelerator add --prompt=16 --new=128.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import IDENTITY, Prompts, Sampling, generate, rng
from ctg_jax.controls.bank import bank
from ctg_jax.controls.delta import row_delta
from ctg_jax.decode import loop
from ctg_jax.io import write_json
from ctg_jax.methods import cav, finetune, lm_steer, steer
from ctg_jax.models.decoder import Transformer

COUNTS = (0, 1, 8, 32, 64, 128, 256)


def shapes(name, **more):
    """The language model of a shape; `more` are further settings of it, such as its dtype."""
    if name == "tiny":
        return Transformer.gpt2(vocab=64, width=16, depth=2, heads=2, context=64, **more)
    if name == "gpt2":
        return Transformer.gpt2(**more)
    gemma = dict(vocab=262144, width=640, depth=18, heads=4, kv_heads=1, mlp_width=2048, context=32768)
    return Transformer.llama(**gemma, head_dim=256, tied=True, activation="gelu_new", norm="rms_plus_one", **more)


def entries(kind, lm, count):
    """A bank with `count` entries of a kind."""
    keys = jax.random.split(jax.random.key(1), count)
    if kind == "steer":
        gate = jnp.zeros(lm.depth + 2).at[round(0.6 * lm.depth)].set(1.0)
        one = steer.init(lm, keys[0]).replace(gate=gate)
        return bank([one.replace(vector=0.1 * jax.random.normal(k, one.vector.shape)) for k in keys])
    if kind == "cav":
        one = cav.init(lm, keys[0])
        return bank([one.replace(vector=0.1 * jax.random.normal(k, one.vector.shape)) for k in keys])
    if kind == "lm_steer":
        return bank([lm_steer.init(lm, k, rank=4) for k in keys])
    return row_delta([finetune.init(lm, k, kind="lora", rank=4) for k in keys])


def prompts_of(lm, batch, length):
    """Random prompts."""
    tokens = np.random.default_rng(0).integers(0, lm.vocab - 1, (batch, length)).astype(np.int32)
    keys = rng.per_example(jax.random.key(1), jnp.arange(batch))
    return Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), keys)


def timed(f):
    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


def measure(lm, kinds, counts, *, batch, prompt, new, repeats, params=None):
    """Rows {"kind", "distinct", "tok_s", "relative"}: tokens per second, and their ratio to those without control.

    params: unstacked; None: random ones."""
    if params is None:
        params = jax.block_until_ready(jax.jit(lm.unstack)(jax.jit(lm.init)(jax.random.key(0))))
    prompts, sampling, rows = prompts_of(lm, batch, prompt), Sampling(max_new=new), []
    for kind in kinds:
        control = entries(kind, lm, max(counts))

        def run(count, control=control):
            rows = prompts.replace(cond={"entry": jnp.arange(batch, dtype=jnp.int32) % max(count, 1)})
            return generate(lm, params, rows, control if count else IDENTITY, sampling)

        run(0), run(1)
        size = loop.loop._cache_size()
        rounds = [
            {count: timed(lambda count=count: run(count)) for count in dict.fromkeys((0, *counts))}
            for _ in range(repeats)
        ]
        assert loop.loop._cache_size() == size, "recompiled between calls"
        for count in counts:
            speed = statistics.median(batch * new / r[count] for r in rounds)
            relative = statistics.median(r[0] / r[count] for r in rounds)
            rows.append({"kind": kind, "distinct": count, "tok_s": speed, "relative": relative})
            print(f"{kind:9s} {count:4d} distinct {speed:9.1f} tok/s, {relative:.3f} of K = 0", flush=True)
    return rows


def define(fv):
    from absl import flags

    flags.DEFINE_enum("shape", "gpt2", ("gpt2", "gemma", "tiny"), "the shape of the model", flag_values=fv)
    flags.DEFINE_multi_enum("kind", ["steer"], ("steer", "cav", "lm_steer", "lora"), "what is banked", flag_values=fv)
    flags.DEFINE_multi_integer("distinct", COUNTS, "K, distinct controls in the batch", 0, flag_values=fv)
    flags.DEFINE_integer("batch", 256, "rows at once", 1, flag_values=fv)
    flags.DEFINE_integer("prompt", 4, "tokens of a prompt", 1, flag_values=fv)
    flags.DEFINE_integer("new", 8, "new tokens", 1, flag_values=fv)
    flags.DEFINE_integer("repeats", 3, "rounds of measurement", 1, flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)


def main(argv, session):
    from experiments import cli

    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {args.batch}, {args.new} new tokens")
    sizes = dict(batch=args.batch, prompt=args.prompt, new=args.new, repeats=args.repeats)
    rows = measure(shapes(args.shape), args.kind, tuple(args.distinct), **sizes)
    if args.json:
        write_json(Path(args.json), rows)


if __name__ == "__main__":
    from experiments import cli

    raise SystemExit(cli.run(main, devices=False))
