"""A frozen base that is no array: formed inside of the product that wants it, and never kept.

What a function does with such a base before it multiplies is noted down and done when the base is
formed. Cuts along batch axes (one layer of a stack, one expert) are made on the stored form, so
that no more is formed than is multiplied with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from lora_jax.transform import compat
from lora_jax.transform.explicit import automatic
from lora_jax.tree import Packed

_static = {"static": True}

# What treats every element alike, so that a cut may as well be made before it.
_POINTWISE = {"convert_element_type", "neg", "mul", "div", "name", "pvary"}


_IDENTITY = {"copy", "copy_p"}


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """An equation, as a function of its inputs.

    Two that do the same are equal, so that the branches of a `cond` may return the same base and
    layers that share a jitted function share its trace.
    """

    equation: Any

    @property
    def _does(self) -> Any:
        return self.equation.primitive, tuple(sorted(self.equation.params.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bound) and (
            self.equation is other.equation or self._does == other._does
        )

    def __hash__(self) -> int:
        return hash(self.equation.primitive)

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """Its outputs."""
        return compat.bind(self.equation, inputs)

    @property
    def is_pointwise(self) -> bool:
        """Whether it treats every element alike."""
        return self.equation.primitive.name in _POINTWISE


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A sharding to which the base is held, as a function of it."""

    sharding: Any
    is_pointwise = False

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """The array, held to the sharding."""
        return [lax.with_sharding_constraint(inputs[0], self.sharding)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Something done to a base before it is multiplied with.

    Attributes:
      others: the other inputs.
      call: what is done.
      place: which input the base is.
      output: which of the outputs it becomes.
    """

    others: tuple[Any, ...]
    call: Bound | Constraint = dataclasses.field(metadata=_static)
    place: int = dataclasses.field(metadata=_static)
    output: int = dataclasses.field(metadata=_static)

    @property
    def is_pointwise(self) -> bool:
        """Whether it commutes with cutting the base."""
        alone = all(not isinstance(o, Stored) and np.ndim(o) == 0 for o in self.others)
        return self.call.is_pointwise and alone

    def on(self, array: jax.Array) -> jax.Array:
        """The base after the step."""
        inputs = [other.array() if isinstance(other, Stored) else other for other in self.others]
        inputs.insert(self.place, array)
        return self.call(inputs)[self.output]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """A packed weight and what was done to it since.

    Attributes:
      weight: the weight.
      steps: what to do once it is formed, in order.
    """

    weight: Packed
    steps: tuple[Step, ...] = ()

    def array(self) -> jax.Array:
        """The base as an array: formed, in the weight's dtype, with all steps done."""
        array = automatic(_form, self.weight.sharding)(self.weight).astype(self.weight.dtype)
        for step in self.steps:
            array = step.on(array)
        return array

    @property
    def can_be_cut(self) -> bool:
        """Whether cuts may be made on the stored form."""
        return all(step.is_pointwise for step in self.steps)

    def then(self, call: Bound | Constraint, inputs: Sequence[Any], output: int = 0) -> Stored:
        """The base after one more step; `inputs` are the step's, with this base among them."""
        place = next(place for place, value in enumerate(inputs) if value is self)
        others = (*inputs[:place], *inputs[place + 1 :])
        return Stored(self.weight, (*self.steps, Step(others, call, place, output)))


# One program for all weights of a kind: outside of a jit, each call would compile another.
_form = jax.jit(lambda weight: weight.form())


def bound(equation: Any, values: list[Any]) -> list[Any]:
    """The bases that an equation makes of bases: arrays at once, stored ones when formed."""
    base = next((value for value in values if isinstance(value, Stored)), None)
    if base is None:
        return compat.bind(equation, values)
    if equation.primitive.name in _IDENTITY:
        return values
    cut = _CUTS.get(equation.primitive.name)
    if cut is not None and base is values[0] and base.can_be_cut:
        weight = cut(base.weight, equation.params, values[1:])
        if weight is not None:
            return [Stored(weight, base.steps)]
    call = Bound(equation)
    return [base.then(call, values, output) for output in range(len(equation.outvars))]


def multiplied(product: Callable[..., Any], *values: Any) -> Any:
    """`product(*values)`, stored bases among them formed for it, and again in its backward pass."""
    if not any(isinstance(value, Stored) for value in values):
        return product(*values)

    def formed(*values: Any) -> Any:
        return product(*(v.array() if isinstance(v, Stored) else v for v in values))

    # What it keeps for the backward pass are its inputs: the codes, not what was formed of them.
    return jax.checkpoint(formed)(*values)


def unstacked(base: Stored) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Stored]] | None:
    """Arrays to slice along their axis 0 for slices of the base along its own, and how to rebuild.

    None where axis 0 is not a batch axis, or something was done to the base that mixes slices.
    """
    if 0 not in base.weight.batch or not base.can_be_cut:
        return None
    arrays: list[jax.Array] = []

    def to_front(array: jax.Array, at: int) -> jax.Array:
        arrays.append(jax.numpy.moveaxis(array, at, 0))
        return array

    base.weight.along_batch(0, to_front, size=None)

    def rebuild(pieces: list[jax.Array]) -> Stored:
        rest = iter(pieces)
        weight = base.weight.along_batch(0, lambda array, at: next(rest), size=None)
        return Stored(weight, base.steps)

    return arrays, rebuild


