"""What a training run would need, from shapes alone: bytes on each device of a mesh that need not exist, which chips
hold them, and how long a round of sampling and learning takes at given rates.

    python experiments/plan.py --lm=gpt2-large --method=quark --set kind=full --mesh fsdp=8 --batch=128 --new=20
    python experiments/plan.py --lm=llama-7b --dtype=bfloat16 --method=ppo --mesh fsdp=8,tensor=4 --rate=200
    --bandwidth=2000
    python experiments/plan.py --config=configs/dexperts.py:tiny --lm=gpt2-xl --mesh data=4 --remat

--config plans every method of an experiment, with its sizes; flags replace them. --lm is one of the shapes below or a
directory with a config.json. --mesh and --remat are those of the scripts (`data` splits rows, `fsdp` weights as well);
the cache is split by rows and, by heads, over `tensor`. What is saved for the gradient is read off the
gradient's own residuals, caches and states off the first step of decoding. Judges, rewards and the encoders that
latents come from are not counted. Times take the rates as reached, not as advertised: measure them
(`experiments/benchmarks`). Nothing is allocated.
"""

import argparse
import dataclasses
import inspect
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import optax

from ctg_jax import methods, tree
from ctg_jax.decode import loop
from ctg_jax.learn import latent_diffusion, losses, slot_search, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.mesh import layout
from ctg_jax.mesh.plan import Plan
from ctg_jax.methods import dglm
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError, Prompts, Sampling

GPT2 = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20), "gpt2-xl": (1600, 48, 25)}
LLAMA = {  # width, depth, heads, key/value heads, width of the MLP
    "llama-7b": (4096, 32, 32, 32, 11008),
    "llama-13b": (5120, 40, 40, 40, 13824),
    "llama-70b": (8192, 80, 64, 8, 28672),
}
CHIPS = {"TPU v5e": 16, "TPU v4": 32, "A100 40 GB": 40, "A100 80 GB": 80, "H100": 80, "TPU v5p": 95}  # GB
SPARE = 0.9  # of a chip's memory: the rest is the runtime's, and fragments


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


Need = dict[str, dict[str, int]]  # stage -> what it holds -> bytes on each device


