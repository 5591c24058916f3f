"""Guided proposals and their continuations beside the same networks in PyTorch, sample after sample.

    python experiments/benchmarks/dglm.py [--prompts=64] [--samples=25] [--steps=20 --steps=250] [--torch_samples=1]

Both sides draw, for every prompt, latents by guided diffusion (one linear classifier), write eight soft tokens from
each and let the same GPT-2 continue by 20 tokens. Ours draws all rows in batches of `--batch`, by DPM-Solver++ without
a gradient through the denoiser, in `--steps` steps; PyTorch, as the authors do, one sample of all prompts at a time,
by DDPM with a gradient through it, of which `--torch_samples` are timed and multiplied. At every number of steps ours
is compared with theirs at their default of 250 and with theirs at as many steps. One pinned thread each, in one
process, by processor time. That both denoisers are the same is checked first.
"""

import itertools
import math
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
import torch
import torch.nn.functional as F
from absl import flags

from ctg_jax import rng
from ctg_jax.decode.loop import generate
from ctg_jax.io import write_json
from ctg_jax.methods import dglm
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.diffusion import Schedule
from ctg_jax.types import Prompts, Sampling
from experiments import cli

LATENT, NEW, PROMPT, SCALE, SIGNAL = 384, 20, 8, 10.0, 0.95
DEFAULT = 250  # the authors' steps
DENOISER = dict(width=192, depth=6, heads=4, pseudo_tokens=8, spread=4)
PROMPTER = dict(width=192, depth=3, heads=4, pseudo_tokens=8, spread=4, length=8, kind="frozen")


class Net:
    """A `LatentNet` in PyTorch, with the same parameters."""

    def __init__(self, net, params):
        self.net, self.c = net, net.trunk
        self.p = jax.tree.map(lambda x: torch.from_numpy(np.array(x, np.float32)), params)

    def dense(self, x, p):
        return F.linear(x, p["kernel"], p.get("bias"))

    def norm(self, x, p):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.c.norm_eps) * p["scale"]

    def spread(self, name, vector):
        wide = self.dense(vector, self.p[f"{name}_spread"])
        return self.dense(wide.reshape(len(vector), self.net.pseudo_tokens, -1), self.p[f"{name}_in"])

    def __call__(self, z, gamma, context=None):
        """z [B, Z], gamma a number, context [B, C] or None for the null context."""
        net, c, p = self.net, self.c, self.p
        x = self.spread("latent", z)
        if net.context:
            context = p["null"].expand(len(z), -1) if context is None else context
            x = torch.cat([x, self.spread("context", context)], 1)
        if net.prompt:
            x = torch.cat([x, p["prompt"].expand(len(z), -1, -1)], 1)
        d = p["denoiser"]
        half = c.width // 2
        angle = 1000 / (1 + math.exp(-gamma)) * torch.exp(-math.log(10000.0) * torch.arange(half) / half)
        time_ = torch.cat([angle.sin(), angle.cos()])[None].expand(len(z), -1)
        time_ = self.dense(F.silu(self.dense(time_, d["time"])), d["time_out"])
        x = x + d["positions"][: x.shape[1]]
        below = []
        for i in range(c.depth):
            if i >= (c.depth + 1) // 2:
                x = self.dense(torch.cat([x, below.pop()], -1), d[f"skip_{i}"])
            if i < c.depth // 2:
                below.append(x)
            x = self.block(x, time_, d[f"block_{i}"])
        x = self.norm(x, d["norm"])
        if net.prompt:
            return self.dense(x[:, -net.prompt :], p["out"])
        return self.dense(self.dense(x[:, : net.pseudo_tokens], p["gather"]).reshape(len(z), -1), p["out"])

    def block(self, x, time_, p):
        b, t, width = x.shape
        moves = self.dense(F.silu(time_), p["modulation"])[:, None].chunk(4, -1)
        y = self.norm(x, p["attn_norm"]) * (1 + moves[0]) + moves[1]
        q, k, v = (a.reshape(b, t, self.c.heads, -1) for a in self.dense(y, p["qkv"]).chunk(3, -1))
        q, k = self.norm(q, p["q_norm"]), self.norm(k, p["k_norm"])
        y = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)))
        x = x + self.dense(y.transpose(1, 2).reshape(b, t, width), p["out"])
        y = self.norm(x, p["mlp_norm"]) * (1 + moves[2]) + moves[3]
        m = p["mlp"]
        return x + self.dense(F.silu(self.dense(y, m["gate"])) * self.dense(y, m["up"]), m["down"])


