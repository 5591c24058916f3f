"""What identifies a call of a stage: a name that outlives moves, numbers, defaults, how the work is done."""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ctg_jax
from ctg_jax.learn import experience
from ctg_jax.learn.fitting import Training
from ctg_jax.learn.pretrain import pretrain
from ctg_jax.methods import finetune, quark, steer
from ctg_jax.run.identity import canonical, declaration, is_section
from ctg_jax.run.identity import how as changes_nothing
from ctg_jax.run.session import Session
from ctg_jax.run.stage import Artifact, stage, stage_function
from ctg_jax.stages import judges, sampling, sources
from ctg_jax.types import InputError

DEFAULTS = Path(__file__).with_name("stages.json")  # written by `python -m tests.test_identity`


@stage_function("square", how=("batch",))
def square(run, *, value=3, width=1.0, where=None, batch=8, extra=(), lm=None):
    run.log(value=value)


def ids(root, *configs, fn=square, **inputs):
    plan = Session(root).dry_run()
    return [stage(plan, fn, config, **inputs).id for config in configs]


def test_one_number_is_one_number_and_defaults_do_not_count(tmp_path):
    same = {}, {"value": 3}, {"value": 3.0}, {"width": 1}, {"width": 1.0, "value": 3, "where": None}
    assert len(set(ids(tmp_path, *same))) == 1
    assert ids(tmp_path, {}, extra=[], lm=None) == ids(tmp_path, {})
    differ = {"value": 4}, {"value": 3.5}, {"value": True}, {"value": "3"}, {"where": {"a": 1}}, {"where": [1]}
    assert len({*ids(tmp_path, *differ), *ids(tmp_path, {})}) == 7
    assert len(set(ids(tmp_path, {"where": {"a": 1, "b": [2.0]}}, {"where": {"b": [2], "a": 1.0}}))) == 1
    assert canonical([1.0, True, 1.5, -0.0, "1", None, {"a": (2.0,)}]) == [1, True, 1.5, 0, "1", None, {"a": [2]}]
    assert type(canonical(True)) is bool


def test_how_the_work_is_done_does_not_count_but_is_recorded(tmp_path):
    session = Session(tmp_path)
    first, second = (stage(session, square, {"batch": n}) for n in (8, 16))
    assert first == second and len(session.tally.executed) == 1 and first.spec["config"]["batch"] == 8


def test_a_new_setting_or_input_with_a_default_keeps_what_was_made(tmp_path):
    def later(run, *, value=3, width=1.0, where=None, batch=8, extra=(), lm=None, ema=0.99, judge=None):
        run.log(value=value)

    later = stage_function("square", how=("batch",))(later)
    plan = Session(tmp_path).dry_run()
    made = Artifact(tmp_path / "x-1", "1", plan)
    plan.pending[made.path.name] = {"stage": "x"}
    for config, inputs in (({}, {}), ({"value": 4}, {"lm": made})):
        assert stage(plan, square, config, **inputs) == stage(plan, later, config, **inputs)
    assert ids(tmp_path, {"ema": 0.9}, fn=later) != ids(tmp_path, {}, fn=later)


def test_a_function_that_moved_to_another_module_under_another_name_is_the_same_stage(tmp_path):
    source = inspect.getsource(square).replace("def square", "def power")
    elsewhere = ModuleType("elsewhere.deeper")
    exec(source, elsewhere.__dict__ | {"stage_function": stage_function}, elsewhere.__dict__)
    assert elsewhere.power.__module__ != square.__module__
    made = stage(tmp_path, square, {"value": 5})
    assert stage(tmp_path, elsewhere.power, {"value": 5}) == made and made.path.name.startswith("square-")
    assert "test_identity" not in (made.path / "spec.json").read_text()


def test_functions_without_a_declaration_are_told_apart_by_their_code(tmp_path):
    made = []
    for body in ("run.log(value=1)", "run.log(value=2)", "run.log(value=1)"):
        names = {"__name__": "__main__"}
        exec(f"def typed(run):\n    {body}", names)
        made.append(stage(tmp_path, names["typed"]))
    assert made[0] == made[2] != made[1] and made[1].metrics() == [{"value": 2}]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Square-1", {}, "stage name 'Square-1': expected lower-case letters"),
        ("square", {"how": ("size",)}, "stage 'square' declares 'size', which is no parameter of fn"),
        ("square", {"contents": {"file": print}}, "stage 'square' declares 'file'"),
    ],
)
def test_a_wrong_declaration_is_refused(name, options, words):
    def fn(run, *, value=1):
        run.log(value=value)

    with pytest.raises(InputError, match=words):
        stage_function(name, **options)(fn)


