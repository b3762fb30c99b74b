"""Rule for convolutions: with A first, to `rank` channels, then with B."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform import compat
from lora_jax.transform.explicit import automatic
from lora_jax.transform.stored import multiplied
from lora_jax.transform.view import RANK, Factor, Term, View, dropped, holding
from lora_jax.transform.walk import Walk


def conv_general_dilated(walk: Walk, equation: Any, values: list[Any]) -> list[Any] | None:
    """`conv(x, W) = conv(x, W0) + scale conv(conv(x, A), B)`.

    Each spatial axis of the kernel belongs to one of the factors, whose convolution takes the
    equation's stride, padding and dilation along it; the other factor is 1 wide there.
    """
    x, kernel = values
    params = equation.params
    if isinstance(x, View) or not isinstance(kernel, View) or params["batch_group_count"] != 1:
        return None
    out_axis, in_axis, *space = params["dimension_numbers"].rhs_spec
    kernel = holding(kernel, (in_axis, *space))
    if not all(_separable(term, out_axis, in_axis, tuple(space)) for term in kernel.terms):
        return None
    if kernel.source.uses is not None:
        kernel.source.uses.multiplied(kernel, inputs=(in_axis, *space), batch=())
    aval = equation.outvars[0].aval
    total = jnp.zeros(aval.shape, aval.dtype)
    if kernel.base is not None:
        bind = lambda x, kernel: compat.bind(equation, [x, kernel])[0]  # noqa: E731
        total = multiplied(bind, x, kernel.base)
    update = automatic(lambda term, x: _term(term, dropped(x, term), params), aval.sharding)
    for term in kernel.terms:
        total = total + update(term, x).astype(aval.dtype)
    return [total]


def _separable(term: Term, out_axis: int, in_axis: int, space: tuple[int, ...]) -> bool:
    """Whether input and output channels lie apart, and each spatial axis in one factor only."""
    first, second = _order(term, out_axis)
    both = set(first.dims) & set(second.dims) & set(space)
    return not both and out_axis not in first.dims and in_axis not in second.dims


def _order(term: Term, out_axis: int) -> tuple[Factor, Factor]:
    return (term.b, term.a) if out_axis in term.a.dims else (term.a, term.b)


def _term(term: Term, x: jax.Array, params: dict[str, Any]) -> jax.Array:
    numbers = params["dimension_numbers"]
    out_axis, in_axis, *space = numbers.rhs_spec
    groups = params["feature_group_count"]
    first, second = _order(term, out_axis)

    # [rank, in, *space], the same for every group, each group's ranks together.
    one = _kernel(first, (RANK, in_axis, *space)).astype(x.dtype)
    one = jnp.tile(one, (groups,) + (1,) * (one.ndim - 1))
    # [out, rank, *space]
    two = _kernel(second, (out_axis, RANK, *space)).astype(x.dtype)
    feature_first = tuple(range(len(space) + 2))

    def convolve(inputs: jax.Array, weight: jax.Array, lhs_spec: Any, held: Factor) -> jax.Array:
        def along(name: str, neutral: Any) -> tuple[Any, ...]:
            return tuple(
                value if axis in held.dims else neutral
                for axis, value in zip(space, params[name], strict=True)
            )

        return lax.conv_general_dilated(
            inputs,
            weight,
            along("window_strides", 1),
            along("padding", (0, 0)),
            lhs_dilation=along("lhs_dilation", 1),
            rhs_dilation=along("rhs_dilation", 1),
            dimension_numbers=lax.ConvDimensionNumbers(lhs_spec, feature_first, numbers.out_spec),
            feature_group_count=groups,
            precision=params["precision"],
        )

    thin = term.scaled(convolve(x, one, numbers.lhs_spec, first))
    return convolve(thin, two, numbers.out_spec, second)


def _kernel(factor: Factor, order: tuple[int, ...]) -> jax.Array:
    """A factor's array with the axes in `order`, 1 wide along those it does not hold."""
    held = [dim for dim in order if dim in factor.dims]
    array = factor.array.transpose([factor.dims.index(dim) for dim in held])
    return jnp.expand_dims(array, [at for at, dim in enumerate(order) if dim not in factor.dims])


RULES = {"conv_general_dilated": conv_general_dilated}
