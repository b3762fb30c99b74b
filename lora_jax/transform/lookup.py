"""Rule for gathers: embedding lookup, and indexing of stacked weights with an array."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform import compat
from lora_jax.transform.einsum import Named, multiply
from lora_jax.transform.explicit import automatic
from lora_jax.transform.stored import Stored, bound, rows
from lora_jax.transform.view import RANK, Factor, Term, View, holding, named
from lora_jax.transform.walk import Walk

_MODES = {
    lax.GatherScatterMode.CLIP: "clip",
    lax.GatherScatterMode.PROMISE_IN_BOUNDS: "clip",
    lax.GatherScatterMode.FILL_OR_DROP: "fill",
}
_STAYS_INSIDE = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def gather(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """Whole rows of a weight, picked along one axis by an array of indices.

    A table `[vocab, dim]` gives the rows `W0[ids] + scale A[ids] B`. A stack of two or more further
    axes gives a stack of weights, still virtual: one expert's kernel for each index.
    """
    view, indices = values
    params = equation.params
    numbers = params["dimension_numbers"]
    if not isinstance(view, View):
        return None
    sizes = params["slice_sizes"]
    stacked = tuple(numbers.operand_batching_dims)
    cut = [a for a in range(view.ndim) if sizes[a] != view.shape[a] and a not in stacked]
    if not cut and len(numbers.start_index_map) == 1:
        cut = list(numbers.start_index_map)
    if len(cut) != 1 or not set(numbers.collapsed_slice_dims) <= set(cut):
        return None
    if len(numbers.start_index_map) > 1 and params["mode"] not in _STAYS_INSIDE:
        return None  # An index along a whole axis could make the row a filler.
    (picked,) = cut
    view = holding(view, (picked,))
    if picked not in numbers.start_index_map:
        return None
    column = numbers.start_index_map.index(picked)
    indices_of_picked = indices[..., column : column + 1]
    # The output's axes: the index array's (in order, its last one aside) and the whole axes.
    aval = equation.outvars[0].aval
    index_axes = [axis for axis in range(len(aval.shape)) if axis not in numbers.offset_dims]
    offsets = [a for a in range(view.ndim) if a not in (*numbers.collapsed_slice_dims, *stacked)]
    place = dict(zip(offsets, numbers.offset_dims, strict=True))
    for axis, at in zip(stacked, numbers.start_indices_batching_dims, strict=True):
        place[axis] = index_axes[at]
    whole = [axis for axis in offsets if axis != picked]
    collapsed = picked in numbers.collapsed_slice_dims

    def pick(factor: Factor, indices: Any = indices_of_picked) -> Factor:
        """The factor's rows; its array's axes are the index axes, then the others."""
        if picked not in factor.dims:
            return factor.renamed(place.__getitem__)
        gone = (*stacked, picked) if collapsed else stacked
        kept = [d for d in factor.dims if d not in gone]
        at = factor.dims.index(picked)
        # The base has the filler: what is added to it there is zero, not another filler.
        fill = 0 if jnp.issubdtype(factor.array.dtype, jnp.inexact) else None
        array = lax.gather(
            factor.array,
            indices,
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(index_axes), len(index_axes) + len(kept))),
                collapsed_slice_dims=(at,) if collapsed else (),
                start_index_map=(at,),
                operand_batching_dims=tuple(factor.dims.index(axis) for axis in stacked),
                start_indices_batching_dims=numbers.start_indices_batching_dims,
            ),
            [n if d == RANK else sizes[d]
             for d, n in zip(factor.dims, factor.array.shape, strict=True)],
            unique_indices=params["unique_indices"],
            indices_are_sorted=params["indices_are_sorted"],
            mode=params["mode"],
            fill_value=fill,
        )  # fmt: skip
        return factor.now(array, (*index_axes, *(d if d == RANK else place[d] for d in kept)))

    held = [factor.dims for term in view.terms for factor in (term.a, term.b)]
    if any(picked in dims and not set(stacked) <= set(dims) for dims in held):
        return None
    base: Any = None
    if isinstance(view.base, Stored):
        base = None
        if len(numbers.start_index_map) == 1 and collapsed and params["fill_value"] is None:
            kept = [axis for axis in range(view.ndim) if axis != picked]
            sources = [*index_axes, *(place[axis] for axis in kept)] if not stacked else []
            order = [sources.index(axis) for axis in range(len(sources))]
            mode = _MODES[params["mode"]]
            base = rows(view.base, picked, indices[..., 0], mode, order) if order else None
        base = base or bound(equation, [view.base, indices])[0]
    elif view.base is not None:
        base = compat.bind(equation, [view.base, indices])[0]
    if len(whole) > 1:
        terms = tuple(term.map(pick) for term in view.terms)
        origin = [frozenset[int]()] * len(aval.shape)
        for axis in whole:
            origin[place[axis]] = view.origin[axis]
        return [
            dataclasses.replace(
                view, base=base, terms=terms, shape=tuple(aval.shape), origin=tuple(origin)
            )
        ]
    if view.source.uses is not None:
        view.source.uses.looked_up(view, inputs=(picked,), batch=stacked)
    if isinstance(base, Stored):
        base = base.array()  # Rows are activations.
    total = jnp.zeros(aval.shape, aval.dtype) if base is None else base
    names = tuple(f"o{axis}" for axis in range(len(aval.shape)))
    lengths = dict(zip(names, aval.shape, strict=True))

    def update(term: Term, indices: jax.Array) -> jax.Array:
        # Whichever factor holds the table's rows is an activation now, and comes first.
        parts: list[Named] = [
            named(pick(factor, indices), names.__getitem__, view.dtype)
            for factor in (term.a, term.b)
        ]
        parts.sort(key=lambda part: -sum(part.names.count(names[axis]) for axis in index_axes))
        delta = multiply(parts[0], parts[1:], names, lengths, dtype=view.dtype)
        return term.scaled(delta)

    for term in view.terms:
        delta = automatic(update, aval.sharding)(term, indices_of_picked)
        total = total + delta.astype(total.dtype)
    return [total]


RULES = {"gather": gather}
