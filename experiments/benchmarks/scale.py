"""Scaling of a train step and of decoding over simulated devices and over processes, relative to what the cores allow.

    taskset -c 1 python experiments/benchmarks/scale.py [--devices=1 --devices=8] [--processes=2] [--json=FILE]

Simulated devices and processes share the same cores, so n of them have no more to compute with than one. Two figures,
both of processor time, which a neighbour on the machine changes least, the processes summed:

    efficiency   one device with all rows, over n devices with these rows together: what the same cores make of the same
                 work when it is split. Decoding reads every weight at each token, n devices n times.
    own          n times one device with its share of the rows, over n devices: what each device loses to the others, by
                 collectives and threads. It is what remains of n times the speed on n chips of this pace.

Weak scaling has `--weak` rows for each device, strong `--strong` rows in all. Training is a step of `finetune` (LoRA;
the language model is frozen) as `train.loop` compiles it, decoding is `strategies.run`, which splits rows over
devices and processes. `moved` and `asked` are bytes that each device sends in a step, of the
compiled program and in theory (`experiments/traffic.py`).
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))

from absl import flags

from ctg_jax.io import write_json
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.types import InputError
from experiments import cli

LAYOUTS = ("data", "fsdp", "tensor")
LENGTH, PROMPT, NEW = 64, 16, 32


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# -- one process of a measurement


def worker(job):
    """Measures the cells of one job; the first process prints each as a line of JSON with the time of this process, the
    others only their times."""
    import jax

    if job["over"] == "devices":
        jax.config.update("jax_num_cpu_devices", job["n"])
    elif job["n"] > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(job["address"], job["n"], job["index"])
    for cell in job["cells"]:
        act, more = (train_step if cell["what"] == "train" else decoding)(cell["layout"], cell["rows"])
        act()  # compiled and warm
        times = []
        for _ in range(job["repeats"]):
            wall, used = time.perf_counter(), time.process_time()
            act()
            times.append((time.process_time() - used, time.perf_counter() - wall))
        print("cell " + json.dumps(cell | more | {"times": times}), flush=True)


def model():
    from ctg_jax.models.decoder import Transformer

    return Transformer.gpt2(vocab=4096, width=256, depth=4, heads=8, context=128)


def train_step(layout, rows):
    """(one step, its bytes)"""
    import functools

    import jax
    import numpy as np

    from ctg_jax.learn import losses, train
    from ctg_jax.mesh import processes
    from ctg_jax.mesh.plan import Plan
    from ctg_jax.mesh.rules import DECODER, NETWORKS, REPLICATED
    from ctg_jax.methods import finetune
    from experiments import traffic

    n, lm, tx = jax.device_count(), model(), optimizer(1e-4)
    axes = {"data": 1, "tensor": n} if layout == "tensor" else {"data": n}
    plan = Plan(axes=axes, rules=REPLICATED if layout == "data" else DECODER + NETWORKS)
    tokens = np.random.default_rng(0).integers(0, lm.vocab, (rows, LENGTH + 1), np.int32)
    batch = {"tokens": tokens, "mask": np.ones(tokens.shape, bool), "ids": np.arange(rows, dtype=np.int32)}
    frozen = {"params": jax.jit(lm.init)(jax.random.key(0))}
    control = finetune.init(lm, jax.random.key(1))
    state = train.init_state(control, tx, jax.random.key(2))
    state, frozen = (processes.everywhere(x, plan.shardings(x)) for x in (state, frozen))
    batch = plan.put(processes.rows(batch))
    make = functools.partial(train.make_step, losses.control_loss(lm), tx)
    step = plan.compile(make, state, frozen).lower(state, frozen, batch).compile()
    found = traffic.collectives(step.as_text(), n)
    asked = traffic.asked(lm, plan, frozen["params"], control, rows, LENGTH)
    kept = [state]

    def act():
        kept[0], metrics = step(kept[0], frozen, batch)
        jax.block_until_ready(metrics)  # each step: with many steps in flight simulated devices can deadlock

    return act, {"moved": sum(c.moved for c in found), "asked": sum(asked.values()), "tokens": rows * LENGTH}


def decoding(_, rows):
    """(completions of `rows` prompts, nothing)"""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ctg_jax import rng
    from ctg_jax.control import IDENTITY
    from ctg_jax.decode import strategies
    from ctg_jax.mesh import layout, processes
    from ctg_jax.types import Prompts, Sampling

    lm = model()
    params = jax.block_until_ready(jax.jit(lambda key: lm.unstack(lm.init(key)))(jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, lm.vocab, (rows, PROMPT), np.int32)
    keys = rng.per_example(jax.random.key(1), jnp.arange(rows))
    prompts = Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), keys)
    devices = tuple(jax.devices()) if processes.count() == 1 else ()
    params = layout.replicated(params, devices)

    def act():
        out = strategies.run(lm, params, prompts, IDENTITY, Sampling(max_new=NEW), devices)
        return jax.block_until_ready(out.tokens)

    return act, {"tokens": rows * NEW}


# -- the measurement


def run(job):
    """The cells of one job with their median times: of all processes together, and of the slowest."""
    count = job["n"] if job["over"] == "processes" else 1
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    # Simulated devices deadlock with fewer than two threads each.
    threads = max(cores(), 2 * job["n"] if job["over"] == "devices" and job["n"] > 1 else 1)
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"NPROC": str(threads), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE)}
    jobs = [json.dumps(job | {"index": i, "address": address}) for i in range(count)]
    commands = [[sys.executable, __file__, f"--worker={text}"] for text in jobs]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        outputs = [p.communicate(timeout=1800)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    if any(p.returncode for p in started):
        raise RuntimeError(f"a process of {job['n']} {job['over']} ended with {[p.returncode for p in started]}")
    cells = [[json.loads(x[5:]) for x in out.splitlines() if x.startswith("cell ")] for out in outputs]
    out = []
    for same in zip(*cells):
        used = statistics.median(sum(t[0] for t in turn) for turn in zip(*(c["times"] for c in same)))
        wall = statistics.median(max(t[1] for t in turn) for turn in zip(*(c["times"] for c in same)))
        row = {k: v for k, v in same[0].items() if k != "times"} | {"over": job["over"], "n": job["n"]}
        out.append(row | {"cpu_s": used, "wall_s": wall})
    return out


def cells(n, args, over):
    """What n devices or processes measure: weak and strong, in each layout; one device all that others need."""
    others = {*args.devices, *args.processes} if n == 1 else {n}
    rows = {args.weak * m for m in others} | {args.strong}
    rows |= {args.strong // m for m in others} if n == 1 else set()
    layouts = args.layouts if n > 1 and over == "devices" else ["data"]
    found = [{"what": "train", "layout": layout, "rows": r} for layout in layouts for r in sorted(rows)]
    return found + [{"what": "decode", "layout": "data", "rows": r} for r in sorted(rows)]


def define(fv):
    flags.DEFINE_multi_integer("devices", [1, 2, 4, 8], "numbers of simulated devices", 1, flag_values=fv)
    flags.DEFINE_multi_integer("processes", [1, 2, 4], "numbers of processes", 1, flag_values=fv)
    flags.DEFINE_multi_enum("layouts", list(LAYOUTS), list(LAYOUTS), "layouts of training", flag_values=fv)
    flags.DEFINE_integer("weak", 4, "rows of each device in weak scaling", 1, flag_values=fv)
    flags.DEFINE_integer("strong", 16, "rows in all in strong scaling", 1, flag_values=fv)
    flags.DEFINE_integer("repeats", 5, "rounds of measurement", 1, flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)
    flags.DEFINE_string("worker", None, "a job as JSON, for the processes that this script starts", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    if args.worker:
        worker(json.loads(args.worker))
        return
    if any(args.strong % n for n in args.devices + args.processes):
        raise InputError(f"--strong is {args.strong}, expected a multiple of every number of devices and processes")
    print(f"{cores()} core{'s' * (cores() > 1)}, processor seconds, medians of {args.repeats}", flush=True)
    jobs = [("devices", 1)] + [("devices", n) for n in args.devices if n > 1]
    jobs += [("processes", n) for n in args.processes if n > 1]
    base, found = {}, []
    for over, n in jobs:
        for row in run(dict(over=over, n=n, repeats=args.repeats, cells=cells(n, args, over))):
            key = (row["what"], row["rows"])
            if n == 1:
                base[key] = row["cpu_s"]
            row["efficiency"] = base[key] / row["cpu_s"]
            row["own"] = n * base[row["what"], row["rows"] // n] / row["cpu_s"]
            modes = [m for m, r in (("weak", args.weak * n), ("strong", args.strong)) if r == row["rows"]]
            row["mode"] = " and ".join(modes) or "base"
            found.append(row)
            line = f"{row['what']:6s} {row['layout']:6s} {n} {over:9s} {row['rows']:3d} rows ({row['mode']}): "
            line += f"{row['cpu_s']:.3f} s, {row['tokens'] / row['cpu_s']:.0f} tok/s, "
            line += f"efficiency {row['efficiency']:.2f}, own {row['own']:.2f}"
            if row.get("moved"):
                line += f", {row['moved'] / 1e6:.2f} MB sent by each device ({row['asked'] / 1e6:.2f} in theory)"
            print(line, flush=True)
    if args.json:
        write_json(Path(args.json), found)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
