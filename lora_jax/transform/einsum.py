"""Products of a few arrays with named axes, two at a time in the cheapest order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax


@dataclasses.dataclass(frozen=True)
class Named:
    """An array and a name for each of its axes; the same name is the same index."""

    array: jax.Array
    names: tuple[str, ...]


def multiply(
    x: Named,
    factors: Sequence[Named],
    out: tuple[str, ...],
    sizes: dict[str, int],
    *,
    dtype: Any,
    precision: Any = None,
    midway: Callable[[jax.Array], jax.Array] = lambda array: array,
) -> jax.Array:
    """Sums x times the factors over every name that is not in `out`.

    Multiplies into x whichever factor is cheapest next, so that the factors of an update are never
    multiplied with each other first.

    Args:
      x: what to start from.
      factors: the others, at least one, of the dtype of x.
      out: names of the result's axes, in order.
      sizes: size of each name in `out`; one that no operand has is broadcast.
      dtype: dtype of the result.
      precision: as in `jax.lax.dot_general`.
      midway: applied to the first product, which for x A B is the thin x A.

    Returns:
      The product, `[*out]`.
    """
    narrow = x.array.dtype
    rest = list(factors)
    # A batch of one: with two free axes instead of one, XLA transposes the cotangent for B's sake.
    x = _squeezed(x, {name for factor in factors for name in factor.names})
    while rest:
        factor = min(rest, key=lambda factor: _cost(x, factor))
        first = len(rest) == len(factors)
        rest = [other for other in rest if other is not factor]
        needed = {name for other in rest for name in other.names} | set(out)
        x = _pair(x, factor, needed, dtype=narrow if rest else dtype, precision=precision)
        if first:
            x = Named(midway(x.array), x.names)
    return _arrange(x, out, sizes)


def _squeezed(operand: Named, shared: set[str]) -> Named:
    units = [
        axis
        for axis, (name, size) in enumerate(zip(operand.names, operand.array.shape, strict=True))
        if size == 1 and name not in shared
    ]
    names = tuple(name for axis, name in enumerate(operand.names) if axis not in units)
    return Named(lax.squeeze(operand.array, units), names) if units else operand


def _cost(one: Named, two: Named) -> int:
    sizes = dict(zip(one.names, one.array.shape, strict=True))
    sizes.update(zip(two.names, two.array.shape, strict=True))
    return math.prod(sizes.values())


def _pair(one: Named, two: Named, needed: set[str], *, dtype: Any, precision: Any) -> Named:
    """The product of two operands, summed over what only they have."""
    one, two = (_summed(o, needed | set(p.names)) for o, p in ((one, two), (two, one)))
    shared = [name for name in one.names if name in two.names]
    batch = [name for name in shared if name in needed]
    contracted = [name for name in shared if name not in needed]

    def places(names: list[str]) -> tuple[list[int], list[int]]:
        return [one.names.index(n) for n in names], [two.names.index(n) for n in names]

    array = lax.dot_general(
        one.array,
        two.array,
        (places(contracted), places(batch)),
        precision=precision,
        preferred_element_type=dtype,
    )
    free = [name for operand in (one, two) for name in operand.names if name not in shared]
    return Named(array, (*batch, *free))


def _summed(operand: Named, keep: set[str]) -> Named:
    gone = tuple(axis for axis, name in enumerate(operand.names) if name not in keep)
    if not gone:
        return operand
    return Named(operand.array.sum(gone), tuple(n for n in operand.names if n in keep))


def _arrange(operand: Named, out: tuple[str, ...], sizes: dict[str, int]) -> jax.Array:
    operand = _summed(operand, set(out))
    present = [name for name in out if name in operand.names]
    order = tuple(operand.names.index(name) for name in present)
    array = operand.array if order == tuple(range(len(order))) else operand.array.transpose(order)
    if len(present) == len(out):
        return array
    shape = tuple(sizes[name] for name in out)
    return lax.broadcast_in_dim(array, shape, tuple(out.index(name) for name in present))
