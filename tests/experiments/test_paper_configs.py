"""The configurations of the papers' tasks: every setting is one, and the controls fit on paper at the papers' size."""

import importlib
import inspect

import jax
import pytest
from laws import worlds

from configs import paper
from ctg_jax import methods
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import check_settings
from ctg_jax.types import InputError
from experiments import arms, planned_methods

TASKS = {
    "quark": ("", "_toxicity", "_sentiment", "_sentiment_down", "_repetition"),
    "ppo": ("", "_toxicity", "_sentiment"),
    "gdc": ("", "_word", "_list", "_female", "_science", "_hybrid"),
    "click": ("", "_sentiment", "_sentiment_down", "_repetition", "_toxicity"),
    "unlikelihood": ("", "_repetition"),
    "ctrl": ("",),
    "dexperts": ("",),
    "proxy": ("",),
    "correct": ("",),
    "selective": ("",),
}
NOT_ALL_WEIGHTS = ("proxy", "correct", "selective")  # their shapes are tested by the laws, and in test_proxy.py
SIZES = {  # GPT-2 by name, two blocks of each
    "gpt2": dict(width=768, heads=12),
    "gpt2-large": dict(width=1280, heads=20),
    "gpt2-xl": dict(width=1600, heads=25),
}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CTG_DATA_DIR", str(tmp_path))  # nothing is read there


def config_of(name, task):
    return importlib.import_module(f"configs.{name}").get_config(f"paper{task}")


@pytest.mark.parametrize("name, task", [(n, t) for n, tasks in TASKS.items() for t in tasks])
def test_every_setting_is_one(name, task):
    config = config_of(name, task).to_dict()
    found = arms.read(config["methods"])
    for arm in found.values():
        if isinstance(arm, arms.Fitted):
            module = methods.get(arm.method)
            own = inspect.signature(module.fit).parameters
            rest = {key: value for key, value in arm.fit.items() if key not in own}
            tuned = methods.get("finetune").finetune  # its settings are those of the experts too
            check_settings(tuned if arm.method == "dexperts" else getattr(module, arm.method), rest)
            assert set(arm.fit.get("moments", ())) <= set(arm.rewards)
    assert any(isinstance(arm, arms.MethodArm) for arm in found.values())


@pytest.mark.parametrize("name", [n for n in TASKS if n not in NOT_ALL_WEIGHTS])
def test_it_fits_on_paper(name):
    config = config_of(name, "").to_dict()
    lm = Transformer.gpt2(vocab=50257, depth=2, context=1024, **SIZES[config["lm"]["source"].rpartition("/")[2]])
    for arm in arms.read(config["methods"]).values():
        if isinstance(arm, arms.Fitted):
            settings = planned_methods.init_of(arm.method, arm.fit)
            make = lambda key, arm=arm, settings=settings: methods.get(arm.method).init(lm, key, **settings)  # noqa: E731
            out = worlds.written_on_paper(lm, make)
            assert out.tokens.shape == (1, 2)
            control = jax.eval_shape(make, jax.random.key(0))
            sizes = sum(x.size for x in jax.tree.leaves(control))
            assert sizes > 1e6, f"{name} learns {sizes} numbers: the papers change all weights"


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match="'paper_politeness': expected paper or paper_toxicity, paper_sentiment"):
        config_of("ppo", "_politeness")


def test_features_are_words_whatever_punctuation_is_beside_them():
    assert paper.amazing("", "It was Amazing!") == 1 and paper.amazing("", "It was amazingly good.") == 0
    assert paper.female("", '"She," he said, "is her."') == 1 and paper.female("", "He, she.") == 0
    assert paper.art("", "A painter; a man.") == 1 and paper.science("", "A painter; a man.") == 0


def test_gdc_is_judged_by_the_features_that_it_asks_for():
    assert set(config_of("gdc", "_hybrid").judges) == {"female", "politics"}


def test_a_comparison_of_rare_rewards_keeps_how_a_method_explores():
    arms_of = importlib.import_module("configs.compare_fair").get_config("yelp").methods
    assert arms_of.quark.fit.explore.to_dict() == dict(n=8, max_new=20, batch=200, filter=dict(top_p=0.9))
    assert "filter" not in arms_of.ppo.fit.explore


@pytest.mark.parametrize("size, samples, rows", [("yelp", 40_000, 48_000), ("yelp_small", 3_360, 4_800)])
def test_a_fair_comparison_has_equal_samples_and_equal_rows(size, samples, rows):
    """A pair is two rows; the reward judges as well."""
    module = importlib.import_module("configs.compare_fair")
    config = module.get_config(size).to_dict()
    fitted = {label: arm for label, arm in config["methods"].items() if "fit" in arm}
    assert {name for changes in module.sweep() for name in changes} == {f"methods.{n}.fit.seed" for n in fitted}
    for label, arm in fitted.items():
        fit, texts = arm["fit"], 2 if label in module.PAIRED else 1
        assert arm["data"]["limit"] * fit["explore"]["n"] * fit["rounds"] == samples
        assert fit["rounds"] * fit["training"]["steps"] * fit["training"]["batch"] * texts == rows
        assert arm["rewards"] == {"drinks": config["judges"]["drinks"]}


@pytest.mark.parametrize("world", ["bundled", "tiny"])
def test_a_comparison_while_decoding_at_equal_kl_has_the_fits_of_that_at_the_papers_strengths(world):
    """So that both are measured after one training; a search has no strength."""
    get_config = importlib.import_module("configs.compare_decoding").get_config
    papers, equal = (get_config(f"{world}_{size}").to_dict()["methods"] for size in ("small", "equal"))
    assert papers.keys() == equal.keys() and arms.read(papers) and arms.read(equal)
    for label in papers:
        keys = {"strengths", "kl"} & papers[label].keys(), {"strengths", "kl"} & equal[label].keys()
        assert keys == (({"strengths"}, {"kl"}) if "method" in papers[label] else (set(), set()))
        assert {k: v for k, v in papers[label].items() if k != "strengths"} == {
            k: v for k, v in equal[label].items() if k != "kl"
        }
    with pytest.raises(InputError, match="'tenth': expected small or equal"):
        get_config(f"{world}_tenth")
