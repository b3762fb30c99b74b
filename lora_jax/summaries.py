"""What an adapter adds to a model, as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lora_jax.adapters.lora import Lora, parameter_count
from lora_jax.tree import Update, check_fits, leaves_by_path


@dataclasses.dataclass(frozen=True)
class Row:
    """One updated weight.

    Attributes:
      path: where it stands.
      shape: the base's shape.
      axes: what each axis does, such as `"in, out"`; `"whole"` for one trained whole.
      rank: r, or None for a weight trained whole.
      trainable: how many numbers train.
      share: `trainable` over the weight's own number of elements.
    """

    path: str
    shape: tuple[int, ...]
    axes: str
    rank: int | None
    trainable: int
    share: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """An adapter and its base in numbers; prints as a table.

    Attributes:
      rows: one for each updated weight.
      total: number of parameters of the base.
      trainable: number of parameters that train.
    """

    rows: tuple[Row, ...]
    total: int
    trainable: int

    @property
    def share(self) -> float:
        """Trainable parameters over the base's."""
        return self.trainable / self.total

    def __str__(self) -> str:
        head = ("path", "shape", "axes", "rank", "trainable", "share")
        body = [
            (
                row.path,
                " x ".join(map(str, row.shape)) or "scalar",
                row.axes,
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
        total = f"{self.trainable:,} of {self.total:,} parameters train ({self.share:.4%})"
        return "\n".join([*lines, total])

    __repr__ = __str__


def summary(params: Any, adapter: Mapping[str, Update]) -> Summary:
    """Counts what an adapter trains.

    Args:
      params: the base W0; arrays or `jax.ShapeDtypeStruct`.
      adapter: path -> update.

    Returns:
      A `Summary`, which prints as a table.

    Raises:
      ValueError: the adapter does not fit `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from lora_jax.adapters.lora import Axes
      >>> update = Lora(jnp.ones((64, 2)), jnp.ones((2, 64)), Axes((), (0,), (1,)), scale=1.0)
      >>> print(summary({"w": jnp.ones((64, 64)), "b": jnp.ones(64)}, {"w": update}))
      path  shape    axes     rank  trainable  share
      ----------------------------------------------
      w     64 x 64  in, out     2        256  6.25%
      256 of 4,160 parameters train (6.1538%)
    """
    leaves = {path: leaf for path, leaf in leaves_by_path(params).items() if hasattr(leaf, "shape")}
    check_fits(leaves, adapter)
    rows = []
    for path, update in adapter.items():
        shape = update.shape
        low_rank = isinstance(update, Lora)
        count = parameter_count(update)
        rows.append(
            Row(
                path=path,
                shape=shape,
                axes=str(update.axes) if low_rank else "whole",
                rank=update.rank if low_rank else None,
                trainable=count,
                share=count / max(1, math.prod(shape)),
            )
        )
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    return Summary(tuple(rows), total, sum(row.trainable for row in rows))
