"""Nothing old is given for something new: edited files, other reward functions, other controls, foreign manifests, and
attempts that were cut short while they were sealed."""

import dataclasses
import gzip
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax import methods
from ctg_jax.decode import strategies
from ctg_jax.learn import experience
from ctg_jax.learn.pretrain import pretrain
from ctg_jax.methods import finetune, steer
from ctg_jax.rewards import FunctionReward
from ctg_jax.run import checkpoint
from ctg_jax.run import stage as S
from ctg_jax.run.session import Session
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.run.store import Store
from ctg_jax.stages import judges, sampling, sources
from ctg_jax.types import InputError
from tests.experiments.tiny_lm import TEXTS, write_lm

ROWS = [{"text": t, "label": i % 2} for i, t in enumerate(TEXTS)]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return f"jsonl:{file}"


def loaded(root, source, **settings):
    return stage(root, sources.load_data, {"source": source, "split": "all", **settings})


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(root, LM, prompts, steering control)."""
    root = tmp_path_factory.mktemp("runs")
    lm = stage(root, sources.load_lm, {"source": str(write_lm(tmp_path_factory.mktemp("lm")))})
    data = loaded(root, write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS))
    return root, lm, data


# -- local inputs


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_an_edited_data_file_is_a_new_input_and_a_moved_one_is_not(tmp_path, kind):
    lines = ['{"text": "good food"}', '{"text": "bad food"}'] if kind == "jsonl" else ["good food", "bad food"]
    file, moved, packed = tmp_path / "a", tmp_path / "b", tmp_path / "c.gz"
    file.write_text("\n".join(lines))
    first = loaded(tmp_path / "runs", f"{kind}:{file}")
    shutil.copy(file, moved)
    packed.write_bytes(gzip.compress(file.read_bytes()))
    session = Session(tmp_path / "runs")
    assert [loaded(session, f"{kind}:{p}") for p in (file, moved, packed)] == [first] * 3
    assert not session.tally.executed
    file.write_text("\n".join(lines).replace("bad", "sad"))  # as many bytes as before
    edited = loaded(tmp_path / "runs", f"{kind}:{file}")
    assert edited.id != first.id and [r["text"] for r in edited.rows("data.jsonl")] == ["good food", "sad food"]
    assert loaded(tmp_path / "runs", f"{kind}:{moved}") == first
    with pytest.raises(InputError, match="there is no such file"):
        loaded(tmp_path / "runs", f"{kind}:{tmp_path / 'gone'}")


def test_a_folder_of_splits_is_identified_by_the_split_that_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", [{"text": f"of {split}"}])

    def read(split):
        return stage(tmp_path / "runs", sources.load_data, {"source": f"jsonl:{tmp_path / 'data'}", "split": split})

    train_split, test_split = read("train"), read("test")
    write_rows(tmp_path / "data" / "test.jsonl", [{"text": "another"}])
    assert read("train") == train_split and read("test") != test_split


def test_what_follows_from_an_edited_file_is_made_again(tmp_path, given):
    root, lm, _ = given
    source = write_rows(tmp_path / "p.jsonl", ROWS)
    made = []
    for rows in (ROWS, ROWS[:2]):
        write_rows(tmp_path / "p.jsonl", rows)
        made.append(stage(root, sampling.sample, dict(n=1, max_new=2), lm=lm, prompts=loaded(root, source)))
    assert [len(a.rows("samples.jsonl")) for a in made] == [3, 2]


def test_a_model_is_identified_by_its_files_and_found_where_it_is_now(tmp_path):
    root, old, new = tmp_path / "runs", tmp_path / "old", tmp_path / "new"
    write_lm(old)
    first = stage(root, sources.load_lm, {"source": str(old)})
    width = open_lm(first)[0].width
    shutil.copytree(old, new)
    assert stage(root, sources.load_lm, {"source": str(new)}) == first
    shutil.rmtree(old)
    assert open_lm(first)[0].width == width  # from where the last call found it
    write_lm(old, width=24)
    changed = stage(root, sources.load_lm, {"source": str(old)})
    assert changed.id != first.id and open_lm(changed)[0].width == 24 and open_lm(first)[0].width == width
    shutil.rmtree(new)
    with pytest.raises(InputError, match="have changed since"):
        open_lm(first)
    shutil.rmtree(old)
    with pytest.raises(InputError, match="are not there"):
        open_lm(first)


# -- rewards


def judge_of(root, **settings):
    return judges.open_judge(stage(root, judges.fit_judge, {"kind": "function", "name": "mine", **settings}))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes the source of a module of one's own; its name, with :score."""
    monkeypatch.syspath_prepend(tmp_path / "code")
    (tmp_path / "code").mkdir()

    def write(body, name="rewards_of_mine"):
        (tmp_path / "code" / f"{name}.py").write_text(f"def score(prompt, text):\n    {body}\n")
        return f"{name}:score"

    return write


