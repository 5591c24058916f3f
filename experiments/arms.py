"""The arms of an experiment, the entries of its section `methods`: a dataclass for each kind of arm.

    Plain       the language model alone                      filter
    Fitted      a method, fitted                              method, fit, data, rewards, strengths or kl
    Direction   latent vectors made into one control          the same, and direction
    Made        a method that needs no training               method, init, strengths or kl
    Together    other arms in one chain                       chain: label -> strength; strengths or kl multiply them
    BestOf      the best of n samples by the first reward     best_of: (n, …), rewards
    Corrected   samples, revised by a fitted corrector        correct: {"turns": n, "drafts": n}, method, fit, data
    Searched    a search of the language model or of a chain  search, rewards or critic, chain
    Consensus   of n samples the one most like the others     consensus: (n, …), similarity, chain

Every arm may have `filter` (options of `ctg_jax.controls.truncate`, and `speculate`, see `stages.sampling.build`) and
`truncate_first`, which replace those of the section `sample`. In place of `strengths` an arm may have `kl`, nats per
token to the base, each of which becomes the strength that gives it on the texts of the section `calibrate`, so that
arms are compared at equal KL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ctg_jax import methods
from ctg_jax.decode.strategies import Strategy
from ctg_jax.learn.consensus import SIMILARITIES
from ctg_jax.learn.search import Plan
from ctg_jax.run.stage import nearest
from ctg_jax.types import InputError

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """What all arms have.

    Attributes:
      filter, truncate_first: settings of `sample` that this arm has of its own; None for those of the experiment.
      learns: whether the arm has something to compare with the base; the arms that do not come first in a report.
      likelihood: whether its samples have a log-probability under what drew them, which a KL and the perplexity of
        human text need.
    """

    learns: ClassVar[bool] = False
    likelihood: ClassVar[bool] = True

    filter: Settings | None = None
    truncate_first: bool | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of `sample` in which this arm differs from the experiment."""
        own = {"filter": self.filter, "truncate_first": self.truncate_first}
        return {name: value for name, value in own.items() if value is not None}

    def check(self, label: str, arms: Mapping[str, Arm]) -> None:
        """Checks the settings that nothing else checks before the first stage runs.

        Args:
          label: the name of this arm, for messages. arms: all arms of the experiment, label -> arm.

        Raises:
          InputError: a setting that cannot be used.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(Arm):
    """The language model alone, under a filter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swept(Arm):
    """Controls at several strengths. `strengths`: those to sample at; None for the ones that they were made with. `kl`:
    in their place the KL to the base, nats per token, of each."""

    learns: ClassVar[bool] = True

    strengths: tuple[float, ...] | None = None
    kl: tuple[float, ...] | None = None

    def check(self, label, arms):
        if self.kl is not None and self.strengths is not None:
            raise InputError(f"methods.{label} has both strengths and kl: give one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodArm(Swept):
    """A control of one method."""

    method: str

    @property
    def likelihood(self) -> bool:
        """That of the strategies which the classes of its module are or name; see `ctg_jax.decode.strategies`."""
        classes = [x for x in vars(methods.get(self.method)).values() if isinstance(x, type)]
        found = [x if issubclass(x, Strategy) else getattr(x, "strategy", Strategy) for x in classes]
        return all(strategy.likelihood for strategy in found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted(MethodArm):
    """A method and the settings of its `fit`. `data`: settings of `load_data`; `rewards`: name -> settings of
    `fit_judge`, for methods that learn from them."""

    fit: Settings = dataclasses.field(default_factory=dict)
    data: Settings | None = None
    rewards: Mapping[str, Settings] = dataclasses.field(default_factory=dict)

    def check(self, label, arms):
        super().check(label, arms)
        module = methods.get(self.method)
        if not hasattr(module, "fit"):
            raise InputError(
                f"methods.{label}.method is {self.method!r}, which has no fit: give the settings of its init as init, "
                "or leave method out and give filter"
            )
        if self.data is None:
            raise InputError(f"methods.{label} lacks data, the texts that {self.method} is fitted on")
        _check_known(f"methods.{label}.fit", self.fit, module.fit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction(Fitted):
    """Latent vectors that become one control, from label 0 to 1; `direction`: settings of `latents.direction`."""

    direction: Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corrected(Fitted):
    """Samples of the language model, revised by a corrector; `correct`: `turns` revisions (1), or one revision of
    `drafts` samples at a time."""

    likelihood: ClassVar[bool] = False

    correct: Mapping[str, int]

    def check(self, label, arms):
        super().check(label, arms)
        if self.kl is not None:
            raise InputError(f"methods.{label} has kl, which revised samples cannot be brought to: give strengths")
        for key in self.correct:
            if key not in ("turns", "drafts"):
                raise InputError(f"methods.{label}.correct has no setting {key!r}{nearest(key, ('turns', 'drafts'))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made(MethodArm):
    """A control that needs no training; `init`: settings of the method's `init`, which its `make` takes as well."""

    init: Settings

    def check(self, label, arms):
        super().check(label, arms)
        try:
            methods.maker(self.method)
        except InputError as e:
            raise InputError(f"methods.{label}: {e}") from None
        _check_known(f"methods.{label}.init", self.init, methods.get(self.method).init)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together(Swept):
    """Other arms in one chain, each at its own strength times that of the chain."""

    chain: Mapping[str, float]

    def check(self, label, arms):
        super().check(label, arms)
        check_chain(label, self.chain, arms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOf(Arm):
    """Each sample is the best of n of the language model, by the first of `rewards`; n takes the place of strengths."""

    likelihood: ClassVar[bool] = False

    best_of: tuple[int, ...]
    rewards: Mapping[str, Settings]

    def check(self, label, arms):
        check_counts(f"methods.{label}.best_of", self.best_of)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searched(Arm):
    """What a search finds in the samples of the language model, or of other arms in one chain.

    Attributes:
      search: the section `plan` of the stage `searched`. rewards: the one that chooses; critic: the label of an arm
        whose values choose in its place; neither for beam search.
      chain: label of another arm -> strength.
    """

    likelihood: ClassVar[bool] = False

    search: Settings
    rewards: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    critic: str | None = None
    chain: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def learns(self) -> bool:
        """Whether a critic, which is fitted, chooses."""
        return self.critic is not None

    def check(self, label, arms):
        fields = [f.name for f in dataclasses.fields(Plan)]
        for key in self.search:
            if key not in fields:
                raise InputError(f"methods.{label}.search has no setting {key!r}{nearest(key, fields)}")
        if self.truncate_first:
            raise InputError(f"methods.{label} has truncate_first, which a search cannot have: leave it out")
        Plan(**self.search).check(len(self.rewards) + (self.critic is not None))
        fitted = {name: arm.method for name, arm in arms.items() if isinstance(arm, MethodArm)}
        known = [name for name, method in fitted.items() if hasattr(methods.get(method), "of_prefixes")]
        if self.critic is not None and self.critic not in known:
            raise InputError(
                f"methods.{label}.critic is {self.critic!r}, which is no arm with values of unfinished texts"
                f"{nearest(self.critic, known)}"
            )
        check_chain(label, self.chain, arms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consensus(Arm):
    """Each sample is the one of n that is most like the others (minimum Bayes risk), of the language model or of other
    arms in one chain; n takes the place of strengths.

    Attributes:
      similarity: see `ctg_jax.learn.consensus`. chain: label of another arm -> strength.
    """

    likelihood: ClassVar[bool] = False

    consensus: tuple[int, ...]
    similarity: str = "bleu"
    chain: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def check(self, label, arms):
        if self.similarity not in SIMILARITIES:
            known = ", ".join(SIMILARITIES)
            raise InputError(f"methods.{label}.similarity is {self.similarity!r}, expected one of {known}")
        check_counts(f"methods.{label}.consensus", self.consensus)
        check_chain(label, self.chain, arms)


def check_counts(where: str, counts: Any) -> None:
    """InputError unless a setting lists numbers of samples."""
    if not isinstance(counts, list | tuple) or not counts:
        raise InputError(f"{where} is {counts!r}, expected a list of numbers of samples, such as (4, 16)")
    for n in counts:
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise InputError(f"{where} holds {n!r}, expected numbers of samples of at least 1")


def check_chain(label: str, chain: Mapping[str, float], arms: Mapping[str, Arm]) -> None:
    """InputError where a chain names an arm that is no method."""
    known = [name for name, arm in arms.items() if isinstance(arm, MethodArm)]
    for other in chain:
        if other not in known:
            raise InputError(f"methods.{label}.chain names {other!r}, which is no method{nearest(other, known)}")


# The setting that only this kind of arm has -> the kind; the first that is found decides.
KINDS: tuple[tuple[str, type[Arm]], ...] = (
    ("search", Searched),
    ("consensus", Consensus),
    ("chain", Together),
    ("best_of", BestOf),
    ("correct", Corrected),
    ("direction", Direction),
    ("init", Made),
    ("method", Fitted),
)


def read(settings: Mapping[str, Settings]) -> dict[str, Arm]:
    """label -> arm of the section `methods`; arms that learn nothing come first, as the lines to compare with.

    Raises:
      InputError: an unknown setting (with the nearest name) or a missing one, an unknown method, a chain that names no
        other arm.
    """
    found = {label: _arm(label, arm) for label, arm in settings.items()}
    for label, arm in found.items():
        arm.check(label, found)
    return dict(sorted(found.items(), key=lambda item: (item[1].learns, item[0])))


def _arm(label: str, settings: Settings) -> Arm:
    kind = next((kind for key, kind in KINDS if key in settings), Plain)
    fields = dataclasses.fields(kind)
    known = [f.name for f in fields] + ["method"] * (kind is Plain)
    for key in settings:
        if key not in known:
            raise InputError(f"methods.{label} has no setting {key!r}{nearest(key, known)}")
    for f in fields:
        if f.name not in settings and f.default is f.default_factory is dataclasses.MISSING:
            raise InputError(f"methods.{label} lacks the setting {f.name!r}")
    return kind(**settings)


def _check_known(where: str, settings: Settings, fn: Any) -> None:
    """InputError for a setting that is no keyword parameter of `fn`."""
    known = methods.settings_of(fn)
    for key in settings if known is not None else ():
        if key not in known:
            raise InputError(f"{where} has no setting {key!r}{nearest(key, known)}")
