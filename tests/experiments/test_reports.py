"""Reports: a folder for each set of settings, and what they say of how the figures were made."""

import json
from pathlib import Path

import pytest

from ctg_jax.types import InputError
from experiments import ablate, arms, cli, compare, main, reporting

HERE = Path(__file__).parents[2]
# The cheapest world there is: no control, and the best of two by a reward.
CONFIG = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from configs import reward, sentiment
def get_config(arg="tiny"):
    parts = sentiment.world("tiny")
    del parts["train"]
    dice = reward.tiny()["learn"]["rewards"]
    methods = dict(top_p=dict(), best=dict(best_of=(2,), rewards=dice))
    return sentiment.ConfigDict({{"title": "Small", **parts, "methods": methods}})
def sweep():
    yield {{}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "small.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def call(root, config, capsys):
    def run(script, *argv):
        code = cli.run(script.main, [f"--config={config}", f"--root={root}", *argv])
        out, err = capsys.readouterr()
        assert code == 0, err
        return Path(out.strip())

    return run


def about(page):
    return json.loads(page.with_suffix(".json").read_text())["about"]


def test_no_two_sets_of_settings_share_a_folder(call):
    first = call(compare)
    text = first.read_bytes()
    others = [call(compare, "--config.evaluate.resamples=20"), call(compare, "--config.title=Other"), call(ablate)]
    assert len({page.parent for page in (first, *others)}) == 4
    assert first.read_bytes() == text and call(compare) == call(main) == first
    assert all(page.parent.name.startswith("small-") for page in (first, *others))


def test_a_report_says_what_was_changed_and_how_every_arm_was_made(call, root):
    said = about(call(compare, "--config.evaluate.resamples=20", "--config.sample.filter.top_p=0.9"))
    assert json.loads(said["settings changed"]) == {"evaluate.resamples": 20}
    assert json.loads(said["prompts"])["source"] == "bundled:reviews" and (root / said["language model"]).is_dir()
    assert "configs.reward:dice" in said["arm 'best'"] and '"best_of": [2]' in said["arm 'best'"]
    for arm in ("top_p", "best"):
        assert list(root.glob(said[f"arm {arm!r}"].rpartition("samples ")[2].split()[0])), said
    assert said["settings changed"] != "none" and about(call(compare))["settings changed"] == "none"


def test_an_oracle_says_how_many_texts_are_its_own(call):
    said = about(call(compare))
    assert (
        "accuracy" not in said["scorer of 'positive'"] and "exact on texts of its own" in said["scorer of 'positive'"]
    )
    assert said["texts in the words of the corpus of 'positive'"].endswith(" of 8 judged")


class Measured:
    """Stands in for an artifact of figures, and for a result with these."""

    def __init__(self, label, strength, perplexity, controls=("a control",)):
        self.label, self.strength, self.controls, self.figures = label, strength, controls, self
        self.perplexity = perplexity

    def metrics(self):
        return [{"name": "dist-2", "value": 1.0}, {"name": "perplexity", "value": self.perplexity}]


def test_a_strength_that_breaks_the_text_is_named():
    swept = [Measured("steer", s, p) for s, p in ((1.0, 21.0), (2.0, 66.0), (4.0, 253.0))]
    sentence = reporting.broken([Measured("base", None, 16.0, ()), Measured("top_p", None, 12.0, ()), *swept])
    assert "more than 4 times the 16.0 without control for steer at 2 (66), steer at 4 (253):" in sentence
    assert reporting.broken([Measured("base", None, 100.0, ()), *swept]) == ""
    assert reporting.broken(swept) == ""  # nothing to compare with
    assert reporting.broken([Measured("base", None, None, ()), *swept]) == ""


def test_overrides_are_what_differs_from_the_file(config):
    spec = str(config)
    changed = cli.override(cli.config_of(spec), {"sample.n": 3})
    del changed.methods.best
    assert reporting.overrides(spec, changed)["sample.n"] == 3
    assert reporting.overrides(spec, changed)["methods.best.best_of"] == "(removed)"
    assert reporting.overrides(spec, cli.config_of(spec)) == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(a=dict(method="steer")), "methods.a lacks data"),
        (dict(a=dict(method="truncate")), "which has no fit: give the settings of its init as init"),
        (dict(a=dict(best_of=(2,))), "methods.a lacks the setting 'rewards'"),
        (dict(a=dict(filter={}, strengths=(1.0,))), "methods.a has no setting 'strengths'"),
        (dict(a=dict(chain=dict(b=1.0)), b=dict()), "methods.a.chain names 'b', which is no method"),
    ],
)
def test_arms_that_cannot_be(settings, words):
    with pytest.raises(InputError) as e:
        arms.read(settings)
    assert words in str(e.value)


def test_what_learns_nothing_comes_first():
    fitted = dict(method="steer", data={})
    found = arms.read(dict(z=dict(), a=fitted, b=dict(chain=dict(a=1.0)), c=dict(best_of=(2,), rewards={})))
    assert [type(arm).__name__ for arm in found.values()] == ["BestOf", "Plain", "Fitted", "Together"]


def test_arms_know_whether_their_samples_have_a_likelihood():
    """An experiment asks for KL and the perplexity of human text only where there is one."""
    settings = dict(
        made=dict(method="dexperts", init=dict(kind="guidance")),
        masked=dict(method="mdlm", data={}),
        best=dict(best_of=(2,), rewards={}),
        both=dict(chain=dict(made=1.0)),
    )
    found = arms.read(settings)
    assert type(found["made"]).__name__ == "Made"
    assert {label for label, arm in found.items() if not arm.likelihood} == {"masked", "best"}
    with pytest.raises(InputError, match=r"methods\.made\.init has no setting 'knid'; did you mean 'kind'"):
        arms.read(dict(made=dict(method="dexperts", init=dict(knid="guidance"))))
    with pytest.raises(InputError, match=r"methods\.made: method is 'steer', whose control has to be fitted"):
        arms.read(dict(made=dict(method="steer", init=dict())))