# -- the stages of the package


def package_stages():
    """Every function of the package whose first parameter is a `Run` and that is not private: [(where, function)]."""
    found = {}
    for info in pkgutil.walk_packages(ctg_jax.__path__, "ctg_jax."):
        for name, fn in vars(importlib.import_module(info.name)).items():
            if not inspect.isfunction(fn) or fn.__module__ != info.name or name.startswith("_"):
                continue
            parameters = list(inspect.signature(fn).parameters.values())
            keywords = all(p.kind is p.KEYWORD_ONLY for p in parameters[1:])
            if parameters and parameters[0].annotation == "Run" and keywords:
                found[f"{info.name}.{name}"] = fn
    return found


def identifying_default(default):
    """A default as JSON; of a section, without the fields that only say how the work is done."""
    if not is_section(default):
        return default
    fields = [f for f in dataclasses.fields(default) if not f.metadata.get("how")]
    return {f.name: getattr(default, f.name) for f in fields}


def described(fn):
    """What the ids of a stage rest on and cannot see: its revision and the defaults that it leaves out."""
    declared, parameters = declaration(fn), list(inspect.signature(fn).parameters.values())[1:]
    counted = [p for p in parameters if p.default is not p.empty and p.name not in declared.how]
    defaults = {p.name: json.loads(json.dumps(identifying_default(p.default))) for p in counted}
    return {"revision": declared.revision, "defaults": defaults}


def test_every_stage_of_the_package_has_a_name_of_its_own():
    stages = package_stages()
    assert len(stages) > 35
    undeclared = [where for where, fn in stages.items() if not hasattr(fn, "stage_function")]
    assert not undeclared, f"declare with stage_function: {undeclared}"
    names = [declaration(fn).name for fn in stages.values()]
    assert len(set(names)) == len(names)
    modules = {info.name for info in pkgutil.walk_packages(ctg_jax.__path__, "ctg_jax.")}
    assert not modules & set(names) and not [name for name in names if name.startswith("ctg_jax")]


def test_a_changed_default_goes_with_a_new_revision():
    """Ids leave defaults out, so another default under the same revision would give back what the old one made."""
    pinned = json.loads(DEFAULTS.read_text())
    found = {declaration(fn).name: described(fn) for fn in package_stages().values()}
    assert found.keys() == pinned.keys(), "stages came or went: python -m tests.test_identity"
    for name, now in found.items():
        then = pinned[name]
        if now["revision"] == then["revision"]:
            changed = {k: v for k, v in then["defaults"].items() if now["defaults"].get(k, v) != v}
            assert not changed, f"{name} had other defaults, {changed}: raise its revision"
    new = [name for name, now in found.items() if now != pinned[name]]
    assert not new, f"new settings or revisions of {new}: python -m tests.test_identity"


def test_batch_sizes_of_training_count_and_those_of_sampling_and_scoring_do_not():
    left_out = {declaration(fn).name: set(declaration(fn).how) for fn in package_stages().values()}
    assert set().union(*left_out.values()) == {"batch"}
    assert all("batch" in left_out[name] for name in ("sample", "score", "human_perplexity", "mdlm.bound"))
    fields = {f.name: f.metadata.get("how", False) for f in dataclasses.fields(Training)}
    assert {name for name, how in fields.items() if how} == {"save_every", "log_every"}
    for fn in package_stages().values():
        parameters = inspect.signature(fn).parameters
        assert not {"steps", "save_every", "log_every"} & parameters.keys(), fn.__name__
        assert "training" not in parameters or isinstance(parameters["training"].default, Training), fn.__name__


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int = 8
    rate: float | None = None
    chunk: int = changes_nothing(4)


@stage_function("shaped")
def shaped(run, *, shape=Shape(width=16), value=1):
    run.log(width=shape.width, chunk=shape.chunk)


