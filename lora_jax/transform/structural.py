"""Rules for what only moves a weight's axes: the base by the equation, each factor where it must.

Every rule says how one factor moves, given that it holds only some of the view's axes. Axes that no
factor holds (inserted by a reshape or a broadcast) need no work at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.transform.stored import bound
from lora_jax.transform.view import RANK, Factor, View, holding
from lora_jax.transform.walk import Walk

Move = Callable[[Factor], Factor | None]


def moved(
    view: View,
    bases: list[Any],
    shapes: Sequence[tuple[int, ...]],
    moves: Sequence[Move],
    origins: Sequence[tuple[frozenset[int], ...]],
) -> list[View] | None:
    """Views of an equation's outputs; None where a factor cannot make the move."""
    outputs = []
    for base, shape, move, origin in zip(bases, shapes, moves, origins, strict=True):
        try:
            terms = tuple(
                term.map(lambda factor, move=move: _must(move(factor))) for term in view.terms
            )
        except _CannotMove:
            return None
        outputs.append(
            dataclasses.replace(view, base=base, terms=terms, shape=shape, origin=origin)
        )
    return outputs


class _CannotMove(Exception):
    pass


def _must(factor: Factor | None) -> Factor:
    if factor is None:
        raise _CannotMove
    return factor


def _structural(
    equation: Any, values: list[Any], move: Move, origin: Sequence[frozenset[int]]
) -> list[Any] | None:
    """Applies an equation with one output, whose first input is the weight."""
    view, *others = values
    if not isinstance(view, View) or any(isinstance(other, View) for other in others):
        return None
    shape = tuple(equation.outvars[0].aval.shape)
    base = None if view.base is None else bound(equation, [view.base, *others])[0]
    return moved(view, [base], [shape], [move], [tuple(origin)])


