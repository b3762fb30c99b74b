"""How the decoder's parameters, activations and batches are split over a mesh of devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from lora_jax.models.config import DecoderConfig

DECODER_AXES = ("data", "fsdp", "tensor")
"""Mesh axes over which anything of the decoder is split."""

ROWS = ("data", "fsdp")
"""Those over which the rows of a batch are."""

_KERNELS = {
    # Into heads and hidden units, which `tensor` splits, and out of them again.
    "*/q_proj/kernel": ("fsdp", "tensor"),
    "*/k_proj/kernel": ("fsdp", "tensor"),
    "*/v_proj/kernel": ("fsdp", "tensor"),
    "*/o_proj/kernel": ("tensor", "fsdp"),
    "*/gate_proj/kernel": ("fsdp", "tensor"),
    "*/up_proj/kernel": ("fsdp", "tensor"),
    "*/down_proj/kernel": ("tensor", "fsdp"),
    "*/?_proj/bias": ("tensor",),
}


def row_axes(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Which axes of a mesh the rows of a batch are split over.

    Args:
        sizes: Name -> size of the mesh's axes, such as `mesh.shape`.
    """
    return tuple(name for name in ROWS if name in sizes)


def row_parts(sizes: Mapping[str, int]) -> int:
    """Into how many parts a mesh splits the rows of a batch.

    Args:
        sizes: Name -> size of the mesh's axes.

    >>> row_parts({"data": 2, "fsdp": 4, "tensor": 8})
    8
    """
    return math.prod(sizes[name] for name in row_axes(sizes))


def partition_rules(config: DecoderConfig) -> dict[str, PartitionSpec]:
    """Rules for `lora_jax.params_shardings`.

    `fsdp` splits every matrix along the residual stream, and XLA gathers a layer when it is its
    turn; `tensor` splits heads, hidden units and the vocabulary. Norms are whole everywhere.

    Args:
        config: The decoder.

    Returns:
        Glob pattern over a parameter's path -> the partition of its axes.

    >>> config = DecoderConfig(
    ...     vocab_size=64, hidden_size=8, intermediate_size=16, num_layers=2,
    ...     num_heads=2, num_kv_heads=1, head_dim=4, scan_layers=True)
    >>> tuple(partition_rules(config)["*/q_proj/kernel"])
    (None, 'fsdp', 'tensor')
    """
    stack = (None,) if config.scan_layers else ()
    layers = {pattern: PartitionSpec(*stack, *axes) for pattern, axes in _KERNELS.items()}
    return {
        **layers,
        "embed/embedding": PartitionSpec("tensor", "fsdp"),
        "lm_head/kernel": PartitionSpec("fsdp", "tensor"),
        "*/scale": PartitionSpec(),
    }


def hold(x: jax.Array, *entries: Any) -> jax.Array:
    """Holds an array to a split, on the mesh of `jax.set_mesh`.

    XLA may otherwise split the residual stream as `fsdp` splits the weights, so that every device
    computes all rows. Without a mesh, or in a `shard_map`, nothing is held.

    Args:
        x: The array.
        entries: For each of its axes, from the first, the mesh axes that split it: a name, a tuple
            of names, or `None`. What the mesh does not have, or does not divide, is passed over.
            None at all: whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Auto not in kinds.values():
        return x

    def there(size: int, entry: Any) -> Any:
        names = entry if isinstance(entry, tuple) else (entry,)
        kept = tuple(name for name in names if kinds.get(name) == AxisType.Auto)
        return None if size % math.prod(mesh.shape[name] for name in kept) else kept or None

    return lax.with_sharding_constraint(x, PartitionSpec(*map(there, x.shape, entries)))
