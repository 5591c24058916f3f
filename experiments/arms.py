"""The arms of an experiment, the entries of its section `methods`: what each one is, read from its settings.

    Plain       the language model alone                      filter
    Fitted      a method, fitted                              method, fit, data, rewards, strengths
    Direction   latent vectors made into one control          the same, and direction
    Together    other arms in one chain                       chain: label -> strength; strengths multiply them
    BestOf      the best of n samples by the first reward     best_of: (n, …), rewards

`filter` (options of `ctg_jax.controls.truncate`) and `filter_first` replace those of the section `sample`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from ctg_jax import methods
from ctg_jax.run.stage import nearest
from ctg_jax.types import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """What every arm may have. `learns`: whether anything is fitted for it."""

    learns: ClassVar[bool] = False

    filter: Mapping[str, Any] | None = None
    filter_first: bool | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """Its own settings of `sample`."""
        own = {"filter": self.filter, "filter_first": self.filter_first}
        return {name: value for name, value in own.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(Arm):
    """The language model alone, under a filter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted(Arm):
    """A method and the settings of its `fit`. `data`: settings of `load_data`; `rewards`: name -> settings of
    `fit_judge`, for methods that learn from them; `strengths`: as fitted where there are none."""

    learns: ClassVar[bool] = True

    method: str
    fit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] | None = None
    rewards: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    strengths: tuple[float, ...] | None = None

    def check(self, label: str) -> None:
        """InputError for a method that there is not or that learns nothing, no data, or a setting its `fit` lacks."""
        module = methods.get(self.method)
        if not hasattr(module, "fit"):
            raise InputError(
                f"methods.{label}.method is {self.method!r}, which has no fit: leave method out and give filter"
            )
        if self.data is None:
            raise InputError(f"methods.{label} lacks data, the texts that {self.method} is fitted on")
        known = inspect.signature(module.fit).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            for key in self.fit:
                if key not in known:
                    raise InputError(f"methods.{label}.fit has no setting {key!r}{nearest(key, known)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction(Fitted):
    """Latent vectors that become one control, from label 0 to 1; `direction`: settings of `latents.direction`."""

    direction: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together(Arm):
    """Other arms in one chain, each at its own strength times that of the chain."""

    learns: ClassVar[bool] = True

    chain: Mapping[str, float]
    strengths: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOf(Arm):
    """Each sample is the best of n of the language model, by the first of `rewards`; n takes the place of strengths."""

    best_of: tuple[int, ...]
    rewards: Mapping[str, Mapping[str, Any]]


# The setting that only this kind of arm has; the first one that is found decides.
_KINDS: tuple[tuple[str, type[Arm]], ...] = (
    ("chain", Together),
    ("best_of", BestOf),
    ("direction", Direction),
    ("method", Fitted),
)


def read(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Arm]:
    """label -> arm of the section `methods`; those that learn nothing come first, as the lines to compare with.

    Raises:
      InputError: a setting that an arm of its kind lacks (with the nearest name) or one that is missing, a method that
        there is not, a chain that names no other arm.
    """
    found = {label: _arm(label, arm) for label, arm in settings.items()}
    for label, arm in found.items():
        if isinstance(arm, Fitted):
            arm.check(label)
        for other in arm.chain if isinstance(arm, Together) else ():
            if not isinstance(found.get(other), Fitted):
                known = [name for name, one in found.items() if isinstance(one, Fitted)]
                raise InputError(f"methods.{label}.chain names {other!r}, which is no method{nearest(other, known)}")
    return dict(sorted(found.items(), key=lambda item: (item[1].learns, item[0])))


def _arm(label: str, settings: Mapping[str, Any]) -> Arm:
    kind = next((kind for key, kind in _KINDS if key in settings), Plain)
    fields = dataclasses.fields(kind)
    known = [f.name for f in fields] + ["method"] * (kind is Plain)
    for key in settings:
        if key not in known:
            raise InputError(f"methods.{label} has no setting {key!r}{nearest(key, known)}")
    for f in fields:
        if f.name not in settings and f.default is f.default_factory is dataclasses.MISSING:
            raise InputError(f"methods.{label} lacks the setting {f.name!r}")
    return kind(**settings)