def test_another_reward_function_under_the_same_name_is_asked(tmp_path, module):
    old = judge_of(tmp_path, function=module("return 1.0"), version="1")
    assert old([""], ["a"]).tolist() == [1.0]
    new = judge_of(tmp_path, function=module("return 2.0"), version="1")
    assert new([""], ["a"]).tolist() == [2.0] and new.version != old.version
    assert judge_of(tmp_path, function=module("return 1.0"), version="1")([""], ["a"]).tolist() == [1.0]
    elsewhere = module("return 1.0", name="moved")
    again = stage(tmp_path, judges.fit_judge, dict(kind="function", name="mine", function=elsewhere, version="1"))
    assert again == stage(tmp_path, judges.fit_judge, again.spec["config"] | {"function": module("return 1.0")})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise RuntimeError('down')", "failed 1 times, last with RuntimeError: down"),
        ("return float('nan')", "returned nan for 'a'; expected a finite number"),
        ("return [0.5]", r"returned \[0.5\] for 'a'; expected a finite number"),
        ("return [0.5, 0.5, 0.5]", r"returned \[0.5, 0.5, 0.5\] for 'a'; expected a finite number"),
        ("return __import__('numpy').ones(1)", r"returned array\(\[1.\]\) for 'a'; expected a finite number"),
        ("return None", "returned None for 'a'; expected a finite number"),
        ("return '0.5'", "returned '0.5' for 'a'; expected a finite number"),
    ],
)
def test_a_bad_answer_stops_whatever_was_scored_before(tmp_path, module, body, words):
    assert judge_of(tmp_path, function=module("return 1.0"), version="1")([""], ["a"]).tolist() == [1.0]
    judge = judge_of(tmp_path, function=module(body), version="1")
    judge.retries = 0
    with pytest.raises(InputError, match=words) as e:
        judge([""], ["a"])
    assert "\n" not in str(e.value)


def test_functions_whose_code_is_not_known_are_not_kept(tmp_path):
    options = dict(name="mine", version="1", cache=tmp_path / "scores.sqlite")
    for value in (1.0, 2.0):  # two closures of one line of code
        assert FunctionReward(lambda p, t, value=value: value, **options)([""], ["a"]).tolist() == [value]
    assert not (tmp_path / "scores.sqlite").exists()


def constant(prompt, text):
    ASKED.append(text)
    return 0.5


def another(prompt, text):
    return 0.25


ASKED = []


def test_a_function_of_a_file_is_kept_under_its_code_and_version(tmp_path):
    options = dict(name="mine", cache=tmp_path / "scores.sqlite")
    ASKED.clear()
    for version, times in (("1", 1), ("1", 1), ("2", 2)):
        assert FunctionReward(constant, version=version, **options)([""], ["a"]).tolist() == [0.5]
        assert len(ASKED) == times
    assert FunctionReward(another, version="1", **options)([""], ["a"]).tolist() == [0.25]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(kind="function", reads="both"), "reads is 'both', but a function is given prompt and text apart"),
        (dict(kind="function", target=0), "target is 0, but a function is given prompt and text apart"),
        (dict(kind="function", encoder="x"), "encoder is 'x', but a judge of kind 'function' does not read it"),
        (dict(kind="diversity", target=0), "target is 0, but a judge of kind 'diversity' does not read it"),
        (dict(kind="oracle", version="2"), "version is '2', but a judge of kind 'oracle' does not read it"),
        (dict(kind="oracle", encoder="x"), "encoder is 'x'"),
    ],
)
def test_a_setting_that_a_kind_of_judge_ignores_is_refused(tmp_path, module, settings, words):
    own = dict(function=module("return 1.0"), version="1") if settings["kind"] == "function" else {}
    with pytest.raises(InputError, match=words):
        stage(tmp_path, judges.fit_judge, own | settings)


