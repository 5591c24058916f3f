"""Methods: one file is one method, a way to make a `Control`, and is found by its name; there is no list to edit.

The rooms sort methods by where they act: on hidden states, on logits, on weights, or in place of the decode loop.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, get_args, get_type_hints, is_typeddict

import jax

from ctg_jax import tree
from ctg_jax.control import Control
from ctg_jax.control import with_strength as with_strength
from ctg_jax.models.lm import LM
from ctg_jax.run import checkpoint
from ctg_jax.run.identity import StageFunction
from ctg_jax.run.stage import Artifact, Run, nearest, open_lm, stage, stage_function
from ctg_jax.types import InputError


def names() -> list[str]:
    """The methods there are: the modules of the rooms of this package, by their file names."""
    return sorted(_modules())


def get(name: str) -> ModuleType:
    """The module of a method, whichever room it is in; InputError with the nearest name where there is none."""
    found = _modules()
    if name not in found:
        raise InputError(f"method is {name!r}, but there is no such method{nearest(name, found)}.")
    return importlib.import_module(found[name])


def __getattr__(name: str) -> ModuleType:
    """`from ctg_jax.methods import steer`: the same module as `get("steer")`."""
    if name.startswith("_") or name not in _modules():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return get(name)


def _modules() -> dict[str, str]:
    """File name of a method -> dotted name of its module."""
    rooms = [m.name for m in pkgutil.iter_modules(__path__) if m.ispkg]
    return {
        m.name: f"{__name__}.{room}.{m.name}"
        for room in rooms
        for m in pkgutil.iter_modules([f"{path}/{room}" for path in __path__])
    }


def maker(name: str) -> Callable[..., Control]:
    """The function `(lm, key, **settings)` that gives a method's control without training: its `make`, or its `init`
    where there is nothing to fit.

    Raises:
      InputError: an unknown method, or one whose control has to be fitted.
    """
    module = get(name)
    if not hasattr(module, "make") and hasattr(module, "fit"):
        raise InputError(
            f"method is {name!r}, whose control has to be fitted: give the settings of its fit as fit, not as init."
        )
    return getattr(module, "make", module.init)


def load(artifact: Artifact, lm: LM) -> Control:
    """The control that a `fit` left, rebuilt for `lm` from what its spec records: {"method": …, "init": {…}}.

    Raises:
      InputError: the artifact holds no control, one that was fitted on a model of another shape, or one that an earlier
        revision of its stage made, whose arrays this version would read in another way.
    """
    spec = artifact.spec
    if "method" not in spec:
        raise InputError(f"{artifact.path} holds no control: expected an artifact that the `fit` of a method made.")
    declared = [getattr(value, "stage_function", None) for value in vars(get(spec["method"])).values()]
    stages = {d.name: d.revision for d in declared if isinstance(d, StageFunction)}
    revision = stages.get(spec.get("stage"), spec.get("revision"))
    if revision != spec.get("revision"):
        raise InputError(
            f"{artifact.path} was made by revision {spec['revision']} of {spec['stage']}, but this version has "
            f"revision {revision}, which computes something else: fit the control again"
        )
    return artifact.load(shapes(spec, lm, str(artifact.path)))


def settings_of(fn: Callable) -> list[str] | None:
    """The keyword parameters of a function, also those of a typed `**name: Unpack[…]`; None where it takes any name."""
    names = []
    for parameter in inspect.signature(fn).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            typed = get_args(get_type_hints(fn).get(parameter.name))
            if not (typed and is_typeddict(typed[0])):
                return None
            names += typed[0].__annotations__
    return names


def shapes(spec: Mapping[str, Any], lm: LM, where: str) -> Control:
    """The control of a spec with the shapes of its leaves in their place.

    Raises:
      InputError: a setting that the method no longer has; `where` names what holds the spec.
    """
    init, settings = get(spec["method"]).init, spec.get("init", {})
    known = settings_of(init)
    if unknown := [] if known is None else sorted(set(settings) - set(known)):
        raise InputError(
            f"{where} was made by another version, whose {spec['method']} had a setting {unknown[0]!r}: fit it again."
        )
    return jax.eval_shape(lambda key: init(lm, key, **settings), jax.random.key(0))


def save(root: str | os.PathLike, lm: Artifact, control: Control, method: str, **init: Any) -> Artifact:
    """A control that was made by hand, as an artifact like those of `fit`, for `load` and the scripts. It is identified
    by its arrays.

    Args:
      method: the method whose `init(lm, key, **init)` gives the control's structure.

    Raises:
      InputError: `init` gives another structure or other shapes.
    """
    return stage(root, hand_made, {"method": method, "init": init}, lm=lm, control=control)


@stage_function("control")
def hand_made(run: Run, *, lm: Artifact, control: Control, method: str, init: Mapping[str, Any]) -> None:
    """Stage: keeps a control that was made by hand; see `save`."""
    model = open_lm(lm)[0]
    like = jax.eval_shape(lambda key: get(method).init(model, key, **init), jax.random.key(0))
    expected, found = ({k: list(x.shape) for k, x in tree.flatten(c).items()} for c in (like, control))
    if expected != found or jax.tree.structure(like) != jax.tree.structure(control):
        raise InputError(
            f"{method}.init with {dict(init)} makes a control with {expected}, but this {type(control).__name__} has "
            f"{found} or other static fields: give the settings that it was made with"
        )
    checkpoint.save(run.path / "state", control)
    run.record(method=method, init=dict(init))
