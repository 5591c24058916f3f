"""Formulas over next-token distributions: the algebra of model arithmetic (Dekoninck et al. 2024).

    log P = (Σ λ_i log Q_i) / (Σ λ_i) + const

minimises Σ λ_i KL(P ‖ Q_i). The union of two distributions is the larger of their log-probabilities for each token, the
intersection the smaller one. Scores, such as the log-likelihood ratios of a classifier, are added and have no weight.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from ctg_jax import tree
from ctg_jax.types import InputError

LEAST = 1e-6  # a sum of weights below this is 0 up to rounding
_JOINED = {ast.BitOr: "union", ast.BitAnd: "intersection"}


@struct.dataclass
class Formula:
    """An expression over distributions. `f + g`, `f - g`, `2.0 * f`, `f | g` (union) and `f & g` (intersection) build
    larger ones; `parse` reads one from text.

    All kinds of nodes are one class whose static `op` tells them apart, since JAX ignores classes when it compares
    structures.

    Attributes:
      parts: the operands.
      scale: float32 [], the factor of a "times"; None for the others.
      op: "model", "scores", "times", "plus", "union" or "intersection".
      index: which of the given arrays a "model" or "scores" reads.
    """

    parts: tuple[Formula, ...] = ()
    scale: jax.Array | None = None
    op: str = struct.field(pytree_node=False, default="model")
    index: int = struct.field(pytree_node=False, default=0)

    def __add__(self, other: Formula) -> Formula:
        return Formula((self, other), op="plus")

    def __sub__(self, other: Formula) -> Formula:
        return self + -1.0 * other

    def __mul__(self, factor: float) -> Formula:
        return Formula((self,), jnp.asarray(factor, jnp.float32), op="times")

    __rmul__ = __mul__

    def __neg__(self) -> Formula:
        return -1.0 * self

    def __or__(self, other: Formula) -> Formula:
        return Formula((self, other), op="union")

    def __and__(self, other: Formula) -> Formula:
        return Formula((self, other), op="intersection")

    def weight(self) -> jax.Array:
        """Σ λ_i, float32 []: 1 for a model, a union or an intersection, 0 for scores."""
        if self.op == "times":
            return self.scale * self.parts[0].weight()
        if self.op == "plus":
            return sum((part.weight() for part in self.parts), jnp.float32(0.0))
        return jnp.float32(self.op != "scores")

    def total(self, logps: Sequence[jax.Array]) -> jax.Array:
        """Σ λ_i log Q_i, float32 [..., V], of log-probabilities and scores float32 [..., V]. The operands of a union or
        an intersection become distributions first."""
        if self.op in ("model", "scores"):
            return logps[self.index]
        if self.op == "times":
            return self.scale * self.parts[0].total(logps)
        if self.op == "plus":
            return sum((part.total(logps) for part in self.parts[1:]), self.parts[0].total(logps))
        sides = [jax.nn.log_softmax(part.value(logps), axis=-1) for part in self.parts]
        return (jnp.maximum if self.op == "union" else jnp.minimum)(*sides)

    def value(self, logps: Sequence[jax.Array]) -> jax.Array:
        """`total` divided by `weight`: log P up to a constant. NaN where the weight is not above 0, which `check`
        refuses where it has a value; decoding stops with an error there."""
        weight = self.weight()
        return self.total(logps) / jnp.where(weight > LEAST, weight, jnp.nan)

    def check(self, whole: bool = True) -> None:
        """Raises InputError where the weights of the formula (if `whole`), or of an operand of a union or intersection,
        do not add up to more than 0. Inside a compiled program, where they have no values, nothing is raised."""
        for part in self.parts:
            part.check(whole=self.op in ("union", "intersection"))
        weight = tree.concrete(self.weight()) if whole else None
        if weight is not None and weight <= LEAST:
            raise InputError(
                f"The weights of the formula add up to {float(weight):g}, expected more than 0: give the models larger "
                "weights than those that are subtracted, or set divide=False to use the sum as it is."
            )

    def reads(self) -> set[int]:
        """The indices that the formula reads."""
        if self.op in ("model", "scores"):
            return {self.index}
        return set().union(*(part.reads() for part in self.parts))


def parse(text: str, models: Sequence[str], scores: Sequence[str] = ()) -> Formula:
    """The formula that a Python expression describes, such as "M - 0.96 * (T | M)".

    Allowed are names, numbers, `+`, `-`, `*` and `/` by a number, `|`, `&` and parentheses. As in Python, `|` and `&`
    bind less tightly than `+` and `-`.

    Args:
      text: the expression.
      models: names of distributions, in the order of the arrays that the formula will be given.
      scores: names of scores, whose arrays come after those.

    Raises:
      InputError: text that is no such expression; the message names the part that is not allowed.
    """
    known = [*models, *scores]
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as e:
        raise InputError(
            f"formula is {text!r}, which cannot be read ({e}): write it like 'M - 0.96 * (T | M)'."
        ) from None

    def refuse(node: ast.AST, why: str) -> InputError:
        return InputError(f"formula is {text!r}, where {ast.unparse(node)!r} {why}.")

    def read(node: ast.AST) -> Formula | float:
        if isinstance(node, ast.Name):
            if node.id not in known:
                raise refuse(node, f"is no known name: expected {', '.join(known)}")
            at = known.index(node.id)
            return Formula(op="model" if at < len(models) else "scores", index=at)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            inner = read(node.operand)
            return -inner if isinstance(node.op, ast.USub) else inner
        if not isinstance(node, ast.BinOp):
            raise refuse(node, "is not allowed: use names, numbers, +, -, *, /, |, & and parentheses")
        left, right = read(node.left), read(node.right)
        numbers = isinstance(left, float), isinstance(right, float)
        if isinstance(node.op, ast.Mult) and any(numbers):
            return left * right
        if isinstance(node.op, ast.Div) and numbers[1] and right:
            return left * (1.0 / right)
        if isinstance(node.op, ast.Add | ast.Sub) and numbers[0] == numbers[1]:
            return left + right if isinstance(node.op, ast.Add) else left - right
        if type(node.op) in _JOINED and not any(numbers):
            return Formula((left, right), op=_JOINED[type(node.op)])
        raise refuse(node, "is not allowed: models are added, subtracted, joined by | and &, and multiplied by numbers")

    found = read(body)
    if isinstance(found, float):
        raise InputError(f"formula is {text!r}, a number: expected at least one of {', '.join(known)}.")
    return found
