"""A control of one method, fitted on your own texts and saved.

    python experiments/fit.py steer --lm=DIRECTORY --data=jsonl:texts.jsonl --out=cheerful
    python experiments/fit.py steer --lm=gpt2 --data=csv:mail.csv --read "labels={'rude': 0, 'kind': 1}" --set sites=3
    python experiments/fit.py dexperts --lm=DIRECTORY --data=jsonl:texts.jsonl --set training.steps=100
    python experiments/fit.py quark --lm=DIRECTORY --data=jsonl:prompts.jsonl --reward=mine.py:short --set rounds=2

--lm is an LM artifact, a directory in Hugging Face layout, or a hub id. --data is a source of `ctg_jax.data.load`:
records with "text" and a whole "label" (1: with the attribute). --read KEY=VALUE sets how they are read (settings of
`load_data`), and --set KEY=VALUE how the method is fitted; both may be repeated, and values are Python literals or
texts. --reward FILE.py:FUNCTION, repeatable, is a function of prompt and text that returns a number, for methods that
learn from a reward; they need no labels. Texts and rewards are read and checked before anything else. The last line is
the folder of the control, which `generate.py --control` and `ctg_jax.load_control` read.
"""

import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from ctg_jax import methods
from ctg_jax.door import Mix
from ctg_jax.door.mix import Part
from ctg_jax.run.stage import stage
from ctg_jax.stages import judges, sampling, sources
from ctg_jax.types import InputError
from experiments import cli, inputs
from experiments.settings import literal


def define(fv):
    text = flags.DEFINE_string
    text("lm", None, "LM artifact, directory in Hugging Face layout, or hub id", flag_values=fv)
    text("data", None, "source of the texts, such as jsonl:PATH", flag_values=fv)
    text("out", None, "folder of the control; by default its artifact below --root", flag_values=fv)
    text("root", "runs", "where artifacts are kept", flag_values=fv)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of an LM that is imported", flag_values=fv)
    flags.DEFINE_multi_string("reward", [], "FILE.py:FUNCTION, of prompt and text; repeatable", flag_values=fv)
    flags.DEFINE_multi_string("read", [], "KEY=VALUE: a setting of load_data; repeatable", flag_values=fv)
    cli.board_flags(fv)
    flags.DEFINE_multi_string("set", [], "KEY=VALUE: a setting of the method's fit; repeatable", flag_values=fv)


def main(argv, session):
    fv, arguments = cli.parse(argv, define, __doc__, positional=True)
    if len(arguments) != 1:
        raise InputError(f"one method is expected, such as steer, and {len(arguments)} were given")
    module = methods.get(arguments[0])
    if not hasattr(module, "fit"):
        raise InputError(f"{arguments[0]} has no fit: it needs no texts, use it as a rule of decoding")
    for name in ("lm", "data"):
        if not fv[name].value:
            raise InputError(f"--{name} is missing")
    read, settings = nested("read", fv["read"].value), nested("set", fv["set"].value)
    asked = needs(arguments[0], module.fit, settings, fv.reward)
    data = stage(session, sources.load_data, {"source": fv.data, **read})
    if fv.reward:
        settings["rewards"] = [own_reward(session, text) for text in fv.reward]
    elif "rewards" not in asked:
        inputs.check_labels(data, "--data", "--read ")
    lm = sources.language_model(session, fv.lm, fv.dtype)
    artifact = module.fit(session, lm=lm, data=data, **settings)
    if not fv.out:
        return artifact.path
    Mix((Part(methods.load(artifact, sampling.opened(lm)[0]), artifact),)).save(fv.out)
    return Path(fv.out)


def needs(name, fit, settings, rewards):
    """The settings that the `fit` of a method cannot do without; InputError where one is not given."""
    known = inspect.signature(fit).parameters
    required = [p.name for p in known.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if rewards and "rewards" not in known:
        raise InputError(f"{name} learns from no reward: leave out --reward")
    for setting in required:
        if setting == "rewards" and not rewards:
            raise InputError(f"{name} learns from a reward: give --reward=FILE.py:FUNCTION, of prompt and text")
        if setting not in (*settings, "lm", "data", "rewards"):
            raise InputError(f"{name} needs the setting {setting!r}: give --set {setting}=VALUE")
    return required


def own_reward(session, text):
    """The scorer of FILE.py:FUNCTION."""
    file, _, function = text.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not function.isidentifier():
        raise InputError(f"--reward {text}: expected FILE.py:FUNCTION, such as mine.py:short")
    if not path.is_file():
        raise InputError(f"--reward {text}: there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))
    settings = {"kind": "function", "name": function, "function": f"{path.stem}:{function}", "version": "1"}
    return stage(session, judges.fit_judge, settings)


def nested(flag, given):
    """{"training": {"steps": 3}} of ["training.steps=3"]."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--{flag} {text}: expected KEY=VALUE")
        *sections, name = key.split(".")
        where = found
        for section in sections:
            where = where.setdefault(section, {})
            if not isinstance(where, dict):
                raise InputError(f"--{flag} {text}: {section} was given as a value and as a section: give one of them")
        where[name] = literal(value)
    return found


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
