"""The sections of `accelerator.py`: each measures one thing on one model and yields rows as it finds them.

A row says `what` was measured, with a `speed` in the named `unit`, or figures that are ratios: `relative`,
`of_bandwidth`, `of_matrix_rate`. Its section is the name of the function.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import IDENTITY, Sampling, generate, rng, tree
from ctg_jax.controls import truncate
from ctg_jax.controls.streams import Stream
from ctg_jax.learn import train
from ctg_jax.learn.losses import control_loss
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.learn.vector_search import Search
from ctg_jax.methods import cav, dexperts, dglm, finetune, gedi, latent_steer, lm_steer, quark, self_debias, steer
from ctg_jax.models.decoder import Transformer
from experiments.benchmarks import authors, bank

DTYPE = {"dtype": "bfloat16", "param_dtype": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a section is given: a model and its parameters as decoding reads them, facts about the device, and whether
    to be tiny."""

    name: str
    lm: Transformer
    params: Any
    found: dict
    dry: bool

    def row(self, what: str, **figures) -> dict:
        return {"what": f"{self.name}, {what}", **figures}

    def stacked(self) -> Any:
        """Parameters as training reads them."""
        return {**self.params, "layers": tree.stack(self.params["layers"])}


def shapes(dry):
    """name -> language model."""
    if dry:
        return dict.fromkeys(("gpt2-xl", "llama-1b", "gemma-270m", "gpt2-small"), bank.shapes("tiny"))
    llama = dict(vocab=128256, width=2048, depth=16, heads=32, kv_heads=8, mlp_width=8192, context=8192)
    return {
        "gpt2-xl": Transformer.gpt2(width=1600, depth=48, heads=25, **DTYPE),
        "llama-1b": Transformer.llama(**llama, tied=True, **DTYPE),
        "gemma-270m": bank.shapes("gemma", **DTYPE),
        "gpt2-small": Transformer.gpt2(**DTYPE),
    }


def opened(lm):
    """Random parameters as decoding reads them; one program of both steps takes minutes to compile for 48 layers."""
    return jax.block_until_ready(lm.unstack(jax.jit(lm.init)(jax.random.key(0))))


def runs(f, repeats=3) -> list[float]:
    """Seconds of several calls after one that compiles."""
    jax.block_until_ready(f())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f())
        found.append(time.perf_counter() - start)
    return found


