"""Controls and chains: which hooks they replace, the order of parts, strengths, and methods found by name."""

import dataclasses
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import pytest
from flax import struct

import ctg_jax
from ctg_jax import methods
from ctg_jax.control import IDENTITY, Chain, Control, overrides
from ctg_jax.controls import truncate
from ctg_jax.controls.vectors import SoftPrompt
from ctg_jax.methods.hidden.steer import Steer
from ctg_jax.types import InputError


@struct.dataclass
class Affine(Control):
    """z -> a z + b, counting its calls; and learned keys of length a."""

    a: float
    b: float

    def init(self, prompts, length):
        return 0

    def logits(self, z, h, tokens, mask, state):
        return self.a * z + self.b, state + 1

    def hidden(self, h, site, pos, state):
        return self.a * h + self.b

    def prefix(self, state):
        kv = jnp.full((2, 1, 1, int(self.a), 4), self.b)
        return kv, kv

    def weights(self, params):
        return self.a * params + self.b


def test_parts_act_from_left_to_right():
    chain = Chain((Affine(2, 1), Affine(3, 5)))
    state = chain.init(None, 0)
    z, state = chain.logits(jnp.ones((1, 1, 2)), None, None, None, state)
    assert z.tolist() == [[[(2 * 1 + 1) * 3 + 5] * 2]] and state == (1, 1)
    assert chain.hidden(1.0, 0, None, state) == 14 and chain.weights(1.0) == 14
    k, _ = chain.prefix(state)
    assert k.shape == (2, 1, 1, 5, 4) and k[0, 0, 0, :, 0].tolist() == [1, 1, 5, 5, 5]
    assert Chain(()).prefix(()) is None


def test_a_state_of_another_chain_is_refused():
    with pytest.raises(ValueError):
        Chain((IDENTITY,)).hidden(1.0, 0, None, ())


def test_two_classes_with_as_many_leaves_are_two_structures():
    """Else `jit` takes the program of one for the other whenever their hashes fall on the same place of its cache."""
    same = [c(0.5) for c in (truncate.Temperature, truncate.TopP, truncate.Typical, truncate.MinP)]
    for kind in (lambda c: c, lambda c: Chain((c,))):
        structures = [jax.tree.structure(kind(c)) for c in same]
        assert all((a == b) == (i == j) for i, a in enumerate(structures) for j, b in enumerate(structures))
    again = jax.tree.unflatten(jax.tree.structure(same[0]), [0.7])
    assert again == truncate.Temperature(0.7) == same[0].replace(t=0.7)


def test_a_control_of_the_decorator_of_jax_says_its_class_too():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Other(Control):
        t: float

    assert jax.tree.leaves(Other(0.5)) == [0.5]
    assert jax.tree.structure(Other(0.5)) != jax.tree.structure(truncate.Temperature(0.5))


def test_every_control_says_its_class():
    for module in pkgutil.walk_packages(ctg_jax.__path__, "ctg_jax."):
        importlib.import_module(module.name)

    def below(cls):
        return [cls, *(c for sub in cls.__subclasses__() for c in below(sub))]

    classes = [c for c in below(Control) if c.__module__.startswith("ctg_jax.")]
    assert len(classes) > 20
    for cls in classes:
        field = next(f for f in dataclasses.fields(cls) if f.name == "of_class")
        assert not field.metadata["pytree_node"] and field.default.endswith(cls.__qualname__)
    assert len({cls.of_class for cls in classes}) == len(classes)


def test_a_class_that_is_defined_again_is_another_class():
    """As in a notebook, where a cell that was edited runs again: the structures of the two are not one to `jit`."""

    def define(token):
        @struct.dataclass
        class Push(Control):
            def logits(self, z, h, tokens, mask, state):
                return z.at[..., token].add(9.0), state

        return Push()

    first, second = define(1), define(2)
    assert type(first).__qualname__ == type(second).__qualname__
    assert jax.tree.structure(first) != jax.tree.structure(second)
    assert jax.tree.structure(first) == jax.tree.structure(first.replace())


def test_overrides_looks_into_chains():
    assert not overrides(IDENTITY, "logits") and not overrides(Chain((IDENTITY, Chain(()))), "hidden")
    nested = Chain((IDENTITY, Chain((SoftPrompt(jnp.zeros((1, 2))),))))
    assert overrides(nested, "prompt") and not overrides(nested, "logits")


def steered(scale):
    return Steer(jnp.zeros((3, 2)), jnp.ones(3), jnp.float32(scale))


def test_strength_is_set_wherever_there_is_one():
    chain = methods.with_strength(Chain((truncate.TopP(0.9), Chain((steered(1.0),)))), -2)
    assert float(chain.parts[1].parts[0].scale) == -2 and chain.parts[0].p == 0.9
    assert methods.with_strength(steered(1.0), jnp.array([1.0, 2.0])).scale.shape == (2,)


def test_bad_strengths_are_refused():
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"strength is {value}"):
            methods.with_strength(steered(1.0), value)
    with pytest.raises(InputError, match="TopP has no strength"):
        methods.with_strength(truncate.TopP(0.9), 1.0)
    with pytest.raises(InputError, match="Chain has no strength"):
        methods.with_strength(Chain(()), 1.0)


def test_methods_are_found_by_name():
    assert {"dexperts", "finetune", "steer", "truncate"} <= set(methods.names())
    assert methods.get("steer").__name__ == "ctg_jax.methods.hidden.steer"
    with pytest.raises(InputError, match="did you mean 'dexperts'"):
        methods.get("dexpert")
    with pytest.raises(InputError, match="there is no such method"):
        methods.get("os.path")


def test_a_strength_reaches_what_a_wrapper_holds():
    """A control that holds others and has no strength of its own; a strength of its own comes first."""

    @struct.dataclass
    class Holds(Control):
        inner: Control
        more: tuple[Control, ...]

    @struct.dataclass
    class Weighs(Control):
        inner: Control
        alpha: jax.Array

    held = Holds(steered(1.0), (truncate.TopP(0.9), Chain((steered(2.0),))))
    found = methods.with_strength(Chain((held,)), -3.0).parts[0]
    assert float(found.inner.scale) == float(found.more[1].parts[0].scale) == -3.0
    assert found.more[0] == truncate.TopP(0.9)
    own = methods.with_strength(Weighs(steered(1.0), jnp.float32(0)), 4.0)
    assert (float(own.alpha), float(own.inner.scale)) == (4.0, 1.0)
    with pytest.raises(InputError, match="Holds has no strength to set"):
        methods.with_strength(Holds(truncate.TopP(0.9), ()), 1.0)
