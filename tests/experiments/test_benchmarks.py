"""Benchmarks: their command lines, and the clock of a round of Quark."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from ctg_jax.data import train_bpe
from ctg_jax.models.decoder import Transformer
from experiments import cli
from tests.experiments.tiny_lm import write_lm

FOLDER = Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark by its name, without what it does to the process when it is imported."""
    monkeypatch.setattr(os, "sched_setaffinity", lambda *args: None, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def load(name):
        if "\nimport torch\n" in (FOLDER / f"{name}.py").read_text(encoding="utf-8"):
            pytest.importorskip("torch")  # the others import the library that they compare with when they need it
        spec = importlib.util.spec_from_file_location(f"benchmark_of_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


# The first reads its own flags, because a bare CUDA image lacks the library of the others; two are parts of others.
BARE = ("accelerator", "accelerator_sections", "authors")


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in BARE))
def test_a_benchmark_has_the_command_line_of_every_script(benchmark, capsys, name):
    main = benchmark(name).main
    assert cli.run(main, ["--help"], devices=False) == 0
    shown = capsys.readouterr().out
    assert f"experiments/benchmarks/{name}.py" in shown and "--mesh" not in shown
    wrong = [("--hlep", "did you mean 'help'?"), ("8", "unexpected argument '8'")]
    if "--repeats" in shown:  # what measures time
        wrong += [("--repaets=2", "did you mean 'repeats'?"), ("--repeats=0", "repeats")]
    for flag, words in wrong:
        assert cli.run(main, [flag], devices=False) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_compiled_programs_are_kept_by_scripts_and_not_by_benchmarks(monkeypatch):
    kept = []
    monkeypatch.setattr(cli, "keep_compiled", lambda: kept.append(True))
    assert cli.run(lambda argv, session: None, [], devices=False) == 0 and not kept
    assert cli.run(lambda argv, session: None, []) == 0 and kept


class Judge:
    """A reward through an embedder whose program does nothing."""

    def __init__(self, kind):
        encoder = types.SimpleNamespace(context=8, pad=0)
        encode = lambda texts: [[len(t)] for t in texts]  # noqa: E731
        self.embedder = kind(encoder, {"x": np.zeros(1)}, encode, batch=4)

    def __call__(self, prompts, texts):
        return self.embedder.run(lambda params, tokens, mask: tokens[:, :1] * 1.0, texts, 1)[:, 0]


def test_the_benchmark_of_an_accelerator_runs_dry(benchmark, tmp_path, monkeypatch, capsys):
    """Every section once, but those of another library, which takes long to import; one that fails, whose message is
    kept while the others run; and what the time does not allow."""
    bench = benchmark(BARE[0])
    sections = {s.__name__: s for _, s in bench.PLAN if not s.__name__.startswith("against")}

    def broken(b):
        yield b.row("first", speed=1.0, unit="tokens/s")
        raise ValueError("no such kernel | here\nmore")

    plan = [("gpt2-small", broken), *(("gpt2-small", s) for s in sections.values())]
    monkeypatch.setattr(bench, "PLAN", plan)
    assert bench.main(["--dry", f"--out={tmp_path}"]) == 0
    saved = json.loads((tmp_path / "accelerator.json").read_text())
    assert saved["device"]["bandwidth"] > 0 and saved["device"]["matrix"] > 0
    ran = {"decoding", "controls", "banks", "training", "rounds", "latent diffusion", "latent vectors"}
    assert {row["section"] for row in saved["rows"]} == ran | {"broken"}
    assert [r["left_out"] for r in saved["rows"] if "left_out" in r] == ["ValueError: no such kernel | here"]
    assert all(row.keys() & {"speed", "relative", "left_out"} for row in saved["rows"])
    banks = [row for row in saved["rows"] if row["section"] == "banks"]
    kinds = [row["what"].partition(", ")[2] for row in banks]
    assert kinds == [f"{k}, {n} distinct" for k in ("steer", "lora") for n in (0, 1, 4)]
    assert all(row["speed"] > 0 and row["relative"] > 0 for row in banks)
    assert (tmp_path / "accelerator.md").read_text().count("\n") == len(saved["rows"]) + 4
    _, rows = bench.measure(True, 0)
    assert [row["left_out"] for row in rows] == ["the time was up"] * len(plan)
    assert {row["section"] for row in bench.measure(True, 0, only=["banks"])[1]} == {"banks"}


