"""LoRA: a weight's update as the product of two thin factors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tree import Update


@dataclasses.dataclass(frozen=True)
class Axes:
    """What each axis of a weight does in the function that uses it.

    Attributes:
      batch: axes along which there is one matrix each: stacked layers, experts.
      inputs: axes that are contracted with the activations, or looked up.
      outputs: axes that the result keeps.
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __str__(self) -> str:
        roles = {**dict.fromkeys(self.batch, "batch"), **dict.fromkeys(self.inputs, "in")}
        count = len(self.batch + self.inputs + self.outputs)
        return ", ".join(roles.get(axis, "out") for axis in range(count))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora(Update):
    """The update `scale * A B` of one weight (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
      lora_a: A, `[*batch, *in, rank]`, the base's own axis order within each group.
      lora_b: B, `[*batch, rank, *out]`.
      axes: which of the base's axes are batch, in and out.
      scale: alpha / rank, or alpha / sqrt(rank) when rank-stabilized.
      dropout_rate: probability with which an element of the adapter's input is dropped.
    """

    lora_a: jax.Array
    lora_b: jax.Array
    axes: Axes = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})
    dropout_rate: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.lora_a.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it updates."""
        batch = len(self.axes.batch)
        order = self.axes.batch + self.axes.inputs + self.axes.outputs
        sizes = tuple(self.lora_a.shape[:-1]) + tuple(self.lora_b.shape[batch + 1 :])
        return tuple(size for _, size in sorted(zip(order, sizes, strict=True)))

    def add_to(self, base: jax.Array, sign: int) -> jax.Array:
        """`base + sign * scale * A B`, computed in float32 or wider, in the base's dtype."""
        wide = jnp.promote_types(base.dtype, jnp.float32)
        a, b = self.lora_a.astype(wide), self.lora_b.astype(wide)
        batch, inputs = len(self.axes.batch), len(self.axes.inputs)
        stacked = tuple(range(batch))
        product = jax.lax.dot_general(
            a, b, (((batch + inputs,), (batch,)), (stacked, stacked)), precision="highest"
        )
        order = self.axes.batch + self.axes.inputs + self.axes.outputs
        delta = product.transpose([order.index(axis) for axis in range(len(order))])
        return (base.astype(wide) + sign * self.scale * delta).astype(base.dtype)


def factor_shapes(
    shape: tuple[int, ...], axes: Axes, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B for a weight.

    >>> factor_shapes((12, 64, 4, 16), Axes(batch=(0,), inputs=(1,), outputs=(2, 3)), rank=8)
    ((12, 64, 8), (12, 8, 4, 16))
    """
    batch, inputs, outputs = (
        tuple(shape[axis] for axis in group) for group in dataclasses.astuple(axes)
    )
    return (*batch, *inputs, rank), (*batch, rank, *outputs)


def sides(shape: tuple[int, ...], axes: Axes) -> tuple[int, int]:
    """Sizes of the in and the out side of each of a weight's matrices."""
    inputs, outputs = (math.prod(shape[a] for a in group) for group in (axes.inputs, axes.outputs))
    return inputs, outputs


def parameter_count(update: Any) -> int:
    """How many numbers an update or a whole adapter trains."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(update))
