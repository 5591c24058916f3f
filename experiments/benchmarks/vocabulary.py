"""What a large vocabulary costs beyond the products with the unembedding, with random weights in float32.

    python experiments/benchmarks/vocabulary.py [--vocab=262144] [--width=64] [--batch=8] [--new=64] [--repeats=3]

Three things are measured: the log-probabilities of `loop.score`, a gradient of `losses.control_loss` with the KL to the
base, and one decode step (`--step_width`, since its products depend on the width). Each is shown with seconds of wall
time (the least of the repeats), the peak of its temporary memory as the compiler plans it, and both as multiples of
what cannot be avoided: the products with the unembedding alone, and the logits float32 [B, N, V] of one reading.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
from absl import flags

from ctg_jax import Prompts, Sampling, rng
from ctg_jax.controls import truncate
from ctg_jax.decode import loop
from ctg_jax.io import write_json
from ctg_jax.learn.losses import control_loss
from ctg_jax.methods import steer
from ctg_jax.models.decoder import Transformer
from experiments import cli


def measured(f, *args, repeats):
    """(seconds, bytes of temporary memory) of a function of arrays."""
    program = jax.jit(f).lower(*args).compile()
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        times.append(time.perf_counter() - start)
    return min(times[1:]), program.memory_analysis().temp_size_in_bytes


def model(vocab, width):
    lm = Transformer.gpt2(vocab=vocab, width=width, depth=2, heads=4, context=512)
    return lm, jax.jit(lm.init)(jax.random.key(0))


def rows(vocab, batch, length):
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, vocab)
    return tokens, jnp.ones((batch, length), bool), rng.per_example(jax.random.key(2), jnp.arange(batch))


def products(lm, params, positions, count, repeats):
    """Seconds of `count` products of [positions, D] with the unembedding, each small enough to be one chunk."""
    part = min(positions, 2**26 // lm.vocab)
    h = jax.random.normal(jax.random.key(3), (part, 1, lm.width))
    seconds, _ = measured(lambda p, h: jnp.max(lm.unembed(p, h), axis=-1), params, h, repeats=repeats)
    return seconds * count * positions / part


def score(lm, params, batch, new, repeats):
    tokens, mask, keys = rows(lm.vocab, batch, new + 1)
    prompts = Prompts(tokens[:, :1], mask[:, :1], keys)
    f = jax.jit(lambda p, prompts, tokens: loop.score(lm, p, prompts, tokens))
    return *measured(f, params, prompts, tokens[:, 1:], repeats=repeats), products(lm, params, batch * new, 1, repeats)


def gradient(lm, params, batch, new, repeats):
    tokens, mask, keys = rows(lm.vocab, batch, new + 1)
    loss = control_loss(lm, kl_weight=0.1)
    control = steer.example(lm, jax.random.key(4))

    def f(control, params, tokens, mask):
        given = {"tokens": tokens, "mask": mask}
        return jax.grad(lambda c: loss(c, {"params": params}, given, keys).total, allow_int=True)(control)

    # Two readings, and the gradient of one of them.
    floor = products(lm, params, batch * new, 3, repeats)
    return *measured(f, control, params, tokens, mask, repeats=repeats), floor


def step(lm, params, batch, repeats, **rule):
    """One token: drawn from the logits of the last one under a rule, then read."""
    tokens, mask, keys = rows(lm.vocab, batch, 8)
    sampling, control = Sampling(max_new=8), truncate.rules(lm, **rule)
    params, control = loop.ready(lm, params, control)
    d = loop.prefill(lm, params, Prompts(tokens, mask, keys), control, sampling)
    f = jax.jit(lambda d, p, keys, control: loop.read(lm, p, loop.sample(d, keys, sampling), control))
    return *measured(f, d, params, keys, control, repeats=4 * repeats), products(lm, params, batch, 1, 4 * repeats)


PARTS = ("score", "gradient", "step")


def define(fv):
    flags.DEFINE_integer("vocab", 262144, "tokens of the vocabulary", 1, flag_values=fv)
    flags.DEFINE_integer("width", 64, "width of the model that scores and learns", 1, flag_values=fv)
    flags.DEFINE_integer("step_width", 640, "width of the model that decodes", 1, flag_values=fv)
    flags.DEFINE_integer("batch", 8, "rows at once", 1, flag_values=fv)
    flags.DEFINE_integer("new", 64, "tokens of a completion", 1, flag_values=fv)
    flags.DEFINE_integer("repeats", 3, "rounds of measurement", 1, flag_values=fv)
    flags.DEFINE_multi_enum("only", list(PARTS), PARTS, "the parts that are measured", flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    found, given = {}, (args.batch, args.new, args.repeats)
    if {"score", "gradient"} & set(args.only):
        lm, params = model(args.vocab, args.width)
        found |= {f.__name__: f(lm, params, *given) for f in (score, gradient) if f.__name__ in args.only}
    if "step" in args.only:
        lm, params = model(args.vocab, args.step_width)
        named = {"plain": {}, "top-p": {"top_p": 0.9}, "repetition": {"repetition_penalty": 1.2}}
        named |= {"n-grams": {"no_repeat_ngram": 3}, "min-p": {"min_p": 0.1}}
        found |= {f"step, {k}": step(lm, params, args.batch, args.repeats, **rule) for k, rule in named.items()}
    print(f"{'':18}{'seconds':>9}{'products':>9}{'ratio':>7}{'memory MB':>11}{'of logits':>11}")
    for name, (seconds, memory, floor) in found.items():
        logits = 4 * args.batch * args.vocab * (1 if name.startswith("step") else args.new)
        ratios = f"{seconds / floor:7.2f}{memory / 1e6:11.1f}{memory / logits:11.2f}"
        print(f"{name:18}{seconds:9.4f}{floor:9.4f}{ratios}")
    if args.json:
        write_json(Path(args.json), found)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
