"""One round of Quark beside a plain PyTorch implementation of the same round: explore, score, learn.

    python experiments/benchmarks/quark.py [--shape=mini] [--mixture=paper] [--repeats=3] [--json=FILE]

The mixture of samples and updates is that of the paper (500 updates of 128 rows after 85,000 samples: three rows for
four samples) or the one that earlier figures have (four rows for a sample), both scaled down to updates of 32 rows.

Both sides sample 20 tokens after the same prompts from the policy on its best token, score them with the same
classifier (a BERT of six layers, random weights), sort them into five quantiles and make the same number of updates of
all weights: cross-entropy on the reward token, KL to the frozen model over the whole vocabulary, entropy, Adam. They
run on one pinned thread, in alternation, in one process, and processor time is counted, so that a neighbour who takes
turns on the core does not matter. The share of it outside compiled programs (tokenizer, batches, Python), which is
printed for each part and for the round, is what an accelerator would be idle. The floor of learning is the FLOPs of
its products at the best rate measured for one large product. Last comes what it saves when scoring keeps the frozen
model's states (`keep_states`): an update that reads them, beside one that reads the texts again, of all weights and of
a LoRA.
"""

import os
import platform
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

from ctg_jax.data import load, train_bpe
from ctg_jax.decode import loop, strategies
from ctg_jax.io import write_json
from ctg_jax.learn import calibrate, fitting, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.learn.pool import batches as pool_batches
from ctg_jax.methods import quark
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.rewards import Embedder, SequenceClassifier
from ctg_jax.stages import sampling
from ctg_jax.types import Prompts
from experiments import cli

SHAPES = {"mini": dict(width=256, depth=4, heads=4, context=256, vocab=8192), "small": dict(vocab=50257)}
MIXTURES = {"paper": (340, 8), "old": (64, 8)}  # samples, one of each prompt, and updates
K, NEW, RATE, KL, ENTROPY = 5, 20, 1e-5, 0.05, 0.06


def processor():
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def matmul_rate(n=1536, repeats=5):
    """FLOP per processor second of one [n, n] product in float32."""
    x, best = jnp.ones((n, n)), 0.0
    f = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ()))))
    f(x, x).block_until_ready()
    for _ in range(repeats):
        start = time.process_time()
        f(x, x).block_until_ready()
        best = max(best, 2 * n**3 / (time.process_time() - start))
    return best


def flops(lm, rows, prompt, new):
    """FLOPs of the products of an update of all weights, on rows of a reward token, `prompt` and `new` tokens: the
    policy forward and backward, the frozen model forward; logits of the new tokens alone."""
    blocks = lm.depth * lm.width * ((2 * lm.heads + 2 * lm.kv_heads) * lm.head_dim + 2 * lm.mlp_width)
    read = [(6, prompt + new), (2, prompt + new - 1)]
    attention = sum(k * 2 * lm.depth * n**2 * lm.heads * lm.head_dim for k, n in read)
    return rows * (blocks * sum(k * n for k, n in read) + 8 * new * lm.width * lm.vocab + attention)


class Folded:
    """A tokenizer under a model with more tokens: those it lacks are read modulo its size, so that what random weights
    write is as long a text as any."""

    def __init__(self, tokenizer, size):
        self.inner, self.size = tokenizer, size

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def decode(self, rows):
        return self.inner.decode([[t % self.size for t in row] for row in rows])


