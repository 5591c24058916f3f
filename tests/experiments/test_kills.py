"""kill -9, thirty times over all stages of latent steering, Quark and DGLM: run again, every artifact is that of a run
which nothing disturbed, to the bit."""

import json
import random
import signal
import time
from collections import Counter

import numpy as np
import pytest

from ctg_jax import tree
from ctg_jax.run import checkpoint
from experiments.hosts import LOST
from tests.experiments.test_scripts_on_hosts import HERE, finish, start

PILLARS = {
    "latents": ("latents.py", ["--sections=recovery,analysis"], {"latent_steer", "latents.recover", "latents.analyse"}),
    "quark": ("main.py", [], {"sample", "score", "quark", "evaluate"}),
    "dglm": (
        "main.py",
        [],
        {"embeddings.encode", "embeddings.denoiser", "embeddings.probe", "embeddings.prompter", "dglm", "sample"},
    ),
}
KILLS = 10  # of each


def begun(process):
    """(name of the directory, seconds since the line before) of each stage that a process says it is running."""
    before = time.monotonic()
    for line in process.stderr:
        if line.startswith("running "):
            yield line.split()[1], time.monotonic() - before
            before = time.monotonic()


def undisturbed(config, root):
    """[(stage, how long it took)] in the order of a run that nothing disturbs."""
    script, argv, _ = PILLARS[config]
    process = start(script, HERE / f"configs/{config}.py:tiny", root, 1, *argv)[0]
    found = list(begun(process))
    assert process.wait(timeout=900) == 0
    names, waits = [name for name, _ in found], [wait for _, wait in found[1:]]
    return list(zip(names, [*waits, 0.5]))


def moments(stages, wanted, seed):
    """[(number of a stage, share of its time)], sorted: one in each kind of stage that is wanted, the rest anywhere."""
    rng = random.Random(seed)
    kinds = [name.rpartition("-")[0] for name, _ in stages]
    chosen = [rng.choice([i for i, kind in enumerate(kinds) if kind == wish]) for wish in sorted(wanted)]
    chosen += [rng.randrange(len(stages)) for _ in range(KILLS - len(chosen))]
    return [(i, rng.random()) for i in sorted(chosen)]


def killed(config, root, stages, at, share):
    """Runs until stage `at`, or the first one after it that was not finished, has run for a share of its time, and
    kills; the stage that was cut short, or None where the run ended first."""
    script, argv, _ = PILLARS[config]
    order = {name: i for i, (name, _) in enumerate(stages)}
    process = start(script, HERE / f"configs/{config}.py:tiny", root, 1, *argv)[0]
    names = []
    for name, _ in begun(process):
        names.append(name)
        if order[name] >= at:
            time.sleep(share * stages[order[name]][1])
            break
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    names += [line.split()[1] for line in err.splitlines() if line.startswith("running ")]
    assert names, f"the process ended with {process.returncode} before any stage: {err}"
    name = names[-1]
    return name if process.returncode == -signal.SIGKILL and not (root / name / "DONE").exists() else None


def rows(file):
    """The rows of a file without what a clock says."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found if "second" not in str(row.get("name"))]


def compared(file):
    """Whether digests tell: the array files of a checkpoint have names of their own each time, what is in them is
    compared instead; and DONE has one of all the others."""
    return "arrays/" not in file and not file.endswith((checkpoint.MANIFEST, "DONE"))


def equal(alone, root):
    """The number of files of two roots, which are the same to the bit."""
    names = sorted(p.parent.name for p in alone.glob("*-*/DONE"))
    assert names == sorted(p.name for p in root.glob("*-*") if (p / "DONE").exists())
    count = 0
    for name in names:
        sums = [json.loads((r / name / "DONE").read_text()) for r in (alone, root)]
        own = [{file: digest for file, digest in s.items() if compared(file)} for s in sums]
        assert own[0].keys() == own[1].keys(), name
        for file, digest in own[0].items():
            count += 1
            if own[1][file] != digest:
                assert file.endswith(".jsonl"), (name, file)
                assert rows(alone / name / file) == rows(root / name / file), (name, file)
        if (alone / name / "state" / checkpoint.MANIFEST).exists():
            left, right = (tree.flatten(checkpoint.load(r / name / "state")) for r in (alone, root))
            assert left.keys() == right.keys(), name
            for path in left:
                count += 1
                np.testing.assert_array_equal(left[path], right[path], err_msg=f"{name} {path}")
    return count


@pytest.mark.slow
@pytest.mark.parametrize("config", PILLARS)
def test_killed_at_random_moments_and_run_again(tmp_path, config):
    alone, root = tmp_path / "alone", tmp_path / "killed"
    stages = undisturbed(config, alone)
    wanted = PILLARS[config][2]
    cut = [killed(config, root, stages, at, share) for at, share in moments(stages, wanted, seed=len(config))]
    left = {name for name, _ in undisturbed(config, root)}
    count = Counter("between stages" if name is None else name.rpartition("-")[0] for name in cut)
    print(f"{config}: {len(cut)} kills, in {dict(count)}; {len(left)} stages run at last; {equal(alone, root)} equal")
    assert len(cut) == KILLS and len(set(count) & wanted) >= len(wanted) - 1, count


LONG = """
from configs.sentiment import experiment

def get_config():
    config = experiment("tiny", "Long", dict(top_p=dict()))
    with config.unlocked():
        config.lm.pretrain.training.update(steps=80, save_every=10, log_every=1)
    return config
"""


@pytest.mark.slow
def test_one_of_two_hosts_is_killed_in_a_training_step(tmp_path):
    """The other says so in one sentence; both go on from the last checkpoint and end as if nothing had happened."""
    config, whole, root = tmp_path / "long.py", tmp_path / "whole", tmp_path / "killed"
    config.write_text(LONG)
    finish(start("main.py", config, whole, 2))
    processes = start("main.py", config, root, 2)
    while not list(root.glob("pretrain-*/steps/00000020")):
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    _, err = processes[0].communicate(timeout=120)
    print(f"the other ended {time.monotonic() - killed_at:.1f} s later")
    processes[1].communicate()
    said = [line for line in err.splitlines() if not line.startswith("running ")]
    assert processes[0].returncode == 3 and said == [LOST], err
    (place,) = root.glob("pretrain-*")
    steps = checkpoint.saved_steps(place / "steps")
    assert steps and steps[-1] < 80 and not (place / "DONE").exists()
    finish(start("main.py", config, root, 2))
    print(f"killed with checkpoints {steps}; {equal(whole, root)} equal")
