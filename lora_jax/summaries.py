"""What an adapter adds to a model, and how the model is stored, as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.lora import Lora, parameter_count
from lora_jax.quantization.quantized import Quantized
from lora_jax.tree import Update, check_fits, leaves_by_path


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight that is updated, or quantized.

    Attributes:
      path: where it stands.
      shape: the base's shape.
      bits: how many the stored base has for each element, scales included.
      axes: what each axis does, such as `"in, out"`; `"whole"` for one trained whole.
      rank: r, or None for a weight without a low-rank update.
      trainable: how many numbers train.
      share: `trainable` over the weight's own number of elements.
    """

    path: str
    shape: tuple[int, ...]
    bits: float
    axes: str
    rank: int | None
    trainable: int
    share: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """An adapter and its base in numbers; prints as a table.

    Attributes:
      rows: one for each weight that is updated or quantized.
      total: number of parameters of the base.
      trainable: number of parameters that train.
      nbytes: bytes that the base takes as it is stored.
    """

    rows: tuple[Row, ...]
    total: int
    trainable: int
    nbytes: int

    @property
    def share(self) -> float:
        """Trainable parameters over the base's."""
        return self.trainable / self.total

    @property
    def bits(self) -> float:
        """Bits of the stored base for each of its parameters."""
        return 8 * self.nbytes / self.total

    @property
    def totals(self) -> str:
        """The line under the table."""
        return (
            f"{self.trainable:,} of {self.total:,} parameters train ({self.share:.4%}). The base "
            f"takes {self.nbytes / 1e6:,.3f} MB, {_bits(self.bits)} bits a parameter."
        )

    def __str__(self) -> str:
        head = ("path", "shape", "axes", "bits", "rank", "trainable", "share")
        body = [
            (
                row.path,
                " x ".join(map(str, row.shape)) or "scalar",
                row.axes,
                _bits(row.bits),
                "-" if row.rank is None else str(row.rank),
                f"{row.trainable:,}",
                f"{row.share:.2%}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if index < 3 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, *body)
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*lines, self.totals])

    __repr__ = __str__


def summary(params: Any, adapter: Mapping[str, Update]) -> Summary:
    """Counts what an adapter trains, and what its base takes.

    Args:
      params: the base W0, quantized or not; arrays or `jax.ShapeDtypeStruct`.
      adapter: path -> update; may be empty.

    Returns:
      A `Summary`, which prints as a table.

    Raises:
      ValueError: the adapter does not fit `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from lora_jax.adapters.lora import Axes
      >>> update = Lora(jnp.ones((64, 2)), jnp.ones((2, 64)), Axes((), (0,), (1,)), scale=1.0)
      >>> print(summary({"w": jnp.ones((64, 64)), "b": jnp.ones(64)}, {"w": update}))
      path  shape    axes     bits  rank  trainable  share
      ----------------------------------------------------
      w     64 x 64  in, out    32     2        256  6.25%
      256 of 4,160 parameters train (6.1538%). The base takes 0.017 MB, 32 bits a parameter.
    """
    leaves = {path: leaf for path, leaf in leaves_by_path(params).items() if hasattr(leaf, "shape")}
    check_fits(leaves, adapter)
    rows = []
    quantized = [path for path, leaf in leaves.items() if isinstance(leaf, Quantized)]
    for path in dict.fromkeys((*adapter, *quantized)):
        update, leaf = adapter.get(path), leaves[path]
        size = max(1, math.prod(leaf.shape))
        low_rank = isinstance(update, Lora)
        count = parameter_count(update)
        rows.append(
            Row(
                path=path,
                shape=tuple(leaf.shape),
                bits=8 * stored_bytes(leaf) / size,
                axes=str(update.axes if low_rank else leaf.axes if update is None else "whole"),
                rank=update.rank if low_rank else None,
                trainable=count,
                share=count / size,
            )
        )
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    nbytes = sum(map(stored_bytes, leaves.values()))
    return Summary(tuple(rows), total, sum(row.trainable for row in rows), nbytes)


def stored_bytes(leaf: Any) -> int:
    """Bytes that a leaf takes as it is stored: an array, abstract or not, or a virtual weight."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(leaf))


def _bits(bits: float) -> str:
    return f"{bits:.3f}".rstrip("0").rstrip(".")
