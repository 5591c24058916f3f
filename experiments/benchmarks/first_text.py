"""How long a user waits for the first text: `ctg_jax.load` and `write`, beside `transformers`, each in a new process.

    python experiments/benchmarks/first_text.py --lm=DIR [--repeats=5] [--new=20] [--threads=1]

DIR is a folder in Hugging Face's layout with a tokenizer. A process imports the library, loads the model, and writes
NEW tokens of one prompt; then of a longer prompt, and of the first one again. The first process of ctg_jax compiles and
imports the model as well; it has a line of its own and counts for nothing else, since compiled programs are kept.
Printed are medians in seconds, and the waits for the first text, each over that of `transformers`: from the start of
the process, from the call of `load`, and from its end, after which ctg_jax still traces its program. Both sample
without a filter, in float32, on --threads threads.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import flags

from ctg_jax.types import InputError
from experiments import cli

PROMPTS = ("The food was", "We came here on a rainy Tuesday evening and the waiter", "The food was")
STEPS = ("import", "load", "first text", "longer prompt", "again")
OURS = """
import json, sys, time
lm, new, prompts = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
times = [time.perf_counter()]
import ctg_jax as ctg
times.append(time.perf_counter())
lm = ctg.load(lm, dtype="float32")
times.append(time.perf_counter())
for prompt in prompts:
    lm.write([prompt], max_new=new, seed=0)
    times.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""
THEIRS = """
import json, sys, time
lm, new, prompts = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
times = [time.perf_counter()]
import os, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
times.append(time.perf_counter())
tokenizer = AutoTokenizer.from_pretrained(lm)
model = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32)
times.append(time.perf_counter())
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=new, pad_token_id=0)
    tokenizer.decode(out[0])
    times.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""


def seconds(program, lm, new, threads, home):
    """The seconds of each of `STEPS` in a process of its own."""
    env = {**os.environ, "HOME": home, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[2]), env.get("PYTHONPATH", "")])
    if threads == 1:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    command = [sys.executable, "-c", program, str(lm), str(new), *PROMPTS]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"a process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1][:300]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def define(fv):
    flags.DEFINE_string("lm", None, "folder of the language model", flag_values=fv)
    flags.DEFINE_integer("repeats", 5, "processes of each library", 1, flag_values=fv)
    flags.DEFINE_integer("new", 20, "new tokens of a text", 1, flag_values=fv)
    flags.DEFINE_integer("threads", 1, "threads of each library", 1, flag_values=fv)


def main(argv, session):
    fv, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    if not fv.lm:
        raise InputError("--lm is missing: give a folder in Hugging Face layout")
    with tempfile.TemporaryDirectory() as home:
        lm = Path(fv.lm).absolute()
        cold = seconds(OURS, lm, fv.new, fv.threads, home)
        runs = [[seconds(p, lm, fv.new, fv.threads, home) for p in (OURS, THEIRS)] for _ in range(fv.repeats)]
    ours, theirs = ([statistics.median(x) for x in zip(*(run[i] for run in runs))] for i in (0, 1))
    lines = [f"{'seconds':24}" + "".join(f"{name:>15}" for name in STEPS)]
    for name, row in (("ctg_jax, nothing kept", cold), ("ctg_jax", ours), ("transformers", theirs)):
        lines.append(f"{name:24}" + "".join(f"{x:15.3f}" for x in row))
    last = STEPS.index("first text") + 1
    for name, first in (("the start of the process", 0), ("the call of load", 1), ("the end of load", 2)):
        ratio = sum(ours[first:last]) / sum(theirs[first:last])
        lines.append(f"first text, from {name}, over that of transformers: {ratio:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
