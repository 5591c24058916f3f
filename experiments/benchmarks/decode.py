"""Decoding speed beside `transformers.generate` (PyTorch) in float32: of a model in a folder of Hugging Face's layout,
or of the shape of GPT-2 small with random weights.

    python experiments/benchmarks/decode.py [--lm=DIR] [--batch=1 --batch=8] [--repeats=5] [--only=greedy] [--json=FILE]

Both sides run on one pinned thread, in alternation, in one process: PyTorch's thread barriers collapse on a shared
machine, and ratios of neighbours survive its drift. The floor is what the machine itself allows: weights and cache
read once per token at the measured bandwidth, or the products at the measured matrix rate, whichever is slower.
"""

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

from ctg_jax import Chain, Prompts, Sampling, generate, rng, tree
from ctg_jax.controls import truncate
from ctg_jax.controls.streams import Stream
from ctg_jax.decode import loop
from ctg_jax.io import write_json
from ctg_jax.methods import dexperts, steer
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from experiments import cli

CONTROLS = ("greedy", "top_p", "steer", "dexperts", "chain of four")


def bandwidth(size=2**28, repeats=5):
    """Bytes per second of reading a large float32 matrix once (matrix times vector)."""
    w, x = jnp.ones((size // 4 // 1024, 1024)), jnp.ones((1024,))
    f = jax.jit(lambda w, x: w @ x)
    f(w, x).block_until_ready()
    return size / min(timed(lambda: f(w, x).block_until_ready()) for _ in range(repeats))


def matmul_rate(batch, repeats=5):
    """FLOP/s of [batch, 768] times [3072, 768] transposed: the shape of a decode step's products."""
    x, w = jnp.ones((batch, 768)), jnp.ones((3072, 768))
    f = jax.jit(lambda x, w: jax.lax.fori_loop(0, 20, lambda _, x: (x @ w.T)[:, :768] * 1e-3, x))
    f(x, w).block_until_ready()
    return 20 * 2 * batch * 768 * 3072 / min(timed(lambda: f(x, w).block_until_ready()) for _ in range(repeats))


def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def controls(lm, params, key):
    """name -> (control, whether decoding is greedy). Strengths are leaves, so changing one recompiles nothing."""
    top_p = truncate.rules(lm, top_p=0.9)
    push = steer.init(lm, key)
    push = push.replace(vector=jax.random.normal(key, push.vector.shape), scale=jnp.float32(0.1))
    noise = jax.tree.map(lambda x: x * 1.01, params)
    experts = dexperts.experts(Stream(params, lm=lm), Stream(noise, lm=lm))
    four = Chain((push, experts, truncate.RepetitionPenalty(1.2, vocab=lm.vocab), truncate.TopP(0.9)))
    made = ((Chain(()), True), (top_p, False), (push, True), (experts, True), (four, False))
    return dict(zip(CONTROLS, made, strict=True))


def torch_model(folder):
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # nothing ends a text, on either side
    return torch, model.eval()


def models(folder, layers):
    """(LM, its weights laid out for decoding, torch, the reference model)."""
    if folder:
        lm, params = hf.load(folder)
        torch, reference = torch_model(folder)
    else:
        lm = Transformer.gpt2(depth=layers)
        params = jax.jit(lm.init)(jax.random.key(0))
        with tempfile.TemporaryDirectory() as made:
            hf.save(made, lm, params)
            torch, reference = torch_model(made)
    return lm, jax.block_until_ready(jax.jit(lm.unstack, donate_argnums=0)(params)), torch, reference


def define(fv):
    flags.DEFINE_string("lm", None, "folder of the language model, in Hugging Face's layout", flag_values=fv)
    flags.DEFINE_multi_integer("batch", [1, 8, 32], "rows at once", 1, flag_values=fv)
    flags.DEFINE_integer("prompt", 32, "tokens of a prompt", 1, flag_values=fv)
    flags.DEFINE_integer("new", 64, "new tokens", 1, flag_values=fv)
    flags.DEFINE_integer("repeats", 5, "rounds of measurement", 1, flag_values=fv)
    flags.DEFINE_integer("layers", 12, "layers of the random model", 1, flag_values=fv)
    flags.DEFINE_multi_enum("only", None, CONTROLS, "the controls that are measured", flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)

    lm, params, torch, reference = models(args.lm, args.layers)
    once = params["embed"] if not lm.tied else {k: v for k, v in params["embed"].items() if k != "tokens"}
    weights = tree.size_bytes(params) - tree.size_bytes(once)  # the rows of an embedding that are read are few
    read = bandwidth()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}, one thread each")
    print(f"weights {weights / 1e6:.1f} MB, bandwidth {read / 1e9:.1f} GB/s")
    rows = []
    for batch in args.batch:
        tokens = np.random.default_rng(0).integers(0, lm.vocab - 1, (batch, args.prompt)).astype(np.int32)
        prompts = Prompts(
            jnp.asarray(tokens), jnp.ones(tokens.shape, bool), rng.per_example(jax.random.key(1), jnp.arange(batch))
        )
        ids = torch.as_tensor(tokens, dtype=torch.long)
        per_token = 2 * weights / 4 * batch / matmul_rate(batch)
        cache = 2 * lm.depth * batch * (args.prompt + args.new / 2) * lm.kv_heads * lm.head_dim * 4
        floor = max((weights + cache) / read, per_token)
        floors = f"{batch / floor:.1f} tok/s"
        for name, (control, greedy) in controls(lm, params, jax.random.key(2)).items():
            if args.only and name not in args.only:
                continue
            sampling = Sampling(max_new=args.new, greedy=greedy)
            options = dict(do_sample=not greedy, top_k=0) | ({} if greedy else {"top_p": 0.9})

            def ours(control=control, sampling=sampling, prompts=prompts):
                return jax.block_until_ready(generate(lm, params, prompts, control, sampling))

            def theirs(ids=ids, options=options):
                mask = torch.ones_like(ids)
                with torch.no_grad():
                    return reference.generate(ids, attention_mask=mask, max_new_tokens=args.new, **options)

            def plain(sampling=sampling, prompts=prompts):
                return jax.block_until_ready(generate(lm, params, prompts, Chain(()), sampling))

            compiled = timed(ours)
            plain()
            size = loop.loop._cache_size()
            same = (
                (np.asarray(ours().tokens) == theirs()[:, args.prompt :].numpy()).mean() if name == "greedy" else None
            )
            pairs = [(timed(ours), timed(theirs), timed(plain)) for _ in range(args.repeats)]
            assert loop.loop._cache_size() == size, "recompiled between calls"
            made = batch * args.new
            ratios = sorted(t / o for o, t, _ in pairs)
            row = {
                "batch": batch,
                "control": name,
                "tok_s": made / statistics.median(o for o, _, _ in pairs),
                "torch_tok_s": made / statistics.median(t for _, t, _ in pairs),
                "ratio": statistics.median(ratios),
                "ratio_min": ratios[0],
                "ratio_max": ratios[-1],
                "of_floor": made / min(o for o, _, _ in pairs) / (batch / floor),
                "of_plain": statistics.median(o / p for o, _, p in pairs),
                "first_call_s": compiled,
                "same_tokens": same,
            }
            rows.append(row)
            print(
                f"batch {batch:3d} {name:14s} {row['tok_s']:7.1f} tok/s, torch {row['torch_tok_s']:7.1f} "
                f"({'greedy' if greedy else 'top-p'}), ratio {row['ratio']:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}), "
                f"{row['of_plain']:.2f} of plain, floor {floors} ({row['of_floor']:.0%}), first call {compiled:.1f} s"
                + (f", same tokens {same:.1%}" if same is not None else ""),
                flush=True,
            )
    if args.json:
        write_json(Path(args.json), rows)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