def test_a_section_is_a_record_whose_defaults_and_ways_of_working_do_not_count(tmp_path):
    same = {}, {"shape": {}}, {"shape": {"width": 16.0}}, {"shape": {"chunk": 2, "rate": None}}, {"shape": Shape(16)}
    assert len(set(ids(tmp_path, *same, fn=shaped))) == 1
    differ = {"shape": {"width": 8}}, {"shape": {"rate": 1}}, {"shape": {"width": 8, "rate": 1.0}}, {"value": 2}
    assert len({*ids(tmp_path, *differ, fn=shaped), *ids(tmp_path, {}, fn=shaped)}) == 5
    made = stage(tmp_path, shaped, {"shape": {"chunk": 2}})
    assert made.metrics() == [{"width": 16, "chunk": 2}]  # the stage reads the record
    assert made.spec["config"]["shape"] == {"width": 16, "rate": None, "chunk": 2}
    with pytest.raises(InputError, match="shape of shaped has no setting 'widht'; did you mean 'width'"):
        stage(tmp_path, shaped, {"shape": {"widht": 3}})
    with pytest.raises(InputError, match="shape of shaped is 3, expected a dictionary of settings"):
        stage(tmp_path, shaped, {"shape": 3})


def test_a_new_field_of_a_section_keeps_what_was_made(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Later(Shape):
        depth: int = 2

    @stage_function("shaped")
    def later(run, *, shape=Later(width=16), value=1):
        run.log(width=shape.width)

    for config in ({}, {"shape": {"width": 8}}):
        assert ids(tmp_path, config, fn=shaped) == ids(tmp_path, config, fn=later)
    assert ids(tmp_path, {"shape": {"depth": 3}}, fn=later) != ids(tmp_path, {}, fn=later)


TEN = [
    "load_data-b67dd0697c52",
    "load_lm-ec46378452a1",
    "pretrain-935af8f7de7d",
    "fit_judge-f10cb4551a3e",
    "fit_judge-e29e96a8c158",
    "sample-e97c08c545d7",
    "score-a341291d9e78",
    "finetune-d592980aabb6",
    "quark-85a60a448fe9",
    "steer-d2e80ade0a0e",
]


def test_ten_ids(tmp_path, monkeypatch):
    """From here on ids stay: these may change only together with a revision, and then what was made is made again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "good food", "label": 1}\n')
    (tmp_path / "lm").mkdir()
    for name, text in (("config.json", "{}"), ("model.safetensors", "x"), ("tokenizer.json", "{}"), ("notes.md", "?")):
        (tmp_path / "lm" / name).write_text(text)
    (tmp_path / "mine_for_ids.py").write_text("def score(prompt, text):\n    return 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    plan = Session(tmp_path).dry_run()
    lm, data, samples, pool, reward = (Artifact(tmp_path / f"x-{i}", str(i) * 12, plan) for i in range(5))
    calls = [
        (sources.load_data, {"source": "jsonl:rows.jsonl", "split": "all", "limit": 10}, {}),
        (sources.load_lm, {"source": "lm", "dtype": "bfloat16"}, {}),
        (pretrain, {"width": 64, "training": {"steps": 200, "save_every": 7}}, {"data": data}),
        (judges.fit_judge, {"kind": "bag", "name": "positive"}, {"data": data}),
        (judges.fit_judge, {"kind": "function", "function": "mine_for_ids:score", "version": "1"}, {}),
        (sampling.sample, {"n": 4, "filter": {"top_p": 0.9}}, dict(lm=lm, prompts=data, controls=[pool])),
        (experience.score, {"round": 1}, dict(lm=lm, samples=samples, rewards=[reward])),
        (finetune.finetune, {"adapter": {"rank": 4}, "where": {"label": 1}}, dict(lm=lm, data=data)),
        (quark.quark, {"tokens": 5, "objective": {"kl": 0.05}}, dict(lm=lm, pool=[pool], start_from=None)),
        (steer.steer, {"sites": [4, 5]}, dict(lm=lm, sums=data)),
    ]  # fmt: skip
    for artifact in (lm, data, samples, pool, reward):
        plan.pending[artifact.path.name] = {"stage": "x"}
    found = [stage(plan, fn, config, **inputs).path.name for fn, config, inputs in calls]
    assert found == TEN


if __name__ == "__main__":
    described_all = {declaration(fn).name: described(fn) for fn in package_stages().values()}
    DEFAULTS.write_text(json.dumps(described_all, indent=1, sort_keys=True) + "\n")
    sys.exit(0)
