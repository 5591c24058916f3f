"""What a method needs on devices that need not exist, from shapes alone: bytes on each device of a mesh, which chips
hold them, and how long a round of sampling and learning takes at given rates.

    python experiments/plan.py --lm=gpt2-large --method=quark --set=kind=full --mesh=fsdp=8 --batch=128 --new=20
    python experiments/plan.py --lm=llama-7b --dtype=bfloat16 --method=ppo --mesh=fsdp=8,tensor=4 --rate=200
    python experiments/plan.py --config=configs/finetune.py:tiny --lm=gpt2-xl --mesh=data=4 --remat

--config plans every method of an experiment, with its sizes; flags replace them. --lm is one of the shapes below or a
directory with a config.json. --set=KEY=VALUE, which may be repeated, is a setting of the method's `init`. --mesh and
--remat are those of the scripts (`data` splits rows, `fsdp` weights as well; `tensor` splits the heads of the cache).

Sampling is planned for every control, learning for methods whose own stage trains their control by gradients of the
next-token loss. What the gradient saves is measured on its own residuals, caches and states on the first step of
decoding. The last line names what is not counted: judges and rewards, fits by other stages (experts, denoisers,
encoders, searches of vectors), and arms whose control does not follow from the settings. Times take the rates as
reached, not as advertised; `experiments/benchmarks` measures them. Nothing is allocated.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from absl import flags

from ctg_jax import methods, tree
from ctg_jax.controls.copies import CopyDelta
from ctg_jax.controls.streams import Stream
from ctg_jax.decode import loop
from ctg_jax.learn import losses, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.mesh import layout
from ctg_jax.mesh.plan import Plan
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError, Prompts, Sampling
from experiments import cli
from experiments.arms import Fitted, Made, read
from experiments.planned_methods import acts, default_batch, init_of, trains

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
    """Bytes per device of what each stage of `method` on `lm` holds at once: "learning", where the method trains its
    own control, and "sampling".

    Args:
      mesh: axes and sizes, named as in --mesh: "data" or "fsdp", and "tensor".
      init: settings of the method's `init`.
      batch: rows of an update, over all devices. rows: of a batch that is sampled.
      prompt, new: tokens.

    Raises:
      InputError: a batch that the mesh does not divide, an unknown method or setting, a method that does not
        use the language model, rows that are longer than its context.
    """
    plan = layout.read(_text(mesh)).plan(math.prod(mesh.values()), math.prod(mesh.values()) // mesh.get("tensor", 1))
    data, _ = plan_sizes(plan)
    for name, value in (("batch", batch), ("rows", rows)):
        if value % data:
            raise InputError(f"{name} is {value}, expected a multiple of {data}, the data axis of the mesh")
    if not acts(method):
        raise InputError(f"{method} completes prompts without the language model, so there is nothing of it to plan")
    control = control_of(lm, method, init)
    found = {"learning": learning(lm, plan, control, batch // data, prompt + new)} if trains(method) else {}
    return found | {"sampling": sampling(lm, plan, control, rows // data, prompt, new)}


def control_of(lm: Transformer, method: str, init: dict):
    """Shapes of a method's control."""
    try:
        return jax.eval_shape(lambda k: methods.get(method).init(lm, k, **init), jax.random.key(0))
    except TypeError as e:
        raise InputError(f"--set does not suit {method}: {e}") from None


def changed(lm: Transformer, plan: Plan, control) -> dict[str, int]:
    """The weights, and the copies that a control and its streams change."""
    params = jax.eval_shape(lm.init, jax.random.key(0))
    weights = plan.bytes_per_device(params)
    bound = jax.eval_shape(lambda c, p: c.bind(p, p), control, params)
    streams = [x for x in jax.tree.leaves(bound, is_leaf=_is_stream) if _is_stream(x)]
    base = jax.tree.map(lambda x: None if _is_stream(x) else x, control, is_leaf=_is_stream)
    apart = [x.control for x in streams if not isinstance(x.control, CopyDelta)]
    merged = sum(any("changes" in path for path in tree.flatten(x)) for x in (base, *apart))
    return dict(weights=weights, merged=weights * merged)


def _is_stream(x):
    return isinstance(x, Stream)


def learning(lm: Transformer, plan: Plan, control, rows: int, length: int) -> dict[str, int]:
    """What a device holds while the control is trained on `rows` rows of its own."""
    key, (_, tensor) = jax.random.key(0), plan_sizes(plan)
    state = jax.eval_shape(lambda c, k: train.init_state(c, optimizer(1e-3), k), control, key)
    params = jax.eval_shape(lm.init, key)
    one, two = (residuals(lm, params, control, n * max(rows, 1), length) for n in (1, 2))
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


def mesh_of(text: str) -> dict[str, int]:
    """Axis -> size of --mesh; InputError where a size is left to the devices, of which there are none."""
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


def residuals(lm: Transformer, params, control, rows: int, length: int) -> int:
    """Bytes that the gradient of the next-token loss keeps between its two passes, weights included."""
    batch = {"tokens": jnp.zeros((rows, length), jnp.int32), "mask": jnp.ones((rows, length), bool)}

    def backward(control, params):
        keys = jax.random.split(jax.random.key(0), rows)
        return jax.vjp(lambda c: losses.control_loss(lm)(c, {"params": params}, batch, keys).total, control)[1]

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