def test_data_that_a_kind_of_judge_ignores_are_refused(given):
    with pytest.raises(InputError, match=r"data is 'load_data-.*', but a judge of kind 'oracle' does not read it"):
        stage(given[0], judges.fit_judge, {"kind": "oracle"}, data=given[2])


# -- controls


def test_controls_made_by_hand_are_identified_by_their_arrays(given):
    root, lm, _ = given
    model = open_lm(lm)[0]
    like = steer.init(model, jax.random.key(0))
    pushes = [like.replace(vector=jnp.full_like(like.vector, x)) for x in (1.0, 2.0)]
    saved = [methods.save(root, lm, control, "steer") for control in pushes]
    assert saved[0] != saved[1] and methods.save(root, lm, pushes[0], "steer") == saved[0]
    for artifact, control in zip(saved, pushes):
        np.testing.assert_array_equal(methods.load(artifact, model).vector, control.vector)
        sampling.build(lm, [artifact], [None])
    soft = finetune.init(model, jax.random.key(0), kind="prompt", length=2)
    with pytest.raises(InputError, match=r"finetune.init with \{\} makes a control with"):
        methods.save(root, lm, soft, "finetune")
    assert methods.load(methods.save(root, lm, soft, "finetune", kind="prompt", length=2), model).vectors.shape[0] == 2


def test_a_stage_that_reads_the_function_around_it_is_refused(tmp_path):
    """Its id would be the same whatever those variables hold."""

    def saved(control):
        def keep(run):
            checkpoint.save(run.path / "state", control)

        return stage(tmp_path, keep)

    with pytest.raises(InputError, match="keep reads control of the function around it"):
        saved({"a": jnp.zeros(2)})


# -- stores and sealing


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "far"), tmp_path / "here" / "runs")


def write(run, *, text="a"):
    (run.path / "text.txt").write_text(text)


@pytest.mark.parametrize("name", ["../../x", "{tmp}/x", "deep/../../x", "..", "link/x", "deep/link/x", ""])
def test_a_manifest_that_leads_out_of_the_root_is_refused_before_anything_is_written(tmp_path, store, name):
    made = stage(store, write)
    far = tmp_path / "far" / made.path.name
    sums = json.loads((far / "DONE").read_text())
    name = name.format(tmp=tmp_path)
    (far / "DONE").write_text(json.dumps({name: [1, "0"], **sums}))
    (tmp_path / "far" / "x").write_text("x")
    shutil.rmtree(made.path)
    (tmp_path / "elsewhere").mkdir()
    made.path.mkdir()
    (made.path / "deep").mkdir()
    for link in (made.path / "link", made.path / "deep" / "link"):
        link.symlink_to(tmp_path / "elsewhere")
    before = sorted(p for p in tmp_path.rglob("*") if ".locks" not in p.parts)
    with pytest.raises(InputError, match=r"DONE names the file .* nothing was copied"):
        stage(store, write)
    assert sorted(p for p in tmp_path.rglob("*") if ".locks" not in p.parts) == before


def test_a_checkpoint_manifest_that_leads_out_is_refused(tmp_path, store):
    path = tmp_path / "here" / "runs" / "learn-000000000000"
    step = tmp_path / "far" / path.name / "steps" / "00000004"
    checkpoint.save(step, {"a": jnp.ones(2)})
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["body"]["files"]["../../../../../x"] = [1, "0"]
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest.json names the file .* nothing was copied"):
        store.fetch_steps(path)
    assert not path.exists()


