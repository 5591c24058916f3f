"""Bytes that a compiled program moves between devices, read from its text, and what theory asks for.

`collectives` finds every all-reduce, all-gather, reduce-scatter, all-to-all and collective-permute of a compiled
program, those inside loops as often as the loop runs. Bytes are those each device sends, by rings (Patarasuk & Yuan
2009): of S bytes over n devices 2 (n - 1) / n · S for an all-reduce, (n - 1) / n · S for a gather, a scatter and an
all-to-all, S for a permute.

`asked` is the theory, for a train step of a decoder whose rows are split over `data` and whose weights are split by the
rules `ctg_jax.mesh.rules.DECODER`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

import jax.numpy as jnp

from ctg_jax import tree
from ctg_jax.mesh.plan import Plan
from ctg_jax.models.decoder import Transformer
from ctg_jax.types import InputError, PyTree

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s64": 64, "u64": 64, "f64": 64}
BITS |= {"s32": 32, "u32": 32, "f32": 32}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      size: bytes S of the whole array on one device: of the result, for reduce-scatter of the operand.
      devices: n, those of one group. For a permute the share of devices that receive is in `share`.
      times: how often a run of the program executes it.
      where: the operation it was made for, as the compiler names it.
    """

    kind: str
    size: int
    devices: int
    times: int = 1
    share: float = 1.0
    where: str = ""

    @property
    def moved(self) -> float:
        """Bytes each device sends in one run."""
        part = {"all-reduce": 2 * (self.devices - 1) / self.devices, "collective-permute": self.share}
        return self.times * self.size * part.get(self.kind, (self.devices - 1) / self.devices)


def collectives(text: str, devices: int, trips: int | None = None) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
      text: `jax.jit(…).lower(…).compile().as_text()`.
      devices: of the program.
      trips: how often loops run whose count the compiler does not know, such as that of decoding.

    Raises:
      InputError: a loop of unknown length without `trips`; an asynchronous collective, whose form is not known here.
    """
    bodies = _computations(text)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        for line in bodies[name]:
            kind = _opcode(line)
            if kind == "while":
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                if known is None and trips is None:
                    raise InputError(f"the loop {line.split(' =')[0]} has no known length: give trips")
                count = int(known[1]) if known else trips
                visit(re.search(r"body=%?([\w.\-]+)", line)[1], times * count)
            elif kind == "call":
                visit(re.search(r"to_apply=%?([\w.\-]+)", line)[1], times)
            elif kind == "conditional":
                names = re.search(r"branch_computations=\{([^}]*)\}", line)
                names = names[1].split(",") if names else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
                for branch in names:
                    visit(branch.strip().lstrip("%"), times)
            elif kind.removesuffix("-start") in KINDS:
                if kind.endswith("-start"):
                    raise InputError(f"{kind} is asynchronous: compile without overlapping collectives")
                found.append(_collective(kind, line, devices, times))

    visit(next(name for name in bodies if name.startswith("ENTRY ")), 1)
    return [c for c in found if c.devices > 1 and c.share > 0]


def moved(found: list[Collective]) -> dict[str, float]:
    """Bytes each device sends in one run, by kind."""
    out: Counter = Counter()
    for c in found:
        out[c.kind] += c.moved
    return dict(out)


def _computations(text: str) -> dict[str, list[str]]:
    """name -> its instructions; the entry's name begins with "ENTRY "."""
    out: dict[str, list[str]] = {}
    here = None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            here = out.setdefault((head[1] or "") + head[2], [])
        elif line.startswith("}"):
            here = None
        elif here is not None:
            here.append(line.strip())
    return out


def _opcode(line: str) -> str:
    found = re.match(r"(?:ROOT )?%?[\w.\-]+ = (?:\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\(", line)
    return found[1] if found else ""


def _collective(kind: str, line: str, devices: int, times: int) -> Collective:
    result = line.split(" = ", 1)[1].split(f" {kind}(", 1)[0]
    size = 0
    for kind_of, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result):
        size += math.prod(int(d) for d in dims.split(",") if d) * BITS[kind_of] // 8
    where = re.search(r'op_name="([^"]*)"', line)
    where = where[1] if where else ""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", re.search(r"source_target_pairs=\{(.*?)\}\}", line)[0])
        return Collective(kind, size, devices, times, sum(a != b for a, b in pairs) / devices, where)
    n = _group(line, devices)
    return Collective(kind, size * n if kind == "reduce-scatter" else size, n, times, where=where)


def _group(line: str, devices: int) -> int:
    """Devices of one replica group, which is written as axes of a mesh, as a list or as a reshaped range."""
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)
    if axes:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part or sizes[name]) for name, part in used)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    reshaped = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    return int(reshaped[2]) if reshaped else devices


def asked(lm: Transformer, plan: Plan, params: PyTree, learned: PyTree, rows: int, length: int) -> dict[str, float]:
    """Bytes each device must send in one train step on rows of `length` tokens, by purpose:

    gradients: of what is learned, float32: all-reduced over `data` where a leaf is whole there, scattered where it is
      split, and left where it is on the axis `tensor`.
    weights: gathered over `data` where they are split: of blocks once forward and once backward (what is recomputed
      there needs them at the same time), of the unembedding once. The embedding is looked up on the
      devices that hold it.
    activations: over `tensor`, two all-reduces a block forward and two backward (Shoeybi et al. 2019, section 3), one
      where the stream begins (a vocabulary in parts) and one where its gradient ends.
    lookup: embeddings found on the devices that hold their features go to those that hold their rows.

    Args:
      params, learned: shapes of the language model's parameters and of what is trained (a control, or the same).
      rows: over all devices.
    """
    sizes = dict(plan.axes)
    data, tensor = sizes["data"], sizes.get("tensor", 1)
    once, ring = (data - 1) / data, 2 * (tensor - 1) / tensor
    specs = tree.flatten(plan.specs(params))
    out = dict(gradients=0.0, weights=0.0, activations=0.0, lookup=0.0)

    def ways(spec):
        used = [a for part in spec if part for a in (part if isinstance(part, tuple) else (part,))]
        return "data" in used, math.prod(sizes[a] for a in used if a != "data")

    for (_, x), spec in zip(tree.flatten(learned).items(), tree.flatten(plan.specs(learned)).values()):
        split, parts = ways(spec)
        out["gradients"] += (1 if split else 2) * once * 4 * math.prod(x.shape) / parts
    for path, x in tree.flatten(params).items():
        split, parts = ways(specs[path])
        head = path == ("embed/tokens" if lm.tied else "head/kernel")
        if split and (head or path.startswith("layers/")):
            out["weights"] += (1 if head else 2) * once * math.prod(x.shape) * x.dtype.itemsize / parts
    stream = rows * length / data * lm.width * jnp.dtype(lm.dtype).itemsize
    out["activations"] = (4 * lm.depth + 2) * ring * stream
    if any(ways(spec)[0] for path, spec in specs.items() if path.startswith("embed/")):
        out["lookup"] = 2 * once * stream
    return out