def define(fv):
    text, number, whole = flags.DEFINE_string, flags.DEFINE_float, flags.DEFINE_integer
    text("config", None, "FILE.py or FILE.py:ARGUMENT: every method of an experiment", flag_values=fv)
    text("lm", None, f"{', '.join([*GPT2, *LLAMA])}, or a directory", flag_values=fv)
    text("method", "quark", "the method, without --config", flag_values=fv)
    flags.DEFINE_multi_string("set", [], "KEY=VALUE: a setting of the method's init; repeatable", flag_values=fv)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "that of --config, or float32", flag_values=fv)
    whole("batch", None, "rows of an update, over all devices", flag_values=fv)
    whole("rows", None, "rows that are sampled at a time, over all devices", flag_values=fv)
    whole("prompt", 32, "tokens of a prompt", flag_values=fv)
    whole("new", None, "new tokens of a sample", flag_values=fv)
    whole("samples", 64000, "samples of a round", flag_values=fv)
    whole("steps", 500, "updates of a round", flag_values=fv)
    number("rate", 50.0, "TFLOP/s that each device reaches", flag_values=fv)
    number("bandwidth", 800.0, "GB/s that each device reaches", flag_values=fv)


def main(argv, session):
    values, _ = cli.parse(argv, define, __doc__, devices=False)
    return report(values)


LABELS = {
    "weights": "frozen weights",
    "control": "control, gradient and optimizer",
    "merged": "weights with the control's change",
    "saved": "saved for the gradient",
    "cache": "caches and states",
    "logits": "logits of the next token",
}


def report(args) -> str:
    """The lines that are printed."""
    left_out = []
    if args.config:
        found, left_out = of_config(args)
    else:
        mesh = mesh_of(args.mesh or "fsdp=8")
        given = dict(batch=args.batch or 128, prompt=args.prompt, new=args.new or 20, rows=args.rows or 1024)
        lm = shape(args.lm or "gpt2-large", args.dtype or "float32")
        found = [(args.lm or "gpt2-large", lm, args.method, args.method, settings_of(args.set), mesh, given)]
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
            labels = LABELS | ({"control": "control"} if stage == "sampling" else {})
            lines += [f"    {labels[k]:38s} {v / 2**30:8.3f}" for k, v in held.items() if v]
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
    lines.append(not_counted([method for _, _, _, method, *_ in found], left_out))
    return "\n".join(lines)


def not_counted(planned: Sequence[str], left_out: Sequence[str]) -> str:
    """The sentence that names what the figures of the methods `planned` leave out.

    Args:
      left_out: labels of arms that are not planned at all.
    """
    parts = ["judges and rewards"]
    if fits := [m for m in dict.fromkeys(planned) if hasattr(methods.get(m), "fit") and not trains(m)]:
        parts.append(f"fitting {', '.join(fits)}")
    if left_out:
        parts.append(f"arms without a method whose control follows from the settings ({', '.join(left_out)})")
    return f"not counted: {'; '.join(parts)}"


def of_config(args) -> tuple[list[tuple], list[str]]:
    """(title, LM, label, method, its init, mesh, sizes) of each method of a configuration, where flags replace its
    settings; and the labels of the arms that cannot be planned.

    Sizes that the configuration leaves open are the defaults of the stages. The vocabulary of an LM that is pretrained
    is the one that the configuration asks for.

    Raises:
      InputError: a configuration without a method whose control can be built from its settings.
    """
    settings = cli.config_of(args.config).to_dict()
    given, arms = read(settings.get("methods", {})), {}
    for label, arm in given.items():
        if isinstance(arm, Fitted | Made) and acts(arm.method):
            arms[label] = (arm.method, arm.init if isinstance(arm, Made) else arm.fit)
    source, dtype = settings["lm"].get("source"), args.dtype or settings["lm"].get("dtype") or "float32"
    if args.lm or source:
        lm = shape(args.lm or source, dtype)
    else:
        made = settings["lm"]["pretrain"]
        sizes = {key: made[key] for key in ("vocab", "width", "depth", "heads", "context", "tied") if key in made}
        lm = Transformer.gpt2(**dict(vocab=1024, width=128, depth=4, heads=4, context=128) | sizes)
        lm = dataclasses.replace(lm, dtype=dtype, param_dtype=dtype)
    sample = settings.get("sample", {})
    mesh = mesh_of(args.mesh or "data=1")
    found = []
    for label, (method, fit) in arms.items():
        init = init_of(method, fit)
        if init is None:
            continue
        batch = args.batch or fit.get("training", {}).get("batch") or default_batch(method)
        sizes = dict(batch=batch, prompt=args.prompt)
        sizes |= dict(new=args.new or sample.get("max_new", 20), rows=args.rows or sample.get("batch", 64))
        found.append((args.lm or args.config, lm, label, method, init, mesh, sizes))
    if not found:
        raise InputError(
            f"{args.config} has no method whose control follows from its settings: give --method and --set"
        )
    planned = {label for _, _, label, *_ in found}
    return found, [label for label in given if label not in planned]


def settings_of(parts) -> dict:
    """KEY=VALUE parts as a dictionary, values read as JSON where they can be; InputError for a part without a value."""
    out = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not (key and equals):
            raise InputError(f"--set has {part!r}, expected KEY=VALUE")
        try:
            out[key] = json.loads(text)
        except ValueError:
            out[key] = text
    return out


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
