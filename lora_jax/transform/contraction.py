"""Rules for products: `x W` becomes `x W0 + scale (x A) B`."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform import compat
from lora_jax.transform.einsum import Named, multiply
from lora_jax.transform.explicit import automatic
from lora_jax.transform.stored import multiplied
from lora_jax.transform.view import RANK, Factor, Term, View, dropped, holding, named
from lora_jax.transform.walk import Walk

Names = tuple[str, ...]


def dot_general(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """Any `dot_general` with a weight on either side, or on both."""
    params = equation.params
    lhs, rhs = values
    contract, batch = params["dimension_numbers"]
    lhs_names, rhs_names, out_names = _names(lhs.ndim, rhs.ndim, contract, batch)
    for value, contracted, stacked in zip(values, contract, batch, strict=True):
        if isinstance(value, View) and value.source.uses is not None:
            value.source.uses.multiplied(value, inputs=contracted, batch=stacked)
    if isinstance(lhs, View) and isinstance(rhs, View):
        lhs = holding(lhs, contract[0])  # Copies on both sides are summed over, too.
    aval = equation.outvars[0].aval
    sizes = dict(zip(out_names, aval.shape, strict=True))

    def bind(left: Any, right: Any) -> jax.Array:
        return compat.bind(equation, [left, right])[0]

    def low_rank(left: Any, right: Any) -> jax.Array:
        return _product(
            (left, lhs_names, lhs.dtype), (right, rhs_names, rhs.dtype),
            out_names, sizes, params["precision"], aval.dtype,
        )  # fmt: skip

    low_rank = automatic(low_rank, aval.sharding)
    total = None
    for left, right in itertools.product(_parts(lhs), _parts(rhs)):
        thin = isinstance(left, Term) or isinstance(right, Term)
        part = multiplied(low_rank if thin else bind, left, right)
        total = part if total is None else total + part
    return [jnp.zeros(aval.shape, aval.dtype) if total is None else total]


def _parts(value: Any) -> list[Any]:
    """What a value is the sum of."""
    if not isinstance(value, View):
        return [value]
    return [*([] if value.base is None else [value.base]), *value.terms]


def _names(lhs_ndim: int, rhs_ndim: int, contract: Any, batch: Any) -> tuple[Names, Names, Names]:
    """A name for every axis of an equation's sides and output; what is summed has one name."""
    lhs = [f"l{axis}" for axis in range(lhs_ndim)]
    rhs = [f"r{axis}" for axis in range(rhs_ndim)]
    for left, right in (*zip(*contract, strict=True), *zip(*batch, strict=True)):
        rhs[right] = lhs[left]
    stacked = [lhs[axis] for axis in batch[0]]
    bound = {*stacked, *(lhs[axis] for axis in contract[0])}
    free = [name for name in (*lhs, *rhs) if name not in bound]
    return tuple(lhs), tuple(rhs), (*stacked, *free)


def _product(
    left: tuple[Any, Names, Any],
    right: tuple[Any, Names, Any],
    out: Names,
    sizes: dict[str, int],
    precision: Any,
    dtype: Any,
) -> jax.Array:
    """The product of two parts of which at least one is a term: `scale (x A) B`."""
    operands: list[Named] = []
    terms: list[Term] = []
    for side, (part, names, kind) in enumerate((left, right)):
        if isinstance(part, Term):
            terms.append(part)
            operands += [
                named(factor, names.__getitem__, kind, rank=f"rank{side}")
                for factor in (part.b, part.a)
            ]
        else:
            operands.insert(0, Named(part, names))
    x, *factors = operands
    if len(terms) == 1:
        x = Named(dropped(x.array, terms[0]), x.names)

    def scaled(product: jax.Array) -> jax.Array:
        for term in terms:
            product = term.scaled(product)
        return product

    common = jnp.result_type(*(operand.array.dtype for operand in operands))
    x, *factors = (Named(o.array.astype(common), o.names) for o in (x, *factors))
    return multiply(x, factors, out, sizes, dtype=dtype, precision=precision, midway=scaled)


def ragged_dot(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """`ragged_dot` over experts: rows `[m, k]` in groups times one `[k, n]` for each group."""
    lhs, weight, sizes, *offset = values
    params = equation.params
    numbers = params["ragged_dot_dimension_numbers"]
    ((rows_k,), (weight_k,)), stacked = numbers.dot_dimension_numbers
    if isinstance(lhs, View) or not isinstance(weight, View) or offset:
        return None
    plain = (
        lhs.ndim == 2 and weight.ndim == 3 and stacked == ((), ())
        and tuple(numbers.lhs_ragged_dimensions) == (1 - rows_k,)
        and len(numbers.rhs_group_dimensions) == 1
    )  # fmt: skip
    if not plain:
        return None
    (group,) = numbers.rhs_group_dimensions
    (weight_n,) = {0, 1, 2} - {group, weight_k}
    if weight.source.uses is not None:
        weight.source.uses.multiplied(weight, inputs=(weight_k,), batch=(group,))
    aval = equation.outvars[0].aval
    total = jnp.zeros(aval.shape, aval.dtype)
    if weight.base is not None:
        bind = lambda *inputs: compat.bind(equation, list(inputs))[0]  # noqa: E731
        total = multiplied(bind, lhs, weight.base, sizes)
    for term in weight.terms:
        first, second = (term.a, term.b) if weight_k in term.a.dims else (term.b, term.a)
        if set(first.dims) != {group, weight_k, RANK} or set(second.dims) != {
            group,
            weight_n,
            RANK,
        }:
            return None
        x = dropped(lhs if rows_k == 1 else lhs.T, term)
        thin = _grouped(x, first, (group, weight_k, RANK), sizes, x.dtype, params["precision"])
        thin = term.scaled(thin)
        order = (group, RANK, weight_n)
        total = total + _grouped(thin, second, order, sizes, aval.dtype, params["precision"])
    return [total]


def _grouped(
    x: jax.Array, factor: Factor, order: tuple[int, ...], sizes: Any, dtype: Any, precision: Any
) -> jax.Array:
    array = factor.array.astype(x.dtype).transpose([factor.dims.index(dim) for dim in order])
    return lax.ragged_dot(x, array, sizes, precision=precision, preferred_element_type=dtype)


RULES = {"dot_general": dot_general, "ragged_dot_general": ragged_dot}
