"""Rules for what happens to every element alike: casts, scalar factors, markers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.transform import compat
from lora_jax.transform.stored import Constraint, Stored, bound
from lora_jax.transform.view import RANK, Factor, Term, View
from lora_jax.transform.walk import Walk


def _with_base(view: View, equation: Any, others: list[Any]) -> View:
    base = None if view.base is None else bound(equation, [view.base, *others])[0]
    dtype = equation.outvars[0].aval.dtype
    return dataclasses.replace(view, base=base, dtype=jnp.dtype(dtype))


def _each_factor(view: View, change: Callable[[Factor], Factor]) -> View:
    terms = tuple(
        dataclasses.replace(term, a=change(term.a), b=change(term.b)) for term in view.terms
    )
    return dataclasses.replace(view, terms=terms)


def convert(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """A cast: factors are cast when they are used, to the dtype that the view has then."""
    if not jnp.issubdtype(equation.params["new_dtype"], jnp.inexact):
        return None
    return [_with_base(values[0], equation, values[1:])]


def each_array(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """A marker that leaves values alone, such as `copy`: bound on the base and on each factor."""
    (view,) = values

    def mark(factor: Factor) -> Factor:
        return factor.now(compat.bind(equation, [factor.array])[0])

    return [_each_factor(_with_base(view, equation, []), mark)]


def base_only(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """A placement on devices, which thin factors do not need."""
    return [_with_base(values[0], equation, values[1:])] if len(values) == 1 else None


def barrier(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """`optimization_barrier` over all arrays at once, as it was."""
    return list(lax.optimization_barrier(tuple(values)))


def negate(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """-W."""
    view = values[0]
    terms = tuple(dataclasses.replace(term, scale=-term.scale) for term in view.terms)
    return [dataclasses.replace(_with_base(view, equation, []), terms=terms)]


def add(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """The sum of two weights, as their terms side by side; where one is an array, a new base."""
    left, right = values
    both = isinstance(left, View) and isinstance(right, View)
    if left.shape != right.shape or (both and walk.finds_roles(values)):
        return None
    bases = [value.base if isinstance(value, View) else value for value in values]
    given = [base for base in bases if base is not None]
    base = bound(equation, given)[0] if len(given) == 2 else (given or [None])[0]
    terms = [term for value in values if isinstance(value, View) for term in value.terms]
    view = left if isinstance(left, View) else right
    return [dataclasses.replace(view, base=base, terms=tuple(terms))]


def subtract(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """A weight less an array, or an array less a weight."""
    left, right = values
    if left.shape != right.shape or (isinstance(left, View) and isinstance(right, View)):
        return None
    view, sign = (left, 1) if isinstance(left, View) else (right, -1)
    if view.base is None:
        return None
    plain = [value.base if isinstance(value, View) else value for value in values]
    terms = tuple(dataclasses.replace(term, scale=sign * term.scale) for term in view.terms)
    return [dataclasses.replace(view, base=bound(equation, plain)[0], terms=terms)]


def multiply(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """W times a scalar, from either side."""
    left, right = values
    view, scalar = (left, right) if isinstance(left, View) else (right, left)
    if isinstance(scalar, View) or np.ndim(scalar) != 0:
        return None
    return _scaled(equation, values, view, scalar, lambda value: value)


def divide(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """W over a scalar."""
    view, scalar = values
    if not isinstance(view, View) or isinstance(scalar, View) or np.ndim(scalar) != 0:
        return None
    return _scaled(equation, values, view, scalar, _inverse)


def _inverse(value: Any) -> Any:
    with np.errstate(divide="ignore"):  # As in JAX, 1 / 0 is infinite.
        return np.divide(1.0, value) if isinstance(value, float) else 1 / value


def _scaled(
    equation: Any,
    values: list[Any],
    view: View,
    scalar: Any,
    factor: Callable[[Any], Any],
) -> list[Any]:
    plain = [value.base if isinstance(value, View) else value for value in values]
    base = None if view.base is None else bound(equation, plain)[0]

    def scale(term: Term) -> Term:
        if not isinstance(scalar, jax.Array):  # A constant of the program.
            return dataclasses.replace(term, scale=term.scale * float(factor(float(scalar))))
        gain = factor(scalar)
        return dataclasses.replace(term, gain=gain if term.gain is None else term.gain * gain)

    dtype = jnp.dtype(equation.outvars[0].aval.dtype)
    return [dataclasses.replace(view, base=base, dtype=dtype, terms=tuple(map(scale, view.terms)))]


def sharding_constraint(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """The base's constraint, and on each factor the part for the axes it holds."""
    (view,) = values
    return [constrain(_with_base(view, equation, []), equation.params["sharding"], base=False)]


def reshard(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """The base laid out anew on a mesh with explicit axes, and each factor along with it."""
    (view,) = values
    sharding = equation.params["dst_sharding"]

    def lay(factor: Factor) -> Factor:
        return factor.now(jax.sharding.reshard(factor.array, factor_spec(sharding.spec, factor)))

    return [_each_factor(_with_base(view, equation, []), lay)]


def constrain(value: Any, sharding: Any, *, base: bool = True) -> Any:
    """An array, or a view's factors and (with `base`) its base, held to a sharding."""
    if not isinstance(value, View):
        return lax.with_sharding_constraint(value, sharding)
    if base and value.base is not None:
        if isinstance(value.base, Stored):
            held = value.base.then(Constraint(sharding), [value.base])
        else:
            held = lax.with_sharding_constraint(value.base, sharding)
        value = dataclasses.replace(value, base=held)
    if not isinstance(sharding, NamedSharding):
        return value

    def hold(factor: Factor) -> Factor:
        spec = factor_spec(sharding.spec, factor)
        placed = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
        return factor.now(lax.with_sharding_constraint(factor.array, placed))

    return _each_factor(value, hold)


def factor_spec(spec: PartitionSpec, factor: Factor) -> PartitionSpec:
    """A factor's part of its weight's partition; the rank is replicated."""
    parts = dict(enumerate(spec))
    return PartitionSpec(*(None if d == RANK else parts.get(d) for d in factor.dims))


RULES = {
    "convert_element_type": convert,
    "copy": each_array,
    "copy_p": each_array,
    "stop_gradient": each_array,
    "name": each_array,
    "pvary": each_array,
    "device_put": base_only,
    "optimization_barrier": barrier,
    "neg": negate,
    "add": add,
    "add_any": add,
    "sub": subtract,
    "mul": multiply,
    "div": divide,
    "reshard": reshard,
    "sharding_constraint": sharding_constraint,
}
