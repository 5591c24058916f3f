"""What compiling costs, and how much memory decoding takes, at the shape of GPT-2 with 12, 24 and 48 layers.

    python experiments/benchmarks/compile.py [--layers=12 --layers=24] [--width=768] [--json=FILE]

Shapes alone are compiled (nothing is computed), and times are processor seconds. The train step scans over stacked
layers, so its compile time should not grow with depth; decoding is unrolled, so its does. Memory is what the compiled
program reports: arguments, outputs and temporaries, beside weights and cache. Last, a process that decodes is started
twice with an empty compilation cache: the second must find every program of the first.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
from absl import flags

from ctg_jax import tree
from ctg_jax.control import IDENTITY
from ctg_jax.decode import loop
from ctg_jax.io import write_json
from ctg_jax.learn import losses, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError, Prompts, Sampling
from experiments import cli

CHILD = """
import jax
from experiments import cli
cli.keep_compiled()
count = {"hits": 0, "misses": 0}
def seen(event, **kw):
    for name in count:
        count[name] += event == "/jax/compilation_cache/cache_" + name
jax.monitoring.register_event_listener(seen)
import jax.numpy as jnp
from ctg_jax import Prompts, Sampling, generate, rng
from ctg_jax.models.decoder import Transformer
lm = Transformer.gpt2(vocab=100, width=32, heads=2, depth=2, context=64)
params = jax.jit(lm.init)(jax.random.key(0))
tokens = jnp.ones((2, 8), jnp.int32)
keys = rng.per_example(jax.random.key(1), jnp.arange(2))
generate(lm, params, Prompts(tokens, tokens > 0, keys), sampling=Sampling(max_new=4)).tokens.block_until_ready()
print(count["hits"], count["misses"])
"""


def compiled(f, *args, **static):
    """(processor seconds to lower and compile, which a busy neighbour changes least; the compiled program)."""
    jax.clear_caches()
    start = time.process_time()
    program = f.lower(*args, **static).compile()
    return time.process_time() - start, program


def train_step(lm, params, batch=8, length=64):
    tx = optimizer(1e-3)
    state = jax.eval_shape(lambda p: train.init_state(p, tx, jax.random.key(0)), params)
    step = jax.jit(train.make_step(losses.lm_loss(lm), tx), donate_argnums=0)
    rows = {"tokens": jnp.zeros((batch, length), jnp.int32), "mask": jnp.ones((batch, length), bool)}
    return compiled(step, state, None, rows | {"ids": jnp.arange(batch)})


def decoding(lm, params, batch, prompt=32, new=64):
    params = jax.eval_shape(lm.unstack, params)
    tokens = jax.ShapeDtypeStruct((batch, prompt), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    prompts = Prompts(tokens, jax.ShapeDtypeStruct((batch, prompt), bool), keys)
    seconds, program = compiled(loop.loop, lm, params, prompts, IDENTITY, Sampling(max_new=new))
    memory = program.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    peak -= memory.alias_size_in_bytes
    cache = jax.eval_shape(lambda p: lm.init_cache(p, batch, prompt + new - 1), params)
    return seconds, peak / (tree.size_bytes(params) + tree.size_bytes(cache)), peak


def define(fv):
    flags.DEFINE_multi_integer("layers", [12, 24, 48], "numbers of layers", 1, flag_values=fv)
    flags.DEFINE_integer("width", 768, "width of the models, a multiple of 64", 1, flag_values=fv)
    flags.DEFINE_multi_integer("batch", [1, 8, 32], "rows of decoding", 1, flag_values=fv)
    flags.DEFINE_integer("repeats", 3, "compilations of a train step, of which the fastest counts", 1, flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    if args.width % 64:
        raise InputError(f"--width is {args.width}, expected a multiple of 64")
    rows = []
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, width {args.width}")
    for layers in args.layers:
        lm = Transformer.gpt2(depth=layers, width=args.width, heads=args.width // 64)
        params = jax.eval_shape(lm.init, jax.random.key(0))
        step = min(train_step(lm, params)[0] for _ in range(args.repeats))
        rows.append({"layers": layers, "train_step_s": step})
        print(f"{layers} layers: train step {step:.1f} s", flush=True)
        for batch in args.batch:
            seconds, share, peak = decoding(lm, params, batch)
            rows.append({"layers": layers, "batch": batch, "decode_s": seconds, "peak_bytes": peak, "of_need": share})
            print(
                f"{layers} layers, batch {batch}: decode {seconds:.1f} s, peak {peak / 1e6:.0f} MB, "
                f"{share:.3f} of weights and cache",
                flush=True,
            )
    with tempfile.TemporaryDirectory() as folder:
        starts = []
        for _ in range(2):
            home = {**os.environ, "XDG_CACHE_HOME": folder, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
            out = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True, env=home)
            starts.append([int(x) for x in out.stdout.split()])
    rows.append({"first_start": starts[0], "second_start": starts[1]})
    print(f"first start: {starts[0][1]} programs compiled; second start: {starts[1][1]}, {starts[1][0]} found")
    if args.json:
        write_json(Path(args.json), rows)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