def need(lm: Transformer, method: str, init: dict, mesh: dict, *, batch: int, prompt: int, new: int, rows: int) -> Need:
    """Bytes per device of what each stage of `method` on `lm` holds at once: "learning" (by another name where a method
    learns in several stages) and "sampling".

    Args:
      mesh: axes and sizes, as --mesh says them: "data" or "fsdp", and "tensor".
      init: settings of the method's `init`; for dexperts also those of the fine-tuning of each expert.
      batch: rows of an update, over all devices; latent_steer: vectors that are searched at a time. rows: of a batch
        that is sampled.
      prompt, new: tokens.

    Raises:
      InputError: a batch that the mesh does not divide, an unknown method or setting, a method that does not
        use the language model.
    """
    plan = layout.read(_text(mesh)).plan(math.prod(mesh.values()), math.prod(mesh.values()) // mesh.get("tensor", 1))
    data, _ = plan_sizes(plan)
    for name, value in (("batch", batch), ("rows", rows)):
        if value % data:
            raise InputError(f"{name} is {value}, expected a multiple of {data}, the data axis of the mesh")
    if not _acts(method):
        raise InputError(f"{method} completes prompts without the language model: there is nothing of it to plan")
    found = {}
    length, mine = prompt + new, batch // data
    if method == "dexperts":
        tuned = {key: value for key, value in init.items() if key in ("kind", "rank", "targets")}
        init = {key: value for key, value in init.items() if key not in tuned}
        expert = control_of(lm, "finetune", tuned)
        found["learning, one expert after the other"] = learning(lm, plan, expert, mine, length)
        control = control_of(lm, method, init)
    elif method == "dglm":
        control = control_of(lm, method, init | dict(conditioned=False))
        found["learning to say latents"] = learning(lm, plan, control.said, mine, length, latent=init["latent"])
        found["learning to denoise"] = denoising(plan, init, mine)
    elif method == "latent_steer":
        control = control_of(lm, method, init)
        start = jax.ShapeDtypeStruct((mine + 1, control.z.shape[-1]), jnp.float32)
        search = jax.eval_shape(lambda x: slot_search.begin(x, optax.adam(1e-3), mine).slots, start)
        found["search"] = learning(lm, plan, control, mine, length) | {"control": Plan().bytes_per_device(search)}
    else:
        control = control_of(lm, method, init)
        if hasattr(methods.get(method), "fit"):
            found["learning"] = learning(lm, plan, control, mine, length)
    return found | {"sampling": sampling(lm, plan, control, rows // data, prompt, new)}


def control_of(lm: Transformer, method: str, init: dict):
    """Shapes of a method's control."""
    try:
        return jax.eval_shape(lambda k: methods.get(method).init(lm, k, **init), jax.random.key(0))
    except TypeError as e:
        raise InputError(f"--set does not suit {method}: {e}") from None


def changed(lm: Transformer, plan: Plan, control) -> dict[str, int]:
    """The weights, and those a control changes."""
    weights = plan.bytes_per_device(jax.eval_shape(lm.init, jax.random.key(0)))
    return dict(weights=weights, merged=weights if any("changes" in path for path in tree.flatten(control)) else 0)


def learning(lm: Transformer, plan: Plan, control, rows: int, length: int, latent: int | None = None) -> dict[str, int]:
    """What a device holds while the control is trained on `rows` rows of its own; `latent` is the width of the latents
    that DGLM's prompter says."""
    key, (_, tensor) = jax.random.key(0), plan_sizes(plan)
    state = jax.eval_shape(lambda c, k: train.init_state(c, optimizer(1e-3), k), control, key)
    params = jax.eval_shape(lm.init, key)
    one, two = (residuals(lm, params, control, n * max(rows, 1), length, latent) for n in (1, 2))
    held = changed(lm, plan, control)
    held |= dict(control=plan.bytes_per_device(state) + plan.bytes_per_device(control), saved=(two - one) // tensor)
    return held


def sampling(lm: Transformer, plan: Plan, control, rows: int, prompt: int, new: int) -> dict[str, int]:
    """What a device holds while it samples `rows` rows of its own: with the control's own models and their caches."""
    _, tensor = plan_sizes(plan)
    tokens = jnp.zeros((rows, prompt), jnp.int32)

    def begun(params, control):
        prompts = Prompts(tokens, jnp.ones(tokens.shape, bool), jax.random.split(jax.random.key(0), rows))
        return loop.begin(lm, params, prompts, control, Sampling(max_new=new))

    d = jax.eval_shape(begun, jax.eval_shape(lm.init, jax.random.key(0)), control)
    held = changed(lm, plan, control) | dict(control=plan.bytes_per_device(control))
    heads, words = (tensor if n % tensor == 0 else 1 for n in (lm.kv_heads, lm.vocab))
    return held | dict(
        cache=Plan().bytes_per_device((d.cache, d.state)) // heads, logits=Plan().bytes_per_device(d.z) // words
    )


def denoising(plan: Plan, init: dict, rows: int) -> dict[str, int]:
    """What a device holds while DGLM's denoiser is trained on `rows` rows of its own."""
    key, latent = jax.random.key(0), init["latent"]
    net = latent_diffusion.network(latent, **init.get("denoiser", {}))
    params = jax.eval_shape(lambda k: {"net": net.init(k), "bins": jnp.zeros(latent_diffusion.BINS)}, key)
    make = lambda p, k: train.init_state(p, optimizer(1e-3), k, ema=True)  # noqa: E731
    state = jax.eval_shape(make, params, key)

    def backward(params, rows):
        z, gamma = jnp.zeros((rows, latent)), jnp.zeros((rows,))
        return jax.vjp(lambda p: net.apply(p["net"], z, gamma, z), params)[1]

    one, two = (_bytes(jax.eval_shape(lambda p, n=n: backward(p, n), params)) for n in (rows, 2 * rows))
    return dict(control=plan.bytes_per_device(state) + plan.bytes_per_device(params), saved=two - one)


def mesh_of(text: str) -> dict[str, int]:
    """Axis -> size, of what --mesh says; InputError where a size is left to the devices, which are not there."""
    found = layout.read(text)
    if found.data == -1:
        raise InputError(f"--mesh={text}: give data or fsdp a size, for the mesh need not exist")
    return {"fsdp" if found.sharded else "data": found.data} | ({"tensor": found.tensor} if found.tensor > 1 else {})


def _text(mesh: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh.items())


def plan_sizes(plan: Plan) -> tuple[int, int]:
    """(ways of the data axis, ways of the tensor axis)."""
    sizes = dict(plan.axes)
    return sizes["data"], sizes.get("tensor", 1)


def residuals(lm: Transformer, params, control, rows: int, length: int, latent: int | None = None) -> int:
    """Bytes that the gradient of the next-token loss keeps between its two passes, weights included."""
    tokens, all_of = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length), bool)
    loss, batch, frozen = losses.control_loss(lm), {"tokens": tokens, "mask": all_of}, {}
    if latent is not None:
        loss, half = dglm.said_loss(lm), length // 2
        batch = dict(tokens=tokens[:, :half], mask=all_of[:, :half], latent=jnp.zeros((rows, latent)))
        batch |= dict(completion=tokens[:, half:], written=all_of[:, half:])
        frozen = {"mean": jnp.zeros(latent), "deviation": jnp.ones(latent)}

    def backward(control, params):
        keys = jax.random.split(jax.random.key(0), rows)
        return jax.vjp(lambda c: loss(c, {"params": params, **frozen}, batch, keys).total, control)[1]

    return _bytes(jax.eval_shape(backward, control, params))


def _bytes(pullback) -> int:
    return tree.size_bytes([x for x in jax.tree.leaves(pullback) if hasattr(x, "dtype")])


def seconds(lm: Transformer, wants: Need, mesh: dict, *, samples, rows, new, prompt, steps, batch, rate, bandwidth):
    """(seconds of sampling, seconds of learning) of a round: each decode step reads weights (those of
    other devices on the data axis too, at no more than that rate) and cache once and multiplies each row by every
    weight; an update is a forward and a backward pass, and one forward pass of the frozen model."""
    params = tree.size_bytes(jax.eval_shape(lm.init, jax.random.key(0))) / jnp.dtype(lm.param_dtype).itemsize
    devices = math.prod(mesh.values())
    held = wants["sampling"]
    read = (held["weights"] * devices / mesh.get("tensor", 1) + held["cache"]) / (bandwidth * 1e9)
    step = max(read, 2 * params * rows / devices / (rate * 1e12))
    sampling = math.ceil(samples / rows) * (new * step + 2 * params * rows * prompt / devices / (rate * 1e12))
    return sampling, steps * 8 * params * batch * (prompt + new) / devices / (rate * 1e12)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="FILE.py or FILE.py:ARGUMENT: every method of an experiment")
    parser.add_argument("--lm", help=f"{', '.join([*GPT2, *LLAMA])}, or a directory")
    parser.add_argument("--method", default="quark")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the method's init")
    parser.add_argument("--mesh", help="data=N or fsdp=N (weights split too), and tensor=N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="that of the configuration, or float32")
    parser.add_argument("--remat", action="store_true", help="compute each block again in the backward pass")
    parser.add_argument("--batch", type=int, help="rows of an update, over all devices")
    parser.add_argument("--rows", type=int, help="rows that are sampled at a time, over all devices")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, help="new tokens of a sample")
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


SAID = {
    "weights": "frozen weights",
    "control": "control, gradient and optimizer",
    "merged": "weights with the control's change",
    "saved": "saved for the gradient",
    "cache": "caches and states",
    "logits": "logits of the next token",
}


def report(args) -> str:
    """The lines that are printed."""
    if args.config:
        found = of_config(args)
    else:
        mesh = mesh_of(args.mesh or "fsdp=8")
        given = dict(batch=args.batch or 128, prompt=args.prompt, new=args.new or 20, rows=args.rows or 1024)
        lm = shape(args.lm or "gpt2-large", args.dtype or "float32")
        found = [(args.lm or "gpt2-large", lm, args.method, args.method, pairs("set", args.set, value_of), mesh, given)]
    lines = []
    for title, lm, label, method, init, mesh, given in found:
        lm = dataclasses.replace(lm, remat=args.remat)
        wants = need(lm, method, init, mesh, **given)
        devices = math.prod(mesh.values())
        lines.append(
            f"{title}, {label}, {lm.dtype}, {devices} device{'s' * (devices > 1)} ({_text(mesh)}), {given['batch']} "
            f"rows an update, {given['rows']} sampled at a time: GiB on each device"
        )
        for stage, held in wants.items():
            lines.append(f"  {stage:40s} {sum(held.values()) / 2**30:8.3f}")
            said = SAID | ({"control": "control"} if stage == "sampling" else {})
            lines += [f"    {said[k]:38s} {v / 2**30:8.3f}" for k, v in held.items() if v]
        most = max(sum(held.values()) for held in wants.values())
        fits = [name for name, size in CHIPS.items() if most <= SPARE * size * 1e9]
        none = "none of " + ", ".join(CHIPS) + "; split it over more devices"
        lines.append(f"fits: {', '.join(fits) if fits else none}")
        if "learning" in wants and not args.config:
            sizes = dict(samples=args.samples, steps=args.steps, rate=args.rate, bandwidth=args.bandwidth)
            sampled, learned = seconds(lm, wants, mesh, **given, **sizes)
            pace = f"{args.rate:g} TFLOP/s and {args.bandwidth:g} GB/s"
            took = f"{sampled + learned:.0f} s ({sampled:.0f} sampling, {learned:.0f} learning)"
            lines.append(f"a round of {args.samples} samples and {args.steps} updates at {pace}: {took}")
    return "\n".join(lines)


def of_config(args) -> list[tuple]:
    """(title, LM, label, method, its init, mesh, sizes) of each method of a configuration; flags replace what it says.

    Sizes that the configuration leaves open are the defaults of the stages. Of an LM that is trained from nothing the
    vocabulary asked for is taken.

    Raises:
      InputError: a configuration without methods and latent vectors.
    """
    from experiments import cli
    from experiments.arms import Fitted, read

    settings = cli.config_of(args.config).to_dict()
    if "methods" in settings:
        found = {label: arm for label, arm in read(settings["methods"]).items() if isinstance(arm, Fitted)}
        arms = {label: (arm.method, arm.fit) for label, arm in found.items() if _acts(arm.method)}
    elif "recovery" in settings:
        arms = {"latent_steer": ("latent_steer", settings["recovery"]["fit"])}
    else:
        arms = {}
    if not arms:
        raise InputError(f"{args.config} names no method that acts on a language model: there is nothing to plan")
    source, dtype = settings["lm"].get("source"), args.dtype or settings["lm"].get("dtype", "float32")
    if args.lm or source:
        lm = shape(args.lm or source, dtype)
    else:
        given = settings["lm"]["pretrain"]
        sizes = {key: given[key] for key in ("vocab", "width", "depth", "heads", "context", "tied") if key in given}
        lm = Transformer.gpt2(**dict(vocab=1024, width=128, depth=4, heads=4, context=128) | sizes)
        lm = dataclasses.replace(lm, dtype=dtype, param_dtype=dtype)
    sample = settings.get("sample", {})
    mesh = mesh_of(args.mesh or "data=1")
    found = []
    for label, (method, fit) in arms.items():
        own = fit.get("prompter", {}) if method == "dglm" else fit
        section = "search" if method == "latent_steer" else "training"
        default = getattr(stage_default(method, section), "batch", None)
        batch = args.batch or own.get(section, own).get("batch") or default or 32
        given = dict(batch=batch, prompt=args.prompt)
        given |= dict(new=args.new or sample.get("max_new", 20), rows=args.rows or sample.get("batch", 64))
        found.append((args.lm or args.config, lm, label, method, init_of(method, fit, lm), mesh, given))
    return found


def _acts(method: str) -> bool:
    """Whether a method makes a control of the language model, of which its module then has an example."""
    return hasattr(methods.get(method), "example")


def init_of(method: str, fit: dict, lm: Transformer) -> dict:
    """The settings of a method's `init` among those of its `fit`."""
    if method == "dglm":
        networks = {name: fit[name]["net"] for name in ("prompter", "denoiser") if "net" in fit.get(name, {})}
        encoder = fit.get("encode", {}).get("encoder")
        found = networks | dict(latent=lm.width, attributes=len(fit.get("attributes", {"positive": {}})))
        if encoder and (Path(encoder) / "config.json").is_file():
            found["latent"] = json.loads((Path(encoder) / "config.json").read_text("utf-8"))["hidden_size"]
        return found | ({"draw": fit["draw"]} if "draw" in fit else {})
    known = set(inspect.signature(methods.get(method).init).parameters)
    known |= {"kind", "rank", "targets"} if method == "dexperts" else set()
    settings = fit | fit.get("adapter", {})
    return {key: value for key, value in settings.items() if key in known and value is not None}


def stage_default(method: str, name: str):
    """The default of a setting of the stage that fits a method; None where it has none."""
    stage = getattr(methods.get("finetune" if method == "dexperts" else method), method, None)
    found = inspect.signature(stage).parameters.get(name) if stage else None
    return None if found is None or found.default is inspect.Parameter.empty else found.default


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
