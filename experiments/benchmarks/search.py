"""A search by beams over segments here, and the same loop around `transformers.generate`, candidates per second.

    python experiments/benchmarks/search.py [--shape=gpt2|mini|tiny] [--prompts=2] [--beams=8] [--n=4] [--segment=8]
                                            [--new=32] [--repeats=3] [--json=FILE]

Both keep the best of beams x n candidates after every segment, by a reward that counts tokens and costs nothing, so
what is compared is the decoding. Here the rows of the beams that go on keep their keys and values. The other loop is
what users write: the kept texts, each repeated n times, are given to `generate` again, which reads them from the
beginning (`again`); and one that keeps the cache as well, by a call of the model for each token, with the caches of the
kept rows chosen in between (`kept`). Both sides draw from the whole distribution, in float32 with random weights of one
shape, on one pinned thread in one process, in alternation; ratios are medians over rounds.
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
import numpy as np
from absl import flags

from ctg_jax.io import write_json
from ctg_jax.learn.search import Plan, search
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.stages.sampling import Options
from experiments import cli

SHAPES = {
    "gpt2": dict(),
    "mini": dict(vocab=8192, width=256, depth=6, heads=4, context=256),  # yelp-gpt2-mini
    "tiny": dict(vocab=64, width=16, depth=2, heads=2, context=64),
}


class Numbers:
    """A tokenizer whose texts are ids with spaces between them."""

    pad, ends, eos = 0, (), None

    def __init__(self, vocab):
        self.vocab = vocab

    def known(self, vocab):
        return np.ones(vocab, bool)

    def encode_prompts(self, texts):
        return [[int(i) for i in text.split()] for text in texts]

    def before_end(self, ids):
        return list(ids)

    def decode_after(self, prompts, rows):
        return [" ".join(map(str, row)) for row in rows]


def valued(rows):
    """float64 [n]: the share of even ids in each row of ids."""
    return np.asarray([np.mean(np.asarray(row) % 2 == 0) for row in rows], np.float64)


def ours(lm, params, args, prompts):
    tokenizer = Numbers(lm.vocab)
    texts = [" ".join(map(str, row)) for row in prompts]
    plan = Plan(n=args.n, beams=args.beams, segment=args.segment)

    def value(prompts, texts):
        return valued([[int(i) for i in text.split()] for text in texts])

    def run():
        options = Options(n=1, max_new=args.new, batch=len(texts) * plan.rows)
        made = search(lm, params, tokenizer, texts, value, plan=plan, options=options)
        return [row["tokens"] for rows in made for row in rows]

    return run


def kept_rows(args, tokens, width):
    """The rows that go on, each n times: those of the best beams of each prompt."""
    scores = valued(tokens[:, width:].tolist()).reshape(-1, args.beams * args.n)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : args.beams]
    return np.repeat((best + np.arange(len(scores))[:, None] * scores.shape[1]).reshape(-1), args.n)


def again(torch, model, args, prompts):
    """The loop around `generate`, which reads the kept texts again."""

    def run():
        width, rows = len(prompts[0]), torch.as_tensor(np.repeat(prompts, args.beams * args.n, axis=0)).long()
        for done in range(0, args.new, args.segment):
            more = min(args.segment, args.new - done)
            with torch.no_grad():
                rows = model.generate(
                    rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0, max_new_tokens=more,
                    min_new_tokens=more, pad_token_id=0,
                )  # fmt: skip
            rows = rows[torch.as_tensor(kept_rows(args, rows.numpy(), width))]
        return rows[:: args.beams * args.n, width:].tolist()

    return run


def kept(torch, model, args, prompts):
    """The same with a cache that stays, and a call of the model for each token."""

    def run():
        width, rows = len(prompts[0]), torch.as_tensor(np.repeat(prompts, args.beams * args.n, axis=0)).long()
        with torch.no_grad():
            out = model(input_ids=rows, use_cache=True)
            for done in range(args.new):
                token = torch.multinomial(out.logits[:, -1].softmax(-1), 1)
                rows, cache = torch.cat([rows, token], 1), out.past_key_values
                if (done + 1) % args.segment == 0 or done + 1 == args.new:
                    at = torch.as_tensor(kept_rows(args, rows.numpy(), width))
                    rows, token = rows[at], token[at]
                    cache.reorder_cache(at)
                if done + 1 < args.new:
                    out = model(input_ids=token, past_key_values=cache, use_cache=True)
        return rows[:: args.beams * args.n, width:].tolist()

    return run


def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def define(fv):
    flags.DEFINE_enum("shape", "gpt2", list(SHAPES), "of the language model", flag_values=fv)
    flags.DEFINE_integer("prompts", 2, "prompts at once", 1, flag_values=fv)
    flags.DEFINE_integer("beams", 8, "kept after each look", 1, flag_values=fv)
    flags.DEFINE_integer("n", 4, "candidates of a beam", 1, flag_values=fv)
    flags.DEFINE_integer("segment", 8, "tokens between two looks", 1, flag_values=fv)
    flags.DEFINE_integer("new", 32, "new tokens", 1, flag_values=fv)
    flags.DEFINE_integer("prompt", 32, "tokens of a prompt", 1, flag_values=fv)
    flags.DEFINE_integer("repeats", 3, "rounds of measurement", 1, flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    lm = Transformer.gpt2(**SHAPES[args.shape])
    params = jax.jit(lm.init)(jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        hf.save(folder, lm, params)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    params = jax.block_until_ready(jax.jit(lm.unstack)(params))
    prompts = np.random.default_rng(0).integers(1, lm.vocab, (args.prompts, args.prompt))
    calls = {"ours": ours(lm, params, args, prompts)}
    calls |= {f.__name__: f(torch, model, args, prompts) for f in (again, kept)}
    for name, call in calls.items():
        found = call()
        assert [len(row) for row in found] == [args.new] * args.prompts, name
    spent = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            spent[name].append(timed(call))
    size = args.prompts * args.beams * args.n * args.new
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}, one thread each")
    print(
        f"{args.shape}, random weights: {args.prompts} prompts of {args.prompt} tokens, {args.beams} beams x {args.n} "
        f"candidates, {args.new} new tokens in segments of {args.segment}, medians of {args.repeats}"
    )
    rows = []
    for name, times in spent.items():
        row = {"loop": name, "seconds": statistics.median(times), "tok_s": size / statistics.median(times)}
        if name != "ours":
            ratios = [theirs / mine for theirs, mine in zip(times, spent["ours"])]
            row |= {"over_ours": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
        rows.append(row)
        beside = "" if name == "ours" else f", {row['over_ours']:.2f} times as long as ours"
        print(f"{name:6s} {row['seconds']:8.2f} s, {row['tok_s']:8.0f} tokens per second{beside}")
    if args.json:
        write_json(Path(args.json), rows)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