def theirs(control, folder, tokens, context, steps):
    """A function that draws and continues one sample of every prompt; steps of DDPM, variance 0.2."""
    import transformers

    score, prompter = Net(control.net, control.score), Net(control.soft_prompt.net, control.soft_prompt.prompter)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    w, b = (torch.from_numpy(np.array(x)) for x in (control.probes[0], control.biases[0]))
    gammas = np.asarray(Schedule().log_snr(jnp.linspace(1.0, 0.0, steps + 1)), np.float64)
    sig = lambda g: 1 / (1 + math.exp(-g))  # noqa: E731
    context, ids = torch.from_numpy(np.array(context)), torch.from_numpy(np.array(tokens)).long()

    def guided(z, gamma):
        alpha, sigma = math.sqrt(sig(gamma)), math.sqrt(sig(-gamma))
        z = z.detach().requires_grad_()
        x = alpha * z - sigma * score(z, gamma, context)
        energy = F.softplus(-(x / x.norm(dim=1, keepdim=True) @ w + b)).sum()
        return (x - SCALE * sigma**2 / alpha * torch.autograd.grad(energy, z)[0]).detach()

    def run():
        z = torch.randn(len(ids), LATENT)
        for gamma, then in itertools.pairwise(gammas[:-1]):
            x = guided(z, gamma)
            gain = -math.expm1(gamma - then)
            mean = math.sqrt(sig(then)) * (z * (1 - gain) / math.sqrt(sig(gamma)) + gain * x)
            deviation = math.sqrt(sig(-then)) ** 0.8 * math.sqrt(sig(-gamma)) ** 0.2 * math.sqrt(gain)
            z = mean + deviation * torch.randn_like(z)
        x = guided(z, gammas[-2])
        with torch.no_grad():
            x = x / x.norm(dim=1, keepdim=True)
            noisy = math.sqrt(SIGNAL) * x + math.sqrt(1 - SIGNAL) * torch.randn_like(x)
            soft = prompter(noisy, math.log(SIGNAL / (1 - SIGNAL)))
            embeds = torch.cat([lm.transformer.wte(ids), soft], 1)
            past, out = None, []
            for _ in range(NEW):
                step = lm(inputs_embeds=embeds, past_key_values=past, use_cache=True)
                past = step.past_key_values
                token = torch.multinomial(step.logits[:, -1].softmax(-1), 1)
                out.append(token)
                embeds = lm.transformer.wte(token)
        return torch.cat(out, 1)

    return run, score


def define(fv):
    flags.DEFINE_integer("prompts", 64, "number of prompts", 1, flag_values=fv)
    flags.DEFINE_integer("samples", 25, "samples of each prompt", 1, flag_values=fv)
    flags.DEFINE_integer("batch", 320, "rows at once, ours, at most", 1, flag_values=fv)
    flags.DEFINE_multi_integer("steps", [20, 50, 250], "steps of our sampler", 1, flag_values=fv)
    flags.DEFINE_integer(
        "torch_samples", 1, "samples timed in PyTorch, which all take the same time", 1, flag_values=fv
    )
    flags.DEFINE_integer("repeats", 1, "rounds of measurement", 1, flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    torch.set_num_threads(1)
    lm = Transformer.gpt2(width=256, depth=4, heads=4, context=256, vocab=8192)
    params = jax.jit(lm.init)(jax.random.key(0))
    control = dglm.init(lm, jax.random.key(1), latent=LATENT, denoiser=DENOISER, prompter=PROMPTER, attributes=1)
    control = control.replace(
        probes=jax.random.normal(jax.random.key(2), (1, LATENT)), scale=jnp.float32(SCALE), free=jnp.float32(1.0)
    )
    r = np.random.default_rng(0)
    tokens = r.integers(0, lm.vocab, (args.prompts, PROMPT)).astype(np.int32)
    context = r.normal(size=(args.prompts, LATENT)).astype(np.float32)
    context /= np.linalg.norm(context, axis=1, keepdims=True)

    total = args.prompts * args.samples
    size = min(args.batch, total)
    rows = np.arange(total) % args.prompts
    flat = jax.jit(lm.unstack)(params)

    def ours(steps, total=total):
        c = control.replace(draw=dglm.Draw(steps=steps, signal=SIGNAL))
        start = time.process_time()
        for at in range(0, total, size):
            some = rows[np.arange(at, at + size) % len(rows)]
            keys = rng.per_example(jax.random.key(0), jnp.arange(at, at + size))
            cond = {"context": jnp.asarray(context[some])}
            ask = Prompts(jnp.asarray(tokens[some]), jnp.ones((size, PROMPT), bool), keys, cond)
            jax.block_until_ready(generate(lm, flat, ask, c, Sampling(max_new=NEW)))
        return time.process_time() - start

    found = []
    with tempfile.TemporaryDirectory() as folder:
        hf.save(Path(folder), lm, params)
        loops = {n: theirs(control, folder, tokens, context, n) for n in {DEFAULT, *args.steps}}
        score = loops[DEFAULT][1]
        some = min(4, args.prompts)
        z = r.normal(size=(some, LATENT)).astype(np.float32)
        mine = control.net.apply(control.score, z, jnp.full(some, 0.5), context[:some])
        with torch.no_grad():
            same = score(torch.from_numpy(z), 0.5, torch.from_numpy(context[:some])).numpy()
        np.testing.assert_allclose(np.asarray(mine), same, atol=1e-4)
        for _ in range(args.repeats):
            torch_s = {}
            for n, (run, _) in loops.items():
                start = time.process_time()
                for _ in range(args.torch_samples):
                    run()
                torch_s[n] = (time.process_time() - start) / args.torch_samples * args.samples
            for steps in args.steps:
                ours(steps, 1)  # compiles
                found.append(
                    {"steps": steps, "ours": ours(steps), "default": torch_s[DEFAULT], "equal": torch_s[steps]}
                )
    print(f"{args.samples} samples of each of {args.prompts} prompts; PyTorch, sample after sample, with a gradient")
    result = []
    for steps in args.steps:
        mine = [f for f in found if f["steps"] == steps]
        row = {"steps": steps} | {k: statistics.median(f[k] for f in mine) for k in ("ours", "default", "equal")}
        for k in ("default", "equal"):
            row[f"ratio_{k}"] = statistics.median(f[k] / f["ours"] for f in mine)
        result.append(row)
        print(
            f"  {steps:4d} steps: {row['ours']:7.1f} s; PyTorch in as many {row['equal']:7.1f} s, "
            f"{row['ratio_equal']:.1f} times; in {DEFAULT} {row['default']:7.1f} s, {row['ratio_default']:.1f} times",
            flush=True,
        )
    if args.json:
        write_json(Path(args.json), result)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
