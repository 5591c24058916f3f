"""The command line of all scripts: flags and configurations, bad input as exit code 2, the compilation cache, the last
lines of the output."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from ctg_jax.mesh import layout
from ctg_jax.run import metrics
from ctg_jax.run import session as sessions
from ctg_jax.run.session import Session, Tally
from ctg_jax.run.stage import nearest
from ctg_jax.types import InputError
from experiments import hosts, roots
from experiments.settings import apart, given
from experiments.settings import override as override

_SETTINGS = ("--config.", "--noconfig.")
HERE = Path(__file__).resolve().parents[1]  # the folder of configs/ and experiments/, in a checkout and in a wheel


class Incomplete(InputError):
    """Something was made, from a part only: `result` is printed last and the exit code is 1."""

    def __init__(self, message: str, result: Any):
        super().__init__(message)
        self.result = result


def parse(
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    usage: str,
    positional: bool = False,
    devices: bool = True,
    mesh: bool = True,
) -> tuple[flags.FlagValues, list[str]]:
    """Flags and remaining arguments of one command line, in `FlagValues` of its own; prints help and exits on --help.

    Args:
      define: defines the flags of the script. usage: its docstring, for --help.
      positional: whether there may be arguments that are no flags.
      devices: whether the script runs as `run` does by default, on the devices that --hosts, --plan and --precision
        describe. mesh: whether it reads --mesh and --remat.

    Raises:
      InputError: an unknown flag or configuration key (with the nearest name), or a value of another type.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    define(values)
    hosts.flag(values, devices, mesh)
    argv = list(argv)
    if {"--help", "-h", "-help"} & set(argv):
        own = values.flags_by_module_dict()
        lines = [f"  --{f.name}: {f.help}" for fs in own.values() for f in fs]
        print(usage.strip() + "\n\nFlags:\n" + "\n".join(sorted(set(lines))))
        raise SystemExit(0)
    if spec_of(argv):
        config_of(spec_of(argv))  # a missing file is named with the nearest
    try:
        rest = values(["ctg_jax", *(a for a in argv if not a.startswith(_SETTINGS))])[1:]
    except flags.UnrecognizedFlagError as e:
        raise InputError(f"there is no flag --{e.flagname}{nearest(e.flagname, list(values))}") from None
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError) as e:
        raise InputError(" ".join(str(e).split())) from None
    if rest and not positional:
        raise InputError(f"unexpected argument {rest[0]!r}: settings are given as --name=value")
    changed = [a for a in argv if a.startswith(_SETTINGS)]
    if changed:
        config = chosen(values)
        values["config"].value = override(config, given(config, changed))
    return values, rest


