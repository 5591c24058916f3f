"""Speed of a train step beside PyTorch and `transformers`, random weights in float32.

    python experiments/benchmarks/train.py [--shape=mini] [--repeats=5] [--json=FILE]

Both sides do the same: next-token loss, gradient, clipping by the global norm, AdamW. They run on one pinned thread,
in alternation, in one process: PyTorch's thread barriers collapse on a shared machine, and ratios of neighbours
survive its drift. Times are processor seconds, which a busy neighbour changes least; with one thread on an idle core
they are wall seconds. The floor is the products' FLOPs (6 per weight and token, and attention) at the best rate
measured for one large product. `forward`, `gradient` and `update` (the whole step) are timed apart, to show where the
time goes.
"""

import functools
import os
import statistics
import sys
import tempfile
import time
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

from ctg_jax.io import write_json
from ctg_jax.learn import losses, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.mesh.plan import Plan
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from experiments import cli

SHAPES = {
    "mini": (Transformer.gpt2(vocab=8192, width=256, depth=4, heads=4, context=256), 16, 64),
    "small": (Transformer.gpt2(), 8, 128),
}
RATE, DECAY = 1e-4, 0.01


def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def matmul_rate(n=1536, repeats=5):
    """FLOP/s of one [n, n] product in float32."""
    x = jnp.ones((n, n))
    f = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ()))))
    f(x, x).block_until_ready()
    return 2 * n**3 / min(timed(lambda: f(x, x).block_until_ready()) for _ in range(repeats))


def flops(lm, rows, length):
    """FLOPs of the products of one forward and backward pass over rows of `length` tokens."""
    weights = lm.depth * ((lm.heads + 2 * lm.kv_heads) * lm.head_dim + lm.heads * lm.head_dim + 2 * lm.mlp_width)
    dense = 6 * rows * length * lm.width * (weights + lm.vocab)
    return dense + 12 * lm.depth * rows * length**2 * lm.heads * lm.head_dim


class Ours:
    """The library's own step, as `train.loop` compiles it."""

    def __init__(self, lm, params, batch):
        tx = optimizer(RATE, decay=DECAY, decayed=".*")
        self.loss = losses.lm_loss(lm)
        plan = Plan()
        self.state = plan.place(train.init_state(params, tx, jax.random.key(0)))
        self.step = plan.compile(functools.partial(train.make_step, self.loss, tx), self.state, None)
        self.batch = plan.put(batch)
        self.value = jax.jit(lambda p, b: self._mean(p, b))
        self.grad = jax.jit(jax.value_and_grad(lambda p, b: self._mean(p, b)))

    def _mean(self, params, batch):
        s = self.loss(params, None, batch, None)
        return s.total / s.weight

    def forward(self):
        return float(jax.block_until_ready(self.value(self.state.params, self.batch)))

    def gradient(self):
        return float(jax.block_until_ready(self.grad(self.state.params, self.batch))[0])

    def update(self):
        self.state, metrics = self.step(self.state, None, self.batch)
        return float(jax.block_until_ready(metrics)["loss"])


class Theirs:
    """The same with `transformers` and `torch.optim.AdamW`."""

    def __init__(self, lm, params, batch):
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        self.torch = torch
        with tempfile.TemporaryDirectory() as folder:
            hf.save(folder, lm, params)
            load = transformers.AutoModelForCausalLM.from_pretrained
            self.model = load(folder, attn_implementation="sdpa", dtype=torch.float32).eval()  # no dropout
        self.tokens = torch.as_tensor(batch["tokens"], dtype=torch.long)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=DECAY)

    def loss(self):
        return self.model(self.tokens, labels=self.tokens, use_cache=False).loss

    def forward(self):
        with self.torch.no_grad():
            return self.loss().item()

    def gradient(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss.item()

    def update(self):
        loss = self.gradient()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss


def measure(name, repeats, rate):
    lm, rows, length = SHAPES[name]
    tokens = np.random.default_rng(0).integers(0, lm.vocab, (rows, length), np.int32)
    batch = {"tokens": tokens, "mask": np.ones(tokens.shape, bool), "ids": np.arange(rows, dtype=np.int32)}
    params = jax.jit(lm.init)(jax.random.key(0))
    theirs = Theirs(lm, params, batch)
    ours = Ours(lm, params, batch)
    floor = flops(lm, rows, length) / rate
    found = []
    for part in ("forward", "gradient", "update"):
        first = timed(getattr(ours, part))
        getattr(theirs, part)()
        pairs, worst = [], 0.0
        for _ in range(repeats):
            a = time.process_time()
            x = getattr(ours, part)()
            b = time.process_time()
            y = getattr(theirs, part)()
            pairs.append((b - a, time.process_time() - b))
            worst = max(worst, abs(x - y))
        ratios = sorted(t / o for o, t in pairs)
        mine, other = (statistics.median(p) for p in zip(*pairs))
        row = {
            "shape": name,
            "part": part,
            "tok_s": rows * length / mine,
            "torch_tok_s": rows * length / other,
            "ratio": statistics.median(ratios),
            "ratio_min": ratios[0],
            "ratio_max": ratios[-1],
            "of_floor": (floor / 3 if part == "forward" else floor) / min(o for o, _ in pairs),
            "loss_apart": worst,
            "first_call_s": first,
        }
        found.append(row)
        print(
            f"{name:5s} {part:8s} {row['tok_s']:8.1f} tok/s, torch {row['torch_tok_s']:8.1f}, ratio "
            f"{row['ratio']:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}), {row['of_floor']:.0%} of the floor, losses "
            f"{worst:.1e} apart, first call {first:.1f} s",
            flush=True,
        )
    return found


def define(fv):
    flags.DEFINE_multi_enum("shape", list(SHAPES), list(SHAPES), "shapes of the model", flag_values=fv)
    flags.DEFINE_integer("repeats", 5, "rounds of measurement", 1, flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    rate = matmul_rate()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, one thread each, {rate / 1e9:.0f} GFLOP/s")
    rows = [row for name in args.shape for row in measure(name, args.repeats, rate)]
    if args.json:
        write_json(Path(args.json), rows)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
