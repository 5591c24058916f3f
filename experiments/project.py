"""A projection of training and decoding to many chips, from counted bytes and the chips' published figures.

    python experiments/project.py [--lm=gpt2-xl --lm=llama-7b] [--chips=256 --chips=4096] [--json=FILE]

Nothing here was measured on these chips. Assumptions:

1. Chips, by their makers' pages ("TPU v5e" and "TPU v5p" of the Cloud TPU documentation, "NVIDIA H100 Tensor Core GPU"
   and "DGX H100"): bf16 TFLOP/s without sparsity, GB of memory, its GB/s, and GB/s that a chip sends along one axis of
   the mesh: of a TPU one link of its torus (v5e 400 Gb/s of its 1,600, v5p 800 of its 4,800); of an H100 450 by NVLink
   among the eight of a node and 50 (400 Gb/s) between nodes. A pod of v5e ends at 256 chips.
2. Half of the peak is reached in products and 0.6 of the bandwidth in reading: the targets of the project.
3. A train step of `finetune` (LoRA), bf16, blocks computed again, 16 rows of 512 tokens a chip, moves what
   `experiments/traffic.py` asks for. Over `tensor` it moves more, by what the compiled steps do
   (`experiments/benchmarks/scale.py`): queries, keys and values are brought to their heads. Where weights are split,
   the gradient met is that of the kernels a change is merged into, in float32.
4. Between two bounds: nothing moves over `data` while something is computed, and everything that can does; over
   `tensor` the next product waits. A collective over n chips is one ring, each hop a microsecond more. Links are not
   contended, no chip waits for a slower one, and input and checkpoints cost nothing.
5. Decoding: 32 rows a chip, prompts of 32 tokens and 64 new ones. Rows never meet, so it grows with the chips; over
   `tensor` each token waits for its all-reduces. With weights split over `data` it is not projected.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from absl import flags

from ctg_jax import tree
from ctg_jax.controls.delta import KERNELS
from ctg_jax.io import write_json
from ctg_jax.mesh.plan import Plan
from ctg_jax.mesh.rules import DECODER, NETWORKS, REPLICATED
from ctg_jax.types import InputError
from experiments import cli, traffic
from experiments import plan as planner

REACHED, READ, HOP = 0.5, 0.6, 1e-6
REALIGN = {1: 1.0, 2: 1.79, 4: 1.54, 8: 1.25}  # tensor: bytes of the compiled step over theory
ROWS, LENGTH = 16, 512  # of a chip's share in training
DECODED, PROMPT, NEW = 32, 32, 64  # rows of a chip, tokens


@dataclasses.dataclass(frozen=True)
class Chip:
    """bf16 TFLOP/s, GB, GB/s of memory, GB/s sent along the axes tensor and data; the largest number that is linked."""

    tflops: float
    memory: float
    bandwidth: float
    tensor: float
    data: float
    largest: int = 1 << 20


CHIPS = {
    "TPU v5e": Chip(197, 16, 819, 50, 50, 256),
    "TPU v5p": Chip(459, 95, 2765, 100, 100, 8960),
    "H100": Chip(989, 80, 3350, 450, 50),
}
LAYOUTS = {"data": 1, "FSDP": 1, "FSDP × tensor 8": 8}  # ways of the axis tensor


def flops(lm, rows, length):
    """FLOPs of the products of a forward and a backward pass, the gradients of all kernels included."""
    kernels = (lm.heads + 2 * lm.kv_heads) * lm.head_dim + lm.heads * lm.head_dim + (2 + lm.gated) * lm.mlp_width
    dense = 6 * rows * length * lm.width * (lm.depth * kernels + lm.vocab)
    return dense + 12 * lm.depth * rows * length**2 * lm.heads * lm.head_dim


def training(lm, chip, chips, layout):
    """Seconds of a chip's products, and seconds in which it sends, over data and over tensor."""
    tensor = LAYOUTS[layout]
    mesh = Plan(axes={"data": chips // tensor, "tensor": tensor}, rules=rules(layout))
    params = jax.eval_shape(lm.init, jax.random.key(0))
    # Of split weights the gradients of kernels are added up, then cut; of whole ones those of the change.
    change = dict(kind="lora") if layout == "data" else dict(kind="full", targets=KERNELS)
    control = planner.control_of(lm, "finetune", change)
    asked = traffic.asked(lm, mesh, params, control, ROWS * chips, LENGTH)
    over_data = (asked["gradients"] + asked["weights"] + asked["lookup"]) / (chip.data * 1e9)
    over_tensor = asked["activations"] * REALIGN[tensor] / (chip.tensor * 1e9)
    ring = chips // tensor - 1
    # All gradients at once; or, of each kernel of each block, two gathers and one scatter.
    over_data += HOP * ring * (2 if layout == "data" else 3 * (4 + lm.gated) * lm.depth)
    over_tensor += HOP * 2 * (tensor - 1) * (4 * lm.depth + 2)
    return flops(lm, ROWS, LENGTH) / (REACHED * chip.tflops * 1e12), over_data, over_tensor


def decoding(lm, chip, layout):
    """Seconds of a token: reading or products, and sending over tensor. A replica of `tensor` chips has their rows."""
    tensor = LAYOUTS[layout]
    weights = tree.size_bytes(jax.eval_shape(lm.init, jax.random.key(0)))
    rows, wide = DECODED * tensor, 2
    cache = 2 * lm.depth * rows * (PROMPT + NEW / 2) * lm.kv_heads * lm.head_dim * wide
    read = (weights + cache) / tensor / (READ * chip.bandwidth * 1e9)
    products = weights * rows / tensor / (REACHED * chip.tflops * 1e12)  # 2 FLOPs for each weight of two bytes
    sums, part = 2 * lm.depth + 2, 2 * (tensor - 1) / tensor
    sent = sums * (part * rows * lm.width * wide / (chip.tensor * 1e9) + 2 * (tensor - 1) * HOP)
    return max(read, products), sent


def rules(layout):
    return REPLICATED if layout == "data" else DECODER + NETWORKS


def memory(lm, layout, chips):
    """The most bytes a chip holds, learning or sampling."""
    tensor = LAYOUTS[layout]
    ways = 1 if layout == "data" else chips // tensor
    mesh = {"data" if layout == "data" else "fsdp": ways, "tensor": tensor}
    given = dict(batch=ROWS * tensor * ways, rows=DECODED * tensor * ways, prompt=PROMPT)
    learning, sampling = (planner.need(lm, "finetune", {}, mesh, new=n, **given) for n in (LENGTH - PROMPT, NEW))
    return max(sum(learning["learning"].values()), sum(sampling["sampling"].values()))


def project(name, chip_name, chips, layout):
    """One row of the table, or None where this number of chips is not linked, or does not divide the width or the
    heads."""
    chip = CHIPS[chip_name]
    lm = dataclasses.replace(planner.shape(name, "bfloat16"), remat=True)
    tensor = LAYOUTS[layout]
    if chips > chip.largest or lm.kv_heads % tensor or (layout != "data" and lm.width % (chips // tensor)):
        return None
    work, over_data, over_tensor = training(lm, chip, chips, layout)
    again = work * 4 / 3  # blocks are computed again in the backward pass
    apart, together = again + over_data + over_tensor, max(again, over_data) + over_tensor
    token, sent = decoding(lm, chip, layout)
    held = memory(lm, layout, chips)
    return {
        "lm": name,
        "chip": chip_name,
        "chips": chips,
        "layout": layout,
        "GB": held / 1e9,
        "fits": held <= planner.SPARE * chip.memory * 1e9,
        "train_tok_s": [chips * ROWS * LENGTH / t for t in (apart, together)],
        "train_share": [again / t for t in (apart, together)],
    } | (
        {}
        if layout == "FSDP"
        else {"decode_tok_s": chips * DECODED / (token + sent), "decode_share": token / (token + sent)}
    )


def define(fv):
    names = [*planner.GPT2, *planner.LLAMA]
    flags.DEFINE_multi_enum("lm", ["gpt2-xl", "llama-7b"], names, "language models; repeatable", flag_values=fv)
    flags.DEFINE_multi_integer("chips", [256, 4096], "numbers of chips; repeatable", flag_values=fv)
    flags.DEFINE_string("json", None, "also write the figures here", flag_values=fv)


def main(argv, session):
    args, _ = cli.parse(argv, define, __doc__, devices=False, mesh=False)
    if any(n < 8 or n % 8 for n in args.chips):
        raise InputError(f"--chips is {args.chips}, expected multiples of 8")
    rows = [project(lm, c, n, layout) for lm in args.lm for c in CHIPS for n in args.chips for layout in LAYOUTS]
    rows = [row for row in rows if row]
    titles = ["LM", "chip", "chips", "layout", "GB of each", "training, M tok/s", "of products alone"]
    lines = [
        "| " + " | ".join([*titles, "decoding, M tok/s", "of reading alone"]) + " |",
        "|---|---|--:|---|" + "--:|" * 5,
    ]
    for r in rows:
        held = f"{r['GB']:.1f}" + ("" if r["fits"] else " (too many)")
        speed = "–".join(f"{x / 1e6:.2f}" for x in r["train_tok_s"])
        share = "–".join(f"{x:.2f}" for x in r["train_share"])
        decoded = f"{r['decode_tok_s'] / 1e6:.2f} | {r['decode_share']:.2f}" if "decode_tok_s" in r else " | "
        cells = (r["lm"], r["chip"], f"{r['chips']:,}", r["layout"], held, speed, share, decoded)
        lines.append("| " + " | ".join(cells) + " |")
    if args.json:
        write_json(Path(args.json), rows)
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(cli.run(main, devices=False))