@pytest.mark.slow
def test_the_authors_way_is_measured_on_an_accelerator(benchmark, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert benchmark(BARE[0]).main(["--dry", "--only=against authors", f"--out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "accelerator.json").read_text())["rows"]
    assert [row["what"].split(", ")[-1] for row in rows] == ["gedi", "self_debias", "arithmetic"]
    assert all(row["relative"] > 0 and row["speed"] > 0 for row in rows)


def test_the_networks_of_dglm_and_of_its_benchmark_are_the_same(benchmark):
    """The score network, which has skips, time and a context, and the prompter, with random modulations."""
    bench = benchmark("dglm")
    lm = Transformer.gpt2(width=16, depth=1, heads=2, context=16, vocab=32)
    small = dict(width=16, depth=4, heads=2, pseudo_tokens=2, spread=2)
    control = bench.dglm.init(
        lm, jax.random.key(0), latent=6, denoiser=small, prompter=small | dict(depth=2, length=3, kind="frozen")
    )
    draw = np.random.default_rng(0)
    noisy = lambda x: x + 0.1 * draw.normal(size=x.shape).astype(np.float32)  # noqa: E731
    z, context = (draw.normal(size=(3, 6)).astype(np.float32) for _ in range(2))
    parts = [(control.net, control.score, context), (control.soft_prompt.net, control.soft_prompt.prompter, None)]
    for net, params, given in parts:
        params = jax.tree.map(noisy, params)
        mine = net.apply(params, z, np.full(3, 0.5, np.float32), *([] if given is None else [given]))
        context_ = None if given is None else bench.torch.from_numpy(given)
        theirs = bench.Net(net, params)(bench.torch.from_numpy(z), 0.5, context_)
        np.testing.assert_allclose(np.asarray(mine), theirs.detach().numpy(), atol=1e-4)


@pytest.mark.slow
def test_the_benchmark_of_an_accelerator_needs_what_a_bare_image_has():
    """Without the packages that configurations, data and reports need."""
    blocked = ("ml_collections", "grain", "scipy", "sklearn", "pyarrow", "matplotlib", "tensorflow_datasets")
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\nimport experiments.benchmarks.accelerator"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_clock_of_a_quark_round_sees_every_compiled_program(benchmark):
    """Sampling, too: a round that has to be compiled spends most of its time in `generate`."""
    quark = benchmark("quark")
    monitor, calls = quark.Busy.__call__, []

    class Counted(quark.Busy):
        def __call__(self, f):
            timed = monitor(self, f)
            return lambda *args, **kw: (calls.append(getattr(f, "__name__", "")), timed(*args, **kw))[1]

    quark.Busy, quark.K, quark.NEW = Counted, 2, 4
    lm = Transformer.gpt2(vocab=300, width=16, depth=1, heads=2, context=32)
    steps = 2
    texts = ["the food", "the room", "we", "the soup was", "a day", "good"]
    tokenizer = quark.Folded(train_bpe(["the food was good"] * 5, 270), 270)
    run, state = quark.ours(lm, jax.jit(lm.init)(jax.random.key(0)), tokenizer, texts, Judge(quark.Timed), steps, 4)
    _, spent, inside = run(state)
    assert spent.shape == inside.shape == (3,)
    assert calls.count("run") == 2  # strategies.run: six prompts in batches of four
    assert len(calls) == 2 + 2 + steps
    assert (inside > 0).all() and (inside <= spent).all()
    assert inside[0] > 0.5 * spent[0]  # its program was compiled in there


@pytest.mark.slow
def test_a_round_of_quark_is_measured_at_each_mixture(benchmark, capsys, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    module, file = benchmark("quark"), tmp_path / "rows.json"
    module.SHAPES = {"mini": dict(width=16, depth=1, heads=2, context=64, vocab=1010)}
    module.MIXTURES = {"paper": (6, 1), "old": (5, 2)}
    code = cli.run(module.main, ["--shape=mini", "--batch=4", "--repeats=1", f"--json={file}"], devices=False)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert module.processor() in out and "6 samples, 1 updates of 4 rows" in out
    saved = json.loads(file.read_text())
    for row in saved["rows"][:2]:
        shares = [row[part]["share"] for part in ("explore", "score", "learn")]
        assert sum(shares) == pytest.approx(1) and 0 < row["learn"]["of_floor"] < 1
    assert [row["kept_states"] for row in saved["rows"][2:]] == ["full", "lora"]
    # A block has 4 · 16² weights in its attention and 8 · 16² in its MLP.
    blocks = 12 * 16**2 * (6 * 9 + 2 * 8)
    attention = (6 * 9**2 + 2 * 8**2) * 2 * 16
    lm = Transformer.gpt2(**module.SHAPES["mini"])
    assert module.flops(lm, 3, 5, 4) == 3 * (blocks + attention + 8 * 4 * 16 * 1010)


TOGETHER = ("gedi", "pplm", "self_debias", "critic", "value_model", "residual", "selective", "speculation")


@pytest.mark.parametrize("arms", [("arithmetic", "fudge"), pytest.param(TOGETHER, marks=pytest.mark.slow)])
def test_controls_are_measured_beside_their_passes(benchmark, capsys, tmp_path, arms):
    pytest.importorskip("torch")  # the authors' way
    pytest.importorskip("transformers")
    module, file = benchmark("decoding_control"), tmp_path / "rows.json"
    words = ["--shape=tiny", "--batch=2", "--prompt=4", "--new=3", "--repeats=1", f"--json={file}"]
    assert cli.run(module.main, [*words, *(f"--method={name}" for name in arms)], devices=False) == 0
    rows = {row["method"]: row for row in json.loads(file.read_text())}
    assert list(rows) == list(arms) and len(capsys.readouterr().out.splitlines()) == 2 + len(arms)
    assert all(row["ms_per_token"] > 0 and row["of_plain"] > 0 for row in rows.values())
    wanted = {"arithmetic": 3, "fudge": 3, "speculation": 1.4, "gedi": 3, "self_debias": 3, "critic": 3, "pplm": 6}
    for name in wanted.keys() & rows.keys():
        assert rows[name]["passes"] == pytest.approx(wanted[name], rel=1e-6)
        assert ("torch_over_ours" in rows[name]) == (name in ("arithmetic", "gedi", "self_debias"))
    assert cli.run(module.main, [*words, "--method=gedy"], devices=False) == 2
    assert "--method=gedy is not measured here" in capsys.readouterr().err


def test_speculation_is_measured_with_a_draft_whose_agreement_is_set(benchmark, capsys, tmp_path):
    module, file = benchmark("speculation"), tmp_path / "rows.json"
    sizes, depth = module.SHAPES["tiny"]
    small = Transformer.gpt2(**sizes)
    draft = module.sharper(jax.jit(small.init)(jax.random.key(0)))
    draft = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), draft)
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, small.vocab)
    mask = np.ones((2, 9), bool)
    wanted = jax.jit(lambda p: small.apply(p, small.embed(p, tokens), mask).logits)(draft)
    for apart, same in ((0.0, True), (6.0, False)):
        large, params = module.widened(small, draft, depth, apart, jax.random.key(3))
        found = jax.jit(lambda p, lm=large: lm.apply(p, lm.embed(p, tokens), mask).logits)(params)
        assert np.allclose(found, wanted, atol=1e-3) == same
    words = ["--shape=tiny", "--k=2", "--apart=0", "--apart=300", "--prompt=4", "--new=25", "--repeats=1"]
    assert cli.run(module.main, [*words, f"--json={file}"], devices=False) == 0
    equal, apart = json.loads(file.read_text())
    assert equal["shared"] == pytest.approx(1, abs=1e-5) and 0 < apart["shared"] < 0.9
    assert equal["tokens_a_round"] == 3 > apart["tokens_a_round"] and equal["gain"] > 0 < apart["alone"]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_search_is_measured_beside_the_same_loop_with_transformers(benchmark, capsys, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    module, file = benchmark("search"), tmp_path / "rows.json"
    words = ["--shape=tiny", "--beams=2", "--n=2", "--segment=2", "--new=5", "--prompt=3", "--repeats=1"]
    assert cli.run(module.main, [*words, f"--json={file}"], devices=False) == 0
    rows = json.loads(file.read_text())
    assert [row["loop"] for row in rows] == ["ours", "again", "kept"] and all(row["tok_s"] > 0 for row in rows)
    assert "over_ours" not in rows[0] and all(row["over_ours"] > 0 for row in rows[1:])
    assert len(capsys.readouterr().out.splitlines()) == 5
    args = types.SimpleNamespace(beams=2, n=2)
    tokens = np.array([[9, 1, 1], [9, 2, 2], [9, 2, 1], [9, 3, 3], [9, 4, 4], [9, 1, 1], [9, 1, 2], [9, 6, 6]])
    assert module.kept_rows(args, tokens, 1).tolist() == [1, 1, 2, 2, 4, 4, 7, 7]


@pytest.mark.slow
def test_the_wait_for_the_first_text_is_measured_in_processes_of_their_own(benchmark, tmp_path, capsys):
    pytest.importorskip("torch")
    lm = write_lm(tmp_path / "lm", context=64)
    code = cli.run(benchmark("first_text").main, [f"--lm={lm}", "--repeats=1", "--new=2"], devices=False)
    out = capsys.readouterr().out
    assert code == 0 and out.count("over that of transformers") == 3 and "longer prompt" in out, out
