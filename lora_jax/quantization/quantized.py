"""A quantized weight, and how it is made from an array and formed again."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lora_jax.adapters.lora import Axes
from lora_jax.quantization.formats import (
    CODES,
    Format,
    dequantize_scales,
    lookup,
    nearest,
    over,
    quantize_scales,
)
from lora_jax.tree import Packed

_static = {"static": True}

LARGEST = 8e37
"""Above it, the inverse of a scale is too small for float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nested:
    """The scales of the scales, when they are quantized too.

    Attributes:
      absmax: float32 `[*batch, ceil(scales / 256)]`.
      mean: float32 `[*batch]`, of all scales of one matrix.
    """

    absmax: jax.Array
    mean: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(Packed):
    """A frozen weight in 4 bits, as in QLoRA (Dettmers et al. 2023, arXiv:2305.14314), or in 8.

    An element is `code value * scale`. The in axes are flattened to one, padded with zeros to whole
    blocks, and cut into blocks for each output. Codes keep that axis in front of the out axes: the
    two that share a byte lie in neighbouring rows, so that on a TPU unpacking moves no lanes.

    Attributes:
      codes: uint8 `[*batch, in / 2, *out]`, two codes a byte, the even element in the high bits;
        int8 `[*batch, in, *out]` for int8.
      scales: `[*batch, *out, in / block_size]`: float32, or uint8 when `nested`; for int8
        `[*batch, *out, 1]`.
      nested: the scales' own scales, or None.
      axes: which of the weight's axes are batch, in and out.
      stands_for: shape and dtype of the weight.
      format: how it is stored.
      compute_dtype: dtype in which it is formed to be multiplied with.
      path: where in the parameter tree it stands.
    """

    codes: jax.Array
    scales: jax.Array
    nested: Nested | None
    axes: Axes = dataclasses.field(metadata=_static)
    stands_for: jax.ShapeDtypeStruct = dataclasses.field(metadata=_static)
    format: Format = dataclasses.field(metadata=_static)
    compute_dtype: str = dataclasses.field(metadata=_static)
    path: str = dataclasses.field(default="", metadata=_static)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it stands for."""
        return self.stands_for.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight it stands for."""
        return self.stands_for.dtype

    @property
    def ndim(self) -> int:
        """Number of axes of the weight it stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the weight it stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, scales and padding included."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def batch(self) -> tuple[int, ...]:
        """Axes that can be cut without forming the weight."""
        return self.axes.batch

    def check(self) -> None:
        """Raises ValueError if the arrays are not those of this weight any more."""
        batch, _, outputs = (
            tuple(self.shape[axis] for axis in group) for group in dataclasses.astuple(self.axes)
        )
        shape, dtype = tuple(self.codes.shape), self.codes.dtype
        length = self.shape and shape[len(batch)] if len(shape) > len(batch) else 0
        if shape != (*batch, length, *outputs) or dtype not in (jnp.uint8, jnp.int8):
            raise ValueError(
                f"{self.path}: a quantized weight's arrays were cut or cast by themselves: it "
                f"stands for {self.dtype}{list(self.shape)}, but its codes are "
                f"{dtype}{list(shape)}. Cut a stack inside of a function that `lift` is given, "
                "and cast before `quantize`."
            )

    def scale_values(self) -> Float[Array, "*batch_out blocks"]:
        """The scales as numbers, float32 `[*batch, *out, blocks]`."""
        if self.nested is None:
            return lax.stop_gradient(self.scales)
        nested = lax.stop_gradient(self.nested)
        form = over(len(self.axes.batch), dequantize_scales)
        return form(self.scales, nested.absmax, nested.mean)

    def form(self, dtype: Any = None) -> jax.Array:
        """The weight as one dense array, in its own shape.

        Args:
          dtype: of the result, by default `compute_dtype`.
        """
        self.check()
        at = len(self.axes.batch)
        scales = _blocks_first(self.scale_values(), at)  # [*batch, blocks, *out]
        if self.format.in_four_bits:
            values = lookup(_nibbles(self.codes, at), CODES[self.format.name], jnp.float32)
        else:
            values = self.codes.astype(jnp.float32)
        blocks, shape = scales.shape[at], values.shape
        cut = values.reshape(*shape[:at], blocks, -1, *shape[at + 1 :])
        formed = (
            (cut * jnp.expand_dims(scales, at + 1))
            .reshape(shape)
            .astype(dtype or self.compute_dtype)
        )
        inputs = [self.shape[axis] for axis in self.axes.inputs]
        formed = lax.slice_in_dim(formed, 0, math.prod(inputs), axis=at)
        formed = formed.reshape(*shape[:at], *inputs, *shape[at + 1 :])
        order = (*self.axes.batch, *self.axes.inputs, *self.axes.outputs)
        return formed.transpose([order.index(axis) for axis in range(self.ndim)])

    def transposed(self, permutation: Sequence[int]) -> Quantized:
        """The same codes, the weight's axes in another order."""
        place = tuple(permutation).index
        axes = Axes(*(tuple(map(place, group)) for group in dataclasses.astuple(self.axes)))
        return self._now(axes, tuple(self.shape[axis] for axis in permutation))

    def along_batch(
        self, axis: int, function: Callable[[jax.Array, int], jax.Array], size: int | None
    ) -> Quantized:
        """Every array changed along one batch axis, without forming the weight.

        Args:
          axis: the batch axis.
          function: `(array, the array's axis) -> array`.
          size: the axis' size afterwards, or None if the function removes it.
        """
        at = self.axes.batch.index(axis)
        changed = jax.tree.map(lambda array: function(array, at), self)
        shape = list(self.shape)
        if size is not None:
            shape[axis] = size
            return changed._now(self.axes, tuple(shape))
        del shape[axis]
        groups = dataclasses.astuple(self.axes)
        axes = Axes(*(tuple(a - (a > axis) for a in group if a != axis) for group in groups))
        return changed._now(axes, tuple(shape))

    def stacked(self, arrays: Sequence[Any]) -> Quantized:
        """A stack of such weights along a new batch axis 0.

        Args:
          arrays: in the order of the weight's own, each with the new axis in front.
        """
        changed = jax.tree.unflatten(jax.tree.structure(self), arrays)
        batch, inputs, outputs = (
            tuple(axis + 1 for axis in group) for group in dataclasses.astuple(self.axes)
        )
        shape = (arrays[0].shape[0], *self.shape)
        return changed._now(Axes((0, *batch), inputs, outputs), shape)

    def picked(self, axis: int, indices: jax.Array, *, mode: str) -> Quantized | None:
        """The weight at some indices along a batch or out axis, without forming the rest.

        Args:
          axis: which axis; an in axis gives None, since its elements share bytes and blocks.
          indices: integers; their axes come first in the result, then the weight's other axes.
          mode: as in `jnp.take`; `"fill"` makes what is out of range NaN.
        """
        batch, inputs, outputs = dataclasses.astuple(self.axes)
        if axis in inputs:
            return None
        group = batch if axis in batch else outputs
        at = group.index(axis)
        codes_at, scales_at = (at, at) if group is batch else (
            len(batch) + 1 + at, len(batch) + at
        )  # fmt: skip
        bare = self.unnested()
        codes = jnp.take(
            bare.codes, indices, axis=codes_at, mode="clip" if mode == "fill" else mode
        )
        scales = jnp.take(bare.scales, indices, axis=scales_at, mode=mode)
        count = indices.ndim
        renamed = lambda a: a + count - (a > axis)  # noqa: E731
        groups = [
            tuple(n for a in g for n in (range(count) if a == axis else (renamed(a),)))
            for g in (batch, inputs, outputs)
        ]
        shape = (*indices.shape, *(n for a, n in enumerate(self.shape) if a != axis))
        return dataclasses.replace(bare, codes=codes, scales=scales)._now(Axes(*groups), shape)

    def unnested(self) -> Quantized:
        """The same weight with its scales as float32."""
        if self.nested is None:
            return self
        format = dataclasses.replace(self.format, double_quant=False)
        return dataclasses.replace(self, scales=self.scale_values(), nested=None, format=format)

    def partition(self, spec: Any, shape: tuple[int, ...] | None = None) -> Quantized | None:
        """The weight with a `PartitionSpec` in place of each array.

        Codes and scales follow the weight's axes, the flattened in axis the first of them; scales
        of scales follow the batch axes alone.

        Args:
          spec: the partition of the weight's axes.
          shape: of one device's part. Given, the answer is None unless each device can form its
            part from its own arrays: whole blocks, and scales that are not nested.
        """
        parts = dict(enumerate(spec))
        batch, inputs, outputs = ([parts.get(a) for a in g] for g in dataclasses.astuple(self.axes))
        along, *others = inputs
        if shape is not None:
            length = math.prod(shape[axis] for axis in self.axes.inputs)
            whole = not self.format.in_four_bits or length % self.format.block_size == 0
            if self.nested is not None or any(others) or (along is not None and not whole):
                return None
        blocks = along if self.format.in_four_bits else None
        nested = self.nested and Nested(PartitionSpec(*batch, None), PartitionSpec(*batch))  # type: ignore
        return dataclasses.replace(
            self,
            codes=PartitionSpec(*batch, along, *outputs),
            scales=PartitionSpec(*batch, *outputs, blocks),
            nested=nested,
        )

    def unpartitioned(self, codes: Any) -> PartitionSpec:
        """The partition of the weight's axes, from that of its codes: the inverse of `partition`.

        Args:
          codes: a `PartitionSpec` of the codes' axes; may be shorter.
        """
        batch, (along, *_), outputs = dataclasses.astuple(self.axes)
        order = (*batch, along, *outputs)
        parts = dict(zip(order, (*codes, *[None] * (len(order) - len(codes))), strict=True))
        return PartitionSpec(*(parts.get(axis) for axis in range(self.ndim)))

    @property
    def sharding(self) -> NamedSharding:
        """How the weight it stands for is split, as the type of its codes says."""
        found = jax.typeof(self.codes).sharding
        return NamedSharding(found.mesh, self.unpartitioned(found.spec))

    def part(self, shape: tuple[int, ...]) -> Quantized:
        """One device's part of the weight, with that part's shape."""
        return self._now(self.axes, shape)

    def again(self, array: Any) -> Quantized:
        """Another array of this shape, quantized in the same way.

        Raises:
          ValueError: it holds a NaN or an infinity.
        """
        return quantize_array(
            array, self.axes, self.format,
            compute_dtype=self.compute_dtype, dtype=self.dtype, path=self.path,
        )  # fmt: skip

    def _now(self, axes: Axes, shape: tuple[int, ...]) -> Quantized:
        stands_for = jax.ShapeDtypeStruct(shape, self.dtype)
        return dataclasses.replace(self, axes=axes, stands_for=stands_for)