class Busy:
    """Seconds spent inside compiled programs."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self, f):
        def timed(*args, **kw):
            start = time.process_time()
            out = jax.block_until_ready(f(*args, **kw))
            self.seconds += time.process_time() - start
            return out

        return timed


class Timed(Embedder):
    """An embedder whose compiled program is timed; its tokenizer and its batches are not."""

    busy = None

    def run(self, fn, texts, width):
        return super().run(self.busy(fn), texts, width)


def ours(lm, params, tokenizer, texts, judge, steps, size):
    """A function that runs a round and gives (state, seconds of explore, score, learn, those inside programs); and the
    state to begin with. The embedder of the judge is `Timed`."""
    state, step = learner(lm, params, "full")
    flat = jax.jit(lm.unstack)(params)
    busy = judge.embedder.busy = Busy()
    strategies.run = busy(strategies.run)
    frozen = {"params": params}

    def round_(state):
        clock = [(time.process_time(), busy.seconds)]
        parts = sampling.complete(lm, flat, tokenizer, texts, state.params, sampling.Options(max_new=NEW, batch=size))
        rows = [r for part in parts for r in part]
        clock.append((time.process_time(), busy.seconds))
        scores = judge([r["prompt"] for r in rows], [r["text"] for r in rows])
        clock.append((time.process_time(), busy.seconds))
        bins = calibrate.bins(scores, K)
        pool = [{**r, "bin": int(b)} for r, b in zip(rows, bins)]
        batches = pool_batches(pool, tokenizer, batch=size, seed=0, fields=("bin",))
        run = busy(step)
        # All batches first: their threads, which read ahead, would otherwise work while the step is timed.
        for batch in [next(batches) for _ in range(steps)]:
            state, _ = run(state, frozen, batch)
        clock.append((time.process_time(), busy.seconds))
        spent, inside = np.diff(np.asarray(clock), axis=0).T
        return state, spent, inside

    return round_, state


def learner(lm, params, kind):
    """(the state to begin with, the compiled step)."""
    control = fitting.like_words(quark.init(lm, jax.random.key(0), tokens=K, kind=kind), lm, params, jax.random.key(1))
    tx = optimizer(RATE, trained=r"delta/changes/.*|codes")
    state = train.init_state(control, tx, jax.random.key(2))
    loss = quark.loss(lm, quark.Objective(kl=KL, entropy=ENTROPY))
    return state, jax.jit(train.make_step(loss, tx), donate_argnums=0)


def kept(lm, params, kind, *, rows, prompt, repeats):
    """Ratios of the processor time of an update that reads the texts under the frozen model again over that of one
    that reads kept states, in alternation, and how far apart the two losses are."""
    draw, frozen = np.random.default_rng(0), {"params": params}
    state, step = learner(lm, params, kind)
    tokens, new = (draw.integers(0, lm.vocab, (rows, n), np.int32) for n in (prompt, NEW))
    batch = {"tokens": tokens, "mask": np.ones(tokens.shape, bool), "ids": np.arange(rows, dtype=np.int32)}
    batch |= {"completion": new, "written": np.ones(new.shape, bool), "bin": np.arange(rows, dtype=np.int32) % K}
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(batch["mask"]), jax.random.split(jax.random.key(0), rows))
    states = np.asarray(loop.scored(lm, params, prompts, jnp.asarray(new), states=True)[1])
    own = jax.tree.map(jnp.copy, state)  # two runs of the same updates
    ratios, apart = [], 0.0
    for turn in range(repeats + 1):
        start = time.process_time()
        state, a = jax.block_until_ready(step(state, frozen, batch))
        middle = time.process_time()
        own, b = jax.block_until_ready(step(own, frozen, batch | {"states": states}))
        if turn:  # the first compiles
            ratios.append((middle - start) / (time.process_time() - middle))
            apart = max(apart, abs(float(a["loss"]) - float(b["loss"])))
    return sorted(ratios), apart


def theirs(folder, classifier, tokenizer, texts, steps, size):
    """The same round in PyTorch: K more tokens in the vocabulary, a frozen copy, `generate`, Adam."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    load_ = transformers.AutoModelForCausalLM.from_pretrained
    frozen, policy = (load_(folder, attn_implementation="sdpa", dtype=torch.float32) for _ in range(2))
    v = frozen.config.vocab_size
    policy.resize_token_embeddings(v + K, mean_resizing=False)
    tx = torch.optim.Adam(policy.parameters(), lr=RATE)
    encoded = tokenizer.encode(texts)
    longest, pad = max(map(len, encoded)) + 1, tokenizer.eos
    draw = np.random.default_rng(0)

    def padded(rows, length, left):
        ids, mask = np.full((len(rows), length), pad), np.zeros((len(rows), length))
        for i, r in enumerate(rows):
            at = slice(length - len(r), length) if left else slice(0, len(r))
            ids[i, at], mask[i, at] = r, 1
        return torch.as_tensor(ids, dtype=torch.long), torch.as_tensor(mask, dtype=torch.long)

    def round_():
        start, found = time.process_time(), []
        for at in range(0, len(encoded), size):
            heads = [[v + K - 1, *r] for r in encoded[at : at + size]]
            ids, mask = padded(heads, longest, True)
            with torch.no_grad():
                out = policy.generate(
                    ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=NEW, pad_token_id=pad,
                    suppress_tokens=list(range(v, v + K)),
                )  # fmt: skip
            found += [(h[1:], o[longest:].tolist()) for h, o in zip(heads, out)]
        written = tokenizer.decode([c for _, c in found])
        explored = time.process_time()
        scores = []
        for at in range(0, len(written), size):
            rows = [r or [0] for r in tokenizer.encode(written[at : at + size])]
            ids, mask = padded(rows, max(map(len, rows)), False)
            with torch.no_grad():
                z = classifier(input_ids=ids, attention_mask=mask).logits
            scores += z.softmax(-1)[:, 1].tolist()
        scored = time.process_time()
        bins = calibrate.bins(scores, K)
        for _ in range(steps):
            some = draw.integers(0, len(found), size)
            heads = [found[i][0] for i in some]
            tails, written_mask = padded([found[i][1][:NEW] for i in some], NEW, False)
            ids, mask = padded([[v + int(bins[i]), *h] for i, h in zip(some, heads)], longest, True)
            every, seen = torch.cat([ids, tails], 1), torch.cat([mask, written_mask], 1)
            z = policy(every, attention_mask=seen).logits[:, longest - 1 : -1, :v]
            with torch.no_grad():
                plain, plain_mask = padded(heads, longest, True)
                base = frozen(torch.cat([plain, tails], 1), attention_mask=torch.cat([plain_mask, written_mask], 1))
                base = base.logits[:, longest - 1 : -1].log_softmax(-1)
            logp = z.log_softmax(-1)
            ce = -logp.gather(2, tails[:, :, None])[:, :, 0]
            far = (base.exp() * (base - logp)).sum(-1)
            free = -(logp.exp() * logp).sum(-1)
            loss = ((ce + KL * far - ENTROPY * free) * written_mask).sum() / written_mask.sum()
            tx.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            tx.step()
        end = time.process_time()
        return explored - start, scored - explored, end - scored

    return round_


