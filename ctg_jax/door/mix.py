"""`Mix`: fitted controls at their strengths, with where they come from, so that they can be saved. `load_control`."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import methods
from ctg_jax.control import STRENGTHS, Chain, Control, leaves, with_strength
from ctg_jax.decode.rows import is_strength
from ctg_jax.door import file
from ctg_jax.io import sha256_of, write_json
from ctg_jax.run import checkpoint
from ctg_jax.run.seal import seal
from ctg_jax.run.stage import Artifact, open_artifact
from ctg_jax.stages import sampling
from ctg_jax.types import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A control, and the artifact that a method left of it; None for one that was made by hand."""

    control: Control
    artifact: Artifact | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Mix:
    """Controls in the order in which they act. A `Control` is arrays and does not know how it was made; a mix knows
    that too, which `save` and the check of the language model need. `control` is the control alone, for `generate`,
    `vmap` and `grad`.

    `a * mix` sets the strength of every part that has one, as `with_strength` does; `mix + other` appends a mix or a
    control.
    """

    parts: tuple[Part, ...] = ()

    __array_ufunc__ = None  # a NumPy number on the left leaves `*` to the mix

    @property
    def control(self) -> Control:
        """The control: of one part itself, of several their chain."""
        return self.parts[0].control if len(self.parts) == 1 else self._chain

    @property
    def _chain(self) -> Chain:
        return Chain(tuple(part.control for part in self.parts))

    @property
    def artifacts(self) -> list[Artifact]:
        """Of the parts that have one."""
        return [part.artifact for part in self.parts if part.artifact is not None]

    def __mul__(self, strength: Any) -> Mix:
        return self._with(with_strength(self._chain, strength).parts)

    __rmul__ = __mul__

    def __add__(self, other: Mix | Control) -> Mix:
        return Mix((*self.parts, *mix_of(other, "the right side of +").parts))

    def __radd__(self, other: Control) -> Mix:
        return Mix((*mix_of(other, "the left side of +").parts, *self.parts))

    def over(self, control: Control) -> Mix:
        """This mix with other leaves: those of a control of its structure, such as its own at another strength."""
        return self._with((control,) if len(self.parts) == 1 else control.parts)

    def __repr__(self) -> str:
        return " + ".join(map(_shown, self.parts)) or "no control"

    def _with(self, controls: tuple[Control, ...]) -> Mix:
        return Mix(tuple(dataclasses.replace(p, control=c) for p, c in zip(self.parts, controls, strict=True)))

    def rows(self, count: int) -> list[Mix]:
        """The mix of each of `count` texts, where a strength is one number for each of them.

        Raises:
          InputError: another number of strengths.
        """
        flat, structure = jax.tree_util.tree_flatten_with_path(self._chain)
        own = [is_strength(path) and np.ndim(leaf) == 1 for path, leaf in flat]
        for mine, (path, leaf) in zip(own, flat):
            if mine and len(leaf) != count:
                raise InputError(
                    f"the strength of {_shown(self.parts[path[1].idx])} holds {len(leaf)} numbers, but there are "
                    f"{count} prompts: give one number, or one for each prompt"
                )
        if not any(own):
            return [self] * count
        values = [[leaf[i] if mine else leaf for mine, (_, leaf) in zip(own, flat)] for i in range(count)]
        return [self._with(jax.tree.unflatten(structure, row).parts) for row in values]

    def key(self) -> Any:
        """Equal for mixes whose texts can be written together: with the same arrays, and the same strengths, but for
        those that a row can have of its own (`together`)."""
        mine = [
            part.control if own is None else part.control.replace(**{own: 0.0})
            for part, own in zip(self.parts, self._own())
        ]
        flat, structure = jax.tree.flatten(Chain(tuple(mine)))
        return structure, tuple(float(x) if np.ndim(x) == 0 else id(x) for x in flat)

    def _own(self) -> list[str | None]:
        """For each part the name of its strength, where a row can have one of its own; else None."""

        def name(control):
            found = [s for s in STRENGTHS if np.ndim(getattr(control, s, ())) == 0 and hasattr(control, s)]
            free = getattr(control, "cond_multiplies", False) and getattr(control, "cond", "") is None
            return found[0] if found and free else None

        return [name(part.control) for part in self.parts]

    def save(self, path: str | os.PathLike) -> None:
        """Writes the mix, with its strengths, to a folder that `load_control` reads; the folder of one control is an
        artifact, which the scripts' `--control` reads as well. A path that ends with .safetensors becomes one file, to
        pass on. A mix that is there already is replaced.

        Raises:
          InputError: nothing to save, a part that was made by hand, one number for each row as a strength, something
            else at the path, a disk that cannot be written.
        """
        path = Path(path).expanduser().absolute()
        if not self.parts:
            raise InputError("there is no control to save: fit one, such as with steer.from_pairs")
        for part in self.parts:
            if part.artifact is None:
                raise InputError(
                    f"{type(part.control).__name__} was made by hand, so nothing says how to make it again: save what "
                    "was fitted, and add the other when it is loaded"
                )
            if any(np.ndim(v) for v in _strengths(part.control)):
                raise InputError("the strength is one number for each row: save the control at a single strength")
        single = path.suffix == file.SUFFIX
        if path.exists() and not (path.is_file() if single else _folders(path)):
            raise InputError(f"{path} exists and holds no saved control: choose another path or remove it")
        new = path.with_name(f".{path.name}.new")
        try:
            if single:
                file.write(path, [(part.control, _spec(part.artifact)) for part in self.parts])
                return
            shutil.rmtree(new, ignore_errors=True)
            for number, part in enumerate(self.parts, 1):
                folder = new if len(self.parts) == 1 else new / str(number)
                _write(folder, part.control, _spec(part.artifact), part.artifact.path / "metrics.jsonl")
            _replace(path, new)
        except OSError as e:
            raise InputError(f"{path} cannot be written ({e.strerror})") from None