def quantize_array(
    array: Any,
    axes: Axes,
    format: Format,
    *,
    compute_dtype: str = "bfloat16",
    dtype: Any = None,
    path: str = "",
) -> Quantized:
    """Quantizes one weight.

    Args:
      array: the weight, floating; or a `jax.ShapeDtypeStruct`, for which the result's arrays are
        abstract, too.
      axes: what each of its axes does; blocks run along the in axes.
      format: how to store it.
      compute_dtype: dtype in which it is formed to be multiplied with.
      dtype: dtype that it stands for, by default its own.
      path: where it stands in the parameter tree.

    Raises:
      ValueError: it is not floating, is empty, or holds a NaN, an infinity or a value whose inverse
        float32 does not have.

    Example:
      >>> import numpy as np
      >>> w = np.linspace(-1, 1, 64 * 2, dtype=np.float32).reshape(64, 2)
      >>> q = quantize_array(w, Axes((), (0,), (1,)), Format(double_quant=False))
      >>> q.codes.shape, q.scales.shape, bool(abs(q.form("float32") - w).max() < 0.16)
      ((32, 2), (2, 1), True)
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{path}: cannot be quantized: expected floating-point values, got {array.dtype} of "
            f"shape {tuple(array.shape)}. Leave it out of `targets`."
        )
    if 0 in array.shape:
        raise ValueError(
            f"{path}: cannot be quantized: expected at least one element, got shape "
            f"{tuple(array.shape)}. Leave it out of `targets`."
        )
    if isinstance(array, jax.ShapeDtypeStruct):
        parts = jax.eval_shape(functools.partial(_encode, axes=axes, format=format), array)[0]
    else:
        parts, bad = _encode(array, axes=axes, format=format)
        if not isinstance(bad, Tracer) and int(bad):
            raise ValueError(
                f"{path}: cannot be quantized: {int(bad)} of its {array.size} values are NaN, "
                f"infinite or above {LARGEST:.0e}; expected finite numbers, since one makes its "
                "whole block useless. Look for where they come from: a damaged file, or a run that "
                "diverged."
            )
    stands_for = jax.ShapeDtypeStruct(tuple(array.shape), jnp.dtype(dtype or array.dtype))
    codes, scales, nested = parts
    dtype_name = jnp.dtype(compute_dtype).name
    return Quantized(codes, scales, nested, axes, stands_for, format, dtype_name, path)


@functools.partial(jax.jit, static_argnames=("axes", "format"))
def _encode(array: jax.Array, *, axes: Axes, format: Format) -> tuple[Any, jax.Array]:
    """`(codes, scales, nested)`, and how many values are not finite."""
    batch, inputs, outputs = (tuple(array.shape[a] for a in g) for g in dataclasses.astuple(axes))
    rows = array.transpose(*axes.batch, *axes.outputs, *axes.inputs)
    rows = rows.reshape(*batch, math.prod(outputs), math.prod(inputs))

    def one(rows: jax.Array) -> Any:
        """From `[out, in]`."""
        rows = rows.astype(jnp.float32)
        codes, scales = _four_bits(rows, format) if format.in_four_bits else _eight_bits(rows)
        nested = None
        if format.in_four_bits and format.double_quant:
            quantized, absmax, mean = quantize_scales(scales.reshape(-1))
            scales, nested = quantized.reshape(scales.shape), Nested(absmax, mean)
        codes = codes.T.reshape(-1, *outputs)
        return codes, scales.reshape(*outputs, -1), nested

    # One matrix of a stack after the other, since each is in float32 meanwhile.
    encode = over(max(0, len(batch) - 1), one)
    parts = lax.map(encode, rows) if batch else encode(rows)
    return parts, jnp.sum(~(jnp.abs(array.astype(jnp.float32)) < LARGEST))


def _four_bits(rows: jax.Array, format: Format) -> tuple[jax.Array, jax.Array]:
    """Packed codes `[out, in / 2]` and scales `[out, blocks]` of `[out, in]`."""
    count = -(-rows.shape[1] // format.block_size)
    padded = jnp.pad(rows, ((0, 0), (0, count * format.block_size - rows.shape[1])))
    blocks = padded.reshape(rows.shape[0], count, format.block_size)
    absmax = jnp.abs(blocks).max(-1)
    # Times the inverse, not over the scale: the last bit decides ties as in the published code.
    scaled = jnp.clip(blocks * (1 / jnp.maximum(absmax, 1e-38))[..., None], -1, 1)
    codes = nearest(scaled, CODES[format.name]).reshape(rows.shape[0], -1, 2)
    return (codes[..., 0] << 4) | codes[..., 1], absmax


def _eight_bits(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes `[out, in]` from -127 to 127 and scales `[out, 1]` of `[out, in]`."""
    scales = jnp.abs(rows).max(-1, keepdims=True) / 127
    codes = jnp.round(rows / jnp.where(scales > 0, scales, 1))
    return codes.astype(jnp.int8), scales


