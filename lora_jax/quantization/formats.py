"""Number formats of quantized weights: their codes, and the map of the quantized scales."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

FormatName: TypeAlias = Literal["nf4", "fp4", "int8"]

NESTED_BLOCK = 256
"""How many scales share one scale of their own in double quantization."""

# Quantiles of N(0, 1), with a code for zero (arXiv:2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A sign, two bits of exponent and one of mantissa; in units of the largest, 12.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(sign * m / 12 for sign in (1, -1) for m in _FP4_MAGNITUDES)

CODES = {"nf4": NF4, "fp4": FP4}


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Attributes:
      name: `"nf4"`, `"fp4"`: 4 bits and a scale for each block; `"int8"`: a scale for each output.
      block_size: how many elements along the in axes share a scale, a power of two from 32 to 4096;
        not used by int8.
      double_quant: whether the scales are quantized, too; not used by int8.
    """

    name: FormatName = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        names = (*CODES, "int8")
        if self.name not in names:
            raise ValueError(f"quantize: format: expected one of {names}, got {self.name!r}.")
        size = self.block_size
        is_size = isinstance(size, int) and not isinstance(size, bool)
        if not is_size or not 32 <= size <= 4096 or size & (size - 1):
            raise ValueError(
                f"quantize: block_size: expected a power of two from 32 to 4096, got {size!r}. "
                "The paper's is 64."
            )

    def __str__(self) -> str:
        if self.name == "int8":
            return self.name
        return f"{self.name}, blocks of {self.block_size}" + ", double" * self.double_quant

    @property
    def in_four_bits(self) -> bool:
        """Whether two codes share a byte."""
        return self.name in CODES


def check_compute_dtype(dtype: Any) -> None:
    """Raises ValueError unless weights can be formed in a dtype."""
    try:
        fits = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(
            f"quantize: compute_dtype: expected a floating-point dtype, got {dtype!r}. "
            '"bfloat16" is what accelerators multiply fastest.'
        )


@functools.cache
def midpoints(codes: tuple[float, ...]) -> np.ndarray:
    """The boundaries between neighbouring values, float32 `[len(codes) - 1]`.

    >>> midpoints((-1.0, 0.0, 0.5))
    array([-0.5 ,  0.25], dtype=float32)
    """
    ordered = np.sort(np.asarray(codes, np.float32), kind="stable")
    return (ordered[:-1] + ordered[1:]) / np.float32(2)


def nearest(scaled: Float[Array, "..."], codes: tuple[float, ...]) -> UInt8[Array, "..."]:
    """The index of the code nearest to each element of `[-1, 1]`; a tie goes to the lower value."""
    # Fifteen comparisons, which fuse into one pass; a search would branch.
    rank = jnp.zeros(scaled.shape, jnp.uint8)
    for bound in midpoints(codes):
        rank += (scaled > bound).astype(jnp.uint8)
    order = np.argsort(np.asarray(codes, np.float32), kind="stable").astype(np.uint8)
    if np.array_equal(order, np.arange(len(codes))):
        return rank
    return lookup(rank, tuple(order.tolist()), jnp.uint8)


def lookup(index: UInt8[Array, "..."], values: tuple[Any, ...], dtype: Any) -> Array:
    """`values[index]` for 2^n values: a tree of selects on the index's bits, or on a CPU a table.

    A gather of single elements is slow on a TPU, which has no instruction for it. Compiled for TPU
    v5e, forming a weight by a table of 16 makes up to 1.6 times the memory traffic of selects, its
    scales by a table of 256 makes 8 times, and a table of 256 pairs of codes 270 times; the selects
    go into the product that wants the result without any temporary. A CPU reads a table no slower
    than it selects; and inside of a loop XLA would keep 16 constants of the weight's size for the
    selects. Arithmetic (a polynomial in the bits) costs more operations than the 15 selects and is
    not exact.
    Measured by `benchmarks/dequantization.py`.
    """

    def selects(index: jax.Array) -> jax.Array:
        chosen: list[Any] = [np.asarray(value, dtype) for value in values]
        for bit in range(int(math.log2(len(values)))):
            is_set = (index & np.uint8(1 << bit)) != 0
            chosen = [
                jnp.where(is_set, high, low)
                for low, high in zip(chosen[::2], chosen[1::2], strict=True)
            ]
        return chosen[0]

    def table(index: jax.Array) -> jax.Array:
        return jnp.asarray(values, dtype).at[index].get(mode="promise_in_bounds")

    return jax.lax.platform_dependent(index, cpu=table, default=selects)


@functools.cache
def dynamic_map() -> np.ndarray:
    """The signed 256-entry map of 8-bit scales, float32, ascending (arXiv:1511.04561).

    Seven decades, each with twice as many values as the one below.

    >>> values = dynamic_map()
    >>> values.shape, float(values[127]), float(values[-1])
    ((256,), 0.0, 1.0)
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = _linspace(0.1, 1, 2**decade + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = (np.float32(10.0 ** (decade - 6)) * means).tolist()
        values += scaled + [-value for value in scaled]
    return np.sort(np.asarray(values, np.float32))


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """float32 points, each half counted from its end and rounded once.

    So is the published map made; NumPy's rounds otherwise, and a map that is off in the last bit
    would not be the one that checkpoints were written with.
    """
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    rising, falling = first + step * index, last - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def quantize_scales(
    scales: Float[Array, " n"],
) -> tuple[UInt8[Array, " n"], Float[Array, " n/256"], Float[Array, ""]]:
    """Double quantization: scales less their mean, in blocks of 256, as entries of the map.

    Args:
      scales: float32, in the order in which blocks of them are formed.

    Returns:
      `(codes, absmax of each block, mean)`.
    """
    mean = scales.mean()
    blocks = _in_blocks(scales - mean)
    absmax = jnp.abs(blocks).max(-1)
    scaled = blocks * (1 / jnp.maximum(absmax, 1e-38))[:, None]
    bounds = jnp.asarray(midpoints(tuple(dynamic_map().tolist())))
    codes = jnp.searchsorted(bounds, scaled, method="scan_unrolled").astype(jnp.uint8)
    return codes.reshape(-1)[: scales.size], absmax, mean


def dequantize_scales(
    codes: UInt8[Array, "*n"], absmax: Float[Array, " n/256"], mean: Float[Array, ""]
) -> Float[Array, "*n"]:
    """The inverse of `quantize_scales`, up to its error.

    Args:
      codes: in any shape whose order is that in which blocks were formed.
      absmax: of each block.
      mean: of all scales.
    """
    # The few absmax take the codes' shape, not the codes that of blocks: where codes are split over
    # devices they stay there.
    each = jnp.repeat(absmax, NESTED_BLOCK)[: codes.size].reshape(codes.shape)
    return lookup(codes, tuple(dynamic_map().tolist()), jnp.float32) * each + mean


def _in_blocks(values: Array) -> Array:
    blocks = -(-values.size // NESTED_BLOCK)
    return jnp.pad(values, (0, blocks * NESTED_BLOCK - values.size)).reshape(blocks, NESTED_BLOCK)


def over(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` mapped over `count` leading axes."""
    for _ in range(count):
        function = jax.vmap(function)
    return function
