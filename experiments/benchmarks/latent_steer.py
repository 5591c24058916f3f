"""Learning latent steering vectors: sentences per second beside a plain PyTorch loop, at GPT-2-mini shape by default.

    python experiments/benchmarks/latent_steer.py [--lm=DIRECTORY --data=FILE.jsonl] [--sizes=1 --sizes=8] [--json=FILE]

The PyTorch loop is what re-implementations do: one sentence at a time, Adam on z, until every token is the most likely
one or the updates are used up. `batched` is the same loop over padded batches; a batch ends with its slowest sentence.
Same model, optimizer, rate, updates and stopping rule on both sides; one pinned thread each, in one process. Without
--lm and --data: random weights and random sentences of 8 to 24 tokens.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(NPROC="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from absl import flags

from ctg_jax.data.tokenizer import load_tokenizer
from ctg_jax.io import write_json
from ctg_jax.learn.vector_search import Search
from ctg_jax.methods import latent_steer
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError
from experiments import cli


class Theirs:
    """Adam on z, added to the output of one block of a `transformers` GPT-2."""

    def __init__(self, lm, params, block, rate, updates):
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        self.torch, self.rate, self.updates = torch, rate, updates
        with tempfile.TemporaryDirectory() as folder:
            hf.save(folder, lm, params)
            load = transformers.AutoModelForCausalLM.from_pretrained
            self.model = load(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.width, self.z = lm.width, None
        self.model.transformer.h[block - 1].register_forward_hook(self._add)

    def _add(self, module, inputs, output):
        if self.z is None:
            return output
        if isinstance(output, tuple):
            return (output[0] + self.z[:, None], *output[1:])
        return output + self.z[:, None]

    def solve(self, sentences):
        """(steps of each, whether it was recovered) of a batch of token lists, searched until the last one is done."""
        torch = self.torch
        longest = max(map(len, sentences))
        tokens = torch.zeros(len(sentences), longest, dtype=torch.long)
        real = torch.zeros(len(sentences), longest, dtype=torch.bool)
        for i, row in enumerate(sentences):
            tokens[i, : len(row)], real[i, : len(row)] = torch.as_tensor(row), True
        target, counted = tokens[:, 1:], real[:, 1:]
        z = torch.zeros(len(sentences), self.width, requires_grad=True)
        adam = torch.optim.Adam([z], lr=self.rate)
        steps = torch.zeros(len(sentences), dtype=torch.long)
        done = torch.zeros(len(sentences), dtype=torch.bool)
        for _ in range(self.updates + 1):
            self.z = z
            logits = self.model(tokens[:, :-1], use_cache=False).logits
            done |= ((logits.argmax(-1) == target) | ~counted).all(1)
            if done.all() or int(steps.max()) >= self.updates:
                break
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            loss = ((nll * counted).sum(1) / counted.sum(1) * ~done).sum()
            adam.zero_grad(set_to_none=True)
            loss.backward()
            before = z.detach().clone()
            adam.step()
            with torch.no_grad():
                z[done] = before[done]
            steps += ~done
        self.z = None
        return steps.tolist(), done.tolist()


def timed(f):
    start = time.perf_counter()
    value = f()
    return time.perf_counter() - start, value


def define(fv):
    flags.DEFINE_string("lm", None, "a GPT-2 in Hugging Face layout; random weights without it", flag_values=fv)
    flags.DEFINE_string("data", None, "JSONL with sentences under text; needs --lm", flag_values=fv)
    flags.DEFINE_multi_integer("sizes", [1, 8, 64, 256], "numbers of sentences, ours alone", 1, flag_values=fv)
    flags.DEFINE_integer("compare", 64, "sentences of the comparison", 1, flag_values=fv)
    flags.DEFINE_integer("single", 16, "the number of these that are also searched one at a time", 1, flag_values=fv)
    flags.DEFINE_integer("batch", 64, "sentences at once", 1, flag_values=fv)
    flags.DEFINE_integer("updates", 100, "updates of a sentence at most", 1, flag_values=fv)
    flags.DEFINE_float("rate", 0.3, "learning rate of Adam", flag_values=fv)
    flags.DEFINE_integer("repeats", 3, "rounds of measurement", 1, flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)

    if bool(args.lm) != bool(args.data):
        raise InputError("give --lm and --data together, or neither of them for random weights and sentences")
    if args.lm:
        lm, params = hf.load(args.lm)
        tokenizer = load_tokenizer(args.lm)
        with open(args.data, encoding="utf-8") as f:
            texts = [json.loads(line)["text"] for line in f]
        rows = [[tokenizer.eos, *ids, tokenizer.eos] for ids in tokenizer.encode(texts)]
        rows = [row for row in rows if 8 <= len(row) - 1 <= 24]
    else:
        lm = Transformer.gpt2(vocab=8192, width=256, depth=6, heads=8, context=128)
        params = jax.jit(lm.init)(jax.random.key(0))
        rng = np.random.default_rng(0)
        rows = [[0, *rng.integers(1, lm.vocab, n).tolist()] for n in rng.integers(8, 25, max(args.sizes + [64]))]
    theirs = Theirs(lm, params, -(-lm.depth // 2), args.rate, args.updates)
    params = lm.unstack(params)
    control = latent_steer.init(lm, jax.random.key(0), site="middle")

    def ours(n):
        given = [(rows[i % len(rows)], 1) for i in range(n)]
        start = np.zeros((n, lm.width), np.float32)
        # Adam at a constant rate, as in the loop beside it.
        how = Search(rate=args.rate, updates=args.updates, patience=10**6, batch=min(args.batch, n))
        return latent_steer.find(lm, params, control, given, start, how, devices=jax.devices()[:1])

    n, found = args.compare, []
    compiled, _ = timed(lambda: ours(n))
    for _ in range(args.repeats):
        ours_s, mine = timed(lambda: ours(n))
        batched_s, batched = timed(
            lambda: [theirs.solve(rows[a : min(a + args.batch, n)]) for a in range(0, n, args.batch)]
        )
        single_s, single = timed(lambda: [theirs.solve([row]) for row in rows[: args.single]])
        found.append((ours_s / n, batched_s / n, single_s / args.single))
    steps = [s for part in batched for s in part[0]]
    alone = [s for part in single for s in part[0]]
    same = np.mean(np.asarray(alone) == mine["steps"][: args.single])
    row = {
        "sentences_s": 1 / statistics.median(f[0] for f in found),
        "batched_torch_s": 1 / statistics.median(f[1] for f in found),
        "single_torch_s": 1 / statistics.median(f[2] for f in found),
        "over_batched": statistics.median(f[1] / f[0] for f in found),
        "over_single": statistics.median(f[2] / f[0] for f in found),
        "recovered": float(mine["solved"].mean()),
        "updates": float(mine["steps"].mean()),
        "torch_updates": float(np.mean(steps)),
        "same_number_of_updates": float(same),
        "first_call_s": compiled,
    }
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {theirs.torch.__version__}, one thread each")
    print(
        f"{n} sentences: {row['sentences_s']:.2f}/s; batched torch {row['batched_torch_s']:.2f}/s "
        f"(×{row['over_batched']:.2f}), one at a time {row['single_torch_s']:.2f}/s (×{row['over_single']:.2f}); "
        f"recovered {row['recovered']:.0%}, updates {row['updates']:.1f} and {row['torch_updates']:.1f}, "
        f"equal to torch's alone in {same:.0%}; first call {compiled:.1f} s",
        flush=True,
    )
    sizes = {}
    for size in args.sizes:
        ours(size)
        sizes[size] = size / timed(lambda size=size: ours(size))[0]
        print(f"{size:5d} sentences: {sizes[size]:.2f} sentences per second", flush=True)
    if args.json:
        write_json(Path(args.json), {**row, "sizes": sizes})


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
