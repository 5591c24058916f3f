"""Sections of settings in configurations: every world gives fields that exist, and the command line reaches them."""

import contextlib
import dataclasses
from inspect import ismodule
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from ctg_jax import methods
from ctg_jax.learn.fitting import Adapter, Training
from ctg_jax.learn.search import Plan
from ctg_jax.learn.vector_search import Search
from ctg_jax.types import InputError
from experiments import cli, experiment
from experiments.arms import Fitted, read

CONFIGS = sorted(p for p in (Path(__file__).parents[2] / "configs").glob("*.py") if "def get_config" in p.read_text())
WORLDS = (
    "bundled", "yelp", "yelp_down", "yelp_small", "yelp_equal", "repetition", "toxicity", "tiny", "tiny_small",
    "tiny_equal", "best", "dbpedia", "blocks", "domains", "prefix", "prompter", "requests",
)  # fmt: skip
OWN = {"objective": "Objective", "sorting": "Sorting"}  # records of a method's module
RECORDS = {"training": Training, "adapter": Adapter, "search": Search}


def sections(settings, method=None):
    """(method, name, keys) of every section in a configuration, wherever it is."""
    method = settings.get("method", method)
    for name, value in settings.items():
        if isinstance(value, dict):
            if name in (*RECORDS, *OWN):
                yield method, name, set(value)
            yield from sections(value, method)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_every_world_gives_fields_that_there_are(file, monkeypatch, tmp_path):
    monkeypatch.setenv("CTG_DATA_DIR", str(tmp_path))
    module, found = cli.module_of(str(file)), 0
    for world in WORLDS:
        try:
            config = module.get_config(world)
        except (KeyError, ValueError):
            continue  # not every configuration has every world
        for changes in [{}, *(module.sweep() if hasattr(module, "sweep") and world == "bundled" else ())]:
            try:
                changed = cli.override(config, changes).to_dict()
            except ValueError:
                continue  # a sweep of another world
            for method, name, keys in sections(changed):
                if name in OWN:
                    records = [getattr(methods.get(method), OWN[name], None)]
                else:  # `search` is also that of an arm which searches
                    records = [RECORDS[name], *([Plan] if (name, method) == ("search", None) else [])]
                if records == [None]:
                    continue  # settings of a loss, which the stage checks
                known = [{f.name for f in dataclasses.fields(record)} for record in records]
                assert any(keys <= names for names in known), (world, method, name)
                found += 1
    assert found or file.stem in ("cav", "steer", "lm_steer", "truncate")


def test_making_a_configuration_changes_no_table_of_another(monkeypatch, tmp_path):
    monkeypatch.setenv("CTG_DATA_DIR", str(tmp_path))
    modules = [cli.module_of(str(file)) for file in CONFIGS]

    def tables():
        shared = {value.__name__: value for module in modules for value in vars(module).values() if ismodule(value)}
        return {
            (name, key): repr(value)
            for name, module in shared.items()
            if name.startswith("configs.")
            for key, value in vars(module).items()
            if isinstance(value, dict | list) and not key.startswith("__")
        }

    before = tables()
    assert ("configs.sentiment", "TRAINING") in before
    for module in modules:
        for world in ("bundled", "yelp", "tiny"):
            with contextlib.suppress(KeyError, ValueError):
                module.get_config(world)
        assert tables() == before, module.__name__


def test_the_command_line_reaches_a_field():
    file = next(p for p in CONFIGS if p.stem == "quark")
    argv = [f"--config={file}:tiny", "--config.methods.quark.fit.training.steps=5"]
    config = cli.chosen(cli.parse(argv, lambda values: cli.config_flag(values, argv), "usage")[0])
    assert config.methods.quark.fit.training.steps == 5 and config.methods.quark.fit.training.batch == 4


def test_a_sweep_may_give_a_section_that_the_configuration_leaves_out():
    config = ConfigDict({"methods": {"a": {"method": "quark", "fit": {"tokens": 3}}}})
    changed = cli.override(config, {"methods.a.fit.adapter.rank": 2, "methods.a.fit.adapter.kind": "full"})
    assert changed.methods.a.fit.to_dict() == {"tokens": 3, "adapter": {"rank": 2, "kind": "full"}}
    assert "adapter" not in config.methods.a.fit


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_a_misspelt_setting_of_a_fit_is_named_before_any_stage_runs(file, tmp_path):
    """Also one that `fit` itself only passes on to a stage."""
    fitted = [(c, label) for c in worlds_without_data(file) for label in labels_of_fitted(c)]
    for config, label in fitted:
        wrong = cli.override(config, {f"methods.{label}.fit.misspelt": 1})
        with pytest.raises(InputError, match=rf"^methods\.{label}.*'misspelt'"):
            experiment.run(str(tmp_path / label), wrong)
        assert not (tmp_path / label).exists() or not any((tmp_path / label).iterdir())


def worlds_without_data(file):
    """The configurations that read no folder of data. In the tiny world settings may differ from the defaults."""
    for world in ("tiny", "bundled"):
        try:
            yield cli.config_of(f"{file}:{world}")
        except InputError as e:
            assert "expected one of" in str(e)


def labels_of_fitted(config):
    arms = read(config.to_dict().get("methods", {}))
    return [label for label, arm in arms.items() if isinstance(arm, Fitted)]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_a_change_on_the_command_line_changes_one_place(file):
    """Arms are often given the same dictionary, which `ConfigDict` keeps as one object."""
    config = cli.config_of(f"{file}:tiny")
    for label, arm in config.get("methods", {}).items():
        known = ("fit.training.steps", "data.limit")
        for key in (key for key in known if _holds(arm, key)):
            changed = cli.override(config, {f"methods.{label}.{key}": 77})
            assert changed.to_json().count(": 77") == 1, (label, key)


def _holds(arm, key):
    *sections, name = key.split(".")
    for section in sections:
        arm = arm.get(section) or {}
    return name in arm
