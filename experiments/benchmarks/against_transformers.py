"""A real language model here and in `transformers`, in float32: logits, the log-likelihood of texts, and greedy text.

    python experiments/benchmarks/against_transformers.py --lm=DIR --texts=FILE [--count=50] [--prompts=20] [--new=50]

DIR is a folder in Hugging Face's layout with a tokenizer. FILE has one text a line, or JSON records with a "text" or
with a "prompt" and a "continuation" (RealToxicityPrompts). Torch runs on one thread. Printed are the largest difference
of the logits over all texts, and over one that is made longer than the windows of attention (by joining texts); nats
per token of both; and how many greedy completions are equal, each with the logit gap at the first difference.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import flags

from ctg_jax.data import load_tokenizer
from ctg_jax.data.tokenizer import pad_rows, to_prompts
from ctg_jax.decode import loop
from ctg_jax.models import hf
from ctg_jax.types import InputError, Sampling
from experiments import cli

LENGTHS = (32, 64, 128, 256)


def read_texts(path, count):
    out = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line) if line.lstrip().startswith("{") else {"text": line.strip()}
            text = row.get("text") or row.get("prompt", "") + row.get("continuation", "")
            out += [text] if text else []
            if len(out) == count:
                break
    return out


def compare(read, model, ids):
    """(largest difference of the logits, nats here, nats there, predicted tokens) of one text."""
    size = next((n for n in LENGTHS if n >= len(ids)), len(ids))
    tokens, mask = pad_rows([ids], size, 0, left=False)
    ours = np.asarray(read(jnp.asarray(tokens), jnp.asarray(mask)))[0, : len(ids)]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()

    def nats(z):
        z = z[:-1].astype(np.float64)
        top = z.max(-1, keepdims=True)
        logsum = np.log(np.exp(z - top).sum(-1)) + top[:, 0]
        return float((logsum - z[np.arange(len(z)), ids[1:]]).sum())

    return float(np.abs(ours - theirs).max()), nats(ours), nats(theirs), len(ids) - 1


def greedy(lm, params, tokenizer, model, prompts, new):
    """(equal completions, the gap of torch's two best logits at each first difference)."""
    sampling = Sampling(max_new=new, eos=(tokenizer.eos,), pad=0, greedy=True)
    batch = to_prompts(tokenizer, prompts, seed=0)
    samples = loop.generate(lm, lm.unstack(params), batch, sampling=sampling)
    equal, gaps = 0, []
    for prompt, row, kept in zip(tokenizer.encode_prompts(prompts), samples.tokens, samples.mask):
        given = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(given, max_new_tokens=new, do_sample=False, eos_token_id=tokenizer.eos, pad_token_id=0)
        theirs, ours = out[0, len(prompt) :].tolist(), np.asarray(row)[np.asarray(kept)].tolist()
        if ours == theirs:
            equal += 1
            continue
        at = next(i for i in range(new) if ours[i : i + 1] != theirs[i : i + 1])
        with torch.no_grad():
            z = model(out[:, : len(prompt) + at]).logits[0, -1]
        best = z.topk(2).values
        gaps.append(float(best[0] - best[1]))
    return equal, gaps


def define(fv):
    flags.DEFINE_string("lm", None, "folder of the language model", flag_values=fv)
    flags.DEFINE_string("texts", None, "file of texts", flag_values=fv)
    flags.DEFINE_integer("count", 50, "texts whose logits are compared", 1, flag_values=fv)
    flags.DEFINE_integer("likelihoods", 0, "texts whose likelihoods are compared, if more", 0, flag_values=fv)
    flags.DEFINE_integer("prompts", 20, "prompts that are completed", 1, flag_values=fv)
    flags.DEFINE_integer("new", 50, "new tokens", 1, flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    if not args.lm or not args.texts:
        raise InputError("--lm and --texts are needed: the folder of a language model and a file of texts")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = load_tokenizer(args.lm)
    lm, params = hf.load(args.lm)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.lm, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    compiled = jax.jit(lambda p, t, m: lm.apply(p, lm.embed(p, t), m).logits)
    texts = read_texts(args.texts, max(args.count, args.likelihoods))
    rows = tokenizer.encode_prompts(texts)
    began = time.time()
    found = [compare(lambda t, m: compiled(params, t, m), model, ids) for ids in rows]
    worst = max(d for d, *_ in found[: args.count])
    size = sum(n for *_, n in found)
    here, there = (sum(f[i] for f in found) / size for i in (1, 2))
    print(f"{len(found)} texts, {size} predicted tokens; {time.time() - began:.0f} s")
    print(f"largest difference of logits: {worst:.2e} ({args.count} texts), {max(d for d, *_ in found):.2e} (all)")
    print(f"perplexity: {np.exp(here):.5f} here, {np.exp(there):.5f} there, relative {abs(np.expm1(here - there)):.1e}")

    windows = [layer.window for layer in lm.pattern if layer.window is not None]
    long = [tokenizer.bos] if tokenizer.bos is not None else []
    for row in tokenizer.encode(texts):
        long = (long + row) if len(long) < max([256, *windows]) * 1.25 else long
    long = long[: lm.context]
    found = compare(lambda t, m: compiled(params, t, m), model, long)
    print(f"one text of {len(long)} tokens, windows {sorted(set(windows))}: largest difference {found[0]:.2e}")

    prompts = [" ".join(t.split()[:6]) for t in texts[: args.prompts]]
    equal, gaps = greedy(lm, params, tokenizer, model, prompts, args.new)
    print(f"greedy, {args.new} tokens: {equal} of {len(prompts)} equal; gaps at the first difference: {gaps}")


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
