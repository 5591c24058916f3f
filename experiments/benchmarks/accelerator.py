"""What one accelerator gives: decoding, banks of controls, the cost of every kind of control, and a training step.

    make bench-accelerator                                    within nine minutes; build/bench/accelerator.json and .md
    python experiments/benchmarks/accelerator.py --dry        tiny shapes on any device, in seconds

It needs the packages that a bare CUDA image has (jax, flax, optax, orbax, numpy, safetensors, tokenizers, transformers
and torch) and reads no data: the models have the shapes of GPT-2 XL, Llama 1B and Gemma 270M with random weights in
bfloat16. Sections run in order until the time is up, and what was left out is named. The floor of decoding is what the
device itself allows: weights and cache, read once per token at the measured bandwidth.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import IDENTITY, Sampling, generate, tree
from ctg_jax.controls import truncate
from ctg_jax.controls.streams import Stream
from ctg_jax.learn import train
from ctg_jax.learn.losses import control_loss
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.methods import cav, dexperts, finetune, lm_steer, steer
from ctg_jax.models.decoder import Transformer
from experiments.benchmarks import bank

DTYPE = {"dtype": "bfloat16", "param_dtype": "bfloat16"}


def shapes(dry):
    """name -> language model."""
    if dry:
        return {"tiny": bank.shapes("tiny")}
    llama = dict(vocab=128256, width=2048, depth=16, heads=32, kv_heads=8, mlp_width=8192, context=8192)
    return {
        "gpt2-xl": Transformer.gpt2(width=1600, depth=48, heads=25, **DTYPE),
        "llama-1b": Transformer.llama(**llama, tied=True, **DTYPE),
        "gemma-270m": bank.shapes("gemma", **DTYPE),
    }


def timed(f, repeats=3):
    """Seconds of a call, the median of several after one that compiles."""
    jax.block_until_ready(f())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def device(dry):
    """{"bandwidth": bytes per second of reading a large array, "matrix": FLOP/s of a large product in bfloat16}."""
    size, n = (2**20, 256) if dry else (2**30, 8192)
    x, w = jnp.ones(size // 4), jnp.ones((n, n), jnp.bfloat16)
    total, product = jax.jit(jnp.sum), jax.jit(lambda w: w @ w)
    return {"bandwidth": size / timed(lambda: total(x)), "matrix": 2 * n**3 / timed(lambda: product(w))}


def opened(lm):
    return jax.block_until_ready(jax.jit(lambda key: lm.unstack(lm.init(key)))(jax.random.key(0)))


def decoding(name, lm, params, found, dry):
    """Tokens per second of a batch, and their share of what the bandwidth allows."""
    new, length = (4, 4) if dry else (64, 32)
    once = 0 if lm.tied else tree.size_bytes(params["embed"])
    weights, width = tree.size_bytes(params) - once, jnp.dtype(lm.dtype).itemsize
    for batch in (1, 2) if dry else (1, 32, 256):
        prompts = bank.prompts_of(lm, batch, length)
        seconds = timed(lambda prompts=prompts: generate(lm, params, prompts, IDENTITY, Sampling(max_new=new)))
        cache = 2 * lm.depth * batch * (length + new / 2) * lm.kv_heads * lm.head_dim * width
        floor = new * (weights + cache) / found["bandwidth"]
        row = {"section": "decoding", "what": f"{name}, batch {batch}", "tok_s": batch * new / seconds}
        yield row | {"of_bandwidth": floor / seconds}


def against_transformers(name, lm, params, found, dry):
    """The same of `transformers.generate`, where its model and PyTorch are here and PyTorch sees the device."""
    try:
        import torch
        import transformers
    except ImportError as e:
        yield {"section": "transformers", "what": name, "left_out": str(e)}
        return
    if not name.startswith(("gpt2", "tiny")) or not (torch.cuda.is_available() or dry):
        yield {"section": "transformers", "what": name, "left_out": "measured for GPT-2 where PyTorch sees a GPU"}
        return
    sizes = dict(vocab_size=lm.vocab, n_positions=lm.context, n_embd=lm.width, n_layer=lm.depth, n_head=lm.heads)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).to(place, torch.bfloat16).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    new = 4 if dry else 64
    for batch in (1,) if dry else (1, 32, 256):
        tokens = np.asarray(bank.prompts_of(lm, batch, 4 if dry else 32).tokens)
        ids = torch.as_tensor(tokens, dtype=torch.long).to(place)

        def run(ids=ids):
            with torch.no_grad():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=True, top_k=0
                )
            return out.cpu().numpy()

        yield {"section": "transformers", "what": f"{name}, batch {batch}", "tok_s": batch * new / timed(run)}


def controls(name, lm, params, found, dry):
    """Seconds of decoding under each kind of control, relative to none."""
    key, new, batch = jax.random.key(2), 4 if dry else 32, 2 if dry else 32
    push = steer.init(lm, key)
    push = push.replace(vector=0.01 * jax.random.normal(key, push.vector.shape))
    tuned = finetune.init(lm, key, kind="lora", rank=8)
    kinds = {
        "none": IDENTITY, "top_p": truncate.rules(lm, top_p=0.9), "steer": push, "cav": cav.init(lm, key),
        "rotate": push.replace(operator="rotate"), "lm_steer": lm_steer.init(lm, key, rank=64), "lora": tuned,
        "dexperts": dexperts.experts(Stream(control=tuned, lm=lm), Stream(control=tuned, lm=lm)),
    }  # fmt: skip
    prompts, base = bank.prompts_of(lm, batch, 4 if dry else 32), None
    for kind, control in kinds.items():
        seconds = timed(lambda control=control: generate(lm, params, prompts, control, Sampling(max_new=new)))
        base = base or seconds
        yield {"section": "controls", "what": f"{name}, {kind}", "relative": seconds / base}


def banks(name, lm, params, found, dry):
    """`experiments/benchmarks/bank.py`."""
    sizes = dict(batch=4, prompt=4, new=3, repeats=1) if dry else dict(batch=256, prompt=16, new=32, repeats=3)
    for row in bank.measure(lm, ("steer", "lora"), (0, 1, 4) if dry else bank.COUNTS, **sizes):
        what = f"{name}, {row['kind']}, {row['distinct']} distinct"
        yield {"section": "banks", "what": what, "tok_s": row["tok_s"], "relative": row["relative"]}


def training(name, lm, params, found, dry):
    """A training step of LoRA and of all weights: its share of the measured matrix rate, at 6 FLOP per weight and token
    (4 where the weights are frozen)."""
    batch, length = (2, 8) if dry else (16, 256)
    stacked = {**params, "layers": tree.stack(params["layers"])}
    weights = sum(x.size for x in jax.tree.leaves(params["layers"])) + lm.vocab * lm.width
    texts = {"tokens": jnp.ones((batch, length), jnp.int32), "mask": jnp.ones((batch, length), bool)}
    texts["ids"] = jnp.arange(batch)
    for kind, flops in (("lora", 4), ("full", 6)):
        step = train.make_step(control_loss(lm), optimizer(1e-4))
        state = train.init_state(finetune.init(lm, jax.random.key(0), kind=kind), step.tx, jax.random.key(0))
        run = jax.jit(step)
        seconds = timed(lambda run=run, state=state: run(state, {"params": stacked}, texts))
        share = flops * weights * batch * length / seconds / found["matrix"]
        row = {"section": "training", "what": f"{name}, {kind}", "tok_s": batch * length / seconds}
        yield row | {"of_matrix_rate": share}


SECTIONS = (decoding, controls, banks, training, against_transformers)


def measure(dry, minutes):
    """(facts about the device, rows); sections that the time does not allow are rows with `left_out`."""
    end = time.monotonic() + 60 * minutes
    kind = jax.devices()[0].device_kind
    facts = {"device": kind, "jax": jax.__version__, **device(dry)}
    rows = []
    for name, lm in shapes(dry).items():
        params = opened(lm)
        for section in SECTIONS:
            if time.monotonic() > end:
                rows.append({"section": section.__name__, "what": name, "left_out": "the time was up"})
                continue
            for row in section(name, lm, params, facts, dry):
                rows.append(row)
                print(*(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in row.items()), sep=", ", flush=True)
    return facts, rows


def markdown(facts, rows):
    """One table under a line about the device."""
    numbers = ("tok_s", "relative", "of_bandwidth", "of_matrix_rate")
    speed = f"{facts['bandwidth'] / 1e9:.0f} GB/s, {facts['matrix'] / 1e12:.1f} TFLOP/s"
    lines = [f"{facts['device']}, jax {facts['jax']}, {speed}", ""]
    lines += ["| section | what | tokens/s | relative | of bandwidth | of matrix rate | left out |"]
    lines += ["|---|---|--:|--:|--:|--:|---|"]
    for row in rows:
        cells = [f"{row[n]:.4g}" if n in row else "" for n in numbers]
        lines.append("| " + " | ".join([row["section"], row["what"], *cells, row.get("left_out", "")]) + " |")
    return "\n".join(lines) + "\n"


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no further section begins")
    parser.add_argument("--out", default="build/bench", help="folder of accelerator.json and accelerator.md")
    args = parser.parse_args(argv)
    facts, rows = measure(args.dry, args.minutes)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "accelerator.json").write_text(json.dumps({"device": facts, "rows": rows}, indent=1), "utf-8")
    (out / "accelerator.md").write_text(markdown(facts, rows), "utf-8")
    print(out / "accelerator.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
