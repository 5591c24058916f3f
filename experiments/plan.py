"""What a training run would need, from shapes alone: bytes on each device of a mesh that need not exist, which chips
hold them, and how long a round of sampling and learning takes at given rates.

    python experiments/plan.py --lm=gpt2-large --method=quark --set kind=full --mesh data=8 --batch=128 --new=20
    python experiments/plan.py --lm=llama-7b --dtype=bfloat16 --method=ppo --mesh data=8,tensor=4 --rate=200
    --bandwidth=2000

--lm is one of the shapes below or a directory with a config.json. Weights and the control lie as the sharding rules of
`ctg_jax.parallel` say, the batch is split over `data`, the cache over `data` and, by heads, over `tensor`. What is
saved for the gradient is read off the gradient's own residuals. Times take the rates as reached, not as advertised:
measure them (`experiments/benchmarks`). Nothing is allocated.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from ctg_jax import losses, methods, train, tree
from ctg_jax.models.transformer import Transformer
from ctg_jax.parallel import CONTROL, DECODER, Plan
from ctg_jax.types import InputError

GPT2 = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20), "gpt2-xl": (1600, 48, 25)}
LLAMA = {  # width, depth, heads, key/value heads, width of the MLP
    "llama-7b": (4096, 32, 32, 32, 11008),
    "llama-13b": (5120, 40, 40, 40, 13824),
    "llama-70b": (8192, 80, 64, 8, 28672),
}
CHIPS = {"TPU v5e": 16, "TPU v4": 32, "A100 40 GB": 40, "A100 80 GB": 80, "H100": 80, "TPU v5p": 95}  # GB
SPARE = 0.9  # of a chip's memory: the rest is the runtime's, and fragments


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on each device: frozen weights, control with its optimizer and gradient, merged weights, what is saved for
    the gradient (all of which are there while learning); weights unstacked for decoding and the cache (while
    sampling)."""

    weights: int
    control: int
    merged: int
    saved: int
    cache: int

    @property
    def learning(self) -> int:
        return self.weights + self.control + self.merged + self.saved

    @property
    def sampling(self) -> int:
        return self.weights + self.control + self.merged + self.cache


def shape(name: str, dtype: str) -> Transformer:
    """The LM of a preset or of a directory; InputError where it is neither."""
    if name in GPT2:
        width, depth, heads = GPT2[name]
        return Transformer.gpt2(width=width, depth=depth, heads=heads, dtype=dtype, param_dtype=dtype)
    if name in LLAMA:
        width, depth, heads, kv, mlp = LLAMA[name]
        return Transformer.llama(
            vocab=32000, width=width, depth=depth, heads=heads, kv_heads=kv, mlp_width=mlp, context=4096, dtype=dtype,
            param_dtype=dtype,
        )  # fmt: skip
    if not (Path(name) / "config.json").is_file():
        raise InputError(
            f"lm is {name!r}, expected one of {', '.join([*GPT2, *LLAMA])} or a directory with config.json"
        )
    from ctg_jax.models import hf

    return hf.shape(name, dtype=dtype)


