"""Weight cotangents kept as the two factors of their product, `x^T g`.

A backward pass that a user wrote computes the weight's whole gradient. All that A and B need of it
is its product with the other factor, which is cheap from `x` and `g` and dear from `x^T g`.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from lora_jax.transform import compat
from lora_jax.transform.view import RANK, Factor, Source, Term, View
from lora_jax.transform.walk import Rule, Walk

_PASSED_ON = {
    "transpose", "convert_element_type", "reshape", "copy", "neg", "squeeze", "broadcast_in_dim",
    "mul", "div",
}  # fmt: skip


def weight_products(jaxpr: Any, outputs: Sequence[Any]) -> dict[Any, Rule]:
    """Finds the products that only lead to weights' cotangents.

    Args:
      jaxpr: a backward pass.
      outputs: its outputs that are weights' cotangents.

    Returns:
      Rules for those equations, by their output variable: for `Walk.factored`.
    """
    made = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    counts = collections.Counter(
        atom
        for atoms in (*(equation.invars for equation in jaxpr.eqns), jaxpr.outvars)
        for atom in atoms
        if not isinstance(atom, Literal)
    )
    rules: dict[Any, Rule] = {}
    pending = list(outputs)
    while pending:
        var = pending.pop()
        equation = None if isinstance(var, Literal) or counts[var] != 1 else made.get(var)
        if equation is None:
            continue
        name = equation.primitive.name
        if name == "dot_general":
            rules[var] = factored_product
        elif name in ("add", "add_any"):
            if len({atom.aval.shape for atom in (var, *equation.invars)}) == 1:  # type: ignore
                pending += equation.invars
        elif name in ("mul", "div") and all(atom.aval.ndim for atom in equation.invars):
            continue
        elif name in _PASSED_ON:
            pending += [atom for atom in equation.invars if atom.aval.ndim]
        elif name in ("jit", "pjit"):
            inner, _ = compat.open_jaxpr(equation.params["jaxpr"])
            within = weight_products(inner, [inner.outvars[equation.outvars.index(var)]])
            if within:
                rules |= within
                rules[equation.outvars[0]] = _opened
    return rules


def _opened(walk: Walk, equation: Any, values: list[Any]) -> list[Any]:
    jaxpr, consts = compat.open_jaxpr(equation.params["jaxpr"])
    return walk.run(jaxpr, consts, values)


def factored_product(walk: Walk, equation: Any, values: list[Any]) -> list[Any]:
    """A `dot_general` left as its two operands; what it sums over is the rank."""
    contract, batch = equation.params["dimension_numbers"]
    aval = equation.outvars[0].aval
    factors, next_free = [], len(batch[0])
    for value, contracted, stacked in zip(values, contract, batch, strict=True):
        free = [axis for axis in range(value.ndim) if axis not in (*contracted, *stacked)]
        array = jax.lax.transpose(value, (*stacked, *free, *contracted))
        kept = array.shape[: len(stacked) + len(free)]
        dims = (*range(len(stacked)), *range(next_free, next_free + len(free)), RANK)
        factors.append(Factor(array.reshape(*kept, -1), dims))
        next_free += len(free)
    term = Term(factors[0], factors[1], None, None, 1.0, 0.0)
    shape = tuple(aval.shape)
    origin = (frozenset[int](),) * len(shape)
    return [View(None, (term,), shape, aval.dtype, origin, Source(-1, "a weight's cotangent"))]