class KilledError(BaseException):
    """The process ended here."""


@pytest.fixture
def killed(monkeypatch):
    """Runs a stage that is killed while it is sealed, then runs it again; the artifact."""

    def run(call):
        def kill(*args, **kw):
            raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(S, "seal", kill)
            with pytest.raises(KilledError):
                call()
        return call()

    return run


def test_training_is_not_repeated_after_a_kill_while_sealing(given, killed, monkeypatch):
    root, lm, data = given
    training = dict(steps=3, batch=2, warmup=1, tokens=8)
    settings = dict(adapter=dict(rank=1), training=dict(training, save_every=1))
    shape = dict(vocab=270, width=16, depth=1, heads=2, context=16, training=training)
    saved, real = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, *a, **k: saved.append(path.name) or real(path, *a, **k))
    for call in (
        lambda: stage(root, finetune.finetune, settings, lm=lm, data=data),
        lambda: stage(root, pretrain, shape, data=data),
    ):
        saved.clear()
        done = killed(call)
        assert saved.count("00000003") == 1, saved
        assert not (done.path / "steps").exists() and not (done.path / "tokenizer").exists()
        assert not [name for name in json.loads((done.path / "DONE").read_text()) if name.startswith("steps")]
        assert [r["step"] for r in done.metrics()][-1] == 3


def test_nothing_is_sampled_or_scored_again_after_a_kill_while_sealing(given, killed, module, monkeypatch):
    root, lm, data = given
    batches, real = [], strategies.run
    monkeypatch.setattr(strategies, "run", lambda *a, **k: batches.append(1) or real(*a, **k))
    samples = killed(lambda: stage(root, sampling.sample, dict(n=2, max_new=3, batch=3), lm=lm, prompts=data))
    assert len(batches) == 2 and not (samples.path / "partial.jsonl").exists()
    asked = root / "asked"
    path = module(f"open({str(asked)!r}, 'a').write('x'); return 0.5")
    reward = stage(root, judges.fit_judge, dict(kind="function", name="mine", function=path, version="1"))
    monkeypatch.setattr(judges.open_judge(reward), "cache", None)
    scored = killed(lambda: stage(root, experience.score, samples=samples, rewards=[reward], lm=lm))
    distinct = {(r["prompt"], r["text"]) for r in samples.rows("samples.jsonl")}
    assert len(asked.read_text()) == len(distinct) and not (scored.path / "scores.partial").exists()


def test_leftovers_of_a_kill_after_sealing_are_removed_and_nothing_else(given, tmp_path):
    _, lm, data = given
    settings = dict(adapter=dict(rank=1), training=dict(steps=1, batch=2, warmup=0, tokens=8))
    done = stage(tmp_path, finetune.finetune, settings, lm=lm, data=data)
    (tmp_path / "outside").mkdir()
    (done.path / "steps").symlink_to(tmp_path / "outside")
    (done.path / "notes").mkdir()
    assert stage(tmp_path, finetune.finetune, settings, lm=lm, data=data) == done
    assert not (done.path / "steps").exists() and (tmp_path / "outside").exists() and (done.path / "notes").exists()


def test_a_control_of_an_earlier_revision_of_its_stage_is_refused(given, monkeypatch):
    """What its arrays mean has changed since: loaded as they are, they would give other text in silence."""
    root, lm, data = given
    made = steer.fit(root, lm=lm, data=data, sites="middle", tokens=8)
    model = open_lm(lm)[0]
    assert methods.load(made, model).vector.size
    stages = {fn.stage_function.name: fn for fn in vars(steer).values() if hasattr(fn, "stage_function")}
    fn = stages[made.spec["stage"]]
    monkeypatch.setattr(fn, "stage_function", dataclasses.replace(fn.stage_function, revision=7))
    with pytest.raises(InputError, match="made by revision 1 of steer, but this version has revision 7"):
        methods.load(made, model)