def transpose(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """Axes in another order: factors keep their arrays, axes change their names."""
    permutation = tuple(equation.params["permutation"])
    return _structural(
        equation,
        values,
        lambda factor: factor.renamed(permutation.index),
        [values[0].origin[axis] for axis in permutation],
    )


def squeeze(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """Axes of size 1 removed."""
    gone = set(equation.params["dimensions"])
    kept = [axis for axis in range(values[0].ndim) if axis not in gone]
    return _structural(
        equation,
        values,
        lambda factor: without(factor, gone).renamed(kept.index),
        [values[0].origin[axis] for axis in kept],
    )


def without(factor: Factor, gone: set[int]) -> Factor:
    """A factor less axes of size 1."""
    axes = tuple(axis for axis, dim in enumerate(factor.dims) if dim in gone)
    if not axes:
        return factor
    return factor.now(
        lax.squeeze(factor.array, axes), tuple(d for d in factor.dims if d not in gone)
    )


def broadcast_in_dim(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """Axes inserted or stretched: factors never hold the copies."""
    view, shape = values[0], equation.params["shape"]
    if not isinstance(view, View) or len(values) > 1:
        return None
    place = tuple(equation.params["broadcast_dimensions"])
    stretched = {axis for axis, new in enumerate(place) if view.shape[axis] != shape[new]}
    origin = [frozenset[int]()] * len(shape)
    for axis, new in enumerate(place):
        origin[new] = view.origin[axis]
    return _structural(
        equation,
        values,
        lambda factor: without(factor, stretched).renamed(place.__getitem__),
        origin,
    )


def reshape(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """Axes split or merged, as long as merged axes belong to the same factor."""
    view = values[0]
    if not isinstance(view, View) or equation.params["dimensions"] is not None:
        return None
    shape = tuple(equation.params["new_sizes"])
    groups = regroup(view.shape, shape)
    if groups is None:
        return None
    origin = [frozenset[int]()] * len(shape)
    for before, after in groups:
        for axis in after:
            origin[axis] = frozenset().union(*(view.origin[b] for b in before))
    units = {axis for axis, length in enumerate(view.shape) if length == 1}
    return _structural(
        equation, values, lambda factor: _regrouped(without(factor, units), groups, shape), origin
    )


Groups = list[tuple[tuple[int, ...], tuple[int, ...]]]


def regroup(before: Sequence[int], after: Sequence[int]) -> Groups | None:
    """Which axes become which in a reshape, axes of size 1 aside.

    >>> regroup((4, 6, 1, 5), (2, 2, 30))
    [((0,), (0, 1)), ((1, 3), (2,))]
    """
    if 0 in before:
        return None
    left = [axis for axis, length in enumerate(before) if length != 1]
    right = [axis for axis, length in enumerate(after) if length != 1]
    groups: Groups = []
    while left or right:
        take, give = [left.pop(0)], [right.pop(0)]
        while (a := math.prod(before[i] for i in take)) != (b := math.prod(after[i] for i in give)):
            if a < b:
                take.append(left.pop(0))
            else:
                give.append(right.pop(0))
        groups.append((tuple(take), tuple(give)))
    return groups


def _regrouped(factor: Factor, groups: Groups, shape: tuple[int, ...]) -> Factor | None:
    order: list[int] = []  # The factor's axes, each group's together and in order.
    lengths: list[int] = []
    dims: list[int] = []
    seen: set[int] = set()
    for dim in factor.dims:
        if dim in seen:
            continue
        if dim == RANK:
            before, after = (RANK,), (RANK,)
        else:
            before, after = next(group for group in groups if dim in group[0])
        if not set(before) <= set(factor.dims):
            return None
        seen.update(before)
        order += [factor.dims.index(b) for b in before]
        dims += after
        lengths += [
            factor.array.shape[factor.dims.index(RANK)] if a == RANK else shape[a] for a in after
        ]
    array = factor.array
    if order != sorted(order):
        array = array.transpose(order)
    return factor.now(
        array if array.shape == tuple(lengths) else array.reshape(lengths), tuple(dims)
    )


def on_axes(operation: Callable[[jax.Array, int, int], jax.Array], axes: Sequence[int]) -> Move:
    """A move that does `operation(array, axis of the array, axis of the view)` on some axes."""

    def move(factor: Factor) -> Factor:
        array = factor.array
        for axis, dim in enumerate(factor.dims):
            if dim in axes:
                array = operation(array, axis, dim)
        return factor.now(array)

    return move


def rev(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """Axes in reverse."""
    move = on_axes(lambda array, axis, _: lax.rev(array, (axis,)), equation.params["dimensions"])
    return _structural(equation, values, move, values[0].origin)


def slice_(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """Static slices along any axes."""
    view, params = values[0], equation.params
    strides = params["strides"] or (1,) * view.ndim
    bounds = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    cut = [axis for axis, length in enumerate(view.shape) if bounds[axis] != (0, length, 1)]
    move = on_axes(
        lambda array, axis, dim: lax.slice_in_dim(array, *bounds[dim], axis=axis),  # type: ignore[misc]
        cut,
    )
    return _structural(equation, values, move, view.origin)


def dynamic_slice(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """Slices of static size at traced places."""
    view, starts = values[0], values[1:]
    if not isinstance(view, View) or len(starts) != view.ndim:
        return None
    sizes = equation.params["slice_sizes"]
    cut = [axis for axis, length in enumerate(view.shape) if sizes[axis] != length]
    move = on_axes(
        lambda array, axis, dim: lax.dynamic_slice_in_dim(
            array, starts[dim], sizes[dim], axis, allow_negative_indices=False
        ),
        cut,
    )
    return _structural(equation, values, move, view.origin)


def split(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """One axis cut into several weights."""
    view: View = values[0]
    sizes, axis = tuple(equation.params["sizes"]), equation.params["axis"]
    bases = [None] * len(sizes) if view.base is None else bound(equation, [view.base])
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    moves = [
        on_axes(
            lambda array, at, _, start=start, length=length: lax.slice_in_dim(
                array, start, start + length, axis=at
            ),
            (axis,),
        )
        for start, length in zip(starts, sizes, strict=True)
    ]
    shapes = [tuple(var.aval.shape) for var in equation.outvars]
    return moved(view, bases, shapes, moves, [view.origin] * len(sizes))


def pad(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """Padding: the base with the value given, the update with zeros."""
    config = equation.params["padding_config"]
    padded = [axis for axis, amounts in enumerate(config) if tuple(amounts) != (0, 0, 0)]

    def along(array: jax.Array, axis: int, dim: int) -> jax.Array:
        amounts = [(0, 0, 0)] * array.ndim
        amounts[axis] = config[dim]
        return lax.pad(array, array.dtype.type(0), amounts)

    if not isinstance(values[0], View):
        return None
    # Each padded axis in at least one factor: zeros there times anything are zeros.
    view = holding(values[0], padded)
    return _structural(equation, [view, *values[1:]], on_axes(along, padded), view.origin)


def all_gather(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """Shards of a weight collected inside a shard_map: of the factors that hold the axis."""
    params, (view,) = equation.params, values
    gathered = params["all_gather_dimension"]
    names = params["axis_name"]
    names = set(names) if isinstance(names, tuple) else {names}
    factors = [factor for term in view.terms for factor in (term.a, term.b)]
    apart = any(factor.split & names and gathered not in factor.dims for factor in factors)
    if not params["tiled"] or apart:
        return None  # Each shard has a factor of its own: what is gathered has no common one.
    move = on_axes(
        lambda array, axis, _: lax.all_gather(
            array,
            params["axis_name"],
            axis=axis,
            tiled=True,
            axis_index_groups=params["axis_index_groups"],
        ),
        (gathered,),
    )
    return _structural(equation, values, move, values[0].origin)


RULES = {
    "transpose": transpose,
    "squeeze": squeeze,
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "rev": rev,
    "slice": slice_,
    "dynamic_slice": dynamic_slice,
    "split": split,
    "pad": pad,
    "all_gather": all_gather,
}
