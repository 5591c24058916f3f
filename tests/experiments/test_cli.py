"""Command lines: unknown names, wrong values, help, exit codes, and how many stages ran."""

import pytest
from absl import flags
from ml_collections import ConfigDict

from ctg_jax.run.stage import stage
from ctg_jax.types import InputError
from experiments import cli, hosts, settings

CONFIG = '''
"""A configuration."""
from ml_collections import ConfigDict

def get_config(arg="plain"):
    return ConfigDict(dict(name=arg, lm=dict(width=8, rate=0.5), strengths=(1.0, 2.0), on=False))
'''


@pytest.fixture
def file(tmp_path):
    (tmp_path / "plain.py").write_text(CONFIG)
    return tmp_path / "plain.py"


def parsed(argv, session=None):
    return cli.parse(argv, lambda fv: cli.config_flag(fv, argv), "usage")[0]


def test_overrides_keep_their_types(file):
    argv = [f"--config={file}:tiny", "--config.lm.width=16", "--config.strengths=(3, 4.5)", "--config.on"]
    config = cli.chosen(parsed(argv))
    assert config.to_dict() == {"name": "tiny", "lm": {"width": 16, "rate": 0.5}, "strengths": (3, 4.5), "on": True}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("--config.lm.widht=3", "lm has no setting 'widht' (in config.lm.widht); did you mean 'width'?"),
        ("--config.strength=3", "did you mean 'strengths'?"),
        ("--config.lm.width.x=3", "has no setting 'x'"),
        ("--config.lm.width=many", "expected a number, such as 8"),
        ("--config.lm.width", "has no value"),
        ("--config.strengths=oops", "expected a tuple"),
        ("--rot=x", "no flag --rot; did you mean 'root'?"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_exit_code_2(file, capsys, extra, words):
    assert cli.run(parsed, [f"--config={file}", extra]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_missing_configuration_files_name_the_nearest(file, capsys):
    assert cli.run(parsed, [f"--config={file.parent / 'plane.py'}"]) == 2
    assert "did you mean 'plain.py'?" in capsys.readouterr().err
    (file.parent / "empty.py").write_text("")
    assert cli.run(parsed, [f"--config={file.parent / 'empty.py'}"]) == 2
    assert "defines no get_config" in capsys.readouterr().err
    with pytest.raises(InputError, match="--config is missing"):
        cli.chosen(parsed([]))


def test_help_shows_usage_and_flags(capsys):
    assert cli.run(parsed, ["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage") and "--root" in out and "--config" in out


def test_override_of_sweeps(file):
    config = cli.config_of(str(file))
    assert cli.override(config, {"lm.width": 3}).lm.width == 3 and config.lm.width == 8
    with pytest.raises(InputError, match="did you mean 'rate'"):
        cli.override(config, {"lm.rat": 3})
    with pytest.raises(InputError, match=r"lm\.width='x'"):
        cli.override(config, {"lm.width": "x"})
    assert isinstance(config, ConfigDict)


def test_stages_are_counted(tmp_path, capsys):
    def one(run, *, x=1):
        run.log(x=x)

    def main(argv, session):
        stage(session, one)
        stage(session, one, {"x": 2})
        stage(session, one)

    root = [f"--root={tmp_path}"]
    assert cli.run(main, root) == 0
    assert "stages: 2 executed, 0 reused" in capsys.readouterr().err
    assert cli.run(main, root) == 0
    assert "stages: 0 executed, 2 reused" in capsys.readouterr().err


def test_other_errors_are_not_hidden():
    def main(argv, session):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError):
        cli.run(main, [])


STAGES = """
from ml_collections import ConfigDict

def get_config(arg="x"):
    data = dict(source="bundled:reviews")
    steer = dict(method="steer", fit=dict(sites="all", scale=1.0), data=data, strengths=(1.0,))
    return ConfigDict(dict(title="t", prompts=dict(source="bundled:reviews"), sample=dict(n=2, filter=dict(top_p=0.9)),
                           judges=dict(positive=dict(kind="oracle")), evaluate=dict(), methods=dict(steer=steer)))
"""


@pytest.fixture
def stages(tmp_path):
    (tmp_path / "stages.py").write_text(STAGES)
    return tmp_path / "stages.py"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("methods.steer.fit.sites", "3", 3),
        ("methods.steer.fit.sites", "(1, 2)", (1, 2)),
        ("methods.steer.fit.sites", "middle", "middle"),
        ("methods.steer.fit.cond", "None", None),
        ("methods.steer.fit.training.steps", "7", 7),
        ("methods.steer.fit.scale", "2", 2.0),
        ("methods.steer.strengths", "1,2.5", (1, 2.5)),
        ("methods.steer.data.words", "4", 4),
        ("methods.steer.filter", "{'top_k': 5}", {"top_k": 5}),
        ("sample.greedy", "true", True),
        ("sample.filter.top_k", "5", 5),
        ("prompts.labels", "{'good': 1}", {"good": 1}),
        ("evaluate.resamples", "50", 50),
        ("judges.positive.encoder", "none", None),
        ("title", "2024", "2024"),
    ],
)
def test_settings_of_stages_are_set_with_their_own_types(stages, key, text, value):
    found = cli.chosen(parsed([f"--config={stages}", f"--config.{key}={text}"])).to_dict()
    for name in key.split("."):
        found = found[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sample.gredy=true", "sample has no setting 'gredy' (in config.sample.gredy); did you mean 'greedy'?"),
        ("prompts.limt=3", "did you mean 'limit'?"),
        ("methods.steer.data.balanced=label", "did you mean 'balance'?"),
        ("methods.steer.strenghts=(1,)", "did you mean 'strengths'?"),
        ("evaluate.resample=3", "did you mean 'resamples'?"),
        ("sample.filter.topk=3", "did you mean 'top_k'?"),
        ("methods.ster.fit.sites=3", "methods has no setting 'ster'"),
        ("sample.filter=3", "this is a section"),
        ("sample.n=some", "expected a number, such as 2"),
    ],
)
def test_settings_that_no_stage_has_are_refused_before_anything_runs(stages, capsys, setting, words):
    assert cli.run(parsed, [f"--config={stages}", f"--config.{setting}"]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_configurations_of_the_library_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec in ("configs/steer.py:tiny", "steer.py:tiny", "steer:tiny"):
        (found,) = cli.spelled([f"--config={spec}"])
        assert found == f"--config={cli.HERE / 'configs' / 'steer.py'}:tiny"
    (tmp_path / "steer.py").write_text(CONFIG)
    assert cli.spelled(["--config=steer.py"]) == ["--config=steer.py"]
    assert cli.spelled(["--config=other/steer.py"]) == ["--config=other/steer.py"]


def test_none_is_the_name_of_a_choice_where_a_text_is_held():
    config = ConfigDict({"methods": {"a": {"method": "steer", "fit": {"normalise": "unit", "sites": "all"}}}})
    found = settings.given(config, ["--config.methods.a.fit.normalise=none", "--config.methods.a.fit.sites=None"])
    assert found == {"methods.a.fit.normalise": "none", "methods.a.fit.sites": None}
    assert settings.given(config, ["--config.methods.a.fit.other=none"]) == {"methods.a.fit.other": "none"}


def test_switches_that_are_read_early_are_read_as_absl_reads_them():
    """A board that absl takes for asked for, and that nothing draws, would be missed without a word."""
    for spelling in ("--wandb", "--wandb=true", "--wandb=True", "--wandb=t", "--wandb=1", "--nowandb", "--wandb=0"):
        values = flags.FlagValues()
        cli.board_flags(values)
        values(["script", spelling])
        assert hosts.switched([spelling], "--wandb") is values.wandb, spelling
