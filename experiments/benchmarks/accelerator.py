"""What one accelerator gives: decoding, banks of controls, the cost of every kind of control, training, and rounds.

    make bench-accelerator                                    within nine minutes; build/bench/accelerator.json and .md
    python experiments/benchmarks/accelerator.py --dry        tiny shapes on any device
    python experiments/benchmarks/accelerator.py --only=banks --only=controls        some sections

It needs the packages that a bare CUDA image has (jax, flax, optax, orbax, numpy, safetensors, tokenizers, transformers
and torch) and reads no data: the models have the shapes of GPT-2 XL, Llama 1B and Gemma 270M with random weights in
bfloat16. The sections are in `accelerator_sections.py`. They run in order until the time is up; what was left out, and
what failed, is named, and the files are written after every section. The floor of decoding is what the device itself
allows: weights and cache, read once per token at the measured bandwidth.
"""

import argparse
import os
import sys
import time
from pathlib import Path

# PyTorch, which one section runs, needs memory of the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from ctg_jax.io import write_json, write_text
from experiments.benchmarks import accelerator_sections as sections
from experiments.benchmarks.accelerator_sections import Bench, opened, shapes

# What runs on which model, the most wanted first.
PLAN = (
    ("gpt2-xl", sections.decoding),
    ("gpt2-xl", sections.against_transformers),
    ("gpt2-xl", sections.against_authors),
    ("gemma-270m", sections.decoding),
    ("gemma-270m", sections.banks),
    ("gemma-270m", sections.controls),
    ("llama-1b", sections.decoding),
    ("llama-1b", sections.training),
    ("gpt2-small", sections.rounds),
    ("gpt2-small", sections.latent_diffusion),
    ("gpt2-small", sections.latent_vectors),
    ("gpt2-small", sections.banks),
    ("gpt2-xl", sections.training),
    ("gemma-270m", sections.training),
)


def device(dry):
    """{"bandwidth": bytes per second, "matrix": FLOP/s of a large product in bfloat16}, each the best of several runs.

    The bandwidth is the larger of a copy's, which reads and writes, and a sum's, which reads."""
    size, n = (2**20, 256) if dry else (2**32, 8192)
    x = jnp.ones(size // 4)
    w = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)  # products of constants run faster than real ones
    total, copy, product = jax.jit(jnp.sum), jax.jit(lambda x: x + 1), jax.jit(lambda w: w @ w)
    best = lambda f: min(sections.runs(f, 8))  # noqa: E731
    bandwidth = max(size / best(lambda: total(x)), 2 * size / best(lambda: copy(x)))
    return {"bandwidth": bandwidth, "matrix": 2 * n**3 / best(lambda: product(w))}


def called(section):
    return section.__name__.replace("_", " ")


def measure(dry, minutes, only=(), written=lambda facts, rows: None):
    """(facts about the device, rows) of the sections with the names `only`, or of all. A section that the time does not
    allow, or that fails, is a row with `left_out`; `written` is called after every section."""
    end = time.monotonic() + 60 * minutes
    facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **device(dry)}
    models, rows, name, params = shapes(dry), [], None, None
    for wanted, section in PLAN:
        if only and called(section) not in only:
            continue
        named = {"section": called(section)}
        row = named | {"what": wanted}
        if time.monotonic() > end:
            rows.append(row | {"left_out": "the time was up"})
            continue
        try:
            if wanted != name:
                params = None  # one model at a time
                name, params = wanted, opened(models[wanted])
            for found in section(Bench(name, models[name], params, facts, dry)):
                rows.append(named | found)
                shown = (f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in rows[-1].items())
                print(*shown, sep=", ", flush=True)
        except Exception as e:  # a kernel that this device lacks, memory: the other sections are still wanted
            rows.append(row | {"left_out": f"{type(e).__name__}: {str(e).splitlines()[0][:150]}"})
            print(rows[-1], flush=True)
        written(facts, rows)
    written(facts, rows)
    return facts, rows


def markdown(facts, rows):
    """One table under a line about the device."""
    numbers = ("speed", "relative", "of_bandwidth", "of_matrix_rate")
    speed = f"{facts['bandwidth'] / 1e9:.0f} GB/s, {facts['matrix'] / 1e12:.1f} TFLOP/s"
    lines = [f"{facts['device']}, jax {facts['jax']}, {speed}", ""]
    lines += ["| section | what | speed | relative | of bandwidth | of matrix rate | left out |"]
    lines += ["|---|---|--:|--:|--:|--:|---|"]
    for row in rows:
        cells = [f"{row[n]:.4g}" if n in row else "" for n in numbers]
        cells[0] += f" {row['unit']}" if "unit" in row else ""
        left_out = row.get("left_out", "").replace("|", "\\|")
        lines.append("| " + " | ".join([row["section"], row["what"], *cells, left_out]) + " |")
    return "\n".join(lines) + "\n"


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further section begins")
    names = tuple(dict.fromkeys(called(section) for _, section in PLAN))
    parser.add_argument("--only", action="append", default=[], choices=names, help="a section to run, repeatable")
    parser.add_argument("--out", default="build/bench", help="folder of accelerator.json and accelerator.md")
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    def written(facts, rows):
        write_json(out / "accelerator.json", {"device": facts, "rows": rows})
        write_text(out / "accelerator.md", markdown(facts, rows))

    measure(args.dry, args.minutes, args.only, written)
    print(out / "accelerator.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