def stackable(base: Stored) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Stored]] | None:
    """Arrays to stack along a new axis 0 for a stack of such bases, and how to rebuild.

    None where something was done to the base that mixes its elements, or differs between bases.
    """
    if not base.can_be_cut or any(step.others for step in base.steps):
        return None
    arrays = jax.tree.leaves(base.weight)
    return arrays, lambda stacks: Stored(base.weight.stacked(stacks), base.steps)


def rows(base: Stored, axis: int, indices: jax.Array, mode: str, order: list[int]) -> Stored | None:
    """The base at some indices along an axis; None where it must be formed to take them.

    Args:
      base: the base.
      axis: the axis picked from.
      indices: integers.
      mode: what to do out of range, as in `jnp.take`.
      order: for each axis of the result, which it is of: the indices' axes, then the others.
    """
    weight = base.weight.picked(axis, indices, mode=mode) if base.can_be_cut else None
    return None if weight is None else Stored(weight.transposed(order), base.steps)


def _transpose(weight: Packed, params: dict[str, Any], others: list[Any]) -> Packed:
    return weight.transposed(params["permutation"])


def _squeeze(weight: Packed, params: dict[str, Any], others: list[Any]) -> Packed | None:
    axes = params["dimensions"]
    if not set(axes) <= set(weight.batch):
        return None
    for axis in sorted(axes, reverse=True):
        weight = weight.along_batch(axis, lambda array, at: lax.squeeze(array, (at,)), size=None)
    return weight


def _slice(weight: Packed, params: dict[str, Any], others: list[Any]) -> Packed | None:
    shape = weight.shape
    strides = params["strides"] or (1,) * len(shape)
    bounds = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    cut = [axis for axis, length in enumerate(shape) if bounds[axis] != (0, length, 1)]
    if not set(cut) <= set(weight.batch):
        return None
    for axis in cut:
        start, stop, stride = bounds[axis]
        weight = weight.along_batch(
            axis,
            lambda array, at, b=bounds[axis]: lax.slice_in_dim(array, *b, axis=at),  # type: ignore
            size=len(range(start, stop, stride)),
        )
    return weight


def _dynamic_slice(weight: Packed, params: dict[str, Any], others: list[Any]) -> Packed | None:
    shape, sizes = weight.shape, params["slice_sizes"]
    cut = [axis for axis, length in enumerate(shape) if sizes[axis] != length]
    if not set(cut) <= set(weight.batch) or len(others) != len(shape):
        return None
    for axis in cut:
        weight = weight.along_batch(
            axis,
            lambda array, at, a=axis: lax.dynamic_slice_in_dim(
                array, others[a], sizes[a], at, allow_negative_indices=False
            ),
            size=sizes[axis],
        )
    return weight


_CUTS: dict[str, Callable[..., Packed | None]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}