def define(fv):
    flags.DEFINE_multi_enum("shape", list(SHAPES), list(SHAPES), "shapes of the model", flag_values=fv)
    flags.DEFINE_multi_enum("mixture", list(MIXTURES), list(MIXTURES), "of samples and updates", flag_values=fv)
    flags.DEFINE_integer("batch", 32, "rows at once", 1, flag_values=fv)
    flags.DEFINE_integer("repeats", 3, "rounds of measurement", 1, flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    import torch

    rate = matmul_rate()
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    print(f"{processor()}, one thread each, {rate / 1e9:.0f} GFLOP/s in one product, {versions}", flush=True)
    found = [row for shape in args.shape for row in measured(shape, args, rate)]
    if args.json:
        write_json(Path(args.json), {"processor": processor(), "rate": rate, "versions": versions, "rows": found})


def measured(shape, args, rate):
    """The rows of one shape: its rounds at each mixture, and what kept states save."""
    source = load("bundled:reviews", "test")
    tokenizer = Folded(train_bpe((source[i]["text"] for i in range(500)), 1000), 1000)
    lm = Transformer.gpt2(**SHAPES[shape])
    params = jax.jit(lm.init)(jax.random.key(0))
    for mixture in args.mixture:
        samples, steps = MIXTURES[mixture]
        texts = [" ".join(source[i]["text"].split()[:6]) for i in range(samples)]
        longest = max(map(len, tokenizer.encode(texts)))
        floor = steps * flops(lm, args.batch, longest, NEW) / rate
        yield {"shape": shape, "mixture": mixture, **rounds(lm, params, tokenizer, texts, steps, floor, args)}
    for kind in ("full", "lora"):
        ratios, apart = kept(lm, params, kind, rows=args.batch, prompt=longest, repeats=max(5, args.repeats))
        middle = statistics.median(ratios)
        span = f"{ratios[0]:.2f}–{ratios[-1]:.2f}"
        print(f"{shape}: with kept states an update ({kind}) is {middle:.2f} times as fast ({span}), {apart:.0e} apart")
        yield {"shape": shape, "kept_states": kind, "ratio": middle, "low": ratios[0], "high": ratios[-1]}


def rounds(lm, params, tokenizer, texts, steps, floor, args):
    """The figures of a round, ours beside PyTorch; floor: processor seconds of the products of its updates."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save(Path(folder) / "lm", lm, params)
        classifier = bert(Path(folder) / "bert")
        encoder, weights = hf.load_encoder(Path(folder) / "bert")
        plain = theirs(str(Path(folder) / "lm"), classifier, tokenizer, texts, steps, args.batch)
    judge = SequenceClassifier(Timed(encoder, weights, tokenizer.encode, batch=args.batch))
    run, state = ours(lm, params, tokenizer, texts, judge, steps, args.batch)
    state, *_ = run(state)  # compiles
    plain()
    pairs = []
    for _ in range(args.repeats):
        state, mine, inside = run(state)
        pairs.append((mine, plain(), inside))
    pace, parts = (len(texts), len(texts), steps * args.batch * NEW), {}
    for i, name in enumerate(("explore", "score", "learn")):
        a, b = (statistics.median(p[side][i] for p in pairs) for side in (0, 1))
        ratio = statistics.median(p[1][i] / p[0][i] for p in pairs)
        idle = statistics.median(1 - p[2][i] / p[0][i] for p in pairs)
        share = statistics.median(p[0][i] / sum(p[0]) for p in pairs)
        parts[name] = {"ours": pace[i] / a, "torch": pace[i] / b, "ratio": ratio, "idle": idle, "share": share}
    parts["learn"]["of_floor"] = floor / min(p[0][2] for p in pairs)
    ratios = sorted(sum(t) / sum(o) for o, t, _ in pairs)
    idle = statistics.median(1 - sum(inside) / sum(mine) for mine, _, inside in pairs)
    span = f"{ratios[0]:.2f}–{ratios[-1]:.2f}"
    print(f"{len(texts)} samples, {steps} updates of {args.batch} rows, vocabulary {lm.vocab}, width {lm.width}:")
    print(f"  a round is {statistics.median(ratios):.2f} times as fast ({span}), idle {idle:.1%}")
    for name, p in parts.items():
        unit = "tokens/s" if name == "learn" else "samples/s"
        ratio = f"ratio {p['ratio']:.2f}, idle {p['idle']:.1%}, {p['share']:.0%} of our round"
        of = f", {p['of_floor']:.0%} of the floor" if "of_floor" in p else ""
        print(f"  {name:8s} {p['ours']:8.1f} {unit}, torch {p['torch']:8.1f}, {ratio}{of}", flush=True)
    return {**parts, "round": statistics.median(ratios), "idle": idle}


def bert(folder):
    """A random classifier of MiniLM's shape, in PyTorch, saved where ours is loaded from."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