def together(mixes: Sequence[Mix]) -> tuple[Mix, dict[str, np.ndarray]]:
    """One mix for rows whose mixes have the same `key`, and the entries of `prompts.cond` that hold the strengths in
    which they differ, name -> float32 [rows]."""
    first, cond = mixes[0], {}
    parts = list(first.parts)
    for i, own in enumerate(first._own()):
        strengths = [float(getattr(mix.parts[i].control, own)) for mix in mixes] if own else []
        if len(set(strengths)) > 1:
            entry = f"strength of control {i + 1}"
            control = parts[i].control.replace(cond=entry, **{own: jnp.float32(1.0)})
            parts[i], cond[entry] = dataclasses.replace(parts[i], control=control), np.asarray(strengths, np.float32)
    return Mix(tuple(parts)), cond


def mix_of(value: Any, where: str = "control") -> Mix:
    """A mix of what may stand for a control: a mix, a `Control`, or None.

    Raises:
      InputError: anything else; a class says so.
    """
    if value is None:
        return Mix()
    if isinstance(value, Mix):
        return value
    if isinstance(value, Control):
        return Mix(tuple(Part(c) for c in leaves(value) if type(c) is not Control))
    if isinstance(value, type):
        raise InputError(f"{where} is the class {value.__name__}, expected a control: make one, {value.__name__}(…)")
    hint = ": load it with ctg_jax.load_control" if isinstance(value, str | os.PathLike) else ""
    raise InputError(f"{where} is {value!r:.60}, expected a control{hint}")


def load_control(path: str | os.PathLike, lm: Any) -> Mix:
    """A control that `Mix.save` wrote, or the artifact of one that an experiment fitted.

    Args:
      lm: the language model that it was fitted on, as `load` returns it.

    Raises:
      InputError: nothing there, files that have changed, another language model.
    """
    from ctg_jax.door.model import check_model

    check_model(lm)
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path is {path!r:.60}, expected the folder or file of a saved control")
    path = Path(path).expanduser().absolute()
    if path.suffix == file.SUFFIX and path.is_file():
        path = _unpacked(path, lm)
    parts = []
    for folder in _folders(path) or [path]:
        artifact = open_artifact(folder, lm.session)
        sampling.same_lm(artifact, lm.artifact)
        parts.append(Part(methods.load(artifact, lm.lm), artifact))
    return Mix(tuple(parts))


def _folders(path: Path) -> list[Path]:
    """The folders of the parts of a saved mix; empty where there is none."""
    if (path / "DONE").exists():
        return [path]
    numbers = sorted(int(p.parent.name) for p in path.glob("*/DONE") if p.parent.name.isdigit())
    return [path / str(i) for i in numbers]


def _replace(path: Path, new: Path) -> None:
    """Puts the folder `new` at `path`. What was there is removed last, and put back where that fails."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _spec(artifact: Artifact) -> dict[str, Any]:
    return {key: value for key, value in artifact.spec.items() if key not in ("paths", "discarded")}


def _write(folder: Path, control: Control, spec: dict[str, Any], metrics: Path | None = None) -> None:
    folder.mkdir(parents=True)
    checkpoint.save(folder / "state", control)
    if metrics is not None and metrics.exists():
        shutil.copy(metrics, folder)
    write_json(folder / "spec.json", spec)
    seal(folder)


def _unpacked(path: Path, lm: Any) -> Path:
    """The folder of the controls of a file, below the root of the language model; one that is there is used again."""
    place = lm.session.root / "loaded" / sha256_of(path.read_bytes(), lm.artifact.fingerprint)[:16]
    if not _folders(place):
        new = place.with_name(f".{place.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        for number, (control, spec) in enumerate(file.read(path, lm.lm), 1):
            _write(new / str(number), control, spec)
        _replace(place, new)
    return place


def _strengths(control: Control) -> list[Any]:
    flat = jax.tree_util.tree_leaves_with_path(control)
    return [leaf for path, leaf in flat if is_strength(path)]


def _shown(part: Part) -> str:
    name = type(part.control).__name__ if part.artifact is None else part.artifact.spec.get("method", "control")
    found = _strengths(part.control)
    return name if not found or np.ndim(found[0]) else f"{float(found[0]):g} * {name}"
