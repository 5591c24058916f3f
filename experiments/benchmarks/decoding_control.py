"""What controls of the next-token distribution cost: seconds per token beside the number of passes, and beside PyTorch.

    python experiments/benchmarks/decoding_control.py [--shape=gpt2|mini|tiny] [--batch=1 --batch=8] [--method=gedi]
                                                     [--json=FILE]

For every method of `ctg_jax/methods/logits` the program of its example decodes in alternation with the plain one, and
so do the arms of `ARMS`, whose settings are those of the papers. `passes` is what the models of a control read for each
token, in units of the base model: 1 for the base, and for each stream its copies times its share of the base's weights,
twice where it looks ahead at candidates, and twice more for each step of PPLM's ascent, which goes forwards and
backwards. The cost of a method that does nothing else is its passes; looking ahead at K candidates is one pass over the
weights and K times the arithmetic. Under speculation the streams of the rule make one pass for all tokens of a round;
here the draft is right about every one of them, so that row is the best case.

GeDi, self-debiasing and a formula of three models are also written as their authors do it, one call of `transformers`
for each model and a loop in Python, over models of the same shape. Both sides decode greedily on one pinned thread in
one process, and what is measured is the processor time of that process, which other work on the machine changes little.
"""

import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

# One thread for both libraries; must be set before either is imported.
os.environ.update(NPROC="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ctg_jax import IDENTITY, Sampling, methods, tree
from ctg_jax.decode import strategies
from ctg_jax.decode.speculate import Speculative
from ctg_jax.io import write_json
from ctg_jax.methods import pplm
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.record import record
from ctg_jax.types import InputError
from experiments import cli
from experiments.benchmarks.authors import authors_way, formula, prompts_for, references, streams

PROPOSED = 4  # tokens of a round of speculation
SHAPES = {
    "gpt2": dict(),
    "mini": dict(vocab=8192, width=256, depth=6, heads=4, context=256),  # yelp-gpt2-mini
    "tiny": dict(vocab=64, width=16, depth=2, heads=2, context=64),
}


def half(lm):
    """A small model with the tokenizer of a base: half as wide and as deep."""
    sizes = dict(width=lm.width // 2, depth=max(1, lm.depth // 2), heads=max(1, lm.heads // 2))
    return record(Transformer.gpt2(vocab=lm.vocab, context=lm.context, **sizes))


# Arm -> (lm, key) -> control. The formula has no classifier, since that of the reference has none.
ARMS = {
    "arithmetic": formula,
    "critic": lambda lm, key: methods.get("critic").init(lm, key, top=10),
    "value_model": lambda lm, key: methods.get("critic").init(lm, key, small=half(lm), top=20, link="centred"),
    "fudge": lambda lm, key: methods.get("critic").init(lm, key, top=50, link="log", rest="drop"),
    "residual": lambda lm, key: methods.get("residual").init(lm, key, shape=dict(heads=lm.heads)),
    "selective": lambda lm, key: methods.get("selective").init(lm, key, context="stream", width=min(512, lm.width)),
    "speculation": lambda lm, key: Speculative(formula(lm, key), k=PROPOSED),
}


def names():
    """The arms, and the methods that act on logits and can be decoded as they are."""
    found = (n for n in methods.names() if ".logits." in methods.get(n).__name__)
    return sorted({*ARMS, *(n for n in found if hasattr(methods.get(n), "example"))})


def made(name, lm, key):
    """The control of an arm, or the example of a method."""
    make = ARMS.get(name) or methods.get(name).example
    return jax.tree.map(jnp.asarray, make(lm, key))


def weights(lm):
    """Weights that are read for each token: all but an embedding of which one row is read."""
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    embed = {k: v for k, v in shapes["embed"].items() if k == "positions" or not lm.tied}
    return tree.size_bytes(shapes) - tree.size_bytes(embed)


def passes(lm, control):
    ascent = 2 * control.steps if isinstance(control, pplm.Pplm) else 0
    read = sum(((s.copies or 1) * (1 + s.ahead) + ascent) * weights(s.lm) / weights(lm) for s in streams(control))
    return 1 + (read / (control.k + 1) if isinstance(control, Speculative) else read)


def timed(f):
    start = time.process_time()
    f()
    return time.process_time() - start


def define(fv):
    flags.DEFINE_multi_integer("batch", [1, 8], "rows at once", 1, flag_values=fv)
    flags.DEFINE_multi_string("method", None, "methods and arms that are measured; all by default", flag_values=fv)
    flags.DEFINE_enum("shape", "gpt2", list(SHAPES), "of the base model", flag_values=fv)
    flags.DEFINE_integer("prompt", 32, "tokens of a prompt", 1, flag_values=fv)
    flags.DEFINE_integer("new", 32, "new tokens", 1, flag_values=fv)
    flags.DEFINE_integer("repeats", 5, "rounds of measurement", 1, flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    chosen = args.method or names()
    if unknown := set(chosen) - set(names()):
        raise InputError(f"--method={min(unknown)} is not measured here, expected one of {', '.join(names())}")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    lm = Transformer.gpt2(**SHAPES[args.shape])
    params = jax.jit(lm.init)(jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        hf.save(folder, lm, params)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    params = jax.block_until_ready(jax.jit(lm.unstack)(params))
    sampling, rows = Sampling(max_new=args.new, greedy=True), []

    def reference(name, tokens):
        return authors_way(torch, model, *references(torch, tokens)[name], args.new)

    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}, one thread each")
    print(f"{args.shape}, random weights: prompts of {args.prompt} tokens, {args.new} new, medians of {args.repeats}")
    for batch in args.batch:
        tokens = np.random.default_rng(0).integers(0, lm.vocab - 1, (batch, args.prompt)).astype(np.int32)
        theirs = set(references(torch, tokens))
        for name in chosen:
            control = made(name, lm, jax.random.key(2))
            given = prompts_for(control, tokens)

            def run(control, given=given):
                return jax.block_until_ready(strategies.run(lm, params, given, control, sampling))

            calls = [lambda control=control: run(control), lambda: run(IDENTITY)]
            if name in theirs:
                calls.append(partial(reference, name, tokens))
            for call in calls:
                call()
            found = np.array([[timed(call) for call in calls] for _ in range(args.repeats)])
            ratio = statistics.median(found[:, 0] / found[:, 1])
            row = {"batch": batch, "method": name, "ms_per_token": 1e3 * np.median(found[:, 0]) / args.new}
            row |= {"of_plain": ratio, "passes": passes(lm, control), "over_passes": ratio / passes(lm, control)}
            if name in theirs:
                row["torch_over_ours"] = statistics.median(found[:, 2] / found[:, 0])
            rows.append(row)
            beside = f", authors' way {row['torch_over_ours']:.2f} times as long" if name in theirs else ""
            print(
                f"batch {batch:2d} {name:14s} {row['ms_per_token']:7.1f} ms per token, {ratio:.2f} of plain, "
                f"{row['passes']:.2f} passes ({row['over_passes']:.2f}){beside}",
                flush=True,
            )
    if args.json:
        write_json(Path(args.json), rows)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