def _blocks_first(scales: jax.Array, axis: int) -> jax.Array:
    """The last axis moved to `axis`, once and for all elements of a block.

    Fused into what forms the elements, a scale would be computed and read across anew for each: on
    a TPU 255 selects instead of 15, on a CPU twice the time.
    """

    def product(scales: jax.Array) -> jax.Array:
        # A CPU drops the barrier, but no fusion goes through a product; this one is exact.
        one = jnp.eye(scales.shape[-1], dtype=scales.dtype)
        moved = lax.dot_general(one, scales, (((1,), (scales.ndim - 1,)), ((), ())))
        return jnp.moveaxis(moved, 0, axis)

    def barrier(scales: jax.Array) -> jax.Array:
        return lax.optimization_barrier(jnp.moveaxis(scales, -1, axis))

    if not jax.sharding.get_abstract_mesh().empty:
        return barrier(scales)  # A product over blocks that are split would move them.
    return lax.platform_dependent(scales, cpu=product, default=barrier)


def _nibbles(codes: jax.Array, axis: int) -> jax.Array:
    """Each byte's high and low half, one after the other along an axis."""
    # Without `total_repeat_length`, which would make a gather of it.
    twice = jnp.repeat(codes, 2, axis=axis)
    odd = lax.broadcasted_iota(jnp.uint8, twice.shape, axis) & np.uint8(1)
    return (twice >> (np.uint8(4) * (np.uint8(1) - odd))) & np.uint8(15)