def config_flag(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines --config=FILE.py[:ARGUMENT] and --config.KEY=VALUE for its keys."""
    config_flags.DEFINE_config_file(
        "config", None, "FILE.py or FILE.py:ARGUMENT; --config.KEY=VALUE replaces a setting in it",
        flag_values=values, sys_argv=["ctg_jax", *(a for a in argv if not a.startswith(_SETTINGS))],
    )  # fmt: skip
    flags.DEFINE_string("root", "runs", "all artifacts and reports: a directory, or gs://BUCKET/…", flag_values=values)
    board_flags(values)


def board_flags(values: flags.FlagValues) -> None:
    """Defines --tensorboard and --wandb, which `run` reads, for scripts that train."""
    flags.DEFINE_boolean("tensorboard", False, "event files of every training, in its folder", flag_values=values)
    flags.DEFINE_boolean("wandb", False, "every training on Weights & Biases", flag_values=values)


def module_of(spec: str) -> Any:
    """The configuration file of `FILE.py[:ARGUMENT]` as a module."""
    file = Path(spec.partition(":")[0])
    if not file.is_file():
        siblings = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        hint = nearest(file.name, siblings) if siblings else ""
        raise InputError(f"there is no configuration file {file}{hint}")
    found = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"{file} defines no get_config(arg) and is no configuration file")
    return module


def config_of(spec: str) -> ConfigDict:
    """`get_config(argument)` of `FILE.py[:ARGUMENT]`, in which no two sections are one object."""
    _, colon, argument = spec.partition(":")
    get = module_of(spec).get_config
    return apart(get(argument) if colon else get())


def chosen(values: flags.FlagValues) -> ConfigDict:
    """The parsed --config.

    Raises:
      InputError: there is none.
    """
    if "config" not in values or values.config is None:
        raise InputError("--config is missing: give --config=configs/NAME.py, or --config=configs/NAME.py:ARGUMENT")
    return values.config


def spec_of(argv: Sequence[str]) -> str:
    """The text of --config, `FILE.py[:ARGUMENT]`; empty where it was not given."""
    given = [a.partition("=")[2] for a in argv if a.startswith(("--config=", "-config="))]
    return given[-1] if given else ""


def run(main: Callable[[Sequence[str], Session], Any], argv: Sequence[str] | None = None, devices: bool = True) -> int:
    """Runs a script and returns its exit code: 0; 1 where the result is incomplete; 2 for bad input, which is one
    sentence on stderr; 3 where another process of the run has ended. The numbers of executed and reused stages go to
    stderr; what `main` returns, such as the path of a report, is printed last.

    Args:
      main: the script, `main(argv, session)`; it runs in the session and the layout of its command line.
      argv: the arguments, by default those of the process.
      devices: whether it runs on the devices that --hosts and --mesh describe, and keeps compiled programs. False for
        plans, whose mesh need not exist, and for benchmarks, which choose their devices and measure compilation.
    """
    argv = spelled(sys.argv[1:] if argv is None else argv)
    _log_to_stderr()
    count, result = Tally(), None
    try:
        if devices:
            keep_compiled()
            hosts.start(argv)
        with layout.laid_out(hosts.chosen(argv)) if devices else contextlib.nullcontext():
            drawn = [name for name in metrics.BOARDS if hosts.switched(argv, f"--{name}")]
            session = Session(roots.opened(hosts.value(argv, "--root") or "runs"), boards=drawn)
            count = session.tally
            result = main(argv, session)
        return 0
    except Incomplete as e:
        print(e, file=sys.stderr)
        result = e.result
        return 1
    except InputError as e:
        print("\n".join(" ".join(line.split()) for line in str(e).splitlines()), file=sys.stderr)
        return 2
    except SystemExit as e:
        return int(e.code or 0)
    except KeyboardInterrupt:
        print("interrupted: the same command continues from here", file=sys.stderr)
        return 130
    except Exception as e:
        if not hosts.lost(e):
            raise
        print(hosts.LOST, file=sys.stderr, flush=True)
        os._exit(3)  # an orderly exit would wait for the process that is gone
    finally:
        logging.getLogger("ctg_jax").handlers.clear()  # its stream may be closed before the next call
        if count.executed or count.reused:
            print(f"stages: {len(count.executed)} executed, {len(count.reused)} reused", file=sys.stderr, flush=True)
        if result is not None:
            print(result, flush=True)


def spelled(argv: Sequence[str]) -> list[str]:
    """A command line with every flag as --name=value. absl also reads `-name` and `--name value`, and the flags that
    are needed before absl parses the line must be found in those spellings too."""
    early = [f"--{name}" for name in ("hosts", "mesh", "plan", "precision", "config", "root")]
    found: list[str] = []
    for a in argv:
        if found and found[-1] in early:
            found[-1] += f"={a}"
        else:
            found.append(f"-{a}" if re.match(r"-[A-Za-z]\w", a) else a)
    return [f"--config={located(a.partition('=')[2])}" if a.startswith("--config=") else a for a in found]


def located(spec: str) -> str:
    """`FILE.py[:ARGUMENT]` with the file of the library where there is none of that name here: `configs/steer.py`,
    `steer.py` and `steer` name one from any folder."""
    file, colon, argument = spec.partition(":")
    own = HERE / "configs" / f"{Path(file).name.removesuffix('.py')}.py"
    if Path(file).is_file() or not own.is_file() or Path(file).parent.name not in ("", "configs"):
        return spec
    return f"{own}{colon}{argument}"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("ctg_jax")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def keep_compiled() -> None:
    """Keeps compiled programs between runs, so that a second start compiles nothing."""
    sessions.keep_compiled(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctg_jax" / "jax")