def timed(calls: dict[Any, Callable[[], Any]], repeats=3) -> Iterator[tuple[Any, float]]:
    """(name, median seconds) of each call. All compile first, side by side, and are then run one after the other."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda f: jax.block_until_ready(f()), calls.values()))
    for name, f in calls.items():
        yield name, statistics.median(runs(f, repeats))


def decoding(b: Bench):
    """Tokens per second of a batch, and their share of what the bandwidth allows."""
    lm, (new, length) = b.lm, (4, 4) if b.dry else (64, 32)
    once = 0 if lm.tied else tree.size_bytes(b.params["embed"])
    weights, width = tree.size_bytes(b.params) - once, jnp.dtype(lm.dtype).itemsize

    def call(batch):
        prompts = bank.prompts_of(lm, batch, length)
        return lambda: generate(lm, b.params, prompts, IDENTITY, Sampling(max_new=new))

    for batch, seconds in timed({batch: call(batch) for batch in ((1, 2) if b.dry else (1, 32, 256))}):
        cache = 2 * lm.depth * batch * (length + new / 2) * lm.kv_heads * lm.head_dim * width
        floor = new * (weights + cache) / b.found["bandwidth"]
        speed = {"speed": batch * new / seconds, "unit": "tokens/s", "of_bandwidth": floor / seconds}
        yield b.row(f"batch {batch}", **speed)


def in_pytorch(b: Bench):
    """(PyTorch, its device, the model of `transformers` of this GPT-2 shape), or why there is none."""
    try:
        import torch
        import transformers
    except ImportError as e:
        return str(e)
    if not (torch.cuda.is_available() or b.dry):
        return "PyTorch sees no GPU"
    lm, place = b.lm, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = dict(vocab_size=lm.vocab, n_positions=lm.context, n_embd=lm.width, n_layer=lm.depth, n_head=lm.heads)
    with place:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).to(torch.bfloat16).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return torch, place, model


def against_transformers(b: Bench):
    """The same of `transformers.generate`, where its model and PyTorch are here and PyTorch sees the device."""
    theirs = in_pytorch(b)
    if isinstance(theirs, str):
        yield b.row("all batches", left_out=theirs)
        return
    torch, place, model = theirs
    new = 4 if b.dry else 64
    for batch in (1,) if b.dry else (1, 32, 256):
        tokens = np.array(bank.prompts_of(b.lm, batch, 4 if b.dry else 32).tokens)
        ids = torch.as_tensor(tokens, dtype=torch.long).to(place)
        how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=True, top_k=0)

        def run(ids=ids, how=how):
            with torch.no_grad():
                return model.generate(ids, **how).cpu().numpy()

        yield b.row(f"batch {batch}", speed=batch * new / min(runs(run, 2)), unit="tokens/s")


def against_authors(b: Bench):
    """Controls of several readings relative to none, and how many times as long they take as their authors write them
    in PyTorch (`authors.py`)."""
    theirs = in_pytorch(b)
    if isinstance(theirs, str):
        yield b.row("all controls", left_out=theirs)
        return
    torch, place, model = theirs
    lm, key, batch, new = b.lm, jax.random.key(2), 2 if b.dry else 8, 4 if b.dry else 32
    tokens = np.array(bank.prompts_of(lm, batch, 4 if b.dry else 32).tokens)  # PyTorch wants it writable
    makers = {"gedi": gedi.example, "self_debias": self_debias.example, "arithmetic": authors.formula}
    made = {"none": IDENTITY} | {name: jax.tree.map(jnp.asarray, make(lm, key)) for name, make in makers.items()}

    def ours(control):
        prompts = authors.prompts_for(control, tokens)
        return lambda: generate(lm, b.params, prompts, control, Sampling(max_new=new, greedy=True))

    def reference(name):
        with place:
            return authors.authors_way(torch, model, *authors.references(torch, tokens)[name], new).cpu().numpy()

    found = dict(timed({name: ours(control) for name, control in made.items()}))
    for name in makers:
        beside = min(runs(lambda name=name: reference(name), 2)) / found[name]
        yield b.row(f"batch {batch}, {name}", relative=found[name] / found["none"], speed=beside, unit="× PyTorch")


def controls(b: Bench):
    """Seconds of decoding under each kind of control, relative to none."""
    lm, key, new, batch = b.lm, jax.random.key(2), 4 if b.dry else 32, 2 if b.dry else 32
    push = steer.init(lm, key)
    push = push.replace(vector=0.01 * jax.random.normal(key, push.vector.shape))
    tuned = finetune.init(lm, key, kind="lora", rank=8)
    kinds = {
        "none": IDENTITY, "top_p": truncate.rules(lm, top_p=0.9), "steer": push, "cav": cav.init(lm, key),
        "rotate": push.replace(operator="rotate"), "lm_steer": lm_steer.init(lm, key, rank=64), "lora": tuned,
        "dexperts": dexperts.experts(Stream(control=tuned, lm=lm), Stream(control=tuned, lm=lm)),
    }  # fmt: skip
    prompts, base = bank.prompts_of(lm, batch, 4 if b.dry else 32), None

    def call(control):
        return lambda: generate(lm, b.params, prompts, control, Sampling(max_new=new))

    for kind, seconds in timed({kind: call(control) for kind, control in kinds.items()}):
        base = base or seconds
        yield b.row(kind, relative=seconds / base)


def banks(b: Bench):
    """`experiments/benchmarks/bank.py`: the speed with K distinct controls in a batch, relative to none."""
    sizes = dict(batch=4, prompt=4, new=3, repeats=1) if b.dry else dict(batch=256, prompt=16, new=64, repeats=3)
    for row in bank.measure(b.lm, ("steer", "lora"), (0, 1, 4) if b.dry else bank.COUNTS, params=b.params, **sizes):
        what = f"{row['kind']}, {row['distinct']} distinct"
        yield b.row(what, speed=row["tok_s"], unit="tokens/s", relative=row["relative"])


def training(b: Bench):
    """A training step of LoRA and of all weights: its share of the measured matrix rate, at 6 FLOP per weight and token
    (4 where the weights are frozen)."""
    batch, length = (2, 8) if b.dry else (32, 256)
    weights = sum(x.size for x in jax.tree.leaves(b.params["layers"])) + b.lm.vocab * b.lm.width
    tokens = np.random.default_rng(0).integers(0, b.lm.vocab, (batch, length))
    texts = {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.ones((batch, length), bool)}
    texts["ids"] = jnp.arange(batch)
    frozen = {"params": b.stacked()}
    for kind, flops in (("lora", 4), ("full", 6)):
        control = finetune.init(b.lm, jax.random.key(0), kind=kind)
        seconds = statistics.median(steps(control_loss(b.lm), control, frozen, texts))
        speed = {"speed": batch * length / seconds, "unit": "tokens/s"}
        share = flops * weights * batch * length / seconds / b.found["matrix"]
        yield b.row(kind, **speed, of_matrix_rate=share)


def steps(loss, control, frozen, batch) -> list[float]:
    """Seconds of several updates, each from the state that the one before left and with its memory."""
    step = train.make_step(loss, optimizer(1e-4))
    run = jax.jit(step, donate_argnums=0)
    held = [train.init_state(jax.tree.map(jnp.array, control), step.tx, jax.random.key(0))]

    def update():
        state, metrics = run(held.pop(), frozen, batch)
        held.append(state)
        return metrics

    return runs(update)


def rounds(b: Bench):
    """A round of Quark: samples on the best token, and updates of LoRA on them, without tokenizer and classifier."""
    rows, new, length = (4, 3, 4) if b.dry else (512, 20, 16)
    control, key = quark.init(b.lm, jax.random.key(0)), jax.random.key(1)
    prompts = bank.prompts_of(b.lm, rows, length)
    drawn = generate(b.lm, b.params, prompts, control, Sampling(max_new=new))
    explore = statistics.median(runs(lambda: generate(b.lm, b.params, prompts, control, Sampling(max_new=new))))
    batch = {"tokens": prompts.tokens, "mask": prompts.mask, "ids": jnp.arange(rows), "completion": drawn.tokens}
    batch |= {"written": drawn.mask, "bin": jax.random.randint(key, (rows,), 0, 5)}
    some = jax.tree.map(lambda x: x[: max(2, rows // 4)], batch)
    learn = statistics.median(steps(quark.loss(b.lm), control, {"params": b.stacked()}, some))
    yield b.row("Quark, explore", speed=rows / explore, unit="samples/s")
    yield b.row("Quark, learn", speed=len(some["ids"]) / learn, unit="samples/s")


def latent_diffusion(b: Bench):
    """Samples of DGLM: guided latents of 384 features by DPM-Solver++, a soft prompt of each, and text."""
    rows, new, length = (2, 3, 4) if b.dry else (256, 20, 8)
    kind = dict(width=16, depth=2, heads=2, pseudo_tokens=2, spread=2) if b.dry else dict(
        width=768, depth=12, heads=12, pseudo_tokens=8, spread=4)  # fmt: skip
    latent = 8 if b.dry else 384
    made = dict(latent=latent, denoiser=kind, prompter={**kind, "length": 2 if b.dry else 8, "kind": "frozen"})
    control = dglm.init(b.lm, jax.random.key(0), attributes=1, **made)
    probes = jax.random.normal(jax.random.key(1), (1, latent))
    control = control.replace(probes=probes, scale=jnp.float32(10.0), free=jnp.float32(1.0))
    context = rng_unit(rows, latent)
    prompts = bank.prompts_of(b.lm, rows, length).replace(cond={"context": context})

    def call(count):
        c = control.replace(draw=dglm.Draw(steps=count, signal=0.95))
        return lambda: generate(b.lm, b.params, prompts, c, Sampling(max_new=new))

    for count, seconds in timed({count: call(count) for count in ((2,) if b.dry else (20, 50, 250))}):
        yield b.row(f"DGLM, {count} steps", speed=rows / seconds, unit="samples/s")


def rng_unit(rows, width):
    x = jax.random.normal(rng.stream(jax.random.key(0), "context"), (rows, width))
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def latent_vectors(b: Bench):
    """Latent steering vectors of random sentences, many at once and one at a time, with as many updates each."""
    many, alone, updates = (3, 1, 2) if b.dry else (256, 4, 50)
    draw = np.random.default_rng(0)
    sentences = [([0, *draw.integers(1, b.lm.vocab - 1, 4 if b.dry else 16).tolist()], 1) for _ in range(many)]
    control = latent_steer.init(b.lm, jax.random.key(0), site="middle")
    z = np.zeros((many, b.lm.width), np.float32)
    speeds = {}
    for batch, count in ((many, many), (1, alone)):
        how = Search(rate=0.3, updates=updates, patience=10**6, batch=batch)

        def find(how=how, count=count):
            return latent_steer.find(b.lm, b.params, control, sentences[:count], z[:count], how)["z"]

        speeds[batch] = count / min(runs(find, 2))
        yield b.row(f"{batch} at once", speed=speeds[batch], unit="sentences/s")
    yield b.row("many over one at a time", relative=speeds[many] / speeds[1])
