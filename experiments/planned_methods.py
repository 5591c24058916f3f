"""What the planner learns from the module of a method: the settings of its `init`, and whether its stage trains."""

import inspect

from ctg_jax import methods
from ctg_jax.learn.fitting import Adapter


def acts(method: str) -> bool:
    """Whether a method makes a control of the language model, of which its module then has an example."""
    return hasattr(methods.get(method), "example")


def init_of(method: str, fit: dict) -> dict | None:
    """The settings of a method's `init` among those of its `fit`; None where `init` needs one that is not there, such
    as a width that an encoder decides."""
    known = dict(list(inspect.signature(methods.get(method).init).parameters.items())[2:])
    for name in [n for n, p in known.items() if p.kind is p.VAR_KEYWORD]:  # what else it takes are those of an adapter
        known |= inspect.signature(Adapter).parameters
        del known[name]
    given = fit | dict(fit.get("shape") or {}) | fit.get("adapter", {})
    found = {key: value for key, value in given.items() if key in known and value is not None}
    return None if any(p.default is p.empty and key not in found for key, p in known.items()) else found


def _stage(method: str) -> dict[str, inspect.Parameter]:
    """The parameters of the stage that is named as the method; none where there is no such stage."""
    stage = getattr(methods.get(method), method, None)
    return dict(inspect.signature(stage).parameters) if stage else {}


def trains(method: str) -> bool:
    """Whether the stage of a method trains its control: then it has a section `training`."""
    return "training" in _stage(method)


def default_batch(method: str) -> int:
    """The rows of an update by default; 32 for methods that train nothing."""
    return _stage(method)["training"].default.batch if trains(method) else 32