def need(lm: Transformer, method: str, init: dict, mesh: dict, *, batch: int, prompt: int, new: int, rows: int) -> Need:
    """Bytes per device of `method` on `lm`.

    Args:
      init: settings of the method's `init`.
      batch: rows of an update, over all devices. rows: of a batch that is sampled.
      prompt, new: tokens.

    Raises:
      InputError: a batch that the mesh does not divide, an unknown method or setting.
    """
    plan = Plan(axes=mesh, rules=DECODER + CONTROL)
    data, tensor = plan_sizes(plan)
    for name, value in (("batch", batch), ("rows", rows)):
        if value % data:
            raise InputError(f"{name} is {value}, expected a multiple of {data}, the data axis of the mesh")
    key = jax.random.key(0)
    params = jax.eval_shape(lm.init, key)
    try:
        control = jax.eval_shape(lambda k: methods.get(method).init(lm, k, **init), key)
    except TypeError as e:
        raise InputError(f"--set does not suit {method}: {e}") from None
    state = jax.eval_shape(lambda c, k: train.init_state(c, train.optimizer(1e-3), k), control, key)
    weights = plan.bytes_per_device(params)
    changed = any("changes" in path for path in tree.flatten(control))
    cache = jax.eval_shape(lambda p: lm.init_cache(p, rows // data, prompt + new), params)
    split = tensor if lm.kv_heads % tensor == 0 else 1
    length = prompt + new
    one, two = (residuals(lm, params, control, n * max(batch // data, 1), length) for n in (1, 2))
    return Need(
        weights=weights,
        control=plan.bytes_per_device(state) + plan.bytes_per_device(control),
        merged=weights if changed else 0,
        saved=(two - one) // tensor,
        cache=tree.size_bytes(cache) // split,
    )


def plan_sizes(plan: Plan) -> tuple[int, int]:
    """(ways of the data axis, ways of the tensor axis)."""
    sizes = dict(plan.axes)
    return sizes["data"], sizes.get("tensor", 1)


def residuals(lm: Transformer, params, control, rows: int, length: int) -> int:
    """Bytes that the gradient of the next-token loss keeps between its two passes, weights included."""
    loss = losses.control_loss(lm)
    batch = {"tokens": jnp.zeros((rows, length), jnp.int32), "mask": jnp.ones((rows, length), bool)}

    def backward(control, params):
        keys = jax.random.split(jax.random.key(0), rows)
        return jax.vjp(lambda c: loss(c, {"params": params}, batch, keys).total, control)[1]

    return tree.size_bytes(
        [x for x in jax.tree.leaves(jax.eval_shape(backward, control, params)) if hasattr(x, "dtype")]
    )


def seconds(lm: Transformer, wants: Need, mesh: dict, *, samples, rows, new, prompt, steps, batch, rate, bandwidth):
    """(seconds of sampling, seconds of learning) of a round: each decode step reads weights (those of
    other devices on the data axis too, at no more than that rate) and cache once and multiplies each row by every
    weight; an update is a forward and a backward pass, and one forward pass of the frozen model."""
    params = tree.size_bytes(jax.eval_shape(lm.init, jax.random.key(0))) / jnp.dtype(lm.param_dtype).itemsize
    devices = math.prod(mesh.values())
    read = (wants.weights * devices / mesh.get("tensor", 1) + wants.cache) / (bandwidth * 1e9)
    step = max(read, 2 * params * rows / devices / (rate * 1e12))
    sampling = math.ceil(samples / rows) * (new * step + 2 * params * rows * prompt / devices / (rate * 1e12))
    return sampling, steps * 8 * params * batch * (prompt + new) / devices / (rate * 1e12)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default="gpt2-large", help=f"{', '.join([*GPT2, *LLAMA])}, or a directory")
    parser.add_argument("--method", default="quark")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the method's init")
    parser.add_argument("--mesh", default="data=8", help="axes and sizes, such as data=8,tensor=4")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=128, help="rows of an update, over all devices")
    parser.add_argument("--rows", type=int, default=1024, help="rows that are sampled at a time, over all devices")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=20, help="new tokens of a sample")
    parser.add_argument("--samples", type=int, default=64000, help="samples of a round")
    parser.add_argument("--steps", type=int, default=500, help="updates of a round")
    parser.add_argument("--rate", type=float, default=50.0, help="TFLOP/s that each device reaches")
    parser.add_argument("--bandwidth", type=float, default=800.0, help="GB/s that each device reaches")
    args = parser.parse_args(argv)
    try:
        text = report(args)
    except InputError as e:
        print(e, file=sys.stderr)
        return 2
    print(text)
    return 0


def report(args) -> str:
    """The lines that are printed."""
    mesh = pairs("mesh", args.mesh.split(","), int)
    init = pairs("set", args.set, value_of)
    lm = shape(args.lm, args.dtype)
    common = dict(batch=args.batch, prompt=args.prompt, new=args.new, rows=args.rows)
    wants = need(lm, args.method, init, mesh, **common)
    devices = math.prod(mesh.values())
    gib = {k: v / 2**30 for k, v in dataclasses.asdict(wants).items()}
    said = {
        "weights": "frozen weights",
        "control": "control, its gradient and optimizer",
        "merged": "weights with the control's change",
        "saved": "saved for the gradient",
        "cache": "cache while sampling",
    }
    lines = [f"{args.lm}, {args.method}, {args.dtype}, {devices} devices ({args.mesh}): GiB on each device"]
    lines += [f"  {said[k]:38s} {v:8.2f}" for k, v in gib.items()]
    lines += [f"  {'learning':38s} {wants.learning / 2**30:8.2f}", f"  {'sampling':38s} {wants.sampling / 2**30:8.2f}"]
    most = max(wants.learning, wants.sampling)
    fits = [name for name, size in CHIPS.items() if most <= SPARE * size * 1e9]
    lines.append(f"fits: {', '.join(fits) if fits else 'none of ' + ', '.join(CHIPS) + '; split it over more devices'}")
    rates = dict(rate=args.rate, bandwidth=args.bandwidth)
    sampling, learning = seconds(lm, wants, mesh, samples=args.samples, steps=args.steps, **common, **rates)
    pace = f"{args.rate:g} TFLOP/s and {args.bandwidth:g} GB/s"
    took = f"{sampling + learning:.0f} s ({sampling:.0f} sampling, {learning:.0f} learning)"
    lines.append(f"a round of {args.samples} samples and {args.steps} updates at {pace}: {took}")
    return "\n".join(lines)


def pairs(name: str, parts, convert) -> dict:
    """KEY=VALUE parts as a dictionary; InputError for one that is not."""
    out = {}
    for part in parts:
        key, equals, value = part.partition("=")
        try:
            if not (key and equals):
                raise ValueError
            out[key] = convert(value)
        except ValueError:
            raise InputError(f"--{name} has {part!r}, expected KEY=VALUE") from None
    return out


def value_of(text: str):
    """A JSON value, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main())
